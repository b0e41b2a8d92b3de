"""bench_attention: rows of what was asked for, a difference stops the run, wrong words are usage errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from protnest.benchmarks import bench_attention
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


@pytest.mark.parametrize(
    ("options", "code"),
    [(("--precisions", "int8"), 2), (("--head-widths", "wide"), 2), (("--head-widths", "6"), 1), (("--pairs", "1"), 2)],
)
def test_what_cannot_be_measured(run: Any, options: tuple[str, ...], code: int) -> None:
    assert run(*options, *(() if "--pairs" in options else FEW))[0] == code
