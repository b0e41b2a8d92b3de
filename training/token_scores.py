"""What judging keeps of a model's predictions: a few numbers a token, however large the vocabulary.

Shapes: N predicted tokens, V vocabulary, B sequences that have any.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..engine.errors import InputError
from .prediction import Integers, Predictions, Predictor
from .teacher_divergence import check_vocabularies, divergence

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One model's predictions of N tokens.

    Attributes:
        nll_N: fp64, -log p of the true token, natural logarithm.
        confidence_N: fp64, the largest probability.
        correct_N: bool, whether the true token has it; of equal ones the first counts.
        residues_N: int64, how many residues each token stands for.
        sequence_N: int64, which sequence it belongs to: 0 to B - 1, none left out, never falling.
    """

    nll_N: Floats
    confidence_N: Floats
    correct_N: npt.NDArray[np.bool_]
    residues_N: Integers
    sequence_N: Integers

    @property
    def sequences(self) -> int:
        """B: how many sequences have a token that was asked for."""
        return int(self.sequence_N[-1]) + 1

    def sums_B(self, values_N: npt.NDArray[np.float64] | Integers | npt.NDArray[np.bool_]) -> Floats:
        """Sum over each sequence's tokens: fp64 (B,)."""
        sums_B = np.bincount(self.sequence_N, weights=values_N, minlength=self.sequences)
        return sums_B.astype(np.float64)

    @property
    def tokens_B(self) -> Floats:
        return self.sums_B(np.ones_like(self.sequence_N))

    @property
    def residues_B(self) -> Floats:
        return self.sums_B(self.residues_N)


@dataclass(frozen=True, eq=False)
class Scored:
    """A model, and a teacher on the same tokens.

    Attributes:
        model: its scores.
        teacher: the teacher's, None without one.
        divergence_N: fp64, KL(teacher || model) of each token in nats, None without a teacher.
    """

    model: TokenScores
    teacher: TokenScores | None = None
    divergence_N: Floats | None = None


def score_tokens(predictor: Predictor, sequences: Sequence[str], *, teacher: Predictor | None = None) -> Scored:
    """Runs a model over sequences, and a teacher beside it, in bounded memory.

    Both see as much of a sequence as the shorter-sighted one, so that they are asked the same.

    Raises:
        InputError: there is nothing to ask for, a log-probability is NaN, or the teacher has another vocabulary or was
            asked for other tokens.
    """
    if teacher is None:
        ours = [_reduced(chunk, predictor.name) for chunk in predictor.predictions(sequences)]
        return Scored(_joined(ours, len(sequences)))
    check_vocabularies(teacher, predictor)
    context = min(predictor.context, teacher.context)
    ours, theirs, divergences = [], [], []
    pairs = itertools.zip_longest(
        predictor.predictions(sequences, context=context), teacher.predictions(sequences, context=context)
    )
    for chunk, beside in pairs:
        if chunk is None or beside is None or not _are_alike(chunk, beside):
            message = f"{teacher.name} was asked for other tokens than {predictor.name}: no divergence between them"
            raise InputError(message)
        ours.append(_reduced(chunk, predictor.name))
        theirs.append(_reduced(beside, teacher.name))
        divergences.append(divergence(beside.log_probs_NV, chunk.log_probs_NV))
    return Scored(_joined(ours, len(sequences)), _joined(theirs, len(sequences)), np.concatenate(divergences))


def _are_alike(one: Predictions, other: Predictions) -> bool:
    return np.array_equal(one.label_N, other.label_N) and np.array_equal(one.sequence_N, other.sequence_N)


def _reduced(chunk: Predictions, name: str) -> TokenScores:
    log_probs_NV = chunk.log_probs_NV
    if bool(torch.isnan(log_probs_NV).any()):
        message = f"{name} gives probabilities that are no numbers: its weights or its precision are broken"
        raise InputError(message)
    label_N = torch.from_numpy(chunk.label_N).to(log_probs_NV.device)
    top_N, place_N = log_probs_NV.max(dim=-1)
    nll_N = -log_probs_NV.gather(1, label_N[:, None])[:, 0]
    return TokenScores(
        nll_N=nll_N.double().cpu().numpy(),
        confidence_N=top_N.double().exp().clamp(max=1.0).cpu().numpy(),
        correct_N=(place_N == label_N).cpu().numpy(),
        residues_N=chunk.residues_N,
        sequence_N=chunk.sequence_N,
    )


def _joined(chunks: list[TokenScores], sequences: int) -> TokenScores:
    if not chunks:
        message = f"nothing to judge by: {sequences} sequences hold no token that could be asked for"
        raise InputError(message)
    sequence_N = np.concatenate([each.sequence_N for each in chunks])
    return TokenScores(
        nll_N=np.concatenate([each.nll_N for each in chunks]),
        confidence_N=np.concatenate([each.confidence_N for each in chunks]),
        correct_N=np.concatenate([each.correct_N for each in chunks]),
        residues_N=np.concatenate([each.residues_N for each in chunks]),
        sequence_N=np.unique(sequence_N, return_inverse=True)[1].astype(np.int64),
    )
