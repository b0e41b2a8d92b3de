"""Embedding throughput of this machine: packed protnest beside its peers, with the machine's ceilings.

    python benchmarks/bench_embed.py --quick
    python benchmarks/bench_embed.py --shapes 8M,35M,150M --mix uniprot,uniform,antibody --pairs 5
    python benchmarks/bench_embed.py --breakdown --shapes 8M,150M        # where a pass of ours spends its time
    python benchmarks/bench_embed.py --growth --shapes 8M,35M            # how time grows with length and batch

Same random weights for all; embeddings are compared before anything is timed, and a difference ends the run with exit
code 1. See `benchmarks/README.md` for the method and for what each key of a row means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from protnest.benchmarks.breakdown import STAGES, break_down
from protnest.benchmarks.comparison import SHAPES
from protnest.benchmarks.embed_suite import (
    PEERS,
    EmbedSettings,
    budgets_for,
    choose_proteins,
    embed_table,
    run_embed,
    say_what_is_allowed,
    survey,
    verdict_table,
)
from protnest.benchmarks.growth import grow
from protnest.benchmarks.lists import split_numbers, split_words
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.peers import INT8, Lineup, Protnest, build_lineup, random_encoder
from protnest.benchmarks.proteins import MIXES
from protnest.benchmarks.rows import ROOT, Row, append_rows
from protnest.engine.device import PRECISIONS, precision_name, resolve_precision
from protnest.engine.errors import InputError
from rich.console import Console
from rich.table import Table

RESULTS = ROOT / "benchmarks" / "results" / "embed.jsonl"
# fp16 on a CPU is refused by protnest itself.
CPU_PRECISIONS = (*(name for name in PRECISIONS if name != "fp16" and name != INT8), INT8)
_PRINTED_COLUMNS = 160


def run_breakdown(settings: EmbedSettings, console: Console) -> list[Row]:
    """A row for each mix, shape and precision of ours, at the largest budget."""
    here = survey(settings, console)
    rows: list[Row] = []
    for mix in settings.mixes:
        proteins = choose_proteins(settings, mix)
        for shape in settings.shapes:
            encoder = random_encoder(SHAPES[shape], seed=settings.seed)
            for precision in here.precisions:
                engine = Protnest(encoder, precision=precision, device=settings.device)
                about = break_down(engine, proteins.sequences, max(budgets_for(settings, mix)))
                facts = {"suite": "breakdown", "mix": mix, "data": proteins.source, "residues": proteins.residues}
                rows.append(here.facts | facts | {"shape": shape} | about)
    return rows


def run_growth(settings: EmbedSettings, console: Console) -> list[Row]:
    """Rows of every engine over lengths, batches and shapes.

    Raises:
        ParityError: an engine's answer is wrong.
    """
    here = survey(settings, console)
    say_what_is_allowed(here.precisions, console)
    rows: list[Row] = []
    for shape in settings.shapes:
        lineup = _growth_lineup(settings, shape, here.precisions, here.peers, here.esm_cpp_python)
        try:
            found = grow(shape, SHAPES[shape], lineup, settings.device, turns=settings.pairs, seed=settings.seed)
        finally:
            lineup.close()
        rows += [here.facts | {"suite": "growth"} | row for row in found]
    return rows


def _growth_lineup(
    settings: EmbedSettings, shape: str, precisions: Sequence[str], peers: Sequence[str], python: Path | None
) -> Lineup:
    if peers:
        return build_lineup(
            SHAPES[shape],
            seed=settings.seed,
            precisions=precisions,
            device=settings.device,
            peers=peers,
            esm_cpp_python=python,
        )
    encoder = random_encoder(SHAPES[shape], seed=settings.seed)
    ours = [Protnest(encoder, precision=precision, device=settings.device) for precision in precisions]
    default = precision_name(resolve_precision("auto", settings.device))
    return Lineup(ours=ours, peers=[], reference=ours[0], default_precision=default)


def breakdown_table(rows: Sequence[Row]) -> Table:
    """Shares of a pass, in percent."""
    table = Table(title="where a pass of ours spends its time, %")
    for column in ("shape", "mix", "precision", *STAGES):
        table.add_column(column, justify="right" if column in STAGES else "left")
    for row in rows:
        shares = (f"{100 * row['shares'][name]:.1f}" for name in STAGES)
        table.add_row(row["shape"], row["mix"], row["precision"], *shares)
    return table


def growth_table(rows: Sequence[Row]) -> Table:
    """Milliseconds over residues and sequences."""
    table = Table(title="how time grows")
    for column in ("shape", "engine", "sequences", "residues each", "ms (min to max)", "residues/s", "GFLOP/s"):
        table.add_column(column, justify="left" if column in ("shape", "engine") else "right")
    for row in rows:
        table.add_row(
            row["shape"],
            f"{row['engine']} {row['precision']}",
            str(row["batch_sequences"]),
            str(row["residues_each"]),
            f"{row['ms_median']:,.1f} ({row['ms_min']:,.1f} to {row['ms_max']:,.1f})",
            f"{row['residues_per_s_median']:,.0f}",
            f"{row['gflops']:,.0f}",
        )
    return table


def wide_console() -> Console:
    """Standard output; a file or a pipe has no width of its own, and rich would fold tables to 80 columns."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=_PRINTED_COLUMNS)


def embed(
    quick: Annotated[bool, typer.Option("--quick", help="8M only, 40 sequences, 3 pairs of 3 seconds.")] = False,
    shapes: Annotated[str, typer.Option(help="Published sizes, with commas between.")] = "8M,35M",
    mix: Annotated[str, typer.Option(help=f"Lengths: {', '.join(MIXES)}, with commas between.")] = "uniprot",
    sequences: Annotated[int, typer.Option(help="How many proteins to sample.", min=1)] = 200,
    pairs: Annotated[int, typer.Option(help="Turns of each peer with ours.", min=1)] = 5,
    precisions: Annotated[
        str, typer.Option(help="Of ours and, but for int8, transformers; fair-esm is always fp32.")
    ] = ",".join(CPU_PRECISIONS),
    peers: Annotated[str, typer.Option(help="Packages to compare with, with commas between, or none.")] = (
        ",".join(PEERS)
    ),
    budgets: Annotated[
        str, typer.Option(help="Tokens a batch to choose among; 1 is one sequence at a time.")
    ] = "1,1024,2048,4096",
    pass_seconds: Annotated[
        float, typer.Option(help="A pair runs as many of the proteins as the slower engine does in this time.")
    ] = 15.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)] = None,
    esm_cpp_python: Annotated[
        Path | None,
        typer.Option(help="Python of the environment that has esm-cpp.", show_default="out/esm-cpp/bin/python"),
    ] = None,
    fasta: Annotated[
        Path | None, typer.Option(help="Proteins; by default those beside the checkout, else made up ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sample and weights.")] = 0,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Instead: shares of a pass of ours.")] = False,
    growth: Annotated[bool, typer.Option("--growth", help="Instead: time over length, batch and shape.")] = False,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
) -> None:
    """Measure embedding throughput of this CPU beside peers, in interleaved pairs."""
    console = Console(stderr=True)
    if breakdown and growth:
        message = "--breakdown and --growth are two runs"
        raise typer.BadParameter(message)
    try:
        settings = EmbedSettings(
            shapes=split_words(shapes, list(SHAPES), "--shapes"),
            mixes=split_words(mix, MIXES, "--mix"),
            sequences=sequences,
            pairs=pairs,
            precisions=split_words(precisions, CPU_PRECISIONS, "--precisions"),
            budgets=split_numbers(budgets, "--budgets"),
            pass_seconds=pass_seconds,
            peers=() if peers == "none" else split_words(peers, PEERS, "--peers"),
            esm_cpp_python=esm_cpp_python,
            fasta=fasta,
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if quick:
        settings = settings.quick()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        rows, tables = measure_embed(settings, console, breakdown=breakdown, growth=growth)
    except (ParityError, InputError, ValueError, RuntimeError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    append_rows(out, rows)
    shown = wide_console()
    for table in tables:
        shown.print(table)
    console.print(f"{len(rows)} rows appended to {out}")


def measure_embed(
    settings: EmbedSettings, console: Console, *, breakdown: bool = False, growth: bool = False
) -> tuple[list[Row], list[Table]]:
    """Rows to write, and tables to show."""
    if breakdown:
        rows = run_breakdown(settings, console)
        return rows, [breakdown_table(rows)]
    if growth:
        rows = run_growth(settings, console)
        return rows, [growth_table(rows)]
    rows, verdicts = run_embed(settings, console)
    return rows + verdicts, [embed_table(rows), *([verdict_table(verdicts)] if verdicts else [])]


if __name__ == "__main__":
    typer.run(embed)
