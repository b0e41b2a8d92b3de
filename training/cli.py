"""The training commands of `protnest`, which the command line mounts by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def pretrain(
    data: Annotated[Path, typer.Argument(help="FASTA file, plain or .gz; one sequence in twenty is held out.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; a killed run goes on from here.")],
    preset: Annotated[Literal["nano-xs", "nano-s"], typer.Option(help="Architecture.")] = "nano-xs",
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 6000,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens in a batch.", min=16)] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Its peak.", min=1e-9)] = 2e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps until the peak.", min=0)] = 200,
    seed: Annotated[int, typer.Option(help="Of weights, order, crops and masks.", min=0)] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of the matrix products.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Train a small ESM-2 encoder from sequences alone, as a masked language model."""
    import json
    from dataclasses import fields

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..engine.device import precision_name, resolve_device, resolve_precision
    from .pretrain import PretrainConfig
    from .pretrain import pretrain as run

    chosen: str = precision
    if precision == "auto":
        chosen = precision_name(resolve_precision("auto", resolve_device(device)))
    config = PretrainConfig(
        preset=preset,
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        seed=seed,
        precision=chosen,
    )
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(preset, total=steps, loss=float("nan"))
        report = run(
            data,
            out,
            config,
            device=device,
            after_step=lambda step, loss: bar.update(task, completed=step, loss=loss),
        )
    if json_output:
        typer.echo(json.dumps(report))
        return
    shown = {field.name for field in fields(config)}
    for key, value in report.items():
        if key not in shown:
            console.print(f"{key}: {value}")
