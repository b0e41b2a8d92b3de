"""Reading a finished store: ids, and embeddings as one array over its shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from .errors import InputError
from .store import INDEX_FILE, Shard, read_run

Rows = npt.NDArray[Any]


class ShardedArray:
    """Rows that lie in several files, as one array; only what is asked for is read.

    `array[i]`, `array[a:b:c]`, `array[[3, 1, 4]]` and `np.asarray(array)` work as on an ndarray's first axis.

    Args:
        files: safetensors files that hold `embeddings`, each (n, D) of one dtype.

    Attributes:
        shape: (rows, D).
        dtype: as stored.
    """

    ndim = 2

    def __init__(self, files: Sequence[Path], width: int) -> None:
        self._parts = [_open(file) for file in files]
        self._slices = [part.get_slice("embeddings") for part in self._parts]
        shapes = [tuple(part.get_shape()) for part in self._slices]
        self._ends = np.cumsum([shape[0] for shape in shapes], dtype=np.int64)
        self.shape = (int(self._ends[-1]) if shapes else 0, shapes[0][1] if shapes else width)
        self.dtype: np.dtype[Any] = self._slices[0][:0].dtype if shapes else np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | Rows) -> Rows:
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            return self._range(begin, end) if step == 1 else self._rows(np.arange(begin, end, step))
        rows = np.asarray(key)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                message = f"a mask over {len(self)} rows needs that length, got shape {rows.shape}"
                raise IndexError(message)
            rows = np.flatnonzero(rows)
        if outside := [row for row in np.atleast_1d(rows).tolist() if not -len(self) <= row < len(self)]:
            message = f"row {outside[0]} is outside of {len(self)} rows"
            raise IndexError(message)
        if rows.ndim == 0:
            row = int(rows) % len(self)
            only: Rows = self._range(row, row + 1)[0]
            return only
        return self._rows(rows % max(1, len(self)))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Rows:
        if copy is False:
            message = "rows lie in several files: an array of them is always a copy"
            raise ValueError(message)
        whole = self._range(0, len(self))
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _range(self, begin: int, end: int) -> Rows:
        out = np.empty((max(0, end - begin), self.shape[1]), dtype=self.dtype)
        first = int(np.searchsorted(self._ends, begin, side="right"))
        filled = 0
        while filled < len(out):
            before = int(self._ends[first - 1]) if first else 0
            part = self._slices[first][begin + filled - before : min(end, int(self._ends[first])) - before]
            out[filled : filled + len(part)] = part
            filled += len(part)
            first += 1
        return out

    def _rows(self, rows: npt.NDArray[np.int64]) -> Rows:
        out = np.empty((rows.size, self.shape[1]), dtype=self.dtype)
        for place, row in enumerate(rows.tolist()):
            out[place] = self._range(row, row + 1)[0]
        return out


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        message = f"not a readable shard ({error})"
        raise InputError(message, file=file) from error


class Embeddings:
    """A finished store.

    `len()` counts proteins. `embeddings[i]` is protein i's vector (D,), or with pool=residue its (L, D).

    Attributes:
        ids: the first word of each header, in input order, duplicates kept.
        array: (proteins, D); with pool=residue the residues of all proteins one after another.
        offsets: int64 (proteins + 1,), with pool=residue where each protein's residues begin in `array`; else None.
        run: what run.json says.
    """

    def __init__(self, folder: Path) -> None:
        self.run = read_run(folder)
        if not self.run["complete"]:
            done = sum(shard["rows"] for shard in self.run["shards"])
            message = f"is not finished ({done} rows so far): run the same `protnest embed` again to go on"
            raise InputError(message, file=folder)
        files = [folder / Shard(**shard).file for shard in self.run["shards"]]
        self.array = ShardedArray(files, self.run["settings"]["width"])
        self.ids: list[str] = pq.read_table(folder / INDEX_FILE, columns=["id"])["id"].to_pylist()
        self.offsets: npt.NDArray[np.int64] | None = None
        if self.run["settings"]["pool"] == "residue":
            lengths = [np.diff(_open(file).get_tensor("offsets")) for file in files]
            self.offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        proteins = len(self.array) if self.offsets is None else self.offsets.size - 1
        if proteins != len(self.ids):
            message = f"{proteins} embeddings, but the index lists {len(self.ids)} proteins"
            raise InputError(message, file=folder)

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


def read_embeddings(folder: str | Path) -> Embeddings:
    """Opens the folder that `protnest embed` wrote.

    Raises:
        InputError: the folder holds no finished run, or a file in it is damaged.
    """
    return Embeddings(Path(folder))
