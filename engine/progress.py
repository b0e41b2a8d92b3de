"""The progress bar of commands that run models: residues done, residues/s, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn


class ResidueProgress:
    """Follows a run on a terminal; elsewhere it only keeps the time.

    Args:
        console: where the bar is drawn.
        checking: what is done before anything runs.
        doing: what is done then, and to what.

    Attributes:
        seconds: from the first batch to the end of the run, or of its last stage.
    """

    def __init__(
        self,
        console: Console,
        *,
        checking: str = "checking the sequences",
        doing: tuple[str, str] = ("embedding", "sequences"),
    ) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(checking, total=None, rate="")
        self._doing = doing
        self._started = time.perf_counter()
        self._now = 0
        self.seconds = 0.0

    def __enter__(self) -> ResidueProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self._bar.stop()

    def start(self, records: int, work: int, done: int) -> None:
        """What is to be done is known: so many records, so many residues to run, and so many of these done already."""
        self._started = time.perf_counter()
        verb, noun = self._doing
        description = f"{verb} {records:,} {noun}"
        self._bar.update(self._task, description=description, total=work, completed=done)

    def stage(self, words: str, residues: int) -> None:
        """Another part of a run in several begins: what it does, and to how many residues."""
        self._started, self._now = time.perf_counter(), 0
        # What is left is guessed from this part's own pace.
        self._bar.reset(self._task, description=words, total=residues, rate="")

    def advance(self, residues: int) -> None:
        """A batch of so many residues is done."""
        self._now += residues
        elapsed = time.perf_counter() - self._started
        rate = f"{self._now / elapsed:,.0f} residues/s" if elapsed > 0 else ""
        self._bar.update(self._task, advance=residues, rate=rate)


@contextmanager
def counting(console: Console, doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that is counted in anything: yields what is told `(done, total)` as it goes on."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
