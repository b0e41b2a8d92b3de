"""How unlike each other designed sequences are: mean of 1 - identity over pairs, and how many are duplicates.

Shapes: G designs, P pairs, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.bootstrap import repeats
from .estimate import Estimate, estimate
from .follower import NOBODY, Follower
from .identity import mutual_identity

PAIRS = 2000
"""Most pairs that are aligned: about a second of one core."""


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """G designs among themselves.

    Attributes:
        distance: mean of 1 - `identity.mutual_identity` over pairs; the interval draws designs, not pairs, since a
            design's pairs are alike. None for a single design.
        pairs: how many were aligned.
        distinct: different sequences.
        duplicates: designs that repeat an earlier one.
    """

    distance: Estimate
    pairs: int
    distinct: int
    duplicates: int


def diversity(
    generated: Sequence[str],
    *,
    pairs: int = PAIRS,
    samples: int = 1000,
    seed: int = 0,
    follower: Follower = NOBODY,
) -> Diversity:
    """Aligns pairs of designs with each other, all of them or so many drawn at random.

    Args:
        generated: designs.
        pairs: most that are aligned.
        samples, seed: of the bootstrap over designs, and of the draw.
        follower: is told how far the alignments are: of each pair, the first one's residues.

    Raises:
        InputError: parasail is not installed.
    """
    one_P, other_P = draw_pairs(len(generated), pairs, seed=seed)
    follower.stage(f"{len(one_P):,} pairs of designs", sum(len(generated[place]) for place in one_P))
    distance_P = np.empty(len(one_P), dtype=np.float64)
    for row, (i, j) in enumerate(zip(one_P, other_P, strict=True)):
        distance_P[row] = 1 - mutual_identity(generated[i], generated[j])
        follower.advance(len(generated[i]))
    value = float(distance_P.mean()) if len(distance_P) else float("nan")
    drawn = [_weighted(distance_P, times_G[one_P] * times_G[other_P]) for times_G in _draws(generated, samples, seed)]
    distinct = len(set(generated))
    return Diversity(
        distance=estimate(value, np.array(drawn), len(generated)),
        pairs=len(distance_P),
        distinct=distinct,
        duplicates=len(generated) - distinct,
    )


def _draws(generated: Sequence[str], samples: int, seed: int) -> list[npt.NDArray[np.int64]]:
    return list(repeats(len(generated), samples=samples, seed=seed))


def _weighted(values_P: npt.NDArray[np.float64], weight_P: npt.NDArray[np.int64]) -> float:
    total = int(weight_P.sum())
    return float(values_P @ weight_P) / total if total else float("nan")


def draw_pairs(count: int, most: int, *, seed: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Different pairs i < j of `count` things, all of them or `most` at random: two int64 arrays (P,)."""
    total = count * (count - 1) // 2
    if total <= most:
        one_P, other_P = np.triu_indices(count, k=1)
        return one_P.astype(np.int64), other_P.astype(np.int64)
    rng, chosen = np.random.default_rng((seed, 3)), np.empty(0, dtype=np.int64)
    while len(chosen) < most:
        # Drawn as i * count + j: a list of all pairs would not be bounded.
        one, other = rng.integers(count, size=(2, 2 * most))
        numbers = np.minimum(one, other)[one != other] * count + np.maximum(one, other)[one != other]
        chosen = np.unique(np.concatenate((chosen, numbers)))
    chosen = rng.permutation(chosen)[:most]
    return chosen // count, chosen % count
