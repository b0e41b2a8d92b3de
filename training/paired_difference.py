"""One representation's score beside another's, with an interval that is paired: the same draws for both.

Shapes: S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.bootstrap import finite, interval
from .representation import Representation

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Against:
    """A representation's score minus another's.

    Attributes:
        representation, model: the other.
        difference, low, high: with a paired 95 % bootstrap interval; None where it is not defined.
    """

    representation: str
    model: str
    difference: float | None
    low: float | None
    high: float | None


def held_against(
    listed: Sequence[Representation],
    place: int,
    others: Sequence[int],
    scores: Sequence[float],
    samples: Sequence[Floats],
) -> tuple[Against, ...]:
    """The representation at `place` beside each of `others`.

    Args:
        listed: representations.
        place, others: of `listed`.
        scores: one for each.
        samples: bootstrapped scores (S,) of each, from the same draws.
    """
    out = []
    for other in others:
        low, high = interval(samples[place] - samples[other])
        out.append(
            Against(
                representation=listed[other].kind,
                model=listed[other].model,
                difference=finite(scores[place] - scores[other]),
                low=finite(low),
                high=finite(high),
            )
        )
    return tuple(out)
