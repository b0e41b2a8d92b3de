// A row is read once, worked on in the first-level cache, and written once. Compiled for each level by macros, since a
// function that is compiled for a level can only inline what is.
#include "row_passes.hpp"

#include <cmath>

namespace protnest {

namespace {

struct AddNorm {
    std::int64_t C;
    float* x_NC;
    Product product;
    Columns columns;
    std::vector<float> weight, bias;
    float eps;
    Target target;

    template <int W>
    PROTNEST_INLINE void run(std::int64_t begin, std::int64_t end, float* row) const {
        using IO = RowIO<W>;
        using L = Lanes<W>;
        using Float = typename L::Float;
        const bool adds = product.values != nullptr;
        const std::int64_t padded_C = (C + W - 1) / W * W;
        const float count = static_cast<float>(C);
        for (std::int64_t n = begin; n < end; ++n) {
            float* x_C = x_NC + n * C;
            Float total{};
            for (std::int64_t c = 0; c < C; c += W) {
                Float value = IO::template load<Float>(x_C + c, C - c);
                if (adds) {
                    value += IO::read(product, columns, n, c, C);
                    IO::store(x_C + c, value, C - c);
                }
                L::store(row + c, value);
                total += value;
            }
            if (weight.empty()) continue;
            const float mean = IO::sum(total) / count;
            // Lanes beyond the row are as far from the mean as nothing is. To take their squares off the sum afterwards
            // would cancel: at a mean of 1,000 times the spread little would be left of the variance.
            for (std::int64_t c = C; c < padded_C; ++c) row[c] = mean;
            Float squares{};
            for (std::int64_t c = 0; c < C; c += W) {
                const Float off = L::load(row + c) - mean;
                squares += off * off;
            }
            const float variance = IO::sum(squares) / count;
            const float scale = 1.0f / std::sqrt(variance + eps);
            for (std::int64_t c = 0; c < C; c += W) {
                const Float off = (L::load(row + c) - mean) * scale;
                L::store(row + c, off * L::load(weight.data() + c) + L::load(bias.data() + c));
            }
            IO::write(row, C, target, n);
        }
    }
};

struct BiasGelu {
    std::int64_t C;
    Product product;
    Columns columns;
    std::vector<float> times, minus;
    Target target;

    // x Phi(x), the error function by Abramowitz and Stegun 7.1.26: an absolute error of 7.5e-8 in Phi.
    template <int W>
    static PROTNEST_INLINE typename Lanes<W>::Float gelu(typename Lanes<W>::Float x) {
        using L = Lanes<W>;
        using Float = typename L::Float;
        const Float z = (x < 0.0f ? -x : x) * 0.70710678f;
        const Float t = 1.0f / (z * 0.3275911f + 1.0f);
        Float series = t * 1.061405429f - 1.453152027f;
        series = series * t + 1.421413741f;
        series = series * t - 0.284496736f;
        series = series * t + 0.254829592f;
        // Half of erfc(z): Phi(-|x|).
        const Float tail = series * t * 0.5f * L::template exp2<5>(z * z * -1.44269504f);
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }

    template <int W>
    PROTNEST_INLINE void run(std::int64_t begin, std::int64_t end, float* row) const {
        using IO = RowIO<W>;
        using L = Lanes<W>;
        for (std::int64_t n = begin; n < end; ++n) {
            for (std::int64_t c = 0; c < C; c += W) {
                auto value = gelu<W>(IO::read(product, columns, n, c, C));
                if (!times.empty()) value = value * L::load(times.data() + c) - L::load(minus.data() + c);
                L::store(row + c, value);
            }
            IO::write(row, C, target, n);
        }
    }
};

struct QuantiseRows {
    std::int64_t C;
    const float* x_NC;
    Target target;

    template <int W>
    PROTNEST_INLINE void run(std::int64_t begin, std::int64_t end, float* row) const {
        for (std::int64_t n = begin; n < end; ++n) {
            std::copy_n(x_NC + n * C, C, row);
            RowIO<W>::write_levels(row, C, target, n);
        }
    }
};

template <typename Pass>
void run_portable(const Pass& pass, std::int64_t begin, std::int64_t end, float* row) {
    pass.template run<4>(begin, end, row);
}

#if defined(PROTNEST_X86_LEVELS)
template <typename Pass>
PROTNEST_V3 void run_v3(const Pass& pass, std::int64_t begin, std::int64_t end, float* row) {
    pass.template run<8>(begin, end, row);
}

template <typename Pass>
PROTNEST_V4 void run_v4(const Pass& pass, std::int64_t begin, std::int64_t end, float* row) {
    pass.template run<16>(begin, end, row);
}
#endif

template <typename Pass>
void run(const Pass& pass, std::int64_t N, Level level, int threads) {
    auto* chosen = &run_portable<Pass>;
#if defined(PROTNEST_X86_LEVELS)
    if (level >= Level::v4) {
        chosen = &run_v4<Pass>;
    } else if (level == Level::v3) {
        chosen = &run_v3<Pass>;
    }
#endif
    share_rows(N, threads_for(N, pass.C, threads), [&](std::int64_t begin, std::int64_t end) {
        Row row = make_row(pass.C);
        chosen(pass, begin, end, row.data());
    });
}

}  // namespace

void add_norm(std::int64_t N, std::int64_t C, float* x_NC, const Product& product, const Norm& norm, Level level,
              int threads, const Target& target) {
    const AddNorm pass{C,
                       x_NC,
                       product,
                       Columns(product, C),
                       padded(norm.weight_C, C),
                       padded(norm.bias_C, C),
                       norm.eps,
                       target};
    run(pass, N, level, threads);
}

void bias_gelu(std::int64_t N, std::int64_t C, const Product& product, const float* times_C, const float* minus_C,
               Level level, int threads, const Target& target) {
    const BiasGelu pass{C,
                        product,
                        Columns(product, C),
                        padded(times_C, C),
                        padded(minus_C, C),
                        target};
    run(pass, N, level, threads);
}

void quantise_rows(std::int64_t N, std::int64_t C, const float* x_NC, Level level, int threads, const Target& target) {
    run(QuantiseRows{C, x_NC, target}, N, level, threads);
}

}  // namespace protnest
