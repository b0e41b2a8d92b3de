"""A ridge probe with cross-validation.

Five folds; in each, the strength is the one of a grid with the least squared error over the remaining folds, each left
out in turn. Everything follows from one Gram a fold, of features and target side by side.

Shapes: N examples, P features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .gram import Gram

Floats = npt.NDArray[np.float64]

FOLDS = 5
STRENGTHS: tuple[float, ...] = tuple(10.0**exponent for exponent in range(-6, 3))
"""Strengths in units of the features' mean variance."""


def split(examples: int, *, seed: int = 0) -> npt.NDArray[np.int64]:
    """A fold for each of N examples, int64 (N,), drawn at random, sizes as equal as can be."""
    folds = np.arange(examples, dtype=np.int64) % FOLDS
    return np.random.default_rng(seed).permutation(folds)


def _gram(features_NP: Floats, targets_N: Floats) -> Gram:
    gram = Gram(features_NP.shape[1] + 1)
    gram.add(torch.from_numpy(np.column_stack((features_NP, targets_N))))
    return gram


def merged(grams: Sequence[Gram]) -> Gram:
    """One Gram of the rows of all."""
    total = Gram(grams[0].mean_Z.numel())
    for gram in grams:
        total.merge(gram)
    return total


@dataclass(frozen=True, kw_only=True, eq=False)
class _Solver:
    """Ridge solutions of one Gram at any strength, from one eigendecomposition."""

    mean_Z: torch.Tensor
    values_P: torch.Tensor
    vectors_PP: torch.Tensor
    turned_P: torch.Tensor

    @classmethod
    def of(cls, gram: Gram) -> _Solver:
        covariance_ZZ = gram.covariance_ZZ
        values_P, vectors_PP = torch.linalg.eigh(covariance_ZZ[:-1, :-1])
        return cls(
            mean_Z=gram.mean_Z,
            values_P=values_P.clamp(min=0),
            vectors_PP=vectors_PP,
            turned_P=vectors_PP.T @ covariance_ZZ[:-1, -1],
        )

    def weight(self, strength: float) -> torch.Tensor:
        unit = float(self.values_P.mean()) or 1.0
        return self.vectors_PP @ (self.turned_P / (self.values_P + strength * unit))

    def error(self, gram: Gram, strength: float) -> float:
        """Mean squared error on another Gram's rows."""
        weight_P = self.weight(strength)
        direction_Z = torch.cat((-weight_P, torch.ones(1, dtype=torch.float64)))
        offset = (gram.mean_Z - self.mean_Z) @ direction_Z
        return float(direction_Z @ gram.covariance_ZZ @ direction_Z + offset**2)


def cross_validated(features_NP: Floats, targets_N: Floats, folds_N: npt.NDArray[np.int64]) -> Floats:
    """What a ridge probe predicts for each example when its fold is left out: fp64 (N,).

    Raises:
        ValueError: a fold is empty, or the lengths differ.
    """
    grams = _fold_grams(features_NP, targets_N, folds_N)
    predicted_N = np.empty(len(targets_N))
    for fold in range(FOLDS):
        member = folds_N == fold
        others = [gram for place, gram in enumerate(grams) if place != fold]
        strength = _best_strength(others)
        solver = _Solver.of(merged(others))
        mean_P, mean = solver.mean_Z[:-1].numpy(), float(solver.mean_Z[-1])
        predicted_N[member] = (features_NP[member] - mean_P) @ solver.weight(strength).numpy() + mean
    return predicted_N


def fitted(features_NP: Floats, targets_N: Floats, folds_N: npt.NDArray[np.int64]) -> tuple[Floats, float, float]:
    """A ridge on all examples: weight fp64 (P,), bias, and the strength, the one of the grid with the least squared
    error over the folds, each left out in turn.

    Raises:
        ValueError: a fold is empty, or the lengths differ.
    """
    grams = _fold_grams(features_NP, targets_N, folds_N)
    strength = _best_strength(grams)
    solver = _Solver.of(merged(grams))
    weight_P = solver.weight(strength)
    bias = float(solver.mean_Z[-1] - solver.mean_Z[:-1] @ weight_P)
    return weight_P.numpy(), bias, strength


def _fold_grams(features_NP: Floats, targets_N: Floats, folds_N: npt.NDArray[np.int64]) -> list[Gram]:
    if not len(features_NP) == len(targets_N) == len(folds_N):
        message = f"{len(features_NP)} features, {len(targets_N)} targets and {len(folds_N)} folds: they must agree"
        raise ValueError(message)
    members = [folds_N == fold for fold in range(FOLDS)]
    if not all(member.any() for member in members):
        message = f"{len(folds_N)} examples do not fill {FOLDS} folds"
        raise ValueError(message)
    return [_gram(features_NP[member], targets_N[member]) for member in members]


def _best_strength(grams: list[Gram]) -> float:
    errors = np.zeros(len(STRENGTHS))
    for place, left_out in enumerate(grams):
        solver = _Solver.of(merged([gram for other, gram in enumerate(grams) if other != place]))
        errors += [solver.error(left_out, strength) * left_out.count for strength in STRENGTHS]
    return STRENGTHS[int(errors.argmin())]
