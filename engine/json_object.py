"""A JSON file that holds an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import InputError


def read_object(path: Path, *, missing: str | None = None) -> dict[str, Any]:
    """What a JSON file holds.

    Args:
        path: the file.
        missing: what is said where there is none.

    Raises:
        InputError: it is missing, cannot be read, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        told = missing is not None and isinstance(error, FileNotFoundError)
        message = f"no such file; {missing}" if told else f"not readable as JSON ({error})"
        raise InputError(message, file=path) from error
    if not isinstance(content, dict):
        message = "holds no JSON object"
        raise InputError(message, file=path)
    return content
