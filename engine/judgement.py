"""Scores of variants held against what was measured: ProteinGym's five measures, with bootstrap intervals.

Singles and multiples are judged apart too, where an assay holds both. Which variants count as positive, and which are
predicted to be, is settled once for an assay, as ProteinGym does by depth of mutation: neither a subset nor a sample of
the bootstrap moves the two thresholds.

Shapes: N variants, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from .bootstrap import draws, finite, interval, repeats
from .errors import InputError
from .ranking import Flags, Floats, auc, mcc, ndcg, spearman, top_recall
from .resampling import Resampling

MEASURES = {"spearman": "Spearman", "auc": "AUC", "mcc": "MCC", "ndcg": "NDCG", "top_recall": "top 10 %"}
"""Names of the measures, and how a table calls them."""

_ROWS_DRAWN = 30_000_000
_FEWEST_SAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure with its 95 % bootstrap interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How well scores rank the variants of an assay, or on average those of several.

    Attributes:
        target: the assay.
        subset: "all", "singles" or "multiples".
        variants: how many it is judged on.
        positives: how many of them are truly positive.
        left_out: variants of the subset whose truth is missing.
        samples: of the bootstrap: of variants; of assays for an average.
        spearman, auc, mcc, ndcg, top_recall: as `ranking` defines them.
    """

    target: str
    subset: str
    variants: int
    positives: int
    left_out: int
    samples: int
    spearman: Measure
    auc: Measure
    mcc: Measure
    ndcg: Measure
    top_recall: Measure


def judge(
    truth_N: npt.ArrayLike,
    score_N: npt.ArrayLike,
    *,
    is_single_N: npt.ArrayLike,
    target: str = "",
    positive_N: npt.ArrayLike | None = None,
    cutoff: float | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> list[Judgement]:
    """Judges the scores of one assay: all variants, then singles and multiples where both have truths.

    NDCG and recall depend on how many variants there are: their intervals are for an assay of this size.

    An assay of more than 30,000 variants is drawn less often, so that samples times variants stay about 30 million,
    but 100 times at least: 150,000 variants, nearly all of them multiples, take 200 samples and some 9 s of one core.

    Args:
        truth_N: what was measured, higher is better; NaN where it is missing: such a variant is left out and counted.
        score_N: the model's, higher is better.
        is_single_N: whether a variant has one substitution.
        target: the assay's name.
        positive_N: whether a variant is truly positive, as bool, 0 or 1 (ProteinGym's `DMS_score_bin`).
        cutoff: without `positive_N`, a truth above it is positive; by default the median truth.
        samples: of the bootstrap, at most.
        seed: of its draws.

    Raises:
        InputError: lengths differ, a score or cutoff is not finite, a truth infinite, a class neither 0 nor 1, or there
            are no samples.
    """
    truth, score, is_single = _floats(truth_N), _floats(score_N), np.asarray(is_single_N, dtype=bool)
    classes = None if positive_N is None else _floats(positive_N)
    _check(truth, score, is_single, classes, cutoff, samples)
    known = ~np.isnan(truth)
    if classes is not None:
        positive = classes == 1
    else:
        positive = truth > (_median(truth[known]) if cutoff is None else cutoff)
    predicted = score >= _median(score[known])
    members = {"all": np.ones(len(truth), dtype=bool)}
    if (known & is_single).any() and (known & ~is_single).any():
        members |= {"singles": is_single, "multiples": ~is_single}
    judgements = []
    for subset, member in members.items():
        rows = member & known
        measured = _measured(truth[rows], score[rows], positive[rows], predicted[rows], samples=samples, seed=seed)
        left_out = int((member & ~known).sum())
        judgements.append(Judgement(target=target, subset=subset, left_out=left_out, **measured))
    return judgements


def _floats(values_N: npt.ArrayLike) -> Floats:
    return np.asarray(values_N, dtype=np.float64)


def _median(values_N: Floats) -> float:
    """Of no values, any number does: it divides none."""
    return float(np.median(values_N)) if len(values_N) else 0.0


def _check(
    truth_N: Floats, score_N: Floats, is_single_N: Flags, class_N: Floats | None, cutoff: float | None, samples: int
) -> None:
    shapes = {"truth_N": truth_N.shape, "score_N": score_N.shape, "is_single_N": is_single_N.shape}
    if class_N is not None:
        shapes["positive_N"] = class_N.shape
    if len(set(shapes.values())) > 1 or truth_N.ndim != 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        message = f"shapes are {found}: all must be the same (N,)"
        raise InputError(message)
    broken = {
        "score is {}, expected a finite number": (score_N, ~np.isfinite(score_N)),
        "truth is {}, expected a finite number, or NaN where it is missing": (truth_N, np.isinf(truth_N)),
    }
    if class_N is not None:
        broken["class is {}, expected 0 or 1"] = (class_N, ~np.isnan(truth_N) & (class_N != 0) & (class_N != 1))
    for problem, (values_N, is_broken_N) in broken.items():
        if is_broken_N.any():
            row = int(is_broken_N.argmax())
            message = f"variant {row + 1}: {problem.format(values_N[row])}"
            raise InputError(message)
    if cutoff is not None and not math.isfinite(cutoff):
        message = f"cutoff is {cutoff}, expected a finite number"
        raise InputError(message)
    if samples < 1:
        message = f"{samples} bootstrap samples, expected at least 1"
        raise InputError(message)


def _measured(
    truth_N: Floats, score_N: Floats, positive_N: Flags, predicted_N: Flags, *, samples: int, seed: int
) -> dict[str, Any]:
    """What a judgement says of the rows that it is made on."""
    rows = len(truth_N)
    samples = min(samples, max(_FEWEST_SAMPLES, _ROWS_DRAWN // max(rows, 1)))
    values = {
        "spearman": spearman(truth_N, score_N),
        "auc": auc(positive_N, score_N),
        "mcc": mcc(positive_N, predicted_N),
        "ndcg": ndcg(truth_N, score_N),
        "top_recall": top_recall(truth_N, score_N),
    }
    drawn: list[dict[str, float]] = []
    if rows:
        resampling = Resampling(truth_N, score_N, positive_N, predicted_N)
        drawn = [resampling.measures(times_N) for times_N in repeats(rows, samples=samples, seed=seed)]
    measures = {name: _measure(value, _floats([each[name] for each in drawn])) for name, value in values.items()}
    return {"variants": rows, "positives": int(positive_N.sum()), "samples": samples, **measures}


def _measure(value: float, values_S: Floats) -> Measure:
    """With the interval of the samples where it is defined; where the value is not, no sample's is."""
    low, high = interval(values_S)
    return Measure(value=finite(value), low=finite(low), high=finite(high))


def average(judgements: Sequence[Judgement], *, samples: int = 1000, seed: int = 0) -> Judgement:
    """The plain mean over assays of each measure on all variants, over the assays where it is defined.

    Intervals draw assays, not variants: how far the mean depends on which assays there are; None for fewer than two.
    ProteinGym's headline is another mean: over an assay's protein, then over proteins, then over five kinds of assay.

    Raises:
        InputError: no judgement is of subset "all".
    """
    assays = [each for each in judgements if each.subset == "all"]
    if not assays:
        message = f"none of {len(judgements)} judgements is of all variants of an assay: no average"
        raise InputError(message)
    values = {name: [getattr(each, name).value for each in assays] for name in MEASURES}
    means = {
        name: _mean(_floats([value for value in found if value is not None]), samples, seed)
        for name, found in values.items()
    }
    return Judgement(
        target=f"mean of {len(assays)}",
        subset="all",
        variants=sum(each.variants for each in assays),
        positives=sum(each.positives for each in assays),
        left_out=sum(each.left_out for each in assays),
        samples=samples,
        **means,
    )


def _mean(values: Floats, samples: int, seed: int) -> Measure:
    if len(values) < 2:
        return Measure(value=float(values[0]) if len(values) else None, low=None, high=None)
    drawn_S = [values[rows].mean() for rows in draws(len(values), samples=samples, seed=seed)]
    return _measure(float(values.mean()), _floats(drawn_S))


def _averages(judgements: Sequence[Judgement]) -> Iterator[Judgement]:
    """The average, where there are several assays."""
    if sum(each.subset == "all" for each in judgements) > 1:
        yield average(judgements)


def as_report(judgements: Sequence[Judgement], **facts: object) -> dict[str, Any]:
    """What the JSON file holds: `facts`, `judgements`, and `average` where there are several assays, else None."""
    averages = [asdict(each) for each in _averages(judgements)]
    return {**facts, "judgements": [asdict(each) for each in judgements], "average": averages[0] if averages else None}


def report_table(judgements: Sequence[Judgement]) -> Table:
    """Measures above their intervals, a row a judgement; the average below, where there are several assays."""
    table = Table("assay", "variants", *MEASURES.values(), box=None)
    for each in (*judgements, *_averages(judgements)):
        variants = f"{each.variants:,} {each.subset}" + (f"\n{each.left_out:,} left out" if each.left_out else "")
        table.add_row(each.target, variants, *(_shown(getattr(each, name)) for name in MEASURES))
    return table


def _shown(measure: Measure) -> str:
    if measure.value is None:
        return "undefined"
    if measure.low is None or measure.high is None:
        return f"{measure.value:.3f}"
    return f"{measure.value:.3f}\n{measure.low:.3f} to {measure.high:.3f}"
