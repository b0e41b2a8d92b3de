"""A shard's file, read in place: where each of its tensors lies, and these as memory maps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from .errors import InputError

_DTYPES = {"F16": "<f2", "F32": "<f4", "I64": "<i8"}
"""Those that stores have, all little-endian."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, which is not kept open.

    Attributes:
        file: in safetensors format.
        dtype: of its numbers.
        shape: rows first.
        begin: of its first byte in the file.
    """

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int

    def view(self) -> npt.NDArray[Any]:
        """A read-only memory map: nothing is read before it is looked at, and nothing is copied."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.begin, shape=self.shape)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, by name.

    Raises:
        InputError: the file is missing, truncated, no safetensors, or of a dtype that no store has.
    """
    try:
        # It checks that the header is sound, and that the tensors fill the file and no more.
        with safe_open(file, framework="np"), file.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header: dict[str, Any] = json.loads(raw.read(size))
    except (SafetensorError, OSError) as error:
        message = f"not a readable shard ({error})"
        raise InputError(message, file=file) from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        if about["dtype"] not in _DTYPES:
            message = f"not a readable shard ({name} is {about['dtype']}; expected one of {', '.join(_DTYPES)})"
            raise InputError(message, file=file)
        begin = 8 + size + about["data_offsets"][0]
        tensors[name] = Tensor(file, np.dtype(_DTYPES[about["dtype"]]), tuple(about["shape"]), begin)
    return tensors
