"""`protnest convert`, which the command line mounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .errors import InputError


def convert(
    folder: Annotated[Path, typer.Argument(help="What `embed` wrote.", metavar="DIR")],
    to: Annotated[Literal["parquet", "h5", "npy", "pt", "h5ad", "csv"], typer.Option(help="The format.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file, or with pt the folder.", show_default="inside DIR, as `embed --format` does"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what lies there.")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Copy embeddings into a format that other programs read."""
    from . import formats
    from .embeddings import read_embeddings
    from .progress import counting
    from .store import is_own

    formats.check_format(to)
    embeddings = read_embeddings(folder)
    path = out or formats.default_path(folder, to)
    if is_own(path.name) and path.parent.resolve() == folder.resolve():
        message = "is the store's own file: choose another --out"
        raise InputError(message, file=path)
    if path.is_dir() and to != "pt":
        message = "is a folder: --out names the file"
        raise InputError(message, file=path)
    beside = [formats.offsets_path(path)] if to == "npy" and embeddings.offsets is not None else []
    if taken := [each for each in (path, *beside) if each.exists() and not overwrite]:
        message = "is there already: choose another --out or --overwrite"
        raise InputError(message, file=taken[0])
    if not path.parent.is_dir():
        message = "there is no such folder to write into"
        raise InputError(message, file=path.parent)
    console = Console(stderr=True, soft_wrap=True)
    with counting(console, f"converting {len(embeddings):,} proteins") as follow:
        formats.convert(embeddings, folder, to, path=path, follow=follow)
    if json_output:
        typer.echo(json.dumps({"out": str(path), "format": to, "sequences": len(embeddings)}))
    else:
        console.print(f"{path}: {len(embeddings):,} proteins", markup=False, highlight=False)
