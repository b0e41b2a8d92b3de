"""Whether a model is as often right as it is sure: accuracy, mean confidence, ECE and MCE.

Of K bins of confidence, ECE is the sum over bins of n_k / N |accuracy_k - confidence_k|, MCE the largest of these gaps
(Guo, Pleiss, Sun, Weinberger, ICML 2017). A model that is never right has an ECE that is its mean confidence and says
nothing else, so accuracy stands beside it. Both are biased upwards, and never zero in a sample: `by_chance` is what a
model would have that is calibrated exactly.

Shapes: N predicted tokens, B sequences, K bins, S samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..engine.bootstrap import repeats
from .estimate import Estimate, estimate, ratio
from .token_scores import TokenScores

Floats = npt.NDArray[np.float64]
Binning = Literal["equal_width", "equal_mass"]

BINS = 15
_CHANCE_SAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bar of a reliability diagram; its confidences are above `low` and at most `high`.

    Attributes:
        low, high: its ends.
        tokens: how many are in it.
        confidence, accuracy: their means.
    """

    low: float
    high: float
    tokens: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Binned:
    """Errors of calibration with one way of binning.

    Attributes:
        ece, mce: with bootstrap intervals over sequences, the bins kept.
        by_chance: mean ECE of a model that is right exactly as often as it is sure, at these confidences.
        bins: those that hold a token.
    """

    ece: Estimate
    mce: Estimate
    by_chance: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How right and how sure a model is.

    Attributes:
        accuracy: share of tokens whose most probable guess is right.
        confidence: mean probability of that guess.
        equal_width: bins of equal width from 0 to 1.
        equal_mass: bins of equally many tokens; equal confidences are never parted.
    """

    accuracy: Estimate
    confidence: Estimate
    equal_width: Binned
    equal_mass: Binned


def calibration(scores: TokenScores, *, bins: int = BINS, samples: int = 1000, seed: int = 0) -> Calibration:
    """Judges how well a model's confidence says how often it is right.

    Args:
        scores: of N tokens.
        bins: K.
        samples, seed: of the bootstrap over sequences.
    """
    tokens_B = scores.tokens_B
    confidence_N = scores.confidence_N
    return Calibration(
        accuracy=ratio(scores.sums_B(scores.correct_N), tokens_B, samples=samples, seed=seed),
        confidence=ratio(scores.sums_B(confidence_N), tokens_B, samples=samples, seed=seed),
        equal_width=_binned(scores, np.linspace(0.0, 1.0, bins + 1), samples=samples, seed=seed),
        equal_mass=_binned(scores, _equal_mass_edges(confidence_N, bins), samples=samples, seed=seed),
    )


def _equal_mass_edges(confidence_N: Floats, bins: int) -> Floats:
    """Ends of bins that hold N / K tokens each, as far as equal confidences allow."""
    inner = np.quantile(confidence_N, np.arange(1, bins) / bins, method="inverted_cdf")
    return np.array([0.0, *np.unique(inner), 1.0])


def _binned(scores: TokenScores, edges: Floats, *, samples: int, seed: int) -> Binned:
    K, B = len(edges) - 1, scores.sequences
    bin_N = np.clip(np.searchsorted(edges, scores.confidence_N, side="left") - 1, 0, K - 1)
    place_N = scores.sequence_N * K + bin_N

    def table(values_N: npt.NDArray[np.float64] | None) -> Floats:
        return np.bincount(place_N, weights=values_N, minlength=B * K).reshape(B, K).astype(np.float64)

    count_BK, confidence_BK = table(None), table(scores.confidence_N)
    correct_BK = table(scores.correct_N.astype(np.float64))

    def errors(times_B: npt.NDArray[np.int64]) -> tuple[float, float]:
        return _errors(times_B @ count_BK, times_B @ confidence_BK, times_B @ correct_BK)

    ones_B = np.ones(B, dtype=np.int64)
    ece, mce = errors(ones_B)
    drawn_S2 = np.array([errors(times_B) for times_B in repeats(B, samples=samples, seed=seed)])
    count_K, confidence_K, correct_K = (ones_B @ each for each in (count_BK, confidence_BK, correct_BK))
    return Binned(
        ece=estimate(ece, drawn_S2[:, 0], B),
        mce=estimate(mce, drawn_S2[:, 1], B),
        by_chance=_by_chance(scores.confidence_N, bin_N, K, seed=seed),
        bins=tuple(
            Bin(
                low=float(edges[k]),
                high=float(edges[k + 1]),
                tokens=int(count_K[k]),
                confidence=float(confidence_K[k] / count_K[k]),
                accuracy=float(correct_K[k] / count_K[k]),
            )
            for k in np.flatnonzero(count_K).tolist()
        ),
    )


def _errors(count_K: Floats, confidence_K: Floats, correct_K: Floats) -> tuple[float, float]:
    """ECE and MCE from each bin's tokens, sum of confidences, and right guesses."""
    if not count_K.any():
        return math.nan, math.nan
    gap_K = np.abs(correct_K - confidence_K)
    held = count_K > 0
    return float(gap_K.sum() / count_K.sum()), float((gap_K[held] / count_K[held]).max())


def _by_chance(confidence_N: Floats, bin_N: npt.NDArray[np.int64], K: int, *, seed: int) -> float:
    """Mean ECE over draws in which each guess is right with the probability that it was given."""
    rng = np.random.default_rng((seed, 1))
    confidence_K = np.bincount(bin_N, weights=confidence_N, minlength=K).astype(np.float64)
    # A bin's right guesses are a sum of many coins: normal, with the coins' mean and variance, which costs N once.
    std_K = np.sqrt(np.bincount(bin_N, weights=confidence_N * (1 - confidence_N), minlength=K))
    count_K = np.bincount(bin_N, minlength=K).astype(np.float64)
    correct_SK = confidence_K + std_K * rng.standard_normal((_CHANCE_SAMPLES, K))
    return float(np.mean([_errors(count_K, confidence_K, np.clip(each, 0, count_K))[0] for each in correct_SK]))
