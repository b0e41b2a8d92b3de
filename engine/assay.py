"""An assay: a table of variants, and the proteins that they are variants of.

What a row means is settled here, once for every pass over the table: its protein by the table's column, by its file's
name or because there is only one; its variant by the column of mutants, or of whole mutated sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from .alphabet import AMINO_ACIDS
from .errors import InputError
from .fasta import InvalidPolicy, clean_sequence, read_fasta
from .table import Row, Table, is_table
from .variants import SlipError, Variant, find_offset, parse_variant, variant_of_sequence

_ID_COLUMNS = ("target", "DMS_id", "id", "name")
_SEQUENCE_COLUMNS = ("target_seq", "sequence", "wt_sequence")
# So many rows are asked which offset they would fit under; more say nothing new.
_ROWS_ASKED = 5000
_TABLE_ENDINGS = (".gz", ".csv", ".tsv", ".txt", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A wild type.

    Attributes:
        id: by which tables name it.
        sequence: its residues.
        flags: `("masked",)` where letters were replaced by X, else `()`.
    """

    id: str
    sequence: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AssayOptions:
    """How rows are read.

    Attributes:
        mutant_column: `A24G` and the like.
        sequence_column: whole mutated sequences, for tables without the one above, and for its empty cells.
        target_column: ids of wild types; a table may do without.
        target: the wild type of tables that have no such column.
        offset: subtracted from each number in a mutant's name.
        invalid: "error", or "mask", which puts X for letters that are no residues and flags the row.
    """

    mutant_column: str = "mutant"
    sequence_column: str = "mutated_sequence"
    target_column: str = "target"
    target: str | None = None
    offset: int = 0
    invalid: Literal["error", "mask"] = "error"


class Source(Protocol):
    """Where rows come from: a `Table`, or all single substitutions of proteins."""

    path: Path
    columns: tuple[str, ...]
    kinds: tuple[Any, ...]

    def rows(self, *, begin: int = 0, ragged: bool = False) -> Iterator[Row]: ...

    def fingerprint(self) -> str: ...


class Entry(NamedTuple):
    """What a row means.

    Attributes:
        row: as it stands in the table.
        target: its wild type; None where there is none of that name.
        variant: None where the row cannot be scored.
        problem: why not, else None.
    """

    row: Row
    target: Target | None
    variant: Variant | None
    problem: InputError | None


class AllSingles:
    """Every single substitution of each protein by another of the 20 amino acids, as a table of two columns.

    Gaps, `.` and `-`, are no residues: nothing takes their place.

    Args:
        targets: the proteins, in order.
        offset: added to each residue's number in the mutants' names.
        path: what messages call it.
        columns: their names, for ids of proteins and for mutants.
    """

    kinds: tuple[Any, ...] = ("text", "text")

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        offset: int = 0,
        path: Path,
        columns: tuple[str, str] = ("target", "mutant"),
    ) -> None:
        self.columns: tuple[str, ...] = columns
        self.path = path
        self._targets = targets
        self._offset = offset

    def rows(self, *, begin: int = 0, ragged: bool = False) -> Iterator[Row]:
        number = 0
        for target in self._targets:
            for place, residue in enumerate(target.sequence, start=1 + self._offset):
                for letter in AMINO_ACIDS if residue.isalpha() else "":
                    if letter == residue:
                        continue
                    number += 1
                    if number > begin:
                        yield Row(number, None, (target.id, f"{residue}{place}{letter}"))

    def fingerprint(self) -> str:
        return fingerprint_targets(self._targets)


def fingerprint_targets(targets: Sequence[Target]) -> str:
    """Hash of ids, sequences and flags, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for target in targets:
        digest.update(f"{target.id}\0{target.sequence}\0{','.join(target.flags)}\n".encode())
    return digest.hexdigest()


def read_targets(path: Path, *, invalid: Literal["error", "mask"] = "error") -> dict[str, Target]:
    """Wild types by their ids, in order: of a FASTA file, or of a table such as ProteinGym's list of assays.

    Args:
        path: FASTA, plain or .gz; or .csv, .tsv (plain or .gz) or .parquet with ids in the column `target`, `DMS_id`,
            `id` or `name`, and residues in `target_seq`, `sequence` or `wt_sequence`.
        invalid: "error", or "mask", which puts X for letters outside the alphabet.

    Raises:
        InputError: the file cannot be read, holds no protein or an id twice, or a sequence is invalid.
    """
    found: dict[str, Target] = {}
    for target, line in _table_targets(path, invalid) if is_table(path) else _fasta_targets(path, invalid):
        if target.id in found:
            message = f"holds the wild type {target.id!r} twice: which one a row means would be a guess"
            raise InputError(message, file=path, line=line)
        found[target.id] = target
    return found


def _fasta_targets(path: Path, invalid: InvalidPolicy) -> Iterator[tuple[Target, int | None]]:
    for record in read_fasta(path, invalid=invalid, quiet=True):
        yield Target(id=record.id, sequence=record.sequence, flags=record.flags), None


def _table_targets(path: Path, invalid: InvalidPolicy) -> Iterator[tuple[Target, int | None]]:
    table = Table(path)
    ids, sequences = (
        next((table.place(name) for name in names if name in table.columns), None)
        for names in (_ID_COLUMNS, _SEQUENCE_COLUMNS)
    )
    if ids is None or sequences is None:
        message = (
            f"holds no wild types: it needs a column {' or '.join(_ID_COLUMNS)} and a column "
            f"{' or '.join(_SEQUENCE_COLUMNS)}; it has {', '.join(table.columns)}"
        )
        raise InputError(message, file=path)
    for row in table.rows():
        name, text = _text(row, ids), _text(row, sequences)
        try:
            if not name:
                message = f"a wild type without an id: the cell of {table.columns[ids]} is empty"
                raise InputError(message)
            sequence = clean_sequence(text, invalid)
        except InputError as error:
            raise InputError(error.problem, file=path, line=row.line, record=row.number, record_id=name) from error
        masked = sequence.count("X") > text.upper().count("X")
        yield Target(id=name, sequence=sequence, flags=("masked",) if masked else ()), row.line


class Assay:
    """A table of variants and their wild types.

    Args:
        source: the table.
        targets: wild types by their ids.
        options: how its rows are read.

    Attributes:
        source, options: as given.
        target: the wild type of all rows, or None where a column names it row by row.

    Raises:
        InputError: the table has no column of mutants or sequences, or nothing says whose variants it holds.
    """

    def __init__(self, source: Source, targets: Mapping[str, Target], options: AssayOptions) -> None:
        self.source = source
        self.options = options
        self._targets = targets
        columns = source.columns
        self._mutants = _place(columns, options.mutant_column)
        self._sequences = _place(columns, options.sequence_column)
        self._ids = _place(columns, options.target_column)
        if self._mutants == self._sequences:
            # One column for both, as ProteinGym's tables of insertions and deletions have it: it holds sequences.
            self._mutants = None
        if self._mutants is None and self._sequences is None:
            message = (
                f"has neither a column {options.mutant_column!r} nor {options.sequence_column!r}; "
                f"it has {', '.join(columns)}"
            )
            raise InputError(message, file=source.path)
        self.target = None if self._ids is not None else self._only_target()

    def _only_target(self) -> Target:
        stem = self.source.path.name
        while stem.lower().endswith(_TABLE_ENDINGS):
            stem = stem[: stem.rindex(".")]
        name = self.options.target or (stem if stem in self._targets else None)
        if name is None and len(self._targets) == 1:
            return next(iter(self._targets.values()))
        known = ", ".join([*self._targets][:10])
        if name is None:
            message = (
                f"does not say whose variants it holds: it has no column {self.options.target_column!r}, its name is "
                f"none of the {len(self._targets)} wild types' ({known}, ...), and --target names none"
            )
            raise InputError(message, file=self.source.path)
        if name not in self._targets:
            message = f"no wild type is called {name!r}; there are {known}"
            raise InputError(message, file=self.source.path)
        return self._targets[name]

    def entries(self) -> Iterator[Entry]:
        """What each row means, in order; problems are told, not raised.

        Raises:
            InputError: the table cannot be read on.
        """
        width = len(self.source.columns)
        for row in self.source.rows(ragged=True):
            target = self.target
            try:
                if len(row.cells) != width:
                    message = f"{len(row.cells)} cells, expected {width} as in the header"
                    raise InputError(message)
                if target is None:
                    target = self._named_target(row)
                variant = self._variant(row, target.sequence)
            except InputError as error:
                yield Entry(row, target, None, error)
            else:
                yield Entry(row, target, variant, None)

    def _named_target(self, row: Row) -> Target:
        assert self._ids is not None
        name = _text(row, self._ids)
        if not name:
            message = f"names no wild type: the cell of {self.options.target_column} is empty"
            raise InputError(message)
        if name not in self._targets:
            message = f"no wild type is called {name!r}; there are {', '.join([*self._targets][:10])}"
            raise InputError(message)
        return self._targets[name]

    def _variant(self, row: Row, wild_type: str) -> Variant:
        name = _text(row, self._mutants)
        sequence = _text(row, self._sequences)
        invalid = self.options.invalid
        if not name:
            if not sequence:
                message = "names no variant: the cell is empty; the wild type itself is written WT"
                raise InputError(message)
            return variant_of_sequence(sequence, wild_type, invalid=invalid)
        variant = parse_variant(name, wild_type, offset=self.options.offset, invalid=invalid)
        if sequence:
            given = variant_of_sequence(sequence, wild_type, invalid=invalid)
            if given.sequence != variant.sequence:
                message = f"variant {name!r}: {self.options.sequence_column} holds another one, {given.name[:60]}"
                raise InputError(message)
        return variant

    def mutant(self, row: Row) -> str:
        """What the row calls its variant, for messages: its mutant, or the beginning of its sequence."""
        places = [place for place in (self._mutants, self._sequences) if place is not None and place < len(row.cells)]
        return next((text[:60] for place in places if (text := _text(row, place))), "")

    def locate(self, entry: Entry) -> InputError:
        """The problem of a row that cannot be scored, with file, line and row, and what may mend it."""
        assert entry.problem is not None
        return InputError(
            entry.problem.problem + self.hint(entry),
            file=self.source.path,
            line=entry.row.line,
            record=entry.row.number,
            record_id=self.mutant(entry.row) or None,
        )

    def hint(self, entry: Entry) -> str:
        """Which `--offset` would mend a row whose residues are counted from elsewhere; nothing where none would."""
        if not isinstance(entry.problem, SlipError) or entry.target is None:
            return ""
        names = []
        for row in self.source.rows(ragged=True):
            if len(row.cells) == len(self.source.columns) and self._is_of(row, entry.target):
                names.append(_text(row, self._mutants))
            if row.number >= _ROWS_ASKED:
                break
        offset = find_offset(names, entry.target.sequence)
        if offset is None or offset == self.options.offset:
            return ""
        return f"; with --offset {offset} all of the first {len(names):,} variants fit"

    def _is_of(self, row: Row, target: Target) -> bool:
        return self._ids is None or _text(row, self._ids) == target.id


def _place(columns: Sequence[str], name: str) -> int | None:
    return columns.index(name) if name in columns else None


def _text(row: Row, place: int | None) -> str:
    if place is None or row.cells[place] is None:
        return ""
    return str(row.cells[place]).strip()
