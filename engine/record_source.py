"""Where a library's proteins come from: something that can be read as often as asked, in the same order each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .errors import InputError
from .fasta import InvalidPolicy, Record, Reject, locate_records, printable, read_fasta


class RecordSource(Protocol):
    """A file of proteins, of whatever kind. It can be sent to another process."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def invalid(self) -> InvalidPolicy:
        """What becomes of letters outside the alphabet."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the proteins beside the file's contents and `invalid`, for run.json; {} for nothing."""
        ...

    def read(self, *, on_reject: Callable[[Reject], None] | None = None, quiet: bool = False) -> Iterator[Record]:
        """Yields the proteins in order; `on_reject` is called with each that is left out, `quiet` logs nothing.

        Raises:
            InputError: the file or a record is at fault; names file, line and record.
        """
        ...

    def locate(self, index: int) -> int | None:
        """The line, from 1, on which the record of this index begins; None where the file has no lines."""
        ...


@dataclass(frozen=True)
class FastaSource:
    """A FASTA file, plain or .gz."""

    path: Path
    invalid: InvalidPolicy = "error"

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def read(self, *, on_reject: Callable[[Reject], None] | None = None, quiet: bool = False) -> Iterator[Record]:
        return read_fasta(self.path, invalid=self.invalid, on_reject=on_reject, quiet=quiet)

    def locate(self, index: int) -> int | None:
        return locate_records(self.path, [index]).get(index)


def locate_error(source: RecordSource, record: Record, problem: str) -> InputError:
    """The error that names where in its file a record stands."""
    line = source.locate(record.index)
    record_id = printable(record.id)
    return InputError(problem, file=source.path, line=line, record=record.index + 1, record_id=record_id)


def check_rereadable(path: Path) -> None:
    """Raises InputError for a pipe or a device, which cannot be read a second time."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        message = "is a pipe or a device; a library is read twice, so it has to be a file"
        raise InputError(message, file=path)
