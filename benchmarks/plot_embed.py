"""Draws the latest comparison of `bench_embed.py`: residues/s by engine and model, with smallest and largest.

    python benchmarks/plot_embed.py

reads benchmarks/results/embed.jsonl and writes docs/embed-speed.png, a panel for each shape. Of every shape, engine
and precision the newest row counts; `--device` chooses among machines, by default that of the newest row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from protnest.benchmarks.rows import ROOT, Row

RESULTS = ROOT / "benchmarks" / "results" / "embed.jsonl"
PICTURE = ROOT / "docs" / "embed-speed.png"
_OURS = "protnest"
_BLUE, _GREY = "#1f6fb4", "#9aa0a6"
_PANEL_INCHES, _BAR_INCHES, _DPI = 3.6, 0.3, 110


class PlotError(Exception):
    """There is nothing to draw."""


def read_rows(path: Path) -> list[Row]:
    """Rows of engines from a file of JSON lines.

    Raises:
        PlotError: the file cannot be read, or a line is not JSON.
    """
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        message = f"{path}: {error.strerror or error}"
        raise PlotError(message) from error
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            message = f"{path}, line {number}: not JSON ({error})"
            raise PlotError(message) from error
    return [row for row in rows if row.get("suite") == "embed"]


def _machine(row: Row) -> tuple[str, int]:
    return (row["cpu"] if row["device"] == "cpu" else row["device"]), row["threads"]


def latest(rows: Sequence[Row], *, mix: str, device: str | None = None) -> list[Row]:
    """The newest row of each shape, engine and precision, from one machine; rows without a mix are of "uniprot".

    Args:
        rows: in the order written.
        mix: of lengths.
        device: part of the machine's name; the newest row's machine by default.

    Raises:
        PlotError: there is none.
    """
    chosen = [row for row in rows if row.get("mix", "uniprot") == mix]
    chosen = [row for row in chosen if device is None or device.lower() in _machine(row)[0].lower()]
    if not chosen:
        message = f"no rows of the mix {mix}" + (f" on a machine called {device!r}" if device else "")
        raise PlotError(message)
    machine = _machine(chosen[-1])
    found = {
        (row["shape"], row["engine"], row["precision"]): row for row in chosen if _machine(row) == machine
    }  # later ones replace earlier ones
    return list(found.values())


def draw(rows: Sequence[Row], path: Path, *, mix: str) -> None:
    """Writes the picture: a panel for each shape, a bar for each engine, the fastest on top.

    Args:
        rows: of `latest`.
        path: ends in .png, .svg or .pdf; its folder is made if it is not there.
        mix: for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    most = max(sum(row["shape"] == shape for row in rows) for shape in shapes)
    figure = Figure(figsize=(_PANEL_INCHES * len(shapes), 1.2 + _BAR_INCHES * most), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        here = sorted((row for row in rows if row["shape"] == shape), key=lambda row: row["residues_per_s_median"])
        medians = [row["residues_per_s_median"] for row in here]
        below = [row["residues_per_s_median"] - row["residues_per_s_min"] for row in here]
        above = [row["residues_per_s_max"] - row["residues_per_s_median"] for row in here]
        colours = [_BLUE if row["engine"] == _OURS else _GREY for row in here]
        names = [f"{row['engine']} {row['precision']}" for row in here]
        panel.barh(names, medians, color=colours, xerr=[below, above], error_kw={"lw": 0.8, "capsize": 2})
        panel.set_title(shape, fontsize=10)
        panel.set_xlabel("residues/s", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    machine, threads = _machine(rows[-1])
    figure.suptitle(f"{mix} lengths, {machine}, {threads} thread{'s' if threads > 1 else ''}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot(
    rows: Annotated[Path, typer.Option(help="JSON lines of bench_embed.py.")] = RESULTS,
    mix: Annotated[str, typer.Option(help="Of lengths.")] = "uniprot",
    device: Annotated[
        str | None, typer.Option(help="Part of the machine's name.", show_default="the newest row's")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = PICTURE,
) -> None:
    """Draw the latest comparison."""
    try:
        draw(latest(read_rows(rows), mix=mix, device=device), out, mix=mix)
    except (PlotError, ImportError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{out}")


if __name__ == "__main__":
    typer.run(plot)
