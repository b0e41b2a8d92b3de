"""Time and memory of the distillation loss: ours beside the published code, that compiled, and Liger-Kernel's part.

    python benchmarks/bench_kd.py --quick
    python benchmarks/bench_kd.py --pairs 5
    python benchmarks/bench_kd.py --operations linear_kd_loss --vocabularies 50257 --segments long --peers eager

Same made-up tensors for all; losses and gradients are compared before anything is timed, and a difference ends the run
with exit code 1. See `benchmarks/README.md` for the method and for what each key of a row means.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from protnest.benchmarks.ceiling import copy_gbytes_per_s
from protnest.benchmarks.kd_comparison import KDPlan, compare_kd
from protnest.benchmarks.kd_engines import COMPILED, LIGER, OURS, PEERS, liger_runs
from protnest.benchmarks.kd_problems import BOTH, FORWARD, OPERATIONS, SEGMENTS, Problem
from protnest.benchmarks.lists import split_numbers, split_words
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.engine.device import PRECISIONS
from protnest.kernels.kd_loss import choose_impl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

RESULTS = ROOT / "benchmarks" / "results" / "kd.jsonl"

# Up to this vocabulary a problem has many rows: tables of 9 MB at V = 33, of 206 MB at V = 50,257.
_SMALL_VOCABULARY = 1024
_SMALL_VOCABULARY_ROWS, _LARGE_VOCABULARY_ROWS = 65_536, 1024
_QUICK_SMALL_VOCABULARY_ROWS, _QUICK_LARGE_VOCABULARY_ROWS, _QUICK_PAIRS = 4096, 32, 3
# Compiling takes longer than all the rest of a quick run.
_QUICK_PEERS = ("eager", "chunked", LIGER)
_PRINTED_COLUMNS = 160
_VOCABULARIES = (33, 50_257)


def _rows_of(vocabulary: int, quick: bool) -> int:
    if vocabulary <= _SMALL_VOCABULARY:
        return _QUICK_SMALL_VOCABULARY_ROWS if quick else _SMALL_VOCABULARY_ROWS
    return _QUICK_LARGE_VOCABULARY_ROWS if quick else _LARGE_VOCABULARY_ROWS


def _device(name: str) -> torch.device:
    if name not in OURS:
        message = f"--device is {name!r}; allowed are {', '.join(OURS)}"
        raise typer.BadParameter(message)
    if name == "cuda" and not torch.cuda.is_available():
        message = "--device is 'cuda', but torch sees no CUDA GPU here"
        raise typer.BadParameter(message)
    return torch.device(name)


def _able_peers(names: Sequence[str], device: torch.device, console: Console) -> tuple[str, ...]:
    """Those that can run here; the others are named."""
    compiler = os.environ.get("CXX", "g++")
    reasons = {
        COMPILED: None if shutil.which(compiler) else f"torch.compile needs {compiler}",
        LIGER: None if liger_runs(device) else "needs liger-kernel and a CUDA GPU",
    }
    for name in names:
        if reasons.get(name):
            console.print(f"[yellow]left out: {name} ({reasons[name]})[/yellow]", highlight=False)
    return tuple(name for name in names if not reasons.get(name))


def kd_table(rows: Sequence[Row]) -> Table:
    table = Table(title=f"distillation loss, {rows[0]['precision']}")
    for column in ("problem", "direction", "engine"):
        table.add_column(column, no_wrap=True)
    for column in ("ms (min to max)", "ours is faster by", "of ceiling", "peak extra", "loss error"):
        table.add_column(column, justify="right")
    for row in rows:
        name = f"{row['operation']} V={row['vocabulary']:,} N={row['rows']:,} {row['segments']}"
        engine = row["engine"] if row["part"] == "whole" else f"{row['engine']} ({row['part']})"
        if row["failure"]:
            table.add_row(name, row["direction"], engine, row["failure"])
            continue
        faster, peak = row["ours_times_faster_median"], row["peak_extra_bytes"]
        low, high = row["ours_times_faster_min"], row["ours_times_faster_max"]
        table.add_row(
            name,
            row["direction"],
            engine,
            f"{row['ms_median']:,.1f} ({row['ms_min']:,.1f} to {row['ms_max']:,.1f})",
            "" if faster is None else f"{faster:.2f} ({low:.2f} to {high:.2f})",
            f"{row['percent_of_ceiling']:.0f} %",
            "" if peak is None else f"{peak / 1e6:,.0f} MB",
            f"{row['loss_error']:.0e}",
        )
    return table


def _run(problems: Sequence[Problem], plan: KDPlan, facts: Row, out: Path | None, console: Console) -> list[Row]:
    """Appends each problem's rows as soon as they are there, where there is a file for them."""
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[step]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(problems), step="")
        for problem in problems:
            progress.update(task, description=problem.name)
            found = compare_kd(problem, plan, after_step=lambda step: progress.update(task, step=step))
            found = [facts | row for row in found]
            if out is not None:
                append_rows(out, found)
            rows += found
            progress.advance(task)
    return rows


def measure(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rows, short segments, 3 pairs, no forward pass alone.")
    ] = False,
    operations: Annotated[str, typer.Option(help="With commas between.")] = ",".join(OPERATIONS),
    vocabularies: Annotated[str, typer.Option(help="Vocabulary sizes, with commas between.")] = ",".join(
        map(str, _VOCABULARIES)
    ),
    segments: Annotated[str, typer.Option(help="Of 1,024 rows, or as long as proteins.")] = ",".join(SEGMENTS),
    peers: Annotated[
        str | None, typer.Option(help=f"Of {','.join(PEERS)}; by default all, with --quick {','.join(_QUICK_PEERS)}.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of logits, hidden states and heads.")] = "fp32",
    rows: Annotated[
        int | None, typer.Option(help="Rows of logits; by default 65,536 at V=33, 1,024 at V=50,257.", min=1)
    ] = None,
    pairs: Annotated[int, typer.Option(help="Turns of each peer with ours.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of lengths and numbers.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
) -> None:
    """Measure the distillation loss beside peers, in interleaved pairs."""
    console = Console(stderr=True)
    where = _device(device)
    chosen = (
        split_words(operations, OPERATIONS, "--operations"),
        split_numbers(vocabularies, "--vocabularies"),
        [SEGMENTS[1]] if quick else split_words(segments, SEGMENTS, "--segments"),
    )
    if precision not in PRECISIONS:
        message = f"--precision is {precision!r}, expected one of {', '.join(PRECISIONS)}"
        raise typer.BadParameter(message)
    problems = [
        Problem(
            operation=operation,
            vocabulary=vocabulary,
            rows=rows or _rows_of(vocabulary, quick),
            segments=kind,
            precision=precision,
            seed=seed,
        )
        for operation, vocabulary, kind in itertools.product(*chosen)
    ]
    wanted = None if peers is None else split_words(peers, PEERS, "--peers")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        found = run_kd(problems, where, console, peers=wanted, pairs=pairs, quick=quick, out=out)
    except (ParityError, RuntimeError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    shown = Console()
    # A file or a pipe has no width of its own: rich would fold the table to 80 columns.
    (shown if shown.is_terminal else Console(width=_PRINTED_COLUMNS)).print(kd_table(found))
    console.print(f"{len(found)} rows appended to {out}")


def usual_problems(*, quick: bool, seed: int = 0) -> list[Problem]:
    """Both operations at V = 33 and 50,257 in fp32, in every kind of segment; with `quick` few rows and one kind."""
    kinds = [SEGMENTS[1]] if quick else SEGMENTS
    return [
        Problem(
            operation=operation,
            vocabulary=vocabulary,
            rows=_rows_of(vocabulary, quick),
            segments=kind,
            precision="fp32",
            seed=seed,
        )
        for operation, vocabulary, kind in itertools.product(OPERATIONS, _VOCABULARIES, kinds)
    ]


def run_kd(
    problems: Sequence[Problem],
    device: torch.device,
    console: Console,
    *,
    peers: Sequence[str] | None = None,
    pairs: int = 5,
    quick: bool = False,
    out: Path | None = None,
) -> list[Row]:
    """Rows of every problem, also appended to `out` as soon as they are there.

    Raises:
        ParityError: a loss or a gradient is wrong.
        RuntimeError: ours cannot run here.
    """
    usual = _QUICK_PEERS if quick else PEERS
    able = _able_peers(usual if peers is None else peers, device, console)
    choose_impl("kd_loss", OURS[device.type], torch.empty(0, device=device))
    facts = machine_facts(device) | {"suite": "kd", "copy_gbytes_per_s": round(copy_gbytes_per_s(device), 2)}
    plan = KDPlan(
        device=device,
        copy_gbytes_per_s=facts["copy_gbytes_per_s"],
        pairs=min(pairs, _QUICK_PAIRS) if quick else pairs,
        directions=[BOTH] if quick else [FORWARD, BOTH],
        peers=able,
    )
    return _run(problems, plan, facts, out, console)


if __name__ == "__main__":
    typer.run(measure)
