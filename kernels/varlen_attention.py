"""Attention over packed sequences: every token attends to the tokens of its own sequence, and to no other.

    out[t, h] = sum_u softmax_u(scale * q[t, h] . k[u, h]) v[u, h]        u over the sequence of t

Causal attention, which decoders use, leaves out what comes after t: u over the sequence of t up to t itself.

Implementations:
    reference  softmax written out per sequence, in the inputs' dtype (fp64 gives the gold of the tests).
    sdpa       torch's scaled_dot_product_attention per sequence: no padding, memory linear in length. Best on CPUs
               today, and the way for fp32 on a GPU. Its overhead is some 20 us per sequence. bf16 on a CPU without bf16
               units is widened to fp32 first (see `linear`).
    varlen     torch.nn.attention.varlen, one launch for the whole batch. CUDA, fp16, bf16, compute capability >= 8.0.
               Causal is its window (-1, 0): all to the left and none to the right. It has no other switch since 2.11.

Shapes: T tokens, B sequences, H heads, K head width.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .linear import needs_widening

_logger = logging.getLogger(__name__)
_explained: set[str] = set()

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], bool], torch.Tensor]


def varlen_attention_reference(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THK: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    causal: bool = False,
) -> torch.Tensor:
    """`varlen_attention` written out, one sequence at a time; materialises (H, L, L) scores."""
    outputs = [v_THK[:0]]
    for q_LHK, k_LHK, v_LHK in zip(*(torch.split(x, list(lengths_B)) for x in (q_THK, k_THK, v_THK)), strict=True):
        scores_HLL = torch.einsum("qhk,lhk->hql", q_LHK, k_LHK) / math.sqrt(q_LHK.shape[-1])
        if causal:
            later_LL = torch.ones(scores_HLL.shape[1:], dtype=torch.bool, device=q_THK.device).triu(1)
            scores_HLL = scores_HLL.masked_fill(later_LL, -math.inf)
        outputs.append(torch.einsum("hql,lhk->qhk", scores_HLL.softmax(dim=-1), v_LHK))
    return torch.cat(outputs)


def _sdpa(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THK: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    causal: bool,
) -> torch.Tensor:
    if needs_widening(q_THK):
        return _sdpa(q_THK.float(), k_THK.float(), v_THK.float(), cu_seqlens, lengths_B, causal).to(q_THK.dtype)
    by_sequence = zip(
        *(torch.split(x.transpose(0, 1)[None], list(lengths_B), dim=2) for x in (q_THK, k_THK, v_THK)), strict=True
    )
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0].transpose(0, 1) for q, k, v in by_sequence]
    return torch.cat([*outputs, v_THK[:0]]) if len(outputs) != 1 else outputs[0]


def _varlen(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THK: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    causal: bool,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(lengths_B, default=0)
    if causal:
        out = varlen_attn(q_THK, k_THK, v_THK, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))
    else:
        out = varlen_attn(q_THK, k_THK, v_THK, cu_seqlens, cu_seqlens, longest, longest)
    assert isinstance(out, torch.Tensor)  # a tuple only where more than the output is asked for
    return out


_IMPLEMENTATIONS: dict[str, Attention] = {"reference": varlen_attention_reference, "sdpa": _sdpa, "varlen": _varlen}


def why_not_varlen(q_THK: torch.Tensor) -> str | None:
    """Why torch's varlen attention cannot run on tensors like this one, in one line; None where it can."""
    if q_THK.device.type != "cuda":
        return f"tensors are on {q_THK.device.type}"
    if q_THK.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {q_THK.dtype}, not fp16 or bf16"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} lacks torch.nn.attention.varlen"
    if torch.cuda.get_device_capability(q_THK.device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


def _choose(q_THK: torch.Tensor, impl: str) -> str:
    if impl == "auto":
        reason = why_not_varlen(q_THK)
        choice = "varlen" if reason is None else "sdpa"
        if choice not in _explained:
            _explained.add(choice)
            _logger.info("varlen_attention runs %s%s", choice, f": {reason}" if reason else "")
        return choice
    if impl not in _IMPLEMENTATIONS:
        message = f"impl is {impl!r}; allowed: auto, {', '.join(_IMPLEMENTATIONS)}"
        raise ValueError(message)
    if impl == "varlen" and (reason := why_not_varlen(q_THK)) is not None:
        message = f"impl='varlen' cannot run here: {reason}"
        raise RuntimeError(message)
    return impl


def varlen_attention(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THK: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    *,
    causal: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention over packed sequences, scaled by `1 / sqrt(K)`; differentiable.

    Args:
        q_THK, k_THK, v_THK: (T, H, K), one floating dtype, any strides with a contiguous last axis.
        cu_seqlens: int32 (B + 1,), from 0 to T, on the device of `q_THK`.
        lengths_B: the B differences of `cu_seqlens`, on the host.
        causal: whether a token attends to itself and those before it only.
        impl: "auto", "reference", "sdpa" or "varlen"; a named one runs or raises.

    Returns:
        (T, H, K) of the inputs' dtype.

    Raises:
        ValueError: shapes disagree, the lengths do not add up to T, or `impl` is unknown.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    if not q_THK.shape == k_THK.shape == v_THK.shape or q_THK.dim() != 3:
        message = (
            f"q, k and v must share one shape (T, H, K), got {tuple(q_THK.shape)}, {tuple(k_THK.shape)}, "
            f"{tuple(v_THK.shape)}"
        )
        raise ValueError(message)
    if sum(lengths_B) != q_THK.shape[0] or cu_seqlens.shape != (len(lengths_B) + 1,):
        message = (
            f"{len(lengths_B)} lengths adding up to {sum(lengths_B)} and cu_seqlens of shape {tuple(cu_seqlens.shape)} "
            f"do not describe {q_THK.shape[0]} tokens"
        )
        raise ValueError(message)
    return _IMPLEMENTATIONS[_choose(q_THK, impl)](q_THK, k_THK, v_THK, cu_seqlens, lengths_B, causal)
