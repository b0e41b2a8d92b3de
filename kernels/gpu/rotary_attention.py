"""Attention over packed sequences with the rotary turn fused in: one launch for a whole batch.

    out[t, h] = sum_u softmax_u(R(t) q[t, h] . R(u) k[u, h] / sqrt(K)) v[u, h]      u over the sequence of t

R(t) turns channels i and i + K/2 by the angle whose cosine and sine stand in row t of the tables, t counted from the
beginning of the own sequence (half-split, as in `protnest.kernels.rotary`).

A program owns BM queries of one sequence and one head, turns them once, and walks over the sequence's keys BN at a time
with an online softmax (Dao et al. 2022). Halves of a head stay apart: q . k is the sum of two products of width K/2, so
that turning needs no channel of another lane. Operands have the inputs' dtype, as turned keys and exponentials are
rounded to it; fp32 ones multiply in full fp32, without tf32. Scores, sums and the output's accumulator are fp32.

Each query tile turns the keys anew: some 3 K operations a key beside 4 K BM in the products. That is cheaper than
writing turned keys out and reading them again as long as sequences have few tiles, as proteins do.

The grid follows from the number of sequences, the longest one and the heads, never from a length on the device: a
captured launch can be replayed with other `cu_seqlens`. Tiles beyond their sequence's end return at once.

Shapes: T tokens, B sequences, H heads, K head width, J = K/2, P rows of the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..hardware import is_interpreting
from .launch import Launch

WIDEST_HEAD = 128
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _load_tile(base, row_stride, rows_left, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ENDS: tl.constexpr):
    """R rows of WIDTH columns, zeros in columns up to C, and beyond `rows_left` where the sequence ENDS in the tile."""
    rows = tl.arange(0, R)
    columns = tl.arange(0, C)
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    if ENDS:
        return tl.load(pointers, mask=(rows[:, None] < rows_left) & (columns[None, :] < WIDTH), other=0.0)
    elif C != WIDTH:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _as_operand(x, operand: tl.constexpr, INTERPRET: tl.constexpr):
    """Rounded to the operands' dtype. The interpreter multiplies bit patterns of bf16, so there it is widened again."""
    rounded = x.to(operand)
    if INTERPRET:
        return rounded.to(tl.float32)
    else:
        return rounded


@triton.jit
def _load_turned(
    base,
    cos_ptr,
    sin_ptr,
    row_stride,
    place,
    length,
    HALF: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    ENDS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Both halves of R turned rows, from `place` in a sequence of `length` on."""
    operand: tl.constexpr = base.dtype.element_ty
    base += tl.cast(place, tl.int64) * row_stride
    left = length - place
    first = _load_tile(base, row_stride, left, HALF, R, C, ENDS).to(tl.float32)
    second = _load_tile(base + HALF, row_stride, left, HALF, R, C, ENDS).to(tl.float32)
    cos = _load_tile(cos_ptr + place * HALF, HALF, left, HALF, R, C, ENDS)
    sin = _load_tile(sin_ptr + place * HALF, HALF, left, HALF, R, C, ENDS)
    turned_first = _as_operand(first * cos - second * sin, operand, INTERPRET)
    turned_second = _as_operand(second * cos + first * sin, operand, INTERPRET)
    return turned_first, turned_second


@triton.jit
def _attend_to_tile(
    out,
    total,
    top,
    q_first,
    q_second,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    row_stride,
    place,
    length,
    scale,
    K: tl.constexpr,
    KH: tl.constexpr,
    KV: tl.constexpr,
    BN: tl.constexpr,
    ENDS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One step of the online softmax: sums and accumulator with the keys from `place` on."""
    operand: tl.constexpr = key_ptr.dtype.element_ty
    k_first, k_second = _load_turned(
        key_ptr, cos_ptr, sin_ptr, row_stride, place, length, K // 2, BN, KH, ENDS, INTERPRET
    )
    scores = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
    scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision="ieee") * scale
    if ENDS:
        scores = tl.where(place + tl.arange(0, BN)[None, :] < length, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    exps = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(exps, 1)
    values = _load_tile(value_ptr + tl.cast(place, tl.int64) * row_stride, row_stride, length - place, K, BN, KV, ENDS)
    values = _as_operand(values, operand, INTERPRET)
    out = tl.dot(_as_operand(exps, operand, INTERPRET), values, out * fade[:, None], input_precision="ieee")
    return out, total, new_top


@triton.jit
def _rotary_attention_fwd_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    cu_seqlens_ptr,
    out_ptr,
    tiles,
    heads,
    scale,
    K: tl.constexpr,
    KH: tl.constexpr,
    KV: tl.constexpr,
    INTERPRET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # Heads go fastest: neighbours share cache lines, of which a head of 20 channels fills but a part.
    pid = tl.program_id(0)
    head = pid % heads
    sequence = pid // heads // tiles
    begin = pid // heads % tiles * BM
    first = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - first
    if begin >= length:
        return
    row_stride = 3 * heads * K
    query_ptr = qkv_ptr + first.to(tl.int64) * row_stride + head * K
    key_ptr = query_ptr + heads * K
    value_ptr = key_ptr + heads * K
    q_first, q_second = _load_turned(
        query_ptr, cos_ptr, sin_ptr, row_stride, begin, length, K // 2, BM, KH, True, INTERPRET
    )
    out = tl.zeros((BM, KV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    whole = length // BN * BN
    for place in range(0, whole, BN):
        out, total, top = _attend_to_tile(
            *(out, total, top, q_first, q_second, key_ptr, value_ptr, cos_ptr, sin_ptr, row_stride, place, length),
            *(scale, K, KH, KV, BN, False, INTERPRET),
        )
    if whole < length:
        out, total, top = _attend_to_tile(
            *(out, total, top, q_first, q_second, key_ptr, value_ptr, cos_ptr, sin_ptr, row_stride, whole, length),
            *(scale, K, KH, KV, BN, True, INTERPRET),
        )
    rows = begin + tl.arange(0, BM)
    columns = tl.arange(0, KV)
    out_ptr += (first.to(tl.int64) + rows[:, None]) * (heads * K) + head * K + columns[None, :]
    there = (rows[:, None] < length) & (columns[None, :] < K)
    tl.store(out_ptr, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class _Tiles:
    BM: int
    BN: int
    num_warps: int
    num_stages: int


def _tiles(K: int, dtype: torch.dtype) -> _Tiles:
    """Fixed by head width and dtype: no autotuning, so that the first batch is as fast as the last.

    None spills or asks for more than the 99 KiB of a consumer card's block; the tests compile all of `launches`.
    """
    if dtype == torch.float32:
        # Products without tensor cores keep whole rows of their operands in registers.
        if K <= 64:
            return _Tiles(BM=32, BN=32, num_warps=4 if K <= 32 else 8, num_stages=1)
        return _Tiles(BM=16, BN=16, num_warps=8, num_stages=1)
    if K <= 64:
        # With 64 keys a step K = 64 spills on sm_120, and on sm_90 one block instead of two fits into the registers.
        return _Tiles(BM=128, BN=64 if K <= 32 else 32, num_warps=8, num_stages=2)
    # 64 queries spill on sm_80 and sm_120. Only the 15B model has heads as wide, where attention is a small part.
    return _Tiles(BM=32, BN=32, num_warps=4, num_stages=2)


def _constants(K: int, dtype: torch.dtype) -> dict[str, object]:
    tiles = _tiles(K, dtype)
    # A product's inner width is 16 at least, so halves of 8 to 12 channels are padded to 16.
    padded = {"KH": max(16, triton.next_power_of_2(K // 2)), "KV": max(16, triton.next_power_of_2(K))}
    return {"K": K, **padded, "INTERPRET": is_interpreting(), "BM": tiles.BM, "BN": tiles.BN}


def _check(qkv: torch.Tensor, cos_PJ: torch.Tensor, sin_PJ: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    if qkv.dim() != 3 or qkv.shape[1] % 3 or not qkv.is_contiguous() or qkv.dtype not in _TYPES:
        allowed = ", ".join(map(str, _TYPES))
        message = f"qkv is {qkv.dtype} {tuple(qkv.shape)}, expected contiguous (T, 3 H, K) in one of {allowed}"
        raise ValueError(message)
    K = qkv.shape[2]
    if K % 2 or not 0 < K <= WIDEST_HEAD:
        message = f"the head width is {K}; allowed: even, 2 to {WIDEST_HEAD}"
        raise ValueError(message)
    for name, table in (("cos", cos_PJ), ("sin", sin_PJ)):
        right = table.dtype == torch.float32 and table.is_contiguous()
        if not right or table.dim() != 2 or table.shape[1] != K // 2 or table.shape != cos_PJ.shape:
            message = f"{name} is {table.dtype} {tuple(table.shape)}, expected contiguous torch.float32 (P, {K // 2})"
            raise ValueError(message)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_contiguous():
        message = (
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected contiguous torch.int32 (B + 1,)"
        )
        raise ValueError(message)


def rotary_attention(
    qkv: torch.Tensor, cos_PJ: torch.Tensor, sin_PJ: torch.Tensor, cu_seqlens: torch.Tensor, longest: int
) -> torch.Tensor:
    """Turns queries and keys, and attends within each sequence, scaled by `1 / sqrt(K)`. Waits for nothing.

    Args:
        qkv: (T, 3 H, K), contiguous: H query heads, H key heads, H value heads; fp32, bf16 or fp16; K even, up to 128.
        cos_PJ, sin_PJ: fp32 (P, K / 2), contiguous; row p belongs to place p of every sequence. P >= `longest`.
        cu_seqlens: int32 (B + 1,), from 0 to T; sequences may be empty.
        longest: tokens of the longest sequence, or more. Of longer ones only the first rows would be written.

    Returns:
        (T, H, K) of the dtype of `qkv`.

    Raises:
        ValueError: a shape, a dtype or a stride is not as above, or the tables are shorter than `longest`.
    """
    _check(qkv, cos_PJ, sin_PJ, cu_seqlens)
    if longest > cos_PJ.shape[0]:
        message = f"the longest sequence has {longest} tokens, the tables of cosines and sines {cos_PJ.shape[0]} rows"
        raise ValueError(message)
    T, heads, K = qkv.shape[0], qkv.shape[1] // 3, qkv.shape[2]
    out = qkv.new_empty((T, heads, K))
    tiles = _tiles(K, qkv.dtype)
    tiles_each = triton.cdiv(longest, tiles.BM)
    programs = (cu_seqlens.shape[0] - 1) * tiles_each * heads
    if T and programs > 0:
        _rotary_attention_fwd_kernel[(programs,)](
            *(qkv, cos_PJ, sin_PJ, cu_seqlens, out, tiles_each, heads, math.log2(math.e) / math.sqrt(K)),
            **_constants(K, qkv.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out


# Head widths of the published and bundled models, and those around them; fp16 differs from bf16 in no size.
_LISTED = {torch.bfloat16: (16, 20, 24, 32, 64, 128), torch.float32: (16, 20, 24, 32, 64, 128), torch.float16: (20, 64)}


def launches() -> list[Launch]:
    """The ways in which the kernel is launched."""
    return [_launch(K, dtype) for dtype, widths in _LISTED.items() for K in widths]


def _launch(K: int, dtype: torch.dtype) -> Launch:
    tiles = _tiles(K, dtype)
    constexprs = _constants(K, dtype) | {"INTERPRET": False}
    pointer = f"*{_TYPES[dtype]}"
    signature = {"qkv_ptr": pointer, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "cu_seqlens_ptr": "*i32"}
    signature |= {"out_ptr": pointer, "tiles": "i32", "heads": "i32", "scale": "fp32"}
    return Launch(
        name=f"rotary_attention K={K} {_TYPES[dtype]}",
        kernel=_rotary_attention_fwd_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
