// A row of logits is turned into numbers once, and stays in the cache for all that follows: the largest, the sum of
// exponentials, penalty and limits. Of 50,257 scores the k largest are found without sorting them: every 64th tells about
// where the k-th lies, one pass gathers what lies beyond, and of these few the k-th is selected. Where the sample was
// wrong, all are gone through.
//
// Shapes: B sequences, S slots, V vocabulary, K tokens that stay, W lanes of a vector.
#include "next_token.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "lanes.hpp"

#if defined(PROTNEST_X86_LEVELS)
#include <immintrin.h>
#endif

namespace protnest {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kLowest = std::numeric_limits<float>::lowest();
constexpr float kLog2E = 1.44269504088896341f;
// A sample pays where there is much to leave out.
constexpr std::int64_t kStride = 64, kWide = 4096;
constexpr std::int64_t kSummed = 128;

// Room for one row.
struct Scratch {
    Row logits, scores;             // (V) and whole vectors
    std::vector<float> some;        // selections' own copies, up to (V)
    std::vector<std::int32_t> ids;  // (K) after `select`, ascending; room for (V)
    std::vector<double> weights;    // (K)
    std::vector<std::int32_t> order;

    explicit Scratch(std::int64_t V) : logits(make_row(V)), scores(make_row(V)), some(V), ids(V), weights(V) {}
};

// Row b as numbers, and minus infinity up to whole vectors.
template <int W>
PROTNEST_INLINE void read_row(const NextTokenInput& input, const Columns& columns, std::int64_t b, Row& logits) {
    const std::int64_t V = input.vocabulary;
    for (std::int64_t v = 0; v < V; v += W) {
        Lanes<W>::store(logits.data() + v, RowIO<W>::read(input.logits, columns, b, v, V));
    }
    std::fill(logits.begin() + V, logits.end(), -kInfinity);
}

// log of the sum of exponentials; NaN where the row holds NaN, or its largest is not finite.
template <int W>
PROTNEST_INLINE double log_sum_exp(const Row& logits) {
    using L = Lanes<W>;
    const auto size = static_cast<std::int64_t>(logits.size());
    typename L::Float most = L::all(-kInfinity);
    typename L::Int odd = {};
    for (std::int64_t v = 0; v < size; v += W) {
        const typename L::Float some = L::load(logits.data() + v);
        most = L::larger(some, most);
        odd |= some != some;
    }
    float largest = -kInfinity;
    std::int32_t is_odd = 0;
    for (int lane = 0; lane < W; ++lane) {
        largest = std::max(largest, most[lane]);
        is_odd |= odd[lane];
    }
    if (is_odd != 0 || !std::isfinite(largest)) return std::numeric_limits<double>::quiet_NaN();
    // What fills the last vector counts 2^-100, which is lost in a sum of at least one. So many vectors at a time are added
    // up in fp32: over all of 50,257 equal terms it would be off by 2e-5.
    double sum = 0.0;
    for (std::int64_t begin = 0; begin < size; begin += kSummed * W) {
        typename L::Float total = {};
        const std::int64_t end = std::min(size, begin + kSummed * W);
        for (std::int64_t v = begin; v < end; v += W) {
            total += L::template exp2<5>((L::load(logits.data() + v) - largest) * kLog2E);
        }
        for (int lane = 0; lane < W; ++lane) sum += total[lane];
    }
    return largest + std::log(sum);
}

// What sizes a vocabulary has.
struct Sizes {
    std::int32_t largest = 0;
    bool any_never = false;

    explicit Sizes(const NextTokenInput& input) {
        for (std::int64_t v = 0; v < input.vocabulary; ++v) {
            if (v == input.end) continue;
            largest = std::max(largest, input.sizes_V[v]);
            any_never |= input.sizes_V[v] < 0;
        }
    }
};

// Logits with penalty and limits; what is forbidden is minus infinity.
PROTNEST_INLINE void limit(const NextTokenInput& input, const Sizes& sizes, std::int64_t b, Scratch& scratch) {
    const std::int64_t V = input.vocabulary, room = input.room_B[b];
    const std::uint8_t* seen = input.seen_SV + input.slots_B[b] * V;
    const float penalty = input.repetition_penalty;
    float* scores = scratch.scores.data();
    std::copy(scratch.logits.begin(), scratch.logits.end(), scores);
    std::int64_t v = 0;
    // A sequence holds few tokens of many: eight are passed over at a time.
    for (; v + 8 <= V; v += 8) {
        std::uint64_t eight;
        std::memcpy(&eight, seen + v, sizeof eight);
        if (eight == 0) continue;
        for (std::int64_t u = v; u < v + 8; ++u) {
            if (seen[u] != 0) scores[u] = scores[u] < 0.0f ? scores[u] * penalty : scores[u] / penalty;
        }
    }
    for (; v < V; ++v) {
        if (seen[v] != 0) scores[v] = scores[v] < 0.0f ? scores[v] * penalty : scores[v] / penalty;
    }
    const float end = scores[input.end];
    if (room <= 0) {
        std::fill_n(scores, V, -kInfinity);
    } else if (sizes.any_never || sizes.largest > room) {
        const auto most = static_cast<std::int32_t>(std::min<std::int64_t>(room, std::numeric_limits<std::int32_t>::max()));
        for (v = 0; v < V; ++v) {
            const std::int32_t size = input.sizes_V[v];
            scores[v] = (size < 0) | (size > most) ? -kInfinity : scores[v];
        }
    }
    scores[input.end] = input.may_end_B[b] != 0 ? end : -kInfinity;
}

// Which of W scores are `least` or more, a bit each. What GNU C's vectors lack: a comparison as bits.
template <int W>
PROTNEST_INLINE std::uint32_t reaching(const float* scores, float least) {
    std::uint32_t bits = 0;
    for (int lane = 0; lane < W; ++lane) bits |= static_cast<std::uint32_t>(scores[lane] >= least) << lane;
    return bits;
}

#if defined(PROTNEST_X86_LEVELS)
template <>
PROTNEST_V3 inline std::uint32_t reaching<8>(const float* scores, float least) {
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores), _mm256_set1_ps(least), _CMP_GE_OQ));
}

template <>
PROTNEST_V4 inline std::uint32_t reaching<16>(const float* scores, float least) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), _mm512_set1_ps(least), _CMP_GE_OQ);
}
#endif

// Ids whose scores are `least` or more, ascending, into scratch; how many. Scores are minus infinity up to whole vectors.
template <int W>
PROTNEST_INLINE std::int64_t gather(const Row& scores, float least, std::int32_t* ids) {
    const auto size = static_cast<std::int64_t>(scores.size());
    std::int64_t count = 0;
    for (std::int64_t v = 0; v < size; v += W) {
        for (std::uint32_t bits = reaching<W>(scores.data() + v, least); bits != 0; bits &= bits - 1) {
            ids[count++] = static_cast<std::int32_t>(v) + __builtin_ctz(bits);
        }
    }
    return count;
}

// Where about the k-th largest score lies, rather too low; the lowest number where a sample tells nothing.
float guess(const Row& scores, std::int64_t V, std::int64_t k, float* some) {
    const std::int64_t count = V / kStride;
    // Half as many again as are wanted, and some: a sample's quantile scatters.
    const std::int64_t rank = 3 * k / (2 * kStride) + 8;
    if (V < kWide || rank >= count) return kLowest;
    for (std::int64_t i = 0; i < count; ++i) some[i] = scores[i * kStride];
    std::nth_element(some, some + rank, some + count, std::greater<float>());
    return std::max(some[rank], kLowest);
}

// The ids of the k largest scores, ascending; of equal ones the first. Returns how many there are.
template <int W>
PROTNEST_INLINE std::int64_t select(std::int64_t V, std::int64_t k, Scratch& scratch) {
    const Row& scores = scratch.scores;
    std::int32_t* ids = scratch.ids.data();
    float* some = scratch.some.data();
    std::int64_t count = 0;
    if (k < V) count = gather<W>(scores, guess(scores, V, k, some), ids);
    if (count < k) count = gather<W>(scores, kLowest, ids);
    if (count <= k) return count;
    for (std::int64_t i = 0; i < count; ++i) some[i] = scores[ids[i]];
    std::nth_element(some, some + k - 1, some + count, std::greater<float>());
    const float least = some[k - 1];
    // As many equals of the k-th as larger ones leave room for.
    std::int64_t equals = k;
    for (std::int64_t i = 0; i < count; ++i) equals -= scores[ids[i]] > least;
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t id = ids[i];
        const bool equal = scores[id] == least;
        ids[kept] = id;
        kept += (scores[id] > least) | (equal & (equals > 0));
        equals -= equal;
    }
    return kept;
}

// Weights of K tokens; those beyond the share p weigh nothing.
void weigh(const NextTokenInput& input, std::int64_t K, Scratch& scratch) {
    const Row& scores = scratch.scores;
    const std::vector<std::int32_t>& ids = scratch.ids;
    std::vector<double>& weights = scratch.weights;
    float largest = scores[ids[0]];
    for (std::int64_t i = 1; i < K; ++i) largest = std::max(largest, scores[ids[i]]);
    double total = 0.0;
    for (std::int64_t i = 0; i < K; ++i) {
        weights[i] = std::exp((static_cast<double>(scores[ids[i]]) - largest) / input.temperature);
        total += weights[i];
    }
    if (input.top_p >= 1.0) return;
    scratch.order.resize(K);
    std::iota(scratch.order.begin(), scratch.order.end(), 0);
    std::sort(scratch.order.begin(), scratch.order.end(), [&](std::int32_t one, std::int32_t other) {
        return weights[one] != weights[other] ? weights[one] > weights[other] : one < other;
    });
    double before = 0.0;
    for (const std::int32_t i : scratch.order) {
        const double weight = weights[i];
        if (before >= input.top_p * total) weights[i] = 0.0;
        before += weight;
    }
}

// Which of K tokens a number from 0 to below 1 meets.
std::int32_t meet(double uniform, std::int64_t K, const Scratch& scratch) {
    double total = 0.0;
    for (std::int64_t i = 0; i < K; ++i) total += scratch.weights[i];
    const double wanted = uniform * total;
    double passed = 0.0;
    std::int32_t last = scratch.ids[0];
    for (std::int64_t i = 0; i < K; ++i) {
        if (scratch.weights[i] == 0.0) continue;
        passed += scratch.weights[i];
        last = scratch.ids[i];
        if (passed > wanted) break;
    }
    return last;
}

struct Outcome {
    std::int64_t* chosen_B;
    double* log_p_B;
};

template <int W>
PROTNEST_INLINE void choose_rows(const NextTokenInput& input, const Columns& columns, const Sizes& sizes,
                                 std::int64_t begin, std::int64_t end, const Outcome& outcome) {
    const std::int64_t V = input.vocabulary;
    Scratch scratch(V);
    for (std::int64_t b = begin; b < end; ++b) {
        outcome.chosen_B[b] = input.end;
        outcome.log_p_B[b] = std::numeric_limits<double>::quiet_NaN();
        read_row<W>(input, columns, b, scratch.logits);
        const double total = log_sum_exp<W>(scratch.logits);
        if (!std::isfinite(total)) continue;
        limit(input, sizes, b, scratch);
        const std::int64_t K = select<W>(V, input.top_k, scratch);
        if (K == 0) continue;
        weigh(input, K, scratch);
        const std::int32_t chosen = meet(input.uniform_B[b], K, scratch);
        outcome.chosen_B[b] = chosen;
        outcome.log_p_B[b] = scratch.logits[chosen] - total;
    }
}

using Choose = void (*)(const NextTokenInput&, const Columns&, const Sizes&, std::int64_t, std::int64_t, const Outcome&);

void choose_portable(const NextTokenInput& input, const Columns& columns, const Sizes& sizes, std::int64_t begin,
                     std::int64_t end, const Outcome& outcome) {
    choose_rows<4>(input, columns, sizes, begin, end, outcome);
}

#if defined(PROTNEST_X86_LEVELS)
PROTNEST_V3 void choose_v3(const NextTokenInput& input, const Columns& columns, const Sizes& sizes, std::int64_t begin,
                           std::int64_t end, const Outcome& outcome) {
    choose_rows<8>(input, columns, sizes, begin, end, outcome);
}

PROTNEST_V4 void choose_v4(const NextTokenInput& input, const Columns& columns, const Sizes& sizes, std::int64_t begin,
                           std::int64_t end, const Outcome& outcome) {
    choose_rows<16>(input, columns, sizes, begin, end, outcome);
}
#endif

Choose choose(Level level) {
#if defined(PROTNEST_X86_LEVELS)
    if (level >= Level::v4) return &choose_v4;
    if (level >= Level::v3) return &choose_v3;
#endif
    return &choose_portable;
}

}  // namespace

void next_token(const NextTokenInput& input, Level level, int threads, std::int64_t* chosen_B, double* log_p_B) {
    const std::int64_t B = input.sequences, V = input.vocabulary;
    const Choose chosen = choose(level);
    const Columns columns(input.logits, V);
    const Sizes sizes(input);
    const Outcome outcome{chosen_B, log_p_B};
    const auto most = static_cast<int>(std::clamp<std::int64_t>(B, 1, std::max(threads, 1)));
    share_rows(B, threads_for(B, V, most), [&](std::int64_t begin, std::int64_t end) {
        chosen(input, columns, sizes, begin, end, outcome);
    });
}

}  // namespace protnest
