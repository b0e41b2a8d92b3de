// Vectors of W floats in GNU C's notation, which compiles to whatever the enclosing function is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "level.hpp"

// Vectors are passed between functions that are always inlined: there is no calling convention to differ.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace protnest {

template <int W>
struct Lanes {
    typedef float Float __attribute__((vector_size(sizeof(float) * W)));
    typedef std::int32_t Int __attribute__((vector_size(sizeof(std::int32_t) * W)));

    static PROTNEST_INLINE Float load(const float* from) {
        Float result;
        std::memcpy(&result, from, sizeof result);
        return result;
    }

    static PROTNEST_INLINE void store(float* to, Float value) { std::memcpy(to, &value, sizeof value); }

    static PROTNEST_INLINE Float all(float value) { return value - Float{}; }

    static PROTNEST_INLINE Int bits(Float value) {
        Int result;
        std::memcpy(&result, &value, sizeof result);
        return result;
    }

    static PROTNEST_INLINE Float from_bits(Int value) {
        Float result;
        std::memcpy(&result, &value, sizeof result);
        return result;
    }

    // The larger, and NaN where `candidate` is NaN.
    static PROTNEST_INLINE Float larger(Float candidate, Float known) { return known > candidate ? known : candidate; }

    // 2^x for x <= 0, by a polynomial of degree 5 (relative error 1.6e-7) or 3 (7.5e-5, a fiftieth of an ulp of bf16).
    // Never below 2^-100, since products with less could be subnormal, which costs a hundredfold and changes no sum.
    // NaN stays NaN where its lowest nine bits are zero, see Quad::plain_nan.
    template <int Degree>
    static PROTNEST_INLINE Float exp2(Float x) {
        static_assert(Degree == 3 || Degree == 5, "there are two polynomials");
        x = larger(x, all(-100.0f));
        // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
        const Float shifted = x + 12582912.0f;
        const Float f = x - (shifted - 12582912.0f);
        // Least largest relative error for |f| <= 1/2.
        Float series;
        if constexpr (Degree == 5) {
            series = f * 0.00132764716f + 0.00967554137f;
            series = series * f + 0.0555071328f;
            series = series * f + 0.240221197f;
            series = series * f + 0.693146967f;
            series = series * f + 1.00000007f;
        } else {
            series = f * 0.0551716653f + 0.242611125f;
            series = series * f + 0.693260986f;
            series = series * f + 0.999928073f;
        }
        return from_bits(bits(series) + (bits(shifted) << 23));
    }
};

// Four floats: rows of a head are multiples of two of them, and four rows of four are turned into columns in registers.
struct Quad {
    using Float = Lanes<4>::Float;
    using Int = Lanes<4>::Int;
    typedef std::uint16_t Halves __attribute__((vector_size(8)));
    typedef std::uint32_t Unsigned __attribute__((vector_size(16)));

    static PROTNEST_INLINE Float from_bf16(const std::uint16_t* from) {
        Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        return reinterpret_cast<Float>(__builtin_convertvector(halves, Unsigned) << 16);
    }

    // Bits of bf16 in the upper half of each lane, rounded to nearest even; the lower half is noise. NaN stays NaN.
    static PROTNEST_INLINE Unsigned round_bf16(Float value) {
        const Unsigned bits = reinterpret_cast<Unsigned>(value);
        return value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    }

    static PROTNEST_INLINE void to_bf16(std::uint16_t* to, Float value) {
        const Halves halves = __builtin_convertvector(round_bf16(value) >> 16, Halves);
        std::memcpy(to, &halves, sizeof halves);
    }

    // bf16 of `low` in the lower half of each lane, of `high` in the upper one.
    static PROTNEST_INLINE Int join_bf16(Float low, Float high) {
        return reinterpret_cast<Int>((round_bf16(low) >> 16) | (round_bf16(high) & 0xffff0000u));
    }

    // NaN may carry any bits; exp2 would take the lowest of them for an exponent and make a number of it.
    static PROTNEST_INLINE Float plain_nan(Float value) {
        return value == value ? value : Lanes<4>::all(std::numeric_limits<float>::quiet_NaN());
    }

    static PROTNEST_INLINE void transpose(Float (&rows)[4]) {
        const Float a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
        const Float b = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
        const Float c = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
        const Float d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
        rows[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
        rows[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
        rows[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
        rows[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
    }
};

}  // namespace protnest
