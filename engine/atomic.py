"""Files that are either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there is flushed to the disk and renamed into place.

    After an error nothing is left of it, and `path` is what it was. An OSError that names no file names `path`.

    Args:
        path: the file.
        unique: nobody else has this temporary path, for a file that two processes may be writing.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if unique else f".{path.name}.tmp")
    try:
        with naming(path):
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # What went wrong first is what has to be told.
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, flushes the result to the disk, and renames it into place."""
    with replacing(path) as temporary:
        write(temporary)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an OSError that names no file, such as a full disk's, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            # With a file name a message that came without a number would no longer be shown.
            error.strerror = error.strerror or str(error)
            error.filename = str(path)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
