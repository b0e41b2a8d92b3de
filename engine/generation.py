"""Generating proteins: many sequences at a time, each leaving when it is done while the next one takes its slot.

A prompt is run once; its keys and values are copied into each slot. From then on a step runs one token of every running
sequence, whatever their lengths. Limits of length are kept by forbidding tokens, not by throwing sequences away: no end
before the least residues, no token that would go beyond the most, and the end once they are reached.

Shapes: B running sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.cached_attention import KeyValueCache, cache_prompts, cached_attention
from ..kernels.product import Product
from ..kernels.varlen_attention import varlen_attention
from .alphabet import RESIDUES
from .decoder import Decoder, pack_ids
from .errors import InputError
from .fasta import clean_sequence
from .sampling import SamplingOptions, choose, next_probabilities, uniform_numbers

DEFAULT_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What is generated.

    Attributes:
        min_residues, max_residues: length of each sequence, the prompt's residues counted; None for no upper limit but
            the model's places.
        prompt: residues that each sequence begins with.
        context: whole sequences that stand before, to condition on, and are no part of what is generated.
        seed: of the random numbers, from 0.
        batch: most sequences that run at a time.
        sampling: how tokens are chosen.
    """

    min_residues: int = 1
    max_residues: int | None = None
    prompt: str = ""
    context: tuple[str, ...] = ()
    seed: int = 0
    batch: int = DEFAULT_BATCH
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True, kw_only=True)
class Design:
    """A generated protein.

    Attributes:
        number: from 0; with the seed it decides the sequence.
        sequence: letters, the prompt's among them; X for those that are no residues.
        tokens: that were sampled, the end among them.
        log_likelihood: of these tokens under the model as it is, without penalty, limits or temperature; in nats.
        ended: the model ended it; else it ran out of places.
        strange: letters that are no residues.
    """

    number: int
    sequence: str
    tokens: int
    log_likelihood: float
    ended: bool
    strange: int

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(-self.log_likelihood / self.tokens)

    @property
    def residue_perplexity(self) -> float:
        """Per residue; infinite without residues."""
        return math.exp(-self.log_likelihood / len(self.sequence)) if self.sequence else math.inf


@dataclass(eq=False)
class _Running:
    """A sequence on its way.

    Attributes:
        number, slot: as given.
        ids: its tokens, the prompt's among them.
        residues: that they stand for, what is no residue counted.
        uniform: its random numbers.
    """

    number: int
    slot: int
    ids: list[int]
    residues: int
    uniform: np.ndarray[tuple[int], np.dtype[np.float64]]
    log_likelihood: float = 0.0


class Generator:
    """Generates sequences with one decoder.

    Args:
        decoder: any precision, any device.
        options: what is generated.

    Raises:
        InputError: limits that no sequence can meet, a prompt that is no protein or longer than the model's places, or
            a batch that is not positive.
    """

    def __init__(self, decoder: Decoder, options: GenerationOptions) -> None:
        self.decoder = decoder
        self.options = options
        vocabulary = decoder.vocabulary
        prompt = clean_sequence(options.prompt) if options.prompt else ""
        context = [vocabulary.encode(clean_sequence(each)) for each in options.context]
        self._prompt = np.concatenate([*context, vocabulary.encode(prompt, whole=False)])
        self._prompt_text = prompt
        # What is no residue takes up room in a sequence, too.
        letters = [len(vocabulary.decode(np.array([token]))) for token in range(vocabulary.size)]
        self._letters_V = torch.tensor(letters)
        self._most_in_token = max(letters)
        self._never_V = self._find_never()
        self._has_never = bool(self._never_V.any())
        self._check()

    def _check(self) -> None:
        options, places = self.options, self.decoder.config.places
        room = places - len(self._prompt)
        if options.batch < 1:
            message = f"batch is {options.batch}, expected at least 1"
            raise InputError(message)
        if options.seed < 0:
            message = f"seed is {options.seed}, expected at least 0"
            raise InputError(message)
        if room < 1:
            message = (
                f"the prompt and its context take {len(self._prompt)} tokens of the {places} that "
                f"{self.decoder.name} has places for"
            )
            raise InputError(message)
        most = math.inf if options.max_residues is None else options.max_residues
        if not 1 <= options.min_residues <= most:
            message = f"residues from {options.min_residues} to {options.max_residues}: no length meets that"
            raise InputError(message)
        if len(self._prompt_text) > most:
            message = f"the prompt has {len(self._prompt_text)} residues already, more than the most, {most}"
            raise InputError(message)
        within = len(self._prompt_text) + room * self._most_in_token
        if options.min_residues > within:
            message = (
                f"{options.min_residues} residues do not fit into the {places} tokens of {self.decoder.name}, which "
                f"stand for {within} at most"
            )
            raise InputError(message)

    @torch.inference_mode()
    def run(
        self, count: int, *, first: int = 0, after_step: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[Design]:
        """Yields the sequences `first` to `first + count - 1` in the order of their numbers.

        Args:
            count: how many.
            first: number of the first one.
            after_step: called with the tokens that have just been sampled.
        """
        slots = min(self.options.batch, count)
        if not slots:
            return
        caches = self._caches(slots)
        free = list(range(slots))
        running: list[_Running] = []
        done: dict[int, Design] = {}
        following, wanted = first, first
        while wanted < first + count:
            while free and following < first + count:
                running.append(self._start(following, free.pop(0), caches, slots))
                following += 1
            caches = self._step(running, caches)
            after_step(len(running))
            for each in [each for each in running if self._is_done(each)]:
                running.remove(each)
                free.append(each.slot)
                done[each.number] = self._design(each)
            while wanted in done:
                yield done.pop(wanted)
                wanted += 1

    def _caches(self, slots: int) -> list[KeyValueCache]:
        """A cache a layer, with a slot more that holds the prompt but for its last token."""
        config, decoder = self.decoder.config, self.decoder
        dtype = torch.bfloat16 if decoder.product_dtype == torch.bfloat16 else torch.float32
        places = min(config.places, 2 * len(self._prompt) + 64)
        caches = [
            KeyValueCache.empty(slots + 1, config.heads, places, config.head_width, dtype=dtype, device=decoder.device)
            for _ in range(config.layers)
        ]
        if len(self._prompt) > 1:
            batch = pack_ids([self._prompt[:-1]]).to(decoder.device)
            T, slot = len(self._prompt) - 1, torch.tensor([slots], device=decoder.device)

            def attend(layer: int, qkv: Product) -> torch.Tensor:
                qkv_TC = qkv.numbers()
                cache_prompts(qkv_TC, caches[layer], slot, batch.cu_seqlens, batch.lengths_B)
                q, k, v = qkv_TC.view(T, 3 * config.heads, config.head_width).chunk(3, dim=1)
                return varlen_attention(q, k, v, batch.cu_seqlens, batch.lengths_B, causal=True).flatten(1)

            decoder.run(batch.tokens_T, torch.arange(T, device=decoder.device), attend)
        return caches

    def _start(self, number: int, slot: int, caches: list[KeyValueCache], prompt_slot: int) -> _Running:
        before = len(self._prompt) - 1
        for cache in caches:
            for part_SHPK in cache:
                part_SHPK[slot, :, :before] = part_SHPK[prompt_slot, :, :before]
        numbers = uniform_numbers(self.options.seed, number, self.decoder.config.places)
        return _Running(number, slot, self._prompt.tolist(), len(self._prompt_text), numbers)

    def _step(self, running: list[_Running], caches: list[KeyValueCache]) -> list[KeyValueCache]:
        device = self.decoder.device
        lengths = [len(each.ids) - 1 for each in running]
        caches = [cache.grown(min(self.decoder.config.places, max(lengths) + 1)) for cache in caches]
        tokens_B = torch.tensor([each.ids[-1] for each in running], device=device)
        slots_B = torch.tensor([each.slot for each in running], device=device)
        lengths_B = torch.tensor(lengths, device=device)

        def attend(layer: int, qkv: Product) -> torch.Tensor:
            return cached_attention(qkv, caches[layer], slots_B, lengths_B)

        logits_BV = self.decoder.logits(self.decoder.run(tokens_B, lengths_B, attend)).float()
        longest = max(lengths) + 1
        seen_BT = torch.tensor(
            [each.ids + each.ids[-1:] * (longest - len(each.ids)) for each in running], device=device
        )
        forbidden = [self._forbidden(each) for each in running]
        ids_BK, p_BK = next_probabilities(logits_BV, seen_BT, forbidden, self.options.sampling)
        uniform = [each.uniform[len(each.ids)] for each in running]
        chosen_B = choose(ids_BK, p_BK, torch.tensor(uniform, dtype=torch.float64, device=device))
        picked_B = logits_BV.gather(1, chosen_B[:, None])[:, 0].double() - logits_BV.logsumexp(dim=1).double()
        for each, token, nats in zip(running, chosen_B.tolist(), picked_B.tolist(), strict=True):
            each.ids.append(token)
            each.log_likelihood += nats
            if token != self.decoder.vocabulary.end:
                each.residues += int(self._letters_V[token])
        return caches

    def _forbidden(self, each: _Running) -> torch.Tensor | None:
        """Tokens that limits forbid; None where they forbid none."""
        options, end = self.options, self.decoder.vocabulary.end
        left = math.inf if options.max_residues is None else options.max_residues - each.residues
        if left >= self._most_in_token and each.residues >= options.min_residues and not self._has_never:
            return None
        mask_V = self._never_V.clone()
        if left < self._most_in_token:
            # Once there is no room left the end is all that remains: line breaks could go on for ever.
            mask_V |= self._letters_V > left if left > 0 else torch.ones_like(mask_V)
        mask_V[end] = each.residues < options.min_residues
        return mask_V.to(self.decoder.device)

    def _find_never(self) -> torch.Tensor:
        """Special tokens beside the end: of a vocabulary of residues, those that stand for none."""
        never_V = torch.zeros(len(self._letters_V), dtype=torch.bool)
        if self._most_in_token == 1:
            never_V |= self._letters_V == 0
            never_V[self.decoder.vocabulary.end] = False
        return never_V

    def _is_done(self, each: _Running) -> bool:
        return each.ids[-1] == self.decoder.vocabulary.end or len(each.ids) >= self.decoder.config.places

    def _design(self, each: _Running) -> Design:
        sampled = np.array(each.ids[len(self._prompt) :])
        vocabulary = self.decoder.vocabulary
        text = vocabulary.decode(sampled)
        residues = "".join(letter if letter in RESIDUES else "X" for letter in text)
        return Design(
            number=each.number,
            sequence=self._prompt_text + residues,
            tokens=len(sampled),
            log_likelihood=each.log_likelihood,
            ended=each.ids[-1] == vocabulary.end,
            strange=sum(letter not in RESIDUES for letter in text),
        )
