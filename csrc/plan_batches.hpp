// Best-fit decreasing: the C++ twin of protnest/kernels/plan_batches.py, which holds the contract.
#pragma once

#include <cstdint>
#include <vector>

namespace protnest {

// Packs n lengths (each >= 0) into batches of at most `max_tokens` (>= 1). Writes the n indices, batch after batch, to
// `order` and returns the batches' offsets in it (one more than there are batches). Besides `order` it takes 8 bytes
// per length, up to 32 per stretch of equal lengths that enters one batch, and up to 100 per batch; nothing grows with
// `max_tokens`.
std::vector<std::int64_t> plan_batches(const std::int64_t* lengths, std::int64_t n, std::int64_t max_tokens,
                                       std::int64_t* order);

}  // namespace protnest
