"""`protnest distill`, which the command line mounts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

NO_TEACHER = "none"
_STEPS, _SEEDS = 1000, 3
_LEARNING_RATE = 1e-3
_QUICK_STEPS, _QUICK_TOKENS, _QUICK_HELD_OUT = 60, 2048, 100
_QUICK_GRID_STEPS, _QUICK_GRID_TOKENS = 15, 1024


def distill(
    data: Annotated[Path, typer.Option(help="FASTA file, plain or .gz; one sequence in twenty is held out.")],
    out: Annotated[Path, typer.Option(help="Folder for the student; a killed run goes on from here.")],
    teacher: Annotated[
        str, typer.Option(help="Name, folder or .pt file of a model of the student's kind; `none`: labels alone.")
    ] = "none",
    student: Annotated[
        str,
        typer.Option(
            help="Preset (encoders: nano-2xs, nano-xs, nano-s, nano-m; decoders: nano-gpt-xs, nano-gpt-s, nano-gpt, "
            "micro, tiny, small, medium), or the folder of a model that is trained on."
        ),
    ] = "nano-xs",
    vocabulary: Annotated[
        str | None,
        typer.Option(help="Of a decoder preset: `residues`, or a decoder's folder.", show_default="the teacher's"),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="`random`: fresh weights; `layers`: every n-th of the teacher's layers; or the name or folder of a "
            "smaller encoder, with whose answers the student begins."
        ),
    ] = "random",
    no_uncertainty: Annotated[
        bool, typer.Option("--no-uncertainty", help="Do not weight rows by the teacher's entropy.")
    ] = False,
    no_smoothing: Annotated[
        bool, typer.Option("--no-smoothing", help="Do not smooth targets by the teacher's confidence.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of the soft loss.")] = 2.0,
    alpha: Annotated[float, typer.Option(help="Share of the labels' loss.", min=0, max=1)] = 0.5,
    smoothing: Annotated[float, typer.Option(help="Most that smoothing takes from a target.", min=0, max=1)] = 0.1,
    weight_normalization: Annotated[
        str,
        typer.Option(
            help="`count`: divide the soft loss by its rows, as published; `weight`: by the sum of their weights. "
            "A grid takes both: count,weight."
        ),
    ] = "count",
    rows: Annotated[
        Literal["masked", "all"], typer.Option(help="An encoder learns from its teacher at these residues.")
    ] = "masked",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.", min=1, show_default="1000")] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead: passes over the data.", min=1)] = None,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens in a forward pass.", min=16)] = 4096,
    accumulate: Annotated[int, typer.Option(help="Forward passes that make one step.", min=1)] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.", min=1e-9, show_default="0.001")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps until the peak.", min=0, show_default="5 %")] = None,
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], typer.Option(help="How the learning rate falls after that.")
    ] = "linear",
    weight_decay: Annotated[float, typer.Option(help="On matrices alone.", min=0)] = 0.01,
    mask_epochs: Annotated[
        int | None,
        typer.Option(help="An encoder's masks come again after so many epochs.", min=0, show_default="never; 4 cached"),
    ] = None,
    mask_share: Annotated[
        float, typer.Option(help="Of an encoder's residues that are asked for.", min=0.01, max=0.99)
    ] = 0.15,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the teacher's answers, which is asked once for each.")
    ] = None,
    cache_top_k: Annotated[
        int, typer.Option(help="Logits kept of a row, where the vocabulary has more than 64 tokens.", min=1)
    ] = 64,
    held_out: Annotated[int, typer.Option(help="Most held-out proteins to judge by.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of weights, order, crops and masks.", min=0)] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of the matrix products.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, which happens anyway; fail if there is none.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away a run of other settings in --out: its own files alone.")
    ] = False,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.", min=0)] = 120.0,
    shard: Annotated[
        Literal["ddp", "fsdp2"], typer.Option(help="Under torchrun: weights on each GPU whole, or in shares.")
    ] = "ddp",
    grid: Annotated[
        Literal["2x2"] | None,
        typer.Option(help="Instead of one student: with and without each regulariser, and labels alone, into --out."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Of a grid: students at each cell's best.", min=1)] = None,
    lrs: Annotated[str | None, typer.Option(help="Of a grid: learning rates that each cell tries: a,b,c.")] = None,
    warmups: Annotated[
        str | None, typer.Option(help="Of a grid: warm-ups, each with each rate.", show_default="--warmup")
    ] = None,
    students: Annotated[
        str | None, typer.Option(help="Of a grid: several sizes, joined by commas.", show_default="--student")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Of a grid: a picture, .png, .svg or .pdf.")] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="60 steps of 2,048 tokens, judged on 100 proteins: whether all of it works. A grid: 15 of 1,024, and "
            "at most two seeds.",
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Train a student from a teacher, an encoder or a decoder, or from labels alone; or a whole grid of them."""
    import json

    from rich.console import Console

    from ..engine.device import precision_name, resolve_device, resolve_precision
    from ..engine.errors import InputError
    from ..kernels.kd_options import KDOptions
    from .distillation import Callbacks, DistillConfig
    from .distillation import distill as run
    from .distributed import joined_processes, own_device
    from .grid import PLAN_FILE
    from .grid_command import GridOptions, run_grid_command
    from .trainer import TrainerConfig
    from .training_folder import RUN_FILE
    from .training_progress import TrainingProgress

    if steps is not None and epochs is not None:
        message = "--steps and --epochs exclude each other"
        raise typer.BadParameter(message)
    if resume and overwrite:
        message = "--resume and --overwrite exclude each other"
        raise typer.BadParameter(message)
    of_grid = {"--seeds": seeds, "--lrs": lrs, "--warmups": warmups, "--students": students, "--plot": plot}
    of_run = {
        "--learning-rate": learning_rate is not None,
        "--no-uncertainty": no_uncertainty,
        "--no-smoothing": no_smoothing,
        "--overwrite": overwrite,
    }
    for name, given in of_grid.items():
        if grid is None and given is not None:
            message = f"{name} goes with --grid"
            raise typer.BadParameter(message)
    for name, is_given in of_run.items():
        if grid is not None and is_given:
            message = f"{name} does not go with --grid, which decides that for each run"
            raise typer.BadParameter(message)
    if resume and not (out / (RUN_FILE if grid is None else PLAN_FILE)).exists():
        message = "holds no run to go on with"
        raise InputError(message, file=out)
    resolved = own_device(resolve_device(device))
    if precision == "auto":
        chosen = precision_name(resolve_precision("auto", resolved))
    else:
        chosen = precision
    quick_steps, quick_tokens = (
        (_QUICK_STEPS, _QUICK_TOKENS) if grid is None else (_QUICK_GRID_STEPS, _QUICK_GRID_TOKENS)
    )
    taken = steps or (quick_steps if quick else _STEPS)
    warmup_steps = taken // 20 if warmup is None else warmup
    trainer = TrainerConfig(
        steps=taken,
        batch_tokens=min(batch_tokens, quick_tokens) if quick else batch_tokens,
        accumulate=accumulate,
        learning_rate=_LEARNING_RATE if learning_rate is None else learning_rate,
        warmup_steps=warmup_steps,
        schedule=schedule,
        weight_decay=weight_decay,
        seed=seed,
        precision=chosen,
    )
    try:
        options = KDOptions(
            temperature=temperature,
            alpha=alpha,
            smoothing=smoothing,
            uncertainty=not no_uncertainty,
            smooth=not no_smoothing,
            weight_normalization=weight_normalization if grid is None else "count",
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    config = DistillConfig(
        student=student,
        vocabulary=vocabulary,
        init=init,
        epochs=None if quick else epochs,
        trainer=trainer,
        options=options,
        rows=rows,
        mask_epochs=mask_epochs,
        mask_share=mask_share,
        cache_top_k=cache_top_k,
        held_out=min(held_out, _QUICK_HELD_OUT) if quick else held_out,
    )
    if grid is not None:
        run_grid_command(
            GridOptions(
                kind=grid,
                students=student if students is None else students,
                learning_rates=lrs,
                warmups=str(warmup_steps) if warmups is None else warmups,
                weight_normalizations=weight_normalization,
                seeds=_SEEDS if seeds is None else seeds,
                plot=plot,
                quick=quick,
            ),
            config,
            teacher=None if teacher == NO_TEACHER else teacher,
            data=data,
            out=out,
            device=str(resolved),
            cache=cache,
            save_every_s=save_every,
            json_output=json_output,
        )
        return
    console = Console(stderr=True, soft_wrap=True)
    with joined_processes(resolved, shard) as processes, TrainingProgress(console, student) as progress:
        report = run(
            None if teacher == NO_TEACHER else teacher,
            data,
            out,
            config,
            device=str(resolved),
            cache=cache,
            overwrite=overwrite,
            save_every_s=save_every,
            callbacks=Callbacks(on_start=progress.start, after_step=progress.stepped, after_shard=progress.cached),
            processes=processes,
        )
    if not processes.is_first:
        return
    if json_output:
        typer.echo(json.dumps(report, allow_nan=False))
        return
    _print_figures(console, out, report)


def _print_figures(console: Console, out: Path, report: dict[str, Any]) -> None:
    """Perplexities per residue with intervals, one line each."""
    found = report["perplexity"]
    lines = {name: found[name]["residue_perplexity"] for name in ("student", "teacher") if name in found}
    lines["unigram"] = found["unigram"]
    if "divergence" in found:
        lines["KL of teacher, nats a token"] = found["divergence"]
    console.print(
        f"{out}: {report['recipe']['steps']:,} steps in {report['seconds']:,.0f} s; perplexity per residue on "
        f"{found['sequences']:,} held-out proteins",
        markup=False,
        highlight=False,
    )
    for name, each in lines.items():
        value = "undefined" if each["value"] is None else f"{each['value']:.3f}"
        interval = "" if each["low"] is None else f" ({each['low']:.3f} to {each['high']:.3f})"
        console.print(f"  {name}: {value}{interval}", markup=False, highlight=False)
