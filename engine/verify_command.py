"""`protnest verify`, which the command line mounts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from .verify import Verdict


def verify(
    folder: Annotated[Path, typer.Argument(help="What `embed` wrote.", metavar="DIR")],
    remove: Annotated[
        bool, typer.Option("--discard", help="Remove damaged shards; the same `embed` then makes these again.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Read every byte of a store and say what is damaged; exit code 0 only if all is finished and whole."""
    from .progress import counting
    from .verify import verify_store

    console = Console(stderr=True, soft_wrap=True)
    with counting(console, f"verifying {folder}") as follow:
        verdict = verify_store(folder, remove=remove, follow=follow)
    if json_output:
        typer.echo(json.dumps({"whole": verdict.is_whole, **asdict(verdict)}))
    else:
        _print(console, folder, verdict)
    if not verdict.is_whole:
        raise typer.Exit(1)


def _print(console: Console, folder: Path, verdict: Verdict) -> None:
    def line(text: str, style: str = "") -> None:
        console.print(text, markup=False, highlight=False, style=style)

    for damage in verdict.damages:
        line(f"{folder / damage.file}: {damage.problem}", "red")
    for note in verdict.notes:
        line(f"note: {note}")
    held = f"{verdict.shards:,} shards, {verdict.rows:,} embeddings, {verdict.records:,} proteins"
    if verdict.discarded:
        line(f"removed {len(verdict.discarded):,} shards; the same `protnest embed` makes these again")
    elif verdict.reopened:
        line("marked the run as not finished; the same `protnest embed` mends it, without a model")
    if not verdict.complete:
        line(f"not finished: {held} so far; the same `protnest embed` goes on", "yellow")
    elif verdict.damages:
        line(f"damaged in {len(verdict.damages):,} places; {held} are listed", "red")
    else:
        line(f"whole: {held}, {verdict.rejected:,} records left out", "green")
