"""One page of pictures of a fine-tuning: validation by epoch, and what the test share says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.atomic import write_atomically
from .score_plot import check_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = {
    "unigram": "amino acids' frequencies, perplexity per residue",
    "before": "before, perplexity per residue",
    "after": "after, perplexity per residue",
    "ratio": "after / before",
    "spearman": "Spearman",
    "accuracy": "accuracy",
}
"""What a report's figures are called, in the order in which they are shown."""

_SHOWN = {
    "unigram": "frequencies",
    "before": "before",
    "after": "after",
    "spearman": "Spearman",
    "accuracy": "accuracy",
}


def finetuning_figure(report: dict[str, Any]) -> Figure:
    """Draws the page of a report of `finetune`: a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses, best = report["validation_losses"], report["best_epoch"]
    left.plot(range(len(losses)), losses, marker="o", color="tab:blue")
    left.axvline(best, color="tab:orange", linestyle="--", label=f"kept: after epoch {best}")
    left.set(xlabel="epoch", ylabel="validation loss")
    left.legend()
    test = report["test"]
    shown = [(name, test[key]) for key, name in _SHOWN.items() if key in test and test[key]["value"] is not None]
    for place, (_, each) in enumerate(shown):
        right.plot(each["value"], place, "o", color="tab:blue")
        if each["low"] is not None:
            right.plot([each["low"], each["high"]], [place, place], color="tab:blue")
    right.set_yticks(range(len(shown)), [name for name, _ in shown])
    right.set_ylim(-0.5, max(0.5, len(shown) - 0.5))
    right.set(xlabel="perplexity per residue" if "after" in test else "score")
    right.set_title(f"{test['sequences']:,} proteins for testing, 95 %", fontsize="medium")
    figure.suptitle(f"{report['model']}, {report['task']}, {report['method']}: {report['data']['file']}")
    return figure


def draw_finetuning(path: Path, report: dict[str, Any]) -> None:
    """Writes the page as .png, .svg or .pdf.

    Raises:
        InputError: as `check_plot`.
    """
    check_plot(path)
    figure = finetuning_figure(report)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150))
