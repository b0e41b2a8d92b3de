"""Inputs of rotary_attention that find mistakes, and how far from fp64 gold each implementation may be.

Shapes: T tokens, L of one sequence, H heads, K head width, J = K / 2, C = 3 H K, P places of the table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from protnest.kernels.product import Product, Scales
from protnest.kernels.rotary import rotary_table
from protnest.kernels.rotary_attention import RotaryTable

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

HEADS = {8: 11, 10: 9, 16: 7, 20: 5, 24: 4, 32: 3, 64: 3, 128: 2}
"""Head width -> heads, so many that the C++ kernel packs them in two goes, the second one smaller where it can be."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `rotary_attention`. NaN lies around every buffer, and in the table at places beyond the longest."""

    qkv: Product
    table: RotaryTable
    lengths_B: tuple[int, ...]
    heads: int

    @functools.cached_property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(self.lengths_B)], dtype=torch.int32)

    def pick(self, order: Sequence[int]) -> Case:
        """The sequences of these indices, in this order."""
        ends = self.cu_seqlens.tolist()
        rows_T = torch.tensor([t for b in order for t in range(ends[b], ends[b + 1])], dtype=torch.int64)
        lengths_B = tuple(self.lengths_B[b] for b in order)
        return dataclasses.replace(self, qkv=guarded_product(self.qkv.rows(rows_T)), lengths_B=lengths_B)

    @functools.cached_property
    def gold(self) -> Gold:
        return _find_gold(self)


@dataclasses.dataclass(frozen=True)
class Gold:
    """`out` and what bounds are made of, all (T, H, K) or broadcast to it."""

    out: Array
    mean_size: Array  # sum_u p_u |v_u|, of what v_u is added up from
    spread: Array  # sqrt(sum_u p_u (v_u - out)^2)
    score_size: Array  # largest sum_k |q'||k'| / sqrt(K) of a row, of what q' and k' are added up from
    turned_size: Array  # sqrt(sum_u p_u s_u^2), s_u = sum_k |q'||k'| / sqrt(K)
    largest_turned: Array  # largest s_u


def guarded(values: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous, with NaN before and after them in memory; around integers the largest one."""
    fill = torch.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    around = torch.full((values.numel() + 128,), fill, dtype=values.dtype)
    around[64:-64] = values.flatten()
    return around[64:-64].view(values.shape)


def guarded_product(product: Product) -> Product:
    """The same product, all of whose tensors are `guarded`."""
    return Product.of([guarded(part) for part in product.tensors()])


def make_case(
    lengths_B: Sequence[int],
    K: int,
    dtype: torch.dtype = torch.float32,
    *,
    heads: int | None = None,
    kind: str = "hostile",
    left: str = "numbers",
) -> Case:
    """Random numbers with means that are not zero and one constant row.

    Args:
        lengths_B: tokens of each sequence.
        K: head width.
        dtype: of qkv's numbers; fp32 where they are integers.
        heads: H; None takes `HEADS`.
        kind: "hostile": rows differ in scale from 0.1 to 4; "mild": scores of about 1, no weight is large; "equal": all
            scores of a query are the same; "one takes all": scores in thousands; "rising": a query's scores grow along
            the sequence, so that each tile has a new largest one.
        left: what the product left: "numbers", "with bias", or "integers", which are int8 sums with their scales.
    """
    heads = heads or HEADS[K]
    T, C = sum(lengths_B), 3 * heads * K
    generator = torch.Generator().manual_seed(1000 * K + T)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    scales = 10 ** (1.6 * torch.rand((T, 3, heads, 1), generator=generator) - 1)
    qkv = (normal(T, 3, heads, K) + 0.3) * (scales if kind == "hostile" else 0.5)
    qkv[T // 2 :][:1] = 0.7
    if kind == "equal":
        qkv[:, 0] = 0
    elif kind == "one takes all":
        qkv[:, :2] *= 60
    elif kind == "rising":
        # The slowest pair of channels hardly turns.
        qkv[:, 0, :, K // 2 - 1] = 4
        qkv[:, 1, :, K // 2 - 1] = torch.arange(T)[:, None] / 16
    longest = max(lengths_B, default=0)
    cos, sin = rotary_table(torch.arange(longest), K, torch.float32)
    beyond = torch.full((7, K // 2), torch.nan)
    table = RotaryTable(*(guarded(torch.cat((part[:, 0], beyond))) for part in (cos, sin)))
    product = Product(qkv.view(T, C).to(dtype))
    if left == "with bias":
        product = product._replace(bias_O=(normal(C) + 0.2).to(dtype))
    elif left == "integers":
        steps_C, scale_T = (10.0**-e * (0.5 + torch.rand(n, generator=generator)) for e, n in ((2, C), (3, T)))
        sums_C, shift_T, bias_C = 500 * normal(C), 1e-3 * normal(T), normal(C) + 0.2
        integers_TC = (product.values_NO / (scale_T[:, None] * steps_C)).round().int()
        product = Product(integers_TC, bias_C, Scales(steps_C, sums_C, scale_T, shift_T))
    return Case(guarded_product(product), table, tuple(lengths_B), heads)


def find_numbers(case: Case) -> tuple[Array, Array]:
    """The numbers that qkv stands for, and the sizes of what they are added up from, (T, 3, H, K)."""
    values, *rest = (part.double().numpy() for part in case.qkv.tensors())
    terms = [values]
    if len(rest) > 1:
        steps_C, sums_C, scale_T, shift_T = rest[1:]
        terms = [scale_T[:, None] * steps_C * values, shift_T[:, None] * sums_C]
    terms += [np.broadcast_to(bias_C, values.shape) for bias_C in rest[:1]]
    values, sizes = sum(terms, np.zeros(())), sum(map(np.abs, terms), np.zeros(()))
    T, C = values.shape
    shape = (T, 3, case.heads, C // (3 * case.heads))
    return values.reshape(shape), sizes.reshape(shape)


def _find_gold(case: Case) -> Gold:
    values, sizes = find_numbers(case)
    rows: list[list[Array]] = []
    with np.errstate(invalid="ignore"):  # of cases with infinities
        for begin, end in itertools.pairwise(case.cu_seqlens.tolist()):
            cos, sin = (part_PJ[: end - begin].double().numpy()[:, None, None] for part_PJ in case.table)
            first, second = np.split(values[begin:end, :2], 2, axis=-1)
            turned = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
            first, second = np.split(sizes[begin:end, :2], 2, axis=-1)
            cos, sin = np.abs(cos), np.abs(sin)
            added = np.concatenate((first * cos + second * sin, second * cos + first * sin), axis=-1)
            rows.append(_attend(turned, added, values[begin:end, 2], sizes[begin:end, 2]))
    T, _, H, K = values.shape
    parts = [np.concatenate(part) for part in zip(*rows, strict=True)] if rows else [np.zeros((0, H, 1))] * 6
    return Gold(*(np.broadcast_to(part, (T, H, K)) for part in parts))


def _attend(turned: Array, added: Array, v_LHK: Array, v_size_LHK: Array) -> list[Array]:
    """What `Gold` holds, of one sequence; `turned` and `added` are (L, 2, H, K)."""
    root = np.sqrt(turned.shape[-1])

    def products(pair: Array) -> Any:
        return pair[:, 0].transpose(1, 0, 2) @ pair[:, 1].transpose(1, 2, 0) / root

    scores, turned_sizes, added_sizes = products(turned), products(np.abs(turned)), products(added)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    weights /= weights.sum(-1, keepdims=True)
    v, v_size = v_LHK.transpose(1, 0, 2), v_size_LHK.transpose(1, 0, 2)
    out = weights @ v
    found = (
        out,
        weights @ v_size,
        np.sqrt(np.maximum(weights @ v**2 - out**2, 0)),
        added_sizes.max(-1, keepdims=True, initial=0),
        np.sqrt((weights * turned_sizes**2).sum(-1, keepdims=True)),
        turned_sizes.max(-1, keepdims=True, initial=0),
    )
    return [part.transpose(1, 0, 2) for part in found]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Where an implementation rounds, beside fp32."""

    series: float = 0.0  # relative error of the exponential
    turned: float = 0.0  # of turned queries and keys, as they are stored
    added: float = 0.0  # of every step of a score
    weights: float = 0.0  # of the weights


BF16 = 2.0**-8
"""Half an ulp."""


def rounding_of(impl: str, case: Case) -> Rounding:
    """What the kernel's levels, "v4 in pairs", "reference" (in fp32) and "torch" do to such a case."""
    bf16 = case.qkv.dtype == torch.bfloat16
    if impl in ("reference", "torch"):
        # In bf16 the table, a product and a sum are rounded, for q as for k; weights where a processor multiplies bf16.
        return Rounding(added=6 * BF16, weights=BF16) if bf16 else Rounding()
    if bf16 and impl in ("v4 in pairs", "v4_bf16"):
        return Rounding(series=7.5e-5, turned=2 * BF16, weights=BF16)
    short = impl != "portable" and (bf16 or case.qkv.scales is not None)
    return Rounding(series=7.5e-5 if short else 0.0)


def find_failure(got_TD: torch.Tensor, case: Case, impl: str) -> str | None:
    """The worst element, if one lies further from gold than rounding explains.

    Let the logarithm of weight u be off by d_u. To first order the output moves by sum_u p_u d_u (v_u - out), which is
    at most sqrt(sum p d^2) sqrt(sum p (v - out)^2); exp(2 max d) times that covers the other orders. With e = 2^-23:

        d_u = 4 e (1 + S) + series + added S + turned s_u                               S, s_u as in `Gold`
        bound = exp(2 max d) sqrt(sum p d^2) spread + ((4 + L / 2) e + weights) sum_u p_u |v_u| + half an ulp

    4: the turn rounds four times for q and for k, the score once or twice and its sum at random. L / 2: each step of a
    sum over the sequence rounds by half of e; where one key takes nearly all, the small weights are lost in that.
    Weights are rounded to bf16 after they were added up, hence not times the spread. Half an ulp is of bf16 output.
    """
    gold, rounding = case.gold, rounding_of(impl, case)
    eps = float(np.finfo(np.float32).eps)
    T, C = case.qkv.values_NO.shape
    assert (got_TD.shape, got_TD.dtype) == ((T, C // 3), case.qkv.dtype)
    got = got_TD.double().numpy().reshape(gold.out.shape)
    common = 4 * eps * (1 + gold.score_size) + rounding.series + rounding.added * gold.score_size
    off_by = common + rounding.turned * gold.turned_size
    orders = np.exp(2 * (common + rounding.turned * gold.largest_turned))
    lengths = np.repeat(case.lengths_B, case.lengths_B)[:, None, None]
    with np.errstate(invalid="ignore"):
        bound = orders * off_by * gold.spread + ((4 + lengths / 2) * eps + rounding.weights) * gold.mean_size
        if case.qkv.dtype == torch.bfloat16:
            bound = bound * (1 + BF16) + BF16 * np.abs(gold.out)
        share = np.abs(got - gold.out) / bound
    same = (got == gold.out) | (np.isnan(got) & np.isnan(gold.out))
    share = np.where(same, 0, np.nan_to_num(share, nan=np.inf))
    if not share.size or share.max() <= 1:
        return None
    worst = np.unravel_index(int(share.argmax()), share.shape)
    place = tuple(map(int, worst))
    return f"{impl}, {place}: got {got[worst]:.9g}, gold {gold.out[worst]:.9g}, bound {bound[worst]:.3g}"
