"""What users get wrong with decoders and judgements, through the executable: exit code, one line, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from protnest.engine.cli import app
from typer.testing import CliRunner

from support.gpt2_models import byte_pairs, save_gpt2, save_residue_gpt2
from support.tiny import random_proteins, write_fasta

PROTEINS = random_proteins(6, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoders over residues, and over byte pairs of another tokenizer than the model's; files of sequences."""
    folder = tmp_path_factory.mktemp("bad")
    save_residue_gpt2(folder / "letters")
    save_gpt2(folder / "clash")
    byte_pairs(380).save(str(folder / "clash" / "tokenizer.json"))
    shutil.copytree(folder / "letters", folder / "relabelled")
    (folder / "relabelled" / "vocab.txt").write_text("A\nC\n")
    shutil.copytree(folder / "letters", folder / "mute")
    (folder / "mute" / "vocab.txt").unlink()
    write_fasta(folder / "ours.fasta", PROTEINS)
    write_fasta(folder / "stop.fasta", ["MKT*AY"])
    (folder / "empty.fasta").write_text("")
    (folder / "text.hmm").write_text("hello")
    return folder


GENERATE = ["generate", "-n", "2", "--out", "out.fasta", "--model"]
EVALUATE = ["evaluate", "--out", "out.json"]
DESIGNS = [*EVALUATE, "--generated", "ours.fasta", "--reference", "ours.fasta"]
CLASH = "clash: the tokenizer has 380 tokens, the model 400: they do not belong together"
PROCESSES = [
    ([*GENERATE, "letters", "--prompt", "MKTAY" * 30], "the prompt and its context take 151 tokens of the 96"),
    ([*GENERATE, "letters", "--top-k", "0"], "top_k is 0, expected at least 1"),
    ([*GENERATE, "letters", "--temperature", "0"], "temperature is 0.0, expected a number above 0"),
    ([*GENERATE, "letters", "--min-residues", "9", "--max-residues", "8"], "no length meets that"),
    ([*GENERATE, "clash"], CLASH),
    ([*EVALUATE, "ours.fasta", "--model", "clash"], CLASH),
    ([*EVALUATE, "empty.fasta", "--model", "letters"], "empty.fasta"),
    ([*DESIGNS, "--hmm", "missing.hmm"], "missing.hmm: there is no profile file"),
]
"""Each as a process of its own, which costs seconds."""
CASES = [
    ([*GENERATE, "letters", "--prompt", "MK1"], "'1' at residue 3 is not a residue"),
    ([*GENERATE, "letters", "--temperature", "-1"], "temperature is -1.0, expected a number above 0"),
    ([*GENERATE, "letters", "--temperature", "nan"], "temperature is nan, expected a number above 0"),
    ([*GENERATE, "letters", "--min-residues", "200"], "200 residues do not fit into the 96 tokens of letters"),
    ([*GENERATE, "letters", "--prompt", "MKT", "--max-residues", "2"], "the prompt has 3 residues already"),
    ([*GENERATE, "relabelled"], "relabelled: holds no vocabulary"),
    ([*GENERATE, "mute"], "mute: holds no vocabulary: neither tokenizer.json"),
    ([*EVALUATE, "ours.fasta", "--model", "letters", "--train", "ours.fasta"], "nothing to judge by"),
    ([*EVALUATE, "missing.fasta", "--model", "letters"], "missing.fasta"),
    ([*EVALUATE, "stop.fasta", "--model", "letters"], "stop.fasta"),
    ([*DESIGNS, "--hmm", "text.hmm"], "text.hmm: is no HMMER profile"),
    ([*DESIGNS, "--alignment", "missing.a2m"], "missing.a2m: there is no alignment file"),
    ([*EVALUATE, "--generated", "empty.fasta", "--reference", "ours.fasta"], "empty.fasta"),
    ([*EVALUATE, "--generated", "ours.fasta", "--reference", "empty.fasta"], "empty.fasta"),
]


def _name(each: list[str] | str) -> str:
    return " ".join(each) if isinstance(each, list) else ""


def _run(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    command = [sys.executable, "-m", "protnest.engine.cli", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)


def _check(folder: Path, before: list[str], said: str, problem: str) -> None:
    assert "Traceback" not in said
    assert problem in " ".join(said.split())
    assert said.count("error:") == 1
    assert _files(folder) == before


def _files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def _need_packages(words: list[str]) -> None:
    if "--generated" in words:
        pytest.importorskip("pyhmmer")
        pytest.importorskip("parasail")


@pytest.mark.parametrize(("words", "problem"), PROCESSES, ids=_name)
def test_the_executable_says_it_and_writes_nothing(folder: Path, words: list[str], problem: str) -> None:
    _need_packages(words)
    before = _files(folder)
    done = _run(folder, words)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    _check(folder, before, done.stderr, problem)


@pytest.mark.parametrize(("words", "problem"), CASES, ids=_name)
def test_the_command_says_it_and_writes_nothing(
    folder: Path, words: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _need_packages(words)
    before = _files(folder)
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.output
    _check(folder, before, done.output, problem)


def test_the_same_words_without_the_mistake(folder: Path, tmp_path: Path) -> None:
    """So that it is the mistake that is refused."""
    fasta, report = tmp_path / "out.fasta", tmp_path / "out.json"
    words = ["generate", "-n", "2", "--out", str(fasta), "--model", str(folder / "letters"), "--prompt", "MKTAY"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert fasta.read_text().count(">") == 2
    words = ["evaluate", str(folder / "ours.fasta"), "--model", str(folder / "letters"), "--out", str(report)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert json.loads(report.read_text())["prediction"]["model"]["task"] == "next tokens"
