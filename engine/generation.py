"""Generating proteins: many sequences at a time, each leaving when it is done while the next one takes its slot.

A prompt is run once; its keys and values are copied into each slot. From then on a step runs one token of every running
sequence, whatever their lengths. Limits of length are kept by forbidding tokens, not by throwing sequences away: no end
before the least residues, no token that would go beyond the most, and the end once they are reached.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from .alphabet import RESIDUES
from .decode_step import DecodeStep, Turn
from .decoder import Decoder
from .errors import InputError
from .fasta import clean_sequence
from .sampling import SamplingOptions, uniform_numbers

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
        self._letters_V = vocabulary.letters_V
        self._most_in_token = int(self._letters_V.max())
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

        Raises:
            InputError: the model gives logits that are no numbers.
        """
        slots = min(self.options.batch, count)
        if not slots:
            return
        step = DecodeStep(self.decoder, slots, self.options.sampling.filters())
        step.read_prompt(self._prompt)
        free = list(range(slots))
        running: list[_Running] = []
        done: dict[int, Design] = {}
        following, wanted = first, first
        while wanted < first + count:
            while free and following < first + count:
                running.append(self._start(following, free.pop(0)))
                step.begin(running[-1].slot, len(self._prompt))
                following += 1
            self._advance(running, *step.run([self._turn(each) for each in running]))
            after_step(len(running))
            for each in [each for each in running if self._is_done(each)]:
                running.remove(each)
                free.append(each.slot)
                done[each.number] = self._design(each)
            while wanted in done:
                yield done.pop(wanted)
                wanted += 1

    def _start(self, number: int, slot: int) -> _Running:
        uniform = uniform_numbers(self.options.seed, number, self.decoder.config.places)
        return _Running(number, slot, self._prompt.tolist(), len(self._prompt_text), uniform)

    def _turn(self, each: _Running) -> Turn:
        options, length = self.options, len(each.ids)
        most = (
            self.decoder.config.places * self._most_in_token if options.max_residues is None else options.max_residues
        )
        return Turn(
            slot=each.slot,
            token=each.ids[-1],
            length=length - 1,
            room=most - each.residues,
            may_end=each.residues >= options.min_residues,
            uniform=each.uniform[length],
        )

    def _advance(self, running: list[_Running], chosen: list[int], nats: list[float]) -> None:
        for each, token, log_p in zip(running, chosen, nats, strict=True):
            if math.isnan(log_p):
                message = (
                    f"{self.decoder.name} gives logits that are no numbers at token {len(each.ids)} of sequence "
                    f"{each.number}, in {self.decoder.precision}"
                )
                raise InputError(message)
            each.ids.append(token)
            each.log_likelihood += log_p
            if token != self.decoder.vocabulary.end:
                each.residues += int(self._letters_V[token])

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
