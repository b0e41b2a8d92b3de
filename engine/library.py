"""Embedding a whole library: a FASTA file in, a store out, in bounded memory, resumable.

The file is read twice. The first reading checks every record and counts what there is to do, so that a bad last record
costs seconds and not the night before it. The second cuts the records into shards, embeds them one by one, and writes
each to the store as it is done. Which records share a shard and a batch depends on the file and the settings alone, so
a resumed run repeats an interrupted one bit for bit.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from .embedder import Embedder, Vectors
from .errors import InputError
from .fasta import InvalidPolicy, Record, Reject, locate_records, read_fasta
from .retry import DoesNotFit
from .store import StoreWriter
from .windows import residues_run

STORAGE_DTYPES: dict[str, npt.DTypeLike] = {"fp32": np.float32, "fp16": np.float16}

# A shard is what a crash can cost, and what is held in memory at once.
SHARD_RECORDS = 2048
SHARD_RESIDUES = 1 << 20
_SHARD_BYTES = 1 << 27


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
    """

    records: int = 0
    residues: int = 0
    longest: int = 0
    beyond: int = 0
    work: int = 0
    rejected: int = 0
    fingerprint: str = ""


class Progress(Protocol):
    """What follows a run: `start` once, with all residues to run and those done before; `advance` after each batch."""

    def start(self, records: int, work: int, done: int) -> None: ...

    def advance(self, residues: int) -> None: ...


class Silent:
    """Follows nothing."""

    def start(self, records: int, work: int, done: int) -> None:
        pass

    def advance(self, residues: int) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class LibraryOptions:
    """What decides the bytes of a store, beside the embedder.

    Attributes:
        invalid: what becomes of letters outside the alphabet: "error", "skip" or "mask".
        storage_dtype: "fp32" or "fp16".
        shard: (I, N), 1-based: of all output shards, those whose number j has j mod N = I - 1.
        shard_records: most proteins in a shard.
    """

    invalid: InvalidPolicy = "error"
    storage_dtype: str = "fp32"
    shard: tuple[int, int] = (1, 1)
    shard_records: int = SHARD_RECORDS

    def __post_init__(self) -> None:
        if self.storage_dtype not in STORAGE_DTYPES:
            message = f"storage dtype is {self.storage_dtype!r}; allowed: {', '.join(STORAGE_DTYPES)}"
            raise InputError(message)
        if not 1 <= self.shard[0] <= self.shard[1]:
            message = f"shard is {self.shard[0]}/{self.shard[1]}; expected I/N with 1 <= I <= N"
            raise InputError(message)
        if self.shard_records < 1:
            message = f"shard_records must be positive, got {self.shard_records}"
            raise InputError(message)


@dataclass(frozen=True)
class LibraryResult:
    """What a run did.

    Attributes:
        survey: what the library holds.
        embedded: proteins that this call embedded.
        resumed: proteins that an earlier call had embedded.
        duplicates: rows whose id an earlier row carries too.
        residues: residues of the proteins that this call embedded.
        flags: how many of these proteins carry each flag.
    """

    survey: Survey
    embedded: int = 0
    resumed: int = 0
    duplicates: int = 0
    residues: int = 0
    flags: dict[str, int] = field(default_factory=dict)


def survey_library(
    fasta: Path, embedder: Embedder, *, invalid: InvalidPolicy = "error", rejects: IO[str] | None = None
) -> Survey:
    """Reads a library once: checks every record, counts, and lists what is left out as CSV rows in `rejects`.

    Raises:
        InputError: a record is invalid with invalid="error", or too long for an embedder with long="error"; names file,
            line and record.
    """
    records = residues = longest = beyond = work = rejected = 0
    digest = hashlib.blake2b(digest_size=16)
    rows = csv.writer(rejects) if rejects is not None else None

    def on_reject(reject: Reject) -> None:
        nonlocal rejected
        rejected += 1
        if rows is not None:
            rows.writerow([reject.index + 1, reject.id, reject.reason])

    if rows is not None:
        rows.writerow(["record", "id", "reason"])
    for record in read_fasta(fasta, invalid=invalid, on_reject=on_reject):
        length = len(record.sequence)
        if length > embedder.max_residues:
            beyond += 1
            if why := embedder.why_too_long(length):
                raise _located(fasta, record, f"{why}; --long says what to do")
        records += 1
        residues += length
        longest = max(longest, length)
        work += _work(record, embedder)
        digest.update(f"{record.index}>{record.header}\n{record.sequence}\n".encode("utf-8", "surrogateescape"))
    return Survey(records, residues, longest, beyond, work, rejected, digest.hexdigest())


def _work(record: Record, embedder: Embedder) -> int:
    return residues_run(len(record.sequence), max_residues=embedder.max_residues, long=embedder.long)


def _located(fasta: Path, record: Record, message: str) -> InputError:
    """The error that names where in the file a record stands."""
    line = locate_records(fasta, [record.index]).get(record.index)
    return InputError(message, file=fasta, line=line, record=record.index + 1, record_id=record.id)


def cut_shards(records: Iterator[Record], *, max_records: int, max_residues: int) -> Iterator[list[Record]]:
    """Cuts records into consecutive shards of at most so many records and residues; one record at least."""
    shard: list[Record] = []
    residues = 0
    for record in records:
        if shard and (len(shard) == max_records or residues + len(record.sequence) > max_residues):
            yield shard
            shard, residues = [], 0
        shard.append(record)
        residues += len(record.sequence)
    if shard:
        yield shard


def embed_library(
    fasta: Path,
    out: Path,
    embedder: Embedder,
    options: LibraryOptions | None = None,
    *,
    details: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LibraryResult:
    """Embeds a FASTA file into the folder `out`, going on where an earlier run of the same settings stopped.

    Args:
        fasta: plain or .gz.
        out: the store; made if it is not there.
        embedder: model, pooling, batch size and what becomes of long proteins.
        options: what else decides the bytes.
        details: kept in run.json: versions and the like.
        overwrite: throw away a run of other settings in `out`.
        progress: is told how far the run is.

    Raises:
        InputError: the file is invalid; `out` holds another run, or is being written to.
    """
    if fasta.exists() and not (fasta.is_file() or fasta.is_dir()):
        message = "is a pipe or a device; a library is read twice, so it has to be a file"
        raise InputError(message, file=fasta)
    options = options or LibraryOptions()
    progress = progress or Silent()
    with tempfile.SpooledTemporaryFile(max_size=1 << 20, mode="w+", newline="", encoding="utf-8") as rejects:
        survey = survey_library(fasta, embedder, invalid=options.invalid, rejects=rejects)
        if not survey.records:
            message = f"no sequence to embed: all {survey.rejected} records were left out"
            raise InputError(message, file=fasta)
        settings = _settings(embedder, options, survey)
        source = {"input": {"path": str(fasta), "bytes": fasta.stat().st_size}}
        with StoreWriter(out, settings, details={**source, **(details or {})}, overwrite=overwrite) as store:
            resumed = sum(shard.rows for shard in store.shards.values())
            if store.complete:
                progress.start(survey.records, survey.work, survey.work)
                return LibraryResult(survey, resumed=resumed, duplicates=store.count_duplicates())
            rejects.seek(0)
            store.write_rejects(rejects)
            embedded, residues, flags = _fill(store, fasta, embedder, options, survey, progress)
            return LibraryResult(survey, embedded, resumed, store.finish(), residues, flags)


def _settings(embedder: Embedder, options: LibraryOptions, survey: Survey) -> dict[str, Any]:
    largest = embedder.members[-1]
    return {
        "model": largest.name,
        "model_fingerprint": largest.fingerprint,
        "layers": largest.config.layers,
        **_chain_settings(embedder),
        **_exported_settings(embedder),
        "width": embedder.dims[-1],
        "pool": embedder.pool,
        "precision": embedder.precision,
        "device": embedder.device.type,
        "max_tokens": embedder.max_tokens,
        "long": embedder.long,
        "max_residues": embedder.max_residues,
        "input_fingerprint": survey.fingerprint,
        "invalid": options.invalid,
        "storage_dtype": options.storage_dtype,
        "shard": list(options.shard),
        "shard_records": options.shard_records,
    }


def _chain_settings(embedder: Embedder) -> dict[str, Any]:
    """Nothing for a single model, whose settings are those of stores that were written before there were chains."""
    if embedder.chain is None:
        return {}
    return {
        "models": [member.name for member in embedder.members],
        "model_fingerprints": [member.fingerprint for member in embedder.members],
        "chain_fingerprint": embedder.chain.fingerprint,
        "dims": list(embedder.dims),
    }


def _exported_settings(embedder: Embedder) -> dict[str, Any]:
    """Of an exported file: its runtime, whose bits are not torch's, and the chain inside where its row is taken."""
    exported = embedder.exported
    if exported is None:
        return {}
    models = exported.facts["models"]
    return {
        "runtime": exported.runtime,
        "models": [model["name"] for model in models],
        "model_fingerprints": [model["fingerprint"] for model in models],
        "chain_fingerprint": exported.facts["chain"],
        "dims": list(embedder.dims),
    }


def _fill(
    store: StoreWriter,
    fasta: Path,
    embedder: Embedder,
    options: LibraryOptions,
    survey: Survey,
    progress: Progress,
) -> tuple[int, int, dict[str, int]]:
    """Embeds the shards that the store lacks: their proteins, residues, and how many proteins carry each flag."""
    width = embedder.dims[-1]
    max_residues = SHARD_RESIDUES
    # With a chain the maximum is taken of projected residues, which wait for the next model in --sequential.
    if embedder.pool == "residue" or (embedder.chain is not None and embedder.pool == "max"):
        max_residues = min(max_residues, max(1, _SHARD_BYTES // (4 * width)))
    records = read_fasta(fasta, invalid=options.invalid, quiet=True)
    embedded = residues = done = 0
    counts: Counter[str] = Counter()
    started = False
    for number, shard in enumerate(cut_shards(records, max_records=options.shard_records, max_residues=max_residues)):
        if number % options.shard[1] != options.shard[0] - 1:
            continue
        if number in store.shards:
            done += sum(_work(record, embedder) for record in shard)
            continue
        if not started:
            # A job that embeds every N-th shard has about an N-th of the work.
            jobs = options.shard[1]
            progress.start(survey.records // jobs, survey.work // jobs, done)
            started = True
        try:
            vectors = embedder.embed_clean([record.sequence for record in shard], after_batch=progress.advance)
        except DoesNotFit as error:
            raise _located(fasta, shard[error.row], error.reason) from error
        flags = [_flags(record, embedder) for record in shard]
        arrays = _arrays(vectors, options.storage_dtype)
        _check_finite(fasta, shard, arrays["embeddings"])
        store.add(number, shard, flags, arrays)
        embedded += len(shard)
        residues += sum(len(record.sequence) for record in shard)
        counts.update(itertools.chain.from_iterable(flags))
    return embedded, residues, dict(counts)


def _flags(record: Record, embedder: Embedder) -> list[str]:
    flags = list(record.flags)
    if len(record.sequence) > embedder.max_residues:
        flags.append({"window": "windowed", "full": "full-length", "truncate": "truncated"}[embedder.long])
    return flags


def _arrays(vectors: Vectors | list[Vectors], storage_dtype: str) -> dict[str, npt.NDArray[Any]]:
    dtype = STORAGE_DTYPES[storage_dtype]
    if isinstance(vectors, np.ndarray):
        return {"embeddings": vectors.astype(dtype, copy=False)}
    offsets = np.cumsum([0, *(len(rows) for rows in vectors)], dtype=np.int64)
    return {"embeddings": np.concatenate(vectors).astype(dtype, copy=False), "offsets": offsets}


def _check_finite(fasta: Path, shard: list[Record], embeddings: npt.NDArray[Any]) -> None:
    if np.isfinite(embeddings).all():
        return
    message = (
        f"embeddings between the records {shard[0].index + 1} ({shard[0].id}) and {shard[-1].index + 1} "
        f"({shard[-1].id}) are not finite: fp16 ends at 65,504; take --precision bf16 or fp32, --storage-dtype fp32"
    )
    raise InputError(message, file=fasta)
