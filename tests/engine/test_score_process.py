"""`protnest score` as a process: killed, interrupted, and with more rows than may be held."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.tiny import LETTERS, save_tiny_model, write_fasta

RESIDUES = 40
PROTEINS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ten proteins, and a table with 16 variants of each, one of them bad."""
    folder = tmp_path_factory.mktemp("score")
    save_tiny_model(folder / "tiny")
    rng = np.random.default_rng(0)
    proteins = ["".join(rng.choice(LETTERS, size=RESIDUES)) for _ in range(PROTEINS)]
    write_fasta(folder / "wt.fasta", proteins)
    lines = ["target,mutant"]
    for number, protein in enumerate(proteins):
        for site in rng.choice(RESIDUES, size=16, replace=False).tolist():
            lines.append(f"protein{number},{protein[site]}{site + 1}{rng.choice(LETTERS)}")
    lines.insert(50, "protein3,A999C")
    (folder / "mutants.csv").write_text("\n".join(lines) + "\n")
    return folder


def command(folder: Path, out: Path, **options: str) -> list[str]:
    files = ["--wt", str(folder / "wt.fasta"), "--mutants", str(folder / "mutants.csv"), "--out", str(out)]
    given = {"model": str(folder / "tiny"), "method": "pseudo-ll", "precision": "fp32", "on-error": "skip", **options}
    more = [word for name, value in given.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "protnest.engine.cli", "score", *files, *more, "--json"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # A suite that runs in the background has SIGINT ignored, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(words: list[str]) -> dict[str, Any]:
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment())
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """What an uninterrupted run says."""
    return finish(command(folder, folder / "whole" / "s.csv"))


def check_finished(folder: Path, out: Path) -> None:
    names = ["s.csv", "s.csv.run.json", "s.rejects.csv"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    for name in ("s.csv", "s.rejects.csv"):
        assert (out.parent / name).read_bytes() == (folder / "whole" / name).read_bytes()
    ours, theirs = (json.loads((path / "s.csv.run.json").read_text()) for path in (out.parent, folder / "whole"))
    assert {**ours, "files": None} == {**theirs, "files": None}


def test_killed_at_random_moments(folder: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 again and again: the files end as if nothing had happened, and nothing else is left."""
    out = tmp_path / "out" / "s.csv"
    work = out.with_name(".s.csv.work")
    protein_s = whole["residues"] / whole["residues_per_s"] / PROTEINS
    moments = random.Random(5)
    # Moments are told by what is finished, and a little by the clock: how fast the machine is now, nobody knows.
    for finished in sorted(moments.sample(range(PROTEINS - 1), 5)):
        process = start(command(folder, out))
        while process.poll() is None and len(list(work.glob("*.safetensors"))) < finished:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.5) * protein_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed: make it longer"
    assert list(work.glob("*.safetensors")), "nothing was kept of what had run"
    facts = finish(command(folder, out))
    assert facts["residues"] < whole["residues"]
    assert (facts["scored"], facts["rejected"]) == (16 * PROTEINS, 1)
    check_finished(folder, out)


def test_an_interrupted_run_goes_on(folder: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """Ctrl-C: exit code 130, no traceback, and the next call goes on."""
    out = tmp_path / "out" / "s.csv"
    process = start(command(folder, out))
    while process.poll() is None and len(list(out.parent.glob(".s.csv.work/*.safetensors"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "goes on from what is finished" in said
    assert "Traceback" not in said
    assert not out.exists()
    facts = finish(command(folder, out))
    assert facts["residues"] < whole["residues"], "two proteins were finished"
    check_finished(folder, out)


@pytest.mark.slow
def test_memory_does_not_follow_the_rows(folder: Path, tmp_path: Path) -> None:
    """Ten times as many multiples take no more than the numbers that are kept of each row, and a batch of them.

    135,000 further rows, at 1 byte for accepted, 4 for the target, 1 for single, 4 for the score, twice while parts are
    joined, are 2 MB; their text is 5 MB, their objects would be 200 MB.
    """
    rng = np.random.default_rng(1)
    protein = "".join(rng.choice(LETTERS, size=56))
    (tmp_path / "wt.fasta").write_text(f">one\n{protein}\n")
    lines = []
    for sites in rng.permuted(np.tile(np.arange(56), (150_000, 1)), axis=1)[:, :4].tolist():
        letters = rng.choice(LETTERS, size=4)
        lines.append(
            ":".join(f"{protein[site]}{site + 1}{letter}" for site, letter in zip(sites, letters, strict=True))
        )
    peaks = {}
    for rows in (15_000, 150_000):
        (tmp_path / "mutants.csv").write_text("mutant\n" + "\n".join(lines[:rows]) + "\n")
        words = command(tmp_path, tmp_path / f"{rows}.csv", method="wt-marginal", model=str(folder / "tiny"))
        facts = finish(words)
        assert facts["scored"] == rows
        peaks[rows] = facts["peak_memory_bytes"]
    assert peaks[150_000] - peaks[15_000] < 30e6, peaks
