"""A landscape as a picture: blocks of residues, each with its tracks above and its letters and numbers below.

Lengths are inches from the upper left corner of the paper unless a name says otherwise; matplotlib counts from below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .heatmap_layout import ROWS, Block, find_stretches, lay_out
from .landscape import Landscape
from .palette import CHEMISTRY, COLOURS

_POINTS = 72.0
_LEFT, _RIGHT = 1.25, 0.4
_HEADER, _FOOTER = 1.15, 0.2
_TRACK, _TRACK_GAP = 0.34, 0.1
_UNDER_CELLS = 0.38
_BLOCK_GAP = 0.26
_NARROWEST_PAPER = 7.5
_BAR_WIDTH = 2.2
_INK, _SOFT_INK, _UNKNOWN = "#222222", "#6b6b6b", "#d4d4d4"
_ENTROPY_COLOUR = "#8a8fa3"
_MOST_PIXELS = 30_000
"""Along one side; the rasteriser ends at 65,536, viewers earlier."""


@dataclass(frozen=True, kw_only=True)
class _Paper:
    """Sizes that follow from how much there is to draw.

    Attributes:
        width, height: of the paper.
        cell: side of a cell.
        tracks: height of the tracks above a block's cells.
    """

    width: float
    height: float
    cell: float
    tracks: float

    @property
    def block(self) -> float:
        return self.tracks + len(ROWS) * self.cell + _UNDER_CELLS

    @property
    def letter_points(self) -> float:
        return min(7.5, 0.78 * self.cell * _POINTS)


def draw_figure(landscape: Landscape) -> Any:
    """A matplotlib `Figure`."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    blocks = lay_out(landscape)
    paper = _choose_paper(landscape, blocks)
    figure = Figure(figsize=(paper.width, paper.height), facecolor="white")
    # One layer in inches, for all that no axes of matplotlib draw.
    layer = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[], zorder=5)
    layer.set_xlim(0, paper.width)
    layer.set_ylim(paper.height, 0)
    colours = LinearSegmentedColormap.from_list("scores", COLOURS).with_extremes(bad=_UNKNOWN)
    norm = Normalize(-landscape.limit, landscape.limit)
    marks = [("unknown", "not known")] * any(np.isnan(block.scores_AC[:, block.shown_C]).any() for block in blocks)
    marks += [("box", "named in the table")] * any(block.boxes for block in blocks)
    _draw_header(figure, layer, paper, landscape, marks, (colours, norm))
    means = _mean_range(landscape)
    for number, block in enumerate(blocks):
        top = _HEADER + number * (paper.block + _BLOCK_GAP)
        _draw_tracks(figure, layer, paper, top, landscape, block, means, (colours, norm))
        _draw_cells(figure, layer, paper, top + paper.tracks, block, (colours, norm))
        _draw_margins(layer, paper, top + paper.tracks, block)
    return figure


def resolution(figure: Any) -> float:
    """Dots an inch: 200, and less where a very long protein would make more dots than a picture may have."""
    return min(200.0, _MOST_PIXELS / float(max(figure.get_size_inches())))


def _choose_paper(landscape: Landscape, blocks: tuple[Block, ...]) -> _Paper:
    columns = max(len(block.sites_C) for block in blocks)
    cell = float(np.clip(11 / columns, 0.09, 0.17))
    tracks = (_TRACK + _TRACK_GAP) * (1 if landscape.entropy_L is None else 2)
    block = tracks + len(ROWS) * cell + _UNDER_CELLS
    height = _HEADER + len(blocks) * (block + _BLOCK_GAP) - _BLOCK_GAP + _FOOTER
    width = max(_NARROWEST_PAPER, _LEFT + columns * cell + _RIGHT)
    return _Paper(width=width, height=height, cell=cell, tracks=tracks)


def _add_axes(figure: Any, paper: _Paper, left: float, top: float, width: float, height: float) -> Any:
    place = (left / paper.width, 1 - (top + height) / paper.height, width / paper.width, height / paper.height)
    return figure.add_axes(place)


def _draw_header(
    figure: Any,
    layer: Any,
    paper: _Paper,
    landscape: Landscape,
    marks: list[tuple[str, str]],
    mapping: tuple[Any, Any],
) -> None:
    room = paper.width - _LEFT - _RIGHT - _BAR_WIDTH - 0.3
    _write(layer, _LEFT, 0.3, landscape.target, room, size=13.0, weight="bold", color=_INK)
    last = landscape.first + landscape.length - 1
    reach = f"residues {landscape.first} to {last}"
    if left_out := _left_out(landscape):
        reach += f"; nothing known of {left_out}"
    _write(layer, _LEFT, 0.5, f"{landscape.method}, {landscape.model}", room, size=8.0, color=_SOFT_INK)
    _write(layer, _LEFT, 0.66, reach, room, size=8.0, color=_SOFT_INK)
    key = [("dot", "wild type"), *marks]
    x = _LEFT + 0.05
    for kind, text in key:
        if kind == "dot":
            layer.plot([x], [0.84], marker="o", markersize=3, color=_INK, linestyle="none")
        else:
            face = _UNKNOWN if kind == "unknown" else "none"
            edge = _INK if kind == "box" else "none"
            layer.plot([x], [0.84], marker="s", markersize=6, markerfacecolor=face, markeredgecolor=edge)
        layer.text(x + 0.11, 0.84, text, size=7.5, color=_SOFT_INK, va="center_baseline")
        x += 0.3 + 0.055 * len(text)
    from matplotlib.cm import ScalarMappable

    axes = _add_axes(figure, paper, paper.width - _RIGHT - _BAR_WIDTH, 0.35, _BAR_WIDTH, 0.12)
    bar = figure.colorbar(ScalarMappable(mapping[1], mapping[0]), cax=axes, orientation="horizontal", extend="both")
    bar.outline.set_linewidth(0.4)
    bar.set_ticks([-landscape.limit, -landscape.limit / 2, 0, landscape.limit / 2, landscape.limit])
    bar.ax.set_xticklabels([f"{tick:.3g}".replace("-", "\N{MINUS SIGN}") for tick in bar.get_ticks()])
    bar.ax.tick_params(labelsize=7, width=0.4, length=2, color=_SOFT_INK, labelcolor=_INK)
    bar.ax.set_title("score (higher: better tolerated)", fontsize=8, color=_INK, pad=4)


def _write(layer: Any, x: float, y: float, text: str, room: float, *, size: float, **style: Any) -> None:
    """A line of text that fits into `room`: set smaller first, then cut."""
    per_letter = (0.68 if style.get("weight") == "bold" else 0.56) / _POINTS  # mean width of one, in font sizes
    fitting = room / (per_letter * max(1, len(text)))
    size = min(size, max(6.5, fitting))
    most = int(room / (per_letter * size))
    if len(text) > most:
        text = text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
    # An id may hold dollars, which would be read as a formula, and anything else.
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    layer.text(x, y, text, size=size, va="baseline", parse_math=False, **style)


def _left_out(landscape: Landscape) -> str:
    stretches = find_stretches(landscape)
    edges = [0, *(edge for stretch in stretches for edge in stretch), landscape.length]
    holes = [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
    return ", ".join(f"{start + landscape.first}\N{EN DASH}{stop - 1 + landscape.first}" for start, stop in holes)


def _mean_range(landscape: Landscape) -> tuple[float, float]:
    known = landscape.mean_L[np.isfinite(landscape.mean_L)]
    low, high = (min(0.0, float(known.min())), max(0.0, float(known.max()))) if known.size else (0.0, 0.0)
    return (low, high) if low < high else (-1.0, 1.0)


def _draw_tracks(
    figure: Any,
    layer: Any,
    paper: _Paper,
    top: float,
    landscape: Landscape,
    block: Block,
    means: tuple[float, float],
    mapping: tuple[Any, Any],
) -> None:
    width = len(block.sites_C) * paper.cell
    if landscape.entropy_L is not None:
        axes = _add_axes(figure, paper, _LEFT, top, width, _TRACK)
        entropy_C = np.where(block.shown_C, landscape.entropy_L[block.sites_C], np.float32(np.nan))
        axes.stairs(entropy_C, np.arange(len(entropy_C) + 1), fill=True, color=_ENTROPY_COLOUR, linewidth=0)
        _frame_track(axes, block, (0.0, float(np.log(len(ROWS)))), [0.0, 3.0])
        _name_track(layer, top, "entropy (nats)")
        top += _TRACK + _TRACK_GAP
    axes = _add_axes(figure, paper, _LEFT, top, width, _TRACK)
    mean_C = np.where(block.shown_C, landscape.mean_L[block.sites_C], np.float32(np.nan))
    places = np.flatnonzero(np.isfinite(mean_C))
    colours, norm = mapping
    axes.bar(places + 0.5, mean_C[places], width=1, color=colours(norm(mean_C[places])), linewidth=0)
    axes.axhline(0, color=_SOFT_INK, linewidth=0.4)
    _frame_track(axes, block, means, [0.0, min(means, key=lambda end: -abs(end))])
    _name_track(layer, top, "mean score")


def _frame_track(axes: Any, block: Block, ends: tuple[float, float], ticks: list[float]) -> None:
    axes.set_xlim(0, len(block.sites_C))
    axes.set_ylim(*ends)
    axes.set_xticks([])
    labels = [f"{tick:.2g}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    axes.set_yticks(ticks, labels, fontsize=6, color=_INK)
    axes.tick_params(width=0.4, length=2, color=_SOFT_INK, pad=1.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_linewidth(0.4)
    axes.patch.set_visible(False)


def _name_track(layer: Any, top: float, name: str) -> None:
    layer.text(_LEFT - 0.3, top + _TRACK / 2, name, size=6.5, color=_SOFT_INK, ha="right", va="center")


def _draw_cells(figure: Any, layer: Any, paper: _Paper, top: float, block: Block, mapping: tuple[Any, Any]) -> None:
    columns = len(block.sites_C)
    axes = _add_axes(figure, paper, _LEFT, top, columns * paper.cell, len(ROWS) * paper.cell)
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(len(ROWS), 0)
    # A run of columns at a time: gaps between the stretches stay paper, not the grey of what is not known.
    for start, stop in _runs(block.shown_C):
        edges = np.arange(start, stop + 1), np.arange(len(ROWS) + 1)
        scores = np.ma.masked_invalid(block.scores_AC[:, start:stop])
        axes.pcolormesh(*edges, scores, cmap=mapping[0], norm=mapping[1], edgecolors="white", linewidth=0.25)
        row = 0
        for _, acids in CHEMISTRY[:-1]:
            row += len(acids)
            axes.plot([start, stop], [row, row], color="white", linewidth=1.4, solid_capstyle="butt")
    if block.dots:
        rows, places = np.array(block.dots).T
        # A marker's size is that of its diameter, squared, in points.
        axes.scatter(places + 0.5, rows + 0.5, s=(0.34 * paper.cell * _POINTS) ** 2, color=_INK, linewidth=0)
    if block.boxes:
        rows, places = np.array(block.boxes).T
        side = (0.78 * paper.cell * _POINTS) ** 2
        # Dark in light: seen on every colour.
        for colour, thickness in (("white", 2.0), (_INK, 0.8)):
            axes.scatter(places + 0.5, rows + 0.5, s=side, marker="s", facecolor="none", edgecolor=colour, lw=thickness)


def _runs(shown_C: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shown_C, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _draw_margins(layer: Any, paper: _Paper, top: float, block: Block) -> None:
    """Amino acids and their groups on the left, letters and numbers of the wild type below."""
    size, bottom = paper.letter_points, top + len(ROWS) * paper.cell
    for row, acid in enumerate(ROWS):
        y = top + (row + 0.5) * paper.cell
        layer.text(_LEFT - 0.11, y, acid, size=size, color=_INK, ha="center", va="center_baseline")
    row = 0
    for name, acids in CHEMISTRY:
        ends = top + row * paper.cell + 0.02, top + (row + len(acids)) * paper.cell - 0.02
        layer.plot([_LEFT - 0.22] * 2, ends, color=_SOFT_INK, linewidth=0.7, solid_capstyle="butt")
        layer.text(_LEFT - 0.3, sum(ends) / 2, name, size=7, color=_SOFT_INK, ha="right", va="center_baseline")
        row += len(acids)
    for column, letter in block.letters:
        x = _LEFT + (column + 0.5) * paper.cell
        layer.text(x, bottom + 0.07, letter, size=size, color=_INK, ha="center", va="center_baseline")
    for column, number in block.ticks:
        x = _LEFT + (column + 0.5) * paper.cell
        layer.plot([x, x], [bottom + 0.13, bottom + 0.17], color=_SOFT_INK, linewidth=0.5)
        layer.text(x, bottom + 0.24, str(number), size=7, color=_INK, ha="center", va="center_baseline")
    layer.text(_LEFT - 0.3, bottom + 0.24, "residue", size=6.5, color=_SOFT_INK, ha="right", va="center_baseline")
