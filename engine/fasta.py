"""Proteins read from FASTA files, plain or .gz, streamed in bounded memory; each one kept, masked or rejected.

dnaio finds the records. Two things stand between it and the file:

* `_AsciiStream` hands it pure ASCII. dnaio decodes with the locale's encoding and refuses names that are not ASCII, so
  other bytes travel as `\\xNN` and are put back per record: headers may be UTF-8, in every locale.
* `_scan` finds line numbers, which dnaio does not count, by a second reading: after an error, or for a rejects file.

Both depend on how dnaio splits and trims lines, so they stay in this one file, long as it is.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from dnaio import FastaReader
from dnaio.exceptions import FileFormatError
from xopen import xopen

from .alphabet import AMINO_ACIDS, RESIDUES
from .errors import InputError

InvalidPolicy = Literal["error", "skip", "mask"]
"""What becomes of a sequence with letters outside the alphabet: an error, a reject, or X in their place."""

CHUNK_BYTES = 1 << 16
MAX_RECORD_BYTES = 1 << 24
"""A longer record or line is an error, so that memory is bounded. The longest protein known has 45,212 residues."""

_LOGGER = logging.getLogger(__name__)

_ALLOWED = f"allowed are {AMINO_ACIDS} and {''.join(sorted(set(RESIDUES) - set(AMINO_ACIDS)))}"
_RESIDUE_BYTES = RESIDUES.encode("ascii")
_WITHOUT_RESIDUES = dict.fromkeys(map(ord, RESIDUES))
# Only ASCII letters change case: str.upper() would turn "ß" into two serines.
_TIDY: dict[int, int | None] = {ord(letter): ord(letter.upper()) for letter in "abcdefghijklmnopqrstuvwxyz"}
_TIDY |= dict.fromkeys(map(ord, " \t\n\r\v\f"))

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP_MAGIC = b"\x1f\x8b"
_LINE_ENDS = (b"\n", b"\r")
# What str.strip(), by which dnaio trims each line, removes from ASCII text, line ends left out.
_BLANKS = b" \t\v\f\x1c\x1d\x1e\x1f"
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_BINARY = re.compile("[\x00-\x08\x0e-\x1f\x7f\udc80-\udcff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One protein of a file.

    Attributes:
        index: place among the records of the file, from 0, rejected ones counted.
        id: the header's first word; ids may repeat.
        header: the header line without its `>`.
        sequence: the residues, upper case, at least one, only letters of `alphabet.RESIDUES`.
        flags: what was done to it: `("masked",)` where letters were replaced by X, else `()`.
    """

    index: int
    id: str
    header: str
    sequence: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """One record that was left out.

    Attributes:
        index: place among the records of the file, from 0.
        id: the header's first word; empty where there is none.
        reason: why, for a person to read.
    """

    index: int
    id: str
    reason: str


class _StreamError(Exception):
    """The bytes cannot be read, or cannot be FASTA. `_scan` adds the line."""


class _RecordError(Exception):
    """A record that cannot be used; `position` is the 0-based residue at fault, where one is; `maskable`, whether an X
    there would do."""

    def __init__(self, problem: str, *, record_id: str = "", position: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.record_id = record_id
        self.position = position
        self.maskable = position is not None


def read_fasta(
    path: str | os.PathLike[str],
    *,
    invalid: InvalidPolicy = "error",
    on_reject: Callable[[Reject], None] | None = None,
    quiet: bool = False,
) -> Iterator[Record]:
    """Yield the proteins of a FASTA file, plain or .gz, in order.

    Lower case, inner spaces and tabs, and trailing `*` are accepted and cleaned away. Memory is bounded by one record.
    Lines that start with `#` are skipped; their number is logged once, at the end.

    Args:
        path: the file. A pipe works too, but it cannot be read again, so errors then name the record and no line.
        invalid: what to do with characters outside `alphabet.RESIDUES`: "error" raises, "skip" rejects the record,
            "mask" puts X for each and flags the record "masked". Empty sequences, sequences with a `>` (a header that
            does not begin its line) and headers without an id, with a NUL or not in UTF-8 raise under "error" and are
            rejects under both others.
        on_reject: called with each reject, in order. Without it their number is logged at the end.
        quiet: log nothing, for a file that was read before.

    Raises:
        ValueError: at the call, if `invalid` is unknown.
        InputError: from the first record on: the file cannot be opened or read, is not FASTA or holds no records
            (whatever `invalid` says), or a record is at fault under "error". It names the file, the line (of the
            record's header, where a record is at fault), the record and its id.
    """
    _check_policy(invalid)
    return _read(Path(path), invalid, on_reject, quiet)


def clean_sequence(sequence: str, invalid: InvalidPolicy = "error") -> str:
    """Return a protein given as a string as `read_fasta` would have read it; line ends are cleaned away like spaces.

    Raises:
        ValueError: if `invalid` is unknown.
        InputError: if the sequence is empty or, unless `invalid` is "mask", holds a character outside
            `alphabet.RESIDUES`: the message gives its position, from 1. "skip" raises too, for the caller to skip.
    """
    _check_policy(invalid)
    try:
        return _clean(sequence, mask=invalid == "mask")[0]
    except _RecordError as error:
        raise InputError(error.problem) from None


def locate_records(path: str | os.PathLike[str], indexes: Iterable[int]) -> dict[int, int]:
    """Return the line numbers, from 1, of the headers of the records with these 0-based indexes.

    Reads the file once, up to the last of them, and counts as `read_fasta` does. Indexes beyond the file's end are left
    out, and so are all of a pipe's, which cannot be read a second time. LF, CRLF and CR each end a line.

    Raises:
        InputError: if the file cannot be opened, read or is not FASTA.
    """
    path = Path(path)
    wanted = set(indexes)
    lines: dict[int, int] = {}
    if not wanted or not _can_reread(path):
        return lines
    for number, index, text in _scan(path):
        if index in wanted and text.startswith(">"):
            lines[index] = number
            if len(lines) == len(wanted):
                break
    return lines


def _check_policy(invalid: str) -> None:
    if invalid not in get_args(InvalidPolicy):
        message = f"invalid is {invalid!r}; allowed are {', '.join(map(repr, get_args(InvalidPolicy)))}"
        raise ValueError(message)


def _read(
    path: Path, invalid: InvalidPolicy, on_reject: Callable[[Reject], None] | None, quiet: bool
) -> Iterator[Record]:
    index, rejects = -1, 0
    with _open(path) as stream:
        for index, (name, sequence) in enumerate(_entries(path, stream)):
            try:
                record = _parse(index, name, sequence, mask=invalid == "mask")
            except _RecordError as error:
                if invalid == "error":
                    raise _record_fault(path, index, error) from None
                rejects += 1
                if on_reject is not None:
                    on_reject(Reject(index=index, id=error.record_id, reason=error.problem))
                continue
            yield record
    if index < 0:
        problem = "holds no records" + (", only lines that start with '#'" if stream.comments else "")
        raise InputError(problem, file=path)
    if stream.comments and not quiet:
        _LOGGER.warning("%s: lines that start with '#', skipped as comments: %d", path, stream.comments)
    if rejects and on_reject is None and not quiet:
        _LOGGER.warning("%s: records left out as invalid: %d of %d", path, rejects, index + 1)


def _entries(path: Path, stream: _AsciiStream) -> Iterator[tuple[str, str]]:
    """Yield each record's name and sequence as dnaio found them, escapes and all."""
    try:
        for entry in FastaReader(stream):
            yield entry.name, entry.sequence
    except (_StreamError, FileFormatError) as error:
        raise _file_fault(path, error) from error


def _parse(index: int, name: str, sequence: str, *, mask: bool) -> Record:
    header = _unescape(name)
    if "\0" in header:
        problem = "the header holds a NUL byte: this is no plain text"
        raise _RecordError(problem, record_id=printable(name.split(maxsplit=1)[0]))
    if header is not name and _UNDECODABLE.search(header):
        problem = "the header is not UTF-8 text"
        raise _RecordError(problem, record_id=printable(name.split(maxsplit=1)[0]))
    words = header.split(maxsplit=1)
    if not words:
        problem = "the header has no id after its '>'"
        raise _RecordError(problem)
    # A '>' in a line begins a record whose line end was lost, as when files without a last one are put together: X in
    # its place would swallow that record without a word.
    whole = ">" not in sequence
    try:
        residues, masked = _clean(_unescape(sequence), mask=mask and whole)
    except _RecordError as error:
        error.record_id = words[0]
        error.maskable = error.maskable and whole
        if not whole and error.position is not None:
            error.problem += "; a '>' inside a line: is a line end missing before it?"
        raise
    return Record(index=index, id=words[0], header=header, sequence=residues, flags=("masked",) if masked else ())


def _clean(sequence: str, *, mask: bool) -> tuple[str, bool]:
    """Return the residues, and whether any was masked."""
    # The good path: nearly all records are clean already, and one pass over the bytes proves it.
    if sequence and not sequence.encode("ascii", "replace").translate(None, _RESIDUE_BYTES):
        return sequence, False
    text = sequence.translate(_TIDY).rstrip("*")
    if not text:
        problem = "the sequence is empty"
        raise _RecordError(problem)
    strange = text.translate(_WITHOUT_RESIDUES)
    if not strange:
        return text, False
    if mask:
        return text.translate(dict.fromkeys(map(ord, strange), "X")), True
    position = text.index(strange[0])
    name = f"byte 0x{ord(strange[0]) - 0xDC00:02X}" if _UNDECODABLE.match(strange) else repr(strange[0])
    problem = f"{name} at residue {position + 1} is not a residue; {_ALLOWED}"
    raise _RecordError(problem, position=position)


def printable(text: str, limit: int = 60) -> str:
    """Return text that is safe and short enough for a message: control characters escaped, the end cut off."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def _unescape(text: str) -> str:
    """Undo `_AsciiStream`'s escapes; bytes that are not UTF-8 become lone surrogates, one each."""
    if "\\" not in text:
        return text
    return text.encode("ascii").decode("unicode_escape").encode("latin-1").decode("utf-8", "surrogateescape")


class _AsciiStream(io.BufferedIOBase):
    """A binary stream of pure ASCII over a file's bytes, as `io.TextIOWrapper` reads it.

    Bytes above 0x7F and backslashes become `\\xNN`, a UTF-8 byte-order mark at the start is dropped, comment lines are
    counted, and a record or line of more than `MAX_RECORD_BYTES` is refused before anything can pile up.
    """

    def __init__(self, source: BinaryIO, name: str) -> None:
        self.name = name
        self.comments = 0
        self._source = source
        self._started = False
        self._at_line_start = True
        self._record_bytes = 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1, /) -> bytes:
        """Return the next chunk, `CHUNK_BYTES` of the file whatever `size` says; empty at the end."""
        chunk = self._next() if self._started else self._first()
        self._started = True
        self._watch(chunk)
        if chunk.isascii() and b"\\" not in chunk:
            return chunk
        return chunk.replace(b"\\", b"\\x5c").decode("latin-1").encode("ascii", "backslashreplace")

    def _next(self, size: int | None = None) -> bytes:
        try:
            return self._source.read(CHUNK_BYTES if size is None else size)
        except EOFError as error:
            # isal drops what it has decoded of the last 512 KiB or so, hence "or after".
            problem = "the compressed data end too early, here or after: the file is cut short or has stray bytes"
            raise _StreamError(problem) from error
        except Exception as error:  # Each decompressor raises its own; isal's derives from Exception alone.
            problem = f"cannot be read on: {error}"
            raise _StreamError(problem) from error

    def _first(self) -> bytes:
        mark = self._next(len(_UTF8_MARK))
        if mark.startswith(_UTF16_MARKS):
            problem = "is UTF-16 text: save it as UTF-8"
            raise _StreamError(problem)
        return mark.removeprefix(_UTF8_MARK) + self._next()

    def _watch(self, chunk: bytes) -> None:
        if b"#" in chunk:
            self.comments += _count_lines(chunk, b"#", self._at_line_start)
        self._record_bytes += len(chunk)
        if b"\n>" in chunk or (b">" in chunk and _count_lines(chunk, b">", self._at_line_start)):
            self._record_bytes = len(chunk)
        if self._record_bytes > MAX_RECORD_BYTES:
            problem = f"more than {MAX_RECORD_BYTES:,} bytes without a new record: this is no file of proteins"
            raise _StreamError(problem)
        tail = chunk.rstrip(_BLANKS)
        self._at_line_start = tail.endswith(_LINE_ENDS) if tail else self._at_line_start


def _count_lines(chunk: bytes, mark: bytes, at_line_start: bool) -> int:
    """Return how many of the chunk's lines start with the mark, blanks before it allowed, as dnaio allows them."""
    before = [piece.rstrip(_BLANKS) for piece in chunk.split(mark)[:-1]]
    count = sum(piece.endswith(_LINE_ENDS) for piece in before)
    return count + (at_line_start and not before[0] if before else 0)


@contextmanager
def _open(path: Path) -> Iterator[_AsciiStream]:
    """Open a file, decompressing by its name's ending, or else by its first bytes, in this thread."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            source = stack.enter_context(xopen(file, "rb", threads=0))
            magic = file.peek(len(_GZIP_MAGIC))[: len(_GZIP_MAGIC)]
        except (OSError, ImportError) as error:  # ImportError: zstandard, which xopen needs for .zst, is not installed.
            problem = f"cannot be opened: {getattr(error, 'strerror', None) or error}"
            raise InputError(problem, file=path) from error
        if path.suffix == ".gz" and magic and magic != _GZIP_MAGIC:
            problem = "is named .gz but holds no gzip data"
            raise InputError(problem, file=path)
        yield _AsciiStream(source, str(path))


def _can_reread(path: Path) -> bool:
    return not (path.is_fifo() or path.is_char_device() or path.is_socket())


def _scan(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield (line from 1, record from 0, stripped line) of headers and sequence lines, as dnaio sees them."""
    number, index, header = 0, -1, ""
    with _open(path) as stream:
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="ascii"), 1):
                text = line.strip()
                if not text or text.startswith("#"):
                    continue
                if text.startswith(">"):
                    index, header = index + 1, text[1:]
                elif index < 0:
                    raise InputError(_describe_headless(text), file=path, line=number)
                yield number, index, text
        except _StreamError as error:
            words = printable(_unescape(header)).split(maxsplit=1)
            raise InputError(
                str(error), file=path, line=number + 1, record=index + 1 or None, record_id=words[0] if words else None
            ) from error


def _describe_headless(text: str) -> str:
    """Say what stands where the first header should."""
    line = _unescape(text)
    if _BINARY.search(line):
        return f"expected '>', got {line.encode('utf-8', 'surrogateescape')[:20]!r}: this looks like binary data"
    what = "this looks like FASTQ" if line.startswith("@") else "there is text before the first header"
    return f"expected '>', got '{printable(line, 40)}': {what}"


def _file_fault(path: Path, error: Exception) -> InputError:
    """Return the error of a file that cannot be read on, with the line found by a second reading."""
    if _can_reread(path):
        try:
            for _ in _scan(path):
                pass
        except InputError as located:
            return located
    return InputError(printable(str(error), 200), file=path)


def _record_fault(path: Path, index: int, error: _RecordError) -> InputError:
    """Return the error of one record, with its header's line, and the line of the residue at fault in the text."""
    line, residue_line = _find(path, index, error.position) if _can_reread(path) else (None, None)
    problem = error.problem if residue_line is None else f"on line {residue_line}, {error.problem}"
    remedy = 'invalid="skip" leaves the record out' + (', "mask" puts X instead' if error.maskable else "")
    return InputError(
        f"{problem}; {remedy}",
        file=path,
        line=line,
        record=index + 1,
        record_id=printable(error.record_id),
    )


def _find(path: Path, index: int, position: int | None) -> tuple[int | None, int | None]:
    """Return the line of a record's header, and the line that holds its residue at this position."""
    header_line = None
    for number, record, text in _scan(path):
        if record < index:
            continue
        if header_line is None:
            header_line = number
            if position is None:
                break
        elif record > index or position is None:
            break
        else:
            position -= len(text.translate(_TIDY))  # Before the fault there are no escapes.
            if position < 0:
                return header_line, number
    return header_line, None
