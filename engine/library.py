"""Embedding a whole library: a file in, a store out, in bounded memory, resumable, on every device of a machine.

The file is read twice. The first reading checks every record and counts what there is to do, so that a bad last record
costs seconds and not the night before it. The second cuts the records into shards, which are embedded one by one, in
this process or by several workers, and written to the store as they are done. Which records share a shard and a batch
depends on the file and the settings alone, so a resumed run repeats an interrupted one bit for bit.
"""

from __future__ import annotations

import csv
import functools
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .cpus import memory_nodes, usable_cpus
from .device import resolve_device
from .embedder import Embedder
from .embedder_plan import EmbedderPlan
from .errors import InputError
from .fasta import InvalidPolicy, Record
from .library_settings import embedder_settings, record_flags
from .library_source import open_source
from .library_survey import Survey, record_work, survey_library
from .record_source import RecordSource, check_rereadable, locate_error
from .shard_job import RecordFault, ShardJob, cut_jobs, embed_job
from .shard_worker import WorkerPlan
from .shard_workers import ShardWorkers
from .stages import Arrays, StageTimes, run_stages
from .store import STORAGE_DTYPES, Shard, StoreWriter, index_table, write_shard

# A shard is what a crash can cost, and what is held in memory at once.
SHARD_RECORDS = 2048
SHARD_RESIDUES = 1 << 20
_SHARD_BYTES = 1 << 27


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
        shard_records: most proteins embedded in a shard.
        dedup: embed records of equal sequences once.
        workers: processes that embed; None for one a GPU, and on a CPU this one alone. They decide no bytes.
    """

    invalid: InvalidPolicy = "error"
    storage_dtype: str = "fp32"
    shard: tuple[int, int] = (1, 1)
    shard_records: int = SHARD_RECORDS
    dedup: bool = False
    workers: int | None = None

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
        if self.workers is not None and self.workers < 1:
            message = f"workers must be positive, got {self.workers}"
            raise InputError(message)
        if self.dedup and self.shard[1] > 1:
            message = (
                f"--dedup with --shard {self.shard[0]}/{self.shard[1]}: equal sequences may lie in another job's "
                "shards; remove one of both"
            )
            raise InputError(message)

    def workers_on(self, plan: EmbedderPlan | None) -> list[EmbedderPlan]:
        """What each of several worker processes makes; empty where this process does the work itself.

        Raises:
            InputError: several workers are asked for, and there is no plan.
        """
        if plan is None:
            if self.workers is not None and self.workers > 1:
                message = f"workers is {self.workers}, and each makes its own embedder: pass an EmbedderPlan"
                raise InputError(message)
            return []
        gpus = torch.cuda.device_count() if plan.device in ("auto", "cuda") and torch.cuda.is_available() else 0
        count = self.workers or max(gpus, 1)
        if count == 1:
            return []
        if resolve_device(plan.device).type == "cpu":
            return [plan.on("cpu")] * count
        return [plan.on(f"cuda:{place % gpus}" if gpus else plan.device) for place in range(count)]


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
        times: where the time went.
        restarts: workers that died and were replaced.
        workers: processes that worked.
        wall_s: seconds from the first record read to the merged index.
        settings: of the run, resolved.
    """

    survey: Survey
    embedded: int = 0
    resumed: int = 0
    duplicates: int = 0
    residues: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    times: StageTimes = field(default_factory=StageTimes)
    restarts: int = 0
    workers: int = 1
    wall_s: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def idle_share(self) -> float | None:
        """Share of the workers' time in which no model ran; None where there was nothing to do."""
        return 1 - self.times.model / (self.workers * self.wall_s) if self.residues else None

    @property
    def models(self) -> list[str]:
        """Names of the models that ran, smallest first; of an exported file its largest."""
        is_file = "runtime" in self.settings
        return [self.settings["model"]] if is_file else self.settings.get("models", [self.settings["model"]])


def embed_library(
    source: Path | RecordSource,
    out: Path,
    embedder: Embedder | EmbedderPlan,
    options: LibraryOptions | None = None,
    *,
    details: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LibraryResult:
    """Embeds a library into the folder `out`, going on where an earlier run of the same settings stopped.

    Args:
        source: a file, see `open_source`, or whatever else proteins are read from.
        out: the store; made if it is not there.
        embedder: model, pooling, batch size and what becomes of long proteins; several workers need it as a plan.
        options: what else decides the bytes, and how many processes work.
        details: kept in run.json: versions and the like.
        overwrite: throw away a run of other settings in `out`.
        progress: is told how far the run is.

    Raises:
        InputError: the file is invalid; `out` holds another run, or is being written to; workers die again and again.
    """
    options = options or LibraryOptions()
    progress = progress or Silent()
    if isinstance(source, Path):
        source = open_source(source, invalid=options.invalid)
    check_rereadable(source.path)
    plan = embedder if isinstance(embedder, EmbedderPlan) else None
    workers = options.workers_on(plan)
    began = time.perf_counter()
    threads = max(1, usable_cpus() // max(1, len(workers)))
    threads = min(threads, int(os.environ.get("OMP_NUM_THREADS", threads)))
    with (
        ShardWorkers(len(workers), threads=threads) as pool,
        tempfile.SpooledTemporaryFile(max_size=1 << 20, mode="w+", newline="", encoding="utf-8") as rejects,
    ):
        if isinstance(embedder, EmbedderPlan):
            embedder = embedder.make()
        loaded = time.perf_counter()
        survey = survey_library(source, embedder, rejects=rejects, dedup=options.dedup)
        if not survey.records:
            message = f"no sequence to embed: all {survey.rejected} records were left out"
            rejects.seek(0)
            if first := next(csv.DictReader(rejects), None):
                message += f", record {first['record']} since {first['reason']}"
            raise InputError(message, file=source.path)
        checked = time.perf_counter()
        settings = _settings(source, embedder, options, survey)
        about = {"input": {"path": str(source.path), "bytes": source.path.stat().st_size}}
        with StoreWriter(out, settings, details={**about, **(details or {})}, overwrite=overwrite) as store:
            run = _Run(store, source, embedder, options, survey, progress)
            if store.complete:
                progress.start(survey.records, survey.work, survey.work)
                return replace(run.result(), duplicates=store.count_duplicates())
            rejects.seek(0)
            store.write_rejects(rejects)
            if workers:
                # The model has told all that is to be known of it; the workers need its memory.
                embedder.release()
                run.in_processes(pool, workers)
            else:
                run.in_this_process()
            embedded = time.perf_counter()
            duplicates = store.finish()
            ended = time.perf_counter()
            # What this process does alone, every worker waits for.
            count = len(workers) or 1
            run.times.add(
                StageTimes(
                    loading=count * (loaded - began),
                    checking=count * (checked - loaded),
                    finishing=count * (ended - embedded),
                )
            )
            return replace(run.result(), duplicates=duplicates, wall_s=ended - began)


def _settings(source: RecordSource, embedder: Embedder, options: LibraryOptions, survey: Survey) -> dict[str, Any]:
    return {
        **embedder_settings(embedder),
        "input_fingerprint": survey.fingerprint,
        "invalid": source.invalid,
        "storage_dtype": options.storage_dtype,
        "shard": list(options.shard),
        "shard_records": options.shard_records,
        # Absent where it is not asked for, as in stores that were written before there was such a thing.
        **({"dedup": True} if options.dedup else {}),
        **source.settings,
    }


def most_residues(*, width: int, pool: str, is_chain: bool) -> int:
    """Most residues of a shard, so that what is held in memory at once is bounded."""
    # With a chain the maximum is taken of projected residues, which wait for the next model in --sequential.
    if pool == "residue" or (is_chain and pool == "max"):
        return min(SHARD_RESIDUES, max(1, _SHARD_BYTES // (4 * width)))
    return SHARD_RESIDUES


class _Run:
    """Embeds the shards that a store lacks."""

    def __init__(
        self,
        store: StoreWriter,
        source: RecordSource,
        embedder: Embedder,
        options: LibraryOptions,
        survey: Survey,
        progress: Progress,
    ) -> None:
        self._store = store
        self._source = source
        self._embedder = embedder
        self._options = options
        self._survey = survey
        self._progress = progress
        self._resumed = sum(shard.proteins for shard in store.shards.values())
        self._embedded = self._residues = 0
        self._flags: Counter[str] = Counter()
        self._workers, self._restarts = 1, 0
        self.times = StageTimes()

    def result(self) -> LibraryResult:
        return LibraryResult(
            self._survey,
            self._embedded,
            self._resumed,
            residues=self._residues,
            flags=dict(self._flags),
            times=self.times,
            restarts=self._restarts,
            workers=self._workers,
            settings=self._store.settings,
        )

    def in_this_process(self) -> None:
        def write(job: ShardJob, arrays: Arrays) -> None:
            self._finish(job, write_shard(self._store.folder, job.number, job.entries, arrays))

        try:
            self.times = run_stages(
                self._jobs(), self._embed, write, writes_behind=self._embedder.device.type == "cuda"
            )
        except RecordFault as error:
            raise locate_error(self._source, error.record, error.problem) from error

    def in_processes(self, pool: ShardWorkers, plans: list[EmbedderPlan]) -> None:
        nodes, self._workers = memory_nodes(), len(plans)
        workers = [
            WorkerPlan(
                embedder=plan,
                folder=self._store.folder.absolute(),
                storage_dtype=self._options.storage_dtype,
                cpus=nodes[place % len(nodes)] if len(nodes) > 1 else (),
            )
            for place, plan in enumerate(plans)
        ]
        try:
            self.times = pool.run(workers, self._jobs(), on_shard=self._finish, on_advance=self._progress.advance)
        except RecordFault as error:
            raise locate_error(self._source, error.record, error.problem) from error
        finally:
            self._restarts = pool.restarts

    def _jobs(self) -> Iterator[ShardJob]:
        """Those that the store lacks; the bar begins with the first."""
        done = 0
        started = False
        for job in cut_jobs(
            self._source,
            self._survey,
            flags=self._flags_of,
            max_records=self._options.shard_records,
            max_residues=most_residues(
                width=self._embedder.dims[-1],
                pool=self._embedder.pool,
                is_chain=self._embedder.chain is not None,
            ),
            share=self._options.shard,
        ):
            if job.number in self._store.shards:
                done += sum(record_work(record, self._embedder) for record in job.fresh)
                self._store.restore_index(job.number, functools.partial(index_table, job.entries))
                continue
            if not started:
                # A job that embeds every N-th shard has about an N-th of the work.
                jobs = self._options.shard[1]
                self._progress.start(self._survey.records // jobs, self._survey.work // jobs, done)
                started = True
            yield job

    def _embed(self, job: ShardJob) -> Arrays:
        return embed_job(
            job, self._embedder, storage_dtype=self._options.storage_dtype, after_batch=self._progress.advance
        )

    def _finish(self, job: ShardJob, shard: Shard) -> None:
        self._store.add(shard)
        self._embedded += shard.proteins
        self._residues += sum(len(record.sequence) for record in job.fresh)
        self._flags.update(itertools.chain.from_iterable(entry.flags for entry in job.entries))

    def _flags_of(self, record: Record) -> tuple[str, ...]:
        return record_flags(record, max_residues=self._embedder.max_residues, long=self._embedder.long)
