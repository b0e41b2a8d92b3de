"""Copies of a finished store in the formats that other programs read.

parquet  embeddings.parquet: id, embedding (fixed-size list; with pool=residue a list of them)
npy      embeddings.npy (n, D), in the order of index.parquet; with pool=residue all residues, and offsets.npy (n + 1,)
h5       embeddings.h5: one dataset a protein, named by its row, with the attribute `original_id`: the convention of
         bio_embeddings. Slow beyond some 100,000 proteins, as every file of that convention is.
pt       pt/<id>.pt, one file a protein: the convention of fair-esm's extract script
h5ad     embeddings.h5ad: AnnData, as `Embeddings.to_anndata` makes it, in memory. One embedding a protein.
csv      embeddings.csv: id, then e0 to e(D-1), each number as short as reads back the same. One embedding a protein.

With --dedup each protein has its own copy, as readers of these formats expect.
"""

from __future__ import annotations

import csv
import errno
import importlib.util
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from .atomic import naming, write_atomically
from .embeddings import Embeddings, check_anndata
from .errors import InputError

FORMATS = ("safetensors", "parquet", "h5", "npy", "pt", "h5ad", "csv")
POOLED_ONLY = ("h5ad", "csv")
_ROWS_AT_ONCE = 4096
_H5_BYTES = 1024
"""That HDF5 takes for a dataset and its attribute, beside the numbers, at least."""

Follower = Callable[[int, int], None]
"""Is told `(done, total)`, in proteins, or rows of the array."""


def check_format(name: str) -> None:
    """Raises InputError if the format is unknown, or its package is not installed."""
    if name not in FORMATS:
        message = f"format is {name!r}; allowed: {', '.join(FORMATS)}"
        raise InputError(message)
    if name == "h5" and importlib.util.find_spec("h5py") is None:
        message = "format h5 needs h5py: pip install 'protnest[h5]'"
        raise InputError(message)
    if name == "h5ad":
        check_anndata()


def default_path(folder: Path, name: str) -> Path:
    """Where a store's copy lies unless someone says otherwise."""
    return folder / ("pt" if name == "pt" else f"embeddings.{name}")


def convert(
    embeddings: Embeddings, folder: Path, name: str, *, path: Path | None = None, follow: Follower | None = None
) -> Path:
    """Writes a store's embeddings in another format, atomically, and returns the path of what was written.

    Args:
        embeddings: the store.
        folder: gets the copy under its usual name, whatever lies there.
        name: of the format.
        path: the file, or with "pt" the folder, instead.
        follow: is told how far it is.

    Raises:
        InputError: the format is unknown, its package is not installed, or it has no place for residues.
    """
    check_format(name)
    if embeddings.offsets is not None and name in POOLED_ONLY:
        others = ", ".join(each for each in FORMATS if each not in (*POOLED_ONLY, "safetensors"))
        message = f"holds one embedding a residue, and {name} takes one a protein; these take both: {others}"
        raise InputError(message, file=embeddings.folder)
    follow = follow or (lambda done, total: None)
    path = (path or default_path(folder, name)).absolute()
    if not path.name:
        message = "is no name for a copy: choose another --out"
        raise InputError(message, file=path)
    if name == "pt":
        return _write_pt(embeddings, path, follow)
    writers = {"parquet": _write_parquet, "npy": _write_npy, "h5": _write_h5, "h5ad": _write_h5ad, "csv": _write_csv}
    write = writers[name]
    if name == "npy" and embeddings.offsets is not None:
        write_atomically(offsets_path(path), _saving(embeddings.offsets))
    write_atomically(path, lambda temporary: write(embeddings, temporary, follow))
    return path


def offsets_path(path: Path) -> Path:
    """Beside an npy file of residues, the one that says where each protein's begin."""
    return path.with_name("offsets.npy" if path.name == "embeddings.npy" else f"{path.stem}.offsets.npy")


def _saving(array: np.ndarray) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array)

    return save


def _spans(count: int, follow: Follower) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, count)
        yield begin, end
        follow(end, count)


def _write_parquet(embeddings: Embeddings, path: Path, follow: Follower) -> None:
    batches = embeddings.to_arrow(proteins_at_once=_ROWS_AT_ONCE)
    # Dictionaries only cost time here: no two values are alike.
    with pq.ParquetWriter(path, batches.schema, use_dictionary=["id"]) as writer:
        done = 0
        for batch in batches:
            writer.write_batch(batch)
            done += len(batch)
            follow(done, len(embeddings))


def _write_npy(embeddings: Embeddings, path: Path, follow: Follower) -> None:
    array = embeddings.array
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for begin, end in _spans(len(array), follow):
            file.write(np.ascontiguousarray(array[begin:end]).data)


def _write_h5(embeddings: Embeddings, path: Path, follow: Follower) -> None:
    import h5py

    # HDF5 finds out as it closes the file, and takes the process with it.
    _check_space(path, _size_bytes(embeddings) + _H5_BYTES * len(embeddings))
    with h5py.File(path, "w") as file:
        for row, name in enumerate(embeddings.ids):
            file.create_dataset(str(row), data=embeddings[row]).attrs["original_id"] = name
            follow(row + 1, len(embeddings))


def _write_h5ad(embeddings: Embeddings, path: Path, follow: Follower) -> None:
    _check_space(path, _size_bytes(embeddings))
    embeddings.to_anndata().write_h5ad(path)
    follow(len(embeddings), len(embeddings))


def _write_csv(embeddings: Embeddings, path: Path, follow: Follower) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", *(f"e{place}" for place in range(embeddings.array.shape[1]))])
        for begin, end in _spans(len(embeddings), follow):
            # `str` of a numpy number is the shortest text that reads back as the same one.
            texts = embeddings.array[begin:end].astype(str).tolist()
            table.writerows([name, *row] for name, row in zip(embeddings.ids[begin:end], texts, strict=True))


def _write_pt(embeddings: Embeddings, folder: Path, follow: Follower) -> Path:
    import torch

    stems = _stems(embeddings.ids)
    _check_folder(folder, {f"{stem}.pt" for stem in stems})
    layer = embeddings.run["settings"].get("layer", embeddings.run["settings"]["layers"])
    key = {"mean": "mean_representations", "bos": "bos_representations", "residue": "representations"}.get(
        embeddings.run["settings"]["pool"], "max_representations"
    )
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for row, (name, stem) in enumerate(zip(embeddings.ids, stems, strict=True)):
            path = temporary / f"{stem}.pt"
            with naming(folder), path.open("wb") as file:
                # A copy: `embeddings[row]` may be a view of more, all of which torch would write.
                torch.save({"label": name, key: {layer: torch.from_numpy(embeddings[row].copy())}}, file)
                file.flush()
                os.fsync(file.fileno())
            follow(row + 1, len(embeddings))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _stems(names: Sequence[str]) -> list[str]:
    """For each protein a name that a file can have, and no other protein's has."""
    taken: set[str] = set()
    seen: Counter[str] = Counter()
    stems = []
    for name in names:
        # The longest that file systems allow is 255 bytes.
        stem = base = re.sub(r"[/\0]", "_", name).encode()[:240].decode(errors="ignore")
        while stem in taken or not stem.strip("."):
            seen[base] += 1
            stem = f"{base}.{seen[base] + 1}"
        taken.add(stem)
        stems.append(stem)
    return stems


def _check_folder(folder: Path, names: set[str]) -> None:
    """Raises InputError for a folder, to be replaced, that is none, or holds anything but files of these names."""
    if not folder.exists():
        return
    if not folder.is_dir():
        message = "is a file; .pt files are written into a folder"
        raise InputError(message, file=folder)
    if foreign := sorted(each.name for each in folder.iterdir() if each.name not in names):
        message = f"holds other things than this store's .pt files ({', '.join(foreign[:3])}): choose another folder"
        raise InputError(message, file=folder)


def _size_bytes(embeddings: Embeddings) -> int:
    return math.prod(embeddings.array.shape) * embeddings.array.dtype.itemsize


def _check_space(path: Path, size_bytes: int) -> None:
    """Raises OSError where a file of that size does not fit."""
    if shutil.disk_usage(path.parent).free < size_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
