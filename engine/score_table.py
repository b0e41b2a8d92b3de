"""The last reading of a table: each row's score is looked up in what was run, and written beside the row's own cells.

Shapes: N rows of a table that can be scored, n of them at a time, M models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .assay import Entry, Source
from .errors import InputError
from .score_run import RunResult
from .score_survey import Survey, SurveyedAssay
from .scoring import aggregate_scores, marginals
from .table_writer import TableWriter

Scores = npt.NDArray[np.float32]

FLAGS_COLUMN = "flags"
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class ScoreColumns:
    """What is added to a table.

    Attributes:
        score: the column of scores.
        models: with several models, each one's scores are kept in a column of its own, named after it.
        aggregate: how their scores become one.
        flags: whether there is a column that says which rows hold letters replaced by X.
    """

    score: str = "score"
    models: tuple[str, ...] = ()
    aggregate: str = "mean"
    flags: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the added columns, in order."""
        each = tuple(f"{self.score}_{name}" for name in self.models) if len(self.models) > 1 else ()
        return (self.score, *each, *((FLAGS_COLUMN,) if self.flags else ()))

    def check(self, source: Source) -> None:
        """Raises InputError where a table has such a column, or two models would share one."""
        if not self.score.strip():
            message = "the column of scores needs a name"
            raise InputError(message)
        if taken := [name for name in self.names if name in source.columns]:
            mend = "rename it" if taken[0] == FLAGS_COLUMN else "--score-col gives ours another name"
            message = f"has a column {taken[0]!r} of its own; {mend}"
            raise InputError(message, file=source.path)
        if twice := [name for place, name in enumerate(self.names) if name in self.names[:place]]:
            shown = f"models of one name ({', '.join(self.models)})" if self.score not in twice else "scores and flags"
            message = f"{shown} would share the column {twice[0]!r}"
            raise InputError(message)

    def check_output(self, surveyed: SurveyedAssay, out: Path) -> None:
        """Raises InputError where a table cannot be written to a file of that kind."""
        TableWriter(out, *self.layout(surveyed))

    def layout(self, surveyed: SurveyedAssay) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Names and kinds of all columns of a table with its scores."""
        added: list[Any] = [pa.float32()] * (len(self.names) - self.flags) + ["text"] * self.flags
        return (*surveyed.assay.source.columns, *self.names), (*surveyed.kinds, *added)


def look_up(
    survey: Survey, surveyed: SurveyedAssay, result: RunResult, *, by_site: bool, against_wild_type: bool
) -> Iterator[tuple[list[Entry], npt.NDArray[np.float64]]]:
    """The rows of a table that can be scored, some at a time, with their scores under each model: float64 (M, n)."""
    entries = surveyed.entries()
    begin = 0
    while some := list(islice(entries, _ROWS_AT_ONCE)):
        scores = np.empty((len(next(iter(result.values.values()))), len(some)))
        rows_of: dict[str, list[int]] = {}
        for row, entry in enumerate(some):
            assert entry.target is not None
            rows_of.setdefault(entry.target.sequence, []).append(row)
        for wild_type, rows in rows_of.items():
            for model, values in enumerate(result.values[wild_type]):
                if by_site:
                    variants = [variant for row in rows if (variant := some[row].variant) is not None]
                    found = marginals(variants, wild_type, survey.proteins[wild_type].places, values)
                else:
                    units = np.array([surveyed.units[begin + row] for row in rows])
                    found = values[units] - (values[0] if against_wild_type else 0.0)
                scores[model, rows] = found
        _check_finite(surveyed, some, scores)
        yield some, scores
        begin += len(some)


def _check_finite(surveyed: SurveyedAssay, entries: Sequence[Entry], scores_Mn: npt.NDArray[np.float64]) -> None:
    finite_n = np.isfinite(scores_Mn).all(axis=0)
    if finite_n.all():
        return
    row = entries[int(finite_n.argmin())].row
    message = "the score is not finite: fp16 ends at 65,504; take --precision bf16 or fp32"
    raise InputError(message, file=surveyed.assay.source.path, line=row.line, record=row.number)


def write_scores(
    surveyed: SurveyedAssay,
    found: Iterator[tuple[list[Entry], npt.NDArray[np.float64]]],
    columns: ScoreColumns,
    out: Path | None,
    *,
    after_rows: Callable[[list[Entry], Scores], None] = lambda entries, scores: None,
) -> Scores:
    """Writes a table with its scores, whole or not at all.

    Args:
        surveyed: the table.
        found: what `look_up` gives.
        columns: what is added.
        out: .csv, .tsv (plain or .gz) or .parquet; None writes nothing.
        after_rows: called with some rows and their scores, in order.

    Returns:
        float32 (N,), in the table's order.
    """
    parts = [np.empty(0, dtype=np.float32)]
    with nullcontext() if out is None else TableWriter(out, *columns.layout(surveyed)) as table:
        for entries, scores_Mn in found:
            scores_n = aggregate_scores(scores_Mn, columns.aggregate)
            parts.append(scores_n)
            if table is not None:
                table.write(_rows(entries, scores_n, scores_Mn.astype(np.float32), columns))
            after_rows(entries, scores_n)
    return np.concatenate(parts)


def _rows(
    entries: Sequence[Entry], scores_n: Scores, scores_Mn: Scores, columns: ScoreColumns
) -> list[tuple[Any, ...]]:
    each = scores_Mn.T if len(columns.models) > 1 else np.empty((len(entries), 0), dtype=np.float32)
    rows = []
    for entry, score, by_model in zip(entries, scores_n, each, strict=True):
        assert entry.target is not None
        assert entry.variant is not None
        flags = (",".join(dict.fromkeys((*entry.target.flags, *entry.variant.flags))),) if columns.flags else ()
        rows.append((*entry.row.cells, score, *by_model, *flags))
    return rows
