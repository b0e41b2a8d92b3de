"""Attention of one new token for each running sequence over that sequence's cached keys and values: a decoder's step.

    keys[slot, h, L], values[slot, h, L] = k[b, h], v[b, h]                              slot, L of sequence b
    out[b, h] = sum_u softmax_u(q[b, h] . keys[slot, h, u] / sqrt(K)) values[slot, h, u]            u from 0 to L

`qkv` holds the queries of all heads, then their keys, then their values, as one product leaves them: numbers, perhaps
with a bias still to be added, or the sums of an int8 product. No positions are turned.

The cache is (S, H, P, K), slot by slot and head by head: what one head reads lies in one piece, keys and values each.
Places beyond a sequence's tokens may hold anything, NaN too.

Implementations:
    reference  written out, one sequence at a time (fp64 gives the gold of the tests).
    torch      torch's scaled_dot_product_attention of padded copies with a mask. Any device; on a GPU nothing waits for
               the host, so that a step can be captured in a CUDA graph; all places of the cache are read there, of
               which `KeyValueCache.first` gives fewer. On a CPU 16-bit numbers are widened to fp32.
    cpu        csrc/cached_attention.cpp: each key and value is read once, from front to back, at the rate of memory.
               Scores, softmax and sums in fp32. For AVX-512, AVX2 and plain vectors, chosen when it runs. qkv of fp32,
               bf16 or int32, a cache of fp32 or bf16, head widths in multiples of 8. The bits of a sequence's result
               are the same whatever its neighbours, its slot and the number of threads. A cache of bf16 takes half
               the time where it is larger than the processor's own, and half the memory.

No implementation has gradients.

Shapes: B sequences, S slots, H heads, P places of a slot, K head width, L tokens of a sequence before this one,
T packed tokens, C = 3 H K.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cpu_kernels import array, cpu_level, module, product_arrays, why_not_cpu
from .operator import Operator
from .product import Product, check_product, wants_gradients

IMPLS = ("auto", "reference", "torch", "cpu")
_HEAD_WIDTHS = 8
_logger = logging.getLogger(__name__)


class KeyValueCache(NamedTuple):
    """Keys and values of one layer, for some sequences that run at a time; written in place.

    Attributes:
        keys_SHPK, values_SHPK: (S, H, P, K), of one floating dtype on one device.
    """

    keys_SHPK: torch.Tensor
    values_SHPK: torch.Tensor

    @staticmethod
    def empty(
        slots: int,
        heads: int,
        places: int,
        head_width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KeyValueCache:
        """Room for `slots` sequences of up to `places` tokens: 2 slots heads places head_width numbers, not yet set."""
        shape = (slots, heads, places, head_width)
        return KeyValueCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))

    def grown(self, places: int, *, most: int | None = None) -> KeyValueCache:
        """A cache with at least so many places: this one where it has them, else a copy with twice as many or more.

        Args:
            places: that are needed.
            most: that will ever be; a copy has no more, unless they are needed.
        """
        before = self.keys_SHPK.shape[2]
        if places <= before:
            return self
        S, H, _, K = self.keys_SHPK.shape
        doubled = 2 * before if most is None else min(most, 2 * before)
        larger = KeyValueCache.empty(
            *(S, H, max(places, doubled), K), dtype=self.keys_SHPK.dtype, device=self.keys_SHPK.device
        )
        for new, old in zip(larger, self, strict=True):
            new[:, :, :before] = old
        return larger

    def first(self, places: int) -> KeyValueCache:
        """A view of the first places of each slot, for implementations that read all there are."""
        return KeyValueCache(self.keys_SHPK[:, :, :places], self.values_SHPK[:, :, :places])


def cached_attention_reference(
    qkv_BC: torch.Tensor, cache: KeyValueCache, slots_B: torch.Tensor, lengths_B: torch.Tensor
) -> torch.Tensor:
    """`cached_attention` written out, in the widest of the dtypes of qkv and the cache and fp32."""
    keys_SHPK, values_SHPK = cache
    _, H, _, K = keys_SHPK.shape
    outputs = [qkv_BC.new_empty((0, H * K))]
    for qkv_C, slot, length in zip(qkv_BC, slots_B.tolist(), lengths_B.tolist(), strict=True):
        q_HK, keys_SHPK[slot, :, length], values_SHPK[slot, :, length] = qkv_C.view(3, H, K)
        wide = torch.promote_types(torch.promote_types(qkv_C.dtype, keys_SHPK.dtype), torch.float32)
        keys_HLK, values_HLK = (part[slot, :, : length + 1].to(wide) for part in cache)
        scores_HL = torch.einsum("hk,hlk->hl", q_HK.to(wide), keys_HLK) / math.sqrt(K)
        attended_HK = torch.einsum("hl,hlk->hk", scores_HL.softmax(dim=-1), values_HLK)
        outputs.append(attended_HK.to(qkv_C.dtype).view(1, H * K))
    return torch.cat(outputs)


def _padded(qkv_BC: torch.Tensor, cache: KeyValueCache, slots_B: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    keys_SHPK, values_SHPK = cache
    _, H, P, K = keys_SHPK.shape
    B = qkv_BC.shape[0]
    if B == 0:
        return qkv_BC.new_empty((0, H * K))
    q_BHK, k_BHK, v_BHK = qkv_BC.view(B, 3, H, K).unbind(1)
    keys_SHPK[slots_B, :, lengths_B] = k_BHK.to(keys_SHPK.dtype)
    values_SHPK[slots_B, :, lengths_B] = v_BHK.to(values_SHPK.dtype)
    reach, wide = P, torch.promote_types(qkv_BC.dtype, keys_SHPK.dtype)
    if lengths_B.device.type == "cpu":  # on a GPU the largest length is not known here
        reach, wide = int(lengths_B.max()) + 1, torch.promote_types(wide, torch.float32)
    known_B11P = (torch.arange(reach, device=lengths_B.device) <= lengths_B[:, None])[:, None, None]
    # A mask alone would let NaN through: it is added to scores, and weights of 0 are multiplied by values.
    k_BHPK, v_BHPK = (
        part_SHPK[:, :, :reach].index_select(0, slots_B).to(wide).masked_fill_(~known_B11P.mT, 0) for part_SHPK in cache
    )
    attended = F.scaled_dot_product_attention(q_BHK[:, :, None].to(wide), k_BHPK, v_BHPK, attn_mask=known_B11P)
    return attended.flatten(1).to(qkv_BC.dtype)


def _attend_in_cpp(
    qkv: Sequence[torch.Tensor],
    keys_SHPK: torch.Tensor,
    values_SHPK: torch.Tensor,
    slots_B: torch.Tensor,
    lengths_B: torch.Tensor,
    level: str,
) -> torch.Tensor:
    product = Product.of(list(qkv))
    B, C = product.values_NO.shape
    out_BD = torch.empty((B, C // 3), dtype=product.dtype)
    module().cached_attention(
        product_arrays(product),
        array(keys_SHPK),
        array(values_SHPK),
        array(slots_B),
        array(lengths_B),
        level,
        torch.get_num_threads(),
        array(out_BD),
    )
    return out_BD


_cached_attention = Operator("protnest::cached_attention", _attend_in_cpp, mutates=("keys_SHPK", "values_SHPK"))


@_cached_attention.register_fake
def _(qkv: Sequence[torch.Tensor], *_: object) -> torch.Tensor:
    product = Product.of(list(qkv))
    B, C = product.values_NO.shape
    return product.values_NO.new_empty((B, C // 3), dtype=product.dtype)


def _why_not_cpu(qkv: Product, cache: KeyValueCache) -> str | None:
    if cache.keys_SHPK.shape[3] % _HEAD_WIDTHS:
        return f"the head width is {cache.keys_SHPK.shape[3]}, no multiple of {_HEAD_WIDTHS}"
    if cache.keys_SHPK.dtype not in (torch.float32, torch.bfloat16):
        return f"the cache is of {cache.keys_SHPK.dtype}, not fp32 or bf16"
    if not all(part.is_contiguous() for part in cache):
        return "the cache is not contiguous"
    return why_not_cpu(qkv)


def _choose(qkv: Product, cache: KeyValueCache, impl: str) -> str:
    if impl not in IMPLS:
        message = f"impl is {impl!r}; allowed: {', '.join(IMPLS)}"
        raise ValueError(message)
    if impl not in ("auto", "cpu"):
        return impl
    reason = _why_not_cpu(qkv, cache)
    if impl == "auto":
        choice = "cpu" if reason is None else "torch"
        _log_choice(choice, reason)
        return choice
    if reason is not None:
        message = f"impl='cpu' cannot run here: {reason}"
        raise RuntimeError(message)
    return impl


@functools.cache
def _log_choice(choice: str, reason: str | None) -> None:
    _logger.info("cached_attention: auto runs %s%s", choice, f": {reason}" if reason else "")


def _check_cache(qkv: Product, cache: KeyValueCache, slots_B: torch.Tensor) -> None:
    keys_SHPK, values_SHPK = cache
    alike = keys_SHPK.shape == values_SHPK.shape and keys_SHPK.dtype == values_SHPK.dtype
    if not alike or keys_SHPK.dim() != 4 or not keys_SHPK.is_floating_point():
        message = (
            f"keys and values must share one shape (S, H, P, K) and a floating dtype, got {tuple(keys_SHPK.shape)} of "
            f"{keys_SHPK.dtype} and {tuple(values_SHPK.shape)} of {values_SHPK.dtype}"
        )
        raise ValueError(message)
    _, H, _, K = keys_SHPK.shape
    check_product(qkv, 3 * H * K)
    device = keys_SHPK.device
    if any(tensor.device != device for tensor in (*qkv.tensors(), values_SHPK, slots_B)):
        devices = sorted({str(tensor.device) for tensor in (*qkv.tensors(), *cache, slots_B)})
        message = f"qkv, cache and slots must be on one device, got {', '.join(devices)}"
        raise ValueError(message)
    if wants_gradients(*qkv.tensors(), *cache):
        message = "gradients are asked for, and a cache has none: run under torch.inference_mode()"
        raise RuntimeError(message)


def check_slots(slots: Sequence[int], lengths: Sequence[int], cache: KeyValueCache) -> None:
    """Raises ValueError where a sequence's slot is not there or taken, or its next token has no place."""
    S, _, P, _ = cache.keys_SHPK.shape
    owners: dict[int, int] = {}
    for b, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        if not 0 <= slot < S or not 0 <= length < P:
            message = f"sequence {b}: place {length} of slot {slot}, but there are {P} places of {S} slots"
            raise ValueError(message)
        if owners.setdefault(slot, b) != b:
            message = f"sequences {owners[slot]} and {b} share slot {slot}"
            raise ValueError(message)


def cached_attention(
    qkv: torch.Tensor | Product,
    cache: KeyValueCache,
    slots_B: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Puts each sequence's new key and value into the cache, and attends to all that it then has there.

    Args:
        qkv: (B, 3 H K), queries of all heads, then keys, then values; any floating dtype, or a product.
        cache: (S, H, P, K) each, of a dtype of its own; written at place `lengths_B` of each slot.
        slots_B: int64 (B,), which slot is each sequence's; no two alike. In any order, and not all need be used.
        lengths_B: int64 (B,), how many of its tokens are there already, 0 to P - 1.
        impl: "auto", "reference", "torch" or "cpu"; a named one runs or raises.

    All tensors are on one device. On a GPU slots and lengths stay there unread: wrong ones are not noticed.

    Returns:
        (B, H K) of the dtype of qkv's numbers.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a slot is not there or taken twice, a slot has no place left, or
            `impl` is unknown.
        RuntimeError: the named implementation cannot run on these tensors, or gradients are asked for.
    """
    if isinstance(qkv, torch.Tensor):
        qkv = Product(qkv)
    _check_cache(qkv, cache, slots_B)
    shape = qkv.values_NO.shape[:1]
    if any(index.shape != shape or index.dtype != torch.int64 for index in (slots_B, lengths_B)):
        found = ", ".join(f"{index.dtype} {tuple(index.shape)}" for index in (slots_B, lengths_B))
        message = f"slots and lengths must be int64 {tuple(shape)}, got {found}"
        raise ValueError(message)
    if lengths_B.device != slots_B.device:
        message = f"lengths are on {lengths_B.device}, slots on {slots_B.device}"
        raise ValueError(message)
    chosen = _choose(qkv, cache, impl)
    if chosen == "cpu":  # which checks slots and lengths itself
        out_BD: torch.Tensor = _cached_attention(qkv.tensors(), *cache, slots_B, lengths_B, cpu_level())
        return out_BD
    if slots_B.device.type == "cpu":
        check_slots(slots_B.tolist(), lengths_B.tolist(), cache)
    attend = cached_attention_reference if chosen == "reference" else _padded
    return attend(qkv.numbers(), cache, slots_B, lengths_B)


def cache_prompts(
    qkv: torch.Tensor | Product,
    cache: KeyValueCache,
    slots_B: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths_B: Sequence[int],
) -> None:
    """Puts the keys and values of whole packed sequences into their slots, from place 0 on.

    Args:
        qkv: (T, 3 H K), as `cached_attention` takes it.
        cache: (S, H, P, K) each; written.
        slots_B: int64 (B,), which slot is each sequence's; no two alike.
        cu_seqlens: int32 (B + 1,), from 0 to T.
        lengths_B: the B differences of `cu_seqlens`, on the host, up to P.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the lengths do not add up to T, a slot is not there or taken
            twice, or a sequence is longer than P.
        RuntimeError: gradients are asked for.
    """
    if isinstance(qkv, torch.Tensor):
        qkv = Product(qkv)
    _check_cache(qkv, cache, slots_B)
    T, B = qkv.values_NO.shape[0], len(lengths_B)
    if sum(lengths_B) != T or cu_seqlens.shape != (B + 1,) or slots_B.shape != (B,) or slots_B.dtype != torch.int64:
        message = (
            f"{B} lengths adding up to {sum(lengths_B)}, cu_seqlens of shape {tuple(cu_seqlens.shape)} and slots "
            f"{slots_B.dtype} {tuple(slots_B.shape)} do not describe {T} tokens"
        )
        raise ValueError(message)
    slots = slots_B.tolist() if slots_B.device.type == "cpu" else [*range(B)]
    check_slots(slots, [max(length - 1, 0) for length in lengths_B], cache)
    ends = cu_seqlens.long()
    counts_B = ends.diff()
    slots_T, begins_T = (x_B.repeat_interleave(counts_B, output_size=T) for x_B in (slots_B, ends[:-1]))
    places_T = torch.arange(T, device=slots_B.device) - begins_T
    _, H, _, K = cache.keys_SHPK.shape
    qkv_T3HK = qkv.numbers().view(T, 3, H, K)
    for part, stored_SHPK in enumerate(cache, start=1):
        stored_SHPK[slots_T, :, places_T] = qkv_T3HK[:, part].to(stored_SHPK.dtype)
