"""Attention over packed sequences with the rotary turn of queries and keys fused in.

    q', k' = turn(q, place), turn(k, place)                                       place of the token in its sequence
    out[t, h] = sum_u softmax_u(q'[t, h] . k'[u, h] / sqrt(K)) v[u, h]                 u over the sequence of t

`qkv` holds the queries of all heads, then their keys, then their values, as one product leaves them. With `dequantise`
it holds the results of an int8 product, and the numbers meant are `scale_T qkv + (shift_T sums_C + bias_C)`.

Implementations:
    reference  numbers, `apply_rotary` and softmax written out per sequence (fp64 gives the gold of the tests).
    torch      `apply_rotary`, then `varlen_attention`: differentiable, any device.
    cpu        csrc/rotary_attention.cpp: flash-style tiles in the first-level cache, softmax in fp32 lane by lane, for
               AVX-512, AVX2 and plain vectors, chosen when it runs; bf16 factors in pairs where the processor has units
               for them. fp32 or bf16, int8 products from fp32; head widths even, from 8 (a multiple of 8 wastes
               nothing). No gradients. A sequence's result is the same bits whatever its neighbours and the number of
               threads.
    triton     kernels/gpu/rotary_attention.py, for GPUs on which torch has no varlen attention; no gradients.

Shapes: T tokens, B sequences, H heads, K head width, C = 3 H K, P places of the table, J = K / 2.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .extension import load, missing_reason
from .hardware import why_not_triton
from .rotary import apply_rotary
from .varlen_attention import varlen_attention, varlen_attention_reference, why_not_varlen

IMPLS = ("auto", "reference", "torch", "cpu", "triton")
LEVELS = ("portable", "v3", "v4", "v4_bf16")
"""Generations of vector instructions that the C++ kernel is compiled for, slowest first."""

_LEVEL_SWITCH = "PROTNEST_CPU_LEVEL"
_NARROWEST_HEAD = 8
_logger = logging.getLogger(__name__)


class Dequantise(NamedTuple):
    """What turns int8 products into numbers, fp32: `scale_T value + (shift_T sums_C + bias_C)`."""

    scale_T: torch.Tensor
    shift_T: torch.Tensor
    sums_C: torch.Tensor
    bias_C: torch.Tensor

    def numbers(self, values_TC: torch.Tensor) -> torch.Tensor:
        """The numbers that a product's results stand for, (T, C)."""
        scale_T1, shift_T1 = self.scale_T[:, None], self.shift_T[:, None]
        return values_TC * scale_T1 + (shift_T1 * self.sums_C + self.bias_C)


class RotaryTable(NamedTuple):
    """Cosines and sines of every place, fp32 (P, J), as `rotary_table` gives them for the places 0 to P - 1."""

    cos_PJ: torch.Tensor
    sin_PJ: torch.Tensor


@functools.cache
def cpu_level() -> str:
    """The generation of vector instructions that the C++ kernel runs with; "" without the extension.

    The environment variable PROTNEST_CPU_LEVEL, read once, asks for another one of `LEVELS`.

    Raises:
        ValueError: it names no level, or one that this processor lacks.
    """
    module = load()
    if module is None:
        return ""
    best: str = module.best_level()
    wanted = os.environ.get(_LEVEL_SWITCH, "") or best
    if wanted not in LEVELS or LEVELS.index(wanted) > LEVELS.index(best):
        allowed = ", ".join(LEVELS[: LEVELS.index(best) + 1])
        message = f"{_LEVEL_SWITCH}={wanted}: this processor runs {allowed}"
        raise ValueError(message)
    return wanted


def rotary_attention_reference(
    qkv_TC: torch.Tensor,
    table: RotaryTable,
    cu_seqlens: torch.Tensor,
    heads: int,
    dequantise: Dequantise | None = None,
) -> torch.Tensor:
    """`rotary_attention` written out, in the dtype of qkv; materialises (H, L, L) scores."""
    lengths_B = cu_seqlens.diff().tolist()
    q_THK, k_THK, v_THK = _turned(qkv_TC, table, cu_seqlens, heads, dequantise)
    return varlen_attention_reference(q_THK, k_THK, v_THK, cu_seqlens, lengths_B).flatten(1)


def _turned(
    qkv_TC: torch.Tensor,
    table: RotaryTable,
    cu_seqlens: torch.Tensor,
    heads: int,
    dequantise: Dequantise | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if dequantise is not None:
        qkv_TC = dequantise.numbers(qkv_TC)
    T, C = qkv_TC.shape
    ends = cu_seqlens.long()
    places_T = torch.arange(T, device=qkv_TC.device) - ends[:-1].repeat_interleave(ends.diff(), output_size=T)
    cos, sin = (part_PJ[places_T, None].to(qkv_TC.dtype) for part_PJ in table)
    qkv_THK = qkv_TC.view(T, 3 * heads, C // (3 * heads))
    # Queries and keys turn in one go; values do not turn.
    turned_THK = apply_rotary(qkv_THK[:, : 2 * heads], cos, sin)
    return turned_THK[:, :heads], turned_THK[:, heads:], qkv_THK[:, 2 * heads :]


@torch.library.custom_op("protnest::rotary_attention", mutates_args=())
def _rotary_attention(
    qkv_TC: torch.Tensor,
    cos_PJ: torch.Tensor,
    sin_PJ: torch.Tensor,
    cu_seqlens: torch.Tensor,
    heads: int,
    longest: int,
    dequantise: Sequence[torch.Tensor],
    level: str,
    pairs: bool,
) -> torch.Tensor:
    T, C = qkv_TC.shape
    if qkv_TC.device.type == "cuda" or level == "":
        from .gpu.rotary_attention import rotary_attention as launch

        return launch(qkv_TC.view(T, 3 * heads, C // (3 * heads)), cos_PJ, sin_PJ, cu_seqlens, longest).flatten(1)
    out_TD = qkv_TC.new_empty((T, C // 3))
    module = load()
    assert module is not None  # `_choose` asked
    parts = tuple(part.contiguous().numpy() for part in dequantise)
    # NumPy has no bf16: its bits travel as integers.
    arrays = [(x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy() for x in (qkv_TC, out_TD)]
    threads = torch.get_num_threads()
    module.rotary_attention(
        arrays[0], cos_PJ.numpy(), sin_PJ.numpy(), cu_seqlens.numpy(), heads, parts, level, pairs, threads, arrays[1]
    )
    return out_TD


@_rotary_attention.register_fake
def _(qkv_TC: torch.Tensor, *_: object) -> torch.Tensor:
    return qkv_TC.new_empty((qkv_TC.shape[0], qkv_TC.shape[1] // 3))


def _why_not_cpu(qkv_TC: torch.Tensor, head_width: int, dequantise: Dequantise | None) -> str | None:
    if load() is None:
        return missing_reason()
    if qkv_TC.device.type != "cpu":
        return f"tensors are on {qkv_TC.device.type}"
    if qkv_TC.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype is {qkv_TC.dtype}, not fp32 or bf16"
    if head_width % 2 or head_width < _NARROWEST_HEAD:
        return f"the head width is {head_width}, not even and at least {_NARROWEST_HEAD}"
    if dequantise is not None and qkv_TC.dtype != torch.float32:
        return f"int8 products are dequantised from fp32, not {qkv_TC.dtype}"
    return _why_not_forward(qkv_TC, *(dequantise or ()))


def _why_not_triton(qkv_TC: torch.Tensor, dequantise: Dequantise | None) -> str | None:
    if dequantise is not None:
        return "int8 products are dequantised on a CPU only"
    if qkv_TC.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {qkv_TC.dtype}, not fp32, bf16 or fp16"
    return _why_not_forward(qkv_TC) or why_not_triton(qkv_TC.device)


def _why_not_forward(*tensors: torch.Tensor) -> str | None:
    asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return "gradients are asked for" if asked else None


def _choose(qkv_TC: torch.Tensor, head_width: int, dequantise: Dequantise | None, impl: str) -> str:
    if impl not in IMPLS:
        message = f"impl is {impl!r}; allowed: {', '.join(IMPLS)}"
        raise ValueError(message)
    if impl == "auto":
        if qkv_TC.device.type == "cuda":
            # torch's kernel is tuned; ours is for what it lacks.
            has_varlen = why_not_varlen(qkv_TC) is None and head_width % 8 == 0
            reason = "torch has varlen attention" if has_varlen else _why_not_triton(qkv_TC, dequantise)
            choice = "triton" if reason is None else "torch"
        else:
            reason = _why_not_cpu(qkv_TC, head_width, dequantise)
            choice = "cpu" if reason is None else "torch"
        _log_choice(choice, reason)
        return choice
    reasons = {
        "cpu": lambda: _why_not_cpu(qkv_TC, head_width, dequantise),
        "triton": lambda: _why_not_triton(qkv_TC, dequantise),
    }
    if impl in reasons and (why_not := reasons[impl]()) is not None:
        message = f"impl={impl!r} cannot run here: {why_not}"
        raise RuntimeError(message)
    return impl


@functools.cache
def _log_choice(choice: str, reason: str | None) -> None:
    _logger.info("rotary_attention: auto runs %s%s", choice, f": {reason}" if reason else "")


def _check(
    qkv_TC: torch.Tensor,
    table: RotaryTable,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    heads: int,
    dequantise: Dequantise | None,
) -> None:
    if qkv_TC.dim() != 2 or heads < 1 or qkv_TC.shape[1] % (6 * heads):
        message = f"qkv has shape {tuple(qkv_TC.shape)}, expected (T, 3 x {heads} heads x an even head width)"
        raise ValueError(message)
    T, C = qkv_TC.shape
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
    if dequantise is not None:
        shapes_of = [tuple(part.shape) for part in dequantise]
        if shapes_of != [(T,), (T,), (C,), (C,)] or any(part.dtype != qkv_TC.dtype for part in dequantise):
            message = f"dequantise has shapes {shapes_of}, expected ({T},), ({T},), ({C},), ({C},) of {qkv_TC.dtype}"
            raise ValueError(message)


def rotary_attention(
    qkv_TC: torch.Tensor,
    table: RotaryTable,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    heads: int,
    *,
    dequantise: Dequantise | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention over packed sequences whose queries and keys are turned by their places.

    Args:
        qkv_TC: (T, 3 H K), queries of all heads, then keys, then values; any floating dtype.
        table: of at least as many places as the longest sequence has tokens, on the device of qkv.
        cu_seqlens: int32 (B + 1,), from 0 to T, on the device of qkv.
        lengths_B: the B differences of `cu_seqlens`, on the host.
        heads: H.
        dequantise: where `qkv_TC` holds an int8 product's results in fp32.
        impl: "auto", "reference", "torch", "cpu" or "triton"; a named one runs or raises.

    Returns:
        (T, H K) of the dtype of qkv. "cpu" and "triton" have no gradients: "auto" takes them where none are asked for.

    Raises:
        ValueError: shapes disagree, the lengths do not add up to T, or `impl` is unknown.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    _check(qkv_TC, table, cu_seqlens, lengths_B, heads, dequantise)
    head_width = qkv_TC.shape[1] // (3 * heads)
    chosen = _choose(qkv_TC, head_width, dequantise, impl)
    if chosen == "reference":
        return rotary_attention_reference(qkv_TC, table, cu_seqlens, heads, dequantise)
    if chosen == "torch":
        parts = _turned(qkv_TC, table, cu_seqlens, heads, dequantise)
        return varlen_attention(*parts, cu_seqlens, lengths_B).flatten(1)
    level = cpu_level() if chosen == "cpu" else ""
    longest = max(itertools.chain(lengths_B, (0,)))
    attended_TD: torch.Tensor = _rotary_attention(
        qkv_TC.contiguous(), *table, cu_seqlens, heads, longest, dequantise or (), level, level == "v4_bf16"
    )
    return attended_TD
