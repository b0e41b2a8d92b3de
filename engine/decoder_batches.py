"""Sequences of a decoder's ids in near-full batches; one that does not fit into a GPU's memory is cut in two.

Shapes: B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..kernels import plan_batches
from .decoder import Decoder, pack_ids
from .embedder import default_max_tokens
from .packing import PackedBatch
from .retry import MemoryBudget, Work, cut_in_two
from .vocabulary import Ids
from .windows import Piece


@dataclass(frozen=True, eq=False)
class _Whole(Piece):
    """A whole sequence: its residues are not its tokens.

    Attributes:
        ids: how many.
    """

    ids: int = 0

    @property
    def tokens(self) -> int:
        return self.ids


class DecoderBatches:
    """Deals sequences into batches for one decoder.

    Args:
        decoder: any precision, any device.
        max_tokens: most tokens in a batch; by default as many as `Embedder` takes. A longer sequence has a batch of its
            own. A batch that does not fit into a GPU's memory is cut in two, and what does not fit is learnt once.
        after_batch: called with the number of residues that have just been run.

    Raises:
        ValueError: `max_tokens` is not positive.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_tokens: int | None = None,
        after_batch: Callable[[int], None] = lambda residues: None,
    ) -> None:
        self.decoder = decoder
        self.max_tokens = default_max_tokens(decoder.device) if max_tokens is None else max_tokens
        if self.max_tokens < 1:
            message = f"max_tokens must be positive, got {max_tokens}"
            raise ValueError(message)
        self._after_batch = after_batch
        self._budget = MemoryBudget(decoder.device, advice="a lower precision or a smaller model needs less")

    def run(self, sequences: Sequence[Ids], take: Callable[[list[int], PackedBatch], None]) -> None:
        """Runs sequences, in whatever order fills the batches.

        Args:
            sequences: of ids, each within the decoder's places.
            take: runs the decoder on B sequences, of which it is given the numbers and the packed ids. Where it raises
                `torch.OutOfMemoryError` it is called again with fewer, and must have left nothing behind.

        Raises:
            DoesNotFit: a sequence does not fit into the memory alone; `row` is its number.
        """
        residues_V = self.decoder.vocabulary.residues_V
        counts = [int(residues_V[ids].sum()) for ids in sequences]
        pieces = [
            _Whole(row, count, 0, count, ids=len(ids))
            for row, (count, ids) in enumerate(zip(counts, sequences, strict=True))
        ]

        def run(work: Work) -> None:
            rows = [piece.row for piece in work.pieces]
            take(rows, pack_ids([sequences[row] for row in rows]))
            work.levels.clear()

        order, offsets = plan_batches([len(ids) for ids in sequences], self.max_tokens)
        for begin, end in pairwise(offsets.tolist()):
            batch: list[Piece] = [pieces[row] for row in order[begin:end].tolist()]
            self._budget.run(Work(0, batch, [0]), run, cut_in_two)
            self._after_batch(sum(piece.residues for piece in batch))
