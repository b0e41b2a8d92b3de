"""Judgements: which variants count, with which thresholds; intervals; averages; what a report and a table hold."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from protnest.engine import InputError, judgement
from protnest.engine.bootstrap import draws, interval
from protnest.engine.judgement import MEASURES, Judgement, as_report, average, judge, report_table
from protnest.engine.ranking import auc, mcc, ndcg, spearman, top_recall
from rich.console import Console

Floats = npt.NDArray[np.float64]
NAN = float("nan")


def _assay(count: int = 120, *, seed: int = 0, correlation: float = 0.6) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=count)
    return truth, correlation * truth + np.sqrt(1 - correlation**2) * rng.normal(size=count)


def _values(each: Judgement) -> dict[str, float | None]:
    return {name: getattr(each, name).value for name in MEASURES}


def _expected(truth: Floats, score: Floats, positive: Any, predicted: Any) -> dict[str, float]:
    return {
        "spearman": spearman(truth, score),
        "auc": auc(positive, score),
        "mcc": mcc(positive, predicted),
        "ndcg": ndcg(truth, score),
        "top_recall": top_recall(truth, score),
    }


def test_measures_and_their_intervals() -> None:
    """Intervals are those of rows drawn and measured in the plain way; classes stay with their rows."""
    truth, score = _assay()
    truth[:30] = truth[0]
    (found,) = judge(truth, score, is_single_N=np.ones(120), target="assay", samples=50, seed=3)
    assert (found.target, found.subset, found.variants, found.left_out, found.samples) == ("assay", "all", 120, 0, 50)
    positive, predicted = truth > np.median(truth), score >= np.median(score)
    assert found.positives == positive.sum()
    assert predicted.sum() == 60
    assert _values(found) == _expected(truth, score, positive, predicted)
    drawn = [
        _expected(truth[rows], score[rows], positive[rows], predicted[rows]) for rows in draws(120, samples=50, seed=3)
    ]
    for name in MEASURES:
        measure = getattr(found, name)
        wanted = interval(np.array([each[name] for each in drawn]))
        assert (measure.low, measure.high) == pytest.approx(wanted, abs=1e-12), name
        assert measure.low < measure.value < measure.high


def test_the_middle_score_is_predicted_positive_and_the_middle_truth_is_not() -> None:
    truth, score = np.arange(5.0), np.array([0.0, 3, 2, 1, 4])
    (found,) = judge(truth, score, is_single_N=[True] * 5, samples=2)
    assert found.positives == 2
    assert found.mcc.value == mcc(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 1, 0, 1]))


def test_cutoffs_and_classes() -> None:
    truth, score = _assay()
    truth[5] = 0.5
    for given, positive in (
        ({"cutoff": 0.5}, truth > 0.5),
        ({"positive_N": (truth > 1).astype(int)}, truth > 1),
        ({"positive_N": truth > 1, "cutoff": 0.5}, truth > 1),
        ({"cutoff": 0.0}, truth > 0),
    ):
        (found,) = judge(truth, score, is_single_N=np.zeros(120), samples=2, **given)  # type: ignore[arg-type]
        assert found.positives == positive.sum()
        assert _values(found) == _expected(truth, score, positive, score >= np.median(score))


def test_singles_and_multiples_share_the_assays_thresholds() -> None:
    truth, score = _assay()
    is_single = np.arange(120) % 3 == 0
    truth[is_single] += 2
    score[is_single] += 1.5
    positive, predicted = truth > np.median(truth), score >= np.median(score)
    found = {each.subset: each for each in judge(truth, score, is_single_N=is_single, samples=20)}
    assert list(found) == ["all", "singles", "multiples"]
    for subset, rows in (("singles", is_single), ("multiples", ~is_single)):
        assert found[subset].variants == rows.sum()
        assert found[subset].positives == positive[rows].sum()
        assert _values(found[subset]) == _expected(truth[rows], score[rows], positive[rows], predicted[rows])
        (alone,) = judge(truth[rows], score[rows], is_single_N=is_single[rows], samples=20)
        assert alone.subset == "all"
        assert alone.spearman == found[subset].spearman
        assert alone.mcc != found[subset].mcc, "its own medians are others"


def test_missing_truths_are_left_out_and_counted() -> None:
    truth, score = _assay()
    is_single = np.arange(120) < 40
    truth[[0, 1, 50]] = NAN
    classes = (truth > 0).astype(float)
    classes[0] = NAN
    known = ~np.isnan(truth)
    found = judge(truth, score, is_single_N=is_single, positive_N=classes, samples=30)
    wanted = judge(truth[known], score[known], is_single_N=is_single[known], positive_N=classes[known], samples=30)
    assert [each.left_out for each in found] == [3, 2, 1]
    assert [each.left_out for each in wanted] == [0, 0, 0]
    assert [replace(each, left_out=0) for each in found] == wanted
    # Medians are of what is known.
    found = judge(truth, score, is_single_N=np.ones(120), samples=30)
    wanted = judge(truth[known], score[known], is_single_N=np.ones(117), samples=30)
    assert found == [replace(each, left_out=3) for each in wanted]
    truth[:40] = NAN
    assert [each.subset for each in judge(truth, score, is_single_N=is_single, samples=2)] == ["all"]


@pytest.mark.parametrize("truth", [[], [NAN, NAN, NAN], [1.0, 2.0], [1.0] * 30])
def test_what_is_not_defined_is_none(truth: list[float]) -> None:
    (found,) = judge(truth, np.arange(len(truth)), is_single_N=[1] * len(truth), positive_N=[1] * len(truth), samples=9)
    known = [value for value in truth if not np.isnan(value)]
    assert (found.variants, found.left_out) == (len(known), len(truth) - len(known))
    undefined = {name: measure for name, measure in vars(found).items() if name in MEASURES and measure.value is None}
    assert set(undefined) == set(MEASURES) - ({"top_recall"} if len(known) == 2 else set())
    assert all(vars(measure) == {"value": None, "low": None, "high": None} for measure in undefined.values())
    json.dumps(as_report([found]), allow_nan=False)


def test_samples_where_a_measure_is_not_defined_are_left_out_of_its_interval() -> None:
    """A third of them lacks the only positive."""
    (found,) = judge(np.arange(9.0), np.arange(9.0), is_single_N=[1] * 9, positive_N=[1] + [0] * 8, samples=200)
    assert vars(found.auc) == {"value": 0, "low": 0, "high": 0}
    assert vars(found.ndcg) == {"value": None, "low": None, "high": None}, "a tenth of nine is none"


def test_large_assays_are_drawn_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, score = _assay()
    monkeypatch.setattr(judgement, "_ROWS_DRAWN", 120 * 130)
    is_single = np.arange(120) < 30
    assert [each.samples for each in judge(truth, score, is_single_N=is_single)] == [130, 520, 173]
    assert [each.samples for each in judge(truth, score, is_single_N=is_single, samples=40)] == [40, 40, 40]
    monkeypatch.setattr(judgement, "_ROWS_DRAWN", 120)
    assert judge(truth, score, is_single_N=np.ones(120))[0].samples == 100


def test_samples_are_seeded() -> None:
    truth, score = _assay()
    one, again, other = (judge(truth, score, is_single_N=np.ones(120), samples=20, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert _values(one[0]) == _values(other[0])
    assert one[0].spearman.low != other[0].spearman.low


def test_intervals_cover() -> None:
    """Of 60 assays, at least 50 intervals hold what assays of that size have on average: 57 are expected."""
    many = [_assay(seed=seed) for seed in range(1000, 1500)]
    expected = {
        name: np.mean([_expected(*pair, pair[0] > 0, pair[1] >= np.median(pair[1]))[name] for pair in many])
        for name in MEASURES
    }
    hits = dict.fromkeys(MEASURES, 0)
    for seed in range(60):
        truth, score = _assay(seed=seed)
        (found,) = judge(truth, score, is_single_N=np.ones(120), cutoff=0, samples=100, seed=seed)
        for name in MEASURES:
            hits[name] += getattr(found, name).low <= expected[name] <= getattr(found, name).high
    assert min(hits.values()) >= 50, hits


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"score_N": [1.0, 2.0]}, "shapes are truth_N (3,), score_N (2,), is_single_N (3,): all must be the same (N,)"),
        ({"is_single_N": [1]}, "is_single_N (1,)"),
        ({"positive_N": [[1, 0, 1]]}, "positive_N (1, 3)"),
        ({"truth_N": [[1.0]], "score_N": [[1.0]], "is_single_N": [[1]]}, "truth_N (1, 1), score_N (1, 1)"),
        ({"score_N": [1.0, NAN, 3.0]}, "variant 2: score is nan, expected a finite number"),
        ({"score_N": [1.0, 2.0, -np.inf]}, "variant 3: score is -inf, expected a finite number"),
        ({"truth_N": [np.inf, 2.0, NAN]}, "variant 1: truth is inf, expected a finite number, or NaN where it is miss"),
        ({"positive_N": [0, 2, 1]}, "variant 2: class is 2.0, expected 0 or 1"),
        ({"positive_N": [0, 1, NAN]}, "variant 3: class is nan, expected 0 or 1"),
        ({"cutoff": NAN}, "cutoff is nan, expected a finite number"),
        ({"samples": 0}, "0 bootstrap samples, expected at least 1"),
    ],
)
def test_what_cannot_be_judged(given: dict[str, Any], problem: str) -> None:
    usual = {"truth_N": [1.0, 2.0, 3.0], "score_N": [1.0, 2.0, 3.0], "is_single_N": [1, 1, 0]}
    with pytest.raises(InputError, match=re.escape(problem)):
        judge(**(usual | given))


def _three() -> list[Judgement]:
    found = []
    for seed, count in enumerate((60, 200)):
        truth, score = _assay(count, seed=seed)
        truth[:seed] = NAN
        is_single = np.arange(count) < count // 2
        found += judge(truth, score, is_single_N=is_single, target=f"assay{seed}", samples=20)
    return found + judge([1.0, 2.0, 4.0], [2.0, 1.0, 3.0], is_single_N=[1] * 3, target="small", samples=20)


def test_averages_are_plain_means_over_assays() -> None:
    judgements = _three()
    found = average(judgements)
    assays = [each for each in judgements if each.subset == "all"]
    assert (found.target, found.subset, found.samples) == ("mean of 3", "all", 1000)
    assert (found.variants, found.left_out) == (60 + 199 + 3, 1)
    assert found.positives == sum(each.positives for each in assays)
    for name in MEASURES:
        values = [value for each in assays if (value := _values(each)[name]) is not None]
        assert len(values) == (2 if name == "ndcg" else 3)
        measure = getattr(found, name)
        assert measure.value == pytest.approx(sum(values) / len(values))
        assert min(values) - 1e-12 < measure.low < measure.value < measure.high < max(values) + 1e-12
    assert average(judgements, seed=1).auc.value == found.auc.value
    alone = average(assays[2:])
    assert vars(alone.spearman) == {"value": assays[2].spearman.value, "low": None, "high": None}
    assert vars(alone.ndcg) == {"value": None, "low": None, "high": None}
    singles = [each for each in judgements if each.subset == "singles"]
    with pytest.raises(InputError, match="none of 2 judgements is of all variants of an assay: no average"):
        average(singles)


def test_report() -> None:
    judgements = _three()
    report = json.loads(json.dumps(as_report(judgements, model="tiny", seed=0), allow_nan=False))
    assert list(report) == ["model", "seed", "judgements", "average"]
    assert report["judgements"] == [asdict(each) for each in judgements]
    assert report["average"] == asdict(average(judgements))
    assert report["judgements"][1]["subset"] == "singles"
    assert set(report["judgements"][1]["mcc"]) == {"value", "low", "high"}
    assert as_report(judgements[:3])["average"] is None
    assert as_report([]) == {"judgements": [], "average": None}


def _printed(judgements: list[Judgement]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(report_table(judgements))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_table() -> None:
    judgements = _three()
    lines = _printed(judgements).splitlines()
    assert lines[0].split() == ["assay", "variants", "Spearman", "AUC", "MCC", "NDCG", "top", "10", "%"]
    first, measure = judgements[0], judgements[0].spearman
    assert lines[1].split()[:4] == ["assay0", "60", "all", f"{measure.value:.3f}"]
    assert lines[2].split()[:3] == [f"{measure.low:.3f}", "to", f"{measure.high:.3f}"]
    assert f"{first.top_recall.value:.3f}" in lines[1]
    text = "\n".join(lines)
    assert text.count("undefined") == 1, "NDCG of three variants"
    assert "1 left out" in text
    assert lines[-2].split()[:5] == ["mean", "of", "3", "262", "all"]
    assert "mean of" not in _printed(judgements[:3])
    alone = average(judgements[-1:])
    assert " to " not in _printed([alone])
