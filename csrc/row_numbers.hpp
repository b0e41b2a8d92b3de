// Rows on their way from one matrix product to the next: read as a product left them, written as the next one takes them.
//
// Shapes: N rows, C columns of one, W lanes of a vector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.hpp"

namespace protnest {

// What a product left. `fp32` and `bf16` are numbers, to which `bias_C` is still to be added where it is set. `integers`
// are int32 sums of eight-bit levels: row n, column c stands for
// scale[n] * (steps[c] * value) + (shift[n] * sums[c] + bias[c]).
enum class Left { fp32, bf16, integers };

struct Product {
    const void* values;
    Left left;
    const float* bias_C;
    const float* steps_C;
    const float* sums_C;
    const float* scale_N;
    const float* shift_N;
};

// What the next product takes: fp32, bf16, or levels from -128 to 127 that stand for scale[n] * level + shift[n].
enum class Taken { fp32, bf16, levels };

struct Target {
    Taken taken;
    void* values;
    float* scale_N;
    float* shift_N;
};

// A vector of C numbers with zeros up to whole vectors of 16 lanes; empty for null.
inline std::vector<float> padded(const float* from, std::int64_t C) {
    std::vector<float> result;
    if (from == nullptr) return result;
    result.assign((C + 15) / 16 * 16, 0.0f);
    std::copy_n(from, C, result.begin());
    return result;
}

// The columns' numbers of a product, padded.
struct Columns {
    std::vector<float> bias, steps, sums;

    Columns(const Product& product, std::int64_t C)
        : bias(padded(product.bias_C, C)), steps(padded(product.steps_C, C)), sums(padded(product.sums_C, C)) {}
};

// A row's numbers while they are worked on, with room for whole vectors.
using Row = std::vector<float>;
inline Row make_row(std::int64_t C) { return Row((C + 15) / 16 * 16); }

// Vectors of narrow numbers and their conversions, which the compiler does not take from templates.
template <int W>
struct NarrowTypes;
#define PROTNEST_NARROW(W)                                                                                     \
    template <>                                                                                                \
    struct NarrowTypes<W> {                                                                                    \
        typedef std::uint16_t Halves __attribute__((vector_size(2 * W)));                                      \
        typedef std::uint8_t Bytes __attribute__((vector_size(W)));                                            \
        typedef std::uint32_t Unsigned __attribute__((vector_size(4 * W)));                                    \
        static PROTNEST_INLINE Lanes<W>::Float to_float(Lanes<W>::Int value) {                                 \
            return __builtin_convertvector(value, Lanes<W>::Float);                                            \
        }                                                                                                      \
        static PROTNEST_INLINE Unsigned widen(Halves value) { return __builtin_convertvector(value, Unsigned); } \
        static PROTNEST_INLINE Halves to_halves(Unsigned value) { return __builtin_convertvector(value, Halves); } \
        static PROTNEST_INLINE Bytes to_bytes(Unsigned value) { return __builtin_convertvector(value, Bytes); } \
    };
PROTNEST_NARROW(4)
PROTNEST_NARROW(8)
PROTNEST_NARROW(16)
#undef PROTNEST_NARROW

template <int W>
struct RowIO {
    using L = Lanes<W>;
    using Float = typename L::Float;
    using Int = typename L::Int;
    using Types = NarrowTypes<W>;
    using Halves = typename Types::Halves;
    using Unsigned = typename Types::Unsigned;

    // The first `count` lanes of memory; the others are zero.
    template <typename Vector, typename Number>
    static PROTNEST_INLINE Vector load(const Number* from, std::int64_t count) {
        Vector value{};
        if (count >= W) {
            std::memcpy(&value, from, sizeof value);
        } else {
            std::memcpy(&value, from, count * sizeof(Number));
        }
        return value;
    }

    template <typename Vector, typename Number>
    static PROTNEST_INLINE void store(Number* to, Vector value, std::int64_t count) {
        if (count >= W) {
            std::memcpy(to, &value, sizeof value);
        } else {
            std::memcpy(to, &value, count * sizeof(Number));
        }
    }

    // Lanes c .. c + W of row n of a product, as numbers.
    static PROTNEST_INLINE Float read(const Product& product, const Columns& columns, std::int64_t n, std::int64_t c,
                                      std::int64_t C) {
        if (product.left == Left::integers) {
            const Int sums = load<Int>(static_cast<const std::int32_t*>(product.values) + n * C + c, C - c);
            const Float value = L::load(columns.steps.data() + c) * Types::to_float(sums);
            const Float shift = L::load(columns.sums.data() + c) * product.shift_N[n] + L::load(columns.bias.data() + c);
            return value * product.scale_N[n] + shift;
        }
        Float value;
        if (product.left == Left::bf16) {
            const auto* from = static_cast<const std::uint16_t*>(product.values) + n * C + c;
            value = reinterpret_cast<Float>(Types::widen(load<Halves>(from, C - c)) << 16);
        } else {
            value = load<Float>(static_cast<const float*>(product.values) + n * C + c, C - c);
        }
        return product.bias_C == nullptr ? value : value + L::load(columns.bias.data() + c);
    }

    // Rounds to nearest even; NaN stays NaN.
    static PROTNEST_INLINE Halves to_bf16(Float value) {
        const Unsigned bits = reinterpret_cast<Unsigned>(value);
        const Unsigned rounded = value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
        return Types::to_halves(rounded >> 16);
    }

    // Hides a value from the compiler, which would join a product with the sum after it and so round once less.
    static PROTNEST_INLINE Float rounded(Float value) {
#if defined(__x86_64__)
        asm("" : "+v"(value));
#elif defined(__aarch64__)
        asm("" : "+w"(value));
#endif
        return value;
    }

    // The row as levels between its smallest number and its largest, to the nearest, half to even. A row without extent
    // (below 2^-100) has scale 0; one that is not finite has scale and shift NaN.
    static PROTNEST_INLINE void write_levels(const float* row, std::int64_t C, const Target& target, std::int64_t n) {
        Float least = L::all(row[0]), most = least, probe{};
        std::int64_t c = 0;
        for (; c + W <= C; c += W) {
            const Float value = L::load(row + c);
            least = value < least ? value : least;
            most = value > most ? value : most;
            probe += value * 0.0f;  // NaN as soon as one is NaN or infinite
        }
        float low = row[0], high = row[0], finite = 0.0f;
        for (int lane = 0; lane < W; ++lane) {
            low = std::min(low, least[lane]), high = std::max(high, most[lane]), finite += probe[lane];
        }
        for (; c < C; ++c) low = std::min(low, row[c]), high = std::max(high, row[c]), finite += row[c] * 0.0f;
        const float range = high - low;
        auto* to = static_cast<std::uint8_t*>(target.values) + n * C;  // as bytes: a sign is two's complement's
        const bool is_finite = finite == 0.0f && range <= std::numeric_limits<float>::max();
        if (!is_finite || range < 7.8886091e-31f) {
            target.scale_N[n] = is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
            target.shift_N[n] = is_finite ? low : std::numeric_limits<float>::quiet_NaN();
            std::fill_n(to, C, std::uint8_t{0});
            return;
        }
        target.scale_N[n] = range / 255.0f;
        target.shift_N[n] = low + target.scale_N[n] * 128.0f;
        const float inverse = 255.0f / range;
        for (c = 0; c < C; c += W) {
            // Rows have room for whole vectors; what lies beyond is not stored.
            // 1.5 * 2^23 rounds to a whole number in the lowest bits: at most 255, since inverse and product are each off
            // by a part in 2^24 at most.
            const Float scaled = rounded((L::load(row + c) - low) * inverse) + (12582912.0f - 128.0f);
            const Int levels = L::bits(scaled) - 0x4b400000;
            store(to + c, Types::to_bytes(reinterpret_cast<Unsigned>(levels)), C - c);
        }
    }

    static PROTNEST_INLINE void write(const float* row, std::int64_t C, const Target& target, std::int64_t n) {
        if (target.taken == Taken::levels) return write_levels(row, C, target, n);
        for (std::int64_t c = 0; c < C; c += W) {
            if (target.taken == Taken::bf16) {
                store(static_cast<std::uint16_t*>(target.values) + n * C + c, to_bf16(L::load(row + c)), C - c);
            } else {
                store(static_cast<float*>(target.values) + n * C + c, L::load(row + c), C - c);
            }
        }
    }

    static PROTNEST_INLINE float sum(Float value) {
        float result = 0.0f;
        for (int lane = 0; lane < W; ++lane) result += value[lane];
        return result;
    }
};

// Fewer elements than this a thread are done before another thread has begun.
constexpr std::int64_t kElementsOfThread = 1 << 15;

inline int threads_for(std::int64_t rows, std::int64_t columns, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(rows * columns / kElementsOfThread, 1, std::max(threads, 1)));
}

// Cuts N rows among threads and calls ROWS(begin, end) on each part; OpenMP's own loops would not inline into functions
// that are compiled for a level.
template <typename Rows>
void share_rows(std::int64_t N, int threads, const Rows& rows) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int part = 0; part < threads; ++part) rows(N * part / threads, N * (part + 1) / threads);
        return;
    }
#endif
    rows(std::int64_t{0}, N);
}

}  // namespace protnest
