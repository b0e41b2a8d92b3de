"""Bootstrap: which rows are drawn, what lies between the percentiles, how often that holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.engine.bootstrap import bootstrap_spearman, draws, finite, interval, repeats
from protnest.engine.ranking import spearman


def test_draws_are_pinned() -> None:
    """Results on record were made with these: one generator, a row of draws a sample."""
    found = list(draws(7, samples=5, seed=4))
    assert np.array_equal(found, np.random.default_rng(4).integers(7, size=(5, 7)))
    assert not np.array_equal(found, list(draws(7, samples=5, seed=5)))
    assert len(list(draws(2))) == 1000


def test_repeats_count_the_draws() -> None:
    for drawn, times in zip(draws(9, samples=20, seed=2), repeats(9, samples=20, seed=2), strict=True):
        assert times.tolist() == [drawn.tolist().count(row) for row in range(9)]


def test_interval() -> None:
    values = np.random.default_rng(0).permutation(1001).astype(float)
    assert interval(values) == pytest.approx((25, 975))
    assert interval(values, level=0.5) == pytest.approx((250, 750))
    assert interval(np.concatenate((values, [np.nan, np.inf]))) == interval(values)
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_finite() -> None:
    assert finite(0.5) == 0.5
    assert finite(float("nan")) is None
    assert finite(float("inf")) is None


def test_bootstrap_spearman_is_spearman_of_the_draws() -> None:
    one, other = np.random.default_rng(0).integers(4, size=(2, 30)).astype(float)
    wanted = [spearman(one[rows], other[rows]) for rows in draws(30, samples=12, seed=3)]
    assert bootstrap_spearman(one, other, samples=12, seed=3).tolist() == wanted


def test_bootstrap_interval_covers() -> None:
    """Of 60 draws from a known correlation, at least 50 intervals hold it: 57 are expected."""
    rng = np.random.default_rng(5)
    truth = 6 / np.pi * np.arcsin(0.6 / 2)
    hits = 0
    for _ in range(60):
        pair = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=120)
        low, high = interval(bootstrap_spearman(pair[:, 0], pair[:, 1], samples=200))
        assert low < high
        hits += low <= truth <= high
    assert hits >= 50
    assert np.array_equal(bootstrap_spearman(pair[:, 0], pair[:, 1]), bootstrap_spearman(pair[:, 0], pair[:, 1]))
    assert np.isnan(interval(bootstrap_spearman(np.ones(9), np.ones(9)))).all()
