// Products stay in registers. A tile of eight vectors of rows is turned into columns, so that a lane is a row; each
// query runs through it, and the largest of its products is compared with the query's k-th best. Rarely is there more
// to do: of N rows about k (1 + ln(N / k)) ever were among the best.
//
// Shapes: N rows, K numbers of each, Q queries, k best of each; W lanes.
#include "top_rows.hpp"

#include <algorithm>
#include <vector>

#include "lanes.hpp"
#include "row_numbers.hpp"

namespace protnest {
namespace {

constexpr int kVectors = 8;

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

    template <int W>
    PROTNEST_INLINE void run(std::int64_t begin, std::int64_t end, float* tile) const {
        using L = Lanes<W>;
        constexpr std::int64_t R = kVectors * W;
        float products[R];
        for (std::int64_t n = 0; n < N; n += R) {
            const std::int64_t count = std::min(R, N - n);
            for (std::int64_t r = 0; r < count; ++r) {
                for (std::int64_t k = 0; k < K; ++k) tile[k * R + r] = rows_NK[(n + r) * K + k];
            }
            for (std::int64_t q = begin; q < end; ++q) {
                const float* query = queries_QK + q * K;
                typename L::Float sums[kVectors] = {};
                for (std::int64_t k = 0; k < K; ++k) {
                    const typename L::Float times = L::all(query[k]);
                    const float* column = tile + k * R;
                    for (int v = 0; v < kVectors; ++v) sums[v] += times * L::load(column + v * W);
                }
                typename L::Float largest = sums[0];
                for (int v = 1; v < kVectors; ++v) largest = L::larger(sums[v], largest);
                L::store(products, largest);
                const float least = best.scores_Qk[q * best.k];
                float top = products[0];
                for (int lane = 1; lane < W; ++lane) top = std::max(top, products[lane]);
                if (!(top > least)) continue;
                for (int v = 0; v < kVectors; ++v) L::store(products + v * W, sums[v]);
                for (std::int64_t r = 0; r < count; ++r) {
                    if (products[r] > best.scores_Qk[q * best.k]) replace_worst(q, products[r], first + n + r);
                }
            }
        }
    }
};

void run_portable(const Scan& scan, std::int64_t begin, std::int64_t end, float* tile) {
    scan.run<4>(begin, end, tile);
}

#if defined(PROTNEST_X86_LEVELS)
PROTNEST_V3 void run_v3(const Scan& scan, std::int64_t begin, std::int64_t end, float* tile) {
    scan.run<8>(begin, end, tile);
}

PROTNEST_V4 void run_v4(const Scan& scan, std::int64_t begin, std::int64_t end, float* tile) {
    scan.run<16>(begin, end, tile);
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
        std::vector<float> tile(static_cast<std::size_t>(K * kVectors * 16));
        chosen(scan, begin, end, tile.data());
    });
}

}  // namespace protnest
