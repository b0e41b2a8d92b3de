"""A library of mutants: a table of variants, and the wild types that they are variants of, as `score` takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from .assay import Assay, AssayOptions, Entry, fingerprint_targets, read_targets
from .errors import InputError
from .fasta import InvalidPolicy, Record, Reject
from .table import Table

_LOGGER = logging.getLogger(__name__)


class MutantSource:
    """The mutated proteins that a table of variants stands for, a row each.

    A record's id is its variant's name, `A24G:H26P`, and its header the same with the wild type's id behind it. A row
    that gives its whole sequence alone is called by its substitutions, or, with insertions or deletions, by its place,
    `row17`, from 1.

    Args:
        path: table of variants: .csv, .tsv, .parquet, or .txt with one a line.
        wild_types: FASTA, or a table with ids and sequences.
        mutant_column: column of A24G and the like.
        sequence_column: column of whole mutated sequences, for tables without the other, and for its empty cells.
        target: id of the wild type, where the table has no column `target`.
        offset: subtracted from each number in a variant's name.
        invalid: what becomes of letters outside the alphabet. Rows that fit no wild type raise under "error" and are
            rejects under "skip" and "mask".

    Attributes:
        path, invalid: as given.

    Raises:
        InputError: a file cannot be read, the table has neither column, or nothing says whose variants it holds.
    """

    def __init__(
        self,
        path: Path,
        wild_types: Path,
        *,
        mutant_column: str | None = None,
        sequence_column: str | None = None,
        target: str | None = None,
        offset: int = 0,
        invalid: InvalidPolicy = "error",
    ) -> None:
        self.path = path
        self.invalid = invalid
        table = Table(path)
        for name in (mutant_column, sequence_column):
            if name is not None:
                table.place(name)
        masked: Literal["error", "mask"] = "mask" if invalid == "mask" else "error"
        options = AssayOptions(
            mutant_column=AssayOptions.mutant_column if mutant_column is None else mutant_column,
            sequence_column=AssayOptions.sequence_column if sequence_column is None else sequence_column,
            target=target,
            offset=offset,
            invalid=masked,
        )
        self._targets = read_targets(wild_types, invalid=masked)
        self._table = table
        self._assay = Assay(table, self._targets, options)

    @property
    def settings(self) -> dict[str, Any]:
        options, target = self._assay.options, self._assay.target
        meant = list(self._targets.values()) if target is None else [target]
        return {
            "wild_type": None if target is None else target.id,
            "wild_type_fingerprint": fingerprint_targets(meant),
            "mutant_column": options.mutant_column,
            "sequence_column": options.sequence_column,
            "offset": options.offset,
        }

    def read(self, *, on_reject: Callable[[Reject], None] | None = None, quiet: bool = False) -> Iterator[Record]:
        """Yields the mutants in order; see `RecordSource`.

        Raises:
            InputError: the table cannot be read on or holds no rows, or a row is at fault under "error"; says which
                `offset` would mend it, where one would.
        """
        number, rejects = 0, 0
        for entry in self._assay.entries():
            number = entry.row.number
            if entry.problem is None:
                yield _record(entry)
                continue
            if self.invalid == "error":
                raise self._fault(entry) from entry.problem
            rejects += 1
            if on_reject is not None:
                name = self._assay.mutant(entry.row)
                on_reject(Reject(index=number - 1, id=name, reason=entry.problem.problem))
        if rejects and on_reject is None and not quiet:
            _LOGGER.warning("%s: rows left out as invalid: %d of %d", self.path, rejects, number)

    def locate(self, index: int) -> int | None:
        """The line on which a row begins; None in parquet files, and beyond the last row."""
        row = next(self._table.rows(begin=index, ragged=True), None)
        return None if row is None else row.line

    def _fault(self, entry: Entry) -> InputError:
        error = self._assay.locate(entry)
        return InputError(
            f'{error.problem}; invalid="skip" leaves the record out',
            file=error.file,
            line=error.line,
            record=error.record,
            record_id=error.record_id,
        )


def _record(entry: Entry) -> Record:
    variant, target = entry.variant, entry.target
    assert variant is not None
    assert target is not None
    # A sequence whose substitutions cannot be told has no name but its length.
    name = f"row{entry.row.number}" if variant.is_indel else variant.name
    return Record(
        index=entry.row.number - 1,
        id=name,
        header=f"{name} {target.id}",
        sequence=variant.sequence,
        flags=variant.flags or target.flags,
    )
