// Some heads of one sequence at a time: they are packed, turned and widened once, then for each head blocks of queries stand
// in the lanes of vectors while keys pass by in broadcasts. Softmax is then lane by lane, without sums across lanes, and
// a head width needs no multiple of the vector's. Scores of a tile of keys, their exponentials and the sums over values
// stay in the first-level cache; what is known of a query is rescaled from tile to tile.
//
// A sequence's result does not depend on its neighbours or on the number of threads, bit for bit.
//
// Shapes: L tokens of the sequence, H heads, K head width, J = K / 2, W lanes of a vector.
#include "rotary_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.hpp"

namespace protnest {

namespace {

// Keys of a tile: with 32 queries its scores take 16 KB, half of a first-level cache.
constexpr std::int64_t kTile = 128;
// Keys whose scores are formed together: with two vectors of queries, 12 sums in registers.
constexpr std::int64_t kGroup = 6;
// Channels of one tensor that are read from a row at a time. Rows lie pages apart: heads that are read one by one would
// meet each page 60 times, which cost as much as the products where they are short (K = 16).
constexpr std::int64_t kChannels = 80;
constexpr std::int64_t kAhead = 4;
constexpr float kLog2E = 1.44269504088896341f;

// fp32 factors: a step adds one product a lane. `Degree` is of the exponential's polynomial.
template <int W, int Degree>
struct Wide {
    using L = Lanes<W>;
    using Float = typename L::Float;
    using Factor = float;
    static constexpr int kLanes = W;
    static constexpr int kDepth = 1;  // factors in a step
    static constexpr int kDegree = Degree;

    static PROTNEST_INLINE Float load(const Factor* from) { return L::load(from); }
    static PROTNEST_INLINE Float step(Float sum, Factor one, Float many) { return sum + one * many; }
};

// Two bf16 factors in a step, the first in the lower half, summed in fp32.
template <int W>
struct Pairs {
    using L = Lanes<W>;
    using Float = typename L::Float;
    using Factor = std::int32_t;
    static constexpr int kLanes = W;
    static constexpr int kDepth = 2;
    static constexpr int kDegree = 3;

    static PROTNEST_INLINE typename L::Int load(const Factor* from) {
        typename L::Int result;
        std::memcpy(&result, from, sizeof result);
        return result;
    }
    static PROTNEST_INLINE Float step(Float sum, Factor one, typename L::Int many) {
        const typename L::Int ones = one - typename L::Int{};
        sum += L::from_bits(ones << 16) * L::from_bits(many << 16);
        return sum + L::from_bits(ones & -65536) * L::from_bits(many & -65536);
    }
};

#if defined(PROTNEST_X86_LEVELS)
struct HardwarePairs : Pairs<16> {
    // In assembly, since the compiler inlines an intrinsic only into functions compiled for it, and what lies between
    // here and `attend_v4_bf16` is compiled for whoever inlines it.
    static PROTNEST_INLINE Float step(Float sum, const Factor& one, L::Int many) {
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(many), "m"(one));
        return sum;
    }
};
#endif

// Room for some heads of one sequence, and for one block of its queries.
template <typename A>
struct Scratch {
    using Factor = typename A::Factor;
    std::vector<float> row;       // (K)
    std::vector<Factor> rows;     // queries of each head: (L, steps of K)
    std::vector<Factor> keys;     // of each head: (L to whole groups, steps of K)
    std::vector<Factor> values;   // of each head: (steps of L, K)
    std::vector<Factor> queries;  // (steps of K, 2 W): a block
    std::vector<float> scores;    // (kTile, 2 W); and the weights that they become, (steps of kTile, 2 W)
    std::vector<float> sums;      // (K, 2 W)
    std::int64_t rows_stride, keys_stride, values_stride;  // from head to head

    void fit(std::int64_t heads, std::int64_t longest, std::int64_t most_queries, std::int64_t K) {
        const std::int64_t steps = K / A::kDepth, width = 2 * A::kLanes;
        rows_stride = most_queries * steps, keys_stride = (longest + kGroup) * steps;
        values_stride = (longest + A::kDepth) * K;
        row.resize(K);
        rows.resize(heads * rows_stride);
        keys.resize(heads * keys_stride);
        values.resize(heads * values_stride);
        queries.resize(steps * width);
        scores.resize(kTile * width);
        sums.resize(K * width);
    }
};

// One sequence, some of its heads, and the queries that are wanted of it: `count` of `rows`, or all where that is null.
struct Part {
    std::int64_t begin, length;
    std::int64_t head, heads;
    const std::int64_t* rows;
    std::int64_t count;
    std::int64_t to;  // row of the output that the first one takes
};

// Rows are gone through in quads. Where their length n >= 4 is no multiple of four, the last quad overlaps the one before.
PROTNEST_INLINE std::int64_t next_quad(std::int64_t k, std::int64_t n) {
    return k + 4 >= n ? n : std::min(k + 4, n - 4);
}

// How a row of qkv becomes numbers, four at a time.
struct Fp32Row {
    const float *from, *bias;

    PROTNEST_INLINE Fp32Row(const AttentionInput& input, std::int64_t t)
        : from(static_cast<const float*>(input.qkv.values) + t * 3 * input.heads * input.head_width),
          bias(input.qkv.bias_C) {}
    PROTNEST_INLINE Quad::Float read(std::int64_t column) const {
        const Quad::Float value = Lanes<4>::load(from + column);
        return bias == nullptr ? value : value + Lanes<4>::load(bias + column);
    }
};

struct Bf16Row {
    const std::uint16_t* from;

    PROTNEST_INLINE Bf16Row(const AttentionInput& input, std::int64_t t)
        : from(static_cast<const std::uint16_t*>(input.qkv.values) + t * 3 * input.heads * input.head_width) {}
    PROTNEST_INLINE Quad::Float read(std::int64_t column) const { return Quad::from_bf16(from + column); }
};

struct IntegerRow {
    const std::int32_t* from;
    const float *steps, *sums, *bias;
    float scale, shift;

    PROTNEST_INLINE IntegerRow(const AttentionInput& input, std::int64_t t)
        : from(static_cast<const std::int32_t*>(input.qkv.values) + t * 3 * input.heads * input.head_width),
          steps(input.qkv.steps_C),
          sums(input.qkv.sums_C),
          bias(input.qkv.bias_C),
          scale(input.qkv.scale_N[t]),
          shift(input.qkv.shift_N[t]) {}
    PROTNEST_INLINE Quad::Float read(std::int64_t column) const {
        Quad::Int value;
        std::memcpy(&value, from + column, sizeof value);
        return Lanes<4>::load(steps + column) * __builtin_convertvector(value, Quad::Float) * scale +
               (Lanes<4>::load(sums + column) * shift + Lanes<4>::load(bias + column));
    }
};

// A head's channels, turned and multiplied by `factor`.
template <typename Row>
PROTNEST_INLINE void turn(const Row& row, std::int64_t column, const float* cos_J, const float* sin_J, std::int64_t J,
                          float factor, float* out) {
    for (std::int64_t j = 0; j < J; j = next_quad(j, J)) {
        const Quad::Float first = row.read(column + j), second = row.read(column + J + j);
        const Quad::Float c = Lanes<4>::load(cos_J + j) * factor, s = Lanes<4>::load(sin_J + j) * factor;
        Lanes<4>::store(out + j, Quad::plain_nan(first * c - second * s));
        Lanes<4>::store(out + J + j, Quad::plain_nan(second * c + first * s));
    }
}

// Neighbours in a row as the factors of a step.
PROTNEST_INLINE void join_neighbours(const float* row, std::int64_t K, std::int32_t* out) {
    for (std::int64_t k = 0; k < K / 2; k = next_quad(k, K / 2)) {
        const Quad::Float a = Lanes<4>::load(row + 2 * k), b = Lanes<4>::load(row + 2 * k + 4);
        const Quad::Int pairs = Quad::join_bf16(__builtin_shufflevector(a, b, 0, 2, 4, 6),
                                                __builtin_shufflevector(a, b, 1, 3, 5, 7));
        std::memcpy(out + k, &pairs, sizeof pairs);
    }
}

// Rows lie pages apart, which no hardware foresees.
template <typename Number>
PROTNEST_INLINE void fetch(const Number* from, std::int64_t numbers) {
    constexpr std::int64_t kLine = 64 / sizeof(Number);
    for (std::int64_t n = 0; n < numbers; n += kLine) __builtin_prefetch(from + n);
}

// A head's channels as the factors of steps.
template <typename Row, typename A>
PROTNEST_INLINE void turn_factors(const Row& row, std::int64_t column, const AttentionInput& input, std::int64_t place,
                                  float factor, Scratch<A>& scratch, typename A::Factor* to) {
    const std::int64_t K = input.head_width, J = K / 2;
    const float *cos_J = input.cos_PJ + place * J, *sin_J = input.sin_PJ + place * J;
    if constexpr (A::kDepth == 1) {
        turn(row, column, cos_J, sin_J, J, factor, to);
    } else {
        turn(row, column, cos_J, sin_J, J, factor, scratch.row.data());
        join_neighbours(scratch.row.data(), K, to);
    }
}

// Packs the queries of a part that has a list of them.
template <typename Row, typename A>
PROTNEST_INLINE void pack_queries(const AttentionInput& input, const Part& part, Scratch<A>& scratch) {
    const std::int64_t K = input.head_width, steps = K / A::kDepth;
    // Exponentials are powers of two.
    const float factor = kLog2E / std::sqrt(static_cast<float>(K));
    for (std::int64_t query = 0; query < part.count; ++query) {
        const std::int64_t place = part.rows[query] - part.begin;
        const Row row(input, part.begin + place);
        for (std::int64_t h = 0; h < part.heads; ++h) {
            turn_factors(row, (part.head + h) * K, input, place, factor, scratch,
                         scratch.rows.data() + h * scratch.rows_stride + query * steps);
        }
    }
}

// Packs the keys and values of a part. A step of values holds one token's channels, or two tokens' in pairs; an odd last one is
// paired with zeros.
template <typename Row, typename A>
PROTNEST_INLINE void pack(const AttentionInput& input, const Part& part, Scratch<A>& scratch) {
    const std::int64_t H = input.heads, K = input.head_width, steps = K / A::kDepth;
    const bool all = part.rows == nullptr;
    const float factor = kLog2E / std::sqrt(static_cast<float>(K));
    for (std::int64_t p = 0; p < part.length; ++p) {
        const Row row(input, part.begin + p);
        if (p + kAhead < part.length) {
            const Row ahead(input, part.begin + p + kAhead);
            for (std::int64_t h = all ? 0 : 1; h < 3; ++h) fetch(ahead.from + (h * H + part.head) * K, part.heads * K);
        }
        // Queries of all tokens are turned as their rows pass by.
        for (std::int64_t h = 0; h < (all ? part.heads : 0); ++h) {
            turn_factors(row, (part.head + h) * K, input, p, factor, scratch,
                         scratch.rows.data() + h * scratch.rows_stride + p * steps);
        }
        for (std::int64_t h = 0; h < part.heads; ++h) {
            turn_factors(row, (H + part.head + h) * K, input, p, 1.0f, scratch,
                         scratch.keys.data() + h * scratch.keys_stride + p * steps);
        }
        if (p % A::kDepth != 0) continue;
        const bool last = p + 1 == part.length;
        const Row next(input, part.begin + (last ? p : p + 1));
        for (std::int64_t h = 0; h < part.heads; ++h) {
            const std::int64_t column = (2 * H + part.head + h) * K;
            auto* to = scratch.values.data() + h * scratch.values_stride + p / A::kDepth * K;
            for (std::int64_t k = 0; k < K; k = next_quad(k, K)) {
                if constexpr (A::kDepth == 1) {
                    Lanes<4>::store(to + k, row.read(column + k));
                } else {
                    const Quad::Float high = last ? Quad::Float{} : next.read(column + k);
                    const Quad::Int pairs = Quad::join_bf16(row.read(column + k), high);
                    std::memcpy(to + k, &pairs, sizeof pairs);
                }
            }
        }
    }
    // The last key fills its group: it changes no maximum, and its scores are not used twice.
    for (std::int64_t h = 0; h < part.heads; ++h) {
        auto* last = scratch.keys.data() + h * scratch.keys_stride + (part.length - 1) * steps;
        for (std::int64_t p = part.length; p % kGroup != 0; ++p) {
            std::copy_n(last, steps, last + (p - part.length + 1) * steps);
        }
    }
    if (!all) pack_queries<Row>(input, part, scratch);
}

// A block of queries with one token a lane; lanes beyond `count` repeat the last one.
template <typename A>
PROTNEST_INLINE void turn_block(const typename A::Factor* rows, std::int64_t steps, std::int64_t count,
                                std::int64_t width, typename A::Factor* queries) {
    // Factors of either kind are as wide as a float.
    const float* from = reinterpret_cast<const float*>(rows);
    float* to = reinterpret_cast<float*>(queries);
    for (std::int64_t lane = 0; lane < width; lane += 4) {
        for (std::int64_t k = 0; k < steps; k = next_quad(k, steps)) {
            Quad::Float block[4];
            for (std::int64_t i = 0; i < 4; ++i) {
                block[i] = Lanes<4>::load(from + std::min(lane + i, count - 1) * steps + k);
            }
            Quad::transpose(block);
            for (std::int64_t i = 0; i < 4; ++i) Lanes<4>::store(to + (k + i) * width + lane, block[i]);
        }
    }
}

template <typename A>
PROTNEST_INLINE void write_block(const AttentionInput& input, std::int64_t t, std::int64_t count, std::int64_t width,
                                 std::int64_t head, const Scratch<A>& scratch, void* out) {
    const std::int64_t K = input.head_width, stride = input.heads * K;
    for (std::int64_t lane = 0; lane < count; lane += 4) {
        for (std::int64_t k = 0; k < K; k = next_quad(k, K)) {
            Quad::Float block[4];
            for (int i = 0; i < 4; ++i) block[i] = Lanes<4>::load(scratch.sums.data() + (k + i) * width + lane);
            Quad::transpose(block);
            const std::int64_t offset = (t + lane) * stride + head * K + k, rows = std::min<std::int64_t>(4, count - lane);
            for (std::int64_t i = 0; i < rows; ++i) {
                if (input.qkv.left == Left::bf16) {
                    Quad::to_bf16(static_cast<std::uint16_t*>(out) + offset + i * stride, block[i]);
                } else {
                    Lanes<4>::store(static_cast<float*>(out) + offset + i * stride, block[i]);
                }
            }
        }
    }
}

// Scores of one group of keys with V vectors of queries, and the maxima so far.
template <typename A, int V>
PROTNEST_INLINE void score_group(const typename A::Factor* keys, const typename A::Factor* queries, std::int64_t steps,
                                 float* scores, typename A::Float (&most)[V]) {
    constexpr int W = A::kLanes, G = kGroup;
    typename A::Float sums[G][V] = {};
    for (std::int64_t k = 0; k < steps; ++k) {
        decltype(A::load(queries)) many[V];
        for (int v = 0; v < V; ++v) many[v] = A::load(queries + (k * V + v) * W);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
            for (int v = 0; v < V; ++v) sums[g][v] = A::step(sums[g][v], keys[g * steps + k], many[v]);
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int v = 0; v < V; ++v) {
            A::L::store(scores + (g * V + v) * W, sums[g][v]);
            most[v] = A::L::larger(sums[g][v], most[v]);
        }
    }
}

// Scores of `keys` keys become weights 2^(score - most) in their place, which are added up in `total`. In pairs they are
// rounded to bf16 and joined, an odd last one with zero.
template <typename A, int V>
PROTNEST_INLINE void weigh(float* scores, std::int64_t keys, const typename A::Float (&most)[V],
                           typename A::Float (&total)[V]) {
    using L = typename A::L;
    constexpr int W = A::kLanes;
    for (std::int64_t key = 0; key < keys; key += A::kDepth) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            const typename L::Float low = L::template exp2<A::kDegree>(L::load(scores + (key * V + v) * W) - most[v]);
            if constexpr (A::kDepth == 1) {
                total[v] += low;
                L::store(scores + (key * V + v) * W, low);
            } else {
                typename L::Float high = {};
                if (key + 1 < keys) {
                    high = L::template exp2<A::kDegree>(L::load(scores + ((key + 1) * V + v) * W) - most[v]);
                }
                total[v] += low + high;
                // Weights are positive: half an ulp more and the rest cut off rounds them. NaN has room for the half.
                const typename L::Int pair =
                    (((L::bits(low) + 0x8000) >> 16) & 0xffff) | ((L::bits(high) + 0x8000) & -65536);
                std::memcpy(scores + (key / 2 * V + v) * W, &pair, sizeof pair);
            }
        }
    }
}

// sums = sums * rescale + weights x values for N channels.
template <typename A, int V, int N>
PROTNEST_INLINE void add_values(const typename A::Factor* weights, const typename A::Factor* values, std::int64_t steps,
                                std::int64_t K, const typename A::Float (&rescale)[V], float* sums) {
    constexpr int W = A::kLanes;
    typename A::Float held[N][V];
    for (int n = 0; n < N; ++n) {
        for (int v = 0; v < V; ++v) held[n][v] = A::L::load(sums + (n * V + v) * W) * rescale[v];
    }
    for (std::int64_t k = 0; k < steps; ++k) {
        decltype(A::load(weights)) many[V];
        for (int v = 0; v < V; ++v) many[v] = A::load(weights + (k * V + v) * W);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            for (int v = 0; v < V; ++v) held[n][v] = A::step(held[n][v], values[k * K + n], many[v]);
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int v = 0; v < V; ++v) A::L::store(sums + (n * V + v) * W, held[n][v]);
    }
}

// V vectors of queries against all keys; leaves the sums over values, divided by the sum of weights, in scratch.sums.
template <typename A, int V>
PROTNEST_INLINE void attend_block(std::int64_t length, std::int64_t K, const typename A::Factor* keys_LK,
                                  const typename A::Factor* values_LK, Scratch<A>& scratch) {
    using L = typename A::L;
    constexpr int W = A::kLanes;
    const std::int64_t steps = K / A::kDepth;
    typename A::Float most[V], total[V] = {};
    for (int v = 0; v < V; ++v) most[v] = L::all(-std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sums.data(), K * V * W, 0.0f);
    static_assert(kTile % 2 == 0, "pairs of keys must not straddle tiles");
    constexpr std::int64_t kGroups = kTile / kGroup;
    constexpr std::int64_t kKeys = kGroups * kGroup;  // of a full tile
    static_assert(kKeys % 2 == 0, "pairs of keys must not straddle tiles");
    for (std::int64_t first = 0; first < length; first += kKeys) {
        const std::int64_t keys = std::min(kKeys, length - first);
        typename A::Float before[V], rescale[V];
        for (int v = 0; v < V; ++v) before[v] = most[v];
        for (std::int64_t key = 0; key < keys; key += kGroup) {
            score_group<A, V>(keys_LK + (first + key) * steps, scratch.queries.data(), steps,
                              scratch.scores.data() + key * V * W, most);
        }
        for (int v = 0; v < V; ++v) {
            // Degree 3 would take 7e-5 from all tiles before at each one, and a long sequence's first keys fade.
            rescale[v] = first == 0 ? L::all(0.0f) : L::template exp2<5>(before[v] - most[v]);
            total[v] *= rescale[v];
        }
        weigh<A, V>(scratch.scores.data(), keys, most, total);
        const auto* weights = reinterpret_cast<const typename A::Factor*>(scratch.scores.data());
        const std::int64_t steps_of_keys = (keys + A::kDepth - 1) / A::kDepth;
        const auto* values = values_LK + first / A::kDepth * K;
        std::int64_t k = 0;
        if (K % 12 == 0) {
            for (; k + 12 <= K; k += 12) {
                add_values<A, V, 12>(weights, values + k, steps_of_keys, K, rescale,
                                     scratch.sums.data() + k * V * W);
            }
        }
        for (; k + 8 <= K; k += 8) {
            add_values<A, V, 8>(weights, values + k, steps_of_keys, K, rescale,
                                scratch.sums.data() + k * V * W);
        }
        for (; k < K; k += 2) {
            add_values<A, V, 2>(weights, values + k, steps_of_keys, K, rescale,
                                scratch.sums.data() + k * V * W);
        }
    }
    for (int v = 0; v < V; ++v) {
        const typename A::Float share = 1.0f / total[v];
        for (std::int64_t k = 0; k < K; ++k) {
            float* sums = scratch.sums.data() + (k * V + v) * W;
            L::store(sums, L::load(sums) * share);
        }
    }
}

template <typename A>
PROTNEST_INLINE void attend(const AttentionInput& input, const Part& part, Scratch<A>& scratch, void* out) {
    constexpr std::int64_t W = A::kLanes;
    const std::int64_t K = input.head_width, steps = K / A::kDepth, length = part.length;
    switch (input.qkv.left) {
        case Left::fp32: pack<Fp32Row>(input, part, scratch); break;
        case Left::bf16: pack<Bf16Row>(input, part, scratch); break;
        case Left::integers: pack<IntegerRow>(input, part, scratch); break;
    }
    for (std::int64_t p = 0; p < part.count; p += 2 * W) {
        const std::int64_t count = std::min(2 * W, part.count - p), width = count > W ? 2 * W : W;
        for (std::int64_t h = 0; h < part.heads; ++h) {
            const auto* rows = scratch.rows.data() + h * scratch.rows_stride + p * steps;
            const auto* keys = scratch.keys.data() + h * scratch.keys_stride;
            const auto* values = scratch.values.data() + h * scratch.values_stride;
            turn_block<A>(rows, steps, count, width, scratch.queries.data());
            if (width == 2 * W) {
                attend_block<A, 2>(length, K, keys, values, scratch);
            } else {
                attend_block<A, 1>(length, K, keys, values, scratch);
            }
            write_block(input, part.to + p, count, width, part.head + h, scratch, out);
        }
    }
}

// One instance for each way of multiplying, compiled for its generation.
template <typename A>
using Attend = void (*)(const AttentionInput&, const Part&, Scratch<A>&, void*);

template <typename A>
void attend_portable(const AttentionInput& input, const Part& part, Scratch<A>& scratch, void* out) {
    attend(input, part, scratch, out);
}

#if defined(PROTNEST_X86_LEVELS)
template <typename A>
PROTNEST_V3 void attend_v3(const AttentionInput& input, const Part& part, Scratch<A>& scratch, void* out) {
    attend(input, part, scratch, out);
}

template <typename A>
PROTNEST_V4 void attend_v4(const AttentionInput& input, const Part& part, Scratch<A>& scratch, void* out) {
    attend(input, part, scratch, out);
}

PROTNEST_V4_BF16 void attend_v4_bf16(const AttentionInput& input, const Part& part, Scratch<HardwarePairs>& scratch,
                                     void* out) {
    attend(input, part, scratch, out);
}
#endif

template <typename A>
void run(const AttentionInput& input, Attend<A> attend_one, int threads, void* out) {
    std::int64_t longest = 0, most_queries = 0;
    for (std::int64_t b = 0; b < input.sequences; ++b) {
        const std::int64_t length = input.cu_seqlens[b + 1] - input.cu_seqlens[b];
        longest = std::max(longest, length);
        most_queries = std::max(most_queries, input.rows == nullptr ? length : input.cu_rows[b + 1] - input.cu_rows[b]);
    }
    const std::int64_t heads = std::clamp<std::int64_t>(kChannels / input.head_width, 1, input.heads);
    const std::int64_t parts = (input.heads + heads - 1) / heads, items = input.sequences * parts;
    if (items == 0) return;
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(std::clamp<std::int64_t>(threads, 1, items)))
#endif
    {
        Scratch<A> scratch;
        scratch.fit(heads, longest, most_queries, input.head_width);
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
        for (std::int64_t item = 0; item < items; ++item) {
            const std::int64_t b = item / parts, begin = input.cu_seqlens[b], head = item % parts * heads;
            const std::int64_t length = input.cu_seqlens[b + 1] - begin;
            const bool all = input.rows == nullptr;
            const std::int64_t to = all ? begin : input.cu_rows[b];
            const Part part{begin,
                            length,
                            head,
                            std::min(heads, input.heads - head),
                            all ? nullptr : input.rows + to,
                            all ? length : input.cu_rows[b + 1] - to,
                            to};
            if (part.count > 0) attend_one(input, part, scratch, out);
        }
    }
}

}  // namespace

void rotary_attention(const AttentionInput& input, Level level, Factors factors, int threads, void* out) {
    const bool pairs = input.qkv.left == Left::bf16 && factors == Factors::pairs, exact = input.qkv.left == Left::fp32;
#if defined(PROTNEST_X86_LEVELS)
    if (level == Level::v4_bf16 && pairs) return run<HardwarePairs>(input, &attend_v4_bf16, threads, out);
    if (level >= Level::v4) {
        if (pairs) return run<Pairs<16>>(input, &attend_v4<Pairs<16>>, threads, out);
        if (exact) return run<Wide<16, 5>>(input, &attend_v4<Wide<16, 5>>, threads, out);
        return run<Wide<16, 3>>(input, &attend_v4<Wide<16, 3>>, threads, out);
    }
    if (level == Level::v3) {
        if (exact) return run<Wide<8, 5>>(input, &attend_v3<Wide<8, 5>>, threads, out);
        return run<Wide<8, 3>>(input, &attend_v3<Wide<8, 3>>, threads, out);
    }
#endif
    // Elsewhere the exact polynomial serves all: fewer instances.
    run<Wide<4, 5>>(input, &attend_portable<Wide<4, 5>>, threads, out);
}

}  // namespace protnest
