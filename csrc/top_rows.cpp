// Products stay in registers. A tile of eight vectors of rows is turned into columns, so that a lane is a row; each
// query runs through it, and the largest of its products is compared with the query's k-th best. Rarely is there more
// to do: of N rows about k (1 + ln(N / k)) ever were among the best.
//
// Shapes: N rows, K numbers of each, Q queries, k best of each; W lanes.
#include "top_rows.hpp"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include "lanes.hpp"
#include "row_numbers.hpp"

#if defined(PROTNEST_X86_LEVELS)
#include <immintrin.h>
#endif

namespace protnest {
namespace {

constexpr int kVectors = 8;
constexpr std::size_t kLineFloats = 16;

// W floats: all the same, and whether any is above `least`. In `run` GCC 12 makes sixteen masked moves of Lanes<16>::all,
// which cost more than the products.
struct Portable {
    static constexpr int W = 4;
    static PROTNEST_INLINE Lanes<4>::Float all(float value) { return Lanes<4>::all(value); }
    static PROTNEST_INLINE bool any_above(Lanes<4>::Float values, float least) {
        return (values[0] > least) | (values[1] > least) | (values[2] > least) | (values[3] > least);
    }
};

#if defined(PROTNEST_X86_LEVELS)
struct V3 {
    static constexpr int W = 8;
    PROTNEST_V3 static inline Lanes<8>::Float all(float value) { return (Lanes<8>::Float)_mm256_set1_ps(value); }
    PROTNEST_V3 static inline bool any_above(Lanes<8>::Float values, float least) {
        return _mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_set1_ps(least), _CMP_GT_OQ)) != 0;
    }
};

struct V4 {
    static constexpr int W = 16;
    PROTNEST_V4 static inline Lanes<16>::Float all(float value) { return (Lanes<16>::Float)_mm512_set1_ps(value); }
    PROTNEST_V4 static inline bool any_above(Lanes<16>::Float values, float least) {
        return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(least), _CMP_GT_OQ) != 0;
    }
};
#endif

struct Scan {
    std::int64_t N, K;
    const float* rows_NK;
    std::int64_t first;
    const float* queries_QK;
    BestRows best;

    // Puts a row in the place of the worst of the k best and lets it sink. Of equal scores the later row is the worse.
    void replace_worst(std::int64_t q, float score, std::int64_t row) const {
        float* scores = best.scores_Qk + q * best.k;
        std::int64_t* rows = best.rows_Qk + q * best.k;
        const auto is_worse = [](float a, std::int64_t a_row, float b, std::int64_t b_row) {
            return a < b || (a == b && a_row > b_row);
        };
        std::int64_t place = 0;
        for (std::int64_t child = 1; child < best.k; child = 2 * place + 1) {
            if (child + 1 < best.k && is_worse(scores[child + 1], rows[child + 1], scores[child], rows[child])) ++child;
            if (!is_worse(scores[child], rows[child], score, row)) break;
            scores[place] = scores[child], rows[place] = rows[child];
            place = child;
        }
        scores[place] = score, rows[place] = row;
    }

    template <typename V>
    PROTNEST_INLINE void run(std::int64_t begin, std::int64_t end, float* tile) const {
        constexpr int W = V::W;
        constexpr std::int64_t R = kVectors * W;
        using L = Lanes<W>;
        for (std::int64_t n = 0; n < N; n += R) {
            const std::int64_t count = std::min(R, N - n);
            for (std::int64_t r = 0; r < count; ++r) {
                for (std::int64_t k = 0; k < K; ++k) tile[k * R + r] = rows_NK[(n + r) * K + k];
            }
            for (std::int64_t q = begin; q < end; ++q) {
                const float* query = queries_QK + q * K;
                const float* least = best.scores_Qk + q * best.k;
                typename L::Float sums[kVectors] = {};
                for (std::int64_t k = 0; k < K; ++k) {
                    const typename L::Float times = V::all(query[k]);
                    const float* column = tile + k * R;
                    for (int v = 0; v < kVectors; ++v) sums[v] += times * L::load(column + v * W);
                }
                typename L::Float largest = sums[0];
                for (int v = 1; v < kVectors; ++v) largest = L::larger(sums[v], largest);
                if (!V::any_above(largest, *least)) continue;
                for (int v = 0; v < kVectors; ++v) {
                    if (!V::any_above(sums[v], *least)) continue;
                    float products[W];
                    L::store(products, sums[v]);
                    const std::int64_t lanes = std::min<std::int64_t>(W, count - v * W);
                    for (std::int64_t lane = 0; lane < lanes; ++lane) {
                        if (products[lane] > *least) replace_worst(q, products[lane], first + n + v * W + lane);
                    }
                }
            }
        }
    }
};

void run_portable(const Scan& scan, std::int64_t begin, std::int64_t end, float* tile) {
    scan.run<Portable>(begin, end, tile);
}

#if defined(PROTNEST_X86_LEVELS)
PROTNEST_V3 void run_v3(const Scan& scan, std::int64_t begin, std::int64_t end, float* tile) {
    scan.run<V3>(begin, end, tile);
}

PROTNEST_V4 void run_v4(const Scan& scan, std::int64_t begin, std::int64_t end, float* tile) {
    scan.run<V4>(begin, end, tile);
}
#endif

}  // namespace

void top_rows(std::int64_t N, std::int64_t K, std::int64_t Q, const float* rows_NK, std::int64_t first,
              const float* queries_QK, const BestRows& best, Level level, int threads) {
    const Scan scan{N, K, rows_NK, first, queries_QK, best};
    auto* chosen = &run_portable;
#if defined(PROTNEST_X86_LEVELS)
    if (level >= Level::v4) {
        chosen = &run_v4;
    } else if (level == Level::v3) {
        chosen = &run_v3;
    }
#endif
    share_rows(Q, threads_for(Q, N * K, threads), [&](std::int64_t begin, std::int64_t end) {
        // The last tile's end keeps what the tile before it left there, and is passed over.
        std::vector<float> room(static_cast<std::size_t>(K) * kVectors * kLineFloats + kLineFloats);
        // A vector across two cache lines is loaded at half the speed.
        void* tile = room.data();
        std::size_t bytes = room.size() * sizeof(float);
        std::align(kLineFloats * sizeof(float), 1, tile, bytes);
        chosen(scan, begin, end, static_cast<float*>(tile));
    });
}

}  // namespace protnest
