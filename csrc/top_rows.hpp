// The rows with the largest scalar products with each query: the C++ twin of protnest/kernels/top_rows.py, which holds
// the contract.
#pragma once

#include <cstdint>

#include "level.hpp"

namespace protnest {

// What is known so far of the k best rows of Q queries, as heaps whose first has the smallest score.
struct BestRows {
    std::int64_t k;
    float* scores_Qk;
    std::int64_t* rows_Qk;
};

// Goes through N more rows of K numbers, `first` and following.
void top_rows(std::int64_t N, std::int64_t K, std::int64_t Q, const float* rows_NK, std::int64_t first,
              const float* queries_QK, const BestRows& best, Level level, int threads);

}  // namespace protnest
