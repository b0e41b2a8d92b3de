"""Models that say what a test wants them to say, for what judges models.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.training.prediction import Predictions
from protnest.training.token_scores import TokenScores

END = "<end>"
LETTERS = (*AMINO_ACIDS, END)


class Followed:
    """Remembers the stages of a judgement: their words, what they announced, and what they were told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.told: list[list[int]] = []

    def stage(self, words: str, residues: int) -> None:
        self.stages.append((words, residues))
        self.told.append([])

    def advance(self, residues: int) -> None:
        self.told[-1].append(residues)


@dataclass
class NextLetter:
    """A decoder in the small: asked for each next letter and the end; it says the same at every place.

    Attributes:
        probabilities: of each token of the vocabulary.
        name, vocabulary, context, task: as of `Predictor`.
        chunk: rows in a chunk.
        skips: leaves out the first letter, as another tokeniser might.
        backwards: from the last letter to the first.
        seen: the context of each call.
    """

    probabilities: Sequence[float]
    name: str = "toy"
    vocabulary: tuple[str, ...] = LETTERS
    context: int = 1000
    task: str = "next tokens"
    chunk: int = 7
    skips: bool = False
    backwards: bool = False
    seen: list[int] = field(default_factory=list)

    def residues_run(self, sequences: Sequence[str], *, context: int | None = None) -> int:
        most = self.context if context is None else min(context, self.context)
        return sum(min(len(each), most) for each in sequences)

    def predictions(self, sequences: Sequence[str], *, context: int | None = None) -> Iterator[Predictions]:
        most = self.context if context is None else min(context, self.context)
        self.seen.append(most)
        rows = []
        for number, sequence in enumerate(sequences):
            letters = [*sequence[:most][:: -1 if self.backwards else 1], END][1 if self.skips else 0 :]
            rows += [(number, self.vocabulary.index(letter), letter != END) for letter in letters]
        row_V = torch.tensor(self.probabilities, dtype=torch.float32).log()
        for begin in range(0, len(rows), self.chunk):
            numbers, labels, residues = zip(*rows[begin : begin + self.chunk], strict=True)
            yield Predictions(
                log_probs_NV=row_V.repeat(len(labels), 1),
                label_N=np.array(labels, dtype=np.int64),
                residues_N=np.array(residues, dtype=np.int64),
                sequence_N=np.array(numbers, dtype=np.int64),
            )


def uniform(**changes: object) -> NextLetter:
    """Every token is as likely as any other."""
    return NextLetter([1 / len(LETTERS)] * len(LETTERS), **changes)  # type: ignore[arg-type]


def made_scores(
    confidence: Sequence[float], correct: Sequence[bool], sequence: Sequence[int] | None = None
) -> TokenScores:
    """Scores of tokens whose likelihoods do not matter; by default each is a sequence of its own."""
    N = len(confidence)
    return TokenScores(
        nll_N=np.ones(N),
        confidence_N=np.array(confidence, dtype=np.float64),
        correct_N=np.array(correct, dtype=bool),
        residues_N=np.ones(N, dtype=np.int64),
        sequence_N=np.arange(N) if sequence is None else np.array(sequence, dtype=np.int64),
    )
