"""A step of generation: one token of each running sequence through the decoder, and the next one chosen.

On a GPU the step is captured in a CUDA graph for all slots at once, whose kernels are far shorter than the host takes
to launch them; slots without a sequence run along and nobody looks at them. A graph reads a fixed number of places of
the cache, of which there are steps of powers of two. Its first replay is held against the eager step, and where they
differ, or it cannot be captured, all steps run eagerly, with the reason in the log.

Shapes: B running sequences, S slots, V vocabulary, P places.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.cached_attention import KeyValueCache, cache_prompts, cached_attention
from ..kernels.next_token import NEVER, Filters, Limits, next_token
from ..kernels.product import Product
from ..kernels.varlen_attention import varlen_attention
from .decoder import Decoder, pack_ids
from .graphs import SWITCH
from .transfer import to_device
from .vocabulary import Ids, Vocabulary

_logger = logging.getLogger(__name__)
_FEWEST_PLACES = 64
# Log probabilities of two runs that add up in another order; choices are held against each other exactly.
_MOST_ERROR = 0.05


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a step needs to know of a sequence.

    Attributes:
        slot: which is its own.
        token: its last.
        length: tokens before that one.
        room: residues that it may still have.
        may_end: whether it has residues enough.
        uniform: random number, at least 0 and below 1.
    """

    slot: int
    token: int
    length: int
    room: int
    may_end: bool
    uniform: float


class _Inputs:
    """The columns of some turns, on the decoder's device."""

    def __init__(self, turns: Sequence[Turn], device: torch.device) -> None:
        self.integers = to_device(
            torch.tensor([[turn.slot, turn.token, turn.length, turn.room] for turn in turns]).T.contiguous(), device
        )
        self.may_end_B = to_device(torch.tensor([turn.may_end for turn in turns]), device)
        self.uniform_B = to_device(torch.tensor([turn.uniform for turn in turns], dtype=torch.float64), device)

    def clone(self) -> _Inputs:
        """The same numbers in memory of their own."""
        other = copy.copy(self)
        other.integers, other.may_end_B = self.integers.clone(), self.may_end_B.clone()
        other.uniform_B = self.uniform_B.clone()
        return other

    def copy_(self, other: _Inputs) -> None:
        """Takes over another's numbers."""
        self.integers.copy_(other.integers)
        self.may_end_B.copy_(other.may_end_B)
        self.uniform_B.copy_(other.uniform_B)


class DecodeStep:
    """Caches of some slots, and the step that all sequences in them take together.

    Args:
        decoder: any precision, any device.
        slots: S, most sequences that run at a time.
        filters: how tokens are chosen.
    """

    def __init__(self, decoder: Decoder, slots: int, filters: Filters) -> None:
        self.decoder = decoder
        self.slots = slots
        self.filters = filters
        device = decoder.device
        # A slot more holds what every sequence begins with.
        self._caches = self._empty_caches(_FEWEST_PLACES)
        self._seen_SV = torch.zeros((slots + 1, decoder.vocabulary.size), dtype=torch.bool, device=device)
        self._sizes_V = to_device(token_sizes(decoder.vocabulary), device)
        self._graphs: dict[int, _Graph] = {}
        self._captures = device.type == "cuda" and os.environ.get(SWITCH) != "0"

    @property
    def places(self) -> int:
        """P, tokens that the caches have room for."""
        return self._caches[0].keys_SHPK.shape[2]

    def _empty_caches(self, places: int) -> list[KeyValueCache]:
        config, decoder = self.decoder.config, self.decoder
        dtype = torch.bfloat16 if decoder.product_dtype == torch.bfloat16 else torch.float32
        shape = (self.slots + 1, config.heads, min(config.places, places), config.head_width)
        return [KeyValueCache.empty(*shape, dtype=dtype, device=decoder.device) for _ in range(config.layers)]

    def grow(self, places: int) -> None:
        """Makes room for so many tokens, where there is less."""
        if places <= self.places:
            return
        self._caches = [cache.grown(places, most=self.decoder.config.places) for cache in self._caches]
        # Graphs hold the caches that are no more.
        self._graphs.clear()

    def read_prompt(self, ids: Ids) -> None:
        """Runs what every sequence begins with, but for its last token, which the first step takes."""
        decoder, device, T = self.decoder, self.decoder.device, len(ids) - 1
        self.grow(len(ids))
        self._seen_SV[self.slots] = False
        self._seen_SV[self.slots, to_device(torch.from_numpy(ids), device)] = True
        if not T:
            return
        batch = pack_ids([ids[:-1]]).to(device)
        slot = torch.tensor([self.slots], device=device)
        heads, head_width = decoder.config.heads, decoder.config.head_width

        def attend(layer: int, qkv: Product) -> torch.Tensor:
            qkv_TC = qkv.numbers()
            cache_prompts(qkv_TC, self._caches[layer], slot, batch.cu_seqlens, batch.lengths_B)
            q, k, v = qkv_TC.view(T, 3 * heads, head_width).chunk(3, dim=1)
            return varlen_attention(q, k, v, batch.cu_seqlens, batch.lengths_B, causal=True).flatten(1)

        decoder.run(batch.tokens_T, torch.arange(T, device=device), attend)

    def begin(self, slot: int, prompt_tokens: int) -> None:
        """A new sequence takes a slot, with the prompt that was read."""
        before = prompt_tokens - 1
        for cache in self._caches:
            for part_SHPK in cache:
                part_SHPK[slot, :, :before] = part_SHPK[self.slots, :, :before]
        self._seen_SV[slot] = self._seen_SV[self.slots]

    def run(self, turns: Sequence[Turn]) -> tuple[list[int], list[float]]:
        """The token that each sequence takes next, and its log probability under the plain logits, in nats; NaN where
        these are not finite.

        Args:
            turns: of the running sequences, each in a slot of its own.
        """
        self.grow(max(turn.length for turn in turns) + 1)
        chosen_B, nats_B = self._captured(turns) if self._captures else self.take(_Inputs(turns, self.decoder.device))
        return chosen_B.tolist(), nats_B.tolist()

    def take(self, inputs: _Inputs, places: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The step itself, without waiting for a GPU: int64 (B,) and float64 (B,), as `run`.

        Args:
            inputs: columns of the turns.
            places: of the caches that are read at most; None for all.
        """
        slots_B, tokens_B, lengths_B, room_B = inputs.integers
        caches = self._caches if places is None else [cache.first(places) for cache in self._caches]

        def attend(layer: int, qkv: Product) -> torch.Tensor:
            return cached_attention(qkv, caches[layer], slots_B, lengths_B)

        logits = self.decoder.head_product(self.decoder.run(tokens_B, lengths_B, attend))
        limits = Limits(self._sizes_V, self.decoder.vocabulary.end, room_B, inputs.may_end_B)
        chosen_B, nats_B = next_token(logits, self._seen_SV, slots_B, limits, inputs.uniform_B, self.filters)
        self._seen_SV[slots_B, chosen_B] = True
        return chosen_B, nats_B

    def _captured(self, turns: Sequence[Turn]) -> tuple[torch.Tensor, torch.Tensor]:
        """The step of all slots, replayed; idle ones take the start token at their first place."""
        device, start = self.decoder.device, self.decoder.vocabulary.start
        idle = sorted(set(range(self.slots)) - {turn.slot for turn in turns})
        rest = [Turn(slot=slot, token=start, length=0, room=1, may_end=True, uniform=0.0) for slot in idle]
        inputs, B = _Inputs([*turns, *rest], device), len(turns)
        longest = max(turn.length for turn in turns) + 1
        places = min(self.places, max(_FEWEST_PLACES, 1 << (longest - 1).bit_length()))
        if places in self._graphs:
            chosen_B, nats_B = self._graphs[places].replay(inputs)
        else:
            seen_SV = self._seen_SV.clone()
            right = self.take(inputs, places)
            problem = self._capture(places, inputs, seen_SV, right)
            if problem is not None:
                _logger.warning("%s generates without CUDA graphs: %s", self.decoder.name, problem)
                self._graphs.clear()
                self._captures = False
            chosen_B, nats_B = right
        return chosen_B[:B], nats_B[:B]

    def _capture(
        self, places: int, inputs: _Inputs, seen_SV: torch.Tensor, right: tuple[torch.Tensor, torch.Tensor]
    ) -> str | None:
        """Makes a graph and has it repeat the step that was just run, to the same outcome; what went wrong, if
        anything did. The same step twice writes the same keys and values; tokens seen before it are given back."""
        after_SV = self._seen_SV.clone()
        try:
            graph = _Graph(self, inputs, places)
            self._seen_SV.copy_(seen_SV)
            chosen_B, nats_B = graph.replay(inputs)
        # Torch has no narrower class for what cannot be captured. Whatever ails the device itself, the eager run meets.
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        finally:
            self._seen_SV.copy_(after_SV)
        differ = int((chosen_B != right[0]).sum())
        worst = float((nats_B - right[1]).abs().max())
        if differ or not worst <= _MOST_ERROR:
            return f"a replay chose {differ} other tokens, with log probabilities {worst:.2g} away from the eager run"
        self._graphs[places] = graph
        return None


class _Graph:
    """One captured step, with the buffers that it reads and writes."""

    def __init__(self, step: DecodeStep, inputs: _Inputs, places: int) -> None:
        device = step.decoder.device
        self._static = inputs.clone()
        # Compiling and cuBLAS's workspaces must not happen while capturing.
        warm_up, stream = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
        warm_up.wait_stream(stream)
        with torch.cuda.stream(warm_up):
            step.take(self._static, places)
        stream.wait_stream(warm_up)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._chosen_S, self._nats_S = step.take(self._static, places)

    def replay(self, inputs: _Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The outcome for all slots: buffers that the next replay overwrites."""
        self._static.copy_(inputs)
        self._graph.replay()
        return self._chosen_S, self._nats_S


def token_sizes(vocabulary: Vocabulary) -> torch.Tensor:
    """How much of a sequence's room each token takes, int32 (V,): its letters, those that are no residues counted.

    Of a vocabulary of single residues, tokens without a letter are never chosen; of byte pairs, line breaks are.
    """
    sizes_V = vocabulary.letters_V.astype(np.int32)
    if sizes_V.max() == 1:
        sizes_V[sizes_V == 0] = NEVER
    return torch.from_numpy(sizes_V)
