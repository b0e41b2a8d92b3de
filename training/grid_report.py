"""A grid's numbers: cells with their seeds, differences with intervals, whether the regularisers help each other.

All differences are of log perplexity: below 0 the first is better. Each has two intervals, which answer two questions:

    over proteins    would other proteins say the same of these very students? Paired bootstrap, seeds averaged.
    over seeds       would other seeds say the same? Student's t of the differences, which are paired by seed.

Shapes: B proteins.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.bootstrap import finite
from .estimate import Estimate, exp, ratio

Floats = npt.NDArray[np.float64]

_Z = 1.959963984540054
_T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)
"""Quantile 0.975 of Student's t with 1 to 10 degrees of freedom."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProteinScores:
    """What one student says of held-out proteins.

    Attributes:
        nll_B: fp64, negative log-likelihood in nats of what was asked of each; infinite where training diverged.
        residues_B: fp64, how many residues that stands for; the same for all students that are compared.
    """

    nll_B: Floats
    residues_B: Floats

    @property
    def log_perplexity(self) -> float:
        """Nats a residue."""
        return float(self.nll_B.sum() / self.residues_B.sum())

    def diverged(self) -> ProteinScores:
        """A student without a likelihood, over the same proteins."""
        return ProteinScores(nll_B=np.full_like(self.nll_B, math.inf), residues_B=self.residues_B)


@dataclass(frozen=True, kw_only=True, eq=False)
class CellScores:
    """One cell of the grid, at the settings that were chosen for it.

    Attributes:
        learning_rate, warmup_steps: the chosen.
        tried: learning rate, warm-up and log perplexity on the proteins to choose by, of each that was tried.
        seeds: of the students.
        students: one for each seed, on the proteins to judge by.
    """

    learning_rate: float
    warmup_steps: int
    tried: tuple[tuple[float, int, float], ...]
    seeds: tuple[int, ...]
    students: tuple[ProteinScores, ...]


def t_quantile(freedom: int) -> float:
    """Quantile 0.975 of Student's t: from a table up to 10 degrees of freedom, beyond that to 0.0002.

    Source of the expansion: Abramowitz and Stegun, 26.7.5.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    terms = (
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
    )
    return _Z + math.fsum(term / float(freedom**power) for power, term in enumerate(terms, start=1))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one value a seed, with a 95 % interval by Student's t: none of one seed; undefined if one diverged."""
    if not all(map(math.isfinite, values)):
        return Estimate(value=None, low=None, high=None, n=len(values))
    middle = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(value=middle, low=None, high=None, n=len(values))
    reach = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(value=middle, low=middle - reach, high=middle + reach, n=len(values))


def contrast(cells: Mapping[str, CellScores], weights: Mapping[str, float]) -> dict[str, Any]:
    """A weighted sum of cells' log perplexities, with both intervals and a verdict, as JSON.

    Args:
        cells: over the same proteins and seeds.
        weights: of the cells that take part; they add up to 0.

    Returns:
        `over_proteins`, `over_seeds`: estimates; `verdict`: "below" or "above" 0 where both intervals say so, else
        "open".
    """
    seeds = len(next(iter(cells.values())).seeds)
    with np.errstate(invalid="ignore"):
        by_seed = [
            sum(weight * cells[name].students[seed].log_perplexity for name, weight in weights.items())
            for seed in range(seeds)
        ]
        nll_B = sum(
            weight * cells[name].students[seed].nll_B / seeds
            for name, weight in weights.items()
            for seed in range(seeds)
        )
    residues_B = next(iter(cells.values())).students[0].residues_B
    proteins, spread = ratio(np.asarray(nll_B), residues_B), over_seeds(by_seed)
    sides = {_side(each) for each in (proteins, spread)}
    return {
        "over_proteins": asdict(proteins),
        "over_seeds": asdict(spread),
        "verdict": sides.pop() if len(sides) == 1 else "open",
    }


def _side(found: Estimate) -> str:
    if found.high is not None and found.high < 0:
        return "below"
    return "above" if found.low is not None and found.low > 0 else "open"


def report_student(cells: Mapping[str, CellScores]) -> dict[str, Any]:
    """What the grid says of one size of student, as JSON.

    Args:
        cells: by name: baseline, smoothing, labels, and for each normalisation of the weights uncertainty and both,
            where "-weight" ends the names of those whose soft loss is divided by the sum of weights.

    Returns:
        `cells`: what was tried and chosen, each seed's perplexity, mean and sd; `differences`: each pair's; `synergy`,
        by normalisation: (both - baseline) - [(uncertainty - baseline) + (smoothing - baseline)].
    """
    pairs = itertools.combinations(cells, 2)
    return {
        "cells": {name: _cell(cell) for name, cell in cells.items()},
        "differences": [
            {"cell": other, "against": one, **contrast(cells, {other: 1.0, one: -1.0})} for one, other in pairs
        ],
        "synergy": {
            normalization: contrast(
                cells, {f"both{ending}": 1.0, f"uncertainty{ending}": -1.0, "smoothing": -1.0, "baseline": 1.0}
            )
            for normalization, ending in (("count", ""), ("weight", "-weight"))
            if f"both{ending}" in cells
        },
    }


def _cell(cell: CellScores) -> dict[str, Any]:
    logs = [each.log_perplexity for each in cell.students]
    rates = sorted({rate for rate, _, _ in cell.tried})
    return {
        "learning_rate": cell.learning_rate,
        "warmup_steps": cell.warmup_steps,
        "at_edge": len(rates) > 1 and cell.learning_rate in (rates[0], rates[-1]),
        "tried": [
            {"learning_rate": rate, "warmup_steps": warmup, "perplexity": finite(exp(value))}
            for rate, warmup, value in cell.tried
        ],
        "seeds": list(cell.seeds),
        "perplexities": [finite(exp(value)) for value in logs],
        "perplexity": _mean_and_sd([exp(value) for value in logs]),
        "log_perplexity": _mean_and_sd(logs),
    }


def _mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    known = all(map(math.isfinite, values))
    return {
        "mean": statistics.fmean(values) if known else None,
        "sd": statistics.stdev(values) if known and len(values) > 1 else None,
    }


def answer(synergy: Mapping[str, Any]) -> str:
    """One sentence: whether the two regularisers help each other."""
    found, seeds = synergy["over_proteins"], synergy["over_seeds"]
    if found["value"] is None:
        return "Not known: a student diverged."
    reaches = f"{found['value']:+.4f} nats a residue; over proteins {_reach(found)}, over seeds {_reach(seeds)}"
    if synergy["verdict"] == "below":
        return f"Yes: both together lower log perplexity by more than the sum of each alone ({reaches})."
    if synergy["verdict"] == "above":
        return f"No, the opposite: both together do less than the sum of each alone ({reaches})."
    if seeds["low"] is None:
        return f"Open: one seed cannot tell ({reaches})."
    return f"Not shown: 0 is within an interval ({reaches})."


def _reach(found: Mapping[str, Any]) -> str:
    return "unknown" if found["low"] is None else f"{found['low']:+.4f} to {found['high']:+.4f}"


def markdown(report: Mapping[str, Any]) -> str:
    """The grid's report as a page: the question's answer, and a table for each student."""
    judged = report["proteins"]
    lines = [
        f"# {report['grid']} of {report['teacher']} on {report['data']['file']}",
        "",
        f"Perplexity per residue on {judged['judged']:,} held-out proteins; settings chosen with seed "
        f"{report['settings']['seed']} on {judged['selection']:,} others. Teacher "
        f"{_value(report['teacher_perplexity'])}, amino acids' frequencies {_value(report['unigram'])}. Differences "
        "are of log perplexity, in nats a residue, below 0: better; 95 % over proteins | over seeds.",
    ]
    for student, found in report["students"].items():
        lines += ["", f"## {student}", ""]
        for normalization, synergy in found["synergy"].items():
            lines.append(f"Do the two help each other (weights divided by {normalization})? {answer(synergy)}")
        lines += ["", *_table(found)]
        edge = [name for name, cell in found["cells"].items() if cell["at_edge"]]
        if edge:
            lines += ["", f"At the end of the learning rates that were tried: {', '.join(edge)}: try more."]
    return "\n".join(lines) + "\n"


def _table(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "| cell | learning rate | warm-up | perplexity, mean ± sd | seeds | against baseline | against labels alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in found["cells"].items():
        mean, sd = cell["perplexity"]["mean"], cell["perplexity"]["sd"]
        shown = "diverged" if mean is None else f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}")
        against = [_difference(found["differences"], name, other) for other in ("baseline", "labels")]
        lines.append(
            f"| {name} | {cell['learning_rate']:g} | {cell['warmup_steps']} | {shown} | {len(cell['seeds'])} | "
            + " | ".join(against)
            + " |"
        )
    return lines


def _difference(differences: Sequence[Mapping[str, Any]], name: str, other: str) -> str:
    for each in differences:
        if (each["cell"], each["against"]) == (name, other):
            sign = 1
        elif (each["cell"], each["against"]) == (other, name):
            sign = -1
        else:
            continue
        if each["over_proteins"]["value"] is None:
            return "undefined"
        parts = []
        for which in ("over_proteins", "over_seeds"):
            low, high = each[which]["low"], each[which]["high"]
            ends = [] if low is None else sorted((sign * low, sign * high))
            parts.append("unknown" if not ends else f"{ends[0]:+.4f} to {ends[1]:+.4f}")
        return f"{sign * each['over_proteins']['value']:+.4f} ({parts[0]} \\| {parts[1]})"
    return ""


def _value(found: Mapping[str, Any]) -> str:
    return "undefined" if found["value"] is None else f"{found['value']:.3f}"
