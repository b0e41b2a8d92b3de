"""Measures of rows drawn several times: those of the rows, repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protnest.engine.bootstrap import repeats
from protnest.engine.ranking import auc, mcc, ndcg, spearman, top_recall
from protnest.engine.resampling import Resampling

ROW = st.tuples(st.integers(-3, 3), st.integers(0, 4), st.booleans(), st.booleans())


def _check(rows: np.ndarray, times: np.ndarray, top: float) -> None:  # type: ignore[type-arg]
    truth, score = rows[:, 0] / 3, rows[:, 1] * 0.7 - 1
    positive, predicted = rows[:, 2] > 0, rows[:, 3] > 0
    found = Resampling(truth, score, positive, predicted, top=top).measures(times)
    truth, score, positive, predicted = (np.repeat(each, times) for each in (truth, score, positive, predicted))
    wanted = {
        "spearman": spearman(truth, score),
        "auc": auc(positive, score),
        "mcc": mcc(positive, predicted),
        "ndcg": ndcg(truth, score, top),
        "top_recall": top_recall(truth, score, top),
    }
    assert found == pytest.approx(wanted, abs=1e-12, nan_ok=True)


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=40), st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_measures_with_ties(rows: list[tuple[int, int, bool, bool]], seed: int, top: float) -> None:
    for times in repeats(len(rows), samples=3, seed=seed):
        _check(np.array(rows, dtype=np.float64), times, top)
    _check(np.array(rows, dtype=np.float64), np.ones(len(rows), dtype=np.int64), top)


@pytest.mark.parametrize("count", [10, 11, 101, 2000])
def test_measures_without_ties(count: int) -> None:
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(count, 4))
    rows[:, 1] += rows[:, 0]
    for times in repeats(count, samples=10, seed=1):
        _check(rows, times, 0.1)


def test_one_row_over_and_over() -> None:
    """All five vanish, whatever the other rows hold."""
    rows = np.random.default_rng(0).normal(size=(20, 4))
    times = np.zeros(20, dtype=np.int64)
    times[7] = 20
    _check(rows, times, 0.1)
    found = Resampling(rows[:, 0], rows[:, 1], rows[:, 2] > 0, rows[:, 3] > 0).measures(times)
    assert np.isnan(list(found.values())).all()
