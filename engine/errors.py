"""The error that names where in the user's own files something went wrong."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """A user's input cannot be used as it is.

    The message reads `file, line L, record R (id): problem`, with whatever of these is known. The command line prints
    it and exits with 1; callers from Python catch it as a `ValueError` and can read the parts.

    Args:
        problem: what is wrong, what was got and what is allowed.
        file: the file that holds it.
        line: its line in the file, from 1.
        record: the record's place in the file, from 1.
        record_id: the first word of the record's header.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        record: int | None = None,
        record_id: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.line = line
        self.record = record
        self.record_id = record_id
        place = [self.file] if self.file is not None else []
        if line is not None:
            place.append(f"line {line}")
        if record is not None:
            place.append(f"record {record}" + (f" ({record_id})" if record_id else ""))
        super().__init__(f"{', '.join(place)}: {problem}" if place else problem)
