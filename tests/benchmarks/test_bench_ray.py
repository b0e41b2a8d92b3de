"""bench_ray: its rows, with a stand-in for the cluster; a difference ends it with exit code 1 and no rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from protnest.benchmarks import bench_ray
from protnest.engine import embed_library, read_embeddings
from protnest.engine.embedder_plan import EmbedderPlan
from protnest.engine.library import LibraryOptions
from typer.testing import CliRunner

from support.tiny import random_proteins, save_tiny_model, write_fasta

APP = typer.Typer()
APP.command()(bench_ray.bench_ray)


def stand_in(error: float) -> object:
    """Embeds without Ray, in blocks, off by `error` in one number."""

    def run(fasta: Path, out: Path, plan: EmbedderPlan, options: LibraryOptions) -> bench_ray.Run:
        embed_library(fasta, out / "native", plan, options)
        stored = read_embeddings(out / "native")
        rows = np.array(stored.array)
        rows[7, 3] += error
        for number, begin in enumerate(range(0, len(rows), 5)):
            part = pa.table({"id": stored.ids[begin : begin + 5], "embedding": list(rows[begin : begin + 5])})
            pq.write_table(part, out / f"part-{number:05d}.parquet")
        return bench_ray.Run(3.0, 1.0, 50.0)

    return run


@pytest.mark.parametrize(("error", "exit_code"), [(0.0, 0), (1.0, 1)])
def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, exit_code: int) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(40))
    monkeypatch.setattr(bench_ray, "check_ray", lambda: None)

    def run_native(*given: Any) -> bench_ray.Run:
        embed_library(*given)
        return bench_ray.Run(2.0, 0.0, 100.0)

    monkeypatch.setattr(bench_ray, "run_native", run_native)
    monkeypatch.setattr(bench_ray, "run_ray", stand_in(error))
    out = tmp_path / "rows.jsonl"
    options = ["--pairs", "2", "--proteins", "12", "--workers", "1", "--fasta", str(fasta), "--model", str(model)]
    done = CliRunner().invoke(APP, [*options, "--out", str(out)])
    assert done.exit_code == exit_code, done.output
    if exit_code:
        assert "part-00001.parquet: its rows are not the native engine's" in done.output.replace("\n", " ")
        assert not out.exists()
        return
    native, ray = map(json.loads, out.read_text().splitlines())
    assert (native["engine"], native["whole_overhead"], native["pace_overhead"]) == ("native", 0.0, 0.0)
    overheads = [ray[name] for name in ("whole_overhead", "without_cluster_overhead", "pace_overhead")]
    assert overheads == [0.5, 0.0, 1.0]
    assert (ray["whole_s"], ray["without_cluster_s"], ray["all_cluster_s"], ray["pairs"]) == (3.0, 2.0, [1.0, 1.0], 2)


def test_too_small_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ray, "run_native", lambda *_: bench_ray.Run(2.0, 0.0, float("nan")))
    monkeypatch.setattr(bench_ray, "run_ray", lambda *_: bench_ray.Run(2.0, 0.0, 1.0))
    monkeypatch.setattr(bench_ray, "check_rows", lambda *_: None)
    with pytest.raises(RuntimeError, match="too few blocks to tell a pace"):
        bench_ray.measure(tmp_path, EmbedderPlan(), LibraryOptions(), 1)


def test_pace_leaves_out_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((100.0, 102.0, 104.0, 200.0))
    monkeypatch.setattr(bench_ray.time, "perf_counter", lambda: next(moments))
    pace = bench_ray.Pace()
    pace.start(3, 300, 0)
    for residues in (20, 10, 61, 9):
        pace.advance(residues)
    assert pace.residues_per_s == 61 / 2
    one = bench_ray.Pace()
    monkeypatch.setattr(bench_ray.time, "perf_counter", lambda: 1.0)
    one.advance(5)
    assert np.isnan(one.residues_per_s)
