"""Calibration: known answers of toys, literal slow bins, scikit-learn's curve, and what chance gives.

Shapes: N tokens.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from protnest.training.calibration import Binned, calibration

from support.predictors import made_scores

Floats = npt.NDArray[np.float64]


def _toy(N: int = 20_000, seed: int = 0) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Right exactly as often as it is sure."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2, 2, size=N)
    return confidence, rng.random(N) < confidence


def _literal(confidence: Floats, correct: npt.NDArray[np.bool_], edges: list[float]) -> tuple[float, float]:
    ece, mce = 0.0, 0.0
    for low, high in itertools.pairwise(edges):
        inside = [row for row, each in enumerate(confidence) if low < each <= high]
        if inside:
            gap = abs(np.mean(correct[inside]) - np.mean(confidence[inside]))
            ece += len(inside) / len(confidence) * gap
            mce = max(mce, gap)
    return ece, mce


def test_a_calibrated_toy() -> None:
    confidence, correct = _toy()
    found = calibration(made_scores(confidence, correct), samples=200)
    for binned in (found.equal_width, found.equal_mass):
        assert binned.ece.value < 0.02  # type: ignore[operator]
        assert 0.3 * binned.by_chance < binned.ece.value < 3 * binned.by_chance  # type: ignore[operator]
        assert binned.ece.low < 2 * binned.by_chance  # type: ignore[operator]
    assert found.accuracy.value == pytest.approx(correct.mean())
    assert found.confidence.value == pytest.approx(confidence.mean())
    assert found.accuracy.low < 0.5 < found.accuracy.high  # type: ignore[operator]


def test_chance_is_what_calibrated_toys_show() -> None:
    """Mean over many of them, with few tokens, where it is large."""
    confidence = np.random.default_rng(9).beta(2, 2, size=300)
    chance = calibration(made_scores(confidence, confidence > 0.5), samples=2)
    shown: list[list[float]] = [[], []]
    for seed in range(60):
        correct = np.random.default_rng(seed).random(300) < confidence
        found = calibration(made_scores(confidence, correct), samples=2)
        shown[0].append(found.equal_width.ece.value)  # type: ignore[arg-type]
        shown[1].append(found.equal_mass.ece.value)  # type: ignore[arg-type]
    assert chance.equal_width.by_chance == pytest.approx(np.mean(shown[0]), rel=0.12)
    assert chance.equal_mass.by_chance == pytest.approx(np.mean(shown[1]), rel=0.12)
    assert chance.equal_mass.by_chance > 0.05


@pytest.mark.parametrize("surplus", [0.1, 0.3])
def test_a_toy_that_is_too_sure_by_so_much(surplus: float) -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.4, 1.0, size=40_000)
    correct = rng.random(40_000) < confidence - surplus
    found = calibration(made_scores(confidence, correct), samples=200)
    for binned in (found.equal_width, found.equal_mass):
        assert binned.ece.value == pytest.approx(surplus, abs=0.01)
        assert binned.ece.low < surplus < binned.ece.high + 0.01  # type: ignore[operator]
        assert binned.mce.value >= binned.ece.value  # type: ignore[operator]
        assert all(each.confidence > each.accuracy for each in binned.bins)


def test_never_right_means_that_ece_is_confidence() -> None:
    confidence = np.random.default_rng(2).uniform(size=500)
    found = calibration(made_scores(confidence, np.zeros(500, dtype=bool)), samples=20)
    assert found.accuracy.value == 0.0
    for binned in (found.equal_width, found.equal_mass):
        assert binned.ece.value == pytest.approx(found.confidence.value)


@pytest.mark.parametrize("bins", [4, 15])
def test_bins_are_the_literal_ones(bins: int) -> None:
    confidence, correct = _toy(800, seed=3)
    confidence[:4] = [0.0, 0.25, 0.5, 1.0]
    found = calibration(made_scores(confidence, correct), bins=bins, samples=5)
    edges = np.linspace(0, 1, bins + 1).tolist()
    for binned, ends in (
        (found.equal_width, [-1.0, *edges[1:]]),
        (found.equal_mass, [-1.0, *[each.high for each in found.equal_mass.bins]]),
    ):
        ece, mce = _literal(confidence, correct, ends)
        assert binned.ece.value == pytest.approx(ece)
        assert binned.mce.value == pytest.approx(mce)
        assert sum(each.tokens for each in binned.bins) == 800
    counts = [each.tokens for each in found.equal_mass.bins]
    assert len(counts) == bins
    assert max(counts) - min(counts) <= 1


def test_the_curve_is_scikit_learns() -> None:
    module = pytest.importorskip("sklearn.calibration")
    confidence, correct = _toy(3000, seed=4)
    found = calibration(made_scores(confidence, correct), bins=10, samples=2)
    accuracy, mean = module.calibration_curve(correct, confidence, n_bins=10, strategy="uniform")
    np.testing.assert_allclose([each.accuracy for each in found.equal_width.bins], accuracy)
    np.testing.assert_allclose([each.confidence for each in found.equal_width.bins], mean)


def test_equal_confidences_are_not_parted() -> None:
    confidence = np.array([0.2] * 50 + [0.7] * 50)
    correct = np.array(([True] + [False] * 4) * 10 + [True] * 35 + [False] * 15)
    found = calibration(made_scores(confidence, correct), samples=2)
    for binned in (found.equal_width, found.equal_mass):
        assert [each.tokens for each in binned.bins] == [50, 50]
        assert binned.ece.value == pytest.approx(0.0, abs=1e-12)
    one = calibration(made_scores([0.3] * 10, [True] * 3 + [False] * 7), samples=2)
    assert [len(each.bins) for each in (one.equal_width, one.equal_mass)] == [1, 1]
    assert one.equal_mass.ece.value == pytest.approx(0.0, abs=1e-12)


def test_intervals_draw_sequences_not_tokens() -> None:
    """Each of 40 sequences is all right or all wrong: 100 tokens of one know no more than a single one."""
    rng = np.random.default_rng(5)
    right = rng.random(40) < 0.5
    many = calibration(
        made_scores(np.full(4000, 0.5), np.repeat(right, 100), np.repeat(np.arange(40), 100).tolist()), samples=500
    )
    once = calibration(made_scores(np.full(40, 0.5), right), samples=500)
    assert many.accuracy.n == once.accuracy.n == many.equal_width.ece.n == 40
    for each, other in ((many.accuracy, once.accuracy), (many.equal_width.ece, once.equal_width.ece)):
        assert (each.low, each.high) == (pytest.approx(other.low), pytest.approx(other.high))
    assert many.accuracy.high - many.accuracy.low > 0.2  # type: ignore[operator]


def test_seeded() -> None:
    scores = made_scores(*_toy(200))
    found: list[Binned] = [calibration(scores, samples=50, seed=seed).equal_width for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
