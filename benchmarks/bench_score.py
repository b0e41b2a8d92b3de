"""Scores of variants beside fair-esm's own loop, on the same weights, in interleaved pairs.

    python benchmarks/bench_score.py --quick
    python benchmarks/bench_score.py --threads 1 --pairs 5
    python benchmarks/bench_score.py --device cuda

Masked marginals of BLAT_ECOLX's singles with a real 8M checkpoint where they lie beside the checkout, else of a made-up
protein with random weights; then what each shortcut gains, and unmasked marginals of all scans that are there. Scores
are compared before anything is timed, and a difference ends the run with exit code 1. See `benchmarks/README.md` for
the method and for what each key of a row means.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from protnest.benchmarks.bench_embed import wide_console
from protnest.benchmarks.lists import split_words
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.benchmarks.score_comparison import ScorePlan, compare_scores, score_scans
from protnest.benchmarks.score_engines import SCANS, find_problem
from protnest.engine.device import resolve_device
from protnest.engine.errors import InputError
from rich.console import Console
from rich.table import Table

RESULTS = ROOT / "benchmarks" / "results" / "score.jsonl"
PRECISIONS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp16")}

_CPU_POSITIONS = 48
_CPU_COPIES = (1, 4, 16)
# On a GPU a pass over all positions takes a second, and larger batches may be the fastest.
_CUDA_POSITIONS = 10_000
_CUDA_COPIES = (1, 4, 16, 64, 256)


def plan_scores(
    device: torch.device,
    *,
    precisions: str | None = None,
    positions: int | None = None,
    pairs: int | None = None,
    quick: bool = False,
) -> ScorePlan:
    """What is measured, as the options say.

    Raises:
        typer.BadParameter: a precision is unknown or does not run on this device.
    """
    allowed, on_cpu = PRECISIONS[device.type], device.type == "cpu"
    plan = ScorePlan(
        precisions=split_words(precisions or ",".join(allowed), allowed, "--precisions"),
        pairs=pairs or 5,
        positions=positions or (_CPU_POSITIONS if on_cpu else _CUDA_POSITIONS),
        copies=_CPU_COPIES if on_cpu else _CUDA_COPIES,
        device=device,
    )
    return plan.quick() if quick else plan


def run_scores(plan: ScorePlan, console: Console, *, model: str | None = None, seed: int = 0) -> list[Row]:
    """Rows of the comparison, then those of the scans.

    Raises:
        ParityError: scores of ours are wrong.
        InputError: there is no such model, or a scan cannot be read.
        RuntimeError: fair-esm is not installed, or has other weights.
    """
    problem = find_problem(model, scans=SCANS, seed=seed)
    console.print(
        f"{problem.model}; {problem.protein}: {len(problem.wild_type)} residues, {len(problem.variants):,} variants of "
        f"{len(problem.touched)}",
        highlight=False,
    )
    facts = machine_facts(plan.device) | {"suite": "score"}
    rows = compare_scores(problem, plan, tell=lambda text: console.print(text, highlight=False))
    console.print("unmasked marginals of every scan", highlight=False)
    scans = score_scans(problem.encoder.to(plan.device), SCANS)
    if not scans:
        console.print(f"[yellow]left out: there are no scans in {SCANS}[/yellow]", highlight=False)
    return [facts | row for row in [*rows, *({"model": problem.model} | row for row in scans)]]


def score_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each part that the rows have."""
    tables = []
    for part, build in (("pairs", _pairs_table), ("gains", _gains_table), ("whole", _whole_table), ("scans", _scans)):
        own = [row for row in rows if row["part"] == part]
        tables += [build(own)] if own else []
    return tables


def _ratio(row: Row, name: str) -> str:
    """Median of interleaved pairs, with the smallest and the largest; empty where it was not taken."""
    median, low, high = (row[f"{name}_{end}"] for end in ("median", "min", "max"))
    return "" if median is None else f"{median:.2f} ({low:.2f} to {high:.2f})"


def _agreement(row: Row) -> tuple[str, str]:
    return f"{row['max_difference']:.2g}", f"{row['spearman']:.5f}"


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in words:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _pairs_table(rows: Sequence[Row]) -> Table:
    title = f"masked marginals, {rows[0]['positions']} positions each, medians of {rows[0]['pairs']} interleaved pairs"
    numbers = ("ms a position", "times faster", "in CPU time", "whole protein", "difference", "Spearman")
    table = _table(title, ["engine"], numbers)
    for row in rows:
        whole = row["times_faster_whole"]
        table.add_row(
            f"{row['engine']} {row['precision']}",
            _ratio(row, "ms_per_position"),
            _ratio(row, "times_faster"),
            _ratio(row, "times_faster_cpu"),
            "" if whole is None else f"{whole:.2f}",
            *_agreement(row),
        )
    return table


def _gains_table(rows: Sequence[Row]) -> Table:
    table = _table(
        "what gains it: ours without it over ours", ["precision", "gain"], ["times faster", "in CPU time", "share"]
    )
    for row in rows:
        share = row["percent_of_whole"]
        table.add_row(
            row["precision"],
            row["gain"],
            _ratio(row, "times_faster"),
            _ratio(row, "times_faster_cpu"),
            "" if share is None else f"{share:.0f} %",
        )
    return table


def _whole_table(rows: Sequence[Row]) -> Table:
    numbers = ("positions", "seconds", "CPU seconds", "times faster", "in CPU time", "difference", "Spearman")
    table = _table("the whole protein, once", ["engine"], numbers)
    for row in rows:
        cpu, faster_cpu = row["cpu_seconds"], row["times_faster_cpu"]
        table.add_row(
            f"{row['engine']} {row['precision']}",
            str(row["positions"]),
            f"{row['seconds']:.1f}",
            "" if cpu is None else f"{cpu:.1f}",
            f"{row['times_faster']:.2f}",
            "" if faster_cpu is None else f"{faster_cpu:.2f}",
            *_agreement(row),
        )
    return table


def _scans(rows: Sequence[Row]) -> Table:
    numbers = ("residues", "variants", "reading s", "scoring s", "together s")
    table = _table("unmasked marginals of the scans", ["scan"], numbers)
    for row in rows:
        seconds = (f"{row[key]:.1f}" for key in ("read_seconds", "score_seconds", "seconds"))
        table.add_row(row["data"], f"{row['residues']:,}", f"{row['variants']:,}", *seconds)
    return table


def score(
    quick: Annotated[
        bool, typer.Option("--quick", help="16 positions, 3 pairs, the whole protein not: about 2 minutes.")
    ] = False,
    pairs: Annotated[int, typer.Option(help="Turns of fair-esm's loop with ours.", min=2)] = 5,
    positions: Annotated[
        int | None,
        typer.Option(help="Of each pass, spread over the protein.", min=1, show_default="48; on a GPU all"),
    ] = None,
    precisions: Annotated[
        str | None, typer.Option(help="Of ours, with commas between.", show_default="all of the device's")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name, folder or .pt file.", show_default="the 8M checkpoint beside the checkout, else random weights"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "cpu",
    seed: Annotated[int, typer.Option(help="Of made-up weights and protein.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Measure scores of variants beside fair-esm's own loop, in interleaved pairs."""
    console = Console(stderr=True)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        where = resolve_device(device)
        plan = plan_scores(where, precisions=precisions, positions=positions, pairs=pairs, quick=quick)
        rows = run_scores(plan, console, model=model, seed=seed)
    except (ParityError, InputError, ValueError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    append_rows(out, rows)
    if json_output:
        typer.echo(json.dumps({"suite": "score", "device": str(where), "rows": rows}, allow_nan=False))
    else:
        for table in score_tables(rows):
            wide_console().print(table)
    console.print(f"{len(rows)} rows appended to {out}", highlight=False)


if __name__ == "__main__":
    typer.run(score)
