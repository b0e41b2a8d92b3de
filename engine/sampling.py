"""How the next token is chosen, and by which random numbers; `kernels.next_token` does it.

Each sequence has random numbers of its own, from a counter-based generator (Philox, Salmon et al. 2011) keyed by seed
and sequence: they depend neither on the batch nor on its other sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.next_token import Filters
from .errors import InputError


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

    def filters(self) -> Filters:
        """As the kernel takes them."""
        return Filters(self.temperature, self.top_k, self.top_p, self.repetition_penalty)


def uniform_numbers(seed: int, sequence: int, count: int) -> npt.NDArray[np.float64]:
    """The random numbers of a sequence, float64 (count,): the same ones for a seed and a number, whatever else runs."""
    key = np.array([seed, sequence], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
