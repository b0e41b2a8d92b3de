"""The ridge classifier against the textbook's, streamed or whole."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from protnest.engine import InputError
from protnest.training.label_probe import LabelProbe, fold_of
from protnest.training.ridge_probe import FOLDS, STRENGTHS

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _data(R: int = 400, P: int = 10, C: int = 3, *, seed: int = 0) -> tuple[Floats, Labels, Labels]:
    """Classes of unequal size around their own centres, and a fold of each row."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(C, P))
    labels = rng.choice(C, size=R, p=np.array([0.6, 0.3, 0.1])[:C])
    rows = centres[labels] + rng.normal(size=(R, P)) * 1.2 + 4
    return rows, labels, rng.integers(FOLDS, size=R)


def _fitted(rows: Floats, labels: Labels, folds: Labels, *, pieces: int = 1) -> LabelProbe:
    probe = LabelProbe(rows.shape[1], 3)
    for fold in range(FOLDS):
        member = np.flatnonzero(folds == fold)
        for piece in np.array_split(member, pieces):
            probe.add(rows[piece], labels[piece], fold=fold)
    probe.fit()
    return probe


def test_classifier_is_the_textbooks() -> None:
    rows, labels, folds = _data()
    one_hot = np.eye(3)[labels]

    def solve(inside: npt.NDArray[np.bool_], strength: float) -> tuple[Floats, Floats]:
        x, y = rows[inside], one_hot[inside]
        covariance = np.cov(x.T, bias=True)
        ridge = strength * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        weight = np.linalg.solve(covariance + ridge, (x - x.mean(0)).T @ y / len(x))
        return weight, y.mean(0) - x.mean(0) @ weight

    errors = []
    for strength in STRENGTHS:
        squares = 0.0
        for fold in range(FOLDS):
            weight, bias = solve(folds != fold, strength)
            squares += np.square(one_hot - rows @ weight - bias)[folds == fold].sum()
        errors.append(squares)
    best = STRENGTHS[int(np.argmin(errors))]
    weight, bias = solve(np.ones(len(rows), dtype=bool), best)
    probe = _fitted(rows, labels, folds)
    assert probe.strength == best
    others, truth, _ = _data(seed=1)
    assert np.array_equal(probe.predict(others), (others @ weight + bias).argmax(1))
    assert (truth == probe.predict(others)).mean() > 0.75


def test_streamed_rows_give_the_same_labels() -> None:
    rows, labels, folds = _data()
    others = _data(seed=1)[0]
    whole, streamed = _fitted(rows, labels, folds), _fitted(rows, labels, folds, pieces=9)
    assert streamed.strength == whole.strength
    assert np.array_equal(streamed.predict(others), whole.predict(others))


def test_folds_by_name_are_even() -> None:
    counts = np.bincount([fold_of(f"protein{number}") for number in range(2000)], minlength=FOLDS)
    assert counts.size == FOLDS
    assert counts.min() > 320


def test_what_is_refused() -> None:
    probe = LabelProbe(4, 3)
    with pytest.raises(ValueError, match="5 rows, 4 labels: expected as many, each from 0 to 2"):
        probe.add(np.zeros((5, 4)), np.zeros(4, dtype=np.int64), fold=0)
    with pytest.raises(ValueError, match="each from 0 to 2"):
        probe.add(np.zeros((1, 4)), np.array([3]), fold=0)
    with pytest.raises(InputError, match="0 labelled rows in 0 folds are too few"):
        probe.fit()
    probe.add(np.zeros((5, 4)), np.zeros(5, dtype=np.int64), fold=0)
    with pytest.raises(InputError, match="5 labelled rows in 1 folds are too few"):
        probe.fit()
