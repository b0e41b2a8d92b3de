"""The progress bar of training: steps done, loss, time left."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .trainer import StepReport


class TrainingProgress:
    """Follows a run on a terminal; elsewhere it draws nothing. Use it as a context.

    Args:
        console: where the bar is drawn.
        name: what is trained.
    """

    def __init__(self, console: Console, name: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._name = name
        self._task = self._bar.add_task(f"{name}: reading", total=None, figures="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def cached(self, done: int, of: int) -> None:
        """So many shards of the teacher's cache are done."""
        self._bar.update(self._task, description="the teacher answers", completed=done, total=of)

    def start(self, steps: int, done: int) -> None:
        """Training begins, or goes on after so many steps."""
        self._bar.reset(self._task, description=self._name, completed=done, total=steps, figures="")

    def stepped(self, report: StepReport) -> None:
        """A step was taken."""
        self._bar.update(self._task, completed=report.step, figures=f"loss {report.loss:.3f}")
