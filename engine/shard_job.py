"""One shard on its way through the stages: which records it holds, and what is computed of them.

Which records share a shard depends on the library and the settings alone, so whoever computes a shard, and whenever,
computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .embedder import Embedder, Vectors
from .errors import InputError
from .fasta import Record
from .library_survey import Survey
from .record_source import RecordSource
from .retry import DoesNotFit
from .store import STORAGE_DTYPES, Entry

_MOST_ENTRIES = 16
"""Records in a shard over those that are embedded in it, so that a million copies of one sequence stay in bounds."""


@dataclass(frozen=True)
class ShardJob:
    """A shard to be computed.

    Attributes:
        number: of the shard, from 0.
        first_row: number of its first embedding, over all shards of the store.
        entries: its records, in input order.
    """

    number: int
    first_row: int
    entries: list[Entry]

    @property
    def fresh(self) -> list[Record]:
        """Those that are embedded in it: all but those whose sequence stood in the library before."""
        row, fresh = self.first_row, []
        for entry in self.entries:
            if entry.row == row:
                fresh.append(entry.record)
                row += 1
        return fresh


class RecordFault(Exception):
    """A record that cannot be embedded; whoever knows the file says where it stands.

    Attributes:
        record: the record.
        problem: what is wrong.
    """

    def __init__(self, record: Record, problem: str) -> None:
        super().__init__(record, problem)
        self.record = record
        self.problem = problem


def cut_jobs(
    source: RecordSource,
    survey: Survey,
    *,
    flags: Callable[[Record], tuple[str, ...]],
    max_records: int,
    max_residues: int,
    share: tuple[int, int] = (1, 1),
) -> Iterator[ShardJob]:
    """Reads a library again and cuts it into consecutive shards of at most so many embeddings and residues.

    Args:
        source: the library.
        survey: of its first reading.
        flags: what is done to a record.
        max_records: most proteins embedded in a shard.
        max_residues: most residues of these; a longer protein has a shard of its own.
        share: (I, N): only shards whose number j has j mod N = I - 1; rows are counted over these.

    Raises:
        InputError: the library holds more or fewer proteins than in its first reading.
    """
    number = residues = 0
    row = seen = 0
    entries: list[Entry] = []
    fresh = 0

    def take() -> Iterator[ShardJob]:
        if entries and number % share[1] == share[0] - 1:
            yield ShardJob(number, row, entries)

    count = 0
    for count, record in enumerate(source.read(quiet=True), start=1):
        if count > survey.records:
            break
        which = count - 1 if survey.row_N is None else int(survey.row_N[count - 1])
        is_new = which == seen
        length = len(record.sequence)
        is_full = is_new and fresh > 0 and (fresh == max_records or residues + length > max_residues)
        if is_full or len(entries) == _MOST_ENTRIES * max_records:
            yield from take()
            row += fresh if number % share[1] == share[0] - 1 else 0
            number, entries, fresh, residues = number + 1, [], 0, 0
        # Without equal sequences known, rows are counted over this job's own shards.
        own = row + fresh if survey.row_N is None else which
        entries.append(Entry(record, own, flags(record)))
        if is_new:
            seen, fresh, residues = seen + 1, fresh + 1, residues + length
    if count != survey.records:
        message = f"has changed since it was checked: it held {survey.records:,} proteins to embed then"
        raise InputError(message, file=source.path)
    yield from take()


def embed_job(
    job: ShardJob, embedder: Embedder, *, storage_dtype: str, after_batch: Callable[[int], None]
) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a shard's file.

    Raises:
        RecordFault: a protein does not fit into memory, or its embedding is not finite.
    """
    fresh = job.fresh
    try:
        vectors = embedder.embed_clean([record.sequence for record in fresh], after_batch=after_batch)
    except DoesNotFit as error:
        raise RecordFault(fresh[error.row], error.reason) from error
    arrays = _arrays(vectors, embedder.dims[-1], storage_dtype)
    _check_finite(fresh, arrays)
    return arrays


def _arrays(vectors: Vectors | list[Vectors], width: int, storage_dtype: str) -> dict[str, npt.NDArray[Any]]:
    dtype = STORAGE_DTYPES[storage_dtype]
    with np.errstate(over="ignore"):  # What overflows is told by `_check_finite`, with the record's name.
        if isinstance(vectors, np.ndarray):
            return {"embeddings": vectors.astype(dtype, copy=False)}
        offsets = np.cumsum([0, *(len(rows) for rows in vectors)], dtype=np.int64)
        embeddings = np.concatenate(vectors) if vectors else np.empty((0, width), np.float32)
        return {"embeddings": embeddings.astype(dtype, copy=False), "offsets": offsets}


def _check_finite(fresh: list[Record], arrays: dict[str, npt.NDArray[Any]]) -> None:
    embeddings = arrays["embeddings"]
    if np.isfinite(embeddings).all():
        return
    bad = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
    row = int(np.searchsorted(arrays["offsets"], bad, side="right")) - 1 if "offsets" in arrays else bad
    message = (
        "the embedding is not finite: fp16 ends at 65,504; take --precision bf16 or fp32, --storage-dtype fp32, "
        "or leave the record out"
    )
    raise RecordFault(fresh[row], message)
