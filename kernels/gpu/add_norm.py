"""Residual connection and LayerNorm in one launch.

    s   = x + delta
    out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias      per row, var over D without Bessel's correction

A row is in registers as a whole, so that the variance is that of centred values (no digits lost to a large mean) and x
is read once. All in fp32; `out` is rounded once. Bytes to move a row: D (4 + size of delta) in, D (4 + size of out)
out; nothing else takes time.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Launch

WIDEST = 8192
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _add_norm_fwd_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    T,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.arange(0, BD)
    there = (rows[:, None] < T) & (columns[None, :] < D)
    places = rows[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + places, mask=there, other=0.0)
    if ADD:
        x += tl.load(delta_ptr + places, mask=there, other=0.0).to(tl.float32)
        tl.store(sum_ptr + places, x, mask=there)
    mean = tl.sum(x, 1) / D
    centred = tl.where(there, x - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    out = centred / deviation[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class _Tiles:
    BT: int
    BD: int
    num_warps: int


def _tiles(D: int) -> _Tiles:
    """Sixteen values a thread: narrow rows share a program, and the widest have sixteen warps."""
    BD = triton.next_power_of_2(D)
    return _Tiles(BT=max(1, 2048 // BD), BD=BD, num_warps=min(16, max(4, BD // 512)))


def add_norm(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream with `delta_TD` added, and its LayerNorm. Waits for nothing.

    Args:
        x_TD: the residual stream, fp32 (T, D), contiguous, D up to 8,192.
        delta_TD: what is added, (T, D), contiguous; fp32, bf16 or fp16. None adds nothing.
        weight_D, bias_D: (D,) of one of these dtypes.
        eps: added to the variance.
        dtype: of the second result, one of these.

    Returns:
        `x_TD + delta_TD`, fp32 (T, D), or `x_TD` itself where nothing is added; and the norm, (T, D) of `dtype`.

    Raises:
        ValueError: a shape, a dtype or a stride is not as above.
    """
    _check(x_TD, delta_TD, weight_D, bias_D, dtype)
    T, D = x_TD.shape
    sum_TD = x_TD if delta_TD is None else torch.empty_like(x_TD)
    out_TD = torch.empty_like(x_TD, dtype=dtype)
    if T:
        tiles = _tiles(D)
        # Where nothing is added, the pointers of `delta` and the sum are never used.
        _add_norm_fwd_kernel[(triton.cdiv(T, tiles.BT),)](
            *(x_TD, x_TD if delta_TD is None else delta_TD, weight_D, bias_D, sum_TD, out_TD, T, eps),
            D=D,
            ADD=delta_TD is not None,
            BT=tiles.BT,
            BD=tiles.BD,
            num_warps=tiles.num_warps,
        )
    return sum_TD, out_TD


def _check(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    if x_TD.dim() != 2 or x_TD.dtype != torch.float32 or not x_TD.is_contiguous() or not 0 < x_TD.shape[1] <= WIDEST:
        message = (
            f"x is {x_TD.dtype} {tuple(x_TD.shape)}, expected contiguous torch.float32 (T, D), D from 1 to {WIDEST}"
        )
        raise ValueError(message)
    for name, given, shape in (
        ("delta", delta_TD, x_TD.shape),
        ("weight", weight_D, x_TD.shape[1:]),
        ("bias", bias_D, x_TD.shape[1:]),
    ):
        if given is not None and (given.shape != shape or given.dtype not in _TYPES or not given.is_contiguous()):
            allowed = ", ".join(map(str, _TYPES))
            message = (
                f"{name} is {given.dtype} {tuple(given.shape)}, expected contiguous {tuple(shape)} in one of {allowed}"
            )
            raise ValueError(message)
    if dtype not in _TYPES:
        message = f"dtype is {dtype}; allowed: {', '.join(map(str, _TYPES))}"
        raise ValueError(message)


# Widths of the published models and of the bundled ones, in bf16; the other dtypes differ in no size that counts.
_LISTED = (
    *((D, torch.bfloat16, True) for D in (128, 192, 320, 640, 1280, 2560, 5120)),
    *((D, torch.float32, True) for D in (480, 5120)),
    (1280, torch.float16, True),
    (1280, torch.bfloat16, False),
)


def launches() -> list[Launch]:
    """The ways in which the kernel is launched."""
    return [_launch(D, dtype, add) for D, dtype, add in _LISTED]


def _launch(D: int, dtype: torch.dtype, add: bool) -> Launch:
    tiles = _tiles(D)
    constexprs: dict[str, object] = {"D": D, "ADD": add, "BT": tiles.BT, "BD": tiles.BD}
    pointer = f"*{_TYPES[dtype]}"
    signature = {"x_ptr": "*fp32", "delta_ptr": pointer if add else "*fp32", "weight_ptr": pointer}
    signature |= {"bias_ptr": pointer, "sum_ptr": "*fp32", "out_ptr": pointer, "T": "i32", "eps": "fp32"}
    return Launch(
        name=f"add_norm D={D} {_TYPES[dtype]}{'' if add else ', nothing added'}",
        kernel=_add_norm_fwd_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=tiles.num_warps,
    )
