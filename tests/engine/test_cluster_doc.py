"""docs/cluster.md runs: its scripts are executed with a `protnest` that only says what it was asked for."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from protnest.engine.cli import app

DOC = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOC, flags=re.MULTILINE | re.DOTALL)


def _run(script: list[str], folder: Path, **environment: str) -> list[list[str]]:
    """What a script asks of `protnest`, each time."""
    stub = folder / "bin"
    stub.mkdir()
    for name, text in {"protnest": 'printf "%s\\t" "$@"; echo', "srun": 'exec "$@"'}.items():
        (stub / name).write_text(f"#!/bin/sh\n{text}\n")
        (stub / name).chmod(0o755)
    for job in ("1", "2"):
        (folder / "jobs" / job).mkdir(parents=True)
    done = subprocess.run(
        script,
        cwd=folder,
        env={"PATH": f"{stub}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split("\t")[:-1] for line in done.stdout.splitlines()]


def _check_options(asked: list[str]) -> None:
    """All options exist, and the command line can be parsed."""
    group: Any = typer.main.get_command(app)
    command = group.get_command(None, asked[0])
    assert command is not None, asked
    command.make_context(asked[0], list(asked[1:]))


def test_slurm(tmp_path: Path) -> None:
    embed, merge = _blocks("bash")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (asked,) = _run(["bash", "-c", embed], tmp_path / "a", SLURM_ARRAY_TASK_ID="7")
    _check_options(asked)
    (jobs,) = re.findall(r"#SBATCH --array=1-(\d+)", embed)
    assert asked[asked.index("--shard") + 1] == f"7/{jobs}"
    assert asked[asked.index("--out") + 1] == "jobs/7"
    merged, verified = _run(["bash", "-c", merge], tmp_path / "b")
    _check_options(merged)
    _check_options(verified)
    assert merged == ["merge", "jobs/1", "jobs/2", "--out", "embeddings"]
    assert verified == ["verify", "embeddings"]


def test_kubernetes(tmp_path: Path) -> None:
    (text,) = _blocks("yaml")
    embed, merge = yaml.safe_load_all(text)
    for job in (embed, merge):
        assert (job["kind"], job["apiVersion"]) == ("Job", "batch/v1")
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    assert embed["spec"]["completionMode"] == "Indexed"
    scripts = [
        [*container["command"], *container["args"]]
        for job in (embed, merge)
        for container in job["spec"]["template"]["spec"]["containers"]
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (asked,) = _run(scripts[0], tmp_path / "a", JOB_COMPLETION_INDEX="3")
    _check_options(asked)
    assert asked[asked.index("--shard") + 1] == f"4/{embed['spec']['completions']}"
    assert asked[asked.index("--out") + 1] == "/data/jobs/4"
    merged, verified = _run(scripts[1], tmp_path / "b")
    _check_options(merged)
    _check_options(verified)
    assert merged[-2:] == ["--out", verified[-1]] == ["--out", "/data/embeddings"]


def test_options_that_do_not_exist_are_seen() -> None:
    with pytest.raises(Exception, match="No such option"):
        _check_options(["merge", "a", "--out", "b", "--faster"])
