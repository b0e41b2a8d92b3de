"""Which amino acids sequences are made of, and how far two sets are apart in that.

Shapes: B sequences, A the 20 standard amino acids, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.alphabet import AMINO_ACIDS
from ..engine.bootstrap import repeats
from .estimate import Estimate, estimate

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LETTERS = AMINO_ACIDS
_CODES = np.frombuffer(LETTERS.encode(), dtype=np.uint8)
_CHANCE_SAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Amino acids of a set of sequences beside a reference's.

    Attributes:
        kl: KL(set || reference) in nats, over the 20 alone, each count plus one; interval over both sets' sequences,
            n the smaller set's.
        by_chance: the 95 % quantile of what two sets of these sizes have that are dealt from one heap.
        generated, reference: share of each amino acid, by letter.
        other_residues: how many residues of the set are none of the 20; they are counted nowhere else.
        residues: how many are.
    """

    kl: Estimate
    by_chance: float
    generated: dict[str, float]
    reference: dict[str, float]
    other_residues: int
    residues: int


def letter_counts(sequences: Sequence[str]) -> Counts:
    """How often each sequence holds each standard amino acid: int64 (B, 20), in the order of `LETTERS`."""
    counts_BA = np.zeros((len(sequences), len(LETTERS)), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        codes = np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)
        counts_BA[row] = np.bincount(codes, minlength=256)[_CODES]
    return counts_BA


def composition_kl(counts_A: npt.NDArray[Any], reference_A: npt.NDArray[Any]) -> float:
    """KL(p || q) in nats of two lists of counts, one added to each, so that no amino acid is impossible."""
    p_A, q_A = (counts_A + 1) / (counts_A + 1).sum(), (reference_A + 1) / (reference_A + 1).sum()
    return float((p_A * np.log(p_A / q_A)).sum())


def composition(
    generated: Sequence[str], reference: Sequence[str], *, samples: int = 1000, seed: int = 0
) -> Composition:
    """Holds one set's amino acids against another's.

    Args:
        generated, reference: at least one sequence each.
        samples, seed: of the bootstrap, which draws sequences of both.
    """
    ours_BA, theirs_BA = letter_counts(generated), letter_counts(reference)
    ours_A, theirs_A = ours_BA.sum(axis=0), theirs_BA.sum(axis=0)
    drawn = zip(
        repeats(len(ours_BA), samples=samples, seed=seed),
        repeats(len(theirs_BA), samples=samples, seed=seed + 1),
        strict=True,
    )
    values_S = np.array([composition_kl(ours_B @ ours_BA, theirs_B @ theirs_BA) for ours_B, theirs_B in drawn])
    heap_BA = np.concatenate((ours_BA, theirs_BA))
    total_A, rng = heap_BA.sum(axis=0), np.random.default_rng((seed, 2))
    dealt = []
    for _ in range(_CHANCE_SAMPLES):
        some_A = heap_BA[rng.permutation(len(heap_BA))[: len(ours_BA)]].sum(axis=0)
        dealt.append(composition_kl(some_A, total_A - some_A))
    residues = int(ours_A.sum())
    return Composition(
        kl=estimate(composition_kl(ours_A, theirs_A), values_S, min(len(ours_BA), len(theirs_BA))),
        by_chance=float(np.quantile(dealt, 0.95)),
        generated=_shares(ours_A),
        reference=_shares(theirs_A),
        other_residues=sum(map(len, generated)) - residues,
        residues=residues,
    )


def _shares(counts_A: Counts) -> dict[str, float]:
    total = max(1, int(counts_A.sum()))
    return {letter: count / total for letter, count in zip(LETTERS, counts_A.tolist(), strict=True)}
