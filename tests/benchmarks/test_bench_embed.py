"""bench_embed: a whole run at a tiny shape; a difference between engines ends it with exit code 1 and no rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from protnest.benchmarks import bench_embed, embed_suite, peers
from protnest.benchmarks.rows import ROOT
from protnest.engine.config import EncoderConfig
from typer.testing import CliRunner

from support.tiny import random_proteins, write_fasta

pytest.importorskip("esm")
pytest.importorskip("transformers")

APP = typer.Typer()
APP.command()(bench_embed.embed)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(bench_embed.SHAPES, "tiny", EncoderConfig(layers=1, width=16, heads=2, feedforward=64))
    monkeypatch.setattr(embed_suite, "copy_gbytes_per_s", lambda device: 1.0)
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins(9, seed=0))

    def start(*options: str) -> tuple[int, str, list[dict[str, Any]]]:
        out = tmp_path / "rows.jsonl"
        given = ["--shapes", "tiny", "--sequences", "6", "--pairs", "2", "--budgets", "1,64", "--precisions", "fp32"]
        given += ["--peers", "fair-esm,transformers"]
        result = CliRunner().invoke(APP, [*given, "--fasta", str(fasta), "--out", str(out), *options])
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return result.exit_code, result.output, rows

    return start


def test_a_run_appends_rows_and_prints_a_table(run: Any) -> None:
    code, output, rows = run()
    assert code == 0, output
    engines = [row for row in rows if row["suite"] == "embed"]
    assert {(row["engine"], row["ours_precision"]) for row in engines} == {
        *(("protnest", None), ("transformers", "fp32"), ("fair-esm", "fp32")),
    }
    for row in rows:
        assert (row["shape"], row["data"], row["sequences"], row["mix"]) == ("tiny", "a.fasta", 6, "uniprot")
    (verdict,) = [row for row in rows if row["suite"] == "verdict"]
    assert set(verdict["ratios"]) == {"ours fp32 / fastest peer", "ours fp32 / fair-esm"}
    for row in rows:
        if row["suite"] == "verdict":
            continue
        assert row["suite"] == "embed"
        assert row["residues_per_s_min"] <= row["residues_per_s_median"] <= row["residues_per_s_max"]
        assert row["budget_tokens"] in (1, 64)
    assert "fair-esm fp32" in output


def test_quick_is_less_of_everything() -> None:
    given = embed_suite.EmbedSettings(shapes=("35M", "150M"), sequences=500, pairs=2, seed=7)
    quick = given.quick()
    assert (quick.shapes, quick.sequences, quick.pairs, quick.seed) == (("8M",), 40, 2, 7)
    assert quick.pass_seconds < given.pass_seconds


def test_the_uniform_mix_tries_a_batch_of_eight_whole_proteins() -> None:
    settings = embed_suite.EmbedSettings(budgets=(1, 1024))
    assert embed_suite.budgets_for(settings, "uniform") == [1, 1024, 8 * 258]
    assert embed_suite.budgets_for(settings, "antibody") == [1, 1024]


def test_breakdown_and_growth_are_runs_of_their_own(run: Any) -> None:
    code, output, rows = run("--breakdown")
    assert code == 0, output
    assert [(row["suite"], row["precision"], sum(row["shares"].values()) > 0.99) for row in rows] == [
        ("breakdown", "fp32", True)
    ]
    code, output, rows = run("--growth", "--peers", "none")
    assert code == 0, output
    assert [row["axis"] for row in rows if row["suite"] == "growth"] == ["length"] * 5 + ["batch"] * 5


def test_a_difference_ends_it_with_exit_code_1(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = peers.Transformers.embed

    def scaled(self: peers.Transformers, sequences: list[str], budget: int) -> np.ndarray:
        return real(self, sequences, budget) * np.float32(1.001)

    monkeypatch.setattr(peers.Transformers, "embed", scaled)
    code, output, rows = run()
    assert code == 1
    assert "transformers fp32: the embedding of protein" in output
    assert rows == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--shapes", "9M"], 2, "unknown: 9M"),
        (["--precisions", "fp16"], 2, "allowed are fp32, bf16, int8"),
        (["--budgets", "0,64"], 2, "expected positive whole numbers"),
        (["--mix", "uniform"], 2, "a FASTA file goes with the mix uniprot alone"),
        (["--peers", "esm"], 2, "unknown: esm"),
        (["--breakdown", "--growth"], 2, "are two runs"),
        (["--sequences", "10"], 1, "holds 9 proteins, 10 were asked for"),
    ],
)
def test_errors_are_named(run: Any, options: list[str], code: int, message: str) -> None:
    got, output, rows = run(*options)
    plain = " ".join(output.replace("│", " ").split())
    assert (got, rows) == (code, [])
    assert message in plain


@pytest.mark.parametrize("script", ["bench_embed.py", "bench_kd.py", "bench_nested.py", "plot_embed.py", "gpu.py"])
def test_scripts_run_by_path_from_the_checkout(script: str) -> None:
    """Also without PYTHONSAFEPATH: then sys.path begins with benchmarks/."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", "--help"],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
