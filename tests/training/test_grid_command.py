"""`protnest distill --grid`: from options to a grid, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from protnest.engine.cli import app
from protnest.training import grid
from typer.testing import CliRunner

from support.learning import fasta_to_train, save_toy, toy_encoder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "teacher": save_toy(tmp_path / "teacher", toy_encoder(1)),
        "student": save_toy(tmp_path / "student", toy_encoder(0)),
        "data": fasta_to_train(tmp_path / "in.fasta", held_out=6),
        "out": tmp_path / "out",
    }


def _arguments(files: dict[str, Path], *more: str) -> list[str]:
    given = [f"--{name}={path}" for name, path in files.items()]
    return ["distill", "--grid=2x2", *given, "--precision=fp32", "--device=cpu", *more]


def test_a_grid_says_which_run_it_is_at_and_what_it_found(files: dict[str, Path], command: CliRunner) -> None:
    plot = files["out"].with_suffix(".svg")
    more = ("--lrs=0.01", "--seeds=1", "--steps=2", "--batch-tokens=100", "--plot", str(plot))
    result = command.invoke(app, _arguments(files, *more))
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "run 1 of 5: student, baseline, learning rate 0.01, warm-up 0, seed 0" in said
    assert "run 5 of 5: student, labels, " in said
    assert "do the two help each other (weights divided by count)? Open: one seed cannot tell" in said
    assert plot.read_text().startswith("<?xml")
    again = command.invoke(app, _arguments(files, *more, "--resume", "--json"))
    assert again.exit_code == 0, again.output
    assert again.stderr.count(": finished before") == 5
    assert json.loads(again.stdout) == json.loads((files["out"] / "grid.json").read_text())


def test_every_option_reaches_the_grid(
    files: dict[str, Path], command: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[Any, ...]] = []

    def run(*args: Any, **options: Any) -> dict[str, Any]:
        seen.append((*args, options))
        return {}

    monkeypatch.setattr(grid, "run_grid", run)
    options = (
        *("--lrs", "1e-3, 2e-3", "--warmups", "0,40", "--seeds", "4", "--students", "nano-xs,nano-s", "--steps", "80"),
        *("--weight-normalization", "count,weight", "--temperature", "3", "--rows", "all", "--seed", "6"),
        *("--cache", str(tmp_path / "cache"), "--save-every", "5", "--held-out", "11", "--json"),
    )
    assert command.invoke(app, _arguments(files, *options)).exit_code == 0
    ((teacher, data, out, config, more),) = seen
    assert (teacher, data, out) == (str(files["teacher"]), files["data"], files["out"])
    assert (config.kind, config.students, config.learning_rates) == ("2x2", ("nano-xs", "nano-s"), (1e-3, 2e-3))
    assert (config.warmups, config.seeds, config.weight_normalizations) == ((0, 40), 4, ("count", "weight"))
    base = config.base
    assert (base.options.temperature, base.rows, base.trainer.seed, base.trainer.steps) == (3.0, "all", 6, 80)
    assert (base.held_out, more["cache"], more["save_every_s"], more["device"]) == (11, tmp_path / "cache", 5.0, "cpu")
    for given, seeds, steps, warmup in (((), 3, 1000, 50), (("--quick",), 2, 15, 0), (("--warmup", "7"), 3, 1000, 7)):
        seen.clear()
        assert command.invoke(app, _arguments(files, "--lrs=1e-3", "--json", *given)).exit_code == 0
        config = seen[0][3]
        assert (config.seeds, config.base.trainer.steps, config.warmups) == (seeds, steps, (warmup,))
        assert config.students == (str(files["student"]),)


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        (("--grid=3x3",), 2, "'3x3' is not"),
        (("--seeds=2",), 1, "a grid needs the learning rates that each cell tries: --lrs"),
        (("--lrs=",), 1, "a grid needs learning rates to try, and there are none"),
        (("--lrs=1e-3,fast",), 1, "--lrs is '1e-3,fast', expected numbers joined by commas"),
        (("--lrs=1e-3", "--warmups=0.5"), 1, "--warmups is '0.5', expected whole numbers joined by commas"),
        (("--lrs=1e-3", "--teacher=none"), 1, "--teacher is none"),
        (("--lrs=1e-3", "--teacher=nobody"), 1, "no model 'nobody'"),
        (("--lrs=1e-3", "--learning-rate=1e-3"), 2, "--learning-rate does not go with --grid"),
        (("--lrs=1e-3", "--no-uncertainty"), 2, "--no-uncertainty does not go with --grid"),
        (("--lrs=1e-3", "--no-smoothing"), 2, "--no-smoothing does not go with --grid"),
        (("--lrs=1e-3", "--overwrite"), 2, "--overwrite does not go with --grid"),
        (("--lrs=1e-3", "--weight-normalization=sum"), 1, "weight_normalization is 'sum'"),
        (("--lrs=1e-3", "--resume"), 1, "holds no run to go on with"),
        (("--lrs=1e-3", "--plot=grid.txt"), 1, "pictures end in"),
        (("--lrs=1e-3", "--init=layers"), 1, "init is 'layers'"),
    ],
)
def test_wrong_options_are_refused(
    files: dict[str, Path], command: CliRunner, more: tuple[str, ...], code: int, problem: str
) -> None:
    result = command.invoke(app, _arguments(files, *more))
    assert result.exit_code == code, result.output
    assert problem in " ".join(result.stderr.replace("│", " ").split())
    assert not files["out"].exists()


@pytest.mark.parametrize("option", ["--seeds=2", "--lrs=1e-3", "--warmups=3", "--students=nano-xs", "--plot=a.png"])
def test_a_grids_options_need_a_grid(files: dict[str, Path], command: CliRunner, option: str) -> None:
    arguments = [each for each in _arguments(files, option) if each != "--grid=2x2"]
    result = command.invoke(app, arguments)
    assert result.exit_code == 2
    assert f"{option.split('=')[0]} goes with --grid" in result.stderr
