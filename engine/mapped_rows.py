"""Rows of a finished store by number, mapped into memory: only the pages that hold them are read.

`ShardedArray` copies ranges of rows and is right for going through a store; this is for thousands of single rows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

_DTYPES: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16}


class MappedRows:
    """Rows that lie in several safetensors files, one after another.

    Args:
        files: each holds `embeddings`, (n, D), in fp32 or fp16.

    Raises:
        InputError: a file is missing, damaged, or holds something else.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._parts = [map_tensor(file, "embeddings") for file in files]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def take(self, rows_N: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.float32]:
        """The first `width` numbers of these rows, from 0, in the order asked for: float32 (N, width)."""
        out = np.empty((rows_N.size, width), dtype=np.float32)
        order = np.argsort(rows_N, kind="stable")
        cuts = np.searchsorted(rows_N[order], self._ends)
        begin = 0
        for number, end in enumerate(cuts.tolist()):
            if end > begin:
                places = order[begin:end]
                before = self._ends[number] - len(self._parts[number])
                out[places] = self._parts[number][rows_N[places] - before, :width]
            begin = end
        return out


def map_tensor(file: Path, name: str) -> npt.NDArray[Any]:
    """A tensor of a safetensors file, mapped read-only.

    Raises:
        InputError: the file is missing, damaged, or holds no such tensor in fp32 or fp16.
    """
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            facts = json.loads(stream.read(size))[name]
        begin, end = facts["data_offsets"]
        shape = tuple(facts["shape"])
        dtype = np.dtype(_DTYPES[facts["dtype"]])
        if end - begin != dtype.itemsize * int(np.prod(shape)) or file.stat().st_size < 8 + size + end:
            message = "is shorter than its header says"
            raise InputError(message, file=file)
        return np.memmap(file, dtype=dtype, mode="r", offset=8 + size + begin, shape=shape)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError, struct.error) as error:
        message = f"not a readable shard ({type(error).__name__}: {error})"
        raise InputError(message, file=file) from error
