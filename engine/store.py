"""A run's folder on disk: shards of embeddings, an index, rejects, and run.json, which says what is finished.

    run.json                 schema version, resolved settings, model, versions, input, finished shards with the SHA-256
                             of their files, that of the index and the rejects, `complete`
    part-NNNNN.safetensors   `embeddings` (n, D); with pool=residue (sum of lengths, D) beside `offsets` int64 (n + 1,)
    part-NNNNN.parquet       the shard's records of the index, until the run completes
    index.parquet            position, id, header, length, flags, row: one line a record, in input order
    rejects.csv              record, id, reason: what `--invalid skip` or `mask` left out

Every file is written under a temporary name, flushed to the disk and renamed; run.json comes last. So a run killed at
any moment leaves finished shards and nothing that looks finished without being so. A lock that dies with its process
keeps two runs out of one folder. Nothing is decided by clocks.

Version 1 had neither checksums nor `row`, which was the line's own place: it is read, but not gone on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .atomic import write_atomically
from .errors import InputError
from .fasta import Record
from .run_folder import LOCK_FILE, check_empty, differences, enter_folder
from .schema_version import check_schema_version

SCHEMA_VERSION = 2
RUN_FILE = "run.json"
INDEX_FILE = "index.parquet"
REJECTS_FILE = "rejects.csv"
_PART = re.compile(r"part-\d{5,}\.(safetensors|parquet)")
_SEARCH_INDEX = re.compile(r"search-(cosine|dot)-\d+\.safetensors")
_COPY = re.compile(r"embeddings\.(parquet|h5|npy|h5ad|csv)")

STORAGE_DTYPES: dict[str, npt.DTypeLike] = {"fp32": np.float32, "fp16": np.float16}
"""Of embeddings, by the setting's name."""

INDEX_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("id", pa.string()),
        ("header", pa.string()),
        ("length", pa.int64()),
        ("flags", pa.string()),
        ("row", pa.int64()),
    ]
)
"""position: place among the file's records, from 0, rejected ones counted; flags: words joined by commas; row: which
embedding is its own, from 0 over all shards in order; with --dedup records of equal sequences share one."""


@dataclass(frozen=True)
class Entry:
    """One line of the index.

    Attributes:
        record: the protein.
        row: which embedding is its own, over all shards.
        flags: what was done to it.
    """

    record: Record
    row: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A finished shard, as run.json lists it.

    Attributes:
        number: its place among the shards, from 0.
        rows: proteins embedded in it.
        size_bytes: of its file.
        records: lines of the index that belong to it; as many as rows but with --dedup.
        sha256: of its file; None in stores of version 1.
        index_sha256: of its part of the index; None in stores of version 1.
    """

    number: int
    rows: int
    size_bytes: int
    records: int | None = None
    sha256: str | None = None
    index_sha256: str | None = None

    @property
    def proteins(self) -> int:
        """Those that have their embeddings in it, or with --dedup in a shard before it; of version 1, too."""
        return self.rows if self.records is None else self.records

    @property
    def file(self) -> str:
        return f"part-{self.number:05d}.safetensors"

    @property
    def index_file(self) -> str:
        return f"part-{self.number:05d}.parquet"


def write_shard(
    folder: Path,
    number: int,
    entries: Sequence[Entry],
    arrays: dict[str, npt.NDArray[Any]],
) -> Shard:
    """Writes shard `number`, from 0: its lines of the index, and the tensors of its file. It is listed by no one yet.

    Args:
        folder: the store.
        number: of the shard.
        entries: its records, in input order.
        arrays: `embeddings` (n, D), and with pool=residue `offsets`.
    """
    shard = Shard(number, 0, 0)
    write_index(folder / shard.index_file, index_table(entries))
    write_atomically(folder / shard.file, lambda temporary: _save(arrays, temporary))
    return _describe(folder, number)


def index_table(entries: Sequence[Entry]) -> pa.Table:
    """Records as lines of the index."""
    return pa.table(
        {
            "position": [entry.record.index for entry in entries],
            "id": [entry.record.id for entry in entries],
            "header": [entry.record.header for entry in entries],
            "length": [len(entry.record.sequence) for entry in entries],
            "flags": [",".join(entry.flags) for entry in entries],
            "row": [entry.row for entry in entries],
        },
        schema=INDEX_SCHEMA,
    )


def write_index(path: Path, table: pa.Table) -> None:
    """Writes a shard's part of the index."""
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def _describe(folder: Path, number: int) -> Shard:
    """What run.json says of a shard whose files are written."""
    shard = Shard(number, 0, 0)
    path, index_path = folder / shard.file, folder / shard.index_file
    with safe_open(path, framework="numpy") as file:
        rows = file.get_slice("embeddings").get_shape()[0]
        if "offsets" in file.keys():
            rows = file.get_slice("offsets").get_shape()[0] - 1
    return Shard(
        number,
        rows,
        path.stat().st_size,
        pq.read_metadata(index_path).num_rows,
        checksum(path),
        checksum(index_path),
    )


def _save(arrays: dict[str, npt.NDArray[Any]], path: Path) -> None:
    try:
        save_file(arrays, path)
    except SafetensorError as error:
        # It tells of a full disk by its own class, without the number that the system gave.
        message = f"cannot be written ({error})"
        raise InputError(message, file=path.with_name(path.name.removeprefix(".").removesuffix(".tmp"))) from error


def checksum(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class StoreWriter:
    """Writes one run's folder; use it as a context, which holds the folder's lock.

    Args:
        folder: made if it is not there.
        settings: everything that decides the bytes; a folder is resumed under equal settings only.
        details: what is kept in run.json beside the settings: versions, command.
        overwrite: throw away a run of other settings.

    Raises:
        InputError: another run holds the folder, or it holds a run of other settings and `overwrite` is not set.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], *, details: dict[str, Any], overwrite: bool = False
    ) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.details = details
        self.overwrite = overwrite
        self.complete = False
        self.shards: dict[int, Shard] = {}
        self._index_sha256: str | None = None
        self._rejects_sha256: str | None = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> StoreWriter:
        self._held.enter_context(enter_folder(self.folder))
        try:
            self._open()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _open(self) -> None:
        if (self.folder / RUN_FILE).exists():
            run = read_run(self.folder)
            changed = differences(run["settings"], self.settings)
            listed = read_shards(self.folder, run)
            whole = {shard.number: shard for shard in listed if self._is_whole(shard)}
            index = self.folder / INDEX_FILE
            complete = run["complete"] and len(whole) == len(listed) and index.exists()
            if not changed and run["schema_version"] != SCHEMA_VERSION and not complete:
                changed = [f"schema version: {run['schema_version']} there, {SCHEMA_VERSION} now"]
            if not changed:
                self.complete, self.shards = complete, whole
                self._index_sha256 = run.get("index_sha256")
                self._rejects_sha256 = run.get("rejects_sha256")
                # An index that run.json does not know of is made again of its parts, and a damaged one of the library.
                if not complete and index.exists() and checksum(index) != self._index_sha256:
                    index.unlink()
                self._tidy()
                if not self.complete:
                    self._adopt(listed={shard.number for shard in listed})
                return
            if not self.overwrite:
                message = f"holds a run with other settings ({'; '.join(changed)}); choose another --out or --overwrite"
                raise InputError(message, file=self.folder)
        else:
            check_empty(self.folder)
        self._clear()
        self._write_run()

    def _is_whole(self, shard: Shard) -> bool:
        path = self.folder / shard.file
        return path.exists() and path.stat().st_size == shard.size_bytes

    def _tidy(self) -> None:
        """Removes what a killed run was writing, or had no time left to remove."""
        leftovers = list(self.folder.glob(".*.tmp"))
        if self.complete:
            leftovers += [self.folder / shard.index_file for shard in self.shards.values()]
        for path in leftovers:
            if path.is_dir():  # A copy of files was being written.
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _adopt(self, listed: set[int]) -> None:
        """Lists shards that were written whole, by a run that was killed before it listed them.

        Those that it did list and that are not as listed are damaged, and are written again.
        """
        for index_path in sorted(self.folder.glob("part-*.parquet")):
            number = int(index_path.stem.removeprefix("part-"))
            if number in listed or not (self.folder / Shard(number, 0, 0).file).exists():
                continue
            with contextlib.suppress(OSError, pa.ArrowInvalid, SafetensorError):
                self.shards[number] = _describe(self.folder, number)

    def _clear(self) -> None:
        # run.json goes first: a folder that is half cleared must not look like a run.
        patterns = (RUN_FILE, "part-*.*", INDEX_FILE, REJECTS_FILE, "embeddings.*", "offsets.npy", "pt/*.pt", ".*.tmp")
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                path.unlink()

    def _write_run(self) -> None:
        run = {
            "schema_version": SCHEMA_VERSION,
            "complete": self.complete,
            "settings": self.settings,
            "rows": sum(shard.rows for shard in self.shards.values()),
            "shards": [vars(self.shards[number]) for number in sorted(self.shards)],
            "index_sha256": self._index_sha256,
            "rejects_sha256": self._rejects_sha256,
            **self.details,
        }
        _write_run(self.folder, run)

    def add(self, shard: Shard) -> None:
        """Lists a shard that `write_shard` wrote as finished."""
        self.shards[shard.number] = shard
        self._write_run()

    def restore_index(self, number: int, table: Callable[[], pa.Table]) -> None:
        """Sees to it that a finished shard's part of the index is there, where no index of the whole run holds it.

        Args:
            number: of the shard.
            table: its lines of the index; called if they are needed.
        """
        shard = self.shards[number]
        path = self.folder / shard.index_file
        if (self.folder / INDEX_FILE).exists() or (path.exists() and checksum(path) == shard.index_sha256):
            return
        write_index(path, table())
        self.shards[number] = replace(shard, index_sha256=checksum(path))

    def write_rejects(self, rejects: IO[str]) -> None:
        """Writes the CSV text of `rejects` as the store's list of records left out."""

        def copy(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                shutil.copyfileobj(rejects, file)

        write_atomically(self.folder / REJECTS_FILE, copy)
        self._rejects_sha256 = checksum(self.folder / REJECTS_FILE)

    def finish(self) -> int:
        """Merges the index, marks the run complete, and tidies up.

        Returns:
            How many rows carry an id that an earlier row carries too.
        """
        numbers = sorted(self.shards)
        parts = [self.folder / self.shards[number].index_file for number in numbers]
        if all(part.exists() for part in parts):

            def merge(temporary: Path) -> None:
                with pq.ParquetWriter(temporary, INDEX_SCHEMA) as writer:
                    for part in parts:
                        writer.write_table(pq.read_table(part))

            write_atomically(self.folder / INDEX_FILE, merge)
            self._index_sha256 = checksum(self.folder / INDEX_FILE)
        self.complete = True
        self._write_run()
        for part in parts:
            part.unlink(missing_ok=True)
        return self.count_duplicates()

    def count_duplicates(self) -> int:
        """How many rows of a complete run carry an id that an earlier row carries too."""
        ids = pq.read_table(self.folder / INDEX_FILE, columns=["id"])["id"]
        return len(ids) - int(pc.count_distinct(ids).as_py())


def _write_run(folder: Path, run: dict[str, Any]) -> None:
    text = json.dumps(run, indent=1) + "\n"
    write_atomically(folder / RUN_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def discard(folder: Path, numbers: set[int], *, index: bool) -> None:
    """Takes shards off a store, so that the same run makes them again. The caller holds the folder's lock.

    Args:
        folder: the store.
        numbers: of the shards.
        index: take the index off, too; it is made again without a model.

    Raises:
        InputError: the store is of an earlier version, with which no run goes on.
    """
    run = read_run(folder)
    if run["schema_version"] != SCHEMA_VERSION:
        message = f"is of schema version {run['schema_version']}, with which no run goes on: embed with --overwrite"
        raise InputError(message, file=folder)
    shards = read_shards(folder, run)
    kept = [shard for shard in shards if shard.number not in numbers]
    changed = {"complete": False, "rows": sum(shard.rows for shard in kept), "shards": [vars(shard) for shard in kept]}
    removed = [shard for shard in shards if shard.number in numbers]
    # Without its part of the index a shard is adopted by no run; and none may be listed that is on its way out.
    for shard in removed:
        (folder / shard.index_file).unlink(missing_ok=True)
    _write_run(folder, {**run, **changed})
    for shard in removed:
        (folder / shard.file).unlink(missing_ok=True)
    if index:
        (folder / INDEX_FILE).unlink(missing_ok=True)


def is_own(name: str) -> bool:
    """Whether a file of this name in a store is the store's own."""
    return name in (RUN_FILE, INDEX_FILE, REJECTS_FILE, LOCK_FILE, ".workers.lock") or bool(_PART.fullmatch(name))


def is_copy(name: str) -> bool:
    """Whether a file or folder of this name is where `embed --format` and `convert` put a copy."""
    return name in ("offsets.npy", "pt") or bool(_COPY.fullmatch(name))


def is_search_index(name: str) -> bool:
    """Whether a file of this name is one that `search --keep-index` keeps."""
    return bool(_SEARCH_INDEX.fullmatch(name))


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that was being written."""
    return name.startswith(".") and name.endswith(".tmp")


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json of a store says.

    Raises:
        InputError: it is missing, damaged, or of a schema version that this release does not know.
    """
    path = folder / RUN_FILE
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = run["schema_version"]
        if run.get("engine") == "ray":
            message = "holds Parquet or Lance files that --engine ray wrote: read them with pyarrow or lance"
            raise InputError(message, file=folder)
        _ = run["complete"], run["settings"], run["shards"]
    except FileNotFoundError as error:
        message = "no such file: this folder holds no embeddings"
        raise InputError(message, file=path) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        message = f"not a readable run ({error})"
        raise InputError(message, file=path) from error
    check_schema_version(version, SCHEMA_VERSION, file=path, earlier=(1,))
    return run


def read_shards(folder: Path, run: dict[str, Any]) -> list[Shard]:
    """The finished shards that run.json lists, as `read_run` gave it.

    Raises:
        InputError: they are not listed as this release lists them.
    """
    try:
        shards = [Shard(**shard) for shard in run["shards"]]
    except TypeError as error:
        message = f"not a readable run ({error})"
        raise InputError(message, file=folder / RUN_FILE) from error
    for shard in shards:
        if not all(_is_count(each) for each in (shard.number, shard.rows, shard.size_bytes, shard.proteins)):
            message = f"not a readable run (of shard {shard.number!r} the list has no whole numbers)"
            raise InputError(message, file=folder / RUN_FILE)
    return shards


def read_settings(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The settings that run.json names, as `read_run` gave it; what a store is read by is among them.

    Raises:
        InputError: it is not.
    """
    settings: dict[str, Any] = run["settings"]
    try:
        index, count = settings["shard"]
        is_right = {
            "width": _is_count(settings["width"]) and settings["width"] > 0,
            "pool": isinstance(settings["pool"], str),
            "storage_dtype": settings["storage_dtype"] in STORAGE_DTYPES,
            "shard": _is_count(index) and _is_count(count) and 1 <= index <= count,
            "long": isinstance(settings["long"], str),
            "max_residues": _is_count(settings["max_residues"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        message = f"not a readable run (settings: {error!r})"
        raise InputError(message, file=folder / RUN_FILE) from error
    if wrong := [name for name, right in is_right.items() if not right]:
        message = f"not a readable run (settings: {wrong[0]} is {settings[wrong[0]]!r})"
        raise InputError(message, file=folder / RUN_FILE)
    return settings


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
