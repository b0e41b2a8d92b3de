"""Embedding a library on a Ray cluster: a file or an object in, Parquet files or a Lance dataset out, resumable.

The driver reads the library once and checks it. A second reading gives blocks of records to the workers, which embed
and write them; the driver sees reports only. A block is a shard of the native engine and lies under its number, so
that whoever does it, and however often, the same rows are there once. At the end the driver counts what is there.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from .block_folder import MISSING_FILE, BlockFolder, find_place
from .embedder_plan import EmbedderPlan
from .errors import InputError
from .fasta import Record
from .library import LibraryOptions, LibraryResult, Progress, Silent, most_residues
from .library_settings import EmbedderFacts, record_flags
from .library_survey import Survey, survey_library
from .ray_actor import BlockEmbedder, block_schema, table_of_job
from .ray_cluster import Placement, check_ray, find_facts, map_blocks, on_cluster, place_workers
from .record_source import FastaSource, RecordSource, check_rereadable, locate_error
from .run_folder import differences
from .shard_job import ShardJob, cut_jobs
from .stages import StageTimes
from .store import REJECTS_FILE

_COPIED_AT_ONCE = 1 << 20


def embed_on_ray(
    source: str,
    out: str,
    plan: EmbedderPlan,
    options: LibraryOptions | None = None,
    *,
    output_format: str = "parquet",
    open_source: Callable[[Path], RecordSource] | None = None,
    details: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LibraryResult:
    """Embeds a library on a Ray cluster, going on where an earlier run of the same settings stopped.

    Args:
        source: path or URI of the library. What is not on a disk of this machine is copied to its temporary folder.
        out: path or URI of a folder; on several machines all must see the same.
        plan: of the embedder that each worker makes: models must lie at the same place on every machine.
        options: `workers` None: one a GPU, and without GPUs one a machine. `shard` and `dedup` are the native engine's.
        output_format: "parquet" or "lance".
        open_source: makes a source of a file; by default it is read as FASTA.
        details: kept in run.json: versions and the like.
        overwrite: throw away a run of other settings in `out`.
        progress: is told how far the run is.

    Raises:
        InputError: Ray or Lance is not installed; the file is invalid; `out` holds another run; workers die again and
            again; a protein has no embedding in the end.
    """
    options = options or LibraryOptions()
    check_ray()
    _check_options(options)
    folder = BlockFolder(out, output_format)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(_local_copy(source))
        stack.enter_context(_naming(path, source))
        library = FastaSource(path, options.invalid) if open_source is None else open_source(path)
        check_rereadable(path)
        nodes = stack.enter_context(on_cluster())
        placement = place_workers(nodes, device=plan.device, workers=options.workers)
        plan = _absolute(plan).on("cuda" if placement.gpus else "cpu")
        run = _Run(library, folder, plan, options, placement, progress or Silent())
        about = {"input": {"path": source, "bytes": path.stat().st_size}, **(details or {})}
        return run.run(about, overwrite=overwrite)


class _Run:
    """One run, from the first reading to the last count."""

    def __init__(
        self,
        source: RecordSource,
        folder: BlockFolder,
        plan: EmbedderPlan,
        options: LibraryOptions,
        placement: Placement,
        progress: Progress,
    ) -> None:
        self._source = source
        self._folder = folder
        self._plan = plan
        self._options = options
        self._placement = placement
        self._progress = progress
        self._times = StageTimes()
        self._flags: Counter[str] = Counter()
        self._workers: set[str] = set()
        self._embedded = self._residues = 0

    def run(self, about: dict[str, Any], *, overwrite: bool) -> LibraryResult:
        began = time.perf_counter()
        self._facts = find_facts(self._plan, self._placement)
        loaded = time.perf_counter()
        rejects = io.StringIO(newline="")
        self._survey = survey = survey_library(self._source, self._facts, rejects=rejects)
        if not survey.records:
            message = f"no sequence to embed: all {survey.rejected} records were left out"
            raise InputError(message, file=self._source.path)
        self._settings = json.loads(json.dumps(self._resolve_settings()))
        # What the driver does alone, every worker waits for.
        count = self._placement.workers
        self._times.loading = count * (loaded - began)
        self._times.checking = count * (time.perf_counter() - loaded)
        with self._folder.held():
            done, is_complete = self._open(about, overwrite=overwrite)
            resumed = sum(done.values())
            if not is_complete:
                self._folder.write(REJECTS_FILE, rejects.getvalue().encode("utf-8", "surrogateescape"))
                if resumed != survey.records:
                    self._embed(frozenset(done), resumed)
            else:
                self._progress.start(survey.records, survey.work, survey.work)
            started = time.perf_counter()
            duplicates = self._finish(about, is_complete=is_complete)
            self._times.finishing = count * (time.perf_counter() - started)
        return LibraryResult(
            survey,
            self._embedded,
            resumed,
            duplicates=duplicates,
            residues=self._residues,
            flags=dict(self._flags),
            times=self._times,
            restarts=max(0, len(self._workers) - self._placement.workers),
            workers=self._placement.workers,
            wall_s=time.perf_counter() - began,
            settings=self._settings,
        )

    def _resolve_settings(self) -> dict[str, Any]:
        return {
            **self._facts.settings,
            "input_fingerprint": self._survey.fingerprint,
            "invalid": self._source.invalid,
            "storage_dtype": self._options.storage_dtype,
            "shard_records": self._options.shard_records,
            "format": self._folder.format,
            **self._source.settings,
        }

    def _open(self, about: dict[str, Any], *, overwrite: bool) -> tuple[dict[int, int], bool]:
        """Rows of the blocks that are there, by number, and whether the run was finished."""
        found = self._folder.read_run()
        if found is not None:
            changed = differences(found["settings"], self._settings)
            if not changed:
                self._folder.tidy()
                blocks = self._folder.blocks()
                listed = {block["number"]: block["size_bytes"] for block in found["blocks"]}
                is_complete = found["complete"] and listed == {each.number: each.size_bytes for each in blocks.values()}
                return {number: block.rows for number, block in blocks.items()}, is_complete
            if not overwrite:
                message = f"holds a run with other settings ({'; '.join(changed)}); choose another --out or --overwrite"
                raise InputError(message, file=self._folder.place)
        elif names := self._folder.names():
            message = f"is not empty and holds no run ({', '.join(names[:3])}): choose another --out"
            raise InputError(message, file=self._folder.place)
        self._folder.clear()
        self._list(about, complete=False)
        return {}, False

    def _list(self, about: dict[str, Any], *, complete: bool) -> None:
        """Blocks are listed at the end only: until then those that are there are those that are done."""
        blocks = self._folder.blocks() if complete else {}
        self._folder.write_run(
            {
                "complete": complete,
                "settings": self._settings,
                "records": self._survey.records + self._survey.rejected,
                "rejected": self._survey.rejected,
                "rows": sum(block.rows for block in blocks.values()),
                "blocks": [vars(blocks[number]) for number in sorted(blocks)],
                **about,
            }
        )

    def _embed(self, done: frozenset[int], resumed: int) -> None:
        survey = self._survey
        self._progress.start(survey.records, survey.work, survey.work * resumed // survey.records)
        started = time.perf_counter()
        reports = map_blocks(
            partial(_read_blocks, self._source, survey, self._facts, self._options.shard_records, done),
            BlockEmbedder,
            {
                "plan": self._plan,
                "settings": self._facts.settings,
                "folder": self._folder,
                "storage_dtype": self._options.storage_dtype,
                "threads": min(self._placement.cpus, int(os.environ.get("OMP_NUM_THREADS", self._placement.cpus))),
            },
            self._placement,
        )
        # Closed at once after an error, while there still is a cluster on which to stop what runs.
        with contextlib.closing(reports):
            for report in reports:
                self._hear(report)
        spent = self._placement.workers * (time.perf_counter() - started)
        # All that a worker neither embedded nor wrote: Ray started it, or it had nothing to do.
        self._times.awaiting_reader = max(0.0, spent - self._times.model - self._times.awaiting_writer)

    def _hear(self, report: dict[str, Any]) -> None:
        if report["fault_position"] is not None:
            position, problem = report["fault_position"], report["problem"]
            fault = Record(index=position, id=report["fault_id"], header="", sequence="")
            raise locate_error(self._source, fault, problem)
        if report["problem"] is not None:
            raise InputError(report["problem"], file=self._folder.place)
        self._embedded += report["rows"]
        self._residues += report["residues"]
        self._flags.update(json.loads(report["flags"]))
        self._workers.add(report["worker"])
        self._times.model += report["model_s"]
        self._times.awaiting_writer += report["write_s"]
        self._progress.advance(report["residues"] * self._survey.work // self._survey.residues)

    def _finish(self, about: dict[str, Any], *, is_complete: bool) -> int:
        """Counts what is there, and lists it; returns how many ids repeat."""
        blocks = self._folder.blocks()
        jobs = _cut(self._source, self._survey, self._facts, self._options.shard_records)
        if sum(block.rows for block in blocks.values()) != self._survey.records:
            whole = {number: block.rows for number, block in blocks.items()}
            self._tell_missing([job for job in jobs if whole.get(job.number) != len(job.entries)])
        schema = block_schema(self._facts.width, self._facts.pool, self._options.storage_dtype)
        duplicates = self._folder.finish(sorted(blocks), schema)
        if not is_complete:
            self._list(about, complete=True)
        return duplicates

    def _tell_missing(self, jobs: list[ShardJob]) -> None:
        records = [entry.record for job in jobs for entry in job.entries]
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(["record", "id"])
        rows.writerows([record.index + 1, record.id] for record in records)
        self._folder.write(MISSING_FILE, text.getvalue().encode())
        message = (
            f"{len(records):,} of {self._survey.records:,} proteins have no embedding "
            f"({', '.join(record.id for record in records[:3])}{', ...' if len(records) > 3 else ''}; "
            f"{MISSING_FILE} lists all): is it the same folder on every machine? The same command does them again"
        )
        raise InputError(message, file=self._folder.place)


def _cut(source: RecordSource, survey: Survey, facts: EmbedderFacts, shard_records: int) -> Iterator[ShardJob]:
    return cut_jobs(
        source,
        survey,
        flags=partial(record_flags, max_residues=facts.max_residues, long=facts.long),
        max_records=shard_records,
        max_residues=most_residues(width=facts.width, pool=facts.pool, is_chain=facts.is_chain),
    )


def _read_blocks(
    source: RecordSource, survey: Survey, facts: EmbedderFacts, shard_records: int, done: frozenset[int]
) -> Iterator[pa.Table]:
    """The blocks that are not done, each a table of one row. It runs on a node, in a task of its own."""
    for job in _cut(source, survey, facts, shard_records):
        if job.number not in done:
            yield table_of_job(job)


def _check_options(options: LibraryOptions) -> None:
    for name, is_asked in (("--shard", options.shard != (1, 1)), ("--dedup", options.dedup)):
        if is_asked:
            message = f"{name} is for --engine native; Ray shares the work out itself, and each row has its embedding"
            raise InputError(message)


def _absolute(plan: EmbedderPlan) -> EmbedderPlan:
    """Names of files as every process of this machine finds them."""
    models = tuple(os.path.abspath(name) if os.path.exists(name) else name for name in plan.models)  # noqa: PTH100, PTH110
    chain = plan.chain.absolute() if plan.chain is not None and plan.chain.exists() else plan.chain
    return replace(plan, models=models, chain=chain)


@contextlib.contextmanager
def _local_copy(source: str) -> Iterator[Path]:
    """The file's own path, or of what does not lie on a disk the path of a copy, which is removed at the end."""
    filesystem, path = find_place(source)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="protnest-") as folder:
        copy = Path(folder) / PurePosixPath(path).name
        try:
            # No codec is guessed from the name: what is compressed stays so.
            with filesystem.open_input_stream(path, compression=None) as theirs, copy.open("wb") as ours:
                shutil.copyfileobj(theirs, ours, _COPIED_AT_ONCE)
        except OSError as error:
            message = f"cannot be read ({str(error).splitlines()[0]})"
            raise InputError(message, file=source) from error
        yield copy


@contextlib.contextmanager
def _naming(path: Path, source: str) -> Iterator[None]:
    """Errors of the copy name what it is a copy of."""
    try:
        yield
    except InputError as error:
        if "://" not in source or error.file != str(path):
            raise
        raise InputError(
            error.problem, file=source, line=error.line, record=error.record, record_id=error.record_id
        ) from error
