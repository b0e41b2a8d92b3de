"""The bundled family as data, and `protnest train-family`, which trains it: `python -m protnest.training.family`.

    seed-xs -> trunk -> nano-m        grown
               trunk -> nano-s        grown, taught by nano-m
               trunk -> nano-xs       taught by nano-s
                        nano-gpt      a decoder, by itself

The smallest encoder is trained first and longest: a step of it costs least. The others begin with its answers, and the
largest teaches downwards.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, kw_only=True)
class FamilyStage:
    """One training of the family.

    Attributes:
        name: of its folder.
        preset: what is trained.
        trained_on: an earlier stage, whose model is trained on in the place of fresh weights.
        grown_from: an earlier stage, with whose answers it begins (see `growth`).
        teacher: an earlier stage; None: labels alone.
        steps: of the optimiser; warmup: of them until the peak of the learning rate.
        learning_rate: the peak.
        schedule: how it falls after that.
        seed: of weights, order, crops and masks.
        batch_tokens: most tokens in a step.
        mask_share: of an encoder's residues that are asked for.
    """

    name: str
    preset: str
    trained_on: str | None = None
    grown_from: str | None = None
    teacher: str | None = None
    steps: int
    warmup: int
    learning_rate: float
    schedule: str
    seed: int
    batch_tokens: int = 2048
    mask_share: float = 0.15

    @property
    def begun_as(self) -> str | None:
        """The stage whose weights it begins with."""
        return self.trained_on or self.grown_from


# fmt: off
STAGES: tuple[FamilyStage, ...] = (
    FamilyStage(name="seed-xs", preset="nano-xs",
                steps=3600, warmup=200, learning_rate=2e-3, schedule="linear", seed=0),
    FamilyStage(name="trunk", preset="nano-xs", trained_on="seed-xs", mask_share=0.4,
                steps=5000, warmup=100, learning_rate=1e-3, schedule="cosine", seed=4),
    FamilyStage(name="nano-m", preset="nano-m", grown_from="trunk", mask_share=0.4,
                steps=2400, warmup=100, learning_rate=7e-4, schedule="cosine", seed=5),
    FamilyStage(name="nano-s", preset="nano-s", grown_from="trunk", teacher="nano-m", mask_share=0.4,
                steps=500, warmup=40, learning_rate=5e-4, schedule="cosine", seed=6),
    FamilyStage(name="nano-xs", preset="nano-xs", trained_on="trunk", teacher="nano-s", mask_share=0.4,
                steps=300, warmup=40, learning_rate=5e-4, schedule="cosine", seed=7),
    FamilyStage(name="nano-gpt", preset="nano-gpt",
                steps=3600, warmup=150, learning_rate=2e-3, schedule="cosine", seed=0),
)
# fmt: on
"""In the order in which they are trained."""

CHAIN = "nano"
"""The bundled chain, over the models that `BUNDLED_CHAINS` lists."""

SOURCES: dict[str, str] = {
    "swissprot201401_nr60k_le1022.fasta.gz": (
        "UniProt/Swiss-Prot, release 2014_01 (The UniProt Consortium, https://www.uniprot.org, CC BY 4.0), "
        "redundancy-reduced, 60,000 sequences of at most 1,022 residues: swissprot201401_nr60k_le1022.fasta.gz"
    )
}
"""What a card says of the data, by the file's name."""


def train_family(
    data: Annotated[
        Path, typer.Argument(help="FASTA file, plain or .gz; one sequence in twenty is held out.", metavar="DATA")
    ],
    out: Annotated[Path, typer.Option(help="A folder for each stage, the chain, the figures; what is there is kept.")],
    dms: Annotated[
        Path | None,
        typer.Option(
            help="Folder with wt.fasta and, for each of its ids, a mutational scan ID.csv.gz (or .csv).",
            show_default="none",
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Times the steps of each stage; 0.01 tries all of it.", min=1e-6)] = 1.0,
    figures_only: Annotated[
        bool, typer.Option("--figures-only", help="Train nothing: take the models that are in --out as they are.")
    ] = False,
    variants: Annotated[int, typer.Option(help="Most variants of a scan, drawn at random.", min=3)] = 1000,
    judged: Annotated[int, typer.Option(help="Most held-out proteins to judge by.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of these draws.", min=0)] = 0,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder that gets what ships of all this.", show_default="none")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on standard output.")] = False,
) -> None:
    """Train the bundled family again: every stage, the chain, the figures and the model cards."""
    import json

    from rich.console import Console

    from .family_figures import FigureOptions
    from .family_run import FamilyRun

    console = Console(stderr=True, soft_wrap=True)
    run = FamilyRun(data, out, device=device, console=console)
    if not figures_only:
        run.train(scale=scale)
    figures = run.figures(FigureOptions(dms=dms, variants=variants, judged=judged, seed=seed))
    run.write_cards(figures)
    if bundle is not None:
        run.bundle(bundle)
    if json_output:
        typer.echo(json.dumps(figures, allow_nan=False))
        return
    _print_figures(console, figures)


def _print_figures(console: Any, figures: dict[str, Any]) -> None:
    from .model_card import shown

    lines = [("unigram", figures["perplexity"]["unigram"]), *figures["perplexity"]["models"].items()]
    for name, each in lines:
        console.print(f"{name}: perplexity per residue {shown(each)}", highlight=False)
    for scan, found in figures.get("spearman", {}).get("scans", {}).items():
        words = ", ".join(f"{name} {shown(each)}" for name, each in found["models"].items())
        console.print(f"{scan}: Spearman {words}", markup=False, highlight=False)


if __name__ == "__main__":
    from ..engine.cli import app

    # Under its own name as a module the command is there before the package is installed anew.
    app.command("train-family")(train_family)
    app(["train-family", *sys.argv[1:]], prog_name="protnest")
