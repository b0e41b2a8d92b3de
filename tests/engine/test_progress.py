"""The progress bar: what a terminal shows of a run, and of one in several parts."""

from __future__ import annotations

import io

from protnest.engine.progress import ResidueProgress
from rich.console import Console


def _console(terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, legacy_windows=False)


def _shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_ends_at_all_of_it() -> None:
    console = _console()
    with ResidueProgress(console, checking="loading", doing=("judging by", "sequences")) as progress:
        progress.start(3, 200, 50)
        progress.advance(100)
        (task,) = progress._bar.tasks
        assert (task.description, task.percentage, task.finished) == ("judging by 3 sequences", 75, False)
        progress.advance(50)
        assert task.finished
    last = [line for line in _shown(console).splitlines() if "judging by 3 sequences" in line][-1]
    assert "100%" in last
    assert "residues/s" in last
    assert 0 <= progress.seconds < 60


def test_stages_begin_anew() -> None:
    console = _console()
    with ResidueProgress(console) as progress:
        progress.stage("searching 4 designs", 10)
        progress.advance(10)
        progress.stage("neighbours of 4 designs", 40)
        progress.advance(10)
        (task,) = progress._bar.tasks
        assert (task.description, task.total, task.completed, task.percentage) == (
            "neighbours of 4 designs",
            40,
            10,
            25,
        )
        progress.advance(30)
        assert task.finished
    assert "neighbours of 4 designs" in _shown(console)


def test_nothing_is_drawn_elsewhere() -> None:
    console = _console(terminal=False)
    with ResidueProgress(console) as progress:
        progress.stage("searching 4 designs", 10)
        progress.advance(10)
    assert _shown(console) == ""
