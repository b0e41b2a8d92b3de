"""Whether a store on disk is what was written: each file held against run.json, the index, and what a store must be."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputError
from .run_folder import LOCK_FILE, lock_folder
from .shard_file import read_tensors
from .store import (
    INDEX_FILE,
    INDEX_SCHEMA,
    REJECTS_FILE,
    RUN_FILE,
    SCHEMA_VERSION,
    STORAGE_DTYPES,
    Shard,
    checksum,
    discard,
    is_copy,
    is_own,
    is_search_index,
    is_temporary,
    read_run,
    read_settings,
    read_shards,
)

_ROWS_AT_ONCE = 1 << 14
Follower = Callable[[int, int], None]


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
        file: its name in the store.
        problem: what is wrong.
        shard: which shard has to be computed again for it; None for none.
    """

    file: str
    problem: str
    shard: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        complete: the run was finished; another one is whole as far as it goes if there are no damages.
        schema_version: of the store.
        shards: that run.json lists.
        rows: embeddings in these.
        records: lines of the index; of an unfinished run those of its shards.
        rejected: records left out, as rejects.csv lists them.
        damages: in the order of shards, then the index and the rest.
        notes: what is no damage: checks that the store's version does not allow, leftovers, foreign files.
        discarded: shards that were removed.
        reopened: the run was marked as not finished, so that it mends what is damaged.
    """

    complete: bool
    schema_version: int
    shards: int
    rows: int
    records: int
    rejected: int
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    discarded: list[int] = field(default_factory=list)
    reopened: bool = False

    @property
    def is_whole(self) -> bool:
        """The run is finished and nothing is damaged."""
        return self.complete and not self.damages


def verify_store(folder: Path, *, remove: bool = False, follow: Follower | None = None) -> Verdict:
    """Reads every byte of a store and holds it against what run.json says.

    Args:
        folder: the store. Nothing in it is changed, unless with `remove`.
        remove: take damaged shards, and a damaged index, off the store, so that the same `protnest embed` makes them
            again.
        follow: is told `(done, total)` in bytes.

    Raises:
        InputError: there is no run.json, or it cannot be read; a run is writing to the folder.
    """
    read_run(folder)
    with _alone(folder, must=remove):
        return _Verification(folder, follow or (lambda done, total: None)).run(remove=remove)


@contextmanager
def _alone(folder: Path, *, must: bool) -> Iterator[None]:
    """Holds the folder's lock, where there is one that may be held: a store may lie where nothing can be written."""
    with ExitStack() as held:
        if must or (folder / LOCK_FILE).exists():
            try:
                held.enter_context(lock_folder(folder))
            except OSError:
                if must:
                    raise
        yield


class _Verification:
    def __init__(self, folder: Path, follow: Follower) -> None:
        self._folder = folder
        self._run = read_run(folder)
        self._settings = read_settings(folder, self._run)
        self._shards = read_shards(folder, self._run)
        self._damages: list[Damage] = []
        self._notes: list[str] = []
        self._follow = follow
        self._done, self._total = 0, sum(shard.size_bytes for shard in self._shards)
        # Of shards that are whole, residues of each embedding, to be held against the index.
        self._lengths: dict[int, npt.NDArray[np.int64]] = {}

    def run(self, *, remove: bool) -> Verdict:
        complete = bool(self._run["complete"])
        if self._run["schema_version"] != SCHEMA_VERSION:
            self._notes.append("written by an earlier release: there are no checksums, all else was checked")
        self._check_list(complete)
        for shard in self._shards:
            self._check_shard(shard)
            if not complete and not (self._folder / INDEX_FILE).exists():
                self._check_part(shard)
        rejected = self._check_rejects()
        records = sum(shard.records or 0 for shard in self._shards)
        if complete or (self._folder / INDEX_FILE).exists():
            records = self._check_index(rejected)
        self._look_around(complete)
        damages = sorted(self._damages, key=lambda each: (each.shard is None, each.shard or 0))
        discarded: list[int] = []
        reopened = False
        if remove and damages and self._run["schema_version"] != SCHEMA_VERSION:
            self._notes.append(
                "nothing was removed: no run goes on with a store of this version; embed with --overwrite"
            )
        elif remove and damages:
            names = {damage.file for damage in damages}
            discarded = sorted({damage.shard for damage in damages if damage.shard is not None})
            discard(self._folder, set(discarded), index=INDEX_FILE in names)
            reopened = True
        return Verdict(
            complete,
            self._run["schema_version"],
            len(self._shards),
            sum(shard.rows for shard in self._shards),
            records,
            len(rejected),
            damages,
            self._notes,
            discarded,
            reopened,
        )

    def _tell(self, file: str, problem: str, shard: Shard | None = None) -> None:
        self._damages.append(Damage(file, problem, None if shard is None else shard.number))

    def _check_list(self, complete: bool) -> None:
        numbers = [shard.number for shard in self._shards]
        index, count = self._settings["shard"]
        if any(number % count != index - 1 for number in numbers) or numbers != sorted(set(numbers)):
            self._tell(RUN_FILE, f"lists shards that are not in order, or not those of --shard {index}/{count}")
        elif complete and numbers != list(range(index - 1, index - 1 + count * len(numbers), count)):
            missing = sorted(set(range(index - 1, numbers[-1], count)) - set(numbers))
            self._tell(RUN_FILE, f"says that the run is complete, but lists no shard {', '.join(map(str, missing))}")
        if self._run.get("rows") != sum(shard.rows for shard in self._shards):
            self._tell(RUN_FILE, f"says {self._run.get('rows')} rows, which is not the sum over its shards")

    def _check_shard(self, shard: Shard) -> None:
        path = self._folder / shard.file
        problem = self._file_problem(shard.file, shard.size_bytes, shard.sha256) or self._unknown(shard.sha256)
        if problem is None:
            try:
                problem = self._content_problem(path, shard)
            except InputError as error:
                problem = error.problem
        if problem is not None:
            self._tell(shard.file, problem, shard)
        self._done += shard.size_bytes
        self._follow(self._done, self._total)

    def _file_problem(self, name: str, size_bytes: int | None, sha256: str | None) -> str | None:
        path = self._folder / name
        try:
            held = path.stat().st_size
            if size_bytes is not None and held != size_bytes:
                return f"has {held:,} bytes, {size_bytes:,} were written"
            if sha256 is not None and checksum(path) != sha256:
                return "its SHA-256 is not that of what was written"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None

    def _unknown(self, sha256: str | None) -> str | None:
        is_listed = sha256 is not None or self._run["schema_version"] != SCHEMA_VERSION
        return None if is_listed else f"{RUN_FILE} lists no SHA-256 of it"

    def _content_problem(self, path: Path, shard: Shard) -> str | None:
        tensors = read_tensors(path)
        is_residue = self._settings["pool"] == "residue"
        names = ["embeddings", "offsets"] if is_residue else ["embeddings"]
        if sorted(tensors) != names:
            return f"holds {', '.join(sorted(tensors))}; expected {', '.join(names)}"
        embeddings = tensors["embeddings"]
        dtype = np.dtype(STORAGE_DTYPES[self._settings["storage_dtype"]])
        rows = shard.rows
        if is_residue:
            offsets = tensors["offsets"].view()
            if offsets.dtype != np.int64 or offsets.shape != (shard.rows + 1,):
                return f"offsets are {offsets.dtype} {offsets.shape}; expected int64 {(shard.rows + 1,)}"
            if offsets[0] != 0 or (np.diff(offsets) < 1).any():
                return "offsets do not rise from 0"
            rows = int(offsets[-1])
        if embeddings.dtype != dtype or embeddings.shape != (rows, self._settings["width"]):
            expected = f"{dtype} {(rows, self._settings['width'])}"
            return f"embeddings are {embeddings.dtype} {embeddings.shape}; expected {expected}"
        view = embeddings.view()
        for begin in range(0, rows, _ROWS_AT_ONCE):
            is_bad = ~np.isfinite(view[begin : begin + _ROWS_AT_ONCE]).all(axis=1)
            if is_bad.any():
                return f"row {begin + int(is_bad.argmax())} is not finite"
        if is_residue:
            self._lengths[shard.number] = np.diff(offsets)
        return None

    def _check_part(self, shard: Shard) -> None:
        problem = self._file_problem(shard.index_file, None, shard.index_sha256)
        if problem is not None:
            self._tell(shard.index_file, problem)

    def _check_rejects(self) -> npt.NDArray[np.int64]:
        """Places of the records left out, from 0."""
        path = self._folder / REJECTS_FILE
        empty = np.empty(0, np.int64)
        if problem := self._file_problem(REJECTS_FILE, None, self._run.get("rejects_sha256")):
            self._tell(REJECTS_FILE, problem)
            return empty
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = csv.reader(file)
                if (header := next(rows, None)) != ["record", "id", "reason"]:
                    self._tell(REJECTS_FILE, f"begins with {header}; expected record, id, reason")
                    return empty
                return np.array([int(record) - 1 for record, _, _ in rows], dtype=np.int64)
        except (OSError, ValueError, csv.Error) as error:
            self._tell(REJECTS_FILE, f"cannot be read ({error})")
        return empty

    def _check_index(self, rejected: npt.NDArray[np.int64]) -> int:
        """Returns how many lines there are."""
        sha256 = self._run.get("index_sha256")
        problem = self._file_problem(INDEX_FILE, None, sha256)
        if problem is None and self._run["complete"]:
            problem = self._unknown(sha256)
        if problem is None:
            try:
                table = pq.read_table(self._folder / INDEX_FILE)
            except (OSError, pa.ArrowException) as error:
                problem = f"cannot be read ({error})"
            else:
                problem = self._lines_problem(table, rejected)
        if problem is not None:
            self._tell(INDEX_FILE, problem)
            return 0
        return int(table.num_rows)

    def _lines_problem(self, table: pa.Table, rejected: npt.NDArray[np.int64]) -> str | None:
        has_rows = self._run["schema_version"] == SCHEMA_VERSION
        schema = INDEX_SCHEMA if has_rows else INDEX_SCHEMA.remove(INDEX_SCHEMA.get_field_index("row"))
        if not table.schema.equals(schema):
            return f"has the columns {', '.join(table.schema.names)}; expected {', '.join(schema.names)}"
        if self._run["complete"]:
            records = sum(shard.proteins for shard in self._shards)
            if table.num_rows != records:
                return f"has {table.num_rows:,} lines; the shards have {records:,} records"
        position_N = table["position"].to_numpy()
        if (np.diff(position_N, prepend=-1) <= 0).any():
            line = int((np.diff(position_N, prepend=-1) <= 0).argmax())
            return f"line {line + 1}: position {position_N[line]} does not rise"
        if problem := self._account(position_N, rejected):
            if self._run.get("index_sha256") is None:
                return problem
            # The index is what was written, so it is the other one.
            self._tell(REJECTS_FILE, problem)
        row_N = table["row"].to_numpy() if has_rows else np.arange(table.num_rows)
        return self._rows_problem(row_N, table["length"].to_numpy())

    def _account(self, position_N: npt.NDArray[np.int64], rejected: npt.NDArray[np.int64]) -> str | None:
        """No record may be in both, and in a store of the whole library none in neither."""
        if any(damage.file == REJECTS_FILE for damage in self._damages):
            return None
        if np.intersect1d(position_N, rejected).size:
            return "there are records that both the index and rejects.csv list"
        last = max(position_N.max(initial=-1), rejected.max(initial=-1))
        if self._settings["shard"][1] == 1 and len(position_N) + len(rejected) != last + 1:
            lost = last + 1 - len(position_N) - len(rejected)
            return f"{lost:,} records of the library are neither in the index nor in rejects.csv"
        return None

    def _rows_problem(self, row_N: npt.NDArray[np.int64], length_N: npt.NDArray[np.int64]) -> str | None:
        """Rows appear in order: each line names one named before, or the next one."""
        highest_N = np.maximum.accumulate(row_N) if row_N.size else row_N
        is_bad = (row_N < 0) | (np.diff(highest_N, prepend=-1) > 1)
        if not self._settings.get("dedup"):
            is_bad |= row_N != np.arange(len(row_N))
        if is_bad.any():
            line = int(is_bad.argmax())
            return f"line {line + 1}: row {row_N[line]} is not the one that follows"
        if not self._run["complete"]:
            return None  # Shards that are gone leave their lines.
        ends = np.cumsum([0, *(shard.proteins for shard in self._shards)])
        rows = np.cumsum([0, *(shard.rows for shard in self._shards)])
        for place, shard in enumerate(self._shards):
            found = int(highest_N[ends[place + 1] - 1]) + 1
            if found != rows[place + 1]:
                return f"names {found:,} embeddings by the end of {shard.file}, which are {rows[place + 1]:,}"
        return self._lengths_problem(row_N, length_N) if self._lengths else None

    def _lengths_problem(self, row_N: npt.NDArray[np.int64], length_N: npt.NDArray[np.int64]) -> str | None:
        """With pool=residue an embedding has a row a residue."""
        unknown = -1  # Of shards that are damaged.
        stored_U = np.concatenate(
            [self._lengths.get(shard.number, np.full(shard.rows, unknown)) for shard in self._shards]
        )
        held_N = stored_U[row_N]
        if self._settings["long"] == "truncate":
            length_N = np.minimum(length_N, self._settings["max_residues"])
        is_bad = (held_N != length_N) & (held_N != unknown)
        if is_bad.any():
            line = int(is_bad.argmax())
            return f"line {line + 1}: {length_N[line]} residues, but its embedding has {held_N[line]} rows"
        return None

    def _look_around(self, complete: bool) -> None:
        listed = {name for shard in self._shards for name in (shard.file, shard.index_file)}
        if complete:
            listed = {shard.file for shard in self._shards}
        for path in sorted(self._folder.iterdir()):
            name = path.name
            if name in listed:
                continue
            if is_temporary(name):
                self._notes.append(f"{name}: left by a killed run; the next one removes it")
            elif name.startswith("part-") and is_own(name):
                why = "left by a killed run" if complete else "not listed yet; the run that goes on sees to it"
                self._notes.append(f"{name}: {why}")
            elif is_search_index(name):
                self._notes.append(f"{name}: of `protnest search --keep-index`, which checks it as it reads it")
            elif is_copy(name):
                self._notes.append(f"{name}: a copy in another format, not checked")
            elif not is_own(name):
                self._notes.append(f"{name}: not of this store")
