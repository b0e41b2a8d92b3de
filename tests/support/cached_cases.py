"""Inputs of cached_attention that find mistakes, and how far from fp64 gold a result may be.

Shapes: B sequences, S slots, P places, H heads, K head width, L tokens of a sequence with the new one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from protnest.kernels.cached_attention import KeyValueCache
from protnest.kernels.product import Product

from support import attention_cases
from support.attention_cases import BF16, guarded, guarded_product

HEADS = {8: 5, 16: 3, 24: 3, 40: 2, 64: 3, 80: 1, 128: 2, 192: 2}
"""Head width -> heads. The widths are one step of a vector and several, of each size of vectors, and too many for all
registers."""
SLOTS, PLACES = 17, 150
# Before the new token: around groups of 4 keys, vectors of 4, 8 and 16, tiles of 32, and up to the last place.
LENGTHS = (16, 0, 1, 149, 2, 3, 7, 31, 32, 33, 15, 96, 4, 128)
OF_SLOTS = (3, 16, 0, 9, 1, 7, 15, 2, 10, 4, 12, 5, 8, 6)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `cached_attention`, with the new tokens and the history of all that could be needed.

    Attributes:
        new: of `attention_cases`; its qkv is the rows, one a sequence, NaN around.
        cache: what it is before the call: NaN around, in places that no token has taken, and in slots not used.
    """

    new: attention_cases.Case
    cache: KeyValueCache
    slots_B: torch.Tensor
    lengths_B: torch.Tensor

    @property
    def qkv(self) -> Product:
        return self.new.qkv

    def fresh(self) -> KeyValueCache:
        """A copy of the cache to write into."""
        return KeyValueCache(*(guarded(part) for part in self.cache))

    def pick(self, order: Sequence[int], slots: Sequence[int]) -> Case:
        """The sequences of these indices, in this order, in other slots."""
        rows_B = torch.tensor(order, dtype=torch.int64)
        cache = KeyValueCache(*(torch.full_like(part, torch.nan) for part in self.cache))
        for moved, part in zip(cache, self.cache, strict=True):
            moved[torch.tensor(slots)] = part[self.slots_B[rows_B]]
        new = dataclasses.replace(self.new, qkv=guarded_product(self.qkv.rows(rows_B)), lengths_B=(len(order),))
        return Case(new, cache, torch.tensor(slots), self.lengths_B[rows_B])


def make_case(
    K: int,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype = torch.float32,
    *,
    lengths_B: Sequence[int] = LENGTHS,
    slots_B: Sequence[int] = OF_SLOTS,
    slots: int = SLOTS,
    places: int = PLACES,
    heads: int | None = None,
    kind: str = "hostile",
    left: str = "numbers",
) -> Case:
    """New tokens and a history, as `attention_cases.make_case` makes queries, keys and values of these kinds."""
    heads = heads or HEADS[K]
    history = attention_cases.make_case((slots * places,), K, torch.float64, heads=heads, kind=kind)
    qkv_SPAHK = history.qkv.values_NO.view(slots, places, 3, heads, K)
    if kind == "rising":  # in every slot from the start
        qkv_SPAHK[:, :, 1, :, K // 2 - 1] = torch.arange(places)[:, None].double() / 16
    taken_SP = torch.zeros((slots, places), dtype=torch.bool)
    for slot, length in zip(slots_B, lengths_B, strict=True):
        taken_SP[slot, :length] = True
    parts = (qkv_SPAHK[:, :, part].masked_fill(~taken_SP[..., None, None], torch.nan) for part in (1, 2))
    cache = KeyValueCache(*(part.transpose(1, 2).to(stored).contiguous() for part in parts))
    new = attention_cases.make_case((len(lengths_B),), K, dtype, heads=heads, kind=kind, left=left)
    indices = (torch.tensor(list(numbers), dtype=torch.int64) for numbers in (slots_B, lengths_B))
    return Case(new, cache, *indices)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.contiguous().view(whole) == other.contiguous().view(whole)


def find_failure(got_BD: torch.Tensor, written: KeyValueCache, case: Case) -> str | None:
    """What is wrong with a result or with the cache after the call; None where nothing is.

    New keys and values are stored as rounded once to the cache's dtype, from numbers that are off by 4 e of what they
    are added up from (nothing, where they are plain); no other bit of the cache changes. e is fp32's eps, fp64's where
    qkv is fp64.

    Let a score be off by at most d = 4 e (1 + S), S the largest sum of |q||k| / sqrt(K): q and the score are rounded
    three times, and the score's sum at random. Weights move by as much, and the weighted sum rounds by half of e a
    step. With the keys and values that are in the cache:

        bound = exp(2 d) d spread + (4 + L / 2) e sum_u p_u |v_u| + half an ulp of bf16 output
    """
    B, H, K = len(case.slots_B), case.new.heads, case.cache.keys_SHPK.shape[3]
    if (got_BD.shape, got_BD.dtype) != ((B, H * K), case.qkv.dtype):
        return f"{tuple(got_BD.shape)} of {got_BD.dtype}"
    numbers_B3HK, sizes_B3HK = attention_cases.find_numbers(case.new)
    e = float(torch.finfo(torch.float64 if got_BD.dtype == torch.float64 else torch.float32).eps)
    got = got_BD.double().numpy().reshape(B, H, K)
    here = (case.slots_B, slice(None), case.lengths_B)
    for part, (before, after) in enumerate(zip(case.cache, written, strict=True), start=1):
        same = _same_bits(before, after)
        same[here] = True
        if not same.all():
            return f"the cache has changed at {(~same).nonzero()[0].tolist()} of its part {part}"
        number, size = numbers_B3HK[:, part], sizes_B3HK[:, part]
        half_ulp = 0 if after.dtype == torch.float64 else BF16 if after.dtype == torch.bfloat16 else e / 2
        plain = len(case.qkv.tensors()) == 1
        bound = half_ulp * np.abs(number) + (0 if plain else 4 * e * size)
        with np.errstate(invalid="ignore"):
            wrong = np.isfinite(number) & ~(np.abs(after[here].double().numpy() - number) <= bound)
        if wrong.any():
            return f"part {part} is stored wrongly at {np.argwhere(wrong)[0].tolist()}"
    for b, (slot, length) in enumerate(zip(case.slots_B.tolist(), case.lengths_B.tolist(), strict=True)):
        keys_HLK, values_HLK = (part[slot, :, : length + 1].double().numpy() for part in written)
        q_HK, q_size_HK = numbers_B3HK[b, 0], sizes_B3HK[b, 0]
        with np.errstate(invalid="ignore"):
            scores_HL = np.einsum("hk,hlk->hl", q_HK, keys_HLK) / np.sqrt(K)
            size_H1 = (np.einsum("hk,hlk->hl", q_size_HK, np.abs(keys_HLK)) / np.sqrt(K)).max(-1, keepdims=True)
            weights_HL = np.exp(scores_HL - scores_HL.max(-1, keepdims=True))
            weights_HL /= weights_HL.sum(-1, keepdims=True)
            gold, mean, square = (
                np.einsum("hl,hlk->hk", weights_HL, x_HLK) for x_HLK in (values_HLK, np.abs(values_HLK), values_HLK**2)
            )
            spread = np.sqrt(np.maximum(square - gold**2, 0))
            d = 4 * e * (1 + size_H1)
            bound = np.exp(2 * d) * d * spread + (4 + (length + 1) / 2) * e * mean
            if got_BD.dtype == torch.bfloat16:
                bound = bound * (1 + BF16) + BF16 * np.abs(gold)
            share = np.abs(got[b] - gold) / bound
        same_HK = (got[b] == gold) | (np.isnan(got[b]) & np.isnan(gold))
        share = np.where(same_HK, 0, np.nan_to_num(share, nan=np.inf))
        if share.max() > 1:
            h, k = map(int, np.unravel_index(int(share.argmax()), share.shape))
            return f"{(b, h, k)}: got {got[b, h, k]:.9g}, gold {gold[h, k]:.9g}, bound {bound[h, k]:.3g}"
    return None
