#include "plan_batches.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

namespace protnest {
namespace {

// Digits of 16 bits: a protein library's lengths fit one, so that it is sorted in a single pass.
constexpr int kDigitBits = 16;
constexpr std::int64_t kDigitMask = (std::int64_t{1} << kDigitBits) - 1;

// Indices by length descending, ties by index ascending: a stable radix sort. `scratch` has room for n.
std::vector<std::int64_t> sort_descending(const std::int64_t* lengths, std::int64_t n, std::int64_t* scratch) {
    std::vector<std::int64_t> sorted(n);
    const std::int64_t longest = n ? *std::max_element(lengths, lengths + n) : 0;

    std::vector<std::int64_t> slots;
    std::int64_t* from = scratch;  // not read in the first pass, whose input is 0, 1, 2, ...
    std::int64_t* to = sorted.data();
    for (int shift = 0; shift == 0 || (shift < 64 && longest >> shift); shift += kDigitBits) {
        slots.assign(std::min(longest >> shift, kDigitMask) + 1, 0);
        for (std::int64_t i = 0; i < n; ++i) ++slots[(lengths[i] >> shift) & kDigitMask];
        std::int64_t filled = 0;
        for (auto slot = slots.rbegin(); slot != slots.rend(); ++slot) filled += std::exchange(*slot, filled);
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t index = shift == 0 ? i : from[i];
            to[slots[(lengths[index] >> shift) & kDigitMask]++] = index;
        }
        std::swap(from, to);
    }
    if (from != sorted.data()) std::copy_n(from, n, sorted.data());
    return sorted;
}

// The first position at or after `begin` whose length differs. Doubling steps: a stretch of k costs O(log k) look-ups.
std::int64_t end_of_stretch(const std::int64_t* lengths, const std::vector<std::int64_t>& sorted, std::int64_t begin) {
    const auto n = static_cast<std::int64_t>(sorted.size());
    const std::int64_t length = lengths[sorted[begin]];
    std::int64_t inside = begin;
    std::int64_t step = 1;
    while (inside + step < n && lengths[sorted[inside + step]] == length) {
        inside += step;
        step *= 2;
    }
    const auto first = sorted.begin() + inside + 1;
    const auto last = sorted.begin() + std::min(inside + step, n);
    return std::partition_point(first, last, [&](std::int64_t i) { return lengths[i] == length; }) - sorted.begin();
}

// The open batches by the room they have left; among equals, the last to have come to that room goes first. The tree
// holds one node per distinct room, however large the budget; a table over all rooms would need gigabytes at 2^31.
class OpenBatches {
public:
    struct Fit {
        std::int64_t batch;
        std::int64_t room;
    };

    // Takes out the batch with the least room that still holds `length`; `batch` is -1 when none does.
    Fit take(std::int64_t length) {
        const auto top = tops_.lower_bound(length);
        if (top == tops_.end()) return {-1, 0};
        const Fit fit{top->second, top->first};
        const std::int64_t under = under_[fit.batch];
        if (under < 0) {
            tops_.erase(top);
        } else {
            top->second = under;
        }
        return fit;
    }

    void put(Fit fit) {
        if (fit.batch >= static_cast<std::int64_t>(under_.size())) under_.resize(fit.batch + 1, -1);
        const auto [top, fresh] = tops_.try_emplace(fit.room, fit.batch);
        under_[fit.batch] = fresh ? -1 : std::exchange(top->second, fit.batch);
    }

private:
    std::map<std::int64_t, std::int64_t> tops_;  // room -> the batch that came to it last
    std::vector<std::int64_t> under_;            // batch -> the one that came to the same room before it, or -1
};

// `count` neighbours in sorted order that enter `batch` together.
struct Stretch {
    std::int64_t batch;
    std::int64_t count;
};

}  // namespace

std::vector<std::int64_t> plan_batches(const std::int64_t* lengths, std::int64_t n, std::int64_t max_tokens,
                                       std::int64_t* order) {
    const std::vector<std::int64_t> sorted = sort_descending(lengths, n, order);

    // Equal lengths are placed many at a time: once the fullest fitting batch has taken one and still has room for
    // another, it is the fullest fitting batch again.
    std::vector<Stretch> stretches;
    std::vector<std::int64_t> sizes;
    OpenBatches open;
    for (std::int64_t begin = 0; begin < n;) {
        const std::int64_t length = lengths[sorted[begin]];
        const std::int64_t end = end_of_stretch(lengths, sorted, begin);
        while (begin < end) {
            OpenBatches::Fit fit = open.take(length);
            if (fit.batch < 0) {
                fit = {static_cast<std::int64_t>(sizes.size()), max_tokens};
                sizes.push_back(0);
            }
            std::int64_t count = 1;
            if (length <= max_tokens) {
                count = length == 0 ? end - begin : std::min(end - begin, fit.room / length);
                open.put({fit.batch, fit.room - count * length});
            }  // else the batch is never open: an oversized item stays alone
            stretches.push_back({fit.batch, count});
            sizes[fit.batch] += count;
            begin += count;
        }
    }

    std::vector<std::int64_t> offsets(sizes.size() + 1, 0);
    std::partial_sum(sizes.begin(), sizes.end(), offsets.begin() + 1);
    std::vector<std::int64_t> filled(offsets.begin(), offsets.end() - 1);
    auto next = sorted.begin();
    for (const Stretch& stretch : stretches) {
        std::copy_n(next, stretch.count, order + filled[stretch.batch]);
        filled[stretch.batch] += stretch.count;
        next += stretch.count;
    }
    return offsets;
}

}  // namespace protnest
