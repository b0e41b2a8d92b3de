"""A run's folder: kills, locks, other settings, other people's files, full disks, logs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine import InputError
from protnest.training import training_log
from protnest.training.trainer import StepReport, Trainer, TrainerConfig
from protnest.training.training_folder import TrainingFolder

from support.learning import CPU, LinearTask


class _Killed(BaseException):
    pass


def _killed_at(step: int) -> Callable[[StepReport], None]:
    def after_step(report: StepReport) -> None:
        if report.step == step:
            raise _Killed

    return after_step


def _trainer(**changes: Any) -> Trainer:
    settings: dict[str, Any] = {"steps": 6, "batch_tokens": 20, "learning_rate": 0.05} | changes
    return Trainer(LinearTask(dropout=0.3), TrainerConfig(**settings), device=CPU)


def _run(out: Path, *, overwrite: bool = False, changes: dict[str, Any] | None = None, **options: Any) -> Trainer:
    trainer = _trainer(**(changes or {}))
    with TrainingFolder(out, trainer.identity(), overwrite=overwrite) as folder:
        folder.train(trainer, **options)
        folder.finish({"loss": 1.0})
    return trainer


def _state(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / "state.pt", weights_only=True)
    return found


def _files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    trainer = _run(tmp_path / "out")
    with TrainingFolder(tmp_path / "out", trainer.identity()) as folder:
        assert folder.report == {"loss": 1.0}
    with TrainingFolder(tmp_path / "other", trainer.identity()) as folder:
        assert folder.report is None
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["schema_version"], run["complete"], run["identity"]["steps"]) == (2, True, 6)


@pytest.mark.parametrize("kills", [(1,), (3,), (6,), (1, 2, 5)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, kills: tuple[int, ...]) -> None:
    whole = _run(tmp_path / "whole")
    for step in kills:
        with pytest.raises(_Killed):
            _run(tmp_path / "out", save_every_s=0, after_step=_killed_at(step))
        assert _state(tmp_path / "out")["step"] == step
    again = _run(tmp_path / "out")
    for name, tensor in whole.state()["model"].items():
        assert torch.equal(again.state()["model"][name], tensor)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("out", "whole")]
    assert [line.split(",")[0] for line in logs[0]] == ["step", *map(str, range(1, 7))]
    # All but the seconds.
    assert [re.sub(r"^(\d+),[^,]*", r"\1", line) for line in logs[0]] == [
        re.sub(r"^(\d+),[^,]*", r"\1", line) for line in logs[1]
    ]


def test_steps_beyond_the_last_checkpoint_are_logged_once(tmp_path: Path) -> None:
    with pytest.raises(_Killed):
        _run(tmp_path / "out", after_step=_killed_at(4))
    assert not (tmp_path / "out" / "state.pt").exists()
    _run(tmp_path / "out")
    lines = (tmp_path / "out" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", *map(str, range(1, 7))]


def test_stopping_short_and_going_on_later(tmp_path: Path) -> None:
    """What a caller that judges the model now and then does."""
    whole, trainer = _run(tmp_path / "whole"), _trainer()
    with TrainingFolder(tmp_path / "out", trainer.identity()) as folder:
        for until in (2, 4, 6):
            folder.train(trainer, until=until)
            assert _state(tmp_path / "out")["step"] == trainer.step == until
    for name, tensor in whole.state()["model"].items():
        assert torch.equal(trainer.state()["model"][name], tensor)
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 7


def test_checkpoints_come_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    saved = []
    true_save = TrainingFolder.save

    def save(folder: TrainingFolder, trainer: Trainer) -> None:
        saved.append(trainer.step)
        true_save(folder, trainer)

    def tick(report: StepReport) -> None:
        now[0] += 10

    monkeypatch.setattr(TrainingFolder, "save", save)
    _run(tmp_path / "out", save_every_s=25, after_step=tick)
    assert saved == [4, 6]


# Refused


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    identity = _trainer().identity()
    with TrainingFolder(tmp_path / "out", identity):
        with pytest.raises(InputError, match="out: another run is writing to this folder"):
            TrainingFolder(tmp_path / "out", identity).__enter__()
    with TrainingFolder(tmp_path / "out", identity):
        pass


def test_other_settings_are_refused_and_named_or_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run(out)
    (out / "notes.txt").write_text("mine")
    (out / "model.safetensors").write_text("the old model")
    before = _files(out)
    problem = (
        r"out: holds a run with other settings \(learning_rate: 0.05 there, 0.1 now; steps: 6 there, 4 now\); choose"
    )
    with pytest.raises(InputError, match=problem):
        _run(out, changes={"steps": 4, "learning_rate": 0.1})
    assert _files(out) == before
    trainer = _run(out, changes={"steps": 4, "learning_rate": 0.1}, overwrite=True)
    assert trainer.step == 4
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "model.safetensors").exists()
    assert len((out / "log.csv").read_text().splitlines()) == 5


def test_overwriting_a_run_of_the_same_settings_repeats_nothing(tmp_path: Path) -> None:
    _run(tmp_path / "out")
    with TrainingFolder(tmp_path / "out", _trainer().identity(), overwrite=True) as folder:
        assert folder.report == {"loss": 1.0}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    for name in ("thesis.tex", "state.pt"):
        (tmp_path / "out" / name).write_text("mine")
    before = _files(tmp_path / "out")
    with pytest.raises(InputError, match=r"out: is not empty and holds no run \(state.pt, thesis.tex\)"):
        _run(tmp_path / "out", overwrite=overwrite)
    after = _files(tmp_path / "out")
    after.pop(".lock", None)
    assert after == before


def test_a_file_or_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: is a file; --out names a folder"):
        _run(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written to"):
        _run(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "run.json: not readable as JSON"),
        ("[]", "run.json: holds no JSON object"),
        ('{"schema_version": 9}', "run.json: has schema version 9, this release reads 2"),
        ('{"schema_version": 2}', "run.json: is no training run's"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    _run(tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(InputError, match=problem):
        _run(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: [1], r"state\.pt: not a readable training state"),
        (lambda state: state | {"version": 9}, r"state\.pt: state has schema version 9, this release reads 2"),
        (lambda state: state | {"identity": {"steps": 1}}, r"state\.pt: the run there has other settings: .*steps"),
        (lambda state: state | {"model": {}}, r"state\.pt: not this model's training state \(not the tensors"),
        (
            lambda state: state | {"model": {**state["model"], "1.weight": torch.zeros(2, 2)}},
            r"state\.pt: not this model's training state \(Error\(s\) in loading",
        ),
        (lambda state: {key: state[key] for key in state if key != "position"}, r"state\.pt: not this model's"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, change: Callable[[Any], Any], problem: str) -> None:
    with pytest.raises(_Killed):
        _run(tmp_path / "out", save_every_s=0, after_step=_killed_at(2))
    torch.save(change(_state(tmp_path / "out")), tmp_path / "out" / "state.pt")
    with pytest.raises(InputError, match=problem):
        _run(tmp_path / "out")


# Full disks


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_save = torch.save

    def full(state: dict[str, Any], path: Path) -> None:
        if state["step"] == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        true_save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"state\.pt: cannot be written \(No space left on device\); what was there"):
        _run(tmp_path / "out", save_every_s=0)
    assert _state(tmp_path / "out")["step"] == 3
    assert not list((tmp_path / "out").glob(".*.tmp"))
    monkeypatch.setattr(torch, "save", true_save)
    whole, again = _run(tmp_path / "whole"), _run(tmp_path / "out")
    assert torch.equal(again.task.model[1].weight, whole.task.model[1].weight)  # type: ignore[index]


_LIMITED = """
import resource, signal, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from protnest.engine import InputError
from support.learning import CPU, LinearTask
from protnest.training.trainer import Trainer, TrainerConfig
from protnest.training.training_folder import TrainingFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trainer = Trainer(LinearTask(), TrainerConfig(steps=6, batch_tokens=20), device=CPU)
with TrainingFolder(Path({out!r}), trainer.identity()) as folder:
    folder.train(trainer, until=2)
    # From here on no file may grow beyond 1 kB: what a full disk does to whoever writes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    try:
        folder.train(trainer)
    except InputError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_told_clearly(tmp_path: Path) -> None:
    script = _LIMITED.format(tests=str(Path(__file__).resolve().parents[1]), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "state.pt: cannot be written (" in done.stdout, done.stderr
    assert "the run goes on from it" in done.stdout
    assert _state(tmp_path / "out")["step"] == 2


def test_a_log_that_cannot_be_written_is_told_clearly(tmp_path: Path) -> None:
    trainer = _trainer()
    with (
        TrainingFolder(tmp_path / "out", trainer.identity()),
        training_log.TrainingLog(tmp_path / "out", steps_done=0) as log,
    ):
        log._file.close()  # type: ignore[union-attr]
        log._file = Path("/dev/full").open("w", buffering=1)
        report = StepReport(step=1, epoch=0, loss=1.0, learning_rate=0.1, gradient_norm=1.0, tokens=3)
        with pytest.raises(InputError, match=r"log\.csv: cannot be written \(No space left on device\); the last"):
            log.add(report)
        log._file = os.fdopen(os.open(tmp_path / "out" / "log.csv", os.O_APPEND | os.O_WRONLY), "a")


# TensorBoard


class _Events:
    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, list[Any](), False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, step))

    def close(self) -> None:
        self.closed = True


def test_events_are_written_where_tensorboard_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[_Events] = []

    def writer(folder: Path, steps_done: int) -> _Events:
        made.append(_Events(str(folder), steps_done + 1))
        return made[-1]

    monkeypatch.setattr(training_log, "_event_writer", writer)
    with pytest.raises(_Killed):
        _run(tmp_path / "out", save_every_s=0, after_step=_killed_at(3))
    _run(tmp_path / "out")
    first, second = made
    assert (first.purge_step, second.purge_step) == (1, 4)
    assert first.folder == str(tmp_path / "out" / "tensorboard")
    names = ("loss", "learning_rate", "gradient_norm")
    assert first.scalars == [(name, step) for step in (1, 2, 3) for name in names]
    assert second.scalars == [(name, step) for step in (4, 5, 6) for name in names]
    assert first.closed
    assert second.closed


def test_without_tensorboard_there_is_the_log_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _run(tmp_path / "out")
    assert not (tmp_path / "out" / "tensorboard").exists()
    assert (tmp_path / "out" / "log.csv").exists()


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    _run(tmp_path / "out")
    assert list((tmp_path / "out" / "tensorboard").glob("events.out.tfevents.*"))
