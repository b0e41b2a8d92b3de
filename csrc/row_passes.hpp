// What happens to rows between a layer's matrix products, each in one pass over memory: the C++ twins of
// protnest/kernels/add_norm.py, bias_gelu.py and quantise_rows.py, which hold the contracts.
#pragma once

#include <cstdint>

#include "row_numbers.hpp"

namespace protnest {

// x += product (where its values are set); then, where `weight_C` is set, the LayerNorm of x into the target.
struct Norm {
    const float* weight_C;
    const float* bias_C;
    float eps;
};
void add_norm(std::int64_t N, std::int64_t C, float* x_NC, const Product& product, const Norm& norm, Level level,
              int threads, const Target& target);

// gelu(product) into the target; where `times_C` is set, gelu(product) * times - minus. The target may be the product's
// own fp32 values.
void bias_gelu(std::int64_t N, std::int64_t C, const Product& product, const float* times_C, const float* minus_C,
               Level level, int threads, const Target& target);

// fp32 rows as levels.
void quantise_rows(std::int64_t N, std::int64_t C, const float* x_NC, Level level, int threads, const Target& target);

}  // namespace protnest
