"""How often a row of one class is given another: the counts from which accuracy and F1 follow, protein by protein.

Residues of a protein are not independent, so proteins are what a bootstrap draws.

Shapes: R rows, B proteins, C classes (true ones first, then those that were given), S bootstrap samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..engine.bootstrap import repeats

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def confusions(labels_R: Labels, predicted_R: Labels, proteins_R: Labels, shape: tuple[int, int]) -> Floats:
    """Counts of each protein, by true and given class: fp64 (B, C, C).

    Args:
        labels_R, predicted_R: from 0 to C - 1.
        proteins_R: which protein a row belongs to, from 0 to B - 1.
        shape: B and C.
    """
    B, C = shape
    counts = np.bincount((proteins_R * C + labels_R) * C + predicted_R, minlength=B * C * C)
    return counts.reshape(B, C, C).astype(np.float64)


def accuracy(counts_CC: Floats) -> Floats:
    """Share of rows whose class is right, of (..., C, C) as (...); over residues' three states that is Q3."""
    right: Floats = np.trace(counts_CC, axis1=-2, axis2=-1) / counts_CC.sum(axis=(-2, -1))
    return right


def macro_f1(counts_CC: Floats) -> Floats:
    """Mean of the classes' F1, each counting alike, over the classes that rows truly have: of (..., C, C) as (...)."""
    right = np.diagonal(counts_CC, axis1=-2, axis2=-1)
    truly, given = counts_CC.sum(axis=-1), counts_CC.sum(axis=-2)
    scores = 2 * right / np.maximum(truly + given, 1)
    occurs = truly > 0
    mean: Floats = (scores * occurs).sum(axis=-1) / occurs.sum(axis=-1)
    return mean


def bootstrapped(counts_BCC: Floats, *, samples: int = 1000, seed: int = 0) -> Floats:
    """Counts over proteins drawn with replacement, the same ones for the same B and seed: fp64 (S, C, C)."""
    B, C, _ = counts_BCC.shape
    times_SB = np.stack(list(repeats(B, samples=samples, seed=seed))).astype(np.float64)
    return (times_SB @ counts_BCC.reshape(B, C * C)).reshape(samples, C, C)
