"""The measures of `ranking` on rows that were drawn several times or not at all, without sorting anew.

Truth and score are sorted once, into levels: distinct values, ascending. How many drawn rows a level holds, and their
running sum, then say all ranks.

Shapes: N variants, G distinct values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .ranking import Flags, Floats, mcc_of_counts

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Levels:
    """Values by their distinct ones: `values_G`, ascending, and which of them each row has."""

    values_G: Floats
    level_N: Integers

    @classmethod
    def of(cls, values_N: Floats) -> _Levels:
        values_G, level_N = np.unique(values_N, return_inverse=True)
        return cls(values_G=values_G, level_N=level_N)

    def sums(self, weights_N: Floats) -> Floats:
        """Of each level's rows: fp64 (G,)."""
        return _sums(self.level_N, weights_N, len(self.values_G))


def _sums(groups_N: Integers, weights_N: Floats, groups: int) -> Floats:
    return np.bincount(groups_N, weights_N, minlength=groups).astype(np.float64, copy=False)


class _Drawn:
    """How many rows of each level a sample holds, `counts_G`, and of it and those below, `running_G`."""

    def __init__(self, levels: _Levels, weights_N: Floats) -> None:
        self.rows = len(weights_N)
        self.counts_G = levels.sums(weights_N)
        self.running_G = np.cumsum(self.counts_G)

    def level(self, place: int) -> int:
        """That of the row at a place of the ascending order, from 0."""
        return int(np.searchsorted(self.running_G, place, side="right"))

    def centred_ranks(self) -> Floats:
        """The rank that each level's rows share, less the mean of all ranks: fp64 (G,)."""
        return self.running_G - (self.counts_G + self.rows) / 2


class Resampling:
    """One assay, judged on samples of its rows.

    Args:
        truth_N, score_N: fp64.
        positive_N, predicted_N: classes that a row keeps in every sample.
        top: share that counts as the top.
    """

    def __init__(
        self, truth_N: Floats, score_N: Floats, positive_N: Flags, predicted_N: Flags, *, top: float = 0.1
    ) -> None:
        self._truth = _Levels.of(truth_N)
        self._score = _Levels.of(score_N)
        self._positive_N = positive_N.astype(np.float64)
        self._cell_N = 2 * positive_N.astype(np.int64) + predicted_N
        self._truth_N = truth_N
        self._top = top
        taken = math.floor(len(truth_N) * top)
        self._discounts = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(2, taken + 2)))))
        """What those of the first so many ranks add up to."""

    def measures(self, times_N: Integers) -> dict[str, float]:
        """Each measure as `ranking` has it for the rows, each repeated so often, by its name there.

        Args:
            times_N: not negative, adding up to N.
        """
        weights_N = times_N.astype(np.float64)
        truth, score = _Drawn(self._truth, weights_N), _Drawn(self._score, weights_N)
        truth_ranks_G, score_ranks_G = truth.centred_ranks(), score.centred_ranks()
        score_ranks_N = weights_N * score_ranks_G[self._score.level_N]
        spread = float((truth.counts_G @ truth_ranks_G**2) * (score.counts_G @ score_ranks_G**2))
        varies = spread > 0
        together = float(score_ranks_N @ truth_ranks_G[self._truth.level_N])
        return {
            "spearman": together / math.sqrt(spread) if varies and len(times_N) > 2 else math.nan,
            "auc": self._auc(weights_N, float(score_ranks_N @ self._positive_N)),
            "mcc": mcc_of_counts(_sums(self._cell_N, weights_N, 4)),
            "ndcg": self._ndcg(weights_N, truth, score),
            "top_recall": self._top_recall(weights_N, truth, score) if varies else math.nan,
        }

    def _auc(self, weights_N: Floats, rank_sum: float) -> float:
        """From the sum of the positives' centred ranks: 0 where they are amid the negatives."""
        positives = float(weights_N @ self._positive_N)
        negatives = len(weights_N) - positives
        return rank_sum / (positives * negatives) + 0.5 if positives and negatives else math.nan

    def _ndcg(self, weights_N: Floats, truth: _Drawn, score: _Drawn) -> float:
        values_G = self._truth.values_G
        low, high = values_G[truth.level(0)], values_G[truth.level(truth.rows - 1)]
        if low == high or len(self._discounts) == 1:
            return math.nan
        # The scale of the gains is the same above and below.
        gained = self._gain(score, self._score.sums(weights_N * (self._truth_N - low)))
        return gained / self._gain(truth, truth.counts_G * (values_G - low))

    def _gain(self, drawn: _Drawn, sums_G: Floats) -> float:
        """Discounted sum of gains over the first ranks, given each level's sum of them."""
        taken = len(self._discounts) - 1
        top = slice(drawn.level(drawn.rows - taken), None)
        counts = drawn.counts_G[top]
        # Ranks count from the highest: a level ends where those below it begin.
        ends = drawn.rows - (drawn.running_G[top] - counts)
        first, behind = (np.minimum(each, taken).astype(np.int64) for each in (ends - counts, ends))
        discounts = self._discounts[behind] - self._discounts[first]
        return float(sums_G[top] / np.maximum(counts, 1) @ discounts)

    def _top_recall(self, weights_N: Floats, truth: _Drawn, score: _Drawn) -> float:
        place = math.ceil((truth.rows - 1) * (1 - self._top))
        truly_N = self._truth.level_N >= truth.level(place)
        hit_N = truly_N & (self._score.level_N >= score.level(place))
        return float(weights_N @ hit_N) / float(weights_N @ truly_N)
