"""The stores of an array job, `embed --shard I/N`, put together into the store that one run would have written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import write_atomically
from .errors import InputError
from .run_folder import differences
from .store import (
    INDEX_FILE,
    INDEX_SCHEMA,
    REJECTS_FILE,
    SCHEMA_VERSION,
    Shard,
    StoreWriter,
    checksum,
    read_run,
    read_settings,
    read_shards,
    write_index,
)

Follower = Callable[[int, int], None]
_DAMAGED = "is damaged: its SHA-256 is not that of what was written; `protnest verify --discard`, then embed again"
_STORE_KEYS = {"schema_version", "complete", "settings", "rows", "shards", "index_sha256", "rejects_sha256"}


@dataclass(frozen=True)
class Job:
    """A finished store of an array job.

    Attributes:
        folder: where it lies.
        run: what its run.json says.
        shards: that it lists.
    """

    folder: Path
    run: dict[str, Any]
    shards: list[Shard]

    @property
    def place(self) -> tuple[int, int]:
        """(I, N) of --shard."""
        index, count = self.run["settings"]["shard"]
        return index, count


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        jobs: stores that were put together.
        shards: of all of them.
        rows: embeddings in these.
        resumed: shards that an earlier call had put there.
        duplicates: rows whose id an earlier row carries too.
    """

    jobs: int
    shards: int
    rows: int
    resumed: int
    duplicates: int


def merge_stores(folders: list[Path], out: Path, *, overwrite: bool = False, follow: Follower | None = None) -> Merged:
    """Puts the stores of an array job together; bit for bit the shards and index of an undivided run.

    Shards are hard links where the file system allows it, else copies; either way their checksums are verified. A call
    that was killed is gone on with by the same call.

    Args:
        folders: one a job, in any order.
        out: the store; made if it is not there.
        overwrite: throw away a run of other settings in `out`.
        follow: is told `(done, total)` in bytes.

    Raises:
        InputError: a store is not finished, damaged, there twice or missing; they are not jobs of one run; `out` holds
            another run.
    """
    jobs = _check_jobs([_read_job(folder) for folder in folders])
    if any(out.resolve() == job.folder.resolve() for job in jobs):
        message = "is one of the stores that are to be merged: choose another --out"
        raise InputError(message, file=out)
    first = jobs[0].run
    settings = {**first["settings"], "shard": [1, 1]}
    details = {name: value for name, value in first.items() if name not in _STORE_KEYS}
    with StoreWriter(out, settings, details=details, overwrite=overwrite) as store:
        resumed, shards = len(store.shards), sum(len(job.shards) for job in jobs)
        if store.complete:
            duplicates = store.count_duplicates()
        else:
            with (jobs[0].folder / REJECTS_FILE).open(newline="", encoding="utf-8") as rejects:
                store.write_rejects(rejects)
            _copy_shards(store, jobs, follow or (lambda done, total: None))
            duplicates = store.finish()
        return Merged(len(jobs), shards, sum(shard.rows for shard in store.shards.values()), resumed, duplicates)


def _read_job(folder: Path) -> Job:
    run = read_run(folder)
    if run["schema_version"] != SCHEMA_VERSION:
        message = f"has schema version {run['schema_version']}, without checksums; only {SCHEMA_VERSION} is merged"
        raise InputError(message, file=folder)
    settings = read_settings(folder, run)
    if not run["complete"]:
        index, count = settings["shard"]
        message = f"--shard {index}/{count} is not finished: run its `protnest embed` again, then merge"
        raise InputError(message, file=folder)
    return Job(folder, run, read_shards(folder, run))


def _check_jobs(jobs: list[Job]) -> list[Job]:
    """The jobs in order, if they are all jobs of one run."""
    if not jobs:
        message = "no store to merge"
        raise InputError(message)
    first = jobs[0]
    for job in jobs[1:]:
        ours = {**first.run["settings"], "shard": first.place[1]}
        theirs = {**job.run["settings"], "shard": job.place[1]}
        if changed := differences(ours, theirs):
            message = f"is not of the same run as {first.folder} ({'; '.join(changed)})"
            raise InputError(message, file=job.folder)
    by_place: dict[int, Job] = {}
    for job in jobs:
        index, count = job.place
        if index in by_place:
            message = f"is --shard {index}/{count}, and so is {by_place[index].folder}"
            raise InputError(message, file=job.folder)
        by_place[index] = job
    count = first.place[1]
    if missing := [index for index in range(1, count + 1) if index not in by_place]:
        names = ", ".join(f"{index}/{count}" for index in missing[:20]) + (", ..." if len(missing) > 20 else "")
        message = f"not complete: {len(missing)} of {count} jobs are missing, --shard {names}"
        raise InputError(message)
    ordered = [by_place[index] for index in range(1, count + 1)]
    numbers = sorted(shard.number for job in ordered for shard in job.shards)
    if gaps := sorted(set(range(numbers[-1] + 1 if numbers else 0)) - set(numbers)):
        job = ordered[gaps[0] % count]
        message = f"says that it is complete, but lacks shard {gaps[0]}: `protnest verify` says more"
        raise InputError(message, file=job.folder)
    rejects = {checksum(job.folder / REJECTS_FILE) for job in ordered}
    if len(rejects) > 1:
        message = f"the jobs' {REJECTS_FILE} differ: one is damaged, or written by another release"
        raise InputError(message, file=first.folder / REJECTS_FILE)
    return ordered


def _copy_shards(store: StoreWriter, jobs: list[Job], follow: Follower) -> None:
    shards = sorted((shard.number, place) for place, job in enumerate(jobs) for shard in job.shards)
    listed = [{shard.number: shard for shard in job.shards} for job in jobs]
    total = sum(shard.size_bytes for job in jobs for shard in job.shards)
    done = row = 0
    own_rows = [0] * len(jobs)
    with ExitStack() as held:
        indexes = [held.enter_context(_IndexLines(job)) for job in jobs]
        for number, place in shards:
            shard = listed[place][number]
            lines = _renumber(indexes[place].take(shard.records or 0), row - own_rows[place])
            if number in store.shards:
                store.restore_index(number, partial(_same, lines))
            else:
                part = store.folder / shard.index_file
                write_index(part, lines)
                _take_file(jobs[place].folder / shard.file, store.folder / shard.file, shard.sha256)
                store.add(replace(shard, index_sha256=checksum(part)))
            row += shard.rows
            own_rows[place] += shard.rows
            done += shard.size_bytes
            follow(done, total)


def _renumber(lines: pa.Table, by: int) -> pa.Table:
    """The same lines with `by` added to each row, laid out as a single block, as the writer of a shard has them."""
    rows = pa.array(lines["row"].to_numpy() + by, pa.int64())
    place = INDEX_SCHEMA.get_field_index("row")
    return lines.set_column(place, INDEX_SCHEMA.field(place), rows).combine_chunks().cast(INDEX_SCHEMA)


def _same(lines: pa.Table) -> pa.Table:
    return lines


class _IndexLines:
    """A job's index, read from its beginning a few lines at a time; use it as a context."""

    def __init__(self, job: Job) -> None:
        self._path = job.folder / INDEX_FILE
        if checksum(self._path) != job.run["index_sha256"]:
            raise InputError(_DAMAGED, file=self._path)
        self._file = pq.ParquetFile(self._path)
        self._group = 0
        self._held = INDEX_SCHEMA.empty_table()

    def __enter__(self) -> _IndexLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def take(self, count: int) -> pa.Table:
        """The next lines."""
        while len(self._held) < count and self._group < self._file.num_row_groups:
            self._held = pa.concat_tables([self._held, self._file.read_row_group(self._group)])
            self._group += 1
        taken, self._held = self._held.slice(0, count), self._held.slice(count)
        return taken


def _take_file(source: Path, path: Path, sha256: str | None) -> None:
    """Puts a shard's file where it belongs, as another name of the same bytes where that is possible."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except FileNotFoundError:
        raise
    except OSError:
        write_atomically(path, lambda temporary: _copy(source, temporary, sha256))
        return
    if checksum(temporary) != sha256:
        temporary.unlink()
        raise InputError(_DAMAGED, file=source)
    temporary.replace(path)


def _copy(source: Path, path: Path, sha256: str | None) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as bytes_in, path.open("wb") as bytes_out:
        while block := bytes_in.read(1 << 20):
            digest.update(block)
            bytes_out.write(block)
    if digest.hexdigest() != sha256:
        raise InputError(_DAMAGED, file=source)
