"""A figure with how sure it is: how many it rests on, and its 95 % interval.

Shapes: B sequences, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.bootstrap import finite, interval, repeats

Floats = npt.NDArray[np.float64]

_Z = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One figure.

    Attributes:
        value: None where it is not defined.
        low, high: 95 % interval; None where it is not defined, and for fewer than two to draw from.
        n: how many independent things it rests on: sequences, except where its place says otherwise.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def estimate(value: float, values_S: Floats, n: int) -> Estimate:
    """A value with the percentile interval of its bootstrap samples fp64 (S,), drawn from `n` things."""
    low, high = interval(values_S) if n > 1 and math.isfinite(value) else (math.nan, math.nan)
    return Estimate(value=finite(value), low=finite(low), high=finite(high), n=n)


def ratio(
    above_B: Floats,
    below_B: Floats,
    *,
    after: Callable[[float], float] = lambda value: value,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`after(sum of above / sum of below)`, with sequences drawn with replacement; undefined where a share is infinite.

    Args:
        above_B, below_B: fp64 (B,), each sequence's share in the two sums.
        after: applied to the quotient of the whole and of each sample.
        samples, seed: of the bootstrap.
    """

    def of(times_B: npt.NDArray[np.int64]) -> float:
        below = float(times_B @ below_B)
        return after(float(times_B @ above_B) / below) if below > 0 else math.nan

    B = len(above_B)
    if not np.isfinite(above_B).all():
        return Estimate(value=None, low=None, high=None, n=B)
    value = of(np.ones(B, dtype=np.int64))
    return estimate(value, np.array([of(times_B) for times_B in repeats(B, samples=samples, seed=seed)]), B)


def mean(values_B: Floats, *, samples: int = 1000, seed: int = 0) -> Estimate:
    """The plain mean of fp64 (B,), one value a sequence."""
    return ratio(values_B, np.ones(len(values_B)), samples=samples, seed=seed)


def share(hits: int, n: int) -> Estimate:
    """How many of `n` independent things are hits, with Wilson's interval, which none or all do not make empty.

    Source: Wilson, J. Am. Stat. Assoc. 22:209 (1927).
    """
    if n < 1:
        return Estimate(value=None, low=None, high=None, n=n)
    p, weight = hits / n, _Z * _Z / n
    middle = (p + weight / 2) / (1 + weight)
    reach = _Z * math.sqrt(p * (1 - p) / n + weight / (4 * n)) / (1 + weight)
    # At none and all the interval ends there, and rounding must not carry it beyond.
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return Estimate(value=p, low=0.0 if hits == 0 else low, high=1.0 if hits == n else high, n=n)


def exp(value: float) -> float:
    """e to that power; infinite where it is beyond what a float holds."""
    return math.exp(value) if value < math.log(np.finfo(np.float64).max) else math.inf
