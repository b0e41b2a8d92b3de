"""Generation beside transformers' pipeline and its `generate`, on the same weights, in interleaved pairs.

    python benchmarks/bench_generate.py --quick
    python benchmarks/bench_generate.py --shapes tiny --pairs 5
    python benchmarks/bench_generate.py --device cuda

Shapes are those of ProtGPT2 and its published students, with random weights. The pipeline runs one sequence a call, as
published; ours runs singly and in batches, transformers' `generate` in batches. Likelihoods and the likeliest sequence
are compared before anything is timed, and a difference ends the run with exit code 1. `benchmarks/README.md` has the
method and what each key of a row means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from protnest.benchmarks.bench_embed import wide_console
from protnest.benchmarks.generate_comparison import GeneratePlan, compare_generation, family_rows
from protnest.benchmarks.generate_engines import OURS
from protnest.benchmarks.generate_problems import SHAPE_NAMES, Problem
from protnest.benchmarks.lists import split_words
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.published_generation import MAX_TOKENS, published_rows
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.engine.decoder_config import DECODER_SHAPES
from protnest.engine.device import resolve_device
from protnest.engine.errors import InputError
from protnest.kernels.hardware import multiplies_bf16
from rich.console import Console
from rich.table import Table

RESULTS = ROOT / "benchmarks" / "results" / "generate.jsonl"
PRECISIONS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp16")}

_QUICK_SHAPES = ("tiny", "micro")
_QUICK_TOKENS = 24
# On a CPU a batch of the large ones takes seconds a step.
_FEWER_TOKENS = {"protgpt2": 24, "medium": 64}


def plan_generation(
    device: torch.device,
    *,
    precisions: str | None = None,
    pairs: int | None = None,
    batch: int | None = None,
    memory: bool = True,
    seed: int = 0,
    quick: bool = False,
) -> GeneratePlan:
    """How it is measured, as the options say.

    Raises:
        typer.BadParameter: a precision is unknown or does not run on this device.
    """
    allowed = PRECISIONS[device.type]
    plan = GeneratePlan(
        precisions=split_words(precisions or ",".join(allowed), allowed, "--precisions"),
        # transformers takes what is fastest for it, too, where the hardware has it.
        peer_precisions=("fp32", "bf16") if multiplies_bf16(device) else ("fp32",),
        pairs=pairs or 5,
        batch=batch or 64,
        memory=memory,
        device=device,
        seed=seed,
    )
    return plan.quick() if quick else plan


def plan_problems(
    device: torch.device,
    *,
    shapes: str | None = None,
    tokens: int | None = None,
    seed: int = 0,
    quick: bool = False,
) -> list[Problem]:
    """What it is measured with: the largest model first.

    Raises:
        typer.BadParameter: a shape is unknown, or the model has no places for so many tokens.
    """
    names = split_words(
        shapes or ",".join(_QUICK_SHAPES if quick else DECODER_SHAPES), list(DECODER_SHAPES), "--shapes"
    )
    fewer = _FEWER_TOKENS if device.type == "cpu" else {}

    def length(shape: str) -> int:
        return tokens or min(fewer.get(shape, MAX_TOKENS), _QUICK_TOKENS if quick else MAX_TOKENS)

    try:
        return [Problem(shape=shape, tokens=length(shape), seed=seed) for shape in DECODER_SHAPES if shape in names]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def run_generation(
    problems: Sequence[Problem],
    plan: GeneratePlan,
    console: Console,
    *,
    keep: Callable[[Sequence[Row]], object] = lambda rows: None,
) -> list[Row]:
    """Rows of every shape, then those of the family, then the published ones.

    Args:
        problems: what is generated with.
        plan: how it is measured.
        console: told what begins.
        keep: given the rows of each shape once they are there, then the others, so that a run which is killed leaves
            what it has.

    Raises:
        ParityError: an answer of ours is wrong, or sequences have other lengths than they should.
        RuntimeError: transformers is not installed, or a process that watches memory failed.
    """

    def tell(text: str) -> None:
        console.print(text, highlight=False)

    if "bf16" in plan.precisions and not multiplies_bf16(plan.device):
        tell("bf16: no units for it here, so that its products run in fp32")
    facts = machine_facts(plan.device) | {"suite": "generate"}
    rows: list[Row] = []
    for problem in problems:
        rows += (found := [facts | row for row in compare_generation(problem, plan, tell)])
        keep(found)
    rows += (others := [facts | row for row in [*family_rows(rows), *published_rows()]])
    keep(others)
    return rows


def generation_tables(rows: Sequence[Row]) -> list[Table]:
    """Speed of each shape, then the family's, then the published table."""
    tables = []
    for shape in dict.fromkeys(row["shape"] for row in rows if row["part"] == "speed"):
        tables.append(_speed_table([row for row in rows if row["part"] == "speed" and row["shape"] == shape]))
    family = [row for row in rows if row["part"] == "family"]
    published = [row for row in rows if row["part"] == "published"]
    tables += [_family_table(family, published)] if family else []
    tables += [_published_table(published)] if published else []
    return tables


def _ends(row: Row, name: str, digits: int) -> str:
    """Median with the smallest and the largest; empty where it was not taken."""
    median, low, high = (row[f"{name}_{end}"] for end in ("median", "min", "max"))
    return "" if median is None else f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _mega(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f}"


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in words:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _engine(row: Row) -> str:
    return f"{row['engine']} {row['precision']}"


def _speed_table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    title = (
        f"{first['shape']}, {SHAPE_NAMES.get(first['shape'], 'other')}: {first['tokens']} tokens a sequence, medians "
        f"of {first['pairs']} turns"
    )
    numbers = ("batch", "residues/s", "first s", "pipeline x", "generate x", "ms a step", "of ceiling", "peak MB")
    table = _table(title, ["engine"], numbers)
    for row in rows:
        table.add_row(
            _engine(row),
            str(row["batch"]),
            _ends(row, "residues_per_s", 0),
            _number(row["first_sequence_seconds_median"], 2),
            _ends(row, "times_pipeline", 2),
            _ends(row, "times_generate", 2),
            _number(row["ms_per_step_median"]),
            f"{row['percent_of_ceiling']:.0f} % of {row['ceiling']}",
            _mega(row["peak_bytes"]),
        )
    return table


def _family_table(rows: Sequence[Row], published: Sequence[Row]) -> Table:
    """Teacher and students as the published table has them, engine by engine; the published rows first."""
    title = f"the family, at {MAX_TOKENS} tokens a sequence; ratios to the teacher, 774M"
    numbers = ("batch", "s/sequence", "sequences/min", "residues/s", "x a sequence", "x a residue", "peak MiB")
    table = _table(title, ["engine", "shape"], (*numbers, "weights MiB", "hours for 10^6"))
    for row in [*published, *sorted(rows, key=lambda row: (row["engine"] == OURS, _engine(row), row["batch"]))]:
        table.add_row(
            _engine(row),
            SHAPE_NAMES.get(row["shape"], row["shape"]),
            str(row["batch"]),
            _number(row["seconds_per_sequence"], 3),
            _number(row["sequences_per_minute"]),
            _number(row["residues_per_s"], 0),
            _number(row["times_faster_per_sequence"], 2),
            _number(row["times_faster_per_residue"], 2),
            _number(row["peak_mib"], 0),
            _number(row["weights_mib"], 0),
            _number(row["hours_per_million"], 1),
        )
    return table


def _published_table(rows: Sequence[Row]) -> Table:
    numbers = ("sequences/min", "residues/s", "x a sequence", "x a residue", "hours for 10^6", "claimed hours")
    table = _table("the published table recomputed from its seconds and lengths", ["shape"], numbers)
    for row in rows:
        table.add_row(
            SHAPE_NAMES[row["shape"]],
            _number(row["recomputed_sequences_per_minute"]),
            _number(row["recomputed_residues_per_s"], 0),
            _number(row["recomputed_per_sequence"], 2),
            _number(row["recomputed_per_residue"], 2),
            _number(row["hours_per_million"]),
            _number(row["claimed_hours_per_million"], 0),
        )
    return table


def generate(
    quick: Annotated[
        bool, typer.Option("--quick", help="39M and 16M, 24 tokens, 3 turns: about 3 minutes on one core.")
    ] = False,
    shapes: Annotated[
        str | None,
        typer.Option(
            help=f"Of {', '.join(DECODER_SHAPES)}, with commas between.", show_default="all; quick tiny,micro"
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Of each sequence, the two of the prompt counted.",
            min=3,
            show_default="200; on a CPU protgpt2 24, medium 64; quick 24",
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Turns of transformers with ours.", min=2)] = 5,
    batch: Annotated[int, typer.Option(help="Sequences of a batch.", min=2)] = 64,
    precisions: Annotated[
        str | None, typer.Option(help="Of ours, with commas between.", show_default="all of the device's")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Watch each engine's memory in a process of its own.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "cpu",
    seed: Annotated[int, typer.Option(help="Of weights and random numbers.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Measure generation beside transformers' pipeline and its batches, in interleaved pairs."""
    console = Console(stderr=True)
    torch.set_num_threads(threads)
    try:
        where = resolve_device(device)
        problems = plan_problems(where, shapes=shapes, tokens=tokens, seed=seed, quick=quick)
        plan = plan_generation(
            where, precisions=precisions, pairs=pairs, batch=batch, memory=memory, seed=seed, quick=quick
        )
        rows = run_generation(problems, plan, console, keep=lambda rows: append_rows(out, rows))
    except (ParityError, InputError, ValueError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    if json_output:
        typer.echo(json.dumps({"suite": "generate", "device": str(where), "rows": rows}, allow_nan=False))
    else:
        for table in generation_tables(rows):
            wide_console().print(table)
    console.print(f"{len(rows)} rows appended to {out}", highlight=False)


if __name__ == "__main__":
    typer.run(generate)
