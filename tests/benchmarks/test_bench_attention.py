"""bench_attention: rows of what was asked for, a difference stops the run, wrong words are usage errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from protnest.benchmarks import bench_attention, cached_step
from protnest.benchmarks.bench_attention import attention, measure
from protnest.kernels.extension import missing_reason
from typer.testing import CliRunner

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=f"C++: {missing_reason()}")

FEW = ("--tokens", "60", "--pairs", "2")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    app = typer.Typer()
    app.command()(attention)

    def invoke(*options: str) -> tuple[int, str, list[dict[str, Any]]]:
        out = tmp_path / "rows.jsonl"
        result = CliRunner().invoke(app, [*options, "--out", str(out)])
        lines = out.read_text("utf-8").splitlines() if out.exists() else []
        return result.exit_code, result.output, [json.loads(line) for line in lines]

    return invoke


def test_rows_of_each_width_and_precision(run: Any) -> None:
    code, output, rows = run("--head-widths", "8,24", *FEW)
    assert code == 0, output
    assert [(row["head_width"], row["precision"]) for row in rows] == [
        (K, name) for K in (8, 24) for name in ("fp32", "bf16")
    ]
    for row in rows:
        assert row["suite"] == "attention"
        assert row["tokens"] >= 60
        assert row["ours_times_faster_min"] <= row["ours_times_faster_median"] <= row["ours_times_faster_max"]
        assert row["gflops"] > 0
        assert row["error"] <= bench_attention.ALLOWED[row["precision"]]


def test_a_difference_ends_the_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true = bench_attention.rotary_attention

    def broken(*given: Any, impl: str) -> torch.Tensor:
        return true(*given, impl=impl) * (1.001 if impl == "cpu" else 1.0)

    monkeypatch.setattr(bench_attention, "rotary_attention", broken)
    code, output, rows = run("--precisions", "fp32", *FEW)
    assert (code, rows) == (1, [])
    assert "K = 16, fp32: off by 0.001 of the norm, allowed is 1e-05" in output
    with pytest.raises(RuntimeError, match="off by"):
        measure(16, "fp32", tokens=60, pairs=2)


STEP = ("--cached", "--shapes", "4x64", "--lengths", "1,9", "--pairs", "2")


def test_rows_of_steps(run: Any) -> None:
    code, output, rows = run(*STEP, "--sequences", "1,5")
    assert code == 0, output
    assert [(row["sequences"], row["length"], row["precision"], row["mixed"]) for row in rows] == [
        *((1, length, name, False) for length in (1, 9) for name in ("fp32", "bf16")),
        *((5, 1, name, False) for name in ("fp32", "bf16")),
        *((5, 9, name, mixed) for name in ("fp32", "bf16") for mixed in (False, True)),
    ]
    for row in rows:
        assert row["suite"] == "cached attention"
        assert (row["heads"], row["head_width"]) == (4, 64)
        read_tokens = row["sequences"] * row["length"]
        if row["mixed"]:  # of 4 to 13, in steps of 9 / 4, cut off
            read_tokens = 4 + 6 + 9 + 11 + 13
        assert row["read_bytes"] == 2 * 256 * (4 if row["precision"] == "fp32" else 2) * read_tokens
        for name in ("padded", "each"):
            low, median, high = (row[f"times_{name}_{which}"] for which in ("min", "median", "max"))
            assert 0 < low <= median <= high


def test_a_difference_of_a_step_ends_the_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true = cached_step.cached_attention
    monkeypatch.setattr(cached_step, "cached_attention", lambda *given, impl: 1.001 * true(*given, impl=impl))
    code, output, rows = run(*STEP, "--precisions", "fp32")
    assert (code, rows) == (1, [])
    assert "4x64, fp32, 1 x 1: off padded by 0.001 of the norm, allowed is 1e-05" in output


@pytest.mark.parametrize(
    "options", [("--shapes", "4x65"), ("--sequences", "0"), ("--lengths", "few"), ("--precisions", "int8")]
)
def test_steps_that_cannot_be_measured(run: Any, options: tuple[str, str]) -> None:
    assert run(*STEP, *options)[0] == 2


@pytest.mark.parametrize(
    ("options", "code"),
    [(("--precisions", "int8"), 2), (("--head-widths", "wide"), 2), (("--head-widths", "6"), 1), (("--pairs", "1"), 2)],
)
def test_what_cannot_be_measured(run: Any, options: tuple[str, ...], code: int) -> None:
    assert run(*options, *(() if "--pairs" in options else FEW))[0] == code
