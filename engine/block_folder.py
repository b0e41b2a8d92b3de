"""A folder of blocks of embeddings, on a disk or in an object store, that many machines write and one lists.

    run.json            schema version, `engine`: "ray", resolved settings, versions, input, `complete`, its blocks
    part-NNNNN.parquet  a block's proteins: position, id, header, length, flags, embedding; its pages have checksums
    rejects.csv         record, id, reason: what `--invalid skip` or `mask` left out

With the format "lance" the proteins lie in the dataset embeddings.lance, and part-NNNNN.json names a block's fragments.

A block's name is its number, and the same records are the same block, so whoever writes it again writes the same. A
file appears under its name when it is whole, and not before. So a block is done when it is there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from .atomic import replacing
from .errors import InputError
from .run_folder import LOCK_FILE, enter_folder
from .schema_version import check_schema_version
from .store import REJECTS_FILE, RUN_FILE, SCHEMA_VERSION, is_temporary

BLOCK_FORMATS = ("parquet", "lance")
MISSING_FILE = "missing.csv"
ENGINE = "ray"
_DATASET = "embeddings.lance"
_PART = re.compile(r"part-(\d{5,})\.(parquet|json)")
_APPEAR_WHOLE = ("s3", "gcs", "abfs")
"""File systems on which a file is there once its stream is closed, and not before."""
MOST_TRIES = 3
"""Of one block. Its workers have died each time, so it is the block."""
_READERS = 16
"""Footers that are read at a time: over a network each takes a round trip."""


@dataclass(frozen=True)
class Block:
    """A finished block.

    Attributes:
        number: its place among the blocks, from 0.
        rows: proteins in it.
        size_bytes: of its file; with Lance, of the file that names its fragments.
    """

    number: int
    rows: int
    size_bytes: int


def find_place(place: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path on it that a path, or a URI such as s3://bucket/folder, names.

    Raises:
        InputError: it is a URI of a kind that pyarrow does not know, or cannot reach.
    """
    if "://" not in place:
        return fs.LocalFileSystem(), str(Path(place).absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(place)
    except (pa.ArrowException, OSError, ValueError) as error:
        message = f"cannot be opened ({str(error).splitlines()[0]}); known are paths, file://, s3://, gs://, hdfs://"
        raise InputError(message, file=place) from error
    return filesystem, path


class BlockFolder:
    """The folder. It can be sent to another process.

    Args:
        place: path or URI.
        format: "parquet" or "lance".
        filesystem: and the path on it, of the place; found where they are not given.
    """

    def __init__(
        self, place: str, format: str = "parquet", filesystem: tuple[fs.FileSystem, str] | None = None
    ) -> None:
        if format not in BLOCK_FORMATS:
            message = f"format is {format!r}; with --engine ray allowed: {', '.join(BLOCK_FORMATS)}"
            raise InputError(message)
        if format == "lance" and importlib.util.find_spec("lance") is None:
            message = "format lance needs pylance: pip install 'protnest[lance]'"
            raise InputError(message)
        self.place = place.rstrip("/") or "/"
        self.format = format
        self._fs, self._path = filesystem or find_place(place)
        self._is_local = isinstance(self._fs, fs.LocalFileSystem)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder; where it lies on a disk, keeps other runs out of it. An object store knows no locks."""
        with contextlib.ExitStack() as stack:
            if self._is_local:
                stack.enter_context(enter_folder(Path(self._path)))
            else:
                try:
                    self._fs.create_dir(self._path)
                except OSError as error:
                    message = f"cannot be written to ({error})"
                    raise InputError(message, file=self.place) from error
            yield

    def names(self) -> list[str]:
        """What lies in the folder, the lock left out."""
        found = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.base_name != LOCK_FILE)

    def read_run(self) -> dict[str, Any] | None:
        """What run.json says; None where there is none.

        Raises:
            InputError: it cannot be read, or is another engine's.
        """
        place = f"{self.place}/{RUN_FILE}"
        try:
            with self._fs.open_input_stream(self._at(RUN_FILE)) as file:
                run: dict[str, Any] = json.loads(file.read())
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            message = f"not a readable run ({error})"
            raise InputError(message, file=place) from error
        if not isinstance(run, dict) or run.get("engine") != ENGINE:
            message = "is the store of another engine: choose another --out"
            raise InputError(message, file=self.place)
        check_schema_version(run.get("schema_version"), SCHEMA_VERSION, file=place)
        return run

    def write_run(self, run: dict[str, Any]) -> None:
        """Writes run.json."""
        text = json.dumps({"schema_version": SCHEMA_VERSION, "engine": ENGINE, **run}, indent=1) + "\n"
        self.write(RUN_FILE, text.encode())

    def clear(self) -> None:
        """Removes a run's files, whatever its format, and nothing else."""
        # run.json goes first: a folder that is half cleared must not look like a run.
        names = self.names()
        for name in sorted(names, key=lambda name: name != RUN_FILE):
            if name in (RUN_FILE, REJECTS_FILE, MISSING_FILE) or _PART.fullmatch(name) or is_temporary(name):
                self._fs.delete_file(self._at(name))
        if _DATASET in names:
            self._fs.delete_dir(self._at(_DATASET))

    def tidy(self) -> None:
        """Removes what a killed run was writing."""
        for name in self.names():
            if is_temporary(name) or name == MISSING_FILE:
                self._fs.delete_file(self._at(name))

    def blocks(self) -> dict[int, Block]:
        """The blocks that are there and whole, by number. Of each the end is read."""
        ending = "parquet" if self.format == "parquet" else "json"
        parts = [match for name in self.names() if (match := _PART.fullmatch(name)) and match[2] == ending]
        with ThreadPoolExecutor(_READERS, "blocks") as readers:
            found = readers.map(lambda match: self._read_block(int(match[1]), match[0]), parts)
            return {block.number: block for block in found if block is not None}

    def _read_block(self, number: int, name: str) -> Block | None:
        try:
            with self._fs.open_input_file(self._at(name)) as file:
                size = file.size()
                if self.format == "lance":
                    return Block(number, json.loads(file.read())["rows"], size)
                return Block(number, pq.ParquetFile(file).metadata.num_rows, size)
        except (OSError, ValueError, KeyError, pa.ArrowException):
            return None  # Cut short, which only a disk does that lost what it had flushed.

    @contextlib.contextmanager
    def trying(self, number: int) -> Iterator[int]:
        """Leaves a mark while a block is under way: its worker may die, and nobody else would know how often.

        Yields:
            How many tries have died before.
        """
        tries = [self._at(f".part-{number:05d}.try{place}.tmp") for place in range(MOST_TRIES)]
        found = self._fs.get_file_info(tries)
        died = sum(info.type != fs.FileType.NotFound for info in found)
        if died < MOST_TRIES:
            with self._fs.open_output_stream(tries[died]):
                pass
        yield died
        for path in tries[: min(died + 1, MOST_TRIES)]:
            with contextlib.suppress(FileNotFoundError):
                self._fs.delete_file(path)

    def write_block(self, number: int, table: pa.Table) -> Block:
        """Writes a block."""
        if self.format == "lance":
            return self._write_fragments(number, table)
        sink = pa.BufferOutputStream()
        # Dictionaries only cost time here: no two values are alike.
        pq.write_table(table, sink, use_dictionary=False, write_page_checksum=True)
        content = sink.getvalue()
        self.write(f"part-{number:05d}.parquet", content)
        return Block(number, table.num_rows, content.size)

    def _write_fragments(self, number: int, table: pa.Table) -> Block:
        from lance.fragment import write_fragments

        # A killed worker's fragments stay behind, but no one names them.
        fragments = write_fragments(table, self.dataset, schema=table.schema, mode="append")
        content = {"rows": table.num_rows, "fragments": [fragment.to_json() for fragment in fragments]}
        text = json.dumps(content).encode()
        self.write(f"part-{number:05d}.json", text)
        return Block(number, table.num_rows, len(text))

    @property
    def dataset(self) -> str:
        """Of Lance."""
        return f"{self._path if self._is_local else self.place}/{_DATASET}"

    def finish(self, numbers: list[int], schema: pa.Schema) -> int:
        """Makes one dataset of the blocks, where the format is one, and counts ids that repeat.

        Returns:
            How many rows carry an id that an earlier row carries too.
        """
        if self.format == "lance":
            ids = self._commit(numbers, schema)
        else:
            parts = [self._at(f"part-{number:05d}.parquet") for number in numbers]
            ids = pa.chunked_array(
                [pq.read_table(part, columns=["id"], filesystem=self._fs)["id"].combine_chunks() for part in parts],
                pa.string(),
            )
        return len(ids) - int(pc.count_distinct(ids).as_py())

    def _commit(self, numbers: list[int], schema: pa.Schema) -> pa.ChunkedArray:
        import lance

        fragments = []
        for number in numbers:
            with self._fs.open_input_stream(self._at(f"part-{number:05d}.json")) as file:
                listed = json.loads(file.read())["fragments"]
            fragments += [lance.FragmentMetadata.from_json(json.dumps(fragment)) for fragment in listed]
        dataset = lance.LanceDataset.commit(self.dataset, lance.LanceOperation.Overwrite(schema, fragments))
        return dataset.to_table(columns=["id"])["id"]

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Writes a file that is there as a whole or not at all."""
        if self._is_local:
            with replacing(Path(self._at(name)), unique=True) as whole:
                whole.write_bytes(content)
            return
        path = self._at(name)
        if self._fs.type_name in _APPEAR_WHOLE:
            with self._fs.open_output_stream(path) as file:
                file.write(content)
            return
        temporary = self._at(f".{name}.{uuid.uuid4().hex}.tmp")
        with self._fs.open_output_stream(temporary) as file:
            file.write(content)
        self._fs.move(temporary, path)

    def _at(self, name: str) -> str:
        return os.fspath(PurePosixPath(self._path) / name)
