"""The training commands of `protnest`, which the command line mounts by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .report import write_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .label_task import LabelResult
    from .probe import ProbeResult
    from .score_plot import Point


def pretrain(
    data: Annotated[Path, typer.Argument(help="FASTA file, plain or .gz; one sequence in twenty is held out.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; a killed run goes on from here.")],
    preset: Annotated[
        Literal["nano-2xs", "nano-xs", "nano-s", "nano-m"], typer.Option(help="Architecture.")
    ] = "nano-xs",
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 6000,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens in a batch.", min=16)] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Its peak.", min=1e-9)] = 2e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps until the peak.", min=0)] = 200,
    seed: Annotated[int, typer.Option(help="Of weights, order, crops and masks.", min=0)] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of the matrix products.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away a run of other settings in --out: its own files alone.")
    ] = False,
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
            overwrite=overwrite,
            after_step=lambda step, loss: bar.update(task, completed=step, loss=loss),
        )
    if json_output:
        typer.echo(json.dumps(report))
        return
    shown = {field.name for field in fields(config)}
    for key, value in report.items():
        if key not in shown:
            console.print(f"{key}: {value}")


def fit_chain(
    fasta: Annotated[Path, typer.Argument(help="Proteins to fit on: FASTA, plain or .gz.", metavar="FASTA")],
    models: Annotated[str, typer.Option(help="Names, folders or .pt files joined by commas, of growing width.")],
    out: Annotated[Path, typer.Option(help="The chain file.")],
    regressor: Annotated[
        Literal["pcr", "ridge", "linear"], typer.Option(help="How the row so far predicts the larger model.")
    ] = "pcr",
    naive: Annotated[
        bool, typer.Option("--naive", help="Principal components of the concatenation instead: a baseline.")
    ] = False,
    sequences: Annotated[
        int | None, typer.Option(help="Most proteins to take, from the beginning.", min=1, show_default="all")
    ] = None,
    gram: Annotated[
        Path | None,
        typer.Option(
            help="Where the pass over the proteins is kept: a killed one goes on from here, and another regressor is "
            "fitted from it in seconds.",
            show_default="beside --out, ending in .gram",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in a batch.", min=1)] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Fit a nesting chain: one row whose prefixes are the smaller models' embeddings. Models run in fp32."""
    import json

    from rich.console import Console

    from ..engine.models import load_encoder
    from ..engine.progress import ResidueProgress
    from .chain_fit import NAIVE
    from .chain_fit import fit_chain as fit
    from .gram_pass import PassOptions, run_pass

    encoders = [load_encoder(name, device=device, precision="fp32") for name in models.split(",")]
    console = Console(stderr=True)
    state = out.with_name(out.name + ".gram") if gram is None else gram
    options = PassOptions(sequences=sequences, max_tokens=max_tokens)
    with ResidueProgress(console) as progress:
        pair = run_pass(encoders, fasta, state, options, start=progress.start, after_batch=progress.advance)
    chain = fit(pair, regressor=NAIVE if naive else regressor)
    chain.save(out)
    report = {
        "out": str(out),
        "gram": str(state),
        "models": [model.name for model in chain.models],
        "widths": list(chain.widths),
        "regressor": chain.regressor,
        **chain.data,
        "stages": list(chain.report),
    }
    if json_output:
        typer.echo(json.dumps(report))
        return
    for stage in chain.report:
        words = (f"{name} {value:.4g}" for name, value in stage.items() if isinstance(value, int | float))
        console.print(f"{stage['model']}: {', '.join(words)}", markup=False, highlight=False)
    console.print(f"{out}: {' -> '.join(report['models'])}, {chain.regressor}", markup=False, highlight=False)


def probe(
    wt: Annotated[Path, typer.Option(help="FASTA file with the wild type, alone or under --name.")],
    mutants: Annotated[
        Path, typer.Option(help="CSV, plain or .gz: `mutant` (A24G, several joined with :) and a score.")
    ],
    models: Annotated[str, typer.Option(help="Names, folders or .pt files joined by commas, smallest first.")],
    chain: Annotated[
        list[Path] | None, typer.Option(help="Chain file of these models, or `nano`; again for a naive one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Id of the wild type, where the FASTA file holds several.")] = None,
    column: Annotated[str, typer.Option(help="The score's column.")] = "DMS_score",
    variants: Annotated[
        int | None, typer.Option(help="At most so many variants, drawn at random.", min=1, show_default="all")
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            help="Residues that the models see, as 331-531, counted from 1; for domains of long proteins.",
            show_default="all",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of score against size: .png, .svg or .pdf; needs matplotlib.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="File for a ridge head fitted on all these variants; `protnest score --head` reads it."),
    ] = None,
    save_pooling: Annotated[
        Literal["mean", "site"] | None,
        typer.Option(
            help="What the head reads: the mutated sites' mean, or all residues', for insertions and deletions too.",
            show_default="site",
        ),
    ] = None,
    save_features: Annotated[
        Literal["nested", "raw"] | None,
        typer.Option(
            help="Of what: the first nested chain's row, or the largest model's own embedding.",
            show_default="nested with such a chain, else raw",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of folds, draws and bootstrap.", min=0)] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Of the models.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Judge embeddings on a mutational scan: a ridge probe per model, nested prefix, naive row and concatenation."""
    import numpy as np
    from rich.console import Console

    from ..engine.chain import Chain
    from ..engine.models import load_encoder
    from ..engine.progress import ResidueProgress
    from ..engine.variants import confine, parse_region, read_scan, read_wild_type
    from .head_fit import HeadPlan, ScanOrigin, check_out, fit_head
    from .probe import as_report, scan_features
    from .probe import probe as run
    from .score_plot import check_plot, draw_scores

    if save is None and (save_pooling or save_features):
        message = "--save-pooling and --save-features go with --save"
        raise typer.BadParameter(message)
    if plot is not None:
        check_plot(plot)
    if save is not None:
        check_out(save)
    bounds = None if region is None else parse_region(region)
    wild_type = read_wild_type(wt, name)
    scan, scores = read_scan(mutants, wild_type, column=column)
    found = len(scan)
    if variants is not None and variants < found:
        chosen = np.sort(np.random.default_rng(seed).permutation(found)[:variants]).tolist()
        scan, scores = [scan[row] for row in chosen], [scores[row] for row in chosen]
    if bounds is not None:
        scan = [confine(variant, *bounds) for variant in scan]
    chains = [Chain.load(file) for file in chain or ()]
    names = models.split(",")
    plan = None if save is None else HeadPlan.of(len(names), chains, features=save_features, pooling=save_pooling)
    encoders = [load_encoder(each, device=device, precision=precision) for each in names]
    if plan is not None:
        plan.check_lengths(encoders, max(len(each.sequence) for each in scan))
    console = Console(stderr=True)
    with ResidueProgress(console) as progress:
        progress.start(len(scan), len(encoders) * sum(len(each.sequence) for each in scan), 0)
        features = scan_features(encoders, scan, chains=chains, after_batch=progress.advance)
        results = run(encoders, scan, scores, chains=chains, seed=seed, features=features)
    report = as_report(
        results,
        mutants=mutants.name,
        found=found,
        variants=len(scan),
        region=region,
        seed=seed,
        models=[encoder.name for encoder in encoders],
    )
    if plan is not None and save is not None:
        origin = ScanOrigin(file=mutants.name, column=column, wild_type=wild_type, region=bounds)
        head = fit_head(plan, encoders, scores, features, results, origin, seed=seed)
        head.save(save)
        report["head"] = {
            "out": str(save),
            "features": plan.features,
            "pooling": head.pooling,
            "width": head.width,
            "strength": head.strength,
            **{score: head.data[score] for score in ("spearman", "low", "high")},
        }
    write_report(report, out, json_output=json_output)
    if plot is not None:
        sizes = {encoder.name: encoder.dim for encoder in encoders}
        panels = {(each.pooling, each.subset): f"{each.pooling}, {each.variants:,} {each.subset}" for each in results}
        points = {
            title: [_point(each, each.spearman) for each in results if (each.pooling, each.subset) == key]
            for key, title in panels.items()
        }
        draw_scores(plot, points, sizes, score="Spearman", title=mutants.name)
    if not json_output:
        heads = ("pooling", "variants")
        _print_results(
            "Spearman",
            heads,
            [((each.pooling, f"{each.variants:,} {each.subset}"), each, each.spearman) for each in results],
        )
        if plan is not None:
            console.print(f"{save}: reads {plan.features} features, {plan.pooling}", markup=False, highlight=False)


def probe_labels(
    labels: Annotated[
        Path,
        typer.Argument(
            help="Table (tabs or commas, plain or .gz) with `sequence`, `label` and perhaps `set`; or, with "
            "--sequences, FASTA with a letter for each residue's state.",
            metavar="LABELS",
        ),
    ],
    models: Annotated[str, typer.Option(help="Names, folders or .pt files joined by commas, smallest first.")],
    sequences: Annotated[
        Path | None, typer.Option(help="FASTA file with the proteins, where LABELS are residues' states.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="FASTA file with 0 for each residue whose state does not count, else 1.")
    ] = None,
    chain: Annotated[
        list[Path] | None, typer.Option(help="Chain file of these models, or `nano`; again for a naive one.")
    ] = None,
    train: Annotated[
        int | None, typer.Option(help="At most so many proteins to train on, at random.", min=1, show_default="all")
    ] = None,
    test: Annotated[
        int | None, typer.Option(help="At most so many proteins to test on, at random.", min=1, show_default="all")
    ] = None,
    longest: Annotated[
        int | None, typer.Option(help="Leaves out proteins of more residues.", min=1, show_default="none")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of score against size: .png, .svg or .pdf; needs matplotlib.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of draws and bootstrap.", min=0)] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Of the models.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Judge embeddings on classes of proteins or states of residues: a ridge classifier per model and nested prefix."""
    from rich.console import Console

    from ..engine.chain import Chain
    from ..engine.models import load_encoder
    from ..engine.progress import ResidueProgress
    from .label_task import probe_labels as run
    from .labelled import choose, read_classes, read_states
    from .score_plot import check_plot, draw_scores

    if mask is not None and sequences is None:
        message = "--mask goes with --sequences"
        raise typer.BadParameter(message)
    if plot is not None:
        check_plot(plot)
    found = read_classes(labels) if sequences is None else read_states(sequences, labels, mask)
    proteins = choose(found, longest=longest, train=train, test=test, seed=seed)
    chains = [Chain.load(file) for file in chain or ()]
    encoders = [load_encoder(each, device=device, precision=precision) for each in models.split(",")]
    with ResidueProgress(Console(stderr=True)) as progress:
        progress.start(len(proteins), len(encoders) * sum(len(each.sequence) for each in proteins), 0)
        found_report = run(encoders, proteins, chains=chains, seed=seed, after_batch=progress.advance)
    names = [encoder.name for encoder in encoders]
    report = found_report.as_json(labels=labels.name, longest=longest, seed=seed, models=names)
    write_report(report, out, json_output=json_output)
    results = found_report.results
    if plot is not None:
        points = {
            name: [_point(each, each.score) for each in results if each.measure == name]
            for name in dict.fromkeys(each.measure for each in results)
        }
        sizes = {encoder.name: encoder.dim for encoder in encoders}
        draw_scores(plot, points, sizes, score="on the proteins for testing", title=labels.name)
    if not json_output:
        console = Console(stderr=True)
        trained, tested = found_report.proteins
        console.print(
            f"{trained:,} proteins to train on, {tested:,} to test on; {len(found_report.classes)} classes; "
            f"the most frequent one alone: {found_report.majority:.3f}",
            highlight=False,
        )
        _print_results("score", ("measure",), [((each.measure,), each, each.score) for each in results])


def _features(each: ProbeResult | LabelResult) -> str:
    """How a table or a legend calls them."""
    return each.representation if each.regressor in (None, "naive") else f"{each.representation} {each.regressor}"


def _point(each: ProbeResult | LabelResult, score: float | None) -> Point:
    from .score_plot import Point

    return Point(line=_features(each), model=each.model, score=score, low=each.low, high=each.high)


def _print_results(
    score: str,
    heads: tuple[str, ...],
    rows: Sequence[tuple[tuple[str, ...], ProbeResult | LabelResult, float | None]],
) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    largest = Column("largest model", overflow="fold")
    table = Table(*heads, "features", largest, "width", score, "95 %", box=None)
    for words, each, value in rows:
        shown = (
            ("", "")
            if value is None or each.low is None or each.high is None
            else (f"{value:.3f}", f"{each.low:.3f} to {each.high:.3f}")
        )
        table.add_row(*words, _features(each), each.model, str(each.width), *shown)
    Console(soft_wrap=True).print(table)
