// One head of one sequence at a time. Its keys lie one after another in the cache, and so do its values: each is read once,
// from front to back, which is all that takes time where the cache is larger than the processor's. The head's channels
// stand in the lanes of vectors. Scores are kept until all keys are through, so that no sum needs to be rescaled.
//
// bf16 is read in pairs, two channels to a lane of 32 bits; the query and the sums over values are kept in two vectors, of
// even and of odd channels, so that nothing is shuffled.
//
// A sequence's result depends on nothing but its own numbers, bit for bit.
//
// Shapes: B sequences, S slots, P places of a slot, L tokens of one sequence, the new one included, H heads, K head width,
// W lanes of a vector, N vectors.
#include "cached_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.hpp"

namespace protnest {

namespace {

// Keys whose scores are formed together, and turned into a vector of four.
constexpr std::int64_t kKeys = 4;
// Values that are gone through before the next channels' turn, where a head is too wide for the registers.
constexpr std::int64_t kTile = 32;
constexpr std::int64_t kAheadBytes = 2048;
constexpr float kLog2E = 1.44269504088896341f;

// Sums of neighbouring lanes, down to four.
PROTNEST_INLINE Quad::Float fold(Quad::Float value) { return value; }
PROTNEST_INLINE Quad::Float fold(Lanes<8>::Float value) {
    return __builtin_shufflevector(value, value, 0, 1, 2, 3) + __builtin_shufflevector(value, value, 4, 5, 6, 7);
}
PROTNEST_INLINE Quad::Float fold(Lanes<16>::Float value) {
    return fold(__builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
}

// A cache of fp32: a step takes W channels.
template <int W>
struct Plain {
    using L = Lanes<W>;
    using Float = typename L::Float;
    using Number = float;
    static constexpr int kLanes = W;
    static constexpr int kParts = 1;

    static PROTNEST_INLINE void read(const Number* from, Float (&parts)[kParts]) { parts[0] = L::load(from); }
};

// A cache of bf16: a step takes 2 W channels, the even ones in the first part.
template <int W>
struct Paired {
    using L = Lanes<W>;
    using Float = typename L::Float;
    using Number = std::uint16_t;
    static constexpr int kLanes = W;
    static constexpr int kParts = 2;

    static PROTNEST_INLINE void read(const Number* from, Float (&parts)[kParts]) {
        typename L::Int pairs;
        std::memcpy(&pairs, from, sizeof pairs);
        parts[0] = L::from_bits(pairs << 16);
        parts[1] = L::from_bits(pairs & -65536);
    }
};

// Room for one head of one sequence. Its query and its sums are in the order of steps: of each, all parts.
struct Scratch {
    std::vector<float> row;     // (K), as it lies in qkv or out
    std::vector<float> query;   // (K)
    std::vector<float> scores;  // (L to whole vectors); then the weights that they become
    std::vector<float> sums;    // (K)

    Scratch(std::int64_t longest, std::int64_t K) : row(K), query(K), scores(longest + 16), sums(K) {}
};

// K numbers of qkv's row b, from column c on.
PROTNEST_INLINE void read_row(const CacheInput& input, std::int64_t b, std::int64_t c, float* to) {
    const Product& qkv = input.qkv;
    const std::int64_t K = input.head_width, at = b * 3 * input.heads * K + c;
    switch (qkv.left) {
        case Left::fp32: {
            const float* from = static_cast<const float*>(qkv.values) + at;
            for (std::int64_t k = 0; k < K; ++k) to[k] = from[k];
            if (qkv.bias_C == nullptr) return;
            for (std::int64_t k = 0; k < K; ++k) to[k] += qkv.bias_C[c + k];
            return;
        }
        case Left::bf16: {
            const auto* from = static_cast<const std::uint16_t*>(qkv.values) + at;
            for (std::int64_t k = 0; k < K; k += 4) Lanes<4>::store(to + k, Quad::from_bf16(from + k));
            return;
        }
        case Left::integers: break;
    }
    const auto* from = static_cast<const std::int32_t*>(qkv.values) + at;
    const float *steps = qkv.steps_C + c, *sums = qkv.sums_C + c, *bias = qkv.bias_C + c;
    const float scale = qkv.scale_N[b], shift = qkv.shift_N[b];
    for (std::int64_t k = 0; k < K; ++k) {
        to[k] = steps[k] * static_cast<float>(from[k]) * scale + (sums[k] * shift + bias[k]);
    }
}

// A row as a cache or `out` holds it: bf16 to nearest even, NaN stays NaN.
PROTNEST_INLINE void write_row(const float* row, std::int64_t K, float* to) { std::copy_n(row, K, to); }
PROTNEST_INLINE void write_row(const float* row, std::int64_t K, std::uint16_t* to) {
    for (std::int64_t k = 0; k < K; k += 4) Quad::to_bf16(to + k, Lanes<4>::load(row + k));
}

// The query, scaled, into scratch; key and value into the cache.
template <typename A>
PROTNEST_INLINE void take(const CacheInput& input, std::int64_t b, std::int64_t h, typename A::Number* key,
                          typename A::Number* value, Scratch& scratch) {
    constexpr std::int64_t W = A::kLanes, kStep = W * A::kParts;
    const std::int64_t H = input.heads, K = input.head_width;
    float* row = scratch.row.data();
    read_row(input, b, (H + h) * K, row);
    write_row(row, K, key);
    read_row(input, b, (2 * H + h) * K, row);
    write_row(row, K, value);
    read_row(input, b, h * K, row);
    // Exponentials are powers of two.
    const float factor = kLog2E / std::sqrt(static_cast<float>(K));
    for (std::int64_t k = 0; k < K; k += kStep) {
        for (int part = 0; part < A::kParts; ++part) {
            for (int lane = 0; lane < W; ++lane) {
                scratch.query[k + part * W + lane] = row[k + lane * A::kParts + part] * factor;
            }
        }
    }
}

// The sums, divided by the weights' sum, into `out`.
template <typename A>
PROTNEST_INLINE void give(const CacheInput& input, std::int64_t b, std::int64_t h, float share, Scratch& scratch,
                          void* out) {
    constexpr std::int64_t W = A::kLanes, kStep = W * A::kParts;
    const std::int64_t K = input.head_width, at = (b * input.heads + h) * K;
    float* row = scratch.row.data();
    for (std::int64_t k = 0; k < K; k += kStep) {
        for (int part = 0; part < A::kParts; ++part) {
            for (int lane = 0; lane < W; ++lane) {
                row[k + lane * A::kParts + part] = scratch.sums[k + part * W + lane] * share;
            }
        }
    }
    if (input.qkv.left == Left::bf16) {
        write_row(row, K, static_cast<std::uint16_t*>(out) + at);
    } else {
        write_row(row, K, static_cast<float*>(out) + at);
    }
}

// The cache's lines that are wanted next but a few: the processor foresees no page beyond the one that is read. 2 KB ahead
// make a cache of 50 MB 10 to 20 % faster, 8 KB ahead none.
template <typename Number>
PROTNEST_INLINE void fetch_ahead(const Number* from, std::int64_t numbers) {
    const char* ahead = reinterpret_cast<const char*>(from) + kAheadBytes;
    const std::int64_t bytes = numbers * static_cast<std::int64_t>(sizeof(Number));
    for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
}

// Scores of L keys, as powers of two, and minus infinity up to whole vectors.
template <typename A>
PROTNEST_INLINE void score(const typename A::Number* keys_LK, std::int64_t length, std::int64_t K, Scratch& scratch) {
    using Float = typename A::Float;
    constexpr std::int64_t W = A::kLanes, kStep = W * A::kParts;
    const float* query = scratch.query.data();
    for (std::int64_t first = 0; first < length; first += kKeys) {
        const typename A::Number* rows[kKeys];
        // Beyond the last key there is another sequence, or nothing: the last one fills the group.
        for (std::int64_t i = 0; i < kKeys; ++i) rows[i] = keys_LK + std::min(first + i, length - 1) * K;
        fetch_ahead(keys_LK + first * K, kKeys * K);
        Float sums[kKeys][A::kParts] = {};
        for (std::int64_t k = 0; k < K; k += kStep) {
#pragma GCC unroll 4
            for (int i = 0; i < kKeys; ++i) {
                Float parts[A::kParts];
                A::read(rows[i] + k, parts);
                for (int part = 0; part < A::kParts; ++part) {
                    sums[i][part] += parts[part] * A::L::load(query + k + part * W);
                }
            }
        }
        Quad::Float folded[kKeys];
        for (int i = 0; i < kKeys; ++i) {
            Float sum = sums[i][0];
            for (int part = 1; part < A::kParts; ++part) sum += sums[i][part];
            folded[i] = fold(sum);
        }
        Quad::transpose(folded);
        const Quad::Float scores = (folded[0] + folded[1]) + (folded[2] + folded[3]);
        Lanes<4>::store(scratch.scores.data() + first, Quad::plain_nan(scores));
    }
    std::fill_n(scratch.scores.data() + length, 16, -std::numeric_limits<float>::infinity());
}

// Scores become weights in their place; returns one over their sum.
template <typename A>
PROTNEST_INLINE float weigh(std::int64_t length, Scratch& scratch) {
    using L = typename A::L;
    constexpr std::int64_t W = A::kLanes;
    float* scores = scratch.scores.data();
    typename L::Float most = L::load(scores), total = {};
    for (std::int64_t key = W; key < length; key += W) most = L::larger(L::load(scores + key), most);
    float largest = most[0];
    for (int lane = 1; lane < W; ++lane) largest = std::max(largest, most[lane]);
    for (std::int64_t key = 0; key < length; key += W) {
        // What fills the last vector weighs 2^-100, which is lost in a sum of at least one.
        const typename L::Float weights = L::template exp2<5>(L::load(scores + key) - largest);
        total += weights;
        L::store(scores + key, weights);
    }
    float sum = 0.0f;
    for (int lane = 0; lane < W; ++lane) sum += total[lane];
    return 1.0f / sum;
}

// sums += weights x values, for N steps of channels and some of the keys.
template <typename A, int N>
PROTNEST_INLINE void add_values(const typename A::Number* values, const float* weights, std::int64_t keys,
                                std::int64_t K, float* sums) {
    using Float = typename A::Float;
    constexpr std::int64_t W = A::kLanes, kStep = W * A::kParts;
    Float held[N][A::kParts];
    for (int n = 0; n < N; ++n) {
        for (int part = 0; part < A::kParts; ++part) held[n][part] = A::L::load(sums + n * kStep + part * W);
    }
    for (std::int64_t key = 0; key < keys; ++key) {
        fetch_ahead(values + key * K, N * kStep);
        const Float weight = A::L::all(weights[key]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            Float parts[A::kParts];
            A::read(values + key * K + n * kStep, parts);
            for (int part = 0; part < A::kParts; ++part) held[n][part] += parts[part] * weight;
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int part = 0; part < A::kParts; ++part) A::L::store(sums + n * kStep + part * W, held[n][part]);
    }
}

template <typename A>
PROTNEST_INLINE void attend(const CacheInput& input, std::int64_t b, std::int64_t h, Scratch& scratch, void* out) {
    using Number = typename A::Number;
    constexpr std::int64_t kStep = A::kLanes * A::kParts, kMost = 8 / A::kParts;
    const std::int64_t H = input.heads, K = input.head_width, last = input.lengths_B[b], length = last + 1;
    const std::int64_t begin = (input.slots_B[b] * H + h) * input.places * K;
    Number* keys_LK = static_cast<Number*>(input.keys_SHPK) + begin;
    Number* values_LK = static_cast<Number*>(input.values_SHPK) + begin;
    take<A>(input, b, h, keys_LK + last * K, values_LK + last * K, scratch);
    score<A>(keys_LK, length, K, scratch);
    const float share = weigh<A>(length, scratch);
    std::fill_n(scratch.sums.data(), K, 0.0f);
    const std::int64_t tile = K > kMost * kStep ? kTile : length;
    for (std::int64_t first = 0; first < length; first += tile) {
        const std::int64_t keys = std::min(tile, length - first);
        const Number* values = values_LK + first * K;
        const float* weights = scratch.scores.data() + first;
        float* sums = scratch.sums.data();
        std::int64_t k = 0;
        for (; k + kMost * kStep <= K; k += kMost * kStep) add_values<A, kMost>(values + k, weights, keys, K, sums + k);
        for (; k + 2 * kStep <= K; k += 2 * kStep) add_values<A, 2>(values + k, weights, keys, K, sums + k);
        for (; k < K; k += kStep) add_values<A, 1>(values + k, weights, keys, K, sums + k);
    }
    give<A>(input, b, h, share, scratch, out);
}

// One instance for each width of vectors and way of storing, compiled for its generation.
using Attend = void (*)(const CacheInput&, std::int64_t, std::int64_t, Scratch&, void*);

template <typename A>
void attend_portable(const CacheInput& input, std::int64_t b, std::int64_t h, Scratch& scratch, void* out) {
    attend<A>(input, b, h, scratch, out);
}

#if defined(PROTNEST_X86_LEVELS)
template <typename A>
PROTNEST_V3 void attend_v3(const CacheInput& input, std::int64_t b, std::int64_t h, Scratch& scratch, void* out) {
    attend<A>(input, b, h, scratch, out);
}

template <typename A>
PROTNEST_V4 void attend_v4(const CacheInput& input, std::int64_t b, std::int64_t h, Scratch& scratch, void* out) {
    attend<A>(input, b, h, scratch, out);
}
#endif

// The widest vectors of which a head is whole steps.
Attend choose(const CacheInput& input, Level level) {
    const bool paired = input.stored == Stored::bf16;
    [[maybe_unused]] const std::int64_t lanes = input.head_width / (paired ? 2 : 1);
#if defined(PROTNEST_X86_LEVELS)
    if (level >= Level::v4 && lanes % 16 == 0) return paired ? &attend_v4<Paired<16>> : &attend_v4<Plain<16>>;
    if (level >= Level::v3 && lanes % 8 == 0) return paired ? &attend_v3<Paired<8>> : &attend_v3<Plain<8>>;
    if (level >= Level::v3) return paired ? &attend_v3<Paired<4>> : &attend_v3<Plain<4>>;
#endif
    return paired ? &attend_portable<Paired<4>> : &attend_portable<Plain<4>>;
}

}  // namespace

void cached_attention(const CacheInput& input, Level level, int threads, void* out) {
    const std::int64_t B = input.sequences, H = input.heads, items = B * H;
    if (items == 0) return;
    const Attend attend_one = choose(input, level);
    const std::int64_t most = *std::max_element(input.lengths_B, input.lengths_B + B) + 1;
    std::int64_t tokens = B;
    for (std::int64_t b = 0; b < B; ++b) tokens += input.lengths_B[b];
    const int used = static_cast<int>(std::min<std::int64_t>(threads_for(tokens, 2 * H * input.head_width, threads), items));
#if defined(_OPENMP)
#pragma omp parallel num_threads(used) if (used > 1)
#endif
    {
        Scratch scratch(most, input.head_width);
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
        for (std::int64_t item = 0; item < items; ++item) attend_one(input, item / H, item % H, scratch, out);
    }
}

}  // namespace protnest
