"""`protnest bench`, which the command line mounts by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def bench(
    suite: Annotated[
        Literal["embed", "nested", "kd", "score", "generate", "train"],
        typer.Option(
            help="Embedding beside peers; nesting beside its models; the distillation loss beside peers; scores of "
            "variants beside fair-esm's loop; generating beside transformers; distilling beside the published step."
        ),
    ] = "embed",
    quick: Annotated[bool, typer.Option("--quick", help="Minutes instead of hours: little data, few pairs.")] = False,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="embed: published sizes, with commas between; generate: protgpt2, medium, small, tiny, micro.",
            show_default="8M,35M; generate all, quick tiny,micro",
        ),
    ] = None,
    mix: Annotated[str, typer.Option(help="embed: uniprot, uniform, antibody, with commas between.")] = "uniprot",
    precisions: Annotated[
        str | None,
        typer.Option(help="embed, score, generate: of ours, with commas between.", show_default="all of the device's"),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="embed, nested: proteins.", min=1, show_default="200; nested 6")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Interleaved pairs.", min=2, show_default="5; nested 40")] = None,
    positions: Annotated[
        int | None,
        typer.Option(help="score: residues of each pass, of those with variants.", min=1, show_default="48; GPU all"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="generate: of each sequence.", min=3, show_default="200, of large models on a CPU fewer"),
    ] = None,
    batch: Annotated[int, typer.Option(help="generate: sequences of a batch.", min=2)] = 64,
    model: Annotated[
        str | None,
        typer.Option(help="score: name, folder or .pt file.", show_default="8M beside the checkout, or random"),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="embed: packages, with commas between, or none.", show_default="all that are there"),
    ] = None,
    fasta: Annotated[Path | None, typer.Option(help="embed, nested: proteins.", show_default="made up")] = None,
    esm_cpp_python: Annotated[
        Path | None, typer.Option(help="embed: Python of an environment that has esm-cpp (it needs numpy < 2).")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="nested, train: the CPU alone.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of samples and made-up numbers.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON lines; rows are appended.", show_default="none")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Measure this machine: speed beside peers in interleaved pairs, and how near to its ceilings."""
    import json

    import torch
    from rich.console import Console

    from ..engine.device import resolve_device
    from ..engine.info import peak_memory_bytes
    from .bench_embed import wide_console
    from .parity import ParityError
    from .rows import append_rows

    where = resolve_device(device)
    if suite in ("nested", "train"):
        where = torch.device("cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    given = {
        **{"shapes": shapes, "mix": mix, "precisions": precisions, "sequences": sequences, "pairs": pairs},
        **{"peers": peers, "fasta": fasta, "esm_cpp_python": esm_cpp_python, "seed": seed},
        **{"positions": positions, "model": model, "tokens": tokens, "batch": batch},
    }
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    try:
        suites = {"embed": _embed, "nested": _nested, "kd": _kd, "score": _score, "generate": _generate}
        run = (suites | {"train": _train})[suite]
        rows, tables = run(where, quick, given, console)
    except (ParityError, RuntimeError, ValueError) as error:
        # Errors that a user can mend are known to the command line already, also by these names.
        if type(error) not in (ParityError, RuntimeError, ValueError):
            raise
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    peaks: dict[str, Any] = {
        "peak_host_bytes": peak_memory_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None,
    }
    rows = [row | peaks for row in rows]
    if out is not None:
        append_rows(out, rows)
    if json_output:
        typer.echo(json.dumps({"suite": suite, "device": str(where), **peaks, "rows": rows}, allow_nan=False))
        return
    shown = wide_console()
    for table in tables:
        shown.print(table)
    shown.print(f"peak of this process: {peaks['peak_host_bytes'] / 1e6:,.0f} MB", highlight=False)
    if peaks["peak_device_bytes"] is not None:
        shown.print(f"peak of the GPU: {peaks['peak_device_bytes'] / 1e6:,.0f} MB", highlight=False)
    if out is not None:
        console.print(f"{len(rows)} rows appended to {out}", highlight=False)


def _embed(
    device: Any, quick: bool, given: dict[str, Any], console: Console
) -> tuple[list[dict[str, Any]], list[Table]]:
    from .bench_embed import CPU_PRECISIONS, measure_embed
    from .comparison import SHAPES
    from .embed_suite import PEERS, EmbedSettings
    from .lists import split_words
    from .proteins import MIXES

    allowed = CPU_PRECISIONS if device.type == "cpu" else ("fp32", "bf16", "fp16")
    budgets = (1, 1024, 2048, 4096) if device.type == "cpu" else (4096, 16384, 65536)
    peers = given["peers"]
    try:
        settings = EmbedSettings(
            shapes=split_words(given["shapes"] or "8M,35M", list(SHAPES), "--shapes"),
            mixes=split_words(given["mix"], MIXES, "--mix"),
            sequences=given["sequences"] or 200,
            pairs=given["pairs"] or 5,
            precisions=split_words(given["precisions"] or ",".join(allowed), allowed, "--precisions"),
            budgets=budgets,
            peers=() if peers == "none" else split_words(peers or ",".join(PEERS), PEERS, "--peers"),
            esm_cpp_python=given["esm_cpp_python"],
            device=device,
            fasta=given["fasta"],
            seed=given["seed"],
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return measure_embed(settings.quick() if quick else settings, console)


def _nested(
    device: Any, quick: bool, given: dict[str, Any], console: Console
) -> tuple[list[dict[str, Any]], list[Table]]:
    from .bench_nested import default_models, nested_table, run_nested

    console.print("on the CPU, one thread, fp32")
    rows = run_nested(
        default_models(),
        sequences=given["sequences"] or (2 if quick else 6),
        pairs=given["pairs"] or (6 if quick else 40),
        fasta=given["fasta"],
        seed=given["seed"],
    )
    return rows, [nested_table(rows)]


def _kd(device: Any, quick: bool, given: dict[str, Any], console: Console) -> tuple[list[dict[str, Any]], list[Table]]:
    from .bench_kd import kd_table, run_kd, usual_problems

    problems = usual_problems(quick=quick, seed=given["seed"])
    rows = run_kd(problems, device, console, pairs=given["pairs"] or 5, quick=quick)
    return rows, [kd_table(rows)]


def _score(
    device: Any, quick: bool, given: dict[str, Any], console: Console
) -> tuple[list[dict[str, Any]], list[Table]]:
    from .bench_score import plan_scores, run_scores, score_tables

    options = {name: given[name] for name in ("precisions", "positions", "pairs")}
    rows = run_scores(plan_scores(device, **options, quick=quick), console, model=given["model"], seed=given["seed"])
    return rows, score_tables(rows)


def _generate(
    device: Any, quick: bool, given: dict[str, Any], console: Console
) -> tuple[list[dict[str, Any]], list[Table]]:
    from .bench_generate import generation_tables, plan_generation, plan_problems, run_generation

    options = {name: given[name] for name in ("precisions", "pairs", "batch", "seed")}
    plan = plan_generation(device, **options, quick=quick)
    wanted = {name: given[name] for name in ("shapes", "tokens", "seed")}
    rows = run_generation(plan_problems(device, **wanted, quick=quick), plan, console)
    return rows, generation_tables(rows)


def _train(
    device: Any, quick: bool, given: dict[str, Any], console: Console
) -> tuple[list[dict[str, Any]], list[Table]]:
    from .bench_train import PROBLEMS, run_train, train_table

    rows = run_train(list(PROBLEMS), console, pairs=given["pairs"] or 5, quick=quick, seed=given["seed"])
    return rows, [train_table(rows)]
