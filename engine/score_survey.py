"""The first reading of assays: every row is checked, and what has to be run is found.

Units of work are the touched residues of a wild type, where scores follow from those, else its distinct mutants. Wild
types of equal sequence are one protein, whatever they are called and in how many tables they stand. Of a row nothing is
kept but numbers.

Shapes: N rows of a table that can be scored.
"""

from __future__ import annotations

import hashlib
import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .assay import Assay, Entry, Target
from .errors import InputError
from .table_writer import ColumnKinds, Rejects
from .variants import SlipError, Variant, wild_type_variant

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SurveyOptions:
    """What the first reading asks of a row.

    Attributes:
        by_site: units are touched residues of the wild type; else distinct mutants.
        with_wild_type: the wild type is a unit, too, the first of its protein.
        check: raises InputError for a variant of a wild type that cannot be scored.
        on_error: "error" stops at the first row that cannot be scored; "skip" goes on without it.
        by_place: mutants of equal sequence are distinct where other sites of theirs are named.
        number_columns: columns to be read as numbers, as measurements to hold scores against; tables may lack them.
            A cell that is none is missing under "skip": which rows are scored does not depend on what is measured.
        class_columns: those of them that hold 0 or 1.
    """

    by_site: bool
    with_wild_type: bool = False
    check: Callable[[Variant, str], None] = lambda variant, wild_type: None
    on_error: Literal["error", "skip"] = "error"
    by_place: bool = False
    number_columns: tuple[str, ...] = ()
    class_columns: tuple[str, ...] = ()


@dataclass(eq=False)
class Protein:
    """A wild type, and what is to be run of it.

    Attributes:
        wild_type: its residues.
        places: touched residues, from 0, in order, where units are those.
        units: the number of each distinct mutant, by a hash of its sequence, where units are those.
        lengths: residues of each distinct mutant.
    """

    wild_type: str
    places: list[int] = field(default_factory=list)
    units: dict[bytes, int] = field(default_factory=dict)
    lengths: array[int] = field(default_factory=lambda: array("q"))

    def number(self, variant: Variant, *, by_place: bool = False) -> int:
        """The unit of a mutant; a new one where it is none yet."""
        text = f"{variant.sequence} {sorted(variant.sites)}" if by_place else variant.sequence
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        unit = self.units.setdefault(key, len(self.units))
        if unit == len(self.lengths):
            self.lengths.append(len(variant.sequence))
        return unit


@dataclass(eq=False)
class SurveyedAssay:
    """What the first reading found in a table.

    Attributes:
        assay: the table.
        accepted: for each row of the table, whether it can be scored.
        flagged: rows with letters replaced by X, in the mutant or its wild type.
        kinds: of its columns, as `TableWriter` takes them.
        target_ids: wild types that its rows name, in order of appearance.
        targets: which of them each row names, (N,).
        units: the unit of each row where units are mutants, (N,).
        singles: whether each row is a single substitution, (N,).
        numbers: of the columns that were asked for and are there, each (N,), NaN where the cell is empty or no number.
        first_problem: why the first rejected row cannot be scored.
    """

    assay: Assay
    accepted: array[int] = field(default_factory=lambda: array("b"))
    flagged: int = 0
    kinds: tuple[Any, ...] = ()
    target_ids: dict[str, int] = field(default_factory=dict)
    targets: array[int] = field(default_factory=lambda: array("i"))
    units: array[int] = field(default_factory=lambda: array("q"))
    singles: array[int] = field(default_factory=lambda: array("b"))
    numbers: dict[str, array[float]] = field(default_factory=dict)
    first_problem: InputError | None = None

    @property
    def rows(self) -> int:
        """Of the table."""
        return len(self.accepted)

    @property
    def rejected(self) -> int:
        """Rows that cannot be scored."""
        return self.rows - len(self.targets)

    def entries(self) -> Iterator[Entry]:
        """The N rows that can be scored, read again."""
        return (entry for entry, fine in zip(self.assay.entries(), self.accepted, strict=True) if fine)

    def is_single(self) -> npt.NDArray[np.bool_]:
        """bool (N,)."""
        return np.array(self.singles, dtype=bool)


@dataclass(frozen=True, eq=False)
class Survey:
    """What the first reading found in all tables.

    Attributes:
        assays: one for each table.
        proteins: by the wild type's residues, in order of appearance.
    """

    assays: list[SurveyedAssay]
    proteins: dict[str, Protein]

    @property
    def rows(self) -> int:
        return sum(assay.rows for assay in self.assays)

    @property
    def rejected(self) -> int:
        return sum(assay.rejected for assay in self.assays)


def survey_assays(assays: Sequence[Assay], options: SurveyOptions, *, rejects: Path | None = None) -> Survey:
    """Reads all tables once.

    Args:
        assays: the tables.
        options: what is asked of a row.
        rejects: where rows that cannot be scored are listed; the file is written only if there are any.

    Raises:
        InputError: a row cannot be scored under on_error="error", or none can; names file, line, row and mutant.
    """
    survey = Survey([], {})
    places: dict[str, set[int]] = {}
    with nullcontext() if rejects is None else Rejects(rejects) as listed:
        for assay in assays:
            survey.assays.append(_survey(assay, options, survey.proteins, places, listed))
    for wild_type, protein in survey.proteins.items():
        protein.places = sorted(places.get(wild_type, ()))
    return survey


def _survey(
    assay: Assay,
    options: SurveyOptions,
    proteins: dict[str, Protein],
    places: dict[str, set[int]],
    rejects: Rejects | None,
) -> SurveyedAssay:
    found = SurveyedAssay(assay)
    columns = assay.source.columns
    # Only text leaves open what a column holds; cells of a parquet file have their types.
    text = all(isinstance(kind, str) for kind in assay.source.kinds)
    kinds = ColumnKinds(len(columns))
    places_of = {name: columns.index(name) for name in options.number_columns if name in columns}
    found.numbers = {name: array("d") for name in places_of}
    hinted: set[str] = set()
    unreadable = Counter[str]()
    for entry in assay.entries():
        problem, measured = entry.problem, list[float]()
        if entry.variant is not None and entry.target is not None:
            try:
                options.check(entry.variant, entry.target.sequence)
                measured = [_measurement(entry, name, place, options, unreadable) for name, place in places_of.items()]
            except InputError as error:
                problem = error
        if problem is not None:
            entry = entry._replace(problem=problem)
            if options.on_error == "error":
                raise assay.locate(entry)
            found.accepted.append(False)
            found.first_problem = found.first_problem or assay.locate(entry)
            _reject(assay, entry, rejects, hinted)
            continue
        assert entry.target is not None
        assert entry.variant is not None
        found.accepted.append(True)
        if text:
            kinds.see(entry.row.cells)
        for numbers, value in zip(found.numbers.values(), measured, strict=True):
            numbers.append(value)
        _take(found, entry.target, entry.variant, options, proteins, places)
    found.kinds = kinds.kinds if text else assay.source.kinds
    for name, count in unreadable.items():
        _logger.warning("%s: %s is no number in %s rows: missing", assay.source.path, name, f"{count:,}")
    if found.rejected == found.rows:
        assert found.first_problem is not None
        message = f"none of its {found.rows:,} rows can be scored; the first: {found.first_problem}"
        raise InputError(message, file=assay.source.path) from found.first_problem
    return found


def _measurement(entry: Entry, column: str, place: int, options: SurveyOptions, unreadable: Counter[str]) -> float:
    cell = entry.row.cells[place]
    if cell is None or not str(cell).strip():
        return math.nan
    expected = "0 or 1" if column in options.class_columns else "a finite number"
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = math.inf
    if math.isinf(value) or (column in options.class_columns and value not in (0, 1)):
        if options.on_error == "error":
            message = f"{column} is {cell!r}, expected {expected}"
            raise InputError(message)
        unreadable[column] += 1
        return math.nan
    return value


def _reject(assay: Assay, entry: Entry, rejects: Rejects | None, hinted: set[str]) -> None:
    assert entry.problem is not None
    target = None if entry.target is None else entry.target.id
    if isinstance(entry.problem, SlipError) and target is not None and target not in hinted:
        # Once for each wild type: it reads the table's beginning.
        hinted.add(target)
        if hint := assay.hint(entry):
            _logger.warning("%s: %s%s", assay.source.path, entry.problem.problem, hint)
    if rejects is not None:
        rejects.add(
            file=assay.source.path,
            row=entry.row.number,
            line=entry.row.line,
            target=target,
            mutant=assay.mutant(entry.row),
            reason=entry.problem.problem,
        )


def _take(
    found: SurveyedAssay,
    target: Target,
    variant: Variant,
    options: SurveyOptions,
    proteins: dict[str, Protein],
    places: dict[str, set[int]],
) -> None:
    found.targets.append(found.target_ids.setdefault(target.id, len(found.target_ids)))
    found.singles.append(variant.is_single)
    found.flagged += bool(variant.flags or target.flags)
    protein = proteins.get(target.sequence)
    if protein is None:
        protein = proteins[target.sequence] = Protein(target.sequence)
        if options.with_wild_type:
            protein.number(wild_type_variant(target.sequence))
    if options.by_site:
        places.setdefault(target.sequence, set()).update(variant.sites)
    else:
        found.units.append(protein.number(variant, by_place=options.by_place))
