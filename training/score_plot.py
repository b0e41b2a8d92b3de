"""A picture of scores against sizes: a panel for each way of judging, a line for each way of embedding."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.atomic import write_atomically
from ..engine.errors import InputError

_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One score.

    Attributes:
        line: which line it belongs to; in the legend.
        model: the largest model behind it: the place on the axis of sizes.
        score, low, high: with its interval; None where it is not defined.
    """

    line: str
    model: str
    score: float | None
    low: float | None
    high: float | None


def check_plot(path: Path) -> None:
    """What can be known before anything is computed.

    Raises:
        InputError: matplotlib is not installed, or the file's ending is not that of a picture.
    """
    if path.suffix.lower() not in _FORMATS:
        message = f"ends in {path.suffix!r}; pictures end in {', '.join(_FORMATS)}"
        raise InputError(message, file=path)
    if importlib.util.find_spec("matplotlib") is None:
        message = "a plot needs matplotlib: pip install 'protnest[plot]'"
        raise InputError(message)


def draw_scores(
    path: Path, panels: Mapping[str, Sequence[Point]], sizes: Mapping[str, int], *, score: str, title: str
) -> None:
    """Draws one file.

    Args:
        path: ends in .png, .svg or .pdf.
        panels: by title; points in any order.
        sizes: width of each model, smallest first.
        score: name of the scores' axis.
        title: of the whole.

    Raises:
        InputError: as `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 4.0), layout="constrained")
    figure.suptitle(title)
    models = list(sizes)
    for place, (name, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        lines = list(dict.fromkeys(point.line for point in points))
        for number, line in enumerate(lines):
            # Beside one another: intervals at one size would hide each other.
            aside = (number - (len(lines) - 1) / 2) * 0.08
            drawn = [
                (models.index(point.model) + aside, point.score, point.low, point.high)
                for point in points
                if point.line == line and point.score is not None and point.low is not None and point.high is not None
            ]
            drawn.sort()
            xs, ys = [each[0] for each in drawn], [each[1] for each in drawn]
            reach = [
                [max(0.0, middle - low) for _, middle, low, _ in drawn],
                [max(0.0, high - middle) for _, middle, _, high in drawn],
            ]
            axes.errorbar(xs, ys, yerr=reach, marker="o", markersize=4, capsize=2, linewidth=1, label=line)
        axes.set_title(name)
        axes.set_xticks(range(len(models)), [f"{model}\n{width}" for model, width in sizes.items()], fontsize=8)
        axes.set_xlabel("largest model, width")
        axes.grid(axis="y", alpha=0.3)
        if place == 1:
            axes.set_ylabel(score)
            axes.legend(fontsize=8)
    kind = path.suffix.lower().removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150))
