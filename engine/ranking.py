"""How well scores rank variants: Spearman, AUC, MCC, NDCG and recall at the top, each as ProteinGym defines it.

Source: Notin et al., NeurIPS 2023 (ProteinGym), and `performance_DMS_benchmarks.py`, the script behind its tables. Who
reaches the percentile is at the top, as in the script's newest version; older ones ask for more than the percentile.

Scores and truths are finite; higher is better. What is not defined is NaN, where the script has 0 or an error.

Shapes: N variants, G distinct values.
"""

from __future__ import annotations

import math
from collections.abc import Sized

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def ranks(values_N: Floats) -> Floats:
    """Ranks from 1, ties sharing their mean: fp64 (N,)."""
    order = values_N.argsort(kind="stable")
    sorted_N = values_N[order]
    begins = np.flatnonzero(np.concatenate(([True], sorted_N[1:] != sorted_N[:-1])))
    ends = np.append(begins[1:], len(values_N))
    out = np.empty(len(values_N))
    out[order] = np.repeat((begins + ends + 1) / 2, ends - begins)
    return out


def spearman(one_N: Floats, other_N: Floats) -> float:
    """Spearman's rank correlation; NaN where one of them does not vary or there are fewer than three."""
    if len(one_N) < 3:
        return float("nan")
    a, b = (each - each.mean() for each in (ranks(one_N), ranks(other_N)))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def _check(one_N: Sized, other_N: Sized, top: float = 0.1) -> None:
    if len(one_N) != len(other_N):
        message = f"{len(one_N)} variants beside {len(other_N)}: they must be the same"
        raise ValueError(message)
    if not 0 < top < 1:
        message = f"top is {top}, expected a share between 0 and 1"
        raise ValueError(message)


def auc(positive_N: Flags, score_N: Floats) -> float:
    """Chance that a positive scores higher than a negative, ties counting half: the area under the ROC curve.

    NaN where there are no positives or no negatives.

    Raises:
        ValueError: the lengths differ.
    """
    _check(positive_N, score_N)
    positive_N = np.asarray(positive_N, dtype=bool)
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    # The positives' ranks among themselves add up to the same whatever the scores are.
    won = float(ranks(score_N)[positive_N].sum()) - positives * (positives + 1) / 2
    return won / (positives * negatives)


def mcc(positive_N: Flags, predicted_N: Flags) -> float:
    """Matthews' correlation of two classes.

    NaN where one of them holds all variants, truly or as predicted.

    Raises:
        ValueError: the lengths differ.
    """
    _check(positive_N, predicted_N)
    cells = 2 * np.asarray(positive_N, dtype=bool) + np.asarray(predicted_N, dtype=bool)
    return mcc_of_counts(np.bincount(cells, minlength=4).astype(np.float64))


def mcc_of_counts(counts: Floats) -> float:
    """`mcc` from four counts: true negatives, false positives, false negatives, true positives."""
    true_negatives, false_positives, false_negatives, true_positives = counts.tolist()
    truly = (true_positives + false_negatives) * (true_negatives + false_positives)
    predicted = (true_positives + false_positives) * (true_negatives + false_negatives)
    if not truly or not predicted:
        return float("nan")
    scale = math.sqrt(truly) * math.sqrt(predicted)
    return float((true_positives * true_negatives - false_positives * false_negatives) / scale)


def ndcg(truth_N: Floats, score_N: Floats, top: float = 0.1) -> float:
    """Normalised discounted cumulative gain of the floor(top N) variants that score highest.

    A variant at rank r (from 1, highest first) gains g / log2(r + 1), where g is the truth scaled to 0 ... 1; the sum
    is divided by that of the best order. Variants with one score share the mean of their ranks' discounts, which is
    what a random order among them gains on average: ProteinGym's depends on the order in which they are listed.

    NaN where the truth does not vary, or floor(top N) is 0: with fewer than ten variants for a tenth.

    Raises:
        ValueError: the lengths differ, or `top` is not between 0 and 1.
    """
    _check(truth_N, score_N, top)
    taken = math.floor(len(truth_N) * top)
    if not taken or truth_N.min() == truth_N.max():
        return float("nan")
    gains_N = (truth_N - truth_N.min()) / (truth_N.max() - truth_N.min())
    return float(gains_N @ _discounts(score_N, taken)) / float(gains_N @ _discounts(gains_N, taken))


def _discounts(values_N: Floats, taken: int) -> Floats:
    """1 / log2(rank + 1) for the highest values, 0 below the first `taken`; ties share their mean: fp64 (N,)."""
    by_rank_N = np.zeros(len(values_N))
    by_rank_N[:taken] = 1 / np.log2(np.arange(2, taken + 2))
    _, level_N, counts_G = np.unique(-values_N, return_inverse=True, return_counts=True)
    shared_G: Floats = np.add.reduceat(by_rank_N, np.cumsum(counts_G) - counts_G) / counts_G
    return shared_G[level_N]


def top_recall(truth_N: Floats, score_N: Floats, top: float = 0.1) -> float:
    """Share of the truly highest variants that are among those that score highest.

    Highest is who reaches the (1 - top) percentile, linearly interpolated, of the truth and of the score. All that tie
    with the last one are in: a score that hardly varies recalls much.

    NaN where truth or score does not vary at all, and for no variants.

    Raises:
        ValueError: the lengths differ, or `top` is not between 0 and 1.
    """
    _check(truth_N, score_N, top)
    if any(not len(each_N) or each_N.min() == each_N.max() for each_N in (truth_N, score_N)):
        return float("nan")
    # No value lies between the interpolated percentile and the next higher value: both choose the same variants.
    truly_N, found_N = (each_N >= np.quantile(each_N, 1 - top, method="higher") for each_N in (truth_N, score_N))
    return int((truly_N & found_N).sum()) / int(truly_N.sum())
