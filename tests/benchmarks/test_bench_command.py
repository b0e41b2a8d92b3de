"""protnest bench: mounted, five suites, rows only where a file is named, one JSON object, exit codes."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.benchmarks import (
    bench_embed,
    bench_generate,
    bench_kd,
    bench_nested,
    bench_score,
    cli,
    embed_suite,
    generate_comparison,
)
from protnest.benchmarks.generate_memory import MemoryUse
from protnest.benchmarks.kd_problems import LOGITS, Problem
from protnest.benchmarks.parity import ParityError
from protnest.engine.cli import app
from protnest.engine.config import EncoderConfig
from typer.testing import CliRunner

from support.generating import tiny_generation
from support.scoring import tiny_problem
from support.tiny import random_proteins, save_tiny_model, write_fasta

ENTRY_POINTS = {entry.name: entry for entry in importlib.metadata.entry_points(group="protnest.commands")}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every suite at a size that takes seconds; the FASTA file for it."""
    monkeypatch.setitem(embed_suite.SHAPES, "tiny", EncoderConfig(layers=1, width=16, heads=2, feedforward=64))
    for module in (embed_suite, bench_kd):
        monkeypatch.setattr(module, "copy_gbytes_per_s", lambda device: 1.0)
    problem = Problem(operation=LOGITS, vocabulary=33, rows=64, segments="proteins", precision="fp32", seed=0)
    monkeypatch.setattr(bench_kd, "usual_problems", lambda **options: [problem])
    models = [str(save_tiny_model(tmp_path / "tiny"))]
    monkeypatch.setattr(bench_nested, "default_models", lambda: models)
    monkeypatch.setattr(bench_score, "find_problem", lambda *given, **options: tiny_problem())
    monkeypatch.setattr(bench_score, "SCANS", tmp_path)
    monkeypatch.setattr(bench_generate, "Problem", tiny_generation)
    use = MemoryUse(libraries_bytes=None, load_peak_bytes=None, held_bytes=None, peak_bytes={1: None, 2: None})
    monkeypatch.setattr(generate_comparison, "measure_memory", lambda task: use)
    # Nested runs on one thread, and would leave the tests after it there.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return write_fasta(tmp_path / "a.fasta", random_proteins(9, seed=0))


def _run(*options: str) -> Any:
    if "bench" not in ENTRY_POINTS:
        pytest.skip("this installation is older than the command: pip install -e .")
    return CliRunner().invoke(app, ["bench", *options])


def test_it_is_mounted() -> None:
    if "bench" not in ENTRY_POINTS:
        pytest.skip("this installation is older than the command: pip install -e .")
    assert ENTRY_POINTS["bench"].load() is cli.bench


def _options(suite: str, fasta: Path) -> list[str]:
    own = {
        "embed": ["--shapes", "tiny", "--sequences", "6", "--peers", "none", "--precisions", "fp32"],
        "nested": ["--sequences", "2"],
        "kd": ["--quick"],
        "score": ["--positions", "5", "--precisions", "fp32,bf16"],
        "generate": ["--shapes", "tiny", "--tokens", "6", "--batch", "2", "--precisions", "fp32"],
    }
    given = ["--suite", suite, "--device", "cpu", "--pairs", "2", *own[suite]]
    return given if suite in ("kd", "score", "generate") else [*given, "--fasta", str(fasta)]


@pytest.mark.parametrize("suite", ["embed", "kd", "score", "generate"])
def test_a_suite_prints_a_table_and_appends_rows(small: Path, tmp_path: Path, suite: str) -> None:
    out = tmp_path / "rows.jsonl"
    result = _run(*_options(suite, small), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "peak of this process" in result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["suite"] == suite
        assert row["peak_host_bytes"] > 10**7
        assert row["peak_device_bytes"] is None


@pytest.mark.parametrize("suite", ["embed", "nested", "kd", "score", "generate"])
def test_json_is_one_object_and_no_file_appears(
    small: Path, tmp_path: Path, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if suite == "nested":
        # One model makes no chain: what is measured is tested in test_bench_nested.
        monkeypatch.setattr(bench_nested, "run_nested", lambda *given, **options: [{"suite": "nested"}])
        monkeypatch.setattr(bench_nested, "nested_table", lambda rows: "")
    before = sorted(tmp_path.rglob("*"))
    result = _run(*_options(suite, small), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["suite"], report["device"]) == (suite, "cpu")
    assert report["rows"]
    assert report["peak_host_bytes"] > 10**7
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_answer_ends_it_with_exit_code_1(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: object, **options: object) -> None:
        message = "peer fp32: the embedding of protein 3 is off"
        raise ParityError(message)

    monkeypatch.setattr(bench_embed, "measure_embed", wrong)
    result = _run(*_options("embed", small))
    assert result.exit_code == 1
    assert "error: peer fp32: the embedding of protein 3 is off" in result.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--suite", "speed"], 2, "'speed' is not one of"),
        (["--shapes", "9M"], 2, "unknown: 9M"),
        (["--mix", "equal"], 2, "unknown: equal"),
        (["--mix", "uniform", "--fasta", "a.fasta"], 2, "a FASTA file goes with the mix uniprot alone"),
        (["--precisions", "fp8"], 2, "unknown: fp8"),
        (["--suite", "score", "--precisions", "fp16"], 2, "unknown: fp16"),
        (["--suite", "score", "--positions", "0"], 2, "--positions"),
        (["--suite", "generate", "--shapes", "8M"], 2, "unknown: 8M"),
        (["--suite", "generate", "--tokens", "2"], 2, "--tokens"),
        (["--fasta", "missing.fasta"], 1, "missing.fasta"),
        (["--esm-cpp-python", "/no/such/python"], 1, "cannot import esm_cpp"),
    ],
)
def test_errors_are_named(small: Path, options: list[str], code: int, message: str) -> None:
    result = _run("--device", "cpu", *options)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
