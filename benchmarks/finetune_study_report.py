"""A fine-tuning study's table in Markdown, and its picture: both from the rows of its cells alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protnest.benchmarks.rows import Row
from protnest.engine.atomic import write_atomically
from protnest.training.score_plot import check_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_LINES = ("-", ":")
_INCHES = 3.4
# Of a place: the intervals of decoders must not lie over each other.
_ASIDE = 0.08


def study_markdown(rows: Sequence[Row]) -> str:
    """A section for each family and seed: what it is, what its profiles know, and a line for each cell."""
    sections = list(dict.fromkeys((row["family"], row["seed"]) for row in rows))
    parts = ["# Fine-tuning on few sequences\n", _NOTES]
    for family, seed in sections:
        here = [row for row in rows if (row["family"], row["seed"]) == (family, seed)]
        parts += [f"## {family}, seed {seed}\n", _describe(here[0]), _table(here)]
    return "\n".join(parts)


_NOTES = """\
Perplexity per residue on the test share, 95 % intervals by bootstrap over proteins, of the ratio paired. N = 0 is the
decoder as it came. Hits: share of designs that a profile of the training share recognises (E < 1e-5, as if 10,000
sequences were searched), Wilson's interval, and after it the same of the designs with their residues shuffled. At most:
designs as long as is allowed, where an end is forced. Nearest: mean identity of a design to the protein for training
that it is closest to, of those that share 5-mers with it (none: 0), and how many designs are a copy. Epochs: those run,
and in brackets the one whose weights were kept; + where not validation but the most epochs ended it.
"""


def _describe(row: Row) -> str:
    facts, limits = row["family_facts"], row["designs"][0]["limits"]
    known = facts["recognised_test"]
    return (
        f"{facts['kept']:,} of {facts['found']:,} proteins kept by length; clusters by {facts['clusters_by']} at "
        f"{facts['identity']:g}: {facts['clusters']:,}, the largest has {facts['largest_cluster']:,}; "
        f"{facts['train']:,} proteins for training, {facts['validation_used']:,} of {facts['validation']:,} to stop by "
        f"and {facts['test_used']:,} of {facts['test']:,} to judge by. "
        f"{facts['profiles']} profiles recognise {_percent(facts['recognised_train'])} of the training share and "
        f"{_percent(known)} of the test share (mean length {facts['test_mean_residues']:.0f}). "
        f"Designs have {limits[0]} to {limits[1]} residues, as the training share.\n"
    )


def _table(rows: Sequence[Row]) -> str:
    temperatures = [designs["temperature"] for designs in rows[0]["designs"]]
    titles = ["N", "model", "before", "after", "after / before"]
    titles += [f"hits % at T = {each:g}; shuffled" for each in temperatures]
    titles += [f"mean residues at {each:g}" for each in temperatures]
    titles += [f"at most %, at {each:g}" for each in temperatures]
    titles += [f"nearest % at {each:g}; copies" for each in temperatures]
    titles += ["epochs", "seconds"]
    lines = [titles, ["---"] * len(titles), *(_line(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _line(row: Row) -> list[str]:
    test, tuned, designs = row["test"], row["n"] > 0, row["designs"]
    cells = [f"{row['n']:,}", row["model"], _figure(test["before"], 2)]
    cells += [_figure(test["after"], 2), _figure(test["ratio"], 3)] if tuned else ["", ""]
    cells += [f"{_percent(each['hits'])}; {100 * each['shuffled']['value']:.1f}" for each in designs]
    cells += [f"{each['residues']['value']:.0f}" for each in designs]
    cells += [f"{100 * each['at_most']['value']:.1f}" for each in designs]
    cells += [f"{100 * each['nearest']['value']:.1f}; {each['copies']}" for each in designs]
    if not tuned:
        return [*cells, "", ""]
    more = "" if row["stopped_early"] else "+"
    return [*cells, f"{row['epochs']}{more} ({row['best_epoch']})", f"{row['seconds']:,.0f}"]


def _figure(found: dict[str, Any], digits: int, scale: float = 1.0) -> str:
    if found["value"] is None:
        return "undefined"
    shown = f"{scale * found['value']:.{digits}f}"
    if found["low"] is None:
        return shown
    return f"{shown} ({scale * found['low']:.{digits}f} to {scale * found['high']:.{digits}f})"


def _percent(found: dict[str, Any]) -> str:
    return _figure(found, 1, 100.0)


def study_figure(rows: Sequence[Row]) -> Figure:
    """Perplexity above and hits below, against N, a column for each family: a `matplotlib.figure.Figure`.

    A point is a cell; lines go through the means over seeds.
    """
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row["family"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(_INCHES * 1.4 * len(families), 2 * _INCHES), layout="constrained")
    panels = figure.subplots(2, len(families), squeeze=False)
    for column, family in enumerate(families):
        above, below = panels[0][column], panels[1][column]
        here = [row for row in rows if row["family"] == family]
        # N = 0 has no place on a logarithmic axis: places are counted, and named.
        sizes = sorted({row["n"] for row in here})
        for number, model in enumerate(models):
            colour, aside = _COLOURS[number % len(_COLOURS)], _ASIDE * (number - (len(models) - 1) / 2)
            own = [row for row in here if row["model"] == model]
            points = [(sizes.index(row["n"]) + aside, row["test"]["after"]) for row in own]
            _draw(above, points, colour, "-", model)
            for place, temperature in enumerate(designs["temperature"] for designs in own[0]["designs"]):
                hits = [(sizes.index(row["n"]) + aside, row["designs"][place]["hits"]) for row in own]
                _draw(below, hits, colour, _LINES[place % 2], f"{model}, T = {temperature:g}", scale=100.0)
        control = 100 * here[0]["family_facts"]["recognised_test"]["value"]
        below.axhline(control, color="grey", linestyle="--", linewidth=0.8, label="natural, of the test share")
        above.set(title=family, ylabel="test perplexity per residue")
        below.set(ylabel="designs recognised, %", xlabel="N", ylim=(-3, 103))
        for panel in (above, below):
            panel.set_xticks(range(len(sizes)), [f"{n:,}" for n in sizes])
            panel.spines[["top", "right"]].set_visible(False)
        if not column:
            above.legend(fontsize="small")
            below.legend(fontsize="x-small")
    return figure


def _draw(
    panel: Any,
    points: Sequence[tuple[float, dict[str, Any]]],
    colour: str,
    line: str,
    label: str,
    *,
    scale: float = 1.0,
) -> None:
    known = [(place, found) for place, found in points if found["value"] is not None]
    places = sorted({place for place, _ in known})
    means = [
        math.fsum(scale * found["value"] for place, found in known if place == each)
        / sum(place == each for place, _ in known)
        for each in places
    ]
    panel.plot(places, means, line, color=colour, label=label, linewidth=1.2)
    for place, found in known:
        panel.plot(place, scale * found["value"], "o", color=colour, markersize=3)
        if found["low"] is not None:
            panel.plot([place, place], [scale * found["low"], scale * found["high"]], color=colour, linewidth=0.7)


def draw_study(path: Path, rows: Sequence[Row]) -> None:
    """Writes the picture as .png, .svg or .pdf.

    Raises:
        InputError: as `check_plot`.
    """
    check_plot(path)
    figure = study_figure(rows)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150))
