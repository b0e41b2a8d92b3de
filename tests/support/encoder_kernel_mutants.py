"""Broken twins of the encoder's Triton kernels: what is changed in a file. Each must fail the check it passes."""

from __future__ import annotations

Mutants = dict[str, dict[str, str]]

ROTARY_ATTENTION_MUTANTS: Mutants = {
    "scores not scaled": {'input_precision="ieee") * scale': 'input_precision="ieee") * 1.4426950408889634'},
    "scores in base e": {"tl.exp2(scores - new_top[:, None])": "tl.exp(scores - new_top[:, None])"},
    "turned the other way": {
        "first * cos - second * sin": "first * cos + second * sin",
        "second * cos + first * sin": "second * cos - first * sin",
    },
    "places counted from the tile's beginning": {"_ptr + place * HALF, HALF": "_ptr, HALF"},
    "tables rounded to bf16": {
        "cos = _load_tile(cos_ptr + place * HALF, HALF, left, HALF, R, C, ENDS)": (
            "cos = _load_tile(cos_ptr + place * HALF, HALF, left, HALF, R, C, ENDS).to(tl.bfloat16).to(tl.float32)"
        )
    },
    "second halves left out": {
        "tl.dot(q_second, tl.trans(k_second), scores,": "tl.dot(q_second * 0, k_second.T, scores,"
    },
    "keys beyond the sequence count": {
        "scores, -float": "scores, 0 * float",
        '("inf"))\n    new_top': '("1"))\n    new_top',
    },
    "last key left out": {"tl.arange(0, BN)[None, :] < length": "tl.arange(0, BN)[None, :] < length - 1"},
    "last tile of keys left out": {"if whole < length:": "if whole < 0:"},
    "whole tiles of keys left out": {"in range(0, whole, BN)": "in range(0, 0, BN)"},
    "sums not rescaled to the new maximum": {"total * fade + tl.sum": "total + tl.sum"},
    "output not rescaled to the new maximum": {"out * fade[:, None]": "out"},
    "maximum of the last tile": {"tl.maximum(top, tl.max(scores, 1))": "tl.max(scores, 1)"},
    "not divided by the sum": {"(out / total[:, None])": "out"},
    "values of the keys": {"value_ptr = key_ptr + heads * K": "value_ptr = key_ptr"},
    "keys of the first head": {"key_ptr = query_ptr + heads * K": "key_ptr = query_ptr + (heads - head) * K"},
    "rows of the sequence before": {
        "query_ptr = qkv_ptr + first.to(tl.int64)": "query_ptr = qkv_ptr + (first - 1).to(tl.int64)"
    },
    "last row not written": {"(rows[:, None] < length)": "(rows[:, None] < length - 1)"},
    "last channel not written": {"(columns[None, :] < K)": "(columns[None, :] < K - 1)"},
    "second tile of queries not run": {"if begin >= length:": "if begin > 0:"},
}

ADD_NORM_MUTANTS: Mutants = {
    "nothing added": {"x += tl.load(delta_ptr": "x += 0 * tl.load(delta_ptr"},
    "taken away": {"x += tl.load(delta_ptr": "x -= tl.load(delta_ptr"},
    "sum rounded": {"tl.store(sum_ptr + places, x,": "tl.store(sum_ptr + places, x.to(tl.bfloat16),"},
    "sum not written": {"tl.store(sum_ptr + places, x, mask=there)": "pass"},
    "mean over the padded width": {"tl.sum(x, 1) / D": "tl.sum(x, 1) / BD"},
    "variance over the padded width": {"tl.sum(centred * centred, 1) / D": "tl.sum(centred * centred, 1) / BD"},
    "padded lanes in the variance": {"tl.where(there, x - mean[:, None], 0.0)": "x - mean[:, None]"},
    "variance by moments": {"tl.sum(centred * centred, 1) / D": "tl.maximum(tl.sum(x * x, 1) / D - mean * mean, 0.0)"},
    "Bessel's correction": {"tl.sum(centred * centred, 1) / D": "tl.sum(centred * centred, 1) / (D - 1)"},
    "not centred": {"tl.where(there, x - mean[:, None], 0.0)": "x"},
    "eps left out": {"/ D + eps)": "/ D + 1e-30)"},
    "eps beside the deviation": {"/ D + eps)": "/ D) + eps"},
    "weight left out": {"* weight[None, :]": ""},
    "bias left out": {"+ bias[None, :]": ""},
    "centred values rounded": {"out = centred / deviation": "out = centred.to(tl.bfloat16).to(tl.float32) / deviation"},
    "last column not written": {
        "tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=there)": (
            "tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=there & (columns[None, :] < D - 1))"
        )
    },
    "last row not written": {"(rows[:, None] < T)": "(rows[:, None] < T - 1)"},
    "output 0.1 % short": {"+ bias[None, :]": "* 0.999 + bias[None, :]"},
}

GELU_MUTANTS: Mutants = {
    "bias left out": {"+ bias[None, :]": ""},
    "bias taken away": {"+ bias[None, :]": "- bias[None, :]"},
    "bias twice": {"+ bias[None, :]": "+ 2 * bias[None, :]"},
    "bias after": {
        "+ bias[None, :]": "",
        "tl.erf(z * _INVERSE_ROOT_2))": "tl.erf(z * _INVERSE_ROOT_2)) + bias[None, :]",
    },
    "sum rounded before": {"+ bias[None, :]": "+ bias[None, :]\n    z = z.to(tl.bfloat16).to(tl.float32)"},
    "by tanh": {"tl.erf(z * _INVERSE_ROOT_2)": "2 * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z)) - 1"},
    "by a sigmoid": {"0.5 * z * (1.0 + tl.erf(z * _INVERSE_ROOT_2))": "z * tl.sigmoid(1.702 * z)"},
    "rectified": {"0.5 * z * (1.0 + tl.erf(z * _INVERSE_ROOT_2))": "tl.maximum(z, 0.0)"},
    "root of two left out": {"tl.erf(z * _INVERSE_ROOT_2)": "tl.erf(z)"},
    "half left out": {"0.5 * z *": "z *"},
    "one left out": {"(1.0 + tl.erf": "(0.0 + tl.erf"},
    "first block's bias everywhere": {
        "bias_ptr + columns, mask=columns < F": "bias_ptr + columns % BF, mask=columns < F"
    },
    "last column not written": {"mask=there)\n\n\ndef": "mask=there & (columns[None, :] < F - 1))\n\n\ndef"},
    "last row not written": {"(rows[:, None] < N)": "(rows[:, None] < N - 1)"},
    "second block of columns not run": {"(triton.cdiv(N, _BN), triton.cdiv(F, _BF))": "(triton.cdiv(N, _BN), 1)"},
}
