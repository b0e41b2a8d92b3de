"""`protnest distill`: from options to a run, and the executable killed for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine.cli import app
from protnest.engine.models import load_model
from protnest.training import distillation
from typer.testing import CliRunner

from support.learning import fasta_to_train, save_toy, toy_encoder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "teacher": save_toy(tmp_path / "teacher", toy_encoder(1)),
        "student": save_toy(tmp_path / "student", toy_encoder(0)),
        "data": fasta_to_train(tmp_path / "in.fasta"),
        "out": tmp_path / "out",
    }


def _arguments(files: dict[str, Path], *more: str, steps: int = 3) -> list[str]:
    given = [f"--{name}={path}" for name, path in files.items()]
    small = ["--batch-tokens", "100", "--precision", "fp32", "--device", "cpu"]
    return ["distill", *given, *small, *([f"--steps={steps}"] if steps else []), *more]


def test_it_distils_and_reports(files: dict[str, Path], command: CliRunner) -> None:
    result = command.invoke(app, _arguments(files, "--json"))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((files["out"] / "training.json").read_text())
    assert (report["teacher"], report["recipe"]["steps"]) == ("teacher", 3)
    load_model(files["out"], device="cpu", precision="fp32")
    # The same command on a finished folder does nothing; another one is refused, with a message and no traceback.
    plain = command.invoke(app, _arguments(files))
    assert plain.exit_code == 0, plain.output
    assert plain.stdout == ""
    assert "student: " in plain.stderr
    assert "unigram: " in plain.stderr
    assert "KL of teacher" in plain.stderr
    refused = command.invoke(app, _arguments(files, "--seed", "3"))
    assert refused.exit_code == 1
    assert "seed: 0 there, 3 now" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    again = command.invoke(app, _arguments(files, "--seed", "3", "--overwrite"))
    assert again.exit_code == 0, again.output


def test_every_option_reaches_the_run(
    files: dict[str, Path], command: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[Any, ...]] = []

    def run(*args: Any, **options: Any) -> dict[str, Any]:
        seen.append((*args, options))
        return {}

    monkeypatch.setattr(distillation, "distill", run)
    options = (
        *("--no-uncertainty", "--no-smoothing", "--temperature", "3", "--alpha", "0.25", "--smoothing", "0.3"),
        *("--weight-normalization", "weight", "--rows", "all", "--accumulate", "4", "--learning-rate", "0.01"),
        *("--warmup", "7", "--schedule", "cosine", "--weight-decay", "0.2", "--mask-epochs", "5", "--init", "layers"),
        *("--cache", str(tmp_path / "cache"), "--cache-top-k", "9", "--held-out", "11", "--seed", "6", "--overwrite"),
        *("--save-every", "5", "--vocabulary", "residues", "--epochs", "2", "--json"),
    )
    assert command.invoke(app, _arguments(files, *options, steps=0)).exit_code == 0
    ((teacher, data, out, config, more),) = seen
    assert (teacher, data, out) == (str(files["teacher"]), files["data"], files["out"])
    kd, trainer = config.options, config.trainer
    assert (kd.uncertainty, kd.smooth, kd.temperature, kd.alpha, kd.smoothing) == (False, False, 3.0, 0.25, 0.3)
    assert (kd.weight_normalization, config.rows, config.init) == ("weight", "all", "layers")
    assert config.vocabulary == "residues"
    assert (trainer.accumulate, trainer.learning_rate, trainer.warmup_steps, trainer.schedule) == (4, 0.01, 7, "cosine")
    assert (trainer.weight_decay, trainer.seed, trainer.batch_tokens, trainer.precision) == (0.2, 6, 100, "fp32")
    assert (config.mask_epochs, config.cache_top_k, config.held_out, config.epochs) == (5, 9, 11, 2)
    assert (more["cache"], more["overwrite"], more["save_every_s"], more["device"]) == (
        tmp_path / "cache",
        True,
        5.0,
        "cpu",
    )
    seen.clear()
    assert command.invoke(app, _arguments(files | {"teacher": "none"}, "--json", steps=40)).exit_code == 0  # type: ignore[dict-item]
    ((teacher, _, _, config, more),) = seen
    assert teacher is None
    assert (config.trainer.steps, config.trainer.warmup_steps, config.mask_epochs, more["cache"]) == (40, 2, None, None)
    assert (config.options.uncertainty, config.options.smooth) == (True, True)
    seen.clear()
    assert command.invoke(app, _arguments(files, "--quick", "--json", steps=0)).exit_code == 0
    config = seen[0][3]
    assert (config.trainer.steps, config.trainer.batch_tokens, config.held_out) == (60, 100, 100)


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        (("--steps", "3", "--epochs", "2"), 2, "--steps and --epochs exclude each other"),
        (("--resume", "--overwrite"), 2, "--resume and --overwrite exclude each other"),
        (("--resume",), 1, "holds no run to go on with"),
        (("--temperature", "0"), 1, "temperature is 0.0, expected a positive number"),
        (("--alpha", "2"), 2, "--alpha"),
        (("--rows", "some"), 2, "some"),
        (("--seed", "-1"), 2, "--seed"),
        (("--seed", "4294967296"), 1, "seed is 4294967296, expected 0 to 4294967295"),
        (("--device", "tpu"), 1, "device is 'tpu'"),
        (("--student", "nano-xl"), 1, "no student 'nano-xl'"),
        (("--teacher", "nano-xl"), 1, "no model 'nano-xl'"),
        (("--learning-rte", "3"), 2, "No such option"),
    ],
)
def test_wrong_options_are_refused(
    files: dict[str, Path], command: CliRunner, more: tuple[str, ...], code: int, problem: str
) -> None:
    result = command.invoke(app, _arguments(files, *more))
    assert result.exit_code == code, result.output
    assert problem in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not files["out"].exists()


def test_it_has_help(command: CliRunner) -> None:
    result = command.invoke(app, ["distill", "--help"])
    assert result.exit_code == 0
    assert "Train a student from a teacher" in result.output


def _steps(out: Path) -> int:
    try:
        return len((out / "log.csv").read_text().splitlines()) - 1
    except OSError:
        return 0


def test_a_run_that_is_killed_for_real_ends_with_the_same_bits(
    files: dict[str, Path], command: CliRunner, tmp_path: Path
) -> None:
    out = {name: files | {"out": tmp_path / name} for name in ("killed", "whole")}
    main = "import sys; from protnest.engine.cli import main; sys.argv[0] = 'protnest'; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", main, *_arguments(out["killed"], "--save-every", "0", steps=60)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    killed, deadline = tmp_path / "killed", time.monotonic() + 120
    while _steps(killed) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read().decode()
    step = torch.load(killed / "state.pt", weights_only=True)["step"]
    assert 1 <= step < 60
    # The rest in this process.
    for name in ("killed", "whole"):
        result = command.invoke(app, _arguments(out[name], steps=60))
        assert result.exit_code == 0, result.output
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("killed", "whole")]
    assert states[0]["step"] == states[1]["step"] == 60
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    files_written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert files_written[0] == files_written[1]
    assert _steps(killed) == 60
