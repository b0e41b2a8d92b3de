"""One page of pictures of a grid: each cell's students, and by how much the two regularisers help each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.atomic import write_atomically
from .score_plot import check_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid_figure(report: dict[str, Any]) -> Figure:
    """Draws the page of a report of `run_grid`, a row for each student: a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    students = report["students"]
    figure = Figure(figsize=(9, 3.2 * len(students) + 0.4), layout="constrained")
    figure.suptitle(f"{report['grid']} of {report['teacher']} on {report['data']['file']}")
    for row, (student, found) in enumerate(students.items()):
        _draw_cells(figure.add_subplot(len(students), 2, 2 * row + 1), student, found)
        _draw_synergy(figure.add_subplot(len(students), 2, 2 * row + 2), found)
    return figure


def _draw_cells(axes: Any, student: str, found: dict[str, Any]) -> None:
    names = list(found["cells"])
    for place, cell in enumerate(found["cells"].values()):
        known = [each for each in cell["perplexities"] if each is not None]
        axes.plot(known, [place] * len(known), "o", color="tab:blue", alpha=0.6, markersize=5)
        if cell["perplexity"]["mean"] is not None:
            axes.plot(cell["perplexity"]["mean"], place, "|", color="black", markersize=16)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="perplexity per residue; a dot a seed, a line their mean", title=student)


def _draw_synergy(axes: Any, found: dict[str, Any]) -> None:
    shown = [
        (f"{normalization}, over {over}", synergy[f"over_{over}"])
        for normalization, synergy in found["synergy"].items()
        for over in ("proteins", "seeds")
        if synergy[f"over_{over}"]["value"] is not None
    ]
    for place, (_, each) in enumerate(shown):
        axes.plot(each["value"], place, "o", color="tab:orange")
        if each["low"] is not None:
            axes.plot([each["low"], each["high"]], [place, place], color="tab:orange")
    axes.axvline(0, color="0.5", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(max(1, len(shown)) - 0.5, -0.5)
    axes.set(xlabel="nats a residue, 95 %; below 0: they help", title="synergy")
    # These numbers are long: more than four would run into each other.
    axes.locator_params(axis="x", nbins=4)


def draw_grid(path: Path, report: dict[str, Any]) -> None:
    """Writes the page as .png, .svg or .pdf.

    Raises:
        InputError: as `check_plot`.
    """
    check_plot(path)
    figure = grid_figure(report)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150))
