"""Reading a finished store: ids, and embeddings as one array over its shards."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputError
from .sharded_array import GatheredArray, RowArray, Rows, ShardedArray
from .store import INDEX_FILE, STORAGE_DTYPES, read_run, read_settings, read_shards

if TYPE_CHECKING:
    import anndata

_NEAR = 3
_COMPARED = 2000
"""Ids that a missing one is held against for likeness, which takes about a tenth of a second."""
_ARROW_BYTES = 64 << 20
"""Most residues' embeddings in an Arrow batch, unless one protein has more."""


class Embeddings:
    """A finished store.

    `len()` counts proteins. `embeddings[i]` is protein i's vector (D,), or with pool=residue its (L, D).

    Attributes:
        ids: the first word of each header, in input order, duplicates kept.
        array: (proteins, D); with pool=residue the residues of all proteins one after another.
        offsets: int64 (proteins + 1,), with pool=residue where each protein's residues begin in `array`; else None.
        row_N: int64 (proteins,), with --dedup which of the stored embeddings is each protein's own; else None, for each
            has its own.
        run: what run.json says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = read_run(folder)
        shards = read_shards(folder, self.run)
        if not self.run["complete"]:
            done = sum(shard.rows for shard in shards)
            message = f"is not finished ({done} rows so far): run the same `protnest embed` again to go on"
            raise InputError(message, file=folder)
        settings = read_settings(folder, self.run)
        files = [folder / shard.file for shard in shards]
        self._stored = ShardedArray(files, settings["width"], STORAGE_DTYPES[settings["storage_dtype"]])
        self.array: RowArray = self._stored
        self.row_N = self._read_rows() if settings.get("dedup") else None
        self.ids: list[str] = self._read_index("id")["id"].to_pylist()
        self.offsets: npt.NDArray[np.int64] | None = None
        stored = len(self._stored)
        begin_U = None
        if settings["pool"] == "residue":
            begin_U = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._stored.lengths())])
            self.offsets = begin_U
            stored = begin_U.size - 1
        if self.row_N is not None:
            if not 0 <= self.row_N.min(initial=0) <= self.row_N.max(initial=0) <= max(0, stored - 1):
                message = f"names embeddings up to {self.row_N.max()}, but there are {stored}"
                raise InputError(message, file=folder / INDEX_FILE)
            gathered = GatheredArray(self._stored, self.row_N, begin_U)
            self.array = gathered
            self.offsets = None if begin_U is None else gathered.offsets
        elif stored != len(self.ids):
            message = f"{stored} embeddings, but the index lists {len(self.ids)} proteins"
            raise InputError(message, file=folder)
        self._places: dict[str, int] | None = None
        self._repeated: dict[str, list[int]] = {}

    def _read_index(self, *columns: str) -> pa.Table:
        path = self.folder / INDEX_FILE
        try:
            return pq.read_table(path, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            message = f"not a readable index ({error})"
            raise InputError(message, file=path) from error

    def _read_rows(self) -> npt.NDArray[np.int64]:
        rows: npt.NDArray[np.int64] = self._read_index("row")["row"].to_numpy()
        return rows

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Rows:
        if not -len(self) <= row < len(self):
            message = f"protein {row} is outside of {len(self)}"
            raise IndexError(message)
        if self.offsets is None:
            return self.array[row]
        row %= len(self)
        return self.array[int(self.offsets[row]) : int(self.offsets[row + 1])]

    def rows_of(self, protein: str) -> list[int]:
        """Places of the proteins of an id, in input order; the first call makes an index of all ids.

        Raises:
            InputError: there is none; names ids that are near.
        """
        if self._places is None:
            self._places = {}
            for place, each in enumerate(self.ids):
                first = self._places.setdefault(each, place)
                if first != place:
                    self._repeated.setdefault(each, [first]).append(place)
        if protein not in self._places:
            near = ", ".join(self._near(protein))
            message = f"holds no protein {protein!r}" + (f"; near: {near}" if near else "")
            raise InputError(message, file=self.folder)
        return list(self._repeated.get(protein, [self._places[protein]]))

    def by_id(self, protein: str) -> Rows:
        """The first embedding of an id, as `embeddings[i]` gives it.

        Raises:
            InputError: there is none; names ids that are near.
        """
        return self[self.rows_of(protein)[0]]

    def _near(self, protein: str) -> list[str]:
        wanted = protein.lower()
        ids = self._places or {}
        # `P12345` where the store says `sp|P12345|NAME`, or the other way round.
        holding = (each for each in ids if wanted and each and (wanted in each.lower() or each.lower() in wanted))
        if found := list(itertools.islice(holding, _NEAR)):
            return found
        alike = (each for each in ids if each[:2].lower() == wanted[:2])
        return difflib.get_close_matches(protein, itertools.islice(alike, _COMPARED), n=_NEAR)

    def shard_arrays(self) -> Iterator[tuple[int, Rows]]:
        """The stored embeddings, shard by shard, as read-only memory maps (n, D), each after the number of its first.

        For scans that copy nothing. With --dedup `row_N` says whose they are; with pool=residue rows are residues.
        """
        return self._stored.views()

    def to_arrow(self, *, proteins_at_once: int = 4096) -> pa.RecordBatchReader:
        """All proteins as Arrow record batches of `id` and `embedding`, made as they are asked for; read once.

        `embedding` is a fixed-size list of D numbers, with pool=residue a list of such lists. `.read_all()` gives a
        table, which holds everything in memory. A batch has at most `proteins_at_once`, and of residues so many that
        it holds 64 MB, or one protein.
        """
        vector = pa.list_(pa.from_numpy_dtype(self.array.dtype), self.array.shape[1])
        kind = vector if self.offsets is None else pa.list_(vector)
        schema = pa.schema([("id", pa.string()), ("embedding", kind)])

        def batches() -> Iterator[pa.RecordBatch]:
            most_rows = max(1, _ARROW_BYTES // (self.array.shape[1] * self.array.dtype.itemsize))
            end = 0
            while end < len(self):
                begin, end = end, min(end + proteins_at_once, len(self))
                first, last = begin, end
                if self.offsets is not None:
                    first = int(self.offsets[begin])
                    fits = int(np.searchsorted(self.offsets, first + most_rows, side="right")) - 1
                    end = max(begin + 1, min(end, fits))
                    last = int(self.offsets[end])
                rows = pa.FixedSizeListArray.from_arrays(pa.array(self.array[first:last].reshape(-1)), type=vector)
                if self.offsets is not None:
                    within = pa.array((self.offsets[begin : end + 1] - first).astype(np.int32))
                    rows = pa.ListArray.from_arrays(within, rows)
                yield pa.record_batch([pa.array(self.ids[begin:end], pa.string()), rows], schema=schema)

        return pa.RecordBatchReader.from_batches(schema, batches())

    def to_anndata(self) -> anndata.AnnData:
        """All proteins as an AnnData, X in memory.

        The names of `obs` are the ids, made unique; its columns are `id`, `header`, `length` and `flags`. `uns` has the
        run's settings under `protnest`.

        Raises:
            InputError: the store holds residues, which AnnData has no place for, or anndata is not installed.
        """
        check_anndata()
        if self.offsets is not None:
            message = "holds one embedding a residue, and AnnData takes one a protein: embed with --pool mean"
            raise InputError(message, file=self.folder)
        import anndata
        from anndata.utils import make_index_unique

        columns = self._read_index("id", "header", "length", "flags")
        frame = columns.to_pandas()
        frame.index = make_index_unique(frame.set_index("id").index.rename(None))
        settings = {name: value for name, value in self.run["settings"].items() if value is not None}
        about = {"schema_version": self.run["schema_version"], "settings": settings}
        return anndata.AnnData(X=np.asarray(self.array), obs=frame, uns={"protnest": about})


def check_anndata() -> None:
    """Raises InputError where anndata is not installed."""
    if importlib.util.find_spec("anndata") is None:
        message = "AnnData needs anndata: pip install 'protnest[anndata]'"
        raise InputError(message)


def read_embeddings(folder: str | Path) -> Embeddings:
    """Opens the folder that `protnest embed` wrote.

    Raises:
        InputError: the folder holds no finished run, or a file in it is damaged.
    """
    return Embeddings(Path(folder))
