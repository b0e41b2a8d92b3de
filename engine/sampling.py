"""The next token: a decoder's logits through penalty, limits, temperature, top-k and top-p to one choice a sequence.

In this order, as transformers' `generate` has it: the repetition penalty divides the positive and multiplies the
negative logits of tokens that the sequence holds (Keskar et al. 2019); tokens that a limit forbids leave; logits are
divided by the temperature; the k largest stay; of these the likeliest whose probabilities add up to p; and the rest is
renormalised.

Each sequence has random numbers of its own, from a counter-based generator (Philox, Salmon et al. 2011) keyed by seed
and sequence: they depend neither on the batch nor on its other sequences. Tokens are chosen in the order of their ids,
so that a rounding of probabilities moves a boundary a little and nothing else.

Shapes: B sequences, V vocabulary, K tokens that stay, T tokens of a sequence so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .errors import InputError

_WIDE = 8192
_STRIDE = 16


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: above 0; below 1 sharpens.
        top_k: only the k likeliest tokens stay; None keeps all.
        top_p: only the likeliest that make up this share stay; None keeps all.
        repetition_penalty: above 1 makes tokens less likely that the sequence holds; 1 does nothing.

    Raises:
        InputError: a number is outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = 950
    top_p: float | None = None
    repetition_penalty: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            message = f"temperature is {self.temperature}, expected a number above 0"
            raise InputError(message)
        if self.top_k is not None and self.top_k < 1:
            message = f"top_k is {self.top_k}, expected at least 1"
            raise InputError(message)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            message = f"top_p is {self.top_p}, expected above 0 and at most 1"
            raise InputError(message)
        if not 0 < self.repetition_penalty < math.inf:
            message = f"repetition_penalty is {self.repetition_penalty}, expected a number above 0"
            raise InputError(message)


def next_probabilities(
    logits_BV: torch.Tensor, seen_BT: torch.Tensor, forbidden: list[torch.Tensor | None], options: SamplingOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that stay, and how likely each is.

    Args:
        logits_BV: fp32, of the next token.
        seen_BT: int64, tokens of each sequence so far; short ones are filled up with any token that they hold.
        forbidden: for each sequence a mask (V,) of tokens that a limit forbids, or None; one token at least is left.
        options: what is done to them.

    Returns:
        int64 (B, K), ids in ascending order, and float64 (B, K), probabilities that add up to one in each row; those
        of tokens that do not stay are 0.
    """
    scores_BV = logits_BV.clone()
    if options.repetition_penalty != 1:
        held_BT = logits_BV.gather(1, seen_BT)
        penalty = options.repetition_penalty
        scores_BV.scatter_(1, seen_BT, torch.where(held_BT < 0, held_BT * penalty, held_BT / penalty))
    for row, mask_V in enumerate(forbidden):
        if mask_V is not None:
            scores_BV[row].masked_fill_(mask_V, -math.inf)
    V = scores_BV.shape[1]
    top_BK, ids_BK = largest(scores_BV, min(options.top_k or V, V))
    p_BK = torch.softmax(top_BK.double() / options.temperature, dim=1)
    if options.top_p is not None:
        before_BK = p_BK.cumsum(dim=1) - p_BK
        p_BK = p_BK.masked_fill(before_BK >= options.top_p, 0.0)
        p_BK = p_BK / p_BK.sum(dim=1, keepdim=True)
    ids_BK, order_BK = ids_BK.sort(dim=1)
    return ids_BK, p_BK.gather(1, order_BK)


def largest(scores_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest scores of each row, falling, and where they are: (B, k) and int64 (B, k), as `torch.topk`.

    On a CPU, where torch's selection from 50,257 takes longer than a small decoder's step: every 16th score tells about
    where the k-th lies, one comparison finds those beyond, and few are left to sort. Where too few are, torch selects.
    """
    B, V = scores_BV.shape
    if scores_BV.device.type != "cpu" or V < _WIDE or 4 * k > V:
        return torch.topk(scores_BV, k, dim=1)
    rows_BV = scores_BV.numpy()
    # Half as many again as are wanted, and some: a sample's quantile scatters.
    rank = min(V // _STRIDE, int(1.5 * k / _STRIDE) + 8)
    sample = rows_BV[:, ::_STRIDE]
    values = np.empty((B, k), dtype=rows_BV.dtype)
    places = np.empty((B, k), dtype=np.int64)
    for row in range(B):
        bound = np.partition(sample[row], len(sample[row]) - rank)[len(sample[row]) - rank]
        found = np.flatnonzero(rows_BV[row] >= bound)
        if len(found) < k:
            found = np.argpartition(rows_BV[row], V - k)[V - k :]
        order = np.argsort(-rows_BV[row][found], kind="stable")[:k]
        places[row] = found[order]
        values[row] = rows_BV[row][places[row]]
    return torch.from_numpy(values), torch.from_numpy(places)


def choose(ids_BK: torch.Tensor, p_BK: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token a sequence: int64 (B,).

    Args:
        ids_BK, p_BK: of `next_probabilities`.
        uniform_B: float64 (B,), each at least 0 and below 1.
    """
    total_BK = p_BK.cumsum(dim=1)
    # Scaled to what rounding left of one; the last token with a share is the last that can be met.
    place_B = torch.searchsorted(total_BK, (uniform_B * total_BK[:, -1])[:, None], right=True)[:, 0]
    return ids_BK.gather(1, place_B.clamp(max=ids_BK.shape[1] - 1)[:, None])[:, 0]


def uniform_numbers(seed: int, sequence: int, count: int) -> npt.NDArray[np.float64]:
    """The random numbers of a sequence, float64 (count,): the same ones for a seed and a number, whatever else runs."""
    key = np.array([seed, sequence], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
