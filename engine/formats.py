"""Copies of a finished store in the formats that other programs read.

parquet  embeddings.parquet: id, embedding (fixed-size list; with pool=residue a list of them)
npy      embeddings.npy (n, D), in the order of index.parquet; with pool=residue all residues, and offsets.npy (n + 1,)
h5       embeddings.h5: one dataset a protein, named by its row, with the attribute `original_id`: the convention of
         bio_embeddings. Slow beyond some 100,000 proteins, as every file of that convention is.
pt       pt/<id>.pt, one file a protein: the convention of fair-esm's extract script
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import write_atomically
from .embeddings import Embeddings
from .errors import InputError

FORMATS = ("safetensors", "parquet", "h5", "npy", "pt")
_ROWS_AT_ONCE = 4096


def check_format(name: str) -> None:
    """Raises InputError if the format is unknown, or its package is not installed."""
    if name not in FORMATS:
        message = f"format is {name!r}; allowed: {', '.join(FORMATS)}"
        raise InputError(message)
    if name == "h5" and importlib.util.find_spec("h5py") is None:
        message = "format h5 needs h5py: pip install 'protnest[h5]'"
        raise InputError(message)


def convert(embeddings: Embeddings, folder: Path, name: str) -> Path:
    """Writes a store's embeddings into `folder` in another format, and returns the path of what was written.

    Raises:
        InputError: the format is unknown, or its package is not installed.
    """
    check_format(name)
    if name == "pt":
        return _write_pt(embeddings, folder / "pt")
    write = {"parquet": _write_parquet, "npy": _write_npy, "h5": _write_h5}[name]
    path = folder / f"embeddings.{name}"

    def write_one(temporary: Path) -> None:
        write(embeddings, temporary)

    write_atomically(path, write_one)
    if name == "npy" and embeddings.offsets is not None:
        write_atomically(folder / "offsets.npy", _saving(embeddings.offsets))
    return path


def _saving(array: np.ndarray) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array)

    return save


def _spans(count: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, _ROWS_AT_ONCE):
        yield begin, min(begin + _ROWS_AT_ONCE, count)


def _write_parquet(embeddings: Embeddings, path: Path) -> None:
    width = embeddings.array.shape[1]
    vector = pa.list_(pa.from_numpy_dtype(embeddings.array.dtype), width)
    offsets = embeddings.offsets
    kind = vector if offsets is None else pa.list_(vector)
    schema = pa.schema([("id", pa.string()), ("embedding", kind)])
    # Dictionaries only cost time here: no two values are alike.
    with pq.ParquetWriter(path, schema, use_dictionary=["id"]) as writer:
        for begin, end in _spans(len(embeddings)):
            first, last = (begin, end) if offsets is None else (int(offsets[begin]), int(offsets[end]))
            rows = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.array[first:last].reshape(-1)), type=vector)
            if offsets is not None:
                within = pa.array((offsets[begin : end + 1] - first).astype(np.int32))
                rows = pa.ListArray.from_arrays(within, rows)
            writer.write_table(pa.table({"id": embeddings.ids[begin:end], "embedding": rows}, schema=schema))


def _write_npy(embeddings: Embeddings, path: Path) -> None:
    array = embeddings.array
    out = np.lib.format.open_memmap(path, mode="w+", dtype=array.dtype, shape=array.shape)
    for begin, end in _spans(len(array)):
        out[begin:end] = array[begin:end]
    out.flush()


def _write_h5(embeddings: Embeddings, path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for row, name in enumerate(embeddings.ids):
            file.create_dataset(str(row), data=embeddings[row]).attrs["original_id"] = name


def _write_pt(embeddings: Embeddings, folder: Path) -> Path:
    import torch

    layer = embeddings.run["settings"].get("layer", embeddings.run["settings"]["layers"])
    key = {"mean": "mean_representations", "bos": "bos_representations", "residue": "representations"}.get(
        embeddings.run["settings"]["pool"], "max_representations"
    )
    folder.mkdir(exist_ok=True)
    seen: Counter[str] = Counter()
    for row, name in enumerate(embeddings.ids):
        stem = re.sub(r"[/\0]", "_", name)
        seen[stem] += 1
        if seen[stem] > 1:
            stem = f"{stem}.{seen[stem]}"
        content: dict[str, object] = {"label": name, key: {layer: torch.from_numpy(embeddings[row])}}

        def save(path: Path, content: dict[str, object] = content) -> None:
            torch.save(content, path)

        write_atomically(folder / f"{stem}.pt", save)
    return folder
