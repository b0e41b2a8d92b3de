"""A library in a table: proteins from the rows of a .csv, .tsv (each also .gz) or .parquet file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from .errors import InputError
from .fasta import InvalidPolicy, Record, Reject, clean_sequence, printable
from .table import Row, Table

ID_COLUMNS = ("id", "name", "accession", "entry")
SEQUENCE_COLUMNS = ("sequence", "seq", "protein_sequence")
"""Tried in this order, in whatever case, where no column is named. UniProt's tables have `Entry` and `Sequence`."""

_NOTHING = ("nan", "NaN", "None", "null", "<NA>", "N/A")
"""What programs write for no value. Some would pass for proteins."""

_LOGGER = logging.getLogger(__name__)


class TableSource:
    """Proteins from a table, a row each.

    A row's id is the whole text of its cell, without the blanks around it, and the record's header is the same. A table
    without a column of ids, where none is asked for, has its rows' numbers for ids, from 1.

    Args:
        path: the table.
        id_column: column of ids, text or whole numbers; by default the first of `ID_COLUMNS` that there is.
        sequence_column: column of residues; by default the first of `SEQUENCE_COLUMNS` that there is.
        invalid: what becomes of letters outside the alphabet. Rows without an id or a sequence, with a cell that is no
            text, or of more or fewer cells than the header raise under "error" and are rejects under "skip" and "mask".

    Attributes:
        path, invalid: as given.
        id_column, sequence_column: as they are spelt there; the first is None where rows have numbers.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """

    def __init__(
        self,
        path: Path,
        *,
        id_column: str | None = None,
        sequence_column: str | None = None,
        invalid: InvalidPolicy = "error",
    ) -> None:
        self.path = path
        self.invalid = invalid
        self._table = Table(path)
        self._check_is_no_list()
        columns = self._table.columns
        self.id_column = _find(columns, ID_COLUMNS) if id_column is None else id_column
        self._ids = None if self.id_column is None else self._table.place(self.id_column)
        found = _find(columns, SEQUENCE_COLUMNS) if sequence_column is None else sequence_column
        if found is None:
            message = (
                f"has no column of sequences, {' or '.join(SEQUENCE_COLUMNS)}; it has {self._table.list_columns()}; "
                "--seq-col names another"
            )
            raise InputError(message, file=path)
        self.sequence_column = found
        self._sequences = self._table.place(found)

    def _check_is_no_list(self) -> None:
        if self._table.kind == "list":
            message = "is a list of variants, which --wt makes proteins of; a table of proteins has a header"
            raise InputError(message, file=self.path)

    @property
    def settings(self) -> dict[str, Any]:
        return {"id_column": self.id_column, "sequence_column": self.sequence_column}

    def read(self, *, on_reject: Callable[[Reject], None] | None = None, quiet: bool = False) -> Iterator[Record]:
        """Yields the proteins in order; see `RecordSource`.

        Raises:
            InputError: the table cannot be read on or holds no rows, or a row is at fault under "error".
        """
        if self._ids is None and not quiet:
            _LOGGER.warning(
                "%s: no column %s: proteins are called by their rows' numbers; --id-col names a column",
                *(self.path, " or ".join(ID_COLUMNS)),
            )
        wanted = [name for name in (self.id_column, self.sequence_column) if name is not None]
        number, rejects = 0, 0
        for row in self._table.rows(ragged=True, only=wanted):
            number, name = row.number, ""
            try:
                self._check_cells(row)
                name = self._id(row)
                sequence, flags = self._residues(row)
            except InputError as error:
                if self.invalid == "error":
                    raise self._fault(row, name, error) from error
                rejects += 1
                if on_reject is not None:
                    on_reject(Reject(index=row.number - 1, id=name, reason=error.problem))
                continue
            yield Record(index=row.number - 1, id=name, header=name, sequence=sequence, flags=flags)
        if rejects and on_reject is None and not quiet:
            _LOGGER.warning("%s: rows left out as invalid: %d of %d", self.path, rejects, number)

    def locate(self, index: int) -> int | None:
        """The line on which a row begins; None in parquet files, and beyond the last row."""
        row = next(self._table.rows(begin=index, ragged=True), None)
        return None if row is None else row.line

    def _check_cells(self, row: Row) -> None:
        if len(row.cells) != len(self._table.columns):
            message = f"{len(row.cells)} cells, expected {len(self._table.columns)} as in the header"
            raise InputError(message)

    def _id(self, row: Row) -> str:
        if self._ids is None:
            return str(row.number)
        cell = _plain(row.cells[self._ids])
        if isinstance(cell, bool) or not isinstance(cell, str | int | None):
            raise _not_text(self.id_column, cell, "text or a whole number")
        name = "" if cell is None else str(cell).strip()
        if not name:
            message = f"the row has no id: its cell of {self.id_column!r} is empty"
            raise InputError(message)
        if any(ord(letter) < ord(" ") or letter == "\x7f" for letter in name):
            message = f"the id {ascii(name)[:60]} holds a control character"
            raise InputError(message)
        return name

    def _residues(self, row: Row) -> tuple[str, tuple[str, ...]]:
        cell = _plain(row.cells[self._sequences])
        if not isinstance(cell, str | None):
            raise _not_text(self.sequence_column, cell, "text")
        if cell is None or cell.strip() in _NOTHING:
            message = "the sequence is empty" + (f": {cell.strip()} stands for no value" if cell else "")
            raise InputError(message)
        try:
            return clean_sequence(cell), ()
        except InputError:
            # In FASTA it begins a record, which no mask may hide.
            if self.invalid != "mask" or ">" in cell:
                raise
            return clean_sequence(cell, "mask"), ("masked",)

    def _fault(self, row: Row, name: str, error: InputError) -> InputError:
        remedy = 'invalid="skip" leaves the record out'
        if "is not a residue" in error.problem:
            remedy += ', "mask" puts X instead'
        return InputError(
            f"{error.problem}; {remedy}",
            file=self.path,
            line=row.line,
            record=row.number,
            record_id=printable(name) or None,
        )


def _find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column of the first of these names that there is; one in the very case goes before others."""
    for name in names:
        alike = [column for column in columns if column.strip().casefold() == name]
        if alike:
            return name if name in alike else alike[0]
    return None


def _plain(cell: Any) -> Any:
    return cell.as_py() if isinstance(cell, pa.Scalar) else cell


def _not_text(column: str | None, cell: Any, expected: str) -> InputError:
    return InputError(f"the cell of {column!r} is {type(cell).__name__} {cell!r:.40}, expected {expected}")
