"""Accuracy and macro-F1 from counts, and intervals that draw proteins."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.engine.bootstrap import interval
from protnest.training.confusion import accuracy, bootstrapped, confusions, macro_f1


def test_measures() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    counts_BCC = confusions(labels, predicted, np.array([0, 0, 1, 1, 3, 3]), (4, 5))
    assert counts_BCC.shape == (4, 5, 5)
    assert counts_BCC.sum(axis=(1, 2)).tolist() == [2, 2, 0, 2]
    assert counts_BCC[1, 0, 1] == 1
    assert counts_BCC[1, 1, 1] == 1
    total_CC = counts_BCC.sum(axis=0)
    assert accuracy(total_CC) == 0.5
    # Classes 3 and 4 have no rows: they do not count.
    assert macro_f1(total_CC) == pytest.approx((2 * 2 / (3 + 4) + 2 * 1 / (2 + 2) + 0) / 3)
    assert macro_f1(np.diag([3.0, 1, 0])) == 1
    stacked = np.stack((total_CC, np.eye(5)))
    assert accuracy(stacked).tolist() == [0.5, 1]
    assert macro_f1(stacked)[1] == 1


def test_interval_draws_proteins() -> None:
    rng = np.random.default_rng(0)
    total = rng.integers(50, 300, size=200)
    right = np.round(total * rng.uniform(0.6, 0.9, size=200)).astype(int)
    said = np.concatenate([np.arange(size) >= hits for size, hits in zip(total, right, strict=True)]).astype(int)
    proteins = np.repeat(np.arange(200), total)
    counts_BCC = confusions(np.zeros_like(said), said, proteins, (200, 2))
    low, high = interval(accuracy(bootstrapped(counts_BCC)))
    assert low < right.sum() / total.sum() < high
    # Were residues drawn, the interval would be a tenth as wide: 200 proteins hold some 35,000.
    assert high - low > 0.015
    assert np.array_equal(bootstrapped(counts_BCC), bootstrapped(counts_BCC))
    assert not np.array_equal(bootstrapped(counts_BCC), bootstrapped(counts_BCC, seed=1))


def test_bootstrapped_counts_are_sums_over_drawn_proteins() -> None:
    counts_BCC = np.random.default_rng(0).integers(0, 9, size=(7, 3, 3)).astype(float)
    drawn_SB = np.random.default_rng(4).integers(7, size=(11, 7))
    wanted = np.stack([counts_BCC[drawn_B].sum(axis=0) for drawn_B in drawn_SB])
    assert np.array_equal(bootstrapped(counts_BCC, samples=11, seed=4), wanted)
