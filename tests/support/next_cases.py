"""Inputs of next_token that find mistakes, and which token each number from 0 to 1 must choose, literally and in fp64.

Shapes: B sequences, S slots, V vocabulary, U numbers that are tried on a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from protnest.kernels.next_token import NEVER, Filters, Limits
from protnest.kernels.product import Product, Scales

from support.attention_cases import guarded, guarded_product

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Choose = Callable[[Product, torch.Tensor, torch.Tensor, Limits, torch.Tensor, Filters], Any]

MOST_ERROR = 1e-5
"""Of a boundary between two tokens, in probability, and of a log probability."""


def guarded_mask(mask: torch.Tensor) -> torch.Tensor:
    """The same mask with True before and behind it in memory."""
    around = torch.ones(mask.numel() + 128, dtype=torch.bool)
    around[64:-64] = mask.flatten()
    return around[64:-64].view(mask.shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `next_token` but for the random numbers."""

    logits: Product
    seen_SV: torch.Tensor
    slots_B: torch.Tensor
    limits: Limits
    filters: Filters

    def pick(self, order: Sequence[int] | torch.Tensor, slots: Sequence[int] | None = None) -> Case:
        """These sequences, perhaps several times, in these slots."""
        rows_N = torch.as_tensor(order)
        seen_SV, slots_B = self.seen_SV, self.slots_B[rows_N]
        if slots is not None:
            seen_SV = seen_SV.clone().fill_(True)
            seen_SV[torch.tensor(slots)] = self.seen_SV[slots_B]
            slots_B = torch.tensor(slots)
        limits = self.limits._replace(room_B=self.limits.room_B[rows_N], may_end_B=self.limits.may_end_B[rows_N])
        return dataclasses.replace(
            self, logits=guarded_product(self.logits.rows(rows_N)), seen_SV=seen_SV, slots_B=slots_B, limits=limits
        )

    def run(self, choose: Choose, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen_B, log_p_B = choose(
            self.logits, self.seen_SV, self.slots_B, self.limits, guarded(uniform_B), self.filters
        )
        assert isinstance(chosen_B, torch.Tensor)
        assert (chosen_B.dtype, log_p_B.dtype) == (torch.int64, torch.float64)
        return chosen_B, log_p_B

    @functools.cached_property
    def gold(self) -> tuple[Array, Array]:
        """(B, V), how likely each token is, and its log probability under the plain logits."""
        logits_BV = self.logits.numbers()
        exact_BV = logits_BV.double()
        rows = [self._likely(logits_V.numpy(), b) for b, logits_V in enumerate(logits_BV)]
        return np.stack(rows), (exact_BV - exact_BV.logsumexp(dim=1, keepdim=True)).numpy()

    def _likely(self, logits_V: Any, b: int) -> Array:
        filters, limits = self.filters, self.limits
        seen_V = self.seen_SV[self.slots_B[b]].numpy()
        # In fp32, so that equal scores stay equal.
        penalty = np.float32(filters.repetition_penalty)
        scores_V = np.where(seen_V, np.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)
        scores_V = scores_V.astype(np.float64)
        room, end = int(limits.room_B[b]), limits.end
        sizes_V, of_end = limits.sizes_V.numpy(), scores_V[end]
        scores_V[(sizes_V == NEVER) | (sizes_V > max(room, 0))] = -np.inf
        if room <= 0:
            scores_V[:] = -np.inf
        scores_V[end] = of_end if limits.may_end_B[b] else -np.inf
        order = np.argsort(-scores_V, kind="stable")[: filters.top_k]
        with np.errstate(over="ignore"):  # minus infinity, where it is cold
            weights = np.exp((scores_V[order] - scores_V[order[0]]) / filters.temperature)
        weights /= weights.sum()
        if filters.top_p is not None:
            held = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
            weights[held >= filters.top_p] = 0.0
        p_V = np.zeros(len(scores_V))
        p_V[order] = weights / weights.sum()
        return p_V


def _numbers_to_try(p_V: Array, most: int) -> Array:
    """Numbers on both sides of each boundary between tokens, and in the middle of each token."""
    ends = np.cumsum(p_V[p_V > 0])
    edges = ends[:-1]
    middles = ends - p_V[p_V > 0] / 2
    around = (edges[:, None] + np.linspace(-3, 3, 7) * MOST_ERROR).flatten()
    numbers = np.sort(np.concatenate([around, middles]))
    if len(numbers) > most:
        numbers = numbers[np.linspace(0, len(numbers) - 1, most).astype(int)]
    return np.clip(np.concatenate([[0.0], numbers, [1.0]]), 0.0, np.nextafter(1.0, 0.0))


def find_failure(choose: Choose, case: Case, *, most: int = 300) -> str | None:
    """What is wrong with the choices for numbers swept over each sequence's tokens; None where nothing is.

    Args:
        choose: takes the arguments of `next_token`.
        case: what is chosen from.
        most: numbers that are tried on a sequence.
    """
    p_BV, log_p_BV = case.gold
    tried = [_numbers_to_try(p_V, most) for p_V in p_BV]
    rows_N = np.repeat(np.arange(len(tried)), [len(each) for each in tried])
    uniform_N = np.concatenate(tried)
    chosen_N, nats_N = case.pick(torch.from_numpy(rows_N)).run(choose, torch.from_numpy(uniform_N))
    upper_BV = p_BV.cumsum(axis=1)
    largest_B = case.logits.numbers().amax(dim=1).abs().tolist()  # to which an fp32 total is rounded
    for row, number, token, nats in zip(rows_N, uniform_N, chosen_N.tolist(), nats_N.tolist(), strict=True):
        where = f"sequence {row}, number {number}: token {token}"
        if not 0 <= token < p_BV.shape[1]:
            return f"{where} is none"
        share, upper = p_BV[row, token], upper_BV[row, token]
        if share == 0.0 or not upper - share - MOST_ERROR <= number <= upper + MOST_ERROR:
            return f"{where} has {share} up to {upper}"
        if not abs(nats - log_p_BV[row, token]) <= MOST_ERROR + 2**-23 * largest_B[row]:
            return f"{where} has log probability {log_p_BV[row, token]}, got {nats}"
    return None


def _spread(kind: str, logits_BV: torch.Tensor) -> torch.Tensor:
    V = logits_BV.shape[1]
    if kind == "sorted":
        return logits_BV.sort(dim=1).values
    if kind == "spikes":
        # All that matters lies where a sample of every 64th does not look.
        logits_BV[:, 1::16] += 30
    elif kind == "sampled spikes":
        logits_BV[:, ::64] += 30
    elif kind == "equal":
        logits_BV.fill_(-1.5)
    elif kind == "ties":
        logits_BV = logits_BV.round()
    elif kind == "large":
        logits_BV = logits_BV * 700
    elif kind == "flat":
        logits_BV = logits_BV * 1e-3 + 20
    elif kind == "minus infinity":
        logits_BV[:, (torch.arange(V) - V // 2) % 5 != 0] = -torch.inf
    elif kind == "few left":
        logits_BV[:, torch.arange(V) > 25] = -torch.inf
        logits_BV[:, V // 2] = 0.5
    else:
        assert kind == "random", kind
    return logits_BV


def _left(left: str, logits_BV: torch.Tensor, generator: torch.Generator) -> Product:
    """Logits as a product leaves them; of integers they are others."""
    B, V = logits_BV.shape
    if left == "numbers":
        return Product(logits_BV)
    bias_V = torch.randn(V, generator=generator)
    if left == "with bias":
        return Product(logits_BV, bias_V)
    sums_BV = torch.randint(-9000, 9000, (B, V), generator=generator, dtype=torch.int32)
    steps_V, sums_V = torch.rand(V, generator=generator) + 0.5, torch.randn(V, generator=generator)
    scale_B, shift_B = torch.rand(B, generator=generator) * 4e-4 + 1e-4, torch.randn(B, generator=generator)
    return Product(sums_BV, bias_V, Scales(steps_V, sums_V, scale_B, shift_B))


def make_case(
    V: int,
    filters: Filters | None = None,
    *,
    kind: str = "random",
    left: str = "numbers",
    sizes: str = "pieces",
    B: int = 6,
    seed: int = 0,
) -> Case:
    """Random logits of both signs with a mean that is not zero; a fifth of the tokens has been seen.

    Args:
        V: vocabulary.
        filters: None penalises, and does nothing else.
        kind: "random", or how the logits are spread, see `_spread`.
        left: "numbers", "with bias" or "integers".
        sizes: "pieces": from `NEVER` to 3, whose rooms are 0 to 2^40; "letters": from 1 to 3, none of them `NEVER`;
            "free": nothing is forbidden; "barely": all but a few are never chosen.
        B: sequences, in slots of which there are three more.
        seed: of all numbers.
    """
    generator = torch.Generator().manual_seed(seed + V)
    logits_BV = _spread(kind, torch.randn((B, V), generator=generator) * 3 + 0.5)
    seen_SV = torch.rand((B + 3, V), generator=generator) < 0.2
    end = V // 2
    room_B = torch.tensor([2**40, 0, 1, 2, 3, -1])[torch.arange(B) % 6]
    may_end_B = torch.tensor([True, True, False, True, False, True])[torch.arange(B) % 6] | (V == 1)
    if sizes == "pieces":
        sizes_V = torch.tensor([0, 1, 2, 3, NEVER, 1, 2, 3], dtype=torch.int32)[torch.arange(V) % 8]
    elif sizes == "letters":
        sizes_V = torch.tensor([1, 2, 3], dtype=torch.int32)[torch.arange(V) % 3]
    elif sizes == "free":
        sizes_V, room_B, may_end_B = torch.zeros(V, dtype=torch.int32), room_B.clamp(min=1), may_end_B | True
    else:
        sizes_V = torch.full((V,), NEVER, dtype=torch.int32)
        sizes_V[torch.arange(V) % 97 == 5] = 1
    # The end's size is nobody's: it ends a sequence whose room is gone.
    sizes_V[end] = 2**31 - 1 if sizes == "letters" else NEVER
    return Case(
        logits=guarded_product(_left(left, logits_BV, generator)),
        seen_SV=guarded_mask(seen_SV),
        slots_B=torch.randperm(B + 3, generator=generator)[:B],
        limits=Limits(guarded(sizes_V), end, room_B, may_end_B),
        filters=Filters(repetition_penalty=1.2) if filters is None else filters,
    )
