"""`protnest distill --grid`: from options to a grid of students."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..engine.errors import InputError
from .grid_report import answer

if TYPE_CHECKING:
    from rich.console import Console

    from .distillation import DistillConfig
    from .grid_plan import Run

_QUICK_SEEDS = 2


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """The options of a grid, as they were given; lists are joined by commas.

    Attributes:
        kind: "2x2".
        students, learning_rates, warmups, weight_normalizations: what is tried.
        seeds: how many; with `quick` at most two.
        plot: a picture's file, None for none.
    """

    kind: str
    students: str
    learning_rates: str | None
    warmups: str
    weight_normalizations: str
    seeds: int
    plot: Path | None
    quick: bool


def run_grid_command(
    options: GridOptions,
    base: DistillConfig,
    *,
    teacher: str | None,
    data: Path,
    out: Path,
    device: str,
    cache: Path | None,
    save_every_s: float,
    json_output: bool,
) -> None:
    """Runs a grid and says what it found.

    Raises:
        InputError: as `run_grid`; no teacher, no learning rates, a list of no numbers, or a plot that cannot be.
    """
    from rich.console import Console

    from .distillation import Callbacks
    from .grid import GridCallbacks, run_grid
    from .grid_plan import GridConfig
    from .training_progress import TrainingProgress

    if teacher is None:
        message = "a grid compares ways of using a teacher, and --teacher is none"
        raise InputError(message)
    if options.learning_rates is None:
        message = "a grid needs the learning rates that each cell tries: --lrs 5e-4,1e-3,2e-3"
        raise InputError(message)
    if options.plot is not None:
        from .score_plot import check_plot

        check_plot(options.plot)
    config = GridConfig(
        kind=options.kind,
        students=_words(options.students),
        learning_rates=_numbers("--lrs", options.learning_rates, float),
        warmups=_numbers("--warmups", options.warmups, int),
        seeds=min(options.seeds, _QUICK_SEEDS) if options.quick else options.seeds,
        weight_normalizations=_words(options.weight_normalizations),
        base=base,
    )
    console = Console(stderr=True, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    def on_run(run: Run, number: int, of: int, finished: bool) -> None:
        say(f"run {number} of {of}: {run}{': finished before' if finished else ''}")

    with _said_once(), TrainingProgress(console, options.kind) as progress:
        run = Callbacks(on_start=progress.start, after_step=progress.stepped, after_shard=progress.cached)
        report = run_grid(
            teacher,
            data,
            out,
            config,
            device=device,
            cache=cache,
            save_every_s=save_every_s,
            callbacks=GridCallbacks(on_run=on_run, run=run),
        )
    if options.plot is not None:
        from .grid_plot import draw_grid

        draw_grid(options.plot, report)
    if json_output:
        typer.echo(json.dumps(report, allow_nan=False))
        return
    _print_figures(console, out, report)


@contextmanager
def _said_once() -> Iterator[None]:
    """What loading a model says is said once, not for every run that loads it."""
    logger, said = logging.getLogger("protnest.engine.models"), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in said
        said.add(message)
        return not known

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def _words(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(",") if each.strip())


def _numbers(option: str, text: str, kind: type[Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(each) for each in _words(text))
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        message = f"{option} is {text!r}, expected {what} joined by commas"
        raise InputError(message) from error


def _print_figures(console: Console, out: Path, report: dict[str, Any]) -> None:
    """Each cell's perplexity, the answer, and where the rest lies."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    for student, found in report["students"].items():
        say(f"{student}: perplexity per residue on {report['proteins']['judged']:,} held-out proteins")
        for name, cell in found["cells"].items():
            mean, sd = cell["perplexity"]["mean"], cell["perplexity"]["sd"]
            shown = "diverged" if mean is None else f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}")
            say(f"  {name}: {shown} ({len(cell['seeds'])} seeds, learning rate {cell['learning_rate']:g})")
        for normalization, synergy in found["synergy"].items():
            say(f"  do the two help each other (weights divided by {normalization})? {answer(synergy)}")
    say(f"table with differences and intervals: {out / 'grid.md'}")
