"""Rows that lie in several files, or that several of the reader's rows share, as one array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .shard_file import read_tensors

Rows = npt.NDArray[Any]
Places = npt.NDArray[np.int64]

_OPEN_AT_ONCE = 32
"""Files kept mapped for the next look: each holds a file descriptor, of which a process often has 1,024."""


class RowArray(ABC):
    """Rows of which only what is asked for is read.

    `array[i]`, `array[a:b:c]`, `array[[3, 1, 4]]` and `np.asarray(array)` work as on an ndarray's first axis.

    Attributes:
        shape: (rows, D).
        dtype: as stored.
    """

    ndim = 2
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    @abstractmethod
    def _range(self, begin: int, end: int) -> Rows:
        """Rows `begin` to `end`, copied; none where `end` is not beyond `begin`."""

    @abstractmethod
    def _rows(self, rows: Places) -> Rows:
        """The rows at some places, all inside."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | Rows) -> Rows:
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            return self._range(begin, end) if step == 1 else self._rows(np.arange(begin, end, step))
        if isinstance(key, tuple):
            message = "rows are chosen first, numbers of them then: array[3][:5], not array[3, :5]"
            raise IndexError(message)
        rows = np.asarray(key)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                message = f"a mask over {len(self)} rows needs that length, got shape {rows.shape}"
                raise IndexError(message)
            rows = np.flatnonzero(rows)
        elif rows.size and not np.issubdtype(rows.dtype, np.integer):
            message = f"rows are chosen by whole numbers, a slice or a mask, got {rows.dtype}"
            raise IndexError(message)
        outside = (rows < -len(self)) | (rows >= len(self))
        if outside.any():
            message = f"row {rows[outside].reshape(-1)[0]} is outside of {len(self)} rows"
            raise IndexError(message)
        if rows.ndim == 0:
            row = int(rows) % len(self)
            only: Rows = self._range(row, row + 1)[0]
            return only
        return self._rows(rows.astype(np.int64) % max(1, len(self)))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Rows:
        if copy is False:
            message = "rows lie in several files: an array of them is always a copy"
            raise ValueError(message)
        whole = self._range(0, len(self))
        return whole if dtype is None else whole.astype(dtype, copy=False)


class ShardedArray(RowArray):
    """Rows that lie in several files, as one array.

    Args:
        files: safetensors files that hold `embeddings`, each (n, width) of one dtype.
        width: D.
        dtype: of all of them.

    Raises:
        InputError: a file is damaged, or holds no such tensor.
    """

    def __init__(self, files: Sequence[Path], width: int, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._parts = [read_tensors(file) for file in files]
        for file, part in zip(files, self._parts, strict=True):
            held = part.get("embeddings")
            if held is None or held.shape[1:] != (width,) or held.dtype != self.dtype:
                got = "none" if held is None else f"{held.dtype} {held.shape}"
                message = f"embeddings of dtype {self.dtype} and shape (n, {width}) expected, got {got}"
                raise InputError(message, file=file)
        counts = [part["embeddings"].shape[0] for part in self._parts]
        self._begins = np.cumsum([0, *counts], dtype=np.int64)
        self.shape = (int(self._begins[-1]), width)
        self._view = lru_cache(maxsize=_OPEN_AT_ONCE)(lambda number: self._parts[number]["embeddings"].view())

    def lengths(self) -> Places:
        """With pool=residue, how many rows each protein has."""
        empty = np.empty(0, np.int64)
        return np.concatenate([empty, *(np.diff(part["offsets"].view()) for part in self._parts)])

    def views(self) -> Iterator[tuple[int, Rows]]:
        """Each file's rows as a read-only memory map (n, D), after the number of the first of them."""
        for begin, part in zip(self._begins.tolist(), self._parts, strict=False):
            yield begin, part["embeddings"].view()

    def _range(self, begin: int, end: int) -> Rows:
        out = np.empty((max(0, end - begin), self.shape[1]), dtype=self.dtype)
        number = int(np.searchsorted(self._begins, begin, side="right")) - 1
        filled = 0
        while filled < len(out):
            before = int(self._begins[number])
            part = self._view(number)[begin + filled - before : end - before]
            out[filled : filled + len(part)] = part
            filled += len(part)
            number += 1
        return out

    def _rows(self, rows: Places) -> Rows:
        flat = rows.reshape(-1)
        out = np.empty((flat.size, self.shape[1]), dtype=self.dtype)
        # In the order in which they lie: each file is mapped once, and memory is gone through forward.
        order = np.argsort(flat, kind="stable")
        cuts = np.searchsorted(flat[order], self._begins)
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            chosen = order[cuts[number] : cuts[number + 1]]
            # Of the plain array: a memory map's own way to choose rows takes four times as long.
            out[chosen] = np.asarray(self._view(number)).take(flat[chosen] - self._begins[number], axis=0)
        return out.reshape(*rows.shape, self.shape[1])


class GatheredArray(RowArray):
    """Stored embeddings in the order of the records, of which several may share one.

    Args:
        stored: what is on the disk.
        row_N: int64 (records,), which embedding is each record's own.
        begin_U: int64 (embeddings + 1,), where each embedding's rows begin in `stored`; None for one row each.
    """

    def __init__(self, stored: ShardedArray, row_N: Places, begin_U: Places | None = None) -> None:
        self._stored = stored
        self._first_N = row_N if begin_U is None else begin_U[row_N]
        lengths = np.ones(len(row_N), np.int64) if begin_U is None else np.diff(begin_U)[row_N]
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._is_pooled = begin_U is None
        self.dtype = stored.dtype
        self.shape = (int(self.offsets[-1]), stored.shape[1])

    def _range(self, begin: int, end: int) -> Rows:
        return self._rows(np.arange(begin, end))

    def _rows(self, rows: Places) -> Rows:
        if self._is_pooled:
            return self._stored[self._first_N[rows]]
        record = np.searchsorted(self.offsets, rows, side="right") - 1
        return self._stored[self._first_N[record] + rows - self.offsets[record]]
