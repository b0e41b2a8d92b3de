"""How far two sets of sequences are apart in length: the 1-Wasserstein distance, in residues.

It is the least number of residues that an average sequence must grow or shrink by for one set's lengths to become the
other's: the area between the two cumulative distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.bootstrap import repeats
from .estimate import Estimate, estimate

Integers = npt.NDArray[np.int64]

_CHANCE_SAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class LengthDistance:
    """Lengths of a set of sequences beside a reference's.

    Attributes:
        wasserstein: in residues; interval over both sets' sequences, n the smaller set's.
        by_chance: the 95 % quantile of what two sets of these sizes have that are dealt from one heap.
        generated, reference: mean lengths, in residues.
    """

    wasserstein: Estimate
    by_chance: float
    generated: float
    reference: float


def wasserstein(ours: Integers, theirs: Integers) -> float:
    """1-Wasserstein distance between two sets of lengths, neither of them empty."""
    return _area(np.bincount(ours), np.bincount(theirs))


def _area(ours: Integers, theirs: Integers) -> float:
    """Between the cumulative distributions of counts by length."""
    size = max(len(ours), len(theirs))
    ours, theirs = (np.pad(each, (0, size - len(each))).cumsum() for each in (ours, theirs))
    return float(np.abs(ours / ours[-1] - theirs / theirs[-1]).sum())


def length_distance(
    generated: Sequence[str], reference: Sequence[str], *, samples: int = 1000, seed: int = 0
) -> LengthDistance:
    """Holds one set's lengths against another's; arguments as `composition.composition`."""
    ours, theirs = (np.array([len(each) for each in some], dtype=np.int64) for some in (generated, reference))
    drawn = zip(
        repeats(len(ours), samples=samples, seed=seed),
        repeats(len(theirs), samples=samples, seed=seed + 1),
        strict=True,
    )
    values_S = [wasserstein(np.repeat(ours, one), np.repeat(theirs, other)) for one, other in drawn]
    heap, rng = np.concatenate((ours, theirs)), np.random.default_rng((seed, 2))
    dealt = []
    for _ in range(_CHANCE_SAMPLES):
        order = rng.permutation(len(heap))
        dealt.append(wasserstein(heap[order[: len(ours)]], heap[order[len(ours) :]]))
    return LengthDistance(
        wasserstein=estimate(wasserstein(ours, theirs), np.array(values_S), min(len(ours), len(theirs))),
        by_chance=float(np.quantile(dealt, 0.95)),
        generated=float(ours.mean()),
        reference=float(theirs.mean()),
    )
