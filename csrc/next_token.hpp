// Chooses each running sequence's next token: the C++ twin of protnest/kernels/next_token.py, which holds the contract.
#pragma once

#include <cstdint>

#include "level.hpp"
#include "row_numbers.hpp"

namespace protnest {

struct NextTokenInput {
    Product logits;  // (B, V)
    const std::uint8_t* seen_SV;
    const std::int64_t* slots_B;  // below S
    const std::int32_t* sizes_V;
    const std::int64_t* room_B;
    const std::uint8_t* may_end_B;
    const double* uniform_B;
    std::int64_t sequences, vocabulary, end;
    float repetition_penalty;
    double temperature;
    std::int64_t top_k;  // 1 to V
    double top_p;        // 1 or more keeps all
};

// chosen_B from 0 to V - 1; where a row holds NaN or infinity, or nothing is left, it is `end`, with NaN beside it.
void next_token(const NextTokenInput& input, Level level, int threads, std::int64_t* chosen_B, double* log_p_B);

}  // namespace protnest
