"""Where a command's report goes: a file, standard output, or both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..engine.atomic import write_atomically


def write_report(report: dict[str, Any], out: Path | None, *, json_output: bool) -> None:
    """Writes a report as JSON, without NaN, which JSON does not have.

    Args:
        report: what it holds.
        out: the file, None for none.
        json_output: whether standard output gets it too, on one line.
    """
    if out is not None:
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        write_atomically(out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if json_output:
        typer.echo(json.dumps(report, allow_nan=False))
