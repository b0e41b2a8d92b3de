"""A folder that one run writes: who may be in it, what may lie there before, and whether it is the same run.

The lock dies with its process, so that a kill frees the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def enter_folder(folder: Path) -> Iterator[None]:
    """Makes a folder where there is none, and keeps other runs out of it, as `lock_folder`.

    Raises:
        InputError: it is a file, it cannot be written to, or another run is in it.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_folder(folder))
        except FileExistsError as error:
            message = "is a file; --out names a folder"
            raise InputError(message, file=folder) from error
        except OSError as error:
            message = f"cannot be written to ({error.strerror})"
            raise InputError(message, file=folder) from error
        yield


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, for as long as the context is open or the process lives.

    Raises:
        InputError: another run is in it.
    """
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = "another run is writing to this folder"
            raise InputError(message, file=folder) from error
        yield


def check_empty(folder: Path, *, lacks: str = "run", option: str = "--out") -> None:
    """Raises InputError for a folder that holds anything but a lock.

    Args:
        folder: must be there.
        lacks: what it should hold if it holds anything.
        option: of the command line, which named it.
    """
    if leftovers := sorted(path.name for path in folder.iterdir() if path.name != LOCK_FILE):
        message = f"is not empty and holds no {lacks} ({', '.join(leftovers[:3])}): choose another {option}"
        raise InputError(message, file=folder)


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """In words, which settings of a run there differ from those of this one."""
    keys = sorted(theirs.keys() | ours.keys())
    return [f"{key}: {theirs.get(key)} there, {ours.get(key)} now" for key in keys if theirs.get(key) != ours.get(key)]
