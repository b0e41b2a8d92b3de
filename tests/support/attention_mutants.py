"""Broken twins of rotary_attention: what is changed in csrc/rotary_attention.cpp or lanes.hpp, or in its Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from protnest.kernels.product import Product, Scales
from protnest.kernels.rotary import apply_rotary

CPP_MUTANTS: dict[str, dict[str, str]] = {
    "last group of keys not filled": {"p % kGroup != 0; ++p": "p < 0; ++p"},
    "sums not rescaled to the new maximum": {"(n * V + v) * W) * rescale[v]": "(n * V + v) * W)"},
    "total not rescaled to the new maximum": {"total[v] *= rescale[v];": ""},
    "rescaled by the short polynomial": {"L::template exp2<5>(before": "L::template exp2<A::kDegree>(before"},
    "two keys of every tile left out": {"first < length; first += kKeys": "first < length; first += kTile"},
    "later tiles meet the first one's keys": {"keys_LK + (first + key) * steps": "keys_LK + key * steps"},
    "later tiles meet the first one's values": {"values_LK + first / A::kDepth * K": "values_LK"},
    "last key of an odd number left out": {"std::min(kKeys, length - first)": "std::min(kKeys, (length - first) & -2)"},
    "an odd last key of pairs has a neighbour": {"if (key + 1 < keys)": "if (true)"},
    "an odd last value of pairs is its own neighbour": {"last ? Quad::Float{} : next": "false ? Quad::Float{} : next"},
    "first factor of pairs for both": {"(ones & -65536) *": "(ones << 16) *"},
    "weights of pairs cut off": {
        "(L::bits(low) + 0x8000)": "(L::bits(low) + 0)",
        "(L::bits(high) + 0x8000)": "L::bits(high)",
    },
    "turned the other way": {
        "first * c - second * s": "first * c + second * s",
        "second * c + first * s": "second * c - first * s",
    },
    "second half not turned": {"second * c + first * s": "second * c"},
    "neighbours for halves": {"row.read(column + J + j)": "row.read(column + J + j - 1)"},
    "places from one": {
        "input.cos_PJ + place * J": "input.cos_PJ + (place + 1) * J",
        "input.sin_PJ + place * J": "input.sin_PJ + (place + 1) * J",
    },
    "one place's sines for all": {"input.sin_PJ + place * J": "input.sin_PJ"},
    "first heads in every part": {
        "turn_factors(row, (part.head + h) * K, input, p,": "turn_factors(row, h * K, input, p,",
        "(H + part.head + h) * K": "(H + h) * K",
    },
    "values of the next head": {"(2 * H + part.head + h) * K": "(2 * H + part.head + (h + 1) % part.heads) * K"},
    "last part of the heads left out": {
        "(input.heads + heads - 1) / heads": "std::max<std::int64_t>(1, input.heads / heads)"
    },
    "last pair of channels left out": {"for (; k < K; k += 2)": "for (; k + 2 < K; k += 2)"},
    "rows beyond the sequence written": {
        "std::min<std::int64_t>(4, count - lane)": "std::max<std::int64_t>(4, count - lane)"
    },
    "queries of the last lane repeated early": {
        "std::min(lane + i, count - 1)": "std::min(lane + i, count - 2 + count % 2)"
    },
    "one vector's total for both": {"1.0f / total[v]": "1.0f / total[0]"},
    "columns turned wrongly": {
        "rows[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7)": "rows[3] = __builtin_shufflevector(b, d, 2, 3, 4, 5)"
    },
    "maximum from 0": {"most[v] = L::all(-std::numeric_limits<float>::infinity())": "most[v] = L::all(0.0f)"},
    "scaled by J": {"std::sqrt(static_cast<float>(K))": "std::sqrt(static_cast<float>(K / 2))"},
    "powers of two of natural scores": {"kLog2E / std::sqrt": "1.0f / std::sqrt"},
    "short polynomial for all": {"kDegree = Degree": "kDegree = 3"},
    "long polynomial's third term": {"series * f + 0.240221197f": "series * f + 0.240231197f"},
    "short polynomial's third term": {"f * 0.0551716653f + 0.242611125f": "f * 0.0551716653f + 0.240221197f"},
    "exponentials end at 2^-10": {"all(-100.0f)": "all(-10.0f)"},
    "exponentials do not end": {"x = larger(x, all(-100.0f));": ""},
    "NaN is smaller than everything": {
        "return known > candidate ? known : candidate": "return candidate > known ? candidate : known"
    },
    "NaN with a payload is a number": {"return value == value ? value : Lanes<4>": "return true ? value : Lanes<4>"},
    "bf16 cut off": {"bits + 0x7fffu + ((bits >> 16) & 1u)": "bits + 0u"},
    "shift left out": {"Lanes<4>::load(sums + column) * shift + ": ""},
    "bias left out": {" * shift + Lanes<4>::load(bias + column)": " * shift"},
    "steps left out": {"Lanes<4>::load(steps + column) * __builtin": "__builtin"},
    "bias of plain numbers left out": {"value + Lanes<4>::load(bias + column)": "value"},
    "one token's scale for all": {"scale(input.qkv.scale_N[t])": "scale(input.qkv.scale_N[0])"},
    "sums of the first columns": {"Lanes<4>::load(sums + column)": "Lanes<4>::load(sums)"},
}
"""Name -> text -> what takes its place. All write and read within their buffers, but for rows beyond the output."""


def _not_turned(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x_THK


def _turned_by_halves(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply_rotary(x_THK, cos, sin / 2)


def _keys_not_turned(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    queries_THK, keys_THK = x_THK.chunk(2, dim=1)
    return torch.cat((apply_rotary(queries_THK, cos, sin), keys_THK), dim=1)


def _one_place_for_all(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply_rotary(x_THK, cos[:1].expand_as(cos), sin[:1].expand_as(sin))


_numbers = Product.numbers


def _without_steps(product: Product) -> torch.Tensor:
    scales = product.scales
    return _numbers(product._replace(scales=scales and scales._replace(steps_O=torch.ones_like(scales.steps_O))))


def _without_shift(product: Product) -> torch.Tensor:
    scales = product.scales
    return _numbers(product._replace(scales=scales and scales._replace(shift_N=torch.zeros_like(scales.shift_N))))


def _shift_of_the_bias(product: Product) -> torch.Tensor:
    if product.scales is None:
        return _numbers(product)
    assert product.bias_O is not None
    steps_O, sums_O, scale_N, shift_N = product.scales
    sums_O = sums_O + product.bias_O
    return _numbers(Product(product.values_NO, 0 * product.bias_O, Scales(steps_O, sums_O, scale_N, shift_N)))


def _without_plain_bias(product: Product) -> torch.Tensor:
    return product.values_NO if product.scales is None else _numbers(product)


PYTHON_MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "not turned": ("apply_rotary", _not_turned),
    "sines halved": ("apply_rotary", _turned_by_halves),
    "keys not turned": ("apply_rotary", _keys_not_turned),
    "one place for all": ("apply_rotary", _one_place_for_all),
    "steps left out": ("Product.numbers", _without_steps),
    "shift left out": ("Product.numbers", _without_shift),
    "shift of the bias, too": ("Product.numbers", _shift_of_the_bias),
    "bias of plain numbers left out": ("Product.numbers", _without_plain_bias),
}
"""Name -> what of `kernels.rotary_attention` is replaced, and by what; `reference` and `torch` share it."""
