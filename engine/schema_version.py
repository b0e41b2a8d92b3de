"""The version of a file's layout, which each file states of itself."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError


def check_schema_version(
    found: object, known: int | str, *, file: str | Path, earlier: tuple[int | str, ...] = ()
) -> None:
    """Refuses a file of another layout than this release reads.

    Args:
        found: what the file says.
        known: what this release reads; text where a file's metadata hold nothing else.
        file: which one it is.
        earlier: what it reads beside.

    Raises:
        InputError: they differ.
    """
    if found != known and found not in earlier:
        message = f"has schema version {found}, this release reads {known}"
        raise InputError(message, file=file)
