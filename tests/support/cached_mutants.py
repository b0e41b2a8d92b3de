"""Broken twins of cached_attention: what is changed in csrc/cached_attention.cpp or lanes.hpp, or in its Python."""

from __future__ import annotations

CPP_MUTANTS: dict[str, dict[str, str]] = {
    "the new token left out": {"length = last + 1;": "length = std::max<std::int64_t>(last, 1);"},
    "keys of the next sequence fill the last group": {
        "std::min(first + i, length - 1) * K": "(first + i) * K",
        "std::fill_n(scratch.scores.data() + length, 16, -std::numeric_limits<float>::infinity());": "",
    },
    "what fills the last vector counts": {
        "std::fill_n(scratch.scores.data() + length, 16, -std::numeric_limits<float>::infinity());": ""
    },
    "what fills the last vector has score 0": {"16, -std::numeric_limits<float>::infinity()": "16, 0.0f"},
    "written a place late": {
        "keys_LK + last * K, values_LK + last * K": "keys_LK + last * K, values_LK + last * K + 1"
    },
    "keys written to the first place": {"keys_LK + last * K, values_LK": "keys_LK, values_LK"},
    "values for keys": {"read_row(input, b, (H + h) * K, row)": "read_row(input, b, (2 * H + h) * K, row)"},
    "values of the next head": {"read_row(input, b, (2 * H + h) * K": "read_row(input, b, (2 * H + (h + 1) % H) * K"},
    "queries of the next head": {"read_row(input, b, h * K": "read_row(input, b, (h + 1) % H * K"},
    "slots in order": {"(input.slots_B[b] * H + h)": "(b * H + h)"},
    "first heads for all": {"(input.slots_B[b] * H + h)": "(input.slots_B[b] * H)"},
    "scaled by K": {"std::sqrt(static_cast<float>(K))": "static_cast<float>(K)"},
    "powers of two of natural scores": {"kLog2E / std::sqrt": "1.0f / std::sqrt"},
    "first step of channels alone": {"k < K; k += kStep) {\n#pragma": "k < kStep; k += kStep) {\n#pragma"},
    "odd channels left out of scores": {"part = 1; part < A::kParts; ++part) sum": "part = 1; part < 1; ++part) sum"},
    "query not in pairs": {
        "scratch.query[k + part * W + lane] = row[k + lane * A::kParts + part]": (
            "scratch.query[k + part * W + lane] = row[k + part * W + lane]"
        )
    },
    "sums not in pairs": {
        "row[k + lane * A::kParts + part] = scratch.sums[k + part * W + lane]": (
            "row[k + part * W + lane] = scratch.sums[k + part * W + lane]"
        )
    },
    "halves of pairs exchanged": {
        "parts[0] = L::from_bits(pairs << 16)": "parts[1] = L::from_bits(pairs << 16)",
        "parts[1] = L::from_bits(pairs & -65536)": "parts[0] = L::from_bits(pairs & -65536)",
    },
    "low halves of pairs are noise": {"pairs & -65536": "pairs"},
    "lanes folded once": {
        "__builtin_shufflevector(value, value, 0, 1, 2, 3) + __builtin_shufflevector(value, value, 4, 5, 6, 7)": (
            "__builtin_shufflevector(value, value, 0, 1, 2, 3) + __builtin_shufflevector(value, value, 0, 1, 2, 3)"
        )
    },
    "largest of the first keys": {"key = W; key < length; key += W": "key = W; key < 2 * W && key < length; key += W"},
    "largest of every other lane": {"lane = 1; lane < W; ++lane) largest": "lane = 2; lane < W; lane += 2) largest"},
    "one lane left out of the total": {"lane = 0; lane < W; ++lane) sum": "lane = 1; lane < W; ++lane) sum"},
    "last vector of weights left out": {"key = 0; key < length; key += W": "key = 0; key + W < length; key += W"},
    "tiles meet the first one's values": {"values_LK + first * K": "values_LK"},
    "tiles meet the first one's weights": {
        "scratch.scores.data() + first;\n        float* sums": ("scratch.scores.data();\n        float* sums")
    },
    "last value of a tile left out": {
        "keys = std::min(tile, length - first)": "keys = std::min(tile - 1, length - first)"
    },
    "sums from the sequence before": {"std::fill_n(scratch.sums.data(), K, 0.0f);": ""},
    "last steps of channels left out": {"for (; k < K; k += kStep) add_values": "for (; k < 0; k += kStep) add_values"},
    "steps after a pair left out": {"k + 2 * kStep <= K; k += 2 * kStep": "k + 2 * kStep <= K; k += 3 * kStep"},
    "not divided by the total": {"return 1.0f / sum;": "return 1.0f;"},
    "short polynomial": {"exp2<5>(L::load(scores + key) - largest)": "exp2<3>(L::load(scores + key) - largest)"},
    "exponentials end at 2^-10": {"all(-100.0f)": "all(-10.0f)"},
    "NaN with a payload is a number": {"Quad::plain_nan(scores)": "scores"},
    "bf16 cut off": {"bits + 0x7fffu + ((bits >> 16) & 1u)": "bits + 0u"},
    "bias left out": {"to[k] += qkv.bias_C[c + k]": "to[k] += 0.0f"},
    "bias of the first columns": {"to[k] += qkv.bias_C[c + k]": "to[k] += qkv.bias_C[k]"},
    "shift left out": {"(sums[k] * shift + bias[k])": "bias[k]"},
    "steps of the first columns": {"*steps = qkv.steps_C + c": "*steps = qkv.steps_C"},
    "one token's scale for all": {"scale = qkv.scale_N[b]": "scale = qkv.scale_N[0]"},
    "results a row late": {
        "at = (b * input.heads + h) * K;\n    float* row": (
            "at = ((b + 1) % input.sequences * input.heads + h) * K;\n    float* row"
        )
    },
}
"""Name -> text -> what takes its place. All write and read within their buffers."""

_KEYS = "keys_SHPK[slots_B, :, lengths_B] = k_BHK"

PYTHON_MUTANTS: dict[str, tuple[str, str, str]] = {
    "reference without the new token": ("reference", ": length + 1].to(wide)", ": max(length, 1)].to(wide)"),
    "reference without scale": ("reference", " / math.sqrt(K)", ""),
    "reference writes the first place": (
        "reference",
        "values_SHPK[slot, :, length] = qkv_C",
        "values_SHPK[slot, :, 0] = qkv_C",
    ),
    "reference with softmax over heads": ("reference", "softmax(dim=-1)", "softmax(dim=0)"),
    "reference by rows": ("reference", "(part[slot, :, :", "(part[len(outputs) - 1, :, :"),
    "new token left out": ("torch", "<= lengths_B[:, None]", "< lengths_B[:, None].clamp(min=1)"),
    "one place too many": ("torch", "<= lengths_B[:, None]", "<= lengths_B[:, None] + 1"),
    "without mask": ("torch", ", attn_mask=known_B11P", ""),
    "without scale": ("torch", "attn_mask=known_B11P", "attn_mask=known_B11P, scale=1.0"),
    "NaN let through": ("torch", ".masked_fill_(~known_B11P.mT, 0)", ""),
    "last place left out": ("torch", "int(lengths_B.max()) + 1, ", "max(int(lengths_B.max()), 1), "),
    "slots in order": ("torch", "index_select(0, slots_B)", "index_select(0, torch.arange(B))"),
    "keys written a place early": ("torch", _KEYS, _KEYS.replace("lengths_B]", "(lengths_B - 1).clamp(min=0)]")),
    "keys not written": ("torch", _KEYS, "k_BHK = k_BHK"),
    "channels before heads": ("torch", "qkv_BC.view(B, 3, H, K).unbind(1)", "qkv_BC.view(B, 3, K, H).mT.unbind(1)"),
    "queries for keys": ("torch", _KEYS, _KEYS.replace("k_BHK", "q_BHK")),
    "heads turned": ("torch", "attended.flatten(1)", "attended.flip(1).flatten(1)"),
    "what the product left to be done": (
        "torch",
        "attend(qkv.numbers(), cache",
        "attend(qkv.values_NO.to(qkv.dtype), cache",
    ),
}
"""Name -> (which implementation shows it, the line's text, what takes its place)."""
