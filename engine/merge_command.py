"""`protnest merge`, which the command line mounts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def merge(
    folders: Annotated[
        list[Path], typer.Argument(help="What the jobs `embed --shard I/N` wrote, in any order.", metavar="DIR...")
    ],
    out: Annotated[Path, typer.Option(help="Folder for all of it; an unfinished merge in it is gone on with.")],
    overwrite: Annotated[bool, typer.Option(help="Throw away a run of other settings in --out.")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Put the stores of an array job together, if all of them are there and whole."""
    from .merge import merge_stores
    from .progress import counting

    console = Console(stderr=True, soft_wrap=True)
    with counting(console, f"merging {len(folders):,} stores") as follow:
        merged = merge_stores(folders, out, overwrite=overwrite, follow=follow)
    if json_output:
        typer.echo(json.dumps({"out": str(out), **asdict(merged)}))
        return
    words = f"{out}: {merged.shards:,} shards, {merged.rows:,} embeddings, of {merged.jobs:,} jobs"
    if merged.resumed:
        words += f"; {merged.resumed:,} shards were there already"
    if merged.duplicates:
        words += f"; {merged.duplicates:,} duplicate ids, kept"
    console.print(words, markup=False, highlight=False)
