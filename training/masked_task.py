"""Masked residues: what an encoder learns from, alone or from a larger encoder.

Crop and masks of a sequence follow from (seed, sequence, epoch): not from its batch, so accumulated batches, packed
ones and several processes see the same. With `mask_epochs` = K they come again after K epochs, which lets a cache of
the teacher serve all that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..engine.alphabet import BOS_ID, EOS_ID
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.packing import ChosenRows, pack_tokens
from ..kernels.kd_options import KDOptions
from .corpus import Corpus, Tokens, crop
from .masking import ASKED, mask_tokens
from .order import Index
from .row_task import IGNORED, RowBatch, RowTask, Teacher
from .streams import Stream, stream

ROWS = ("masked", "all")


class MaskedTask(RowTask):
    """ESM-2's masked language modelling, with or without a teacher.

    Args:
        model: the student, with a language-model head.
        corpus: in ESM-2's alphabet.
        seed: of crops and masks.
        teacher: None for labels alone.
        options: of the distillation loss.
        rows: "masked": the teacher's loss counts the rows that are asked for, as the labels' does; "all": every residue
            (accumulated batches are then weighed by their residues).
        mask_epochs: after so many epochs the same crops and masks come again; 0: never.
        max_residues: a longer sequence is cropped, at a place drawn anew with its masks; by default the model's length.
        mask_share: of the residues that are asked for, on average.

    Raises:
        InputError: the encoder has no head, `rows` is unknown, or `mask_share` is not between 0 and 1.
    """

    model: Encoder

    def __init__(
        self,
        model: Encoder,
        corpus: Corpus,
        *,
        seed: int,
        teacher: Teacher | None = None,
        options: KDOptions | None = None,
        rows: str = "masked",
        mask_epochs: int = 0,
        max_residues: int | None = None,
        mask_share: float = ASKED,
    ) -> None:
        super().__init__(model, corpus, teacher=teacher, options=options)
        if model.head is None:
            message = f"{model.name} has no language-model head: nothing to learn masked residues with"
            raise InputError(message)
        if rows not in ROWS:
            message = f"rows is {rows!r}; allowed: {', '.join(ROWS)}"
            raise InputError(message)
        check_mask_share(mask_share)
        self._seed, self._rows, self._mask_epochs, self._mask_share = seed, rows, mask_epochs, mask_share
        self._max_residues = min(max_residues or model.config.max_residues, model.config.max_residues)

    @property
    def lengths_B(self) -> Index:
        return np.minimum(self.corpus.lengths_B, self._max_residues + 2)

    @property
    def masks(self) -> int:
        return self._mask_epochs

    def row_identity(self) -> dict[str, Any]:
        return {
            **super().row_identity(),
            "task": "masked residues",
            "seed": self._seed,
            "rows": self._rows,
            "mask_epochs": self._mask_epochs,
            "max_residues": self._max_residues,
            "mask_share": self._mask_share,
        }

    def shown(self, number: int, mask: int) -> tuple[Tokens, Tokens, npt.NDArray[np.int64]]:
        """A sequence's tokens as they are, uint8 (L,), as they are shown, and the rows asked for, int64."""
        rng = stream(self._seed, Stream.MASKS, number, mask)
        tokens_L = crop(self.corpus[number], self._max_residues, rng)
        return tokens_L, *mask_tokens(tokens_L, rng, share=self._mask_share)

    def batch(self, numbers: Sequence[int], epoch: int) -> RowBatch:
        mask = epoch % self._mask_epochs if self._mask_epochs else epoch
        true, shown, asked = zip(*(self.shown(number, mask) for number in numbers), strict=True)
        begins = np.cumsum([0, *(len(each) for each in true)])
        tokens_T = np.concatenate(true)
        rows = asked if self._rows == "masked" else [_residues(each) for each in true]
        index_R = np.concatenate([each + begin for each, begin in zip(rows, begins[:-1], strict=True)])
        asked_T = np.zeros(len(tokens_T), dtype=bool)
        asked_T[np.concatenate([each + begin for each, begin in zip(asked, begins[:-1], strict=True)])] = True
        labels_R = np.where(asked_T[index_R], tokens_T[index_R].astype(np.int64), IGNORED)
        return RowBatch(
            packed=pack_tokens(np.concatenate(shown), begins, np.array(numbers)),
            chosen=ChosenRows(torch.from_numpy(index_R), tuple(len(each) for each in rows)),
            labels_N=torch.from_numpy(labels_R),
            keys=tuple((number, mask) for number in numbers),
            soft=self._rows == "all",
        )


def check_mask_share(mask_share: float) -> None:
    """Raises InputError unless it is above 0 and below 1."""
    if not 0 < mask_share < 1:
        message = f"mask_share is {mask_share}, expected a number above 0 and below 1"
        raise InputError(message)


def _residues(tokens_L: Tokens) -> npt.NDArray[np.int64]:
    return np.flatnonzero((tokens_L != BOS_ID) & (tokens_L != EOS_ID))
