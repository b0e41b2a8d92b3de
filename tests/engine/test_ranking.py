"""Ranking measures beside scipy's, scikit-learn's and definitions written out; ties; what is not defined."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protnest.engine.ranking import auc, mcc, ndcg, ranks, spearman, top_recall

Floats = npt.NDArray[np.float64]

# Few distinct values: most rows tie.
PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=60)


def _columns(pairs: list[tuple[int, int]]) -> tuple[Floats, Floats]:
    truth, score = np.array(pairs, dtype=np.float64).T
    return truth / 3, score * 0.7 - 1


def _random(count: int, *, seed: int = 0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=count)
    return truth, truth + rng.normal(size=count)


def test_ranks_and_spearman() -> None:
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert ranks(values).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]
    assert ranks(np.array([])).tolist() == []
    rng = np.random.default_rng(0)
    one, other = rng.permutation(50).astype(float), rng.permutation(50).astype(float)
    difference = ranks(one) - ranks(other)
    assert spearman(one, other) == pytest.approx(1 - 6 * (difference @ difference) / (50 * (50**2 - 1)))
    assert spearman(one, np.exp(one / 10)) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert np.isnan(spearman(one, np.ones(50)))
    assert np.isnan(spearman(one[:2], other[:2]))


@settings(deadline=None)
@given(PAIRS)
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    truth, score = _columns(pairs)
    if len(pairs) < 3 or np.ptp(truth) == 0 or np.ptp(score) == 0:
        assert math.isnan(spearman(truth, score))
    else:
        assert spearman(truth, score) == pytest.approx(stats.spearmanr(truth, score).statistic, abs=1e-12)


@settings(deadline=None)
@given(PAIRS)
def test_auc_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, score = _columns(pairs)
    positive = truth > 0
    if positive.all() or not positive.any():
        assert math.isnan(auc(positive, score))
    else:
        assert auc(positive, score) == pytest.approx(metrics.roc_auc_score(positive, score), abs=1e-12)
        assert auc(positive.astype(np.int64), score) == auc(positive, score), "0 and 1 are classes, not places"


def test_auc_by_hand() -> None:
    positive = np.array([True, True, False, False, False])
    # Of six pairs, 3 > 1 twice and 3 > 2; 2 > 1 twice; 2 = 2 is half.
    assert auc(positive, np.array([3.0, 2, 2, 1, 1])) == pytest.approx(5.5 / 6)
    assert auc(positive, np.zeros(5)) == 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcc_is_scikit_learns(pairs: list[tuple[bool, bool]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    positive, predicted = np.array(pairs).T
    if len(set(positive.tolist())) < 2 or len(set(predicted.tolist())) < 2:
        assert math.isnan(mcc(positive, predicted))
    else:
        assert mcc(positive, predicted) == pytest.approx(metrics.matthews_corrcoef(positive, predicted), abs=1e-12)


def test_mcc_by_hand() -> None:
    positive = np.array([1, 1, 1, 0, 0, 0, 0], dtype=bool)
    predicted = np.array([1, 1, 0, 1, 0, 0, 0], dtype=bool)
    assert mcc(positive, predicted) == pytest.approx((2 * 3 - 1 * 1) / math.sqrt(3 * 3 * 4 * 4))
    assert mcc(np.tile(positive, 100_000), np.tile(predicted, 100_000)) == pytest.approx(5 / 12, rel=1e-14)


def _ndcg_of_an_order(gains: list[float], taken: int) -> float:
    """Of gains listed best first."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1) if rank <= taken)


def _ndcg_written_out(truth: Floats, score: Floats, top: float) -> float:
    """Over all orders of variants that tie."""
    taken = math.floor(len(truth) * top)
    low, high = min(truth), max(truth)
    gains = [(value - low) / (high - low) for value in truth]
    best = _ndcg_of_an_order(sorted(gains, reverse=True), taken)
    levels = sorted(set(score.tolist()), reverse=True)
    ties = [[gain for gain, value in zip(gains, score, strict=True) if value == level] for level in levels]
    orders = itertools.product(*(itertools.permutations(tied) for tied in ties))
    sums = [_ndcg_of_an_order([gain for tied in order for gain in tied], taken) for order in orders]
    return sum(sums) / len(sums) / best


@pytest.mark.parametrize("count", [10, 11, 19, 20, 137])
def test_ndcg_without_ties_is_the_definition(count: int) -> None:
    truth, score = _random(count, seed=count)
    assert ndcg(truth, score) == pytest.approx(_ndcg_written_out(truth, score, 0.1), abs=1e-12)
    assert ndcg(truth, score, top=0.5) == pytest.approx(_ndcg_written_out(truth, score, 0.5), abs=1e-12)
    assert ndcg(truth, np.exp(truth)) == pytest.approx(1)
    assert ndcg(5 * truth - 2, score) == pytest.approx(ndcg(truth, score)), "gains are scaled"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=2, max_size=7))
def test_ndcg_of_ties_is_the_mean_over_their_orders(pairs: list[tuple[int, int]]) -> None:
    truth, score = _columns(pairs)
    if np.ptp(truth) == 0:
        assert math.isnan(ndcg(truth, score, top=0.5))
    else:
        assert ndcg(truth, score, top=0.5) == pytest.approx(_ndcg_written_out(truth, score, 0.5), abs=1e-12)


def test_ndcg_by_hand() -> None:
    """Of twenty, two are taken: gains 0.5 and 1 where 1 and 0.5 are best."""
    truth = np.zeros(20)
    truth[3], truth[7] = 4.0, 2.0
    score = np.zeros(20)
    score[7], score[3] = 9.0, 8.0
    assert ndcg(truth, score) == pytest.approx((0.5 + 1 / math.log2(3)) / (1 + 0.5 / math.log2(3)))
    assert ndcg(truth, -score) == 0.0
    assert math.isnan(ndcg(truth[:9], score[:9])), "a tenth of nine is none"
    assert math.isnan(ndcg(np.ones(20), score))


def _recall_written_out(truth: Floats, score: Floats, top: float) -> float:
    truly = truth >= np.percentile(truth, 100 * (1 - top))
    found = score >= np.percentile(score, 100 * (1 - top))
    return sum(a and b for a, b in zip(truly, found, strict=True)) / sum(truly)


@pytest.mark.parametrize("count", [2, 9, 10, 11, 12, 21, 137])
def test_recall_is_the_definition(count: int) -> None:
    truth, score = _random(count, seed=count)
    for top in (0.1, 0.25, 0.5):
        assert top_recall(truth, score, top) == _recall_written_out(truth, score, top)


@settings(deadline=None)
@given(PAIRS)
def test_recall_with_ties_is_the_definition(pairs: list[tuple[int, int]]) -> None:
    truth, score = _columns(pairs)
    if np.ptp(truth) == 0 or np.ptp(score) == 0:
        assert math.isnan(top_recall(truth, score))
    else:
        assert top_recall(truth, score) == _recall_written_out(truth, score, 0.1)


def test_recall_by_hand() -> None:
    """Of eleven, the 90th percentile is the second highest: two are at the top. Of three that tie there, all are."""
    truth = np.arange(11.0)
    score = truth.copy()
    score[[9, 0]] = score[[0, 9]]
    assert top_recall(truth, truth) == 1
    assert top_recall(truth, score) == 0.5
    score[[8, 9]] = 9
    assert top_recall(truth, score) == 1


def test_what_is_not_defined() -> None:
    nothing, no_class = np.array([]), np.array([], dtype=bool)
    for value in (spearman(nothing, nothing), auc(no_class, nothing), mcc(no_class, no_class)):
        assert math.isnan(value)
    for measure in (ndcg, top_recall):
        assert math.isnan(measure(nothing, nothing))
    values = np.arange(30.0)
    assert math.isnan(top_recall(values, np.ones(30))), "a constant score would recall everything"
    assert 0 < ndcg(values, np.ones(30)) < 1


@pytest.mark.parametrize("measure", [auc, mcc, ndcg, top_recall])
def test_lengths_that_differ(measure: object) -> None:
    with pytest.raises(ValueError, match="12 variants beside 1: they must be the same"):
        measure(np.arange(12) > 4, np.array([True]))  # type: ignore[operator]


@pytest.mark.parametrize("measure", [ndcg, top_recall])
@pytest.mark.parametrize("top", [0.0, 1.0, 10.0, math.nan])
def test_tops_that_are_no_share(measure: object, top: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"top is {top}, expected a share between 0 and 1")):
        measure(np.arange(30.0), np.arange(30.0), top=top)  # type: ignore[operator]
