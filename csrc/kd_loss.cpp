// Each row of logits is read from memory once or twice and otherwise from the second-level cache: maxima, then
// exponentials and their sums, then the losses. Sums run in fp32 over stretches of 1,024 elements and in fp64 over
// stretches, so that their error does not grow with the vocabulary.
//
// The loops are written for the compiler to vectorise, and compiled for three generations of x86-64 where the toolchain
// can choose among them at run time; elsewhere for the compiler's default.
#include "kd_loss.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PROTNEST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PROTNEST_CLONES
#endif
#if defined(__GNUC__)
#define PROTNEST_INLINE inline __attribute__((always_inline))
#else
#define PROTNEST_INLINE inline
#endif

namespace protnest {

namespace {

constexpr std::int64_t kStretch = 1024;
// Fewer logits than this a thread are done before another thread has started.
constexpr std::int64_t kLogitsOfThread = 1 << 18;

template <typename To, typename From>
PROTNEST_INLINE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// exp of x <= 0, to 1.5 ulp; below -87 it gives exp(-87), 1.6e-38, in place of less.
PROTNEST_INLINE float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    // ln 2 in two parts, the first exact in products with n.
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    return series * bits_as<float>((static_cast<std::int32_t>(n) + 127) << 23);
}

// log of a normal positive number, to 2 ulp.
PROTNEST_INLINE float log_of(float x) {
    const std::int32_t bits = bits_as<std::int32_t>(x);
    // x = m 2^k with m between sqrt(1/2) and sqrt(2); 0x3f3504f3 is sqrt(1/2).
    const std::int32_t k = (bits - 0x3f3504f3) >> 23;
    const float f = bits_as<float>(bits - (k << 23)) - 1.0f;
    // log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + s^5 / 5 + ...)
    const float s = f / (2.0f + f);
    const float square = s * s;
    float series = 1.0f / 9;
    series = series * square + 1.0f / 7;
    series = series * square + 1.0f / 5;
    series = series * square + 1.0f / 3;
    series = series * square + 1.0f;
    const float n = static_cast<float>(k);
    return n * 0.693359375f + (2.0f * s * series - n * 2.12194440e-4f);
}

struct Extent {
    float max;
    bool finite;
};

PROTNEST_INLINE Extent find_extent(const float* z, std::int64_t V) {
    float max = -std::numeric_limits<float>::infinity(), probe = 0.0f;
#pragma omp simd reduction(max : max) reduction(+ : probe)
    for (std::int64_t v = 0; v < V; ++v) {
        max = z[v] > max ? z[v] : max;
        probe += z[v] * 0.0f;  // NaN as soon as one is NaN or infinite
    }
    return {max, probe == 0.0f};
}

// At temperature T with y = (z - max) / T: e = exp(y), and exp(z - max) from e where that is cheaper.
enum class Power { one, two, any };

PROTNEST_INLINE Power power_of(float temperature) {
    return temperature == 1.0f ? Power::one : temperature == 2.0f ? Power::two : Power::any;
}

template <Power P>
PROTNEST_INLINE float exp_1_of(float e, float x) {
    return P == Power::one ? e : P == Power::two ? e * e : exp_of(x);
}

struct Totals {
    double total, total_1, product;
};

// Sums of e, e1 and e1 x along a row, x = z - max; stores e where there is room for it.
template <Power P, bool Store, bool Product>
PROTNEST_INLINE Totals sum_exps(const float* z, std::int64_t V, float max, float inverse_T, float* exps) {
    Totals totals{0, 0, 0};
    for (std::int64_t begin = 0; begin < V; begin += kStretch) {
        const std::int64_t end = std::min(begin + kStretch, V);
        float total = 0.0f, total_1 = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : total, total_1, product)
        for (std::int64_t v = begin; v < end; ++v) {
            const float x = z[v] - max;
            const float e = exp_of(x * inverse_T);
            const float e_1 = exp_1_of<P>(e, x);
            if (Store) exps[v] = e;
            total += e;
            total_1 += e_1;
            if (Product) product += e_1 * x;
        }
        totals.total += total;
        totals.total_1 += total_1;
        totals.product += product;
    }
    return totals;
}

template <bool Store, bool Product>
PROTNEST_INLINE Totals sum_exps(const float* z, std::int64_t V, float max, float temperature, float* exps) {
    const float inverse_T = 1.0f / temperature;
    switch (power_of(temperature)) {
        case Power::one: return sum_exps<Power::one, Store, Product>(z, V, max, inverse_T, exps);
        case Power::two: return sum_exps<Power::two, Store, Product>(z, V, max, inverse_T, exps);
        default: return sum_exps<Power::any, Store, Product>(z, V, max, inverse_T, exps);
    }
}

// sum pbar (log pbar - y_s) with pbar = scale e_t + floor; without a floor log pbar is taken as y_t + log(scale).
template <bool Floor>
PROTNEST_INLINE double sum_cross(const float* exps, const float* t, const float* s, std::int64_t V, float teacher_max,
                                 float student_max, float inverse_T, float scale, float floor) {
    const float log_scale = std::log(scale);
    double sum = 0;
    for (std::int64_t begin = 0; begin < V; begin += kStretch) {
        const std::int64_t end = std::min(begin + kStretch, V);
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (std::int64_t v = begin; v < end; ++v) {
            const float y_s = (s[v] - student_max) * inverse_T;
            const float target = exps[v] * scale + floor;
            const float log_target = Floor ? log_of(target) : (t[v] - teacher_max) * inverse_T + log_scale;
            part += target * (log_target - y_s);
        }
        sum += part;
    }
    return sum;
}

struct ForwardArguments {
    const KDOptions& options;
    Rows student, teacher;
    const std::int64_t* labels;
    const bool* soft;
    const bool* hard;
    const RowScalars& kept;
    float *soft_loss, *hard_loss, *entropy;
};

PROTNEST_CLONES
NotFinite forward_range(const ForwardArguments& in, std::int64_t begin, std::int64_t end, float* exps) {
    const std::int64_t V = in.options.vocabulary;
    const float T = in.options.temperature;
    NotFinite bad{-1, -1};
    for (std::int64_t row = begin; row < end; ++row) {
        if (!in.soft[row] && !in.hard[row]) continue;
        const float* s = in.student.data + row * in.student.stride;
        const float* t = in.teacher.data + row * in.teacher.stride;
        const Extent student = find_extent(s, V), teacher = find_extent(t, V);
        if (!student.finite && bad.student < 0) bad.student = row;
        if (!teacher.finite && bad.teacher < 0) bad.teacher = row;
        if (!student.finite || !teacher.finite) continue;

        const Totals of_teacher = in.options.entropy ? sum_exps<true, true>(t, V, teacher.max, T, exps)
                                                     : sum_exps<true, false>(t, V, teacher.max, T, exps);
        const Totals of_student = sum_exps<false, false>(s, V, student.max, T, nullptr);
        if (in.options.entropy) {
            in.entropy[row] =
                static_cast<float>(std::log(of_teacher.total_1) - of_teacher.product / of_teacher.total_1);
        }
        const double eps = in.options.smoothing * (1 - 1 / of_teacher.total);
        const float scale = static_cast<float>((1 - eps) / of_teacher.total);
        const float floor = static_cast<float>(eps / static_cast<double>(V));
        // Below the least normal number a floor is no help to the logarithm, and none is needed.
        const bool floored = floor >= std::numeric_limits<float>::min();
        const double cross =
            floored ? sum_cross<true>(exps, t, s, V, teacher.max, student.max, 1 / T, scale, floor)
                    : sum_cross<false>(exps, t, s, V, teacher.max, student.max, 1 / T, scale, 0.0f);
        in.soft_loss[row] = static_cast<float>(cross + std::log(of_student.total));
        if (in.hard[row]) {
            in.hard_loss[row] =
                static_cast<float>(std::log(of_student.total_1) - (s[in.labels[row]] - student.max));
        }
        in.kept.student_max[row] = student.max;
        in.kept.student_total[row] = static_cast<float>(of_student.total);
        in.kept.student_total_1[row] = static_cast<float>(of_student.total_1);
        in.kept.teacher_max[row] = teacher.max;
        in.kept.teacher_total[row] = static_cast<float>(of_teacher.total);
        in.kept.eps[row] = static_cast<float>(eps);
    }
    return bad;
}

PROTNEST_CLONES
std::int64_t entropy_range(const KDOptions& options, Rows teacher, const bool* used, float* entropy,
                           std::int64_t begin, std::int64_t end) {
    std::int64_t bad = -1;
    for (std::int64_t row = begin; row < end; ++row) {
        if (!used[row]) continue;
        const float* t = teacher.data + row * teacher.stride;
        const Extent extent = find_extent(t, options.vocabulary);
        if (!extent.finite) {
            if (bad < 0) bad = row;
            continue;
        }
        const Totals totals =
            sum_exps<Power::one, false, true>(t, options.vocabulary, extent.max, 1.0f, nullptr);
        entropy[row] = static_cast<float>(std::log(totals.total) - totals.product / totals.total);
    }
    return bad;
}

struct GradientArguments {
    const KDOptions& options;
    float* out;
    std::int64_t out_stride;
    Rows student, teacher;
    const std::int64_t* labels;
    const RowScalars& kept;
    const float *soft, *hard;
};

// `out` may be `s`: each element is read before it is written.
template <Power P>
PROTNEST_INLINE void write_gradient(float* out, const float* s, const float* t, std::int64_t V, float student_max,
                                    float teacher_max, float inverse_T, float student_scale, float student_scale_1,
                                    float teacher_scale, float floor) {
#pragma omp simd
    for (std::int64_t v = 0; v < V; ++v) {
        const float x = s[v] - student_max;
        const float e = exp_of(x * inverse_T);
        const float target = exp_of((t[v] - teacher_max) * inverse_T) * teacher_scale + floor;
        out[v] = e * student_scale + exp_1_of<P>(e, x) * student_scale_1 - target;
    }
}

PROTNEST_CLONES
void gradient_range(const GradientArguments& in, std::int64_t begin, std::int64_t end) {
    const std::int64_t V = in.options.vocabulary;
    const float T = in.options.temperature;
    for (std::int64_t row = begin; row < end; ++row) {
        float* out = in.out + row * in.out_stride;
        const float soft = in.soft[row], hard = in.hard[row];
        if (soft == 0 && hard == 0) {
            std::fill_n(out, V, 0.0f);
            continue;
        }
        const float* s = in.student.data + row * in.student.stride;
        const float* t = in.teacher.data + row * in.teacher.stride;
        const float eps = in.kept.eps[row];
        const auto write = [&](auto power) {
            write_gradient<decltype(power)::value>(
                out, s, t, V, in.kept.student_max[row], in.kept.teacher_max[row], 1 / T,
                soft / in.kept.student_total[row], hard / in.kept.student_total_1[row],
                soft * (1 - eps) / in.kept.teacher_total[row], soft * eps / static_cast<float>(V));
        };
        switch (power_of(T)) {
            case Power::one: write(std::integral_constant<Power, Power::one>{}); break;
            case Power::two: write(std::integral_constant<Power, Power::two>{}); break;
            default: write(std::integral_constant<Power, Power::any>{});
        }
        if (hard != 0) out[in.labels[row]] -= hard;
    }
}

// Runs `work(part, begin, end)` on consecutive ranges of rows, one a thread.
void share_rows(const KDOptions& options, const std::function<void(int, std::int64_t, std::int64_t)>& work) {
    const std::int64_t worthwhile = options.rows * options.vocabulary / kLogitsOfThread + 1;
    const int parts = static_cast<int>(std::min<std::int64_t>(std::max(1, options.threads), worthwhile));
    std::vector<std::thread> others;
    for (int part = 1; part < parts; ++part) {
        others.emplace_back(work, part, options.rows * part / parts, options.rows * (part + 1) / parts);
    }
    work(0, 0, options.rows / parts);
    for (std::thread& other : others) other.join();
}

std::int64_t first_of(const std::vector<std::int64_t>& rows) {
    for (const std::int64_t row : rows) {
        if (row >= 0) return row;
    }
    return -1;
}

}  // namespace

NotFinite kd_loss_forward(const KDOptions& options, Rows student, Rows teacher, const std::int64_t* labels,
                          const bool* soft, const bool* hard, const RowScalars& kept, float* soft_loss,
                          float* hard_loss, float* entropy) {
    const ForwardArguments arguments{options, student, teacher,   labels,    soft,
                                     hard,    kept,    soft_loss, hard_loss, entropy};
    std::vector<std::int64_t> bad_student(static_cast<std::size_t>(std::max(1, options.threads)), -1);
    std::vector<std::int64_t> bad_teacher = bad_student;
    share_rows(options, [&](int part, std::int64_t begin, std::int64_t end) {
        std::vector<float> exps(static_cast<std::size_t>(options.vocabulary));
        const NotFinite bad = forward_range(arguments, begin, end, exps.data());
        bad_student[static_cast<std::size_t>(part)] = bad.student;
        bad_teacher[static_cast<std::size_t>(part)] = bad.teacher;
    });
    return {first_of(bad_student), first_of(bad_teacher)};
}

std::int64_t entropies(const KDOptions& options, Rows teacher, const bool* used, float* entropy) {
    std::vector<std::int64_t> bad(static_cast<std::size_t>(std::max(1, options.threads)), -1);
    share_rows(options, [&](int part, std::int64_t begin, std::int64_t end) {
        bad[static_cast<std::size_t>(part)] = entropy_range(options, teacher, used, entropy, begin, end);
    });
    return first_of(bad);
}

void kd_loss_gradient(const KDOptions& options, float* out, std::int64_t out_stride, Rows student, Rows teacher,
                      const std::int64_t* labels, const RowScalars& kept, const float* soft, const float* hard) {
    const GradientArguments arguments{options, out, out_stride, student, teacher, labels, kept, soft, hard};
    share_rows(options, [&](int, std::int64_t begin, std::int64_t end) { gradient_range(arguments, begin, end); });
}

}  // namespace protnest
