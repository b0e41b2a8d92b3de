"""Attention over packed sequences with the rotary turn of queries and keys fused in.

    q', k' = turn(q, place), turn(k, place)                                       place of the token in its sequence
    out[t, h] = sum_u softmax_u(q'[t, h] . k'[u, h] / sqrt(K)) v[u, h]                 u over the sequence of t

`qkv` holds the queries of all heads, then their keys, then their values, as one product leaves them: numbers,
perhaps with a bias still to be added, or the sums of an int8 product.

Implementations:
    reference  `apply_rotary` and softmax written out per sequence (fp64 gives the gold of the tests).
    torch      `apply_rotary`, then `varlen_attention`: differentiable, any device.
    cpu        csrc/rotary_attention.cpp: flash-style tiles in the first-level cache, softmax in fp32 lane by lane, for
               AVX-512, AVX2 and plain vectors, chosen when it runs; at level v4_bf16, on request, factors in pairs of
               bf16. fp32 or bf16; even head widths from 8 (multiples of 8 waste nothing). No gradients; the bits
               of a sequence's result are the same whatever its neighbours and the number of threads.
    triton     kernels/gpu/rotary_attention.py, for narrow heads and for GPUs on which torch has no varlen attention;
               no gradients.

Shapes: T tokens, B sequences, H heads, K head width, C = 3 H K, P places of the table, J = K / 2.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .cpu_kernels import array, cpu_level, module, product_arrays, why_not_cpu
from .hardware import why_not_triton
from .operator import Operator
from .product import Product, check_product
from .rotary import apply_rotary
from .varlen_attention import varlen_attention, varlen_attention_reference, why_not_varlen

IMPLS = ("auto", "reference", "torch", "cpu", "triton")
_NARROWEST_HEAD = 8
_NARROW_HEAD = 32
_logger = logging.getLogger(__name__)


class RotaryTable(NamedTuple):
    """Cosines and sines of every place, fp32 (P, J), as `rotary_table` gives them for the places 0 to P - 1."""

    cos_PJ: torch.Tensor
    sin_PJ: torch.Tensor


def rotary_attention_reference(
    qkv_TC: torch.Tensor, table: RotaryTable, cu_seqlens: torch.Tensor, heads: int
) -> torch.Tensor:
    """`rotary_attention` written out, in the dtype of qkv; materialises (H, L, L) scores."""
    lengths_B = cu_seqlens.diff().tolist()
    q_THK, k_THK, v_THK = _turned(qkv_TC, table, cu_seqlens, heads)
    return varlen_attention_reference(q_THK, k_THK, v_THK, cu_seqlens, lengths_B).flatten(1)


def _turned(
    qkv_TC: torch.Tensor, table: RotaryTable, cu_seqlens: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T, C = qkv_TC.shape
    ends = cu_seqlens.long()
    places_T = torch.arange(T, device=qkv_TC.device) - ends[:-1].repeat_interleave(ends.diff(), output_size=T)
    cos, sin = (part_PJ[places_T, None].to(qkv_TC.dtype) for part_PJ in table)
    qkv_THK = qkv_TC.view(T, 3 * heads, C // (3 * heads))
    # Queries and keys turn in one go; values do not turn. Split, not sliced: a slice's gradient fills a whole tensor.
    both_THK, v_THK = torch.split(qkv_THK, [2 * heads, heads], dim=1)
    q_THK, k_THK = torch.split(apply_rotary(both_THK, cos, sin), heads, dim=1)
    return q_THK, k_THK, v_THK


def _rotary_attention_in_cpp(
    qkv: Sequence[torch.Tensor],
    cos_PJ: torch.Tensor,
    sin_PJ: torch.Tensor,
    cu_seqlens: torch.Tensor,
    heads: int,
    longest: int,
    level: str,
    pairs: bool,
) -> torch.Tensor:
    product = Product.of(list(qkv))
    T, C = product.values_NO.shape
    if level == "":
        from .gpu.rotary_attention import rotary_attention as launch

        qkv_THK = product.values_NO.view(T, 3 * heads, C // (3 * heads))
        return launch(qkv_THK, cos_PJ, sin_PJ, cu_seqlens, longest).flatten(1)
    out_TD = torch.empty((T, C // 3), dtype=product.dtype)
    module().rotary_attention(
        product_arrays(product),
        array(cos_PJ),
        array(sin_PJ),
        array(cu_seqlens),
        heads,
        level,
        pairs,
        torch.get_num_threads(),
        array(out_TD),
    )
    return out_TD


_rotary_attention = Operator("protnest::rotary_attention", _rotary_attention_in_cpp)


@_rotary_attention.register_fake
def _(qkv: Sequence[torch.Tensor], *_: object) -> torch.Tensor:
    product = Product.of(list(qkv))
    T, C = product.values_NO.shape
    return product.values_NO.new_empty((T, C // 3), dtype=product.dtype)


def why_not_cpu_attention(qkv: Product, head_width: int) -> str | None:
    """Why the C++ kernel cannot run on a product, in one line; None where it can."""
    if head_width < _NARROWEST_HEAD:
        return f"the head width is {head_width}, not at least {_NARROWEST_HEAD}"
    return why_not_cpu(qkv)


def _why_not_triton(qkv: Product) -> str | None:
    if len(qkv.tensors()) > 1:
        return "qkv is not plain numbers"
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {qkv.dtype}, not fp32, bf16 or fp16"
    return "gradients are asked for" if qkv.requires_grad() else why_not_triton(qkv.values_NO.device)


def _choose(qkv: Product, head_width: int, impl: str) -> str:
    if impl not in IMPLS:
        message = f"impl is {impl!r}; allowed: {', '.join(IMPLS)}"
        raise ValueError(message)
    if impl == "auto":
        if qkv.values_NO.device.type == "cuda":
            # torch's kernel is tuned for wide heads. It pads narrow ones to 32 and turns them in passes of their own,
            # which ours spares; neither was measured against the other yet.
            has_varlen = why_not_varlen(qkv.values_NO) is None and head_width % 8 == 0 and head_width > _NARROW_HEAD
            reason = "torch has varlen attention" if has_varlen else _why_not_triton(qkv)
            choice = "triton" if reason is None else "torch"
        else:
            reason = why_not_cpu_attention(qkv, head_width)
            choice = "cpu" if reason is None else "torch"
        _log_choice(choice, reason)
        return choice
    reason = None
    if impl == "cpu":
        reason = why_not_cpu_attention(qkv, head_width)
    elif impl == "triton":
        reason = _why_not_triton(qkv)
    if reason is not None:
        message = f"impl={impl!r} cannot run here: {reason}"
        raise RuntimeError(message)
    return impl


@functools.cache
def _log_choice(choice: str, reason: str | None) -> None:
    _logger.info("rotary_attention: auto runs %s%s", choice, f": {reason}" if reason else "")


def check_rotary_attention(
    qkv: Product, table: RotaryTable, cu_seqlens: torch.Tensor, lengths_B: Sequence[int], heads: int
) -> None:
    shape = qkv.values_NO.shape
    if len(shape) != 2 or heads < 1 or shape[1] % (6 * heads):
        message = f"qkv has shape {tuple(shape)}, expected (T, 3 x {heads} heads x an even head width)"
        raise ValueError(message)
    T, C = shape
    check_product(qkv, C)
    if sum(lengths_B) != T or cu_seqlens.shape != (len(lengths_B) + 1,):
        message = (
            f"{len(lengths_B)} lengths adding up to {sum(lengths_B)} and cu_seqlens of shape {tuple(cu_seqlens.shape)} "
            f"do not describe {T} tokens"
        )
        raise ValueError(message)
    J, longest = C // (6 * heads), max(lengths_B, default=0)
    if table.cos_PJ.shape != table.sin_PJ.shape or table.cos_PJ.shape[1:] != (J,) or len(table.cos_PJ) < longest:
        shapes = f"{tuple(table.cos_PJ.shape)} and {tuple(table.sin_PJ.shape)}"
        message = f"the rotary tables have shapes {shapes}, expected ({longest} or more, {J})"
        raise ValueError(message)


def rotary_attention(
    qkv: torch.Tensor | Product,
    table: RotaryTable,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    heads: int,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention over packed sequences whose queries and keys are turned by their places.

    Args:
        qkv: (T, 3 H K), queries of all heads, then keys, then values; any floating dtype, or a product.
        table: of at least as many places as the longest sequence has tokens, on the device of qkv.
        cu_seqlens: int32 (B + 1,), from 0 to T, on the device of qkv.
        lengths_B: the B differences of `cu_seqlens`, on the host.
        heads: H.
        impl: "auto", "reference", "torch", "cpu" or "triton"; a named one runs or raises.

    Returns:
        (T, H K) of the dtype of qkv's numbers. "cpu" and "triton" have no gradients: "auto" takes them where none are
        asked for.

    Raises:
        ValueError: shapes disagree, the lengths do not add up to T, or `impl` is unknown.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    if isinstance(qkv, torch.Tensor):
        qkv = Product(qkv)
    check_rotary_attention(qkv, table, cu_seqlens, lengths_B, heads)
    chosen = _choose(qkv, qkv.values_NO.shape[1] // (3 * heads), impl)
    if chosen == "reference":
        return rotary_attention_reference(qkv.numbers(), table, cu_seqlens, heads)
    if chosen == "torch":
        return varlen_attention(*_turned(qkv.numbers(), table, cu_seqlens, heads), cu_seqlens, lengths_B).flatten(1)
    level = cpu_level() if chosen == "cpu" else ""
    attended_TD: torch.Tensor = _rotary_attention(
        qkv.tensors(), *table, cu_seqlens, heads, max(lengths_B, default=0), level, level == "v4_bf16"
    )
    return attended_TD
