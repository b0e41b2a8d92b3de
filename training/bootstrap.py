"""Percentile intervals of bootstrapped scores, and of their differences, which are paired: same draws for all.

Shapes: S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def interval(values_S: Floats, *, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the finite values; NaN where there are none."""
    values_S = values_S[np.isfinite(values_S)]
    if not values_S.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def finite(value: float) -> float | None:
    """None in the place of NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


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
