"""Embedding throughput of this machine: packed protnest beside fair-esm and transformers, with the machine's ceilings.

    python benchmarks/bench_embed.py --quick
    python benchmarks/bench_embed.py --shapes 8M,35M --pairs 5

Same random weights for all; embeddings are compared before anything is timed, and a difference ends the run with exit
code 1. See `benchmarks/README.md` for the method and for what each key of a row means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from protnest.benchmarks.ceiling import copy_gbytes_per_s
from protnest.benchmarks.comparison import SHAPES, Plan, compare
from protnest.benchmarks.lists import split_numbers, split_words
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.peers import PEER_MODULES, is_installed
from protnest.benchmarks.proteins import Proteins, make_up, sample_fasta
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.engine.device import PRECISIONS
from protnest.engine.errors import InputError
from protnest.kernels.hardware import multiplies_bf16
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

LIBRARY = ROOT.parent / "shared" / "data" / "sequences" / "uniprot20k_mmseqs2_DB.fasta.gz"
RESULTS = ROOT / "benchmarks" / "results" / "embed.jsonl"

# Of the sequences, the share on which parity is checked and budgets are tried.
_TRIED_SHARE = 0.3
_QUICK_SEQUENCES, _QUICK_PAIRS = 40, 3
_PRINTED_COLUMNS = 140
_CPU = torch.device("cpu")


def _proteins(fasta: Path | None, count: int, seed: int) -> Proteins:
    if fasta is None and not LIBRARY.is_file():
        return make_up(count=count, seed=seed)
    return sample_fasta(fasta or LIBRARY, count=count, seed=seed)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="residues/s, mean-pooled embeddings")
    for column in ("shape", "engine", "tokens a batch"):
        table.add_column(column)
    for column in ("residues/s (min to max)", "ours is faster by", "GFLOP/s", "of ceiling", "peak growth"):
        table.add_column(column, justify="right")
    for row in rows:
        faster, grown = row["ours_times_faster_median"], row["peak_growth_bytes"]
        slowest, fastest = row["residues_per_s_min"], row["residues_per_s_max"]
        low, high = row["ours_times_faster_min"], row["ours_times_faster_max"]
        table.add_row(
            row["shape"],
            f"{row['engine']} {row['precision']}",
            "one sequence" if row["budget_tokens"] == 1 else f"{row['budget_tokens']:,}",
            f"{row['residues_per_s_median']:,.0f} ({slowest:,.0f} to {fastest:,.0f})",
            "" if faster is None else f"{faster:.2f} ({low:.2f} to {high:.2f}) in {row['ours_precision']}",
            f"{row['gflops']:,.0f}",
            f"{row['percent_of_ceiling']:.0f} %",
            "" if grown is None else f"{grown / 1e6:,.0f} MB",
        )
    return table


def _watch(progress: Progress, shape: str) -> Callable[[int], Callable[[str], None]]:
    def begun(passes: int) -> Callable[[str], None]:
        task = progress.add_task(shape, total=passes, engine="")
        return lambda engine: progress.update(task, advance=1, engine=engine)

    return begun


def _run(shapes: Sequence[str], plan: Plan, facts: Row, console: Console) -> list[Row]:
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[engine]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        for shape in shapes:
            rows += [facts | row for row in compare(shape, SHAPES[shape], plan, begun=_watch(progress, shape))]
    return rows


def embed(
    quick: Annotated[bool, typer.Option("--quick", help="8M only, 40 sequences, 3 pairs.")] = False,
    shapes: Annotated[str, typer.Option(help="Published sizes, with commas between.")] = "8M,35M",
    sequences: Annotated[int, typer.Option(help="How many proteins to sample.", min=1)] = 200,
    pairs: Annotated[int, typer.Option(help="Turns of each peer with ours.", min=1)] = 5,
    precisions: Annotated[str, typer.Option(help="Of ours and transformers; fair-esm is always fp32.")] = "fp32,bf16",
    budgets: Annotated[
        str, typer.Option(help="Tokens a batch to choose among; 1 is one sequence at a time.")
    ] = "1,1024,2048,4096",
    pass_seconds: Annotated[
        float, typer.Option(help="A pair runs as many of the proteins as the slower engine does in this time.")
    ] = 15.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)] = None,
    fasta: Annotated[
        Path | None, typer.Option(help="Proteins; by default those beside the checkout, else made up ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sample and weights.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
) -> None:
    """Measure embedding throughput of this CPU beside peers, in interleaved pairs."""
    console = Console(stderr=True)
    chosen = ["8M"] if quick else split_words(shapes, list(SHAPES), "--shapes")
    # fp16 on a CPU is refused by protnest itself.
    wanted = split_words(precisions, [name for name in PRECISIONS if name != "fp16"], "--precisions")
    tried = split_numbers(budgets, "--budgets")
    if quick:
        sequences, pairs = min(sequences, _QUICK_SEQUENCES), min(pairs, _QUICK_PAIRS)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        proteins = _proteins(fasta, sequences, seed)
    except (InputError, ValueError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    console.print(
        f"{sequences} proteins ({proteins.source}), {proteins.residues:,} residues; {proteins.truncated} cut to 1,022"
    )
    if absent := [name for name in PEER_MODULES if not is_installed(name)]:
        console.print(f"[yellow]not installed, left out: {', '.join(absent)}[/yellow]")
    if "bf16" in wanted and not multiplies_bf16(_CPU):
        console.print(
            "[yellow]this CPU has no bf16 units: ours runs bf16 in fp32 units, peers run torch's emulation[/yellow]"
        )
    plan = Plan(
        sequences=proteins.sequences,
        budgets=tried,
        precisions=wanted,
        pairs=pairs,
        checked=max(1, round(_TRIED_SHARE * sequences)),
        device=_CPU,
        ceiling_rows=(1024, 4096),
        most_pass_seconds=pass_seconds,
        seed=seed,
    )
    facts = machine_facts(_CPU) | {
        "suite": "embed",
        "data": proteins.source,
        "sequences": sequences,
        "residues": proteins.residues,
        "truncated": proteins.truncated,
        "copy_gbytes_per_s": round(copy_gbytes_per_s(_CPU), 2),
    }
    try:
        rows = _run(chosen, plan, facts, console)
    except ParityError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    append_rows(out, rows)
    shown = Console()
    # A file or a pipe has no width of its own: rich would fold the table to 80 columns.
    (shown if shown.is_terminal else Console(width=_PRINTED_COLUMNS)).print(_table(rows))
    console.print(f"{len(rows)} rows appended to {out}")


if __name__ == "__main__":
    typer.run(embed)
