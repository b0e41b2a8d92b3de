"""Distance of lengths: identical sets, shifts, and scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.training.length_distance import length_distance, wasserstein

from support.tiny import random_proteins


def test_identical_sets() -> None:
    proteins = random_proteins(50)
    found = length_distance(proteins, proteins[::-1], samples=100)
    assert found.wasserstein.value == 0.0
    # Both are drawn, each by itself.
    assert length_distance(proteins, proteins, samples=100).wasserstein.high > 0.5  # type: ignore[operator]
    assert found.generated == found.reference == np.mean([len(each) for each in proteins])


def test_a_shift_is_the_distance() -> None:
    proteins = random_proteins(50)
    found = length_distance([each + "A" * 7 for each in proteins], proteins, samples=300)
    assert found.wasserstein.value == pytest.approx(7)
    assert found.wasserstein.low < 7 < found.wasserstein.high  # type: ignore[operator]
    assert found.wasserstein.n == 50


@pytest.mark.parametrize("seed", range(5))
def test_distance_is_scipys(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(1, 300, size=37), rng.integers(1, 900, size=101)
    wanted = stats.wasserstein_distance(ours, theirs)
    assert wasserstein(ours, theirs) == pytest.approx(wanted)
    assert wasserstein(theirs, ours) == pytest.approx(wanted)


def test_chance() -> None:
    """What sets of one source rarely go beyond; and a set of another does."""
    beyond = 0
    for seed in range(20):
        found = length_distance(random_proteins(60, seed=2 * seed), random_proteins(30, seed=2 * seed + 1), samples=2)
        beyond += found.wasserstein.value > found.by_chance  # type: ignore[operator]
    assert beyond <= 5
    longer = length_distance(random_proteins(60, longest=80), random_proteins(60, longest=40), samples=2)
    assert longer.wasserstein.value > longer.by_chance  # type: ignore[operator]
    assert length_distance(["A"], ["AAAA"], samples=2).wasserstein.high is None
