"""`nested_embed` in one launch: statistics of the new hidden states, both products, offset, written beside the row.

A program owns BT rows and BN of the new columns. It reads its rows of h once for mean and variance (merged chunk by
chunk, so that a large mean costs no digits), a second time for the product with P, then the row so far for the product
with G. Programs of the same rows follow each other, so that the second and further readings come from L2.

Operands of the products have the weights' dtype; fp32 ones multiply in full fp32, without tf32. Sums are fp32.
Shapes: T rows, X width of the row so far, D the new model's width, N dimensions it adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..hardware import is_interpreting
from .launch import Launch


@triton.jit
def _nested_embed_fwd_kernel(
    row_ptr,
    hidden_ptr,
    projection_ptr,
    base_ptr,
    offset_ptr,
    T,
    row_stride,
    hidden_stride,
    eps,
    X: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    NORMALISE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    column_blocks: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    rows = (pid // column_blocks) * BT + tl.arange(0, BT)
    columns = (pid % column_blocks) * BN + tl.arange(0, BN)
    row_there = rows[:, None] < T
    column_there = columns[None, :] < N
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride
    out_rows = row_ptr + rows.to(tl.int64)[:, None] * row_stride
    operand: tl.constexpr = projection_ptr.dtype.element_ty

    mean = tl.zeros((BT,), tl.float32)
    scale = tl.full((BT,), 1.0, tl.float32)
    if NORMALISE:
        squares = tl.zeros((BT,), tl.float32)
        for begin in range(0, D, BK):
            channels = begin + tl.arange(0, BK)
            there = row_there & (channels[None, :] < D)
            h = tl.load(hidden_rows + channels[None, :], mask=there, other=0.0).to(tl.float32)
            count = tl.minimum(D - begin, BK).to(tl.float32)
            chunk_mean = tl.sum(h, 1) / count
            centred = tl.where(there, h - chunk_mean[:, None], 0.0)
            shift = chunk_mean - mean
            share = count / (begin + count)
            squares += tl.sum(centred * centred, 1) + shift * shift * (begin * share)
            mean += shift * share
        scale = 1.0 / tl.sqrt(squares / D + eps)

    sums = tl.zeros((BT, BN), tl.float32)
    for begin in range(0, D, BK):
        channels = begin + tl.arange(0, BK)
        there = row_there & (channels[None, :] < D)
        h = tl.load(hidden_rows + channels[None, :], mask=there, other=0.0).to(tl.float32)
        n = tl.where(there, (h - mean[:, None]) * scale[:, None], 0.0).to(operand)
        p_there = (channels[:, None] < D) & column_there
        p = tl.load(projection_ptr + channels[:, None] * N + columns[None, :], mask=p_there, other=0.0)
        if INTERPRET:
            n, p = n.to(tl.float32), p.to(tl.float32)
        sums = tl.dot(n, p, sums, input_precision="ieee")
    for begin in range(0, X, BK):
        channels = begin + tl.arange(0, BK)
        there = row_there & (channels[None, :] < X)
        x = tl.load(out_rows + channels[None, :], mask=there, other=0.0).to(operand)
        g_there = (channels[:, None] < X) & column_there
        g = tl.load(base_ptr + channels[:, None] * N + columns[None, :], mask=g_there, other=0.0)
        if INTERPRET:
            x, g = x.to(tl.float32), g.to(tl.float32)
        sums = tl.dot(x, g, sums, input_precision="ieee")
    offset = tl.load(offset_ptr + columns, mask=columns < N, other=0.0)
    tl.store(out_rows + X + columns[None, :], sums + offset[None, :], mask=row_there & column_there)


@dataclass(frozen=True, kw_only=True)
class _Tiles:
    BT: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def _tiles(N: int, weight_dtype: torch.dtype) -> _Tiles:
    """Fixed by the number of new columns: no autotuning, so that the first batch is as fast as the last.

    Shared memory stays below the 99 KiB of a consumer card; `launches` is compiled for all of them in the tests.
    """
    if weight_dtype == torch.float32:
        # With four warps 64 columns spill on sm_86 and sm_89.
        return _Tiles(BT=32, BN=64 if N > 32 else 32, BK=32, num_warps=8 if N > 32 else 4, num_stages=2)
    if N <= 32:
        return _Tiles(BT=64, BN=32, BK=64, num_warps=4, num_stages=2)
    if N <= 192:
        return _Tiles(BT=64, BN=64, BK=64, num_warps=4, num_stages=2)
    return _Tiles(BT=64, BN=128, BK=64, num_warps=8, num_stages=2)


def launch(
    row_TW: torch.Tensor,
    base_width: int,
    hidden_TD: torch.Tensor,
    projection_DN: torch.Tensor,
    base_XN: torch.Tensor,
    offset_N: torch.Tensor,
    eps: float | None,
) -> None:
    """Writes columns `base_width` to `base_width + N` of the fp32 rows; see `protnest.kernels.nested_embed`."""
    T, D = hidden_TD.shape
    N = offset_N.shape[0]
    if not T or not N:
        return
    if hidden_TD.stride(1) != 1:
        hidden_TD = hidden_TD.contiguous()
    tiles = _tiles(N, projection_DN.dtype)
    grid = (triton.cdiv(T, tiles.BT) * triton.cdiv(N, tiles.BN),)
    _nested_embed_fwd_kernel[grid](
        row_TW,
        hidden_TD,
        projection_DN.contiguous(),
        base_XN.contiguous(),
        offset_N.float(),
        T,
        row_TW.stride(0),
        hidden_TD.stride(0),
        0.0 if eps is None else eps,
        X=base_width,
        D=D,
        N=N,
        NORMALISE=eps is not None,
        INTERPRET=is_interpreting(),
        BT=tiles.BT,
        BN=tiles.BN,
        BK=tiles.BK,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# (X, D) of the published stages and of the bundled pair; N = D - X in all of them.
_STAGES = ((320, 480), (480, 640), (640, 1280), (1280, 2560), (2560, 5120), (128, 192), (192, 320))


def launches() -> list[Launch]:
    """The ways in which the kernel is launched for the published and the bundled families: fp32 hidden states, as the
    encoder's residual stream has them, and for one stage narrow and normalised ones too."""
    listed = [_launch(X, D, weight, torch.float32, True) for weight in _TYPES for X, D in _STAGES]
    listed += [_launch(640, 1280, weight, weight, True) for weight in (torch.bfloat16, torch.float16)]
    return [*listed, *(_launch(640, 1280, weight, torch.float32, False) for weight in _TYPES)]


def _launch(X: int, D: int, weight_dtype: torch.dtype, hidden_dtype: torch.dtype, normalise: bool) -> Launch:
    tiles = _tiles(D - X, weight_dtype)
    constexprs: dict[str, object] = {"X": X, "D": D, "N": D - X, "NORMALISE": normalise, "INTERPRET": False}
    constexprs |= {"BT": tiles.BT, "BN": tiles.BN, "BK": tiles.BK}
    signature = {
        "row_ptr": "*fp32",
        "hidden_ptr": f"*{_TYPES[hidden_dtype]}",
        "projection_ptr": f"*{_TYPES[weight_dtype]}",
        "base_ptr": f"*{_TYPES[weight_dtype]}",
        "offset_ptr": "*fp32",
        "T": "i32",
        "row_stride": "i32",
        "hidden_stride": "i32",
        "eps": "fp32",
        **dict.fromkeys(constexprs, "constexpr"),
    }
    words = f"{X} -> {D}, weights {_TYPES[weight_dtype]}, hidden {_TYPES[hidden_dtype]}"
    return Launch(
        name=f"nested_embed {words}{'' if normalise else ', normalised'}",
        kernel=_nested_embed_fwd_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
