"""Diversity: copies, strangers, pairs drawn, and intervals that know that pairs share designs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from protnest.engine.bootstrap import draws
from protnest.training.diversity import diversity, draw_pairs
from protnest.training.identity import mutual_identity

from support.predictors import Followed
from support.tiny import random_proteins

pytest.importorskip("parasail")

PROTEINS = random_proteins(12, seed=1)


def test_copies_have_none() -> None:
    found = diversity(["MKTAYIAKQR"] * 8, samples=20)
    assert (found.distance.value, found.distance.low, found.distance.high) == (0.0, 0.0, 0.0)
    assert (found.pairs, found.distinct, found.duplicates, found.distance.n) == (28, 1, 7, 8)


def test_all_pairs() -> None:
    seen = Followed()
    found = diversity(PROTEINS, samples=200, follower=seen)
    assert seen.stages == [("66 pairs of designs", sum(seen.told[0]))]
    assert len(seen.told[0]) == 66
    wanted = [1 - mutual_identity(one, other) for one, other in itertools.combinations(PROTEINS, 2)]
    assert found.distance.value == pytest.approx(np.mean(wanted))
    assert (found.pairs, found.distinct, found.duplicates) == (66, 12, 0)
    assert found.distance.low < found.distance.value < found.distance.high  # type: ignore[operator]


def test_intervals_draw_designs() -> None:
    """Each sample is a set of designs with repeats, whose pairs of different ones are averaged."""
    table = [[1 - mutual_identity(one, other) for other in PROTEINS] for one in PROTEINS]
    means = []
    for chosen in draws(12, samples=300, seed=4):
        pairs = [(one, other) for one, other in itertools.combinations(chosen.tolist(), 2) if one != other]
        means.append(np.mean([table[min(pair)][max(pair)] for pair in pairs]))
    found = diversity(PROTEINS, samples=300, seed=4).distance
    assert (found.low, found.high) == (
        pytest.approx(np.quantile(means, 0.025)),
        pytest.approx(np.quantile(means, 0.975)),
    )


def test_a_single_design() -> None:
    found = diversity(["MKT"], samples=5)
    assert (found.distance.value, found.pairs, found.distance.n) == (None, 0, 1)


@pytest.mark.parametrize(("count", "most"), [(2, 1), (50, 40), (50, 1225), (50, 1224), (10_000, 500)])
def test_pairs(count: int, most: int) -> None:
    one, other = draw_pairs(count, most, seed=1)
    assert len(one) == len(other) == min(most, count * (count - 1) // 2)
    assert (one < other).all()
    assert one.min() >= 0
    assert other.max() < count
    assert len(set(zip(one.tolist(), other.tolist(), strict=True))) == len(one)
    again = draw_pairs(count, most, seed=1)
    assert np.array_equal(one, again[0])
    assert np.array_equal(other, again[1])


def test_pairs_are_even() -> None:
    """Every thing as often as any other; another seed draws others."""
    drawn = [draw_pairs(30, 100, seed=seed) for seed in range(200)]
    counts = sum(np.bincount(np.concatenate(pairs), minlength=30) for pairs in drawn)
    assert abs(counts / counts.mean() - 1).max() < 0.12
    assert not np.array_equal(drawn[0][0], drawn[1][0])
