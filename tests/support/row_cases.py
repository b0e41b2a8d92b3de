"""Rows for the passes between matrix products: hostile ones, what they should become in fp64, how far off they may be.

Shapes: N rows, C columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from protnest.kernels.add_norm import Norm, add_norm
from protnest.kernels.bias_gelu import Move, bias_gelu
from protnest.kernels.cpu_kernels import LEVELS, cpu_level, module
from protnest.kernels.extension import load, missing_reason
from protnest.kernels.product import Levels, Product, Scales
from protnest.kernels.quantise_rows import quantise_rows

U32 = 2.0**-24
"""Half the distance between neighbouring numbers, relative to the number: a rounding in fp32."""
U16 = 2.0**-8
"""The same in bf16."""

GELU_ERRORS = {"ref": 8, "cpu": 6}
"""At most, in U32 |x|: torch's own is at 5.9 and C++ at 5.1."""

KINDS = ("fp32", "fp32 with bias", "bf16", "int32")
"""What a product may leave."""

SHAPES = [(7, C) for C in (1, 3, 16, 17, 123, 320, 480, 1280)]
SHAPES += [(0, 320), (1, 1), (1, 5120), (300, 123), (300, 480)]

_GUARD = 32
"""Numbers around an array in memory that nobody may touch; whole vectors."""

needs_extension = pytest.mark.skipif(load() is None, reason=f"cpu: {missing_reason()}")
CPU_LEVELS = LEVELS if load() is None else LEVELS[: LEVELS.index(module().best_level()) + 1]
CPU_IMPLS = [pytest.param(f"cpu {level}", marks=needs_extension) for level in CPU_LEVELS]
each_impl = pytest.mark.parametrize("impl", ["reference", *CPU_IMPLS])
each_cpu_impl = pytest.mark.parametrize("impl", CPU_IMPLS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=[f"{N} x {C}" for N, C in SHAPES])


@contextlib.contextmanager
def running(impl: str) -> Iterator[str]:
    """`reference`, or `cpu LEVEL`, which has C++ run at that level; gives what `impl=` takes."""
    name, _, level = impl.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if level:
            patch.setenv("PROTNEST_CPU_LEVEL", level)
        cpu_level.cache_clear()
        try:
            yield name
        finally:
            cpu_level.cache_clear()


class Guards:
    """Memory with numbers around it that must be the same in the end."""

    def __init__(self) -> None:
        self._around: list[tuple[torch.Tensor, torch.Tensor]] = []

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that nobody has written: NaN, or an integer that no test expects."""
        count = torch.Size(shape).numel()
        poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max - 3
        around = torch.full((count + 2 * _GUARD,), poison, dtype=dtype)
        self._around.append((around, around.clone()))
        return around[_GUARD : _GUARD + count].view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, with guards."""
        return self.room(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def check(self) -> None:
        for around, before in self._around:
            for part in (slice(None, _GUARD), slice(around.numel() - _GUARD, None)):
                same = torch.equal(around[part].nan_to_num(7.0), before[part].nan_to_num(7.0))
                assert same, f"memory beside an array of {around.numel() - 2 * _GUARD} {around.dtype} was written"


@contextlib.contextmanager
def guarded() -> Iterator[Guards]:
    """What `torch.empty` gives is poisoned, with guards around it, and checked in the end."""
    guards, zeros = Guards(), torch.zeros

    def empty(*size: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shape = size[0] if size and isinstance(size[0], tuple) else size
        return guards.room(tuple(zeros(shape).shape), dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield guards
    guards.check()


def hostile_rows(N: int, C: int, *, seed: int = 0) -> torch.Tensor:
    """fp32 rows of scales 1e-3 to 10 with means that are not zero; where there are enough of them, a constant row, one
    at 1,000 with a spread of 1, zeros, and a large constant."""
    generator = torch.Generator().manual_seed(1000 * N + C + seed)
    scales_N1 = torch.logspace(-3, 1, N)[:, None] if N > 1 else torch.ones(N, 1)
    x_NC = (torch.randn(N, C, generator=generator) + 0.3) * scales_N1
    if N > 6:
        x_NC[1] = 0.7
        x_NC[2] = 1000 + torch.randn(C, generator=generator)
        x_NC[4] = 0.0
        x_NC[5] = -1234.567
    return x_NC


def make_product(kind: str, N: int, C: int, guards: Guards) -> Product:
    """A product of hostile numbers; bias and steps differ from column to column, scale and shift from row to row."""
    generator = torch.Generator().manual_seed(N + 1000 * C)
    plain_NC = hostile_rows(N, C, seed=1)
    bias_C = torch.randn(C, generator=generator) + 0.2
    if kind == "int32":
        sums_NC = torch.randint(-(2**26), 2**26, (N, C), generator=generator, dtype=torch.int32)
        steps_C = 0.001 + torch.rand(C, generator=generator) / 100
        sums_C = torch.randn(C, generator=generator) * 3
        scale_N = torch.logspace(-9, -5, N) if N > 1 else torch.full((N,), 1e-6)
        shift_N = torch.randn(N, generator=generator)
        scales = Scales(*(guards.copy(part) for part in (steps_C, sums_C, scale_N, shift_N)))
        return Product(guards.copy(sums_NC), guards.copy(bias_C), scales)
    values_NC = guards.copy(plain_NC.bfloat16() if kind == "bf16" else plain_NC)
    return Product(values_NC, guards.copy(bias_C) if kind == "fp32 with bias" else None)


def make_norm(C: int, guards: Guards) -> Norm:
    """Weight and bias differ from column to column; eps counts beside rows of scale 1e-3."""
    generator = torch.Generator().manual_seed(C)
    weight_C = torch.randn(C, generator=generator) + 0.5
    return Norm(guards.copy(weight_C), guards.copy(torch.randn(C, generator=generator) - 0.2), 1e-5)


class Gold(NamedTuple):
    """fp64 (N, C): what numbers should be, and how far off they may be."""

    values_NC: torch.Tensor
    bound_NC: torch.Tensor


def find_failure(got_NC: torch.Tensor, gold: Gold) -> str | None:
    """The element furthest beyond its bound, or None. NaN and infinity must be where gold has them."""
    assert got_NC.shape == gold.values_NC.shape, f"shape {tuple(got_NC.shape)}"
    got_NC = got_NC.double()
    same_NC = (got_NC == gold.values_NC) | (got_NC.isnan() & gold.values_NC.isnan())
    excess_NC = ((got_NC - gold.values_NC).abs() - gold.bound_NC).nan_to_num(nan=torch.inf).masked_fill(same_NC, 0.0)
    if not excess_NC.numel() or excess_NC.max() <= 0:
        return None
    place = divmod(int(excess_NC.argmax()), excess_NC.shape[1])
    values = (float(part[place]) for part in (got_NC, *gold))
    return "{}: got {:.9g}, gold {:.9g}, bound {:.3g}".format(place, *values)


def gold_of_product(product: Product) -> Gold:
    """`|error| <= 4 u32 sum |terms|`: a term is rounded three times (a sum as it becomes fp32, and two products; of the
    shifts, a product and a sum) and the sum of all once. Without anything still to be added, none."""
    if product.scales is None:
        values_NC = product.values_NO.double()
        if product.bias_O is None:
            return Gold(values_NC, torch.zeros_like(values_NC))
        gold_NC = values_NC + product.bias_O.double()
        return Gold(gold_NC, U32 * gold_NC.abs())
    assert product.bias_O is not None
    steps_C, sums_C, scale_N, shift_N = (part.double() for part in product.scales)
    term_NC = scale_N[:, None] * steps_C * product.values_NO.double()
    shift_NC = shift_N[:, None] * sums_C
    terms_NC = term_NC.abs() + shift_NC.abs() + product.bias_O.double().abs()
    return Gold(term_NC + shift_NC + product.bias_O.double(), 4 * U32 * terms_NC)


def gold_of_sum(x_NC: torch.Tensor, product: Product | None) -> Gold:
    """The product's error, and one rounding of the sum."""
    if product is None:
        return Gold(x_NC.double(), torch.zeros(x_NC.shape, dtype=torch.float64))
    added = gold_of_product(product)
    values_NC = x_NC.double() + added.values_NC
    return Gold(values_NC, 1.01 * (added.bound_NC + U32 * values_NC.abs()))


def gold_of_norm(x_NC: torch.Tensor, norm: Norm) -> Gold:
    """The LayerNorm of fp32 rows. With r = 1 / sqrt(var + eps), and S = C / 4 + 8 additions one after another where
    vectors are narrowest:

        mean       off by at most d = S u32 mean |x|
        variance   about that mean: larger by d^2, and off by (S + 4) u32 of itself
        r          off by e = d^2 r^2 / 2 + (S / 2 + 4) u32 of itself
        out        |error| <= |weight| r (d + |x - mean| (e + 4 u32)) + u32 (|gold| + |bias|)
    """
    x_NC = x_NC.double()
    C = x_NC.shape[1]
    weight_C, bias_C = norm.weight_D.double(), norm.bias_D.double()
    mean_N1 = x_NC.mean(1, keepdim=True)
    off_NC = x_NC - mean_N1
    r_N1 = 1 / (off_NC.square().mean(1, keepdim=True) + norm.eps).sqrt()
    gold_NC = off_NC * r_N1 * weight_C + bias_C
    additions = C / 4 + 8
    d_N1 = additions * U32 * x_NC.abs().mean(1, keepdim=True)
    e_N1 = (d_N1 * r_N1).square() / 2 + (additions / 2 + 4) * U32
    bound_NC = weight_C.abs() * r_N1 * (d_N1 + off_NC.abs() * (e_N1 + 4 * U32))
    return Gold(gold_NC, 1.01 * (bound_NC + U32 * (gold_NC.abs() + bias_C.abs())))


def gelu_fp64(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x) in fp64, without cancellation in the tail."""
    return x * 0.5 * torch.special.erfc(x * -(0.5**0.5))


def gold_of_gelu(product: Product, move: Move | None, impl: str) -> Gold:
    """The product's error times GELU's steepest slope of 1.13; `GELU_ERRORS` u32 |x| of GELU itself, and a rounding of
    each operation of the move. The reference computes GELU in the product's own dtype: bf16 is rounded once more."""
    numbers = gold_of_product(product)
    gold_NC = gelu_fp64(numbers.values_NC)
    bound_NC = 1.13 * numbers.bound_NC + GELU_ERRORS[impl[:3]] * U32 * numbers.values_NC.abs()
    if impl == "reference" and product.dtype == torch.bfloat16:
        bound_NC = bound_NC + U16 * gold_NC.abs()
    if move is not None:
        times_C, minus_C = move.times_F.double(), move.minus_F.double()
        moved_NC = gold_NC * times_C
        gold_NC = moved_NC - minus_C
        bound_NC = bound_NC * times_C.abs() + U32 * (moved_NC.abs() + gold_NC.abs())
    return Gold(gold_NC, 1.01 * bound_NC)


def find_difference(got: Levels, expected: Levels) -> str | None:
    """Whether levels, scales and shifts are the same to the last bit; NaN equals NaN."""
    for name, one, other in zip(Levels._fields, got, expected, strict=True):
        differs = (one != other) & ~(one.isnan() & other.isnan())
        if one.dtype != other.dtype or differs.any():
            place = tuple(differs.nonzero()[0].tolist())
            return f"{name} at {place}: got {one[place].item()!r}, expected {other[place].item()!r}"
    return None


def find_unlike(out32_NC: torch.Tensor, out16_NC: torch.Tensor, levels: Levels, impl: str) -> str | None:
    """Whether one implementation's bf16 and levels are its own fp32 numbers, rounded."""
    expected_NC = out32_NC.bfloat16()
    differs = (out16_NC != expected_NC) & ~(out16_NC.isnan() & expected_NC.isnan())
    if differs.any():
        place = tuple(differs.nonzero()[0].tolist())
        return f"bf16 at {place}: got {out16_NC[place].item()!r}, expected {expected_NC[place].item()!r}"
    with running(impl) as name:
        return find_difference(levels, quantise_rows(out32_NC, impl=name))


def find_add_norm_failure(impl: str, kind: str, x_NC: torch.Tensor, norm: Norm | None = None) -> str | None:
    """Runs `add_norm` with a product of this kind ("" for none) for each dtype; what is wrong with it, or None."""
    N, C = x_NC.shape
    outs: list[torch.Tensor | Levels] = []
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        with guarded() as guards, running(impl) as name:
            product = make_product(kind, N, C, guards) if kind else None
            own = norm or make_norm(C, guards)
            stream_NC, out = add_norm(guards.copy(x_NC), product, own, dtype=dtype, impl=name)
            if failure := find_failure(stream_NC, gold_of_sum(x_NC, product)):
                return f"stream, {dtype}: {failure}"
            if dtype == torch.float32:
                assert isinstance(out, torch.Tensor)
                if failure := find_failure(out, gold_of_norm(stream_NC, own)):
                    return f"norm: {failure}"
            assert out is not None
            outs.append(out)
    out32_NC, out16_NC, levels = outs
    assert isinstance(out32_NC, torch.Tensor)
    assert isinstance(out16_NC, torch.Tensor)
    assert isinstance(levels, Levels)
    return find_unlike(out32_NC, out16_NC, levels, impl)


def make_move(C: int, guards: Guards) -> Move:
    generator = torch.Generator().manual_seed(C)
    times_C = 0.1 + torch.rand(C, generator=generator) * 3
    return Move(guards.copy(times_C), guards.copy(torch.randn(C, generator=generator)))


def find_bias_gelu_failure(impl: str, kind: str, shape: tuple[int, int], moves: bool) -> str | None:
    """Runs `bias_gelu` on a product of this kind for each dtype; what is wrong with it, or None."""
    outs: list[torch.Tensor | Levels] = []
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        with guarded() as guards, running(impl) as name:
            product = make_product(kind, *shape, guards)
            move = make_move(shape[1], guards) if moves else None
            gold = gold_of_gelu(product, move, impl)
            out = bias_gelu(product, dtype=dtype, move=move, impl=name)
            if dtype == torch.float32:
                assert isinstance(out, torch.Tensor)
                if failure := find_failure(out, gold):
                    return failure
            outs.append(out)
    out32_NC, out16_NC, levels = outs
    assert isinstance(out32_NC, torch.Tensor)
    assert isinstance(out16_NC, torch.Tensor)
    assert isinstance(levels, Levels)
    return find_unlike(out32_NC, out16_NC, levels, impl)
