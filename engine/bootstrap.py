"""Bootstrap: rows drawn with replacement, and percentile intervals of what they give.

The same count and seed always draw the same rows, so that what is computed from them is paired.

Shapes: N rows, S bootstrap samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .ranking import spearman

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def draws(rows: int, *, samples: int = 1000, seed: int = 0) -> Iterator[Integers]:
    """Which rows each sample holds: int64 (N,), from 0 to N - 1, with replacement."""
    rng = np.random.default_rng(seed)
    for _ in itertools.repeat(None, samples):
        yield rng.integers(rows, size=rows)


def repeats(rows: int, *, samples: int = 1000, seed: int = 0) -> Iterator[Integers]:
    """How often each row was drawn: int64 (N,), adding up to N; the samples are those of `draws`."""
    for drawn_N in draws(rows, samples=samples, seed=seed):
        yield np.bincount(drawn_N, minlength=rows)


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


def bootstrap_spearman(one_N: Floats, other_N: Floats, *, samples: int = 1000, seed: int = 0) -> Floats:
    """`spearman` over examples drawn with replacement, the same ones for the same N and seed: fp64 (S,)."""
    return np.array(
        [spearman(one_N[rows_N], other_N[rows_N]) for rows_N in draws(len(one_N), samples=samples, seed=seed)]
    )
