// Attention over packed sequences with the rotary turn fused in: the C++ twin of protnest/kernels/rotary_attention.py,
// which holds the contract.
#pragma once

#include <cstdint>

#include "level.hpp"
#include "row_numbers.hpp"

namespace protnest {

struct AttentionInput {
    Product qkv;          // (T, 3H, K), contiguous: H queries, H keys, H values
    const float* cos_PJ;  // (P, K / 2), P at least the longest sequence
    const float* sin_PJ;
    const std::int32_t* cu_seqlens;  // (B + 1)
    std::int64_t sequences, heads, head_width;
    // Tokens whose attention is wanted, those of a sequence together and in the sequences' order, and where each
    // sequence's begin, (B + 1); null for all tokens.
    const std::int64_t* rows = nullptr;
    const std::int64_t* cu_rows = nullptr;
};

// How products of bf16 input are formed: `wide` are fp32 factors; `pairs` are two bf16 factors in one step, in hardware
// at level v4_bf16 and at v4 emulated, so that processors without them can test all but the instruction. fp32 input and
// lower levels know only wide ones.
enum class Factors { wide, pairs };

// Writes (T, H, K), or of R rows (R, H, K): bf16 where qkv is, else fp32.
void rotary_attention(const AttentionInput& input, Level level, Factors factors, int threads, void* out);

}  // namespace protnest
