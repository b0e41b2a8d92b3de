"""Decoders fine-tuned on few proteins of a family: perplexity, and designs that the family's profiles recognise.

    python benchmarks/study_finetune.py --model a=DIR --model b=DIR --family lysozymes.fasta.gz --out study
    python benchmarks/study_finetune.py --model a=DIR --family lysozymes.fasta.gz --out study --quick

All decoders get the same proteins, shares, seeds and limits of length. `--out` gets cells/, a JSON file each as soon as
it is done, so that the same command goes on after a kill; designs/; families/; and at the end study.md and study.jsonl.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from protnest.benchmarks.finetune_study import Cell, StudyModel, plan_cells, read_model, run_cells
from protnest.benchmarks.finetune_study_family import StudyFamily, StudyPlan, family_name, read_study_family
from protnest.benchmarks.finetune_study_report import draw_study, study_markdown
from protnest.benchmarks.lists import split_numbers
from protnest.benchmarks.rows import Row
from protnest.engine.atomic import write_atomically
from protnest.engine.errors import InputError
from protnest.engine.run_folder import enter_folder
from protnest.training.finetuning import Callbacks
from protnest.training.hmm_hits import check_pyhmmer
from protnest.training.identity import check_aligner
from protnest.training.score_plot import check_plot
from protnest.training.training_progress import TrainingProgress
from rich.console import Console

_NAME = re.compile(r"[A-Za-z0-9_.]+")
_DEFAULT = StudyPlan()


def parse_models(given: Sequence[str]) -> dict[str, Path]:
    """Folders by name, of options spelt NAME=DIR.

    Raises:
        typer.BadParameter: one is spelt otherwise, or a name is there twice.
    """
    folders: dict[str, Path] = {}
    for each in given:
        name, found, folder = each.partition("=")
        if not (found and folder and _NAME.fullmatch(name)):
            message = f"--model {each}: expected NAME=DIR, the name of letters, digits, _ and ."
            raise typer.BadParameter(message)
        if name in folders:
            message = f"--model {each}: {name!r} is there twice"
            raise typer.BadParameter(message)
        folders[name] = Path(folder)
    return folders


def read_all(
    models: dict[str, Path], files: Sequence[Path], out: Path, plan: StudyPlan, console: Console
) -> tuple[list[StudyModel], list[StudyFamily]]:
    """All that can be wrong is found before anything is tuned.

    Raises:
        InputError: as `read_model` and `read_study_family`, or two families have one name.
    """
    names = [family_name(path) for path in files]
    if twice := [name for name in names if names.count(name) > 1]:
        message = f"two families are called {twice[0]}: give their files different names"
        raise InputError(message)
    decoders = [read_model(name, folder) for name, folder in models.items()]
    families = []
    for path in files:
        for seed in range(plan.seeds):
            families.append(read_study_family(path, out, plan, seed=seed))
            _tell_family(families[-1], console)
    return decoders, families


def _tell_family(family: StudyFamily, console: Console) -> None:
    facts = family.facts
    known, of = facts["recognised_test"], facts["profiles"]
    text = f"{family.name}, seed {family.seed}: {facts['train']:,} proteins for training; {of} profiles recognise "
    text += f"{100 * known['value']:.0f} % of {known['n']} natural ones of the test share"
    if family.skipped:
        text += f"; skipped: N = {', '.join(map(str, family.skipped))}, all {facts['train']:,} stand in"
    console.print(text, highlight=False)


def run_study(
    models: dict[str, Path], files: Sequence[Path], out: Path, plan: StudyPlan, console: Console
) -> list[Row]:
    """Runs what is not there yet, and writes study.md and study.jsonl.

    Raises:
        InputError: a model or family cannot be used, `out` holds cells of other settings, or another run is in it.
    """
    with enter_folder(out):
        decoders, families = read_all(models, files, out, plan, console)
        cells = plan_cells(decoders, families, plan, out)
        started = time.perf_counter()

        def tell(place: int, cell: Cell, row: Row, again: bool) -> None:
            after, hits = row["test"]["after"]["value"], [each["hits"]["value"] for each in row["designs"]]
            shown = " and ".join(f"{100 * each:.1f} %" for each in hits)
            at = "was there" if again else f"{time.perf_counter() - started:,.0f} s"
            text = f"{place + 1} of {len(cells)}: {cell.name}: perplexity {after:.2f}, hits {shown} ({at})"
            console.print(text, highlight=False)

        @contextmanager
        def follow(cell: Cell) -> Iterator[Callbacks]:
            with TrainingProgress(console, cell.name) as progress:
                yield Callbacks(on_start=progress.start, after_step=progress.stepped)

        rows = run_cells(cells, tell=tell, follow=follow)
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        write_atomically(out / "study.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
        text = study_markdown(rows)
        write_atomically(out / "study.md", lambda path: path.write_text(text, encoding="utf-8"))
        return rows


def measure(
    model: Annotated[list[str], typer.Option(help="NAME=DIR: a decoder, as often as there are.")],
    family: Annotated[list[Path], typer.Option(help="FASTA file of a family, plain or .gz, as often as there are.")],
    out: Annotated[Path, typer.Option(help="Folder of the study; a killed one goes on from here.")],
    n: Annotated[
        str,
        typer.Option("--n", help="Proteins to train on, with commas between; all that there are for more."),
    ] = ",".join(map(str, _DEFAULT.sizes)),
    seeds: Annotated[int, typer.Option(help="How many, from 0: each has other shares, orders and designs.", min=1)] = 1,
    generate: Annotated[int, typer.Option(help="Designs of each cell and temperature.", min=1)] = _DEFAULT.designs,
    epochs: Annotated[int, typer.Option(help="Most passes over the proteins.", min=1)] = _DEFAULT.epochs,
    seen: Annotated[
        int, typer.Option(help="Most proteins that a tuning sees, repeats counted; 0 for no limit.", min=0)
    ] = _DEFAULT.seen,
    judged: Annotated[
        int, typer.Option(help="Most proteins of the validation and the test share.", min=1)
    ] = _DEFAULT.judged,
    identity: Annotated[
        float, typer.Option(help="Proteins as alike as this are never in two shares.")
    ] = _DEFAULT.identity,
    quick: Annotated[bool, typer.Option("--quick", help="N = 20, 2 epochs, 20 designs.")] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture: .png, .svg or .pdf.", show_default="none")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Fine-tune decoders on few proteins, judge them and their designs."""
    console = Console(stderr=True, soft_wrap=True)
    if threads is not None:
        torch.set_num_threads(threads)
    plan = StudyPlan(
        sizes=tuple(split_numbers(n, "--n")),
        seeds=seeds,
        epochs=epochs,
        seen=seen,
        designs=generate,
        judged=judged,
        identity=identity,
        device=device,
    )
    try:
        check_pyhmmer()
        check_aligner()
        if plot is not None:
            check_plot(plot)
        rows = run_study(parse_models(model), family, out, plan.quick() if quick else plan, console)
        if plot is not None:
            draw_study(plot, rows)
    except InputError as error:
        console.print(f"error: {error}", highlight=False, markup=False)
        raise typer.Exit(1) from error
    console.print(f"{len(rows)} cells; the table is {out / 'study.md'}", highlight=False)


if __name__ == "__main__":
    typer.run(measure)
