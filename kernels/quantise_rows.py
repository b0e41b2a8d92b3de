"""Rows of numbers in eight bits, each on its own scale.

    range = max x - min x;   scale = range / 255;   shift = min x + 128 scale
    level = round((x - min x) (255 / range)) - 128                            so that x ~ scale level + shift

fp32, every operation rounded by itself, halves to even: the smallest number becomes -128 and the largest 127, and no
integer zero point is needed. A row whose range is below 2^-100 (constant, zeros, one number) has scale 0, levels 0 and
its smallest number as shift: a constant is exact. A row that holds NaN or infinity, or whose range overflows fp32, has
scale and shift NaN and levels 0: its results are NaN, and no other row's.

Implementations, equal to the last bit: `reference` in torch, `cpu` in csrc/row_passes.cpp, which `add_norm` and
`bias_gelu` share so that rows need no pass of their own.

Shapes: N rows, I numbers in one.
"""

from __future__ import annotations

import torch

from .cpu_kernels import cpu_level, empty_target, module, rows_of, target_arrays, why_not_cpu
from .extension import select
from .operator import Operator
from .product import Levels, Product

_STEPS = 255.0
_HALF = 128
# Below this a row counts as constant: 255 / range would leave fp32's range, and nothing in a model is so small.
_SMALLEST_RANGE = 2.0**-100


def quantise_rows_reference(x_NI: torch.Tensor) -> Levels:
    """`quantise_rows` in torch's operations, on any device."""
    x_NI = x_NI.float()
    least_N, most_N = x_NI.aminmax(dim=1) if x_NI.shape[0] else (x_NI[:, 0], x_NI[:, 0])
    range_N = most_N - least_N
    finite_N = torch.isfinite(range_N)
    spread_N = finite_N & (range_N >= _SMALLEST_RANGE)
    divisor_N = torch.where(spread_N, range_N, 1.0)
    # Not `_STEPS / divisor_N`, which torch computes as a reciprocal times _STEPS: rounded twice.
    inverse_N = divisor_N.new_full((), _STEPS) / divisor_N
    steps_NI = ((x_NI - least_N[:, None]) * inverse_N[:, None]).round() - _HALF
    values_NI = torch.where(spread_N[:, None], steps_NI, 0.0).to(torch.int8)
    scale_N = torch.where(spread_N, divisor_N / _STEPS, 0.0)
    shift_N = torch.where(spread_N, least_N + scale_N * _HALF, least_N)
    return Levels(values_NI, scale_N.masked_fill(~finite_N, torch.nan), shift_N.masked_fill(~finite_N, torch.nan))


def _quantise_rows_in_cpp(x_NI: torch.Tensor, level: str) -> list[torch.Tensor]:
    target = empty_target(x_NI.shape[0], x_NI.shape[1], torch.int8)
    module().quantise_rows(x_NI.contiguous().numpy(), target_arrays(target), level, torch.get_num_threads())
    return target


_quantise_rows = Operator("protnest::quantise_rows", _quantise_rows_in_cpp)


@_quantise_rows.register_fake
def _(x_NI: torch.Tensor, level: str) -> list[torch.Tensor]:
    N = x_NI.shape[0]
    return [x_NI.new_empty(x_NI.shape, dtype=torch.int8), x_NI.new_empty(N), x_NI.new_empty(N)]


def quantise_rows(x_NI: torch.Tensor, *, impl: str = "auto") -> Levels:
    """Rounds each row to 256 levels between its smallest and its largest number; not differentiable.

    Args:
        x_NI: (N, I), floating; bf16 and fp16 are widened first.
        impl: "auto", "reference" or "cpu"; a named one runs or raises.

    Raises:
        ValueError: x has not two axes, no columns, or is not floating point; or `impl` is unknown.
        RuntimeError: "cpu" cannot run on this tensor.
    """
    if x_NI.dim() != 2 or not x_NI.is_floating_point() or x_NI.shape[1] < 1:
        message = f"x is {x_NI.dtype} {tuple(x_NI.shape)}, expected floating point (N, I), I at least 1"
        raise ValueError(message)
    x_NI = x_NI.detach()
    extension = select("quantise_rows", impl)
    reason = why_not_cpu(Product(x_NI.float()))
    if impl == "cpu" and reason is not None:
        message = f"quantise_rows: impl='cpu' cannot run: {reason}"
        raise RuntimeError(message)
    if extension is None or reason is not None:
        return quantise_rows_reference(x_NI)
    levels = rows_of(_quantise_rows(x_NI.float(), cpu_level()))
    assert isinstance(levels, Levels)
    return levels
