"""Broken twins of next_token: what is changed in csrc/next_token.cpp or lanes.hpp, or in its Python."""

from __future__ import annotations

CPP_MUTANTS: dict[str, dict[str, str]] = {
    "every row is the first": {"read(input.logits, columns, b, v, V)": "read(input.logits, columns, 0, v, V)"},
    "negative logits divided": {"scores[u] < 0.0f ? scores[u] * penalty : scores[u] / penalty": "scores[u] / penalty"},
    "the last few never seen": {
        "    for (; v < V; ++v) {\n        if (seen[v]": "    for (; v < 0; ++v) {\n        if (seen[v]"
    },
    "eight passed over by the first": {"if (eight == 0) continue;": "if ((eight & 255) == 0) continue;"},
    "slots of the first sequence": {"input.slots_B[b] * V": "input.slots_B[0] * V"},
    "the end has a size": {
        "scores[input.end] = input.may_end_B[b] != 0 ? end : -kInfinity;": (
            "if (input.may_end_B[b] == 0) scores[input.end] = -kInfinity;"
        )
    },
    "the end is always allowed": {"input.may_end_B[b] != 0 ? end : -kInfinity": "end"},
    "the first sequence's end": {"input.may_end_B[b]": "input.may_end_B[0]"},
    "the first sequence's room": {"room = input.room_B[b]": "room = input.room_B[0]"},
    "sizes that just fit": {"(size > most)": "(size >= most)"},
    "never is a size": {"(size < 0) | (size > most)": "size > most"},
    "never is looked for alone": {"sizes.any_never || sizes.largest > room": "sizes.any_never"},
    "never is not looked for": {"sizes.any_never || sizes.largest > room": "sizes.largest > room"},
    "nothing without room": {"room <= 0": "room < 0"},
    "room cut to 32 bits": {
        "std::min<std::int64_t>(room, std::numeric_limits<std::int32_t>::max())": "room",
    },
    "the sample is believed": {"if (count < k) count = gather": "if (count == 0) count = gather"},
    "any of the k largest is the k-th": {"least = some[k - 1]": "least = some[0]"},
    "all equals of the k-th stay": {"(equal & (equals > 0))": "equal"},
    "no equals of the k-th stay": {"(equal & (equals > 0))": "0"},
    "larger ones are not counted": {"equals -= scores[ids[i]] > least;": "equals -= 0;"},
    "the last of equals stay": {"(equal & (equals > 0))": "(equal & (equals <= 0))"},
    "one bit of a vector": {"bits != 0; bits &= bits - 1": "bits != 0; bits = 0"},
    "ids a lane late": {"__builtin_ctz(bits)": "(__builtin_ctz(bits) ^ 1)"},
    "weights from the first": {
        "for (std::int64_t i = 1; i < K; ++i) largest": "for (std::int64_t i = 1; i < 0; ++i) largest"
    },
    "times the temperature": {"- largest) / input.temperature": "- largest) * input.temperature"},
    "without temperature": {"- largest) / input.temperature": "- largest)"},
    "a share of one": {"input.top_p * total": "input.top_p"},
    "a share that is reached": {"before >= input.top_p": "before + weight >= input.top_p"},
    "a share of the unlikeliest": {"weights[one] > weights[other] : one": "weights[one] < weights[other] : one"},
    "the last of equals make up the share": {"one < other;": "one > other;"},
    "not scaled to the total": {"wanted = uniform * total": "wanted = uniform"},
    "met when reached": {"passed > wanted": "passed >= wanted"},
    "places for ids": {"last = scratch.ids[i]": "last = static_cast<std::int32_t>(i)"},
    "the first sequence's number": {"input.uniform_B[b]": "input.uniform_B[0]"},
    "log probability of scores": {"scratch.logits[chosen] - total": "scratch.scores[chosen] - total"},
    "one lane left out of the total": {"lane = 0; lane < W; ++lane) sum": "lane = 1; lane < W; ++lane) sum"},
    "powers of two": {"- largest) * kLog2E": "- largest)"},
    "short polynomial": {"template exp2<5>": "template exp2<3>"},
    "NaN of any bits is a number": {"odd |= some != some;": ""},
    "the largest of one lane": {"largest = std::max(largest, most[lane])": "largest = most[0]"},
    "nothing left is not told": {"outcome.chosen_B[b] = input.end;": ""},
}
"""Name -> text -> what takes its place. All write and read within their buffers."""

PYTHON_MUTANTS: dict[str, tuple[str, str]] = {
    "penalty turned round": (
        "logits_BV * penalty, logits_BV / penalty",
        "logits_BV / penalty, logits_BV * penalty",
    ),
    "penalty for all": ("torch.where(seen_BV, penalised_BV, logits_BV)", "penalised_BV.clone()"),
    "slots of the first sequence": ("seen_SV[slots_B]", "seen_SV[slots_B[0] + 0 * slots_B]"),
    "times the temperature": ("below_BK / filters.temperature", "below_BK * filters.temperature"),
    "a share that is reached": ("p_BK.cumsum(dim=1) - p_BK\n", "p_BK.cumsum(dim=1)\n"),
    "top_k left out": ("min(filters.top_k or V, V)", "V"),
    "ids as they come": ("ids_BK, order_BK = ids_BK.sort(dim=1)", "order_BK = ids_BK.argsort(dim=1)"),
    "shares as they come": ("p_BK.gather(1, order_BK)", "p_BK"),
    "something without room": (" | (room_B1 <= 0)", ""),
    "never is a size": ("(self.sizes_V < 0) | ", ""),
    "sizes that just fit": ("self.sizes_V > room_B1", "self.sizes_V >= room_B1"),
    "the end is always allowed": ("= ~self.may_end_B", "= False"),
    "the end has a size": ("[:, self.end] = ~self.may_end_B", "[:, self.end] |= ~self.may_end_B"),
    "met when reached": ("right=True", "right=False"),
    "not scaled to the total": ("(uniform_B * total_BK[:, -1])", "(uniform_B * 0.9)"),
    "log probability of shares": (
        "logits_BV.logsumexp(dim=1)",
        "logits_BV.gather(1, ids_BK).logsumexp(dim=1)",
    ),
    "infinity is a number": ("total_B.isfinite() & ", ""),
    "nothing left is not told": (" & p_BK[:, 0].isfinite()", ""),
    "divided before the largest is taken off": (
        "below_BK / filters.temperature",
        "top_BK.double() / filters.temperature",
    ),
}
"""Name -> (the line's text, what takes its place)."""
