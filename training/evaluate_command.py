"""`protnest evaluate`, which the command line mounts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .report import write_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from .estimate import Estimate
    from .evaluation import DesignJudgement, DesignQuestions, PredictionJudgement
    from .held_out import HeldOut, Read
    from .prediction import Predictor
    from .token_scores import Scored


def evaluate(
    held_out: Annotated[
        Path | None,
        typer.Argument(help="FASTA file, plain or .gz, of proteins that the model was not trained on."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="What is judged on them.", show_default="nano-s")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A model of the same vocabulary; adds KL(teacher || model).", show_default="none")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            help="FASTA file that the model was trained on: left out of what it is judged by.", show_default="none"
        ),
    ] = None,
    by_hash: Annotated[
        bool,
        typer.Option("--by-hash", help="The files were split as `pretrain` does: judge the one in twenty held out."),
    ] = False,
    sequences: Annotated[
        int | None, typer.Option(help="At most so many held-out proteins, at random.", min=1, show_default="all")
    ] = None,
    generated: Annotated[
        Path | None, typer.Option(help="FASTA file of designed sequences to judge.", show_default="none")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="With --generated: FASTA file of natural sequences.", show_default="none")
    ] = None,
    hmm: Annotated[
        Path | None, typer.Option(help="With --generated: the family's HMMER profile.", show_default="none")
    ] = None,
    alignment: Annotated[
        Path | None,
        typer.Option(help="Instead: its alignment (.a2m, .afa, .fasta, .sto), for a profile.", show_default="none"),
    ] = None,
    evalue: Annotated[float, typer.Option(help="A hit of the profile is below it.", min=1e-300)] = 1e-5,
    esmfold: Annotated[
        Path | None,
        typer.Option(help="With --generated: folder with ESMFold's weights, for pLDDT.", show_default="none"),
    ] = None,
    fold: Annotated[int, typer.Option(help="With --esmfold: at most so many designs.", min=1)] = 50,
    invalid: Annotated[
        Literal["error", "skip", "mask"],
        typer.Option(help="Letters outside the alphabet: stop, leave the sequence out, or put X."),
    ] = "error",
    out: Annotated[Path | None, typer.Option(help="JSON file for the report.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="One page of pictures: .png, .svg or .pdf; needs matplotlib.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of masks, draws and bootstrap.", min=0)] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16", "int8"], typer.Option(help="Of the models.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in a batch.", min=1, show_default="4096 on a CPU, 65536 on a GPU")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Judge a model on held-out proteins, and designed sequences beside natural ones, with intervals."""
    import time

    from rich.console import Console

    _check_together(held_out, model, teacher, sequences, generated, reference, hmm, alignment, esmfold)
    if plot is not None:
        from .score_plot import check_plot

        check_plot(plot)
    console, started = Console(stderr=True, soft_wrap=True), time.perf_counter()
    from ..engine.progress import ResidueProgress
    from .evaluation import as_report
    from .evaluation_plot import Page, draw_evaluation
    from .held_out import HeldOutChoice, read_held_out

    # All that can be wrong with what is given is found before a model runs.
    designs = questions = judged_by = scored = prediction = judged_designs = None
    with ResidueProgress(console, checking="reading the sequences"):
        if generated is not None and reference is not None:
            designs, questions = _read_designs(
                generated,
                reference,
                train,
                by_hash=by_hash,
                hmm=hmm,
                alignment=alignment,
                evalue=evalue,
                invalid=invalid,
            )
        if held_out is not None:
            choice = HeldOutChoice(train=train, by_hash=by_hash, sequences=sequences, seed=seed, invalid=invalid)
            judged_by = read_held_out(held_out, choice)
    if judged_by is not None and train is None:
        console.print("not held against training's sequences: give --train to leave them out", highlight=False)

    def load(name: str, after_batch: Callable[[int], None]) -> Predictor:
        return _load(name, after_batch, seed=seed, precision=precision, device=device, max_tokens=max_tokens)

    if judged_by is not None:
        prediction, scored = _run_models(model or "nano-s", teacher, judged_by, load, console, seed=seed)
    if designs is not None and questions is not None:
        judged_designs = _run_designs(designs, questions, esmfold, fold, console, device=device, seed=seed)
    report = as_report(
        held_out=judged_by,
        prediction=prediction,
        designs=judged_designs,
        seed=seed,
        seconds=round(time.perf_counter() - started, 1),
    )
    write_report(report, out, json_output=json_output)
    if plot is not None:
        title = ", ".join(path.name for path in (held_out, generated) if path is not None)
        page = Page(
            title=title,
            prediction=prediction,
            scored=scored,
            designs=judged_designs,
            generated=() if designs is None else designs.sequences,
            reference=() if questions is None else questions.reference,
        )
        draw_evaluation(plot, page)
    if not json_output:
        _print_figures(prediction, judged_designs, judged_by)


def _check_together(
    held_out: Path | None,
    model: str | None,
    teacher: str | None,
    sequences: int | None,
    generated: Path | None,
    reference: Path | None,
    hmm: Path | None,
    alignment: Path | None,
    esmfold: Path | None,
) -> None:
    """Which options go with which."""
    message = None
    if held_out is None and generated is None:
        message = "nothing to judge: give held-out proteins, --generated, or both"
    elif held_out is None and (model is not None or teacher is not None or sequences is not None):
        message = "--model, --teacher and --sequences go with a FASTA file of held-out proteins"
    elif (generated is None) != (reference is None):
        message = "--generated and --reference go together"
    elif generated is None and (hmm is not None or alignment is not None or esmfold is not None):
        message = "--hmm, --alignment and --esmfold go with --generated"
    elif hmm is not None and alignment is not None:
        message = "give either --hmm or --alignment"
    if message is not None:
        raise typer.BadParameter(message)


def _read_designs(
    generated: Path,
    reference: Path,
    train: Path | None,
    *,
    by_hash: bool,
    hmm: Path | None,
    alignment: Path | None,
    evalue: float,
    invalid: Literal["error", "skip", "mask"],
) -> tuple[Read, DesignQuestions]:
    from .corpus import is_held_out
    from .evaluation import DesignQuestions
    from .held_out import read_sequences
    from .hmm_hits import build_profile, read_profile
    from .identity import check_aligner

    check_aligner()
    profile = None
    if hmm is not None:
        profile = read_profile(hmm)
    elif alignment is not None:
        profile = build_profile(alignment)
    designs = read_sequences(generated, invalid=invalid)
    trained = None
    if train is not None:
        known = read_sequences(train, invalid=invalid).sequences
        trained = tuple(each for each in known if not (by_hash and is_held_out(each)))
    natural = read_sequences(reference, invalid=invalid).sequences
    return designs, DesignQuestions(reference=natural, train=trained, profile=profile, evalue=evalue)


def _load(
    name: str,
    after_batch: Callable[[int], None],
    *,
    seed: int,
    precision: str,
    device: str,
    max_tokens: int | None,
) -> Predictor:
    """A model by name, as what can be judged: the one place that knows kinds of models."""
    from ..engine.decoder import Decoder
    from ..engine.models import load_checkpoint
    from .decoder_prediction import DecoderPredictor
    from .prediction import EncoderPredictor

    model = load_checkpoint(name, device=device, precision=precision)
    if isinstance(model, Decoder):
        return DecoderPredictor(model, max_tokens=max_tokens, after_batch=after_batch)
    return EncoderPredictor(model, seed=seed, max_tokens=max_tokens, after_batch=after_batch)


def _run_models(
    name: str,
    teacher: str | None,
    judged_by: HeldOut,
    load: Callable[[str, Callable[[int], None]], Predictor],
    console: Console,
    *,
    seed: int,
) -> tuple[PredictionJudgement, Scored]:
    from ..engine.progress import ResidueProgress
    from .evaluation import judge_predictions

    with ResidueProgress(console, checking="loading", doing=("judging by", "sequences")) as progress:
        ours = load(name, progress.advance)
        theirs = None if teacher is None else load(teacher, progress.advance)
        models = [ours] if theirs is None else [ours, theirs]
        context = min(each.context for each in models)
        work = sum(each.residues_run(judged_by.sequences, context=context) for each in models)
        progress.start(len(judged_by.sequences), work, 0)
        return judge_predictions(ours, judged_by, teacher=theirs, seed=seed)


def _run_designs(
    designs: Read,
    questions: DesignQuestions,
    esmfold: Path | None,
    fold: int,
    console: Console,
    *,
    device: str,
    seed: int,
) -> DesignJudgement:
    from dataclasses import replace

    from ..engine.device import resolve_device
    from ..engine.progress import ResidueProgress
    from .evaluation import judge_designs
    from .folding import load_esmfold

    if esmfold is not None:
        model = load_esmfold(esmfold, device=str(resolve_device(device)))
        questions = replace(questions, esmfold=model, folded=fold)
    with ResidueProgress(console, checking="judging the designs") as progress:
        return judge_designs(designs, questions, seed=seed, follower=progress)


def _print_figures(
    prediction: PredictionJudgement | None, designs: DesignJudgement | None, judged_by: HeldOut | None
) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from .evaluation import figures

    subject, figure = Column("of", overflow="fold"), Column("figure", no_wrap=True)
    table = Table(subject, figure, "value", Column("95 %", no_wrap=True), "n", "beside it", box=None)
    for of, name, found, note in figures(prediction, designs):
        table.add_row(of, name, *_shown(found), f"{found.n:,}", note)
    console = Console(soft_wrap=True)
    console.print(table)
    if judged_by is not None:
        facts: dict[str, Any] = judged_by.facts
        left_out = {
            "repeated": "repeated",
            "in_training": "among those for training",
            "rejected": "rejected",
        }
        words = [f"{facts['judged']:,} of {facts['found']:,} sequences judged"]
        words += [f"{facts[key]:,} {text}" for key, text in left_out.items() if facts[key]]
        console.print(", ".join(words), highlight=False)


def _shown(found: Estimate) -> tuple[str, str]:
    if found.value is None:
        return "undefined", ""
    digits = 1 if abs(found.value) >= 100 else 4 if abs(found.value) < 0.1 else 3
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}", ""
    return f"{found.value:.{digits}f}", f"{found.low:.{digits}f} to {found.high:.{digits}f}"
