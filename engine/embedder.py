"""Embeddings of many proteins: cut, planned into near-full batches, run, pooled, and put back in order.

Shapes: B proteins, L residues of one, T tokens of a batch, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from ..kernels import plan_batches
from .device import precision_name
from .encoder import Encoder
from .errors import InputError
from .fasta import clean_sequence
from .packing import pack, refuse_one_string
from .pooling import PooledRows, ResidueRows, check_pool
from .windows import Piece, check_policy, cut

Vectors = npt.NDArray[np.float32]

# Tokens a batch when the caller names none. On a CPU larger batches leave the caches and gain nothing; a GPU needs
# many to be busy.
_DEFAULT_TOKENS = {"cpu": 4096, "cuda": 65536}


class Embedder:
    """Embeds proteins with one model.

    Args:
        model: the encoder.
        pool: "mean", "max" or "bos" for one vector a protein, "residue" for one a residue. The mean and the maximum are
            over residues only; "bos" is the `<cls>` token's vector, of the first window where there are several.
        long: what becomes of proteins beyond `max_residues`: "window", "full", "truncate" or "error"
            (see `protnest.engine.windows`).
        max_tokens: most tokens in a batch, `<cls>` and `<eos>` counted; a longer protein has a batch of its own.
            By default 4,096 on a CPU and 65,536 on a GPU.

    Raises:
        ValueError: `pool` or `long` is unknown, or `max_tokens` is not positive.
    """

    def __init__(
        self, model: Encoder, *, pool: str = "mean", long: str = "window", max_tokens: int | None = None
    ) -> None:
        check_pool(pool)
        check_policy(long)
        if max_tokens is None:
            max_tokens = _DEFAULT_TOKENS[model.device.type]
        if max_tokens < 1:
            message = f"max_tokens must be positive, got {max_tokens}"
            raise ValueError(message)
        self.model = model
        self.pool = pool
        self.long = long
        self.max_tokens = max_tokens

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths at which the embedding may be cut: for one model its whole width."""
        return (self.model.dim,)

    @property
    def precision(self) -> str:
        """Name of the precision in which the model runs."""
        return precision_name(self.model.dtype)

    @property
    def max_residues(self) -> int:
        """Length beyond which `long` decides."""
        return self.model.config.max_residues

    def embed(
        self, sequences: Sequence[str], *, after_batch: Callable[[int], None] | None = None
    ) -> Vectors | list[Vectors]:
        """Embeds proteins.

        Args:
            sequences: B strings; lower case, spaces and a final `*` are accepted.
            after_batch: called with the number of residues that have just been run.

        Returns:
            float32 (B, D), or with pool="residue" a list of B arrays float32 (L, D), in the order of `sequences`.

        Raises:
            TypeError: `sequences` is a plain string, or holds something else than strings.
            InputError: a sequence is empty, holds a letter outside the alphabet, or is too long with long="error".
        """
        refuse_one_string(sequences)
        cleaned: list[str] = []
        for row, sequence in enumerate(cast("Sequence[object]", sequences)):
            if not isinstance(sequence, str):
                message = f"sequence {row} is {sequence!r:.60}, expected a string"
                raise TypeError(message)
            try:
                cleaned.append(clean_sequence(sequence))
            except InputError as error:
                message = f"sequence {row}: {error.problem}"
                raise InputError(message) from error
        return self.embed_clean(cleaned, after_batch=after_batch)

    def embed_clean(
        self, sequences: Sequence[str], *, after_batch: Callable[[int], None] | None = None
    ) -> Vectors | list[Vectors]:
        """`embed` for sequences that hold letters of the alphabet only, as `read_fasta` gives them."""
        refuse_one_string(sequences)
        pieces: list[Piece] = []
        for row, sequence in enumerate(sequences):
            try:
                pieces += cut(row, len(sequence), max_residues=self.max_residues, long=self.long)
            except InputError as error:
                message = f"sequence {row}: {error.problem}"
                raise InputError(message) from error
        gathered = (
            ResidueRows(self.model.dim)
            if self.pool == "residue"
            else PooledRows(self.pool, len(sequences), self.model.dim)
        )
        for batch in self._plan(pieces):
            packed = pack([sequences[piece.row][piece.begin : piece.end] for piece in batch])
            with torch.inference_mode():
                gathered.add(batch, packed, self.model(packed).hidden_TD)
            if after_batch is not None:
                after_batch(sum(piece.end - piece.begin for piece in batch))
        return gathered.result()

    def _plan(self, pieces: list[Piece]) -> Iterator[list[Piece]]:
        order, offsets = plan_batches([piece.tokens for piece in pieces], self.max_tokens)
        for begin, end in itertools.pairwise(offsets.tolist()):
            yield [pieces[index] for index in order[begin:end].tolist()]
