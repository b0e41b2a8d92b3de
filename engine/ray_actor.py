"""What a Ray actor does: takes a block of records, embeds it, writes it, and tells what it did.

This file knows nothing of Ray. A block is one shard of the native engine, with the same records in it, so its
embeddings have the same bits. It travels as a table of one row.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from .allocator import keep_memory
from .block_folder import MOST_TRIES, BlockFolder
from .embedder_plan import EmbedderPlan
from .errors import InputError
from .fasta import Record
from .library_settings import EmbedderFacts
from .shard_job import RecordFault, ShardJob, embed_job
from .store import INDEX_SCHEMA, STORAGE_DTYPES, Entry, index_table

_TEXTS = pa.list_(pa.string())
_JOB = pa.schema(
    [
        ("number", pa.int64()),
        ("position", pa.list_(pa.int64())),
        ("id", _TEXTS),
        ("header", _TEXTS),
        ("sequence", _TEXTS),
        ("flags", _TEXTS),
    ]
)
REPORT = pa.schema(
    [
        ("number", pa.int64()),
        ("rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("residues", pa.int64()),
        ("flags", pa.string()),
        ("model_s", pa.float64()),
        ("write_s", pa.float64()),
        ("worker", pa.string()),
        ("fault_position", pa.int64()),
        ("fault_id", pa.string()),
        ("problem", pa.string()),
    ]
)
"""What is told of a block. `problem` is null where it is written; with `fault_position` it is one record's."""


def table_of_job(job: ShardJob) -> pa.Table:
    """A shard as a table of one row."""
    records = [entry.record for entry in job.entries]
    row = {
        "number": job.number,
        "position": [record.index for record in records],
        "id": [record.id for record in records],
        "header": [record.header for record in records],
        "sequence": [record.sequence for record in records],
        "flags": [",".join(entry.flags) for entry in job.entries],
    }
    return pa.Table.from_pylist([row], schema=_JOB)


def job_of_table(table: pa.Table) -> ShardJob:
    """The shard of a table of one row. Its embeddings are numbered from 0."""
    (row,) = table.to_pylist()
    entries = []
    columns = zip(*(row[name] for name in ("position", "id", "header", "sequence", "flags")), strict=True)
    for place, (index, name, header, sequence, words) in enumerate(columns):
        flags = tuple(words.split(",")) if words else ()
        record = Record(index=index, id=name, header=header, sequence=sequence, flags=flags)
        entries.append(Entry(record, place, flags))
    return ShardJob(row["number"], 0, entries)


def block_schema(width: int, pool: str, storage_dtype: str) -> pa.Schema:
    """Columns of a block: those of a store's index, and where its `row` is the `embedding` itself.

    With pool "residue" that is a list of rows.
    """
    vector = pa.list_(pa.from_numpy_dtype(STORAGE_DTYPES[storage_dtype]), width)
    row = INDEX_SCHEMA.get_field_index("row")
    return INDEX_SCHEMA.set(row, pa.field("embedding", pa.list_(vector) if pool == "residue" else vector))


def block_table(job: ShardJob, arrays: dict[str, npt.NDArray[Any]], schema: pa.Schema) -> pa.Table:
    """A block with its embeddings."""
    kind = schema.field("embedding").type
    vector = kind.value_type if "offsets" in arrays else kind
    rows: pa.Array = pa.FixedSizeListArray.from_arrays(pa.array(arrays["embeddings"].reshape(-1)), type=vector)
    if "offsets" in arrays:
        rows = pa.ListArray.from_arrays(pa.array(arrays["offsets"].astype(np.int32)), rows, type=kind)
    return index_table(job.entries).drop_columns(["row"]).append_column(schema.field("embedding"), rows)


class BlockEmbedder:
    """Embeds blocks and writes them, with one embedder that it makes of its plan.

    Args:
        plan: of the embedder.
        settings: that the embedder must have: every machine must find the same model.
        folder: where blocks are written.
        storage_dtype: "fp32" or "fp16".
        threads: on which a CPU computes.
    """

    def __init__(
        self, *, plan: EmbedderPlan, settings: dict[str, Any], folder: BlockFolder, storage_dtype: str, threads: int
    ) -> None:
        keep_memory()
        torch.set_num_threads(threads)
        self._threads = threads
        self._embedder = plan.make()
        facts = EmbedderFacts.of(self._embedder)
        if facts.settings != settings:
            message = f"the model of this machine, {socket.gethostname()}, is not the one that the run began with"
            raise InputError(message)
        self._folder = folder
        self._storage_dtype = storage_dtype
        self._schema = block_schema(facts.width, facts.pool, storage_dtype)

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row of `_JOB` in, one row of `REPORT` out, and a block written in between."""
        job = job_of_table(table)
        report: dict[str, Any] = {
            "number": job.number,
            "residues": sum(len(entry.record.sequence) for entry in job.entries),
            "flags": json.dumps(Counter(word for entry in job.entries for word in entry.flags)),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
        }
        # Of a thread, and nobody promises that this one is the one that made the embedder.
        torch.set_num_threads(self._threads)
        try:
            with self._folder.trying(job.number) as died:
                report |= self._embed(job) if died < MOST_TRIES else _give_up(job)
        except OSError as error:
            report["problem"] = f"cannot be written to ({error})"
        return pa.Table.from_pylist([report], schema=REPORT)

    def _embed(self, job: ShardJob) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            arrays = embed_job(job, self._embedder, storage_dtype=self._storage_dtype, after_batch=lambda _: None)
        except RecordFault as error:
            # Told, not raised: an error would come out wrapped in what Ray has to say about it.
            return {"problem": error.problem, "fault_position": error.record.index, "fault_id": error.record.id}
        embedded = time.perf_counter()
        block = self._folder.write_block(job.number, block_table(job, arrays, self._schema))
        seconds = {"model_s": embedded - started, "write_s": time.perf_counter() - embedded}
        return {"rows": block.rows, "size_bytes": block.size_bytes, **seconds}


def _give_up(job: ShardJob) -> dict[str, Any]:
    first, last = job.entries[0].record, job.entries[-1].record
    problem = (
        f"{MOST_TRIES} workers died over the records {first.index + 1} ({first.id}) to {last.index + 1} ({last.id}): "
        "too little memory? Fewer --workers or a smaller --max-tokens need less"
    )
    return {"problem": problem, "fault_position": first.index, "fault_id": first.id}
