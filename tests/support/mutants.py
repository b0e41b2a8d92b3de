"""Broken twins: each is the product with one mistake in it, and must fail the very test that the product passes.

Encoder mutants are context managers that break one `Encoder` or the module around it for as long as they are open.
Kernel mutants are functions of the same signature as what they break.
Shapes: B sequences, T tokens, L tokens of one sequence, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from protnest.engine import Encoder
from protnest.engine import encoder as encoder_module
from protnest.engine.alphabet import MASK_ID
from protnest.engine.packing import PackedBatch
from protnest.kernels.product import Product
from protnest.kernels.rotary import apply_rotary, rotary_table
from protnest.kernels.rotary_attention import RotaryTable
from protnest.kernels.varlen_attention import varlen_attention_reference
from torch import nn

Mutant = Callable[[Encoder], AbstractContextManager[object]]
Embed = Callable[[PackedBatch], torch.Tensor]

_TRAINED_MASK_RATIO = 0.12


def _one_sequence(batch: PackedBatch) -> PackedBatch:
    tokens = batch.tokens_T.numel()
    return dataclasses.replace(batch, cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32), lengths_B=(tokens,))


def _in_module(name: str, broken: object) -> Mutant:
    """Replaces what the encoder's module calls `name`."""
    return lambda encoder: mock.patch.object(encoder_module, name, broken)


def _embedding(break_it: Callable[[Encoder, Embed], Embed]) -> Mutant:
    """Replaces the encoder's embedding of tokens by one made of the true one."""
    return lambda encoder: mock.patch.object(encoder, "_embed", break_it(encoder, encoder._embed))


def _masks_T(batch: PackedBatch) -> torch.Tensor:
    """How many masks the sequence of each token holds."""
    counts = [int((tokens == MASK_ID).sum()) for tokens in torch.split(batch.tokens_T, list(batch.lengths_B))]
    return torch.tensor(counts).repeat_interleave(torch.tensor(batch.lengths_B))


def _tokens_T(batch: PackedBatch) -> torch.Tensor:
    """How long the sequence of each token is."""
    return torch.tensor(batch.lengths_B).repeat_interleave(torch.tensor(batch.lengths_B))


def _unscaled(encoder: Encoder, embed: Embed) -> Embed:
    return lambda batch: encoder.embed_tokens(batch.tokens_T).masked_fill((batch.tokens_T == MASK_ID)[:, None], 0.0)


def _scaled_by_batch(encoder: Encoder, embed: Embed) -> Embed:
    return lambda batch: embed(_one_sequence(batch))


def _scaled_without_specials(encoder: Encoder, embed: Embed) -> Embed:
    def broken(batch: PackedBatch) -> torch.Tensor:
        masks_T, tokens_T = _masks_T(batch), _tokens_T(batch)
        # All residues may be masked: then the mistaken ratio is 1, kept finite here to be an honest rival.
        mistaken_T = 1 - (masks_T / (tokens_T - 2)).clamp(max=0.999)
        return embed(batch) * ((1 - masks_T / tokens_T) / mistaken_T)[:, None]

    return broken


def _scaled_without_bos(encoder: Encoder, embed: Embed) -> Embed:
    def broken(batch: PackedBatch) -> torch.Tensor:
        masks_T, tokens_T = _masks_T(batch), _tokens_T(batch)
        return embed(batch) * ((1 - masks_T / tokens_T) / (1 - masks_T / (tokens_T - 1)))[:, None]

    return broken


def _scaled_only_where_masked(encoder: Encoder, embed: Embed) -> Embed:
    def broken(batch: PackedBatch) -> torch.Tensor:
        return embed(batch) * torch.where(_masks_T(batch) == 0, 1 / (1 - _TRAINED_MASK_RATIO), 1.0)[:, None]

    return broken


def _masked_rows_kept(encoder: Encoder, embed: Embed) -> Embed:
    def broken(batch: PackedBatch) -> torch.Tensor:
        masked_T = (batch.tokens_T == MASK_ID)[:, None]
        return torch.where(masked_T, encoder.embed_tokens.weight[MASK_ID], embed(batch))

    return broken


def _attending(
    *,
    places: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    turn_q: Callable[..., torch.Tensor] = apply_rotary,
    turn_k: Callable[..., torch.Tensor] = apply_rotary,
    leaks: bool = False,
) -> Mutant:
    """An encoder whose attention has other places, other turns, or no borders between sequences."""

    def broken(
        qkv: Product, table: RotaryTable, cu_seqlens: torch.Tensor, lengths_B: Sequence[int], heads: int
    ) -> torch.Tensor:
        positions_T = torch.cat([torch.arange(length) for length in lengths_B])
        cos, sin = (part_PJ[places(positions_T), None] for part_PJ in table)
        q_THK, k_THK, v_THK = qkv.numbers().view(len(positions_T), 3 * heads, -1).chunk(3, dim=1)
        attend = attention_leaks if leaks else varlen_attention_reference
        return attend(turn_q(q_THK, cos, sin), turn_k(k_THK, cos, sin), v_THK, cu_seqlens, lengths_B).flatten(1)

    return _in_module("rotary_attention", broken)


def _not_turned(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x_THK


def _turned_backwards(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply_rotary(x_THK, cos, -sin)


def attention_leaks(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, cu_seqlens: torch.Tensor, lengths_B: Sequence[int]
) -> torch.Tensor:
    """Every token attends to every sequence of the batch."""
    return varlen_attention_reference(q_THK, k_THK, v_THK, cu_seqlens[[0, -1]], [sum(lengths_B)])


@contextmanager
def _layer_norm_eps(encoder: Encoder) -> Iterator[None]:
    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    before = [norm.eps for norm in norms]
    for norm in norms:
        norm.eps = 1e-3
    try:
        yield
    finally:
        for norm, eps in zip(norms, before, strict=True):
            norm.eps = eps


def _config(**changes: bool) -> Mutant:
    return lambda encoder: mock.patch.object(encoder, "config", dataclasses.replace(encoder.config, **changes))


ENCODER_MUTANTS: dict[str, Mutant] = {
    "token dropout off: neither scale nor zeroed masks": _config(token_dropout=False),
    "scale left out, masks zeroed": _embedding(_unscaled),
    "scale over the whole batch": _embedding(_scaled_by_batch),
    "scale only where something is masked": _embedding(_scaled_only_where_masked),
    "trained mask ratio left out of the scale": _in_module("TRAINED_MASK_RATIO", 0.0),
    "bos not counted in the ratio": _embedding(_scaled_without_bos),
    "bos and eos not counted in the ratio": _embedding(_scaled_without_specials),
    "masked rows not zeroed": _embedding(_masked_rows_kept),
    # Rotary positions are relative: an offset that a whole sequence shares is no error.
    "the first token's place is its neighbour's": _attending(places=lambda places_T: places_T.clamp(min=1)),
    "two tokens a place": _attending(places=lambda places_T: places_T // 2),
    "queries not turned": _attending(turn_q=_not_turned),
    "keys not turned": _attending(turn_k=_not_turned),
    "turned backwards": _attending(turn_q=_turned_backwards, turn_k=_turned_backwards),
    "attention leaks across sequences": _attending(leaks=True),
    "final norm skipped": lambda encoder: mock.patch.object(encoder, "final_norm", nn.Identity()),
    "layer norm eps 1e-3": _layer_norm_eps,
    "gelu by tanh": _in_module("bias_gelu", lambda product, **_: F.gelu(product.numbers(), approximate="tanh")),
}
"""Name of the mistake -> what makes it. fair-esm has a GELU of its own, so the last one breaks only ours."""


def _interleaved(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x_THK[..., ::2], x_THK[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _scaled_positions(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x_THK, positions_T: apply_rotary(
        x_THK, *rotary_table(change(positions_T), x_THK.shape[-1], x_THK.dtype)
    )


def _turned_by(
    apply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x_THK, positions_T: apply(x_THK, *rotary_table(positions_T, x_THK.shape[-1], x_THK.dtype))


def _other_base(x_THK: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    with mock.patch("protnest.kernels.rotary._BASE", 1000.0):
        return apply_rotary(x_THK, *rotary_table(positions_T, x_THK.shape[-1], x_THK.dtype))


def _bf16_table(x_THK: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    cos, sin = rotary_table(positions_T, x_THK.shape[-1], torch.bfloat16)
    return apply_rotary(x_THK, cos.to(x_THK.dtype), sin.to(x_THK.dtype))


def _second_half_left(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = apply_rotary(x_THK, cos, sin).chunk(2, -1)[0], x_THK.chunk(2, -1)[1]
    return torch.cat((first, second), dim=-1)


ROTARY_MUTANTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "pairs interleaved": _turned_by(_interleaved),
    "turned backwards": _turned_by(_turned_backwards),
    "second half not turned": _turned_by(_second_half_left),
    "turned twice": _turned_by(lambda x, cos, sin: apply_rotary(apply_rotary(x, cos, sin), cos, sin)),
    "not turned": _turned_by(lambda x, cos, sin: x.clone()),
    "base 1000": _other_base,
    "table in bf16": _bf16_table,
    "positions from one": _scaled_positions(lambda positions_T: positions_T + 1),
    "positions in order of the batch": _scaled_positions(lambda positions_T: torch.arange(len(positions_T))),
}
"""Name of the mistake -> a function of x (T, H, K) and positions (T,) that makes it."""


def _scaled_attention(scale: Callable[[int], float]) -> Callable[..., torch.Tensor]:
    def broken(q_THK: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        K = q_THK.shape[-1]
        return varlen_attention_reference(q_THK * (scale(K) * math.sqrt(K)), *rest)  # type: ignore[arg-type]

    return broken


def _cut_one_late(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, cu_seqlens: torch.Tensor, lengths_B: Sequence[int]
) -> torch.Tensor:
    late = [lengths_B[0] + 1, *lengths_B[1:-1], lengths_B[-1] - 1]
    return varlen_attention_reference(q_THK, k_THK, v_THK, cu_seqlens, late)


def _causal(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, cu_seqlens: torch.Tensor, lengths_B: Sequence[int]
) -> torch.Tensor:
    split = zip(*(torch.split(x.transpose(0, 1), list(lengths_B), dim=1) for x in (q_THK, k_THK, v_THK)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1) for q, k, v in split])


def _softmax_over_queries(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, cu_seqlens: torch.Tensor, lengths_B: Sequence[int]
) -> torch.Tensor:
    outputs = []
    for q_LHK, k_LHK, v_LHK in zip(*(torch.split(x, list(lengths_B)) for x in (q_THK, k_THK, v_THK)), strict=True):
        scores_HLL = torch.einsum("qhk,lhk->hql", q_LHK, k_LHK) / math.sqrt(q_LHK.shape[-1])
        outputs.append(torch.einsum("hql,lhk->qhk", scores_HLL.softmax(dim=-2), v_LHK))
    return torch.cat(outputs)


ATTENTION_MUTANTS: dict[str, Callable[..., torch.Tensor]] = {
    "leaks across sequences": attention_leaks,
    "not scaled": _scaled_attention(lambda K: 1.0),
    "scaled by 1 / K": _scaled_attention(lambda K: 1 / K),
    "cut one token late": _cut_one_late,
    "causal": _causal,
    "softmax over queries": _softmax_over_queries,
    "queries and keys exchanged": lambda q, k, v, cu, lengths: varlen_attention_reference(k, q, v, cu, lengths),
    "keys of the next head": lambda q, k, v, cu, lengths: varlen_attention_reference(q, k.roll(1, 1), v, cu, lengths),
    "output 0.1 % short": lambda q, k, v, cu, lengths: varlen_attention_reference(q, k, 0.999 * v, cu, lengths),
}
"""Name of the mistake -> a function like `varlen_attention_reference` that makes it."""


def _causal_by_rows(
    later: Callable[[int], torch.Tensor], *, shortest: int = 0, fill: float = -math.inf
) -> Callable[..., torch.Tensor]:
    """Causal attention that leaves out `later(L)` (L, L) of sequences of at least `shortest` tokens."""

    def broken(
        q_THK: torch.Tensor,
        k_THK: torch.Tensor,
        v_THK: torch.Tensor,
        cu_seqlens: torch.Tensor,
        lengths_B: Sequence[int],
    ) -> torch.Tensor:
        outputs = []
        for q_LHK, k_LHK, v_LHK in zip(*(torch.split(x, list(lengths_B)) for x in (q_THK, k_THK, v_THK)), strict=True):
            scores_HLL = torch.einsum("qhk,lhk->hql", q_LHK, k_LHK) / math.sqrt(q_LHK.shape[-1])
            if len(q_LHK) >= shortest:
                scores_HLL = scores_HLL.masked_fill(later(len(q_LHK)), fill)
            outputs.append(torch.einsum("hql,lhk->qhk", scores_HLL.softmax(dim=-1), v_LHK))
        return torch.cat(outputs)

    return broken


def _later(diagonal: int) -> Callable[[int], torch.Tensor]:
    return lambda L: torch.ones((L, L), dtype=torch.bool).triu(diagonal)


def _causal_across_sequences(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, cu_seqlens: torch.Tensor, lengths_B: Sequence[int]
) -> torch.Tensor:
    return _causal(q_THK, k_THK, v_THK, cu_seqlens, [sum(lengths_B)])


CAUSAL_ATTENTION_MUTANTS: dict[str, Callable[..., torch.Tensor]] = {
    "not causal": varlen_attention_reference,
    "one token ahead": _causal_by_rows(_later(2)),
    "not itself": _causal_by_rows(_later(0)),
    "not itself, but where it is alone": _causal_by_rows(lambda L: _later(0)(L) & (torch.arange(L) > 0)[:, None]),
    "the other way": _causal_by_rows(lambda L: _later(1)(L).T),
    "long sequences only": _causal_by_rows(_later(1), shortest=6),
    "score 0 for what comes later": _causal_by_rows(_later(1), fill=0.0),
    "a window of eight": _causal_by_rows(lambda L: _later(1)(L) | _later(8)(L).T),
    "across sequences": _causal_across_sequences,
    "keys and queries exchanged": lambda q, k, v, cu, lengths: varlen_attention_reference(k, q, v, cu, lengths, True),
    "output 0.1 % short": lambda q, k, v, cu, lengths: varlen_attention_reference(q, k, 0.999 * v, cu, lengths, True),
}
"""Name of the mistake -> a function like causal `varlen_attention_reference` that makes it."""
