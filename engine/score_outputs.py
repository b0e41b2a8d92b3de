"""Where a scoring run writes: one file for one table, a folder for several.

    --out scores.csv     scores.csv, scores.csv.run.json, scores.rejects.csv, scores.report.json
    --out scores/        for each table a file of its name; run.json, rejects.csv, report.json

run.json is the record of a finished run: its settings and counts. While the run is under way its values lie in a hidden
folder beside (`score_state`), which goes when all is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import write_atomically
from .errors import InputError
from .run_folder import differences
from .table_writer import check_output

SCHEMA_VERSION = 1
_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")


@dataclass(frozen=True, kw_only=True)
class ScoreOutputs:
    """The files of a run.

    Attributes:
        tables: one for each table that is read.
        record: of the finished run.
        work: folder of the run that is under way.
        rejects: rows that could not be scored.
        report: how well scores rank what was measured.
    """

    tables: tuple[Path, ...]
    record: Path
    work: Path
    rejects: Path
    report: Path

    @classmethod
    def at(cls, out: Path, sources: Sequence[Path], *, others: Sequence[Path] = ()) -> ScoreOutputs:
        """The files for these tables.

        Args:
            out: a file or a folder.
            sources: the tables.
            others: what else is read.

        Raises:
            InputError: `out` cannot be written to, a file that is read would be written over, or two share a name.
        """
        if len(sources) == 1 and out.name.lower().endswith(_ENDINGS) and not out.is_dir():
            stem = out.name.lower().removesuffix(".gz")
            name = out.name[: stem.rindex(".")]
            found = cls(
                tables=(out,),
                record=out.with_name(f"{out.name}.run.json"),
                work=out.with_name(f".{out.name}.work"),
                rejects=out.with_name(f"{name}.rejects.csv"),
                report=out.with_name(f"{name}.report.json"),
            )
        else:
            named_as_file = out.name.lower().endswith(_ENDINGS) and not out.is_dir()
            if named_as_file or (out.exists() and not out.is_dir()):
                tables = "1 table" if len(sources) == 1 else f"{len(sources)} tables"
                message = f"is a file's name; the scores of {tables} go to a folder, or to {', '.join(_ENDINGS)}"
                raise InputError(message, file=out)
            found = cls(
                tables=tuple(out / _output_name(source) for source in sources),
                record=out / "run.json",
                work=out / ".work",
                rejects=out / "rejects.csv",
                report=out / "report.json",
            )
        inputs = {path.resolve() for path in (*sources, *others)}
        for path in (*found.tables, found.record, found.rejects, found.report):
            if path.resolve() in inputs:
                message = "is read and would be written over; choose another --out"
                raise InputError(message, file=path)
        for place, table in enumerate(found.tables):
            check_output(table)
            if table == found.rejects:
                message = f"would be written twice: {sources[place]} is called as the list of rejects is"
                raise InputError(message, file=table)
            if table in found.tables[:place]:
                message = f"would be written twice: {sources[place]} is not the only table of that name"
                raise InputError(message, file=table)
        return found

    def is_finished(self, settings: dict[str, Any], *, overwrite: bool) -> bool:
        """Whether a run of these settings is finished and all of its tables are there.

        Raises:
            InputError: a table is there, but from a run of other settings or none, and `overwrite` is not set.
        """
        there = [table for table in self.tables if table.exists()]
        if overwrite or not there:
            return False
        try:
            run = json.loads(self.record.read_text(encoding="utf-8"))
            changed = differences(run["settings"], json.loads(json.dumps(settings)))
            version = run["schema_version"]
        except FileNotFoundError:
            # One of several tables may have been written before the run was stopped.
            if self.work.is_dir():
                return False
            message = f"is there already, and {self.record.name}, which would say what it is, is not; --overwrite"
            raise InputError(message, file=there[0]) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            message = f"not a readable record of a run ({error}); --overwrite starts anew"
            raise InputError(message, file=self.record) from error
        if version != SCHEMA_VERSION:
            changed = [f"schema version: {version} there, {SCHEMA_VERSION} now", *changed]
        if changed:
            message = f"was written with other settings ({'; '.join(changed)}); choose another --out or --overwrite"
            raise InputError(message, file=there[0])
        return len(there) == len(self.tables)

    def begin(self, *, rejected: int) -> None:
        """Removes the record of an older run, and its rejects where there are none now: what is written from now on is
        not what they tell of."""
        self.record.unlink(missing_ok=True)
        if not rejected:
            self.rejects.unlink(missing_ok=True)

    def write_record(self, settings: dict[str, Any], **details: Any) -> None:
        """Marks the run as finished."""
        run = {"schema_version": SCHEMA_VERSION, "settings": settings, **details}
        text = json.dumps(run, indent=1, allow_nan=False) + "\n"
        write_atomically(self.record, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _output_name(source: Path) -> str:
    name = source.name
    stem = name.lower().removesuffix(".gz")
    # A plain list gets columns, and so another ending.
    return f"{name[: stem.rindex('.')]}.csv" if stem.endswith(".txt") or not stem.endswith(_ENDINGS) else name
