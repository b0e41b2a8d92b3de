"""Figures with intervals: known ones, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from protnest.training.estimate import Estimate, estimate, exp, mean, ratio, share


def test_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    found = ratio(np.array([1.0, 8.0]), np.array([1.0, 2.0]))
    assert found.value == pytest.approx(3.0)
    # Drawn twice each, or once each: nothing else can happen to two sequences.
    assert (found.low, found.high, found.n) == (1.0, 4.0, 2)


def test_after_is_applied_to_samples_too() -> None:
    plain = ratio(np.arange(20.0), np.ones(20), seed=3)
    found = ratio(np.arange(20.0), np.ones(20), after=exp, seed=3)
    assert found.value == pytest.approx(math.exp(9.5))
    assert found.low == pytest.approx(math.exp(plain.low), rel=0.05)  # type: ignore[arg-type]
    assert found.high == pytest.approx(math.exp(plain.high), rel=0.05)  # type: ignore[arg-type]


def test_mean_has_the_textbooks_interval() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=400)
    found = mean(values, samples=4000)
    reach = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - reach, abs=0.02)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.02)
    assert found.n == 400


def test_one_has_no_interval() -> None:
    assert mean(np.array([2.0])) == Estimate(value=2.0, low=None, high=None, n=1)


def test_what_is_not_defined_is_none() -> None:
    assert ratio(np.zeros(3), np.zeros(3)) == Estimate(value=None, low=None, high=None, n=3)
    assert estimate(math.inf, np.array([1.0, 2.0]), 2) == Estimate(value=None, low=None, high=None, n=2)
    assert share(0, 0) == Estimate(value=None, low=None, high=None, n=0)


@pytest.mark.parametrize("hits", [0, 1, 37, 199, 200])
def test_share_has_wilsons_interval(hits: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.binomtest(hits, 200).proportion_ci(method="wilson")
    found = share(hits, 200)
    assert found.value == hits / 200
    assert found.low == pytest.approx(wanted.low, abs=1e-12)
    assert found.high == pytest.approx(wanted.high, abs=1e-12)


def test_exp_does_not_overflow() -> None:
    assert exp(1.0) == math.e
    assert exp(1e4) == math.inf
