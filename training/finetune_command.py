"""`protnest finetune`, which the command line mounts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

_QUICK_N, _QUICK_EPOCHS, _QUICK_JUDGED = 20, 3, 20


def finetune(
    data: Annotated[Path, typer.Option(help="FASTA file, plain or .gz: a family, or proteins with labels.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; a killed run goes on from here.")],
    model: Annotated[str, typer.Option(help="Name, folder or .pt file of an encoder or a decoder.")] = "nano-s",
    task: Annotated[
        Literal["mlm", "clm", "regression", "classification"] | None,
        typer.Option(help="What is learnt.", show_default="mlm for an encoder, clm for a decoder"),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Table with labels, for regression and classification.", show_default="none")
    ] = None,
    id_col: Annotated[str, typer.Option(help="With --labels: the column of the FASTA file's ids.")] = "id",
    label_col: Annotated[str, typer.Option(help="With --labels: the column of the labels.")] = "label",
    pooling: Annotated[
        Literal["mean", "residue"],
        typer.Option(help="With --labels: one label a protein, or one a residue (letters; numbers between blanks)."),
    ] = "mean",
    method: Annotated[
        Literal["full", "lora"], typer.Option(help="Train all weights, or low-rank adapters, merged at the end.")
    ] = "full",
    rank: Annotated[int, typer.Option(help="Of the adapters.", min=1)] = 8,
    lora_alpha: Annotated[float | None, typer.Option(help="Of the adapters.", show_default="twice the rank")] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", help="Proteins to train on: the first ones of the training share.", min=1),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Most passes over them.", min=1)] = 20,
    patience: Annotated[int, typer.Option(help="Epochs without a better validation loss, then it stops.", min=1)] = 3,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its peak.", min=1e-9, show_default="by the model's size")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens in a batch.", min=16)] = 1024,
    warmup_share: Annotated[float, typer.Option(help="Of all steps, until the peak.", min=0, max=0.99)] = 0.1,
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], typer.Option(help="How the learning rate falls after that.")
    ] = "cosine",
    validation_share: Annotated[float, typer.Option(help="Of the proteins, to stop by: at most.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Of the proteins, to judge by: at most.")] = 0.1,
    identity: Annotated[float, typer.Option(help="Proteins as alike as this are never in two shares.")] = 0.5,
    clusters_by: Annotated[
        Literal["auto", "mmseqs", "kmers"],
        typer.Option(help="How alike ones are found; auto: mmseqs where it is on PATH, else kmers."),
    ] = "auto",
    judged: Annotated[int, typer.Option(help="Most proteins of the validation and the test share.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of shares, order, masks and adapters.", min=0)] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of the matrix products.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away a run of other settings in --out: its own files alone.")
    ] = False,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints within an epoch.", min=0)] = 120.0,
    plot: Annotated[
        Path | None, typer.Option(help="One page of pictures: .png, .svg or .pdf; needs matplotlib.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="3 epochs of 20 proteins, judged on 20: whether all of it works.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Adapt a model to a family, or to labels, from few sequences, split so that no homologue is judged by."""
    import json

    from rich.console import Console

    from ..engine.device import precision_name, resolve_device, resolve_precision
    from .family_data import LabelSource
    from .finetuning import Callbacks, FinetuneConfig
    from .finetuning import finetune as run
    from .training_progress import TrainingProgress

    if (labels is None) != (task not in ("regression", "classification")):
        message = "--labels goes with --task regression or --task classification, and they with it"
        raise typer.BadParameter(message)
    if plot is not None:
        from .score_plot import check_plot

        check_plot(plot)
    chosen: str = precision
    if precision == "auto":
        chosen = precision_name(resolve_precision("auto", resolve_device(device)))
    config = FinetuneConfig(
        task=task,
        method=method,
        rank=rank,
        lora_alpha=lora_alpha,
        pooling=pooling,
        n=n if not quick else min(n or _QUICK_N, _QUICK_N),
        epochs=min(epochs, _QUICK_EPOCHS) if quick else epochs,
        patience=patience,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        warmup_share=warmup_share,
        schedule=schedule,
        validation_share=validation_share,
        test_share=test_share,
        identity=identity,
        clusters_by=clusters_by,
        seed=seed,
        precision=chosen,
        judged=min(judged, _QUICK_JUDGED) if quick else judged,
    )
    source = None if labels is None else LabelSource(file=labels, id_column=id_col, label_column=label_col)
    console = Console(stderr=True, soft_wrap=True)
    with TrainingProgress(console, model) as progress:
        report = run(
            model,
            data,
            out,
            config,
            labels=source,
            device=device,
            overwrite=overwrite,
            save_every_s=save_every,
            callbacks=Callbacks(on_start=progress.start, after_step=progress.stepped),
        )
    if plot is not None:
        from .finetuning_plot import draw_finetuning

        draw_finetuning(plot, report)
    if json_output:
        typer.echo(json.dumps(report, allow_nan=False))
        return
    _print_figures(console, out, report)


def _print_figures(console: Console, out: Path, report: dict[str, Any]) -> None:
    from .finetuning_plot import FIGURES

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    data, test = report["data"], report["test"]
    stopped = "stopped early" if report["stopped_early"] else "ran to the end"
    say(
        f"{out}: {data['train_used']:,} proteins, {report['epochs']} epochs in {report['seconds']:,.0f} s, {stopped}; "
        f"the weights are those after epoch {report['best_epoch']}"
    )
    say(
        f"{data['clusters']:,} clusters at an identity of {data['identity']:g} by {data['clusters_by']}; "
        f"{test['sequences']:,} proteins of the test share:"
    )
    for key, name in FIGURES.items():
        if key in test:
            each = test[key]
            value = "undefined" if each["value"] is None else f"{each['value']:.3f}"
            interval = "" if each["low"] is None else f" ({each['low']:.3f} to {each['high']:.3f})"
            say(f"  {name}: {value}{interval}")
    if "majority" in test:
        say(f"  the most frequent class alone: {test['majority']:.3f}")
