"""bench_export: a whole run with tiny models; a difference ends it with exit code 1 and no rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from protnest.benchmarks import bench_export
from typer.testing import CliRunner

from support.exported import tiny_export, with_outputs
from support.tiny import random_proteins, write_fasta

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

APP = typer.Typer()
APP.command()(bench_export.exported)


def _start(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> tuple[int, str, Path]:
    """With a file that is there already: tracing takes seconds."""
    ready = with_outputs(tiny_export() / "tiny.onnx", ["residue"], folder / "ready.onnx")

    def export(encoders: Any, out: Path, **options: Any) -> None:
        shutil.copy(ready, out)

    monkeypatch.setattr(bench_export, "export_onnx", export)
    fasta, out = write_fasta(folder / "a.fasta", random_proteins(9, seed=0, longest=30)), folder / "rows.jsonl"
    words = ["--models", model, "--fasta", str(fasta), "--sequences", "4", "--pairs", "3", "--out", str(out)]
    result = CliRunner().invoke(APP, words)
    return result.exit_code, result.output, out


def test_a_run_appends_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, out = _start(tmp_path, monkeypatch, str(tiny_export() / "tiny24"))
    assert code == 0, output
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["suite"], row["model"], row["width"], row["pairs"]) == ("export", "tiny24", 24, 3)
    assert 0 < row["onnx_over_torch_min"] <= row["onnx_over_torch_median"] <= row["onnx_over_torch_max"]
    assert row["parity_error"] <= bench_export.ALLOWED
    assert row["padding_share"] >= 0
    assert row["onnx_residues_per_cpu_s_median"] > 0
    assert "tiny24" in output


def test_a_difference_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_export, "ALLOWED", 0.0)
    code, output, out = _start(tmp_path, monkeypatch, str(tiny_export() / "tiny24"))
    assert code == 1
    assert "tiny24: embeddings are off by" in output
    assert not out.exists()


def test_padding_of_runs() -> None:
    assert bench_export.padding_share([10, 10, 10], 4096) == 0
    assert bench_export.padding_share([10, 4, 500], 4096) == pytest.approx(6 / 514)
    assert bench_export.padding_share([100, 50], 4096) == 0
