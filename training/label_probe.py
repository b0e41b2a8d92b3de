"""A ridge classifier of embeddings: one-hot targets, the largest prediction wins; for proteins and for residues.

It is fitted from one Gram for each of five folds, of features and one-hot labels side by side, so rows may stream by in
any number. The strength is the one with the least squared error over the folds, each left out in turn.

Shapes: R rows (proteins, or residues of proteins), P features, C classes.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from ..engine.errors import InputError
from .gram import Gram
from .ridge_probe import FOLDS, STRENGTHS, Floats, merged

Labels = npt.NDArray[np.int64]


def fold_of(name: str) -> int:
    """The fold of a protein, by the hash of its sequence or id: the same everywhere, one for all of its residues."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % FOLDS


class LabelProbe:
    """Takes in labelled rows, is fitted once, and labels others.

    Args:
        features: P.
        classes: C.
    """

    def __init__(self, features: int, classes: int) -> None:
        self.features = features
        self.classes = classes
        self.strength = 0.0
        self._grams = [Gram(features + classes) for _ in range(FOLDS)]
        self._weight_PC = torch.zeros((features, classes), dtype=torch.float64)
        self._bias_C = torch.zeros(classes, dtype=torch.float64)

    def add(self, rows_RP: Floats | npt.NDArray[np.float32], labels_R: Labels, *, fold: int) -> None:
        """Takes in rows of one fold; rows of one protein belong to one fold.

        Raises:
            ValueError: there are not as many labels as rows, or a label is outside 0 to C - 1.
        """
        if len(rows_RP) != len(labels_R) or ((labels_R < 0) | (labels_R >= self.classes)).any():
            message = (
                f"{len(rows_RP)} rows, {len(labels_R)} labels: expected as many, each from 0 to {self.classes - 1}"
            )
            raise ValueError(message)
        one_hot_RC = np.eye(self.classes)[labels_R]
        self._grams[fold].add(torch.from_numpy(np.concatenate((rows_RP, one_hot_RC), axis=1)))

    def fit(self) -> None:
        """Chooses the strength, and solves on all rows.

        Raises:
            InputError: fewer than two folds have rows.
        """
        filled = [gram for gram in self._grams if gram.count]
        if len(filled) < 2:
            message = f"{sum(gram.count for gram in filled)} labelled rows in {len(filled)} folds are too few"
            raise InputError(message)
        errors = np.zeros(len(STRENGTHS))
        for place, left_out in enumerate(filled):
            rest = merged([gram for other, gram in enumerate(filled) if other != place])
            for number, (weight_PC, bias_C) in enumerate(self._solutions(rest)):
                errors[number] += left_out.count * self._error(left_out, weight_PC, bias_C)
        best = int(errors.argmin())
        self.strength = STRENGTHS[best]
        self._weight_PC, self._bias_C = self._solutions(merged(filled))[best]

    def _solutions(self, gram: Gram) -> list[tuple[torch.Tensor, torch.Tensor]]:
        P = self.features
        covariance_ZZ = gram.covariance_ZZ
        values_P, vectors_PP = torch.linalg.eigh(covariance_ZZ[:P, :P])
        values_P = values_P.clamp(min=0)
        turned_PC = vectors_PP.T @ covariance_ZZ[:P, P:]
        unit = float(values_P.mean()) or 1.0
        weights = [vectors_PP @ (turned_PC / (values_P + strength * unit)[:, None]) for strength in STRENGTHS]
        return [(weight_PC, gram.mean_Z[P:] - gram.mean_Z[:P] @ weight_PC) for weight_PC in weights]

    def _error(self, gram: Gram, weight_PC: torch.Tensor, bias_C: torch.Tensor) -> float:
        """Mean squared error on a Gram's rows, summed over classes."""
        P = self.features
        direction_ZC = torch.cat((-weight_PC, torch.eye(self.classes, dtype=torch.float64)))
        offset_C = gram.mean_Z[P:] - gram.mean_Z[:P] @ weight_PC - bias_C
        return float((direction_ZC * (gram.covariance_ZZ @ direction_ZC)).sum() + offset_C.square().sum())

    def predict(self, rows_RP: Floats | npt.NDArray[np.float32]) -> Labels:
        """The class of each row: int64 (R,)."""
        scores_RC = rows_RP @ self._weight_PC.numpy() + self._bias_C.numpy()
        labels_R: Labels = scores_RC.argmax(axis=1)
        return labels_R
