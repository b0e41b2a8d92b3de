"""Questions to a language-model head: sequences, what of them is masked, and the tokens whose logits are wanted.

Copies of one protein, each with another residue masked, are many questions of equal length: they share packed batches,
and the last layer and the head run for the tokens asked about alone (`Encoder.row_logits`).

Shapes: L residues of a sequence, R tokens asked about, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ..kernels import plan_batches, tokenise
from .alphabet import BOS_ID, EOS_ID, MASK_ID, RESIDUE_TABLE
from .embedder import default_max_tokens
from .errors import InputError
from .exported_encoder import AnyEncoder, ExportedEncoder
from .packing import ChosenRows, pack_tokens
from .retry import DoesNotFit, MemoryBudget, Work, cut_in_two
from .transfer import Arrivals
from .windows import Piece

Tokens = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]

# Questions are planned into batches in rounds of so many batches' tokens, so that memory does not grow with their
# number. One batch in a round may be less than full.
_ROUND_BATCHES = 64


@dataclass(frozen=True, eq=False, slots=True)
class Query:
    """One sequence to run.

    Attributes:
        tokens: uint8 (L + 2,), ids of `<cls>`, the residues and `<eos>`; shared by queries, never written to.
        places: tokens whose logits are wanted, from 0, `<cls>` counted.
        masked: token that is masked, or None.
    """

    tokens: Tokens
    places: tuple[int, ...]
    masked: int | None = None


def token_ids(sequence: str) -> Tokens:
    """uint8 (L + 2,): ids of `<cls>`, the residues and `<eos>`.

    Raises:
        ValueError: a letter is outside the alphabet.
    """
    return tokenise([sequence.encode("ascii", "replace")], RESIDUE_TABLE, bos=BOS_ID, eos=EOS_ID)[0]


def check_logits(encoder: AnyEncoder) -> None:
    """Raises InputError where an encoder has no language-model head, or an exported file gives no logits."""
    if isinstance(encoder, ExportedEncoder):
        encoder.check_output("logits")
    elif encoder.head is None:
        message = (
            f"{encoder.name} has no language-model head: its checkpoint holds the encoder alone, from which only a "
            "fitted ridge head reads scores"
        )
        raise InputError(message)


class QueryRunner:
    """Runs queries through one encoder, in near-full batches.

    Args:
        encoder: has a language-model head, or is a file that gives logits.
        max_tokens: most tokens in a batch; by default as many as `Embedder` takes. A longer sequence has a batch of its
            own. A batch that does not fit into a GPU's memory is cut in two.
        after_batch: called with the number of residues that have just been run.

    Raises:
        InputError: the encoder has no language-model head, or the file gives no logits.
        ValueError: `max_tokens` is not positive.
    """

    def __init__(
        self,
        encoder: AnyEncoder,
        *,
        max_tokens: int | None = None,
        after_batch: Callable[[int], None] = lambda residues: None,
    ) -> None:
        check_logits(encoder)
        self.encoder = encoder
        self.max_tokens = default_max_tokens(encoder.device) if max_tokens is None else max_tokens
        if self.max_tokens < 1:
            message = f"max_tokens must be positive, got {max_tokens}"
            raise ValueError(message)
        self._after_batch = after_batch
        self._budget = MemoryBudget(encoder.device)

    def run(self, queries: Iterable[Query], take: Callable[[int, Logits], None]) -> None:
        """Runs queries in rounds, whatever their number.

        Args:
            queries: read as they are needed.
            take: called once for each query with its number, from 0, and float32 logits (R, V) at its places, in the
                order in which they come out.

        Raises:
            DoesNotFit: a query does not fit into the GPU's memory alone; `row` is its number.
        """
        first = 0
        for queries_now in self._rounds(queries):
            self._run_round(queries_now, first, take)
            first += len(queries_now)

    def _rounds(self, queries: Iterable[Query]) -> Iterator[list[Query]]:
        round_, tokens = list[Query](), 0
        for query in queries:
            round_.append(query)
            tokens += len(query.tokens)
            if tokens >= _ROUND_BATCHES * self.max_tokens:
                yield round_
                round_, tokens = [], 0
        if round_:
            yield round_

    @torch.inference_mode()
    def _run_round(self, queries: list[Query], first: int, take: Callable[[int, Logits], None]) -> None:
        pieces = [Piece(row, len(query.tokens) - 2, 0, len(query.tokens) - 2) for row, query in enumerate(queries)]
        arrivals = Arrivals()

        def run(work: Work) -> None:
            chosen = [queries[piece.row] for piece in work.pieces]
            logits_RV = self._batch_logits(chosen)

            def share_out(logits: npt.NDArray[np.float32]) -> None:
                end = 0
                for piece, query in zip(work.pieces, chosen, strict=True):
                    begin, end = end, end + len(query.places)
                    take(first + piece.row, logits[begin:end])

            arrivals.expect(logits_RV, share_out)
            work.levels.clear()

        order, offsets = plan_batches([piece.tokens for piece in pieces], self.max_tokens)
        for begin, end in pairwise(offsets.tolist()):
            batch = [pieces[row] for row in order[begin:end].tolist()]
            try:
                self._budget.run(Work(0, batch, [0]), run, cut_in_two)
            except DoesNotFit as error:
                raise DoesNotFit(first + error.row, error.reason) from error
            self._after_batch(sum(piece.residues for piece in batch))
        arrivals.finish()

    def _batch_logits(self, queries: list[Query]) -> torch.Tensor:
        cu_seqlens = np.cumsum([0, *(len(query.tokens) for query in queries)], dtype=np.int64)
        tokens_T = np.concatenate([query.tokens for query in queries])
        begins = cu_seqlens[:-1].tolist()
        masks = [begin + query.masked for begin, query in zip(begins, queries, strict=True) if query.masked is not None]
        tokens_T[masks] = MASK_ID
        rows = [begin + place for begin, query in zip(begins, queries, strict=True) for place in query.places]
        chosen = ChosenRows(torch.tensor(rows, dtype=torch.int64), tuple(len(query.places) for query in queries))
        return self.encoder.row_logits(pack_tokens(tokens_T, cu_seqlens), chosen)
