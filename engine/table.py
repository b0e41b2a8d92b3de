"""Tables of variants, streamed row by row in bounded memory, as often as asked.

.csv, .csv.gz    UTF-8, with a header; split at commas, see `Table`
.tsv, .tsv.gz    the same, split at tabs
.txt, .txt.gz    a plain list, one variant a line, without a header: the column `mutant`
.parquet         as it is
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from xopen import xopen

from .alphabet import AMINO_ACIDS
from .errors import InputError

TableKind = Literal["csv", "tsv", "list", "parquet"]

MAX_ROW_BYTES = 1 << 24
"""A longer line, or a row of more bytes over several lines, is an error, so that memory is bounded."""
LIST_COLUMN = "mutant"
"""The only column of a plain list."""

_KINDS: dict[str, TableKind] = {".csv": "csv", ".tsv": "tsv", ".txt": "list", ".parquet": "parquet"}
_ALLOWED = ".csv, .tsv and .txt (each also .gz) and .parquet"
_BATCH_ROWS = 1024
_CHUNK_BYTES = 1 << 18
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP_MAGIC = b"\x1f\x8b"
_SUBSTITUTION = f"[{AMINO_ACIDS}][1-9][0-9]*[{AMINO_ACIDS}]"
_VARIANT = re.compile(f"{_SUBSTITUTION}(:{_SUBSTITUTION})*")
_NAMES_SHOWN, _LETTERS_SHOWN = 20, 60


def is_table(path: Path) -> bool:
    """Whether a file's name says that it is a table with columns: .csv, .tsv or .parquet."""
    return Path(path.name.lower().removesuffix(".gz")).suffix in (".csv", ".tsv", ".parquet")


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        number: its place among the rows, from 1; header, blank lines and comments are not counted.
        line: the line of the file on which it begins, from 1; None in parquet files, which have no lines.
        cells: one a column. Of text files the text exactly as it stands (of a list without the blanks around it). Of
            parquet files None, bool, int, float, str, or np.float16 and np.float32 for columns of these; other types,
            such as dates and lists, come as a `pyarrow.Scalar`, which holds each of them exactly.
    """

    number: int
    line: int | None
    cells: tuple[Any, ...]


class Table:
    """A table on disk; nothing of it is held but its header.

    A .csv is split at commas. Only where that leaves its header a single cell, or cannot be done, are semicolons tried,
    then tabs; so a header that commas split always means commas, whatever the rows hold. Cells may be quoted with `"`
    and then hold line ends; a cell may have up to `csv.field_size_limit()` characters, 131,072 unless changed. Blank
    lines are skipped. A byte-order mark of UTF-8 is dropped. Lines end with LF, CRLF or CR.

    A .csv or .tsv whose first line is nothing but a variant (`A24G`, `A24G:H26P`, in capitals) is read as a plain list.
    In plain lists lines that start with `#` are comments.

    Attributes:
        path: the file.
        kind: "csv", "tsv", "list" or "parquet".
        columns: the names of the columns, exactly as they are spelt there.
        kinds: what `table_writer.TableWriter` needs to know to write them as they are: "text" for each, or the fields
            of the parquet file's schema.

    Args:
        path: the file; pipes will not do, since it is read several times.

    Raises:
        InputError: it is not there, is no file, cannot be read, has an unknown ending, is empty, or its header cannot
            be read or has a column without a name or a name twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.kind = _find_kind(self.path)
        _check_file(self.path)
        self.kinds: tuple[Any, ...]
        line = None
        if self.kind == "parquet":
            with _open_parquet(self.path) as file:
                self.kinds = tuple(file.schema_arrow)
            self.columns = tuple(field.name for field in self.kinds)
        else:
            self._delimiter, line, cells = self._read_header()
            if len(cells) == 1 and _VARIANT.fullmatch(cells[0].strip()):
                self.kind = "list"
            self.columns = (LIST_COLUMN,) if self.kind == "list" else tuple(cells)
            self.kinds = ("text",) * len(self.columns)
        self._check_columns(line)

    def place(self, name: str) -> int:
        """The index of a column, from 0.

        Raises:
            InputError: there is none of that name.
        """
        if name in self.columns:
            return self.columns.index(name)
        message = f"has no column {_show(name)}; it has {self.list_columns()}"
        alike = {column.strip().casefold(): column for column in self.columns}
        if near := difflib.get_close_matches(name.strip().casefold(), alike, n=1):
            message += f"; did you mean {_show(alike[near[0]])}?"
        raise InputError(message, file=self.path)

    def list_columns(self) -> str:
        """The columns' names for a message, the first twenty of them."""
        return _list_names(self.columns)

    def rows(self, *, begin: int = 0, ragged: bool = False, only: Collection[str] | None = None) -> Iterator[Row]:
        """Yields the rows in order.

        Args:
            begin: leaves out so many first rows, which count all the same.
            ragged: yields rows of more or fewer cells than the header, too, for the caller to judge.
            only: columns that are needed. Others of parquet files are not read; their cells are None.

        Raises:
            InputError: on the way: the file cannot be read on, holds no rows, or a row has more or fewer cells than the
                header; with the line.
        """
        if self.kind == "parquet":
            return self._parquet_rows(begin, self.columns if only is None else only)
        return self._text_rows(begin, ragged)

    def fingerprint(self) -> str:
        """Hash of the file's bytes: blake2b of 16 bytes, in hex.

        Raises:
            InputError: it cannot be read.
        """
        digest = hashlib.blake2b(digest_size=16)
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return digest.hexdigest()

    def _read_header(self) -> tuple[str, int, list[str]]:
        """Delimiter, line and cells of the first row; of a list, the first row itself."""
        attempts = [self._try_header(delimiter) for delimiter in (",;\t" if self.kind == "csv" else "\t")]
        best = next((found for found in attempts if isinstance(found, tuple) and len(found[2]) > 1), attempts[0])
        if isinstance(best, InputError):
            raise best
        return best

    def _try_header(self, delimiter: str) -> tuple[str, int, list[str]] | InputError:
        try:
            first = next(self._split(delimiter), None)
        except InputError as error:
            return error
        return InputError("is empty", file=self.path) if first is None else (delimiter, *first)

    def _check_columns(self, line: int | None) -> None:
        if not self.columns:
            message = "has no columns"
            raise InputError(message, file=self.path)
        if nameless := [place for place, name in enumerate(self.columns, 1) if not name.strip()]:
            message = f"column {nameless[0]} of {len(self.columns)} has no name"
            raise InputError(message, file=self.path, line=line)
        if len(set(self.columns)) < len(self.columns):
            seen: set[str] = set()
            twice = [name for name in self.columns if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
            message = f"has columns of the same name: {_list_names(tuple(dict.fromkeys(twice)))}"
            raise InputError(message, file=self.path, line=line)

    def _text_rows(self, begin: int, ragged: bool) -> Iterator[Row]:
        found = self._split(self._delimiter)
        if self.kind != "list":
            next(found, None)
        number = 0
        for number, (line, cells) in enumerate(found, 1):
            if len(cells) != len(self.columns) and not ragged:
                message = f"row {number} has {len(cells)} cells, expected {len(self.columns)} as in the header"
                raise InputError(message, file=self.path, line=line)
            if number > begin:
                yield Row(number, line, tuple(cells))
        if not number:
            raise _rowless(self.path)

    def _split(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yields the line and the cells of each row of a text file, the header's among them."""
        with _open_text(self.path) as source:
            lines = _Lines(self.path, source)
            if self.kind == "list":
                for text in lines:
                    lines.row_bytes = 0
                    if (cell := text.strip()) and not cell.startswith("#"):
                        yield lines.number, [cell]
                return
            # Without `strict` a quote that is never closed would swallow the rest of the file without a word.
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            while True:
                begin, lines.row_bytes = lines.number + 1, 0
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    told = str(error).replace("\t", "\\t")
                    message = f"the row that begins here cannot be read: {told}; is a quote left open, or astray?"
                    raise InputError(message, file=self.path, line=begin) from error
                if cells is None:
                    return
                if cells:
                    yield begin, cells

    def _parquet_rows(self, begin: int, only: Collection[str]) -> Iterator[Row]:
        with _open_parquet(self.path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if not sum(sizes):
                raise _rowless(self.path)
            number, group = 0, 0
            while group < len(sizes) and number + sizes[group] <= begin:
                number, group = number + sizes[group], group + 1
            groups = list(range(group, len(sizes)))
            wanted = [name for name in self.columns if name in only]
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=wanted) if groups else ():
                nothing = [None] * batch.num_rows
                columns = [_values(batch.column(name)) if name in only else nothing for name in self.columns]
                for cells in zip(*columns, strict=True):
                    number += 1
                    if number > begin:
                        yield Row(number, None, cells)


class _Lines:
    """The lines of a text file with their ends, checked and counted.

    Attributes:
        number: how many were given out.
        row_bytes: bytes read since a reader of rows last put this to 0.
    """

    def __init__(self, path: Path, source: BinaryIO) -> None:
        self.number = 0
        self.row_bytes = 0
        self._path = path
        self._source = source

    def __iter__(self) -> Iterator[str]:
        while raw := self._read():
            text = self._decode(raw)
            # Only LF ends a line of `readline`; CR does so too.
            alone = text.count("\r") > text.endswith(("\r", "\r\n"))
            for line in io.StringIO(text, newline="") if alone else (text,):
                self.number += 1
                yield line

    def _read(self) -> bytes:
        try:
            raw = self._source.readline(MAX_ROW_BYTES + 1)
        except EOFError as error:
            problem = "the compressed data end too early, here or after: the file is cut short or has stray bytes"
            raise self._fault(problem) from error
        except Exception as error:  # Each decompressor raises its own; isal's derives from Exception alone.
            problem = f"cannot be read on: {error}"
            raise self._fault(problem) from error
        self.row_bytes += len(raw)
        if self.row_bytes > MAX_ROW_BYTES:
            problem = f"a row of more than {MAX_ROW_BYTES:,} bytes: this is no table, or a quote was left open"
            raise self._fault(problem)
        return raw

    def _decode(self, raw: bytes) -> str:
        if self.number == 0:
            if raw.startswith(_UTF16_MARKS):
                problem = "is UTF-16 text: save it as UTF-8"
                raise self._fault(problem)
            if raw.startswith(_GZIP_MAGIC):
                problem = "is compressed: its name must end with .gz"
                raise self._fault(problem)
            raw = raw.removeprefix(_UTF8_MARK)
        if b"\0" in raw:
            problem = "holds a NUL byte: this looks like binary data or UTF-16, expected UTF-8 text"
            raise self._fault(problem)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 text (byte 0x{raw[error.start]:02X}): save it as UTF-8"
            raise self._fault(problem) from error

    def _fault(self, problem: str) -> InputError:
        return InputError(problem, file=self._path, line=self.number + 1)


@contextmanager
def _open_text(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressing it in this thread if its name ends with .gz."""
    with ExitStack() as stack:
        try:
            file: Any = stack.enter_context(path.open("rb"))
            if path.suffix.lower() == ".gz":
                magic = file.peek(len(_GZIP_MAGIC))[: len(_GZIP_MAGIC)]
                if magic and magic != _GZIP_MAGIC:
                    message = "is named .gz but holds no gzip data"
                    raise InputError(message, file=path)
                if magic:
                    file = stack.enter_context(xopen(file, "rb", threads=0, format="gz"))
                    file = io.BufferedReader(file, _CHUNK_BYTES)
        except OSError as error:
            raise _unreadable(path, error) from error
        yield file


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """Opens a parquet file, of which only the pages at hand are held."""
    try:
        with pq.ParquetFile(path, buffer_size=_CHUNK_BYTES, pre_buffer=False) as file:
            yield file
    except InputError:
        raise
    except (
        OSError,
        EOFError,
        MemoryError,
        ValueError,
        pa.ArrowException,
    ) as error:  # A wrong size asks for any memory.
        message = f"not a readable parquet file ({_shorten(' '.join(str(error).split()), 200)})"
        raise InputError(message, file=path) from error


def _values(column: Any) -> list[Any]:
    """The cells of an Arrow array, see `Row`."""
    kind = column.type
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        narrow = kind.to_pandas_dtype()
        return [None if value is None else narrow(value) for value in column.to_pylist()]
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if any(test(plain) for test in _PLAIN):
        values: list[Any] = column.to_pylist()
        return values
    return [scalar if scalar.is_valid else None for scalar in column]


_PLAIN = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_integer,
    pa.types.is_float64,
    pa.types.is_boolean,
    pa.types.is_null,
)


def _find_kind(path: Path) -> TableKind:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in _KINDS or (suffix == ".parquet" and name.endswith(".gz")):
        message = f"has an unknown ending; allowed are {_ALLOWED}"
        raise InputError(message, file=path)
    return _KINDS[suffix]


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            message = "is a folder, expected a file"
            raise InputError(message, file=path)
        path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not path.is_file():
        message = "is no plain file: a table is read several times"
        raise InputError(message, file=path)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot be opened: {error.strerror or error}", file=path)


def _rowless(path: Path) -> InputError:
    return InputError("holds no rows", file=path)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _show(name: str) -> str:
    return ascii(_shorten(name, _LETTERS_SHOWN)) if not name.isprintable() else repr(_shorten(name, _LETTERS_SHOWN))


def _list_names(names: tuple[str, ...]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(map(_show, names[:_NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")
