"""Next tokens: what a decoder learns from, alone or from a larger decoder.

Row i of a sequence predicts its token i + 1; the last token predicts nothing. The end of a whole sequence is a token as
any other and is learnt, or a model would never stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..engine.decoder import Decoder, pack_ids
from ..engine.errors import InputError
from ..engine.packing import ChosenRows
from ..engine.vocabulary import Vocabulary
from ..kernels.kd_options import KDOptions
from .corpus import Corpus, Share
from .order import Index
from .row_task import RowBatch, RowTask, Teacher


def causal_corpus(share: Share, vocabulary: Vocabulary, places: int) -> tuple[Corpus, int]:
    """Proteins in a decoder's tokens, and how many were too long to stay whole.

    A sequence of more than `places` tokens is split; the last token of a piece is the first of the next, so that each
    token but the first is predicted once. Only the first piece has the start, only the last one the end.

    Raises:
        InputError: `places` is below 2, or a sequence cannot be written in the vocabulary.
    """
    if places < 2:
        message = f"a context of {places} tokens predicts nothing, expected 2 at least"
        raise InputError(message)
    dtype = np.uint8 if vocabulary.size <= 1 << 8 else np.uint16 if vocabulary.size <= 1 << 16 else np.int32
    pieces, ids, split = [], [], 0
    for name, sequence in zip(share.ids, share.sequences, strict=True):
        tokens = vocabulary.encode(sequence).astype(dtype)
        split += len(tokens) > places
        for begin in range(0, len(tokens) - 1, places - 1):
            pieces.append(tokens[begin : begin + places])
            ids.append(name)
    if not pieces:
        message = "no sequence to train on"
        raise InputError(message)
    return Corpus(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)]), tuple(ids)), split


class CausalTask(RowTask):
    """Causal language modelling, with or without a teacher.

    Args:
        model: the student.
        corpus: in its tokens, no piece longer than its positions: `causal_corpus` makes it.
        teacher: None for labels alone.
        options: of the distillation loss.

    Raises:
        InputError: a piece is longer than the model's positions.
    """

    model: Decoder

    def __init__(
        self,
        model: Decoder,
        corpus: Corpus,
        *,
        teacher: Teacher | None = None,
        options: KDOptions | None = None,
    ) -> None:
        super().__init__(model, corpus, teacher=teacher, options=options)
        longest = int(corpus.lengths_B.max(initial=0))
        if longest > model.config.places:
            message = f"a sequence has {longest} tokens; {model.name} has positions for {model.config.places}"
            raise InputError(message)

    @property
    def lengths_B(self) -> Index:
        return self.corpus.lengths_B

    def row_identity(self) -> dict[str, Any]:
        return {**super().row_identity(), "task": "next tokens"}

    def batch(self, numbers: Sequence[int], epoch: int) -> RowBatch:
        pieces = [self.corpus[number].astype(np.int64) for number in numbers]
        ends = np.cumsum([len(piece) for piece in pieces])
        predicts_T = np.ones(int(ends[-1]), dtype=bool)
        predicts_T[ends - 1] = False
        return RowBatch(
            packed=pack_ids(pieces),
            chosen=ChosenRows(torch.from_numpy(np.flatnonzero(predicts_T)), tuple(len(piece) - 1 for piece in pieces)),
            labels_N=torch.from_numpy(np.concatenate([piece[1:] for piece in pieces])),
            keys=tuple((number, 0) for number in numbers),
        )
