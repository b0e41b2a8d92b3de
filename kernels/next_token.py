"""The next token of each running sequence: logits through penalty, limits, temperature, top-k and top-p to one choice.

In this order, as transformers' `generate` has it: the repetition penalty divides the positive and multiplies the
negative logits of tokens that the sequence holds (Keskar et al. 2019); tokens that a limit forbids leave; logits are
divided by the temperature; the k largest stay; of these the likeliest whose probabilities add up to p; and the rest is
renormalised. Tokens are met in the order of their ids by a number from 0 to 1, so that a rounding of probabilities
moves a boundary a little and nothing else.

A token has a size, of which a sequence has room for so much. Without room all but the end is forbidden.

Implementations:
    torch      the reference; any device. On a GPU nothing waits for the host, so that a step can be captured.
    cpu        csrc/next_token.cpp: a row's logits stay in the cache from the first pass to the choice; the k largest
               of many are found by a sample, not by sorting. Of equal scores the first ids stay, where torch takes any.
               For AVX-512, AVX2 and plain vectors. A sequence's choice is the same in any company.

No implementation has gradients.

Shapes: B running sequences, S slots, V vocabulary, K tokens that stay.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import NamedTuple

import torch

from .cpu_kernels import array, cpu_level, module, product_arrays, why_not_cpu
from .product import Product, check_product

IMPLS = ("auto", "torch", "cpu")
NEVER = -1
"""The size of a token that is never chosen."""

_logger = logging.getLogger(__name__)


class Filters(NamedTuple):
    """What is done to the logits.

    Attributes:
        temperature: above 0.
        top_k: at least 1; None keeps all.
        top_p: above 0 and at most 1; None keeps all.
        repetition_penalty: above 0; 1 does nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0


class Limits(NamedTuple):
    """What each sequence may still take.

    Attributes:
        sizes_V: int32 (V,), of each token; `NEVER` for those that are never chosen. The end's is not looked at.
        end: id of the token that ends a sequence.
        room_B: int64 (B,), the largest sizes that fit; without any, only the end is left.
        may_end_B: bool (B,), whether the end is allowed.
    """

    sizes_V: torch.Tensor
    end: int
    room_B: torch.Tensor
    may_end_B: torch.Tensor

    def forbidden(self) -> torch.Tensor:
        """bool (B, V), tokens that may not be chosen."""
        room_B1 = self.room_B[:, None]
        forbidden_BV = (self.sizes_V < 0) | (self.sizes_V > room_B1) | (room_B1 <= 0)
        forbidden_BV[:, self.end] = ~self.may_end_B
        return forbidden_BV


def next_probabilities(
    logits_BV: torch.Tensor, seen_BV: torch.Tensor, forbidden_BV: torch.Tensor, filters: Filters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that stay, and how likely each is.

    Args:
        logits_BV: fp32, of the next token.
        seen_BV: bool (B, V), tokens that each sequence holds.
        forbidden_BV: bool (B, V); one token at least is left.
        filters: what is done to the logits.

    Returns:
        int64 (B, K), ids in ascending order, and float64 (B, K), probabilities that add up to one in each row; those
        of tokens that do not stay are 0.
    """
    penalty = filters.repetition_penalty
    penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    scores_BV = torch.where(seen_BV, penalised_BV, logits_BV).masked_fill_(forbidden_BV, -torch.inf)
    V = scores_BV.shape[1]
    top_BK, ids_BK = torch.topk(scores_BV, min(filters.top_k or V, V), dim=1)
    # Less the largest first: divided by a temperature that is next to nothing, it would be infinite.
    below_BK = top_BK.double() - top_BK[:, :1]
    p_BK = torch.softmax(below_BK / filters.temperature, dim=1)
    if filters.top_p is not None:
        before_BK = p_BK.cumsum(dim=1) - p_BK
        p_BK = p_BK.masked_fill(before_BK >= filters.top_p, 0.0)
        p_BK = p_BK / p_BK.sum(dim=1, keepdim=True)
    ids_BK, order_BK = ids_BK.sort(dim=1)
    return ids_BK, p_BK.gather(1, order_BK)


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


def next_token_reference(
    logits_BV: torch.Tensor,
    seen_SV: torch.Tensor,
    slots_B: torch.Tensor,
    limits: Limits,
    uniform_B: torch.Tensor,
    filters: Filters,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`next_token` in torch's operations, on any device."""
    ids_BK, p_BK = next_probabilities(logits_BV, seen_SV[slots_B], limits.forbidden(), filters)
    chosen_B = choose(ids_BK, p_BK, uniform_B)
    total_B = logits_BV.logsumexp(dim=1).double()
    picked_B = logits_BV.gather(1, chosen_B[:, None])[:, 0].double()
    # Less an infinite total a number is infinite, too; and where nothing is left, shares are no numbers.
    has_choice_B = total_B.isfinite() & p_BK[:, 0].isfinite()
    return chosen_B, torch.where(has_choice_B, picked_B - total_B, torch.nan)


def _choose_in_cpp(
    logits: Product,
    seen_SV: torch.Tensor,
    slots_B: torch.Tensor,
    limits: Limits,
    uniform_B: torch.Tensor,
    filters: Filters,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, V = logits.values_NO.shape
    chosen_B, log_p_B = torch.empty(B, dtype=torch.int64), torch.empty(B, dtype=torch.float64)
    module().next_token(
        product_arrays(logits),
        array(seen_SV),
        array(slots_B),
        array(limits.sizes_V),
        array(limits.room_B),
        array(limits.may_end_B),
        array(uniform_B),
        limits.end,
        filters.repetition_penalty,
        filters.temperature,
        min(filters.top_k or V, V),
        1.0 if filters.top_p is None else filters.top_p,
        cpu_level(),
        torch.get_num_threads(),
        array(chosen_B),
        array(log_p_B),
    )
    return chosen_B, log_p_B


@functools.cache
def _log_choice(choice: str, reason: str | None) -> None:
    _logger.info("next_token: auto runs %s%s", choice, f": {reason}" if reason else "")


def _check(
    logits: Product, seen_SV: torch.Tensor, slots_B: torch.Tensor, limits: Limits, uniform_B: torch.Tensor
) -> None:
    if logits.values_NO.dim() != 2 or logits.dtype != torch.float32:
        message = f"logits are {logits.dtype} {tuple(logits.values_NO.shape)}, expected fp32 (B, V)"
        raise ValueError(message)
    B, V = logits.values_NO.shape
    check_product(logits, V)
    device = logits.values_NO.device
    wanted = {
        "seen": (seen_SV, torch.bool, (*seen_SV.shape[:1], V)),
        "slots": (slots_B, torch.int64, (B,)),
        "sizes": (limits.sizes_V, torch.int32, (V,)),
        "room": (limits.room_B, torch.int64, (B,)),
        "may_end": (limits.may_end_B, torch.bool, (B,)),
        "uniform": (uniform_B, torch.float64, (B,)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != device:
            message = (
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected {dtype} {shape} on "
                f"{device}, where the logits are"
            )
            raise ValueError(message)
    if not 0 <= limits.end < V:
        message = f"end is {limits.end}, but there are {V} tokens"
        raise ValueError(message)


def _check_filters(filters: Filters) -> None:
    temperature, top_k, top_p, penalty = filters
    right = 0 < temperature < math.inf and 0 < penalty < math.inf
    right = right and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
    if not right:
        message = (
            f"filters are {filters}, expected a temperature and a penalty above 0 and finite, top_k of at least 1 "
            "and top_p above 0 and at most 1"
        )
        raise ValueError(message)


def _check_slots(slots_B: torch.Tensor, S: int) -> None:
    for b, slot in enumerate(slots_B.tolist()):
        if not 0 <= slot < S:
            message = f"sequence {b}: slot {slot}, but there are {S}"
            raise ValueError(message)


def next_token(
    logits: torch.Tensor | Product,
    seen_SV: torch.Tensor,
    slots_B: torch.Tensor,
    limits: Limits,
    uniform_B: torch.Tensor,
    filters: Filters,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses a token for each sequence.

    Args:
        logits: fp32 (B, V), of the next token, or the product that they still are; left alone.
        seen_SV: bool (S, V), tokens that the sequence of each slot holds.
        slots_B: int64 (B,), which slot is each sequence's.
        limits: what each sequence may still take; one token at least must be left.
        uniform_B: float64 (B,), each at least 0 and below 1.
        filters: what is done to the logits.
        impl: "auto", "torch" or "cpu"; a named one runs or raises.

    All tensors are on one device. On a GPU slots stay there unread: wrong ones are not noticed.

    Returns:
        int64 (B,), the chosen ids, and float64 (B,), their log probabilities in nats under the logits as they are; NaN
        where a sequence's logits hold NaN or infinity, or all that it may choose from is minus infinity, and then any
        token stands for the choice.

    Raises:
        ValueError: shapes, dtypes or devices disagree, there is no such slot, a filter is outside its range, or `impl`
            is unknown.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    if impl not in IMPLS:
        message = f"impl is {impl!r}; allowed: {', '.join(IMPLS)}"
        raise ValueError(message)
    if isinstance(logits, torch.Tensor):
        logits = Product(logits)
    _check(logits, seen_SV, slots_B, limits, uniform_B)
    _check_filters(filters)
    reason = None if impl == "torch" else why_not_cpu(logits)
    if impl == "cpu" and reason is not None:
        message = f"impl='cpu' cannot run here: {reason}"
        raise RuntimeError(message)
    if impl == "auto":
        _log_choice("cpu" if reason is None else "torch", reason)
    if impl == "torch" or reason is not None:
        if slots_B.device.type == "cpu":  # C++ checks them itself, and on a GPU nobody waits for them
            _check_slots(slots_B, len(seen_SV))
        return next_token_reference(logits.numbers(), seen_SV, slots_B, limits, uniform_B, filters)
    return _choose_in_cpp(logits, seen_SV, slots_B, limits, uniform_B, filters)
