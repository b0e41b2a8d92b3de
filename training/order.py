"""Which sequences a training step gets: shuffled epoch after epoch, cut into batches of a token budget.

Shapes: B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .streams import Stream, stream

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Position:
    """The next batch of a run: its epoch, and its place among the epoch's batches."""

    epoch: int = 0
    place: int = 0


@dataclass(frozen=True, eq=False)
class Portion:
    """What one forward pass gets.

    Attributes:
        index_B: int64 (B,), numbers of the sequences.
        epoch: in which they come, from 0.
        step: optimiser step that they belong to, from 0.
        part: place among the portions of that step, those of all processes counted, from 0.
    """

    index_B: Index
    epoch: int
    step: int
    part: int


class BatchOrder:
    """The batches of a run, a function of its arguments alone.

    Args:
        lengths_B: int64 (B,), tokens that each sequence takes.
        batch_tokens: most tokens in a batch; a longer sequence has a batch of its own.
        seed: of the shuffles.
    """

    def __init__(self, lengths_B: Index, batch_tokens: int, *, seed: int) -> None:
        self._lengths_B = lengths_B
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._kept: tuple[int, list[Index]] | None = None

    def batches(self, epoch: int) -> list[Index]:
        """The batches of one epoch, each the numbers of its sequences."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, self._cut(stream(self._seed, Stream.ORDER, epoch).permutation(len(self._lengths_B))))
        return self._kept[1]

    def _cut(self, order: Index) -> list[Index]:
        ends = np.cumsum(self._lengths_B[order])
        cuts, filled = [0], 0
        while cuts[-1] < len(order):
            begin = cuts[-1]
            cuts.append(max(begin + 1, int(np.searchsorted(ends, filled + self._batch_tokens, side="right"))))
            filled = int(ends[cuts[-1] - 1])
        return np.split(order, cuts[1:-1])

    def walk(self, position: Position) -> Iterator[tuple[Index, int, Position]]:
        """Batches without end from `position` on: numbers of the sequences, their epoch, and the position after it."""
        epoch, place = position.epoch, position.place
        while True:
            batches = self.batches(epoch)
            if place >= len(batches):
                epoch, place = epoch + 1, 0
                continue
            place += 1
            yield batches[place - 1], epoch, Position(epoch, place)

    def steps_of(self, epochs: int, *, batches_a_step: int) -> int:
        """Optimiser steps that so many epochs take; the last one may reach into the next epoch."""
        batches = sum(len(self.batches(epoch)) for epoch in range(epochs))
        return -(-batches // batches_a_step)

    def used(self, steps: int, *, batches_a_step: int) -> list[Index]:
        """By epoch, the numbers of the sequences that so many optimiser steps show, in the order in which they do."""
        left, epochs = steps * batches_a_step, list[Index]()
        while left > 0:
            batches = self.batches(len(epochs))[:left]
            left -= len(batches)
            epochs.append(np.concatenate(batches))
        return epochs
