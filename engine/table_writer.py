"""Tables written row by row, each whole or not there at all; and what type the columns of a text file have.

A table is written under a temporary name, flushed to the disk and renamed. Text is UTF-8 with LF; .gz carries no date,
so equal rows are equal bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import replacing
from .errors import InputError

REJECT_COLUMNS = ("file", "row", "line", "target", "mutant", "reason")
_REJECT_KINDS = ("text", "integer", "integer", "text", "text", "text")

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ALLOWED = ".csv, .tsv, .csv.gz, .tsv.gz and .parquet"
_GROUP_ROWS, _GROUP_BYTES = 1 << 16, 1 << 22
"""A row group of a parquet file, which is what the writer holds back, ends when it has either."""

_ARROW_TYPES = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
# An exponent needs a decimal point or a sign: programs write 1e-05 and 1.5e5, while 1e5 may well be a name.
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-][0-9]+)?")
_EXACT_INTEGER = 1 << 53
_EXACT_DIGITS = 17


class ColumnKinds:
    """Finds out, while rows stream by, which columns of a text file are integers or numbers in every cell.

    Empty cells are missing values and tell nothing; a column of nothing else is text. In doubt a column is text:

    * "integer": every cell is spelt as `str(int)` spells it and fits into 64 bits, so that the text comes back as it
      was. `007`, `+1`, `-0` and `1,000` are text.
    * "number": every cell is such an integer of up to 2**53, or a decimal number of up to 17 digits with a decimal
      point, or an exponent with a sign, or both; finite, and not too small for float64. So `1.50` is a number, which
      comes back as `1.5`; `1e5`, `.5`, `5.`, `0,5`, `nan` and `NA` are text.

    Args:
        width: how many columns the rows have.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._seen = [False] * width
        self._possible = {place: "integer" for place in range(width)}
        self._exact = [True] * width

    def see(self, cells: Sequence[str | None]) -> None:
        """Takes one row's cells into account; None is missing as the empty text is."""
        for place, kind in [*self._possible.items()]:
            if not (cell := cells[place]):
                continue
            self._seen[place] = True
            if _INTEGER.fullmatch(cell) and len(cell) < 21:
                self._exact[place] &= abs(int(cell)) <= _EXACT_INTEGER
                fits = -(1 << 63) <= int(cell) < 1 << 63 if kind == "integer" else self._exact[place]
            else:
                self._possible[place] = "number"
                fits = self._exact[place] and _is_number(cell)
            if not fits:
                del self._possible[place]

    @property
    def kinds(self) -> tuple[str, ...]:
        """ "integer", "number" or "text" for each column, as `TableWriter` takes them."""
        found = (self._possible.get(place, "text") for place in range(self._width))
        return tuple(kind if seen else "text" for kind, seen in zip(found, self._seen, strict=True))


def _is_number(cell: str) -> bool:
    if not _NUMBER.fullmatch(cell):
        return False
    digits = re.split("[eE]", cell)[0].replace(".", "").lstrip("-0")
    value = float(cell)
    return len(digits) <= _EXACT_DIGITS and math.isfinite(value) and abs(value) >= (1e-307 if digits else 0)


def check_output(path: Path) -> None:
    """Raises InputError unless a table can be written to `path`: by its ending, and by the folder that it is to lie in.

    The folder may be missing, if it can be made. Nothing is made here.
    """
    _find_suffix(path)
    if path.is_dir():
        message = "is a folder, expected the name of a file"
        raise InputError(message, file=path)
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        message = f"cannot be written: {folder} is no folder"
        raise InputError(message, file=path)
    if not os.access(folder, os.W_OK | os.X_OK):
        message = f"cannot be written: no permission to write to {folder}"
        raise InputError(message, file=path)


def _find_suffix(path: Path) -> str:
    """The ending without .gz."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in _DELIMITERS or (suffix == ".parquet" and not name.endswith(".gz")):
        return suffix
    message = f"has an unknown ending; allowed are {_ALLOWED}"
    raise InputError(message, file=path)


class TableWriter:
    """Writes a table; use it as a context. An error within leaves nothing behind, and an older file as it was.

    In text, None and NaN are empty cells, text stays as it is, and floats take the shortest spelling that reads back as
    the same number of their type: give float32 as np.float32. In parquet files NaN of kind "number" is null too.

    Args:
        path: ends in .csv, .tsv, .csv.gz, .tsv.gz or .parquet; its folder is made if it is not there.
        columns: their names, each once.
        kinds: one a column: "text", "integer" (int64) or "number" (float64), or an Arrow type or field, which a parquet
            file keeps as it is, nullability included. `Table.kinds` copies a table's columns; `ColumnKinds` finds those
            of a text file. A cell of kind "integer" or "number" may be text, of which the empty one is null. For
            text files the kinds only tell what cannot be spelt.

    Raises:
        InputError: at the start, as `check_output` says, or a name is there twice, or a text file cannot hold a kind:
            bytes, lists and the like. From `write` on: a cell does not fit its column.
        ValueError: the numbers of columns, kinds and cells differ.
    """

    def __init__(self, path: Path, columns: Sequence[str], kinds: Sequence[Any]) -> None:
        check_output(path)
        if twice := [name for place, name in enumerate(columns) if name in columns[:place]]:
            message = f"would hold the column {twice[0]!r} twice"
            raise InputError(message, file=path)
        self.path = path
        self._schema = pa.schema([_field(name, kind) for name, kind in zip(columns, kinds, strict=True)])
        self._kinds = tuple(kinds)
        self._suffix = _find_suffix(path)
        self._held = ExitStack()
        self._sink: _Sink
        if self._suffix != ".parquet":
            for field in self._schema:
                _check_spelling(field, path)

    def __enter__(self) -> TableWriter:
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = stack.enter_context(replacing(self.path))
                self._sink = stack.enter_context(self._open_sink(temporary))
            except OSError as error:
                message = f"cannot be written: {error.strerror or error}"
                raise InputError(message, file=self.path) from error
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def _open_sink(self, temporary: Path) -> AbstractContextManager[_Sink]:
        if self._suffix == ".parquet":
            return _parquet_sink(temporary, self._schema, self._kinds)
        zipped = self.path.name.lower().endswith(".gz")
        return _text_sink(temporary, self._schema.names, _DELIMITERS[self._suffix], zipped)

    def write(self, rows: Sequence[Sequence[object]]) -> None:
        """Appends rows of one cell a column; a few hundred at once are faster than one."""
        width = len(self._schema)
        if wrong := [len(row) for row in rows if len(row) != width]:
            message = f"a row has {wrong[0]} cells, expected {width}"
            raise ValueError(message)
        try:
            self._sink.write(rows)
        except (pa.ArrowException, _CellError) as error:
            raise InputError(str(error), file=self.path) from error


class _CellError(Exception):
    """A cell that does not fit its column."""


class _Sink(Protocol):
    def write(self, rows: Sequence[Sequence[object]]) -> None: ...


def _field(name: str, kind: Any) -> Any:
    if isinstance(kind, pa.Field):
        return kind.with_name(name)
    return pa.field(name, _ARROW_TYPES[kind] if isinstance(kind, str) else kind)


def _check_spelling(field: Any, path: Path) -> None:
    kind = field.type
    try:
        pa.array([], kind).cast(pa.string())
        spelt = not (isinstance(kind, pa.BaseExtensionType) or "binary" in str(kind))
    except pa.ArrowException:
        spelt = False
    if not spelt:
        message = f"cannot hold the column {field.name!r} of type {kind}: text has no spelling for it; write .parquet"
        raise InputError(message, file=path)


@contextmanager
def _text_sink(path: Path, columns: Sequence[str], delimiter: str, zipped: bool) -> Iterator[_Sink]:
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if zipped:
            file = stack.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0))
        text = stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        sink = _TextSink(text, delimiter)
        sink.write([columns])
        yield sink


class _TextSink:
    def __init__(self, file: io.TextIOWrapper, delimiter: str) -> None:
        self._file = file
        # Python before 3.13 quotes a cell with CR or LF only if the line end holds the same.
        self._rows = csv.writer(_LineFeeds(file), delimiter=delimiter, lineterminator="\r\n")

    def write(self, rows: Sequence[Sequence[object]]) -> None:
        self._rows.writerows([_spell(cell) for cell in row] for row in rows)


class _LineFeeds:
    """Takes what csv.writer writes, a row at once, and ends it with LF in place of CRLF."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row[:-2] + "\n")


def _spell(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    if cell is None:
        return ""
    if isinstance(cell, (bool, np.bool_)):
        return "true" if cell else "false"
    if isinstance(cell, (int, np.integer)):
        return str(int(cell))
    if isinstance(cell, (float, np.floating)):
        return "" if cell != cell else str(cell)  # NaN alone differs from itself.
    if isinstance(cell, pa.Scalar):
        return cell.cast(pa.string()).as_py() or ""
    message = f"a cell of type {type(cell).__name__} has no spelling in text"
    raise _CellError(message)


@contextmanager
def _parquet_sink(path: Path, schema: Any, kinds: Sequence[Any]) -> Iterator[_Sink]:
    with pq.ParquetWriter(path, schema) as file:
        sink = _ParquetSink(file, schema, kinds)
        yield sink
        sink.flush()


class _ParquetSink:
    """Turns rows into Arrow's compact arrays at once, and holds those back until they make up a row group."""

    def __init__(self, file: Any, schema: Any, kinds: Sequence[Any]) -> None:
        self._file = file
        self._schema = schema
        self._kinds = kinds
        self._batches: list[Any] = []
        self._rows = self._bytes = 0

    def write(self, rows: Sequence[Sequence[object]]) -> None:
        if not rows:
            return
        columns = zip(*rows, strict=True)
        arrays = list(map(_array, columns, self._schema, self._kinds))
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        self._batches.append(batch)
        self._rows, self._bytes = self._rows + len(rows), self._bytes + batch.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._batches:
            self._file.write_table(pa.Table.from_batches(self._batches, self._schema), row_group_size=self._rows)
        self._batches, self._rows, self._bytes = [], 0, 0


def _array(cells: Iterable[Any], field: Any, kind: Any) -> Any:
    try:
        if kind == "integer":
            cells = [(int(cell) if cell else None) if isinstance(cell, str) else cell for cell in cells]
        elif kind == "number":
            cells = map(_parse_number, cells)
        return pa.array(list(cells), field.type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        message = f"a cell of the column {field.name!r} is no {field.type}: {error}"
        raise _CellError(message) from error


def _parse_number(cell: Any) -> Any:
    if isinstance(cell, str):
        return float(cell) if cell else None
    return None if cell != cell else cell  # NaN alone differs from itself.


class Rejects:
    """Writes the rows that were left out to a CSV file with `REJECT_COLUMNS`; use it as a context.

    The file appears when the context ends without an error, if there was a reject, and is not touched otherwise.

    Attributes:
        count: how many there were.

    Raises:
        InputError: at the start, as `check_output` says.
    """

    def __init__(self, path: Path) -> None:
        check_output(path)
        self.path = path
        self.count = 0
        self._held = ExitStack()
        self._writer: TableWriter | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def add(
        self, *, file: str | Path, row: int, line: int | None, target: str | None, mutant: str | None, reason: str
    ) -> None:
        """Adds one: its file, its row and line there as `table.Row` counts them, what was to be scored, and why not."""
        if self._writer is None:
            self._writer = self._held.enter_context(TableWriter(self.path, REJECT_COLUMNS, _REJECT_KINDS))
        self._writer.write([(str(file), row, line, target, mutant, reason)])
        self.count += 1
