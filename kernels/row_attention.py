"""Attention of some rows of packed sequences: what the last layer needs where the head reads a few rows alone.

    out[r, h] = sum_u softmax_u(q'[r, h] . k'[u, h] / sqrt(K)) v[u, h]                 u over the sequence of row r

q' and k' are turned by their places as in `rotary_attention`; the result is that operation's, at the rows chosen.
Keys and values of all tokens take part, queries of the chosen rows: work and memory grow with T + R L, not with T L.

Implementations:
    reference  `rotary_attention_reference`, then the rows (fp64 gives the gold of the tests).
    cpu        csrc/rotary_attention.cpp, with a list of the queries that are wanted: see `rotary_attention` for what it
               takes. No gradients.
    torch      keys turned by `apply_rotary`, then torch's scaled_dot_product_attention: once where all sequences are as
               long and have as many rows, as masked copies of one protein do, else once a sequence. Differentiable,
               any device. bf16 on a CPU without bf16 units is widened to fp32.

Beyond about half of all rows `rotary_attention` and taking its rows is faster.

Shapes: T tokens, R rows, B sequences, H heads, K head width, C = 3 H K.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .cpu_kernels import array, cpu_level, module, product_arrays
from .linear import needs_widening
from .operator import Operator
from .product import Product
from .rotary import apply_rotary
from .rotary_attention import (
    RotaryTable,
    check_rotary_attention,
    rotary_attention_reference,
    why_not_cpu_attention,
)

IMPLS = ("auto", "reference", "torch", "cpu")


def row_attention_reference(
    qkv_TC: torch.Tensor, table: RotaryTable, cu_seqlens: torch.Tensor, heads: int, index_R: torch.Tensor
) -> torch.Tensor:
    """`row_attention` written out, in the dtype of qkv."""
    return rotary_attention_reference(qkv_TC, table, cu_seqlens, heads)[index_R]


def _attend(
    qkv_TC: torch.Tensor,
    table: RotaryTable,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    heads: int,
    index_R: torch.Tensor,
    counts_B: Sequence[int],
) -> torch.Tensor:
    if needs_widening(qkv_TC):
        wide_RD = _attend(qkv_TC.float(), table, cu_seqlens, lengths_B, heads, index_R, counts_B)
        return wide_RD.to(qkv_TC.dtype)
    T, C = qkv_TC.shape
    D, K = C // 3, C // (3 * heads)
    begins_T = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long(), output_size=T)
    places_T = torch.arange(T, device=qkv_TC.device) - begins_T
    places_R = places_T[index_R]
    cos_P1J, sin_P1J = (part_PJ[:, None].to(qkv_TC.dtype) for part_PJ in table)
    q_RHK = apply_rotary(qkv_TC[index_R, :D].view(-1, heads, K), cos_P1J[places_R], sin_P1J[places_R])
    k_THK = apply_rotary(qkv_TC[:, D : 2 * D].view(T, heads, K), cos_P1J[places_T], sin_P1J[places_T])
    v_THK = qkv_TC[:, 2 * D :].view(T, heads, K)
    if len(set(lengths_B)) == 1 and len(set(counts_B)) == 1:
        B = len(lengths_B)
        q, k, v = (x.view(B, -1, heads, K).transpose(1, 2) for x in (q_RHK, k_THK, v_THK))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
    tokens, rows = ([0, *itertools.accumulate(numbers)] for numbers in (lengths_B, counts_B))
    out = [q_RHK[:0].flatten(1)]
    for (t, t_end), (r, r_end) in zip(itertools.pairwise(tokens), itertools.pairwise(rows), strict=True):
        if r_end > r:
            q, k, v = (x.transpose(0, 1)[None] for x in (q_RHK[r:r_end], k_THK[t:t_end], v_THK[t:t_end]))
            out.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))
    return torch.cat(out)


def _row_attention_in_cpp(
    qkv: Sequence[torch.Tensor],
    cos_PJ: torch.Tensor,
    sin_PJ: torch.Tensor,
    cu_seqlens: torch.Tensor,
    heads: int,
    index_R: torch.Tensor,
    counts_B: Sequence[int],
    level: str,
    pairs: bool,
) -> torch.Tensor:
    product = Product.of(list(qkv))
    out_RD = torch.empty((index_R.shape[0], product.values_NO.shape[1] // 3), dtype=product.dtype)
    module().rotary_attention(
        product_arrays(product),
        array(cos_PJ),
        array(sin_PJ),
        array(cu_seqlens),
        heads,
        level,
        pairs,
        torch.get_num_threads(),
        array(out_RD),
        array(index_R),
        np.cumsum([0, *counts_B], dtype=np.int64),
    )
    return out_RD


_row_attention = Operator("protnest::row_attention", _row_attention_in_cpp)


@_row_attention.register_fake
def _(
    qkv: Sequence[torch.Tensor],
    cos_PJ: torch.Tensor,
    sin_PJ: torch.Tensor,
    cu_seqlens: torch.Tensor,
    heads: int,
    index_R: torch.Tensor,
    *_: object,
) -> torch.Tensor:
    product = Product.of(list(qkv))
    return product.values_NO.new_empty((index_R.shape[0], product.values_NO.shape[1] // 3), dtype=product.dtype)


def _choose(qkv: Product, head_width: int, impl: str) -> str:
    if impl not in IMPLS:
        message = f"impl is {impl!r}; allowed: {', '.join(IMPLS)}"
        raise ValueError(message)
    if impl not in ("auto", "cpu"):
        return impl
    reason = why_not_cpu_attention(qkv, head_width)
    if impl == "cpu" and reason is not None:
        message = f"impl={impl!r} cannot run here: {reason}"
        raise RuntimeError(message)
    return "cpu" if reason is None else "torch"


def row_attention(
    qkv: torch.Tensor | Product,
    table: RotaryTable,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
    heads: int,
    index_R: torch.Tensor,
    counts_B: Sequence[int],
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention over packed sequences at some rows, their queries and all keys turned by their places.

    Args:
        qkv, table, cu_seqlens, lengths_B, heads: as `rotary_attention` takes them.
        index_R: int64 (R,), tokens of the batch; those of a sequence stand together, in the sequences' order.
        counts_B: how many of them belong to each sequence, on the host.
        impl: "auto" ("cpu" where it can run, else "torch"), "reference", "torch" or "cpu"; a named one runs or raises.

    Returns:
        (R, H K) of the dtype of qkv's numbers.

    Raises:
        ValueError: shapes disagree, the lengths do not add up to T or the counts to R, a sequence without tokens is
            said to have rows, or `impl` is unknown; "cpu" also where a row lies in another sequence.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    if isinstance(qkv, torch.Tensor):
        qkv = Product(qkv)
    check_rotary_attention(qkv, table, cu_seqlens, lengths_B, heads)
    impossible = any(count < 0 or (count and not length) for count, length in zip(counts_B, lengths_B, strict=False))
    if index_R.dim() != 1 or index_R.dtype != torch.int64 or len(counts_B) != len(lengths_B) or impossible:
        message = (
            f"{index_R.dtype} rows {tuple(index_R.shape)} and {len(counts_B)} counts for {len(lengths_B)} sequences"
        )
        raise ValueError(message)
    if sum(counts_B) != index_R.shape[0]:
        message = f"counts add up to {sum(counts_B)}, but there are {index_R.shape[0]} rows"
        raise ValueError(message)
    chosen = _choose(qkv, qkv.values_NO.shape[1] // (3 * heads), impl)
    if chosen == "reference":
        return row_attention_reference(qkv.numbers(), table, cu_seqlens, heads, index_R)
    if chosen == "torch":
        return _attend(qkv.numbers(), table, cu_seqlens, lengths_B, heads, index_R, counts_B)
    level = cpu_level()
    attended_RD: torch.Tensor = _row_attention(
        qkv.tensors(), *table, cu_seqlens, heads, index_R, list(counts_B), level, level == "v4_bf16"
    )
    return attended_RD
