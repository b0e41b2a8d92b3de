"""One page of pictures of a judgement: reliability, confidence, perplexity, composition, lengths, neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.atomic import write_atomically
from .composition import LETTERS, Composition
from .evaluation import DesignJudgement, ModelJudgement, PredictionJudgement
from .novelty import NOVEL_BELOW
from .score_plot import check_plot
from .token_scores import Scored, TokenScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3
_MODEL, _TEACHER = "tab:blue", "tab:orange"


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows; panels of what is None are left out.

    Attributes:
        title: above all.
        prediction, scored: of `judge_predictions`.
        designs: of `judge_designs`.
        generated, reference: the sequences, for their lengths.
    """

    title: str
    prediction: PredictionJudgement | None = None
    scored: Scored | None = None
    designs: DesignJudgement | None = None
    generated: Sequence[str] = ()
    reference: Sequence[str] = ()


def evaluation_figure(page: Page) -> Figure:
    """Draws the page: a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    panels = list[Callable[[Any], None]]()
    prediction, scored, designs = page.prediction, page.scored, page.designs
    if prediction is not None and scored is not None:
        models = [(prediction.model, scored.model, _MODEL)]
        if prediction.teacher is not None and scored.teacher is not None:
            models.append((prediction.teacher, scored.teacher, _TEACHER))
        panels.append(lambda axes: _draw_reliability(axes, models))
        panels.append(lambda axes: _draw_confidence(axes, models))
        panels.append(lambda axes: _draw_perplexity(axes, models, prediction))
    if designs is not None:
        panels.append(lambda axes: _draw_composition(axes, designs.composition))
        panels.append(lambda axes: _draw_lengths(axes, page))
        if designs.novelty is not None:
            nearest = designs.novelty.nearest
            panels.append(lambda axes: _draw_identity(axes, nearest))
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.2 * min(_COLUMNS, len(panels)), 3.8 * rows + 0.4), layout="constrained")
    figure.suptitle(page.title)
    for place, draw in enumerate(panels, start=1):
        draw(figure.add_subplot(rows, min(_COLUMNS, len(panels)), place))
    return figure


def draw_evaluation(path: Path, page: Page) -> None:
    """Writes the page to one file.

    Raises:
        InputError: as `check_plot`.
    """
    check_plot(path)
    figure = evaluation_figure(page)
    kind = path.suffix.lower().removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150))


_Models = Sequence[tuple[ModelJudgement, TokenScores, str]]


def _draw_reliability(axes: Any, models: _Models) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    for judged, _, colour in models:
        found = judged.calibration
        for binned, words, marker, line in (
            (found.equal_width, "width", "o", "-"),
            (found.equal_mass, "mass", "x", ":"),
        ):
            xs, ys = [each.confidence for each in binned.bins], [each.accuracy for each in binned.bins]
            # Marks as large as their bins: a few tokens' accuracy says little.
            areas = [4 + 40 * each.tokens / judged.tokens for each in binned.bins]
            label = f"{judged.name}, equal {words}: ECE {binned.ece.value:.3f}"
            axes.plot(xs, ys, linewidth=1, linestyle=line, color=colour, label=label)
            axes.scatter(xs, ys, s=areas, marker=marker, color=colour, linewidths=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title="Reliability")
    axes.legend(fontsize=6)


def _draw_confidence(axes: Any, models: _Models) -> None:
    for judged, scores, colour in models:
        found = judged.calibration
        label = f"{judged.name}: accuracy {found.accuracy.value:.3f}, mean confidence {found.confidence.value:.3f}"
        axes.hist(scores.confidence_N, bins=40, range=(0, 1), histtype="step", color=colour, label=label)
        axes.axvline(found.accuracy.value, color=colour, linewidth=1)
        axes.axvline(found.confidence.value, color=colour, linewidth=1, linestyle="--")
    axes.set(xlabel="confidence; its mean dashed, accuracy solid", ylabel="tokens", title="How sure it is")
    axes.legend(fontsize=6)


def _draw_perplexity(axes: Any, models: _Models, prediction: PredictionJudgement) -> None:
    listed = [
        np.exp(np.minimum(scores.sums_B(scores.nll_N) / np.maximum(scores.residues_B, 1), 50.0))
        for _, scores, _ in models
    ]
    # The last bar holds the worst hundredth, which would leave the others no room.
    high = max(float(np.quantile(values_B, 0.99)) for values_B in listed)
    edges = np.linspace(min(float(values_B.min()) for values_B in listed), high, 41).tolist()
    for (judged, _, colour), values_B in zip(models, listed, strict=True):
        label = f"{judged.name}: {_shown(judged.residue_perplexity.value)} over all"
        axes.hist(np.minimum(values_B, high), bins=edges, histtype="step", color=colour, label=label)
    letters = prediction.letter_perplexity.value
    if letters is not None:
        axes.axvline(letters, color="0.4", linewidth=1, linestyle="--", label=f"frequencies alone: {letters:.2f}")
    axes.set(xlabel="perplexity per residue of a sequence", ylabel="sequences", title="Perplexity")
    axes.legend(fontsize=6)


def _draw_composition(axes: Any, found: Composition) -> None:
    places = np.arange(len(LETTERS))
    axes.bar(places - 0.2, [found.generated[letter] for letter in LETTERS], 0.4, color=_MODEL, label="designs")
    axes.bar(places + 0.2, [found.reference[letter] for letter in LETTERS], 0.4, color="0.6", label="reference")
    axes.set_xticks(places, list(LETTERS), fontsize=7)
    axes.set(ylabel="share of residues", title=f"Composition, KL {_shown(found.kl.value, 4)}")
    axes.legend(fontsize=6)


def _draw_lengths(axes: Any, page: Page) -> None:
    assert page.designs is not None
    ours, theirs = [len(each) for each in page.generated], [len(each) for each in page.reference]
    edges = np.linspace(0, max(*ours, *theirs) + 1, 41).tolist()
    axes.hist(ours, bins=edges, density=True, histtype="step", color=_MODEL, label="designs")
    axes.hist(theirs, bins=edges, density=True, histtype="step", color="0.5", label="reference")
    distance = page.designs.lengths.wasserstein.value
    axes.set(xlabel="residues", ylabel="density", title=f"Lengths, {_shown(distance, 1)} residues apart")
    axes.legend(fontsize=6)


def _draw_identity(axes: Any, nearest: Sequence[float]) -> None:
    axes.hist(nearest, bins=40, range=(0, 1), color=_MODEL)
    axes.axvline(NOVEL_BELOW, color="0.4", linewidth=1, linestyle="--")
    axes.set(xlabel="identity to the nearest for training", ylabel="designs", title="Novelty")


def _shown(value: float | None, digits: int = 2) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
