"""Random numbers of a training run: each purpose has a stream of its own, and each place in it numbers of its own.

Everything that is drawn follows from (seed, stream, place), never from what was drawn before: so a run that goes on
from a checkpoint draws what an uninterrupted one does. NumPy pads short keys with zeros, so that (seed, 1) and
(seed, 1, 0) are one: purposes must differ in the number that follows the seed.
"""

from __future__ import annotations

import enum

import numpy as np

LARGEST_SEED = 2**32 - 1
"""Beyond it NumPy makes two words of a seed, which shifts all that follows it in the key."""


class Stream(enum.IntEnum):
    """What is drawn, and what its places are."""

    ORDER = 1
    """Which sequence comes when; place: epoch."""
    MASKS = 2
    """Where a sequence is cropped and what of it is hidden; place: sequence, epoch."""
    TORCH = 3
    """What modules draw while they run, such as dropout; place: step, part."""
    WEIGHTS = 4
    """Fresh weights; no place."""


def stream(seed: int, purpose: Stream, *place: int) -> np.random.Generator:
    """The generator of one place of a stream."""
    return np.random.default_rng((seed, int(purpose), *place))


def torch_seed(seed: int, purpose: Stream, *place: int) -> int:
    """A seed for torch, for one place of a stream."""
    return int(stream(seed, purpose, *place).integers(2**63))
