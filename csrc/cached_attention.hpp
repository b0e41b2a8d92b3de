// One new token for each of some sequences attends to its sequence's cached keys and values: the C++ twin of
// protnest/kernels/cached_attention.py, which holds the contract.
#pragma once

#include <cstdint>

#include "level.hpp"
#include "row_numbers.hpp"

namespace protnest {

// How a cache stores its numbers.
enum class Stored { fp32, bf16 };

struct CacheInput {
    Product qkv;  // (B, 3H, K), contiguous: H queries, H keys, H values
    Stored stored;
    void* keys_SHPK;  // contiguous, as values
    void* values_SHPK;
    const std::int64_t* slots_B;    // below S, no two alike
    const std::int64_t* lengths_B;  // tokens in the cache before this one, below P
    std::int64_t sequences, heads, head_width, places;
};

// Head widths are multiples of this.
constexpr std::int64_t kHeadWidths = 8;

// Writes each token's key and value to place `lengths_B` of its slot, then attends to it and all before it; `out` is
// (B, H, K): bf16 where qkv is, else fp32.
void cached_attention(const CacheInput& input, Level level, int threads, void* out);

}  // namespace protnest
