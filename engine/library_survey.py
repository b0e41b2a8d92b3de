"""The first reading of a library: every record checked, and what there is to do counted, before anything runs."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass, field
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt

from .fasta import Record, Reject
from .record_source import RecordSource, locate_error
from .windows import residues_run

_DIGEST_BYTES = 16
"""Of a sequence. Of a thousand million sequences two different ones share a digest once in 10^20 libraries."""


class Limits(Protocol):
    """What says how long proteins may be, and how they run: an embedder, or what is known of one."""

    @property
    def long(self) -> str:
        """What becomes of proteins beyond `max_residues`."""
        ...

    @property
    def max_residues(self) -> int:
        """Length beyond which `long` decides."""
        ...

    def why_too_long(self, residues: int) -> str | None:
        """Why a protein of so many residues cannot be embedded; None where it can."""
        ...


@dataclass(frozen=True)
class Survey:
    """What the first reading of a library found.

    Attributes:
        records: proteins to embed.
        residues: their residues, before windows.
        longest: residues of the longest.
        beyond: proteins beyond the model's length.
        work: residues that will be run, those of overlapping windows counted as often as they run.
        rejected: records left out.
        fingerprint: hash of places, headers and sequences of the proteins to embed.
        row_N: int64 (records,), with `dedup` which of the different sequences each record's is, in order of their
            first appearance; None without.
    """

    records: int = 0
    residues: int = 0
    longest: int = 0
    beyond: int = 0
    work: int = 0
    rejected: int = 0
    fingerprint: str = ""
    row_N: npt.NDArray[np.int64] | None = field(default=None, compare=False)

    @property
    def rows(self) -> int:
        """Embeddings that the whole library has: one a record, or with `dedup` one a different sequence."""
        return self.records if self.row_N is None else int(self.row_N.max(initial=-1)) + 1


def survey_library(
    source: RecordSource, embedder: Limits, *, rejects: IO[str] | None = None, dedup: bool = False
) -> Survey:
    """Reads a library once: checks every record, counts, and lists what is left out as CSV rows in `rejects`.

    Args:
        source: the library.
        embedder: says what is too long, and how often windows overlap.
        rejects: gets a line a record that is left out.
        dedup: find records of equal sequences; takes about 60 bytes a record.

    Raises:
        InputError: a record is invalid with invalid="error", or too long for an embedder with long="error"; names file,
            line and record.
    """
    records = residues = longest = beyond = work = rejected = 0
    digest = hashlib.blake2b(digest_size=16)
    digests = bytearray()
    rows = csv.writer(rejects) if rejects is not None else None
    works: list[int] = []
    most = embedder.max_residues

    def on_reject(reject: Reject) -> None:
        nonlocal rejected
        rejected += 1
        if rows is not None:
            rows.writerow([reject.index + 1, reject.id, reject.reason])

    if rows is not None:
        rows.writerow(["record", "id", "reason"])
    for record in source.read(on_reject=on_reject):
        length = len(record.sequence)
        if length > most:
            beyond += 1
            if why := embedder.why_too_long(length):
                raise locate_error(source, record, f"{why}; --long says what to do")
        records += 1
        residues += length
        longest = max(longest, length)
        run = length if length <= most else record_work(record, embedder)
        work += run
        digest.update(f"{record.index}>{record.header}\n{record.sequence}\n".encode("utf-8", "surrogateescape"))
        if dedup:
            works.append(run)
            digests += hashlib.blake2b(record.sequence.encode("ascii"), digest_size=_DIGEST_BYTES).digest()
    row_N = None
    if dedup:
        row_N = _first_rows(np.frombuffer(digests, dtype=f"V{_DIGEST_BYTES}"))
        is_first_N = np.diff(np.maximum.accumulate(row_N), prepend=-1) > 0
        work = int(np.asarray(works, dtype=np.int64)[is_first_N].sum())
    return Survey(records, residues, longest, beyond, work, rejected, digest.hexdigest(), row_N)


def record_work(record: Record, embedder: Limits) -> int:
    """Residues that are run for a protein."""
    return residues_run(len(record.sequence), max_residues=embedder.max_residues, long=embedder.long)


def _first_rows(digest_N: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """For each digest, which of the different ones it is, in order of first appearance."""
    _, first_U, which_N = np.unique(digest_N, return_index=True, return_inverse=True)
    rank_U = np.empty(len(first_U), dtype=np.int64)
    rank_U[np.argsort(first_U)] = np.arange(len(first_U))
    return rank_U[which_N.reshape(-1)]
