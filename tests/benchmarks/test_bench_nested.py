"""bench_nested: a whole run with tiny models; a difference ends it with exit code 1 and no rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from protnest.benchmarks import bench_nested
from protnest.engine.checkpoint import save_checkpoint
from typer.testing import CliRunner

from support.families import tiny_family
from support.tiny import random_proteins, write_fasta

FAMILY = tiny_family()
APP = typer.Typer()
APP.command()(bench_nested.nested)


def _start(folder: Path) -> tuple[int, str, Path]:
    for encoder in FAMILY:
        save_checkpoint(encoder, folder / encoder.name)
    models = ",".join(str(folder / encoder.name) for encoder in FAMILY)
    # No longer than the shortest of the models' lengths: in windows, a model alone would cut them elsewhere.
    fasta, out = write_fasta(folder / "a.fasta", random_proteins(9, seed=0, longest=20)), folder / "rows.jsonl"
    words = ["--models", models, "--fasta", str(fasta), "--sequences", "4", "--pairs", "3", "--out", str(out)]
    result = CliRunner().invoke(APP, words)
    return result.exit_code, result.output, out


def test_a_run_appends_rows(tmp_path: Path) -> None:
    code, output, out = _start(tmp_path)
    assert code == 0, output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["pool"], row["engine"]) for row in rows] == [
        ("mean", "nested"),
        ("mean", "control"),
        ("residue", "nested"),
        ("residue", "control"),
    ]
    for row in rows:
        assert (row["suite"], row["widths"], row["sequences"], row["pairs"]) == ("nested", [16, 24, 40], 4, 3)
        assert 0 < row["times_alone_min"] <= row["times_alone_quartile_low"] <= row["times_alone_median"]
        assert row["times_alone_median"] <= row["times_alone_quartile_high"] <= row["times_alone_max"]
        assert row["times_alone_median_low"] <= row["times_alone_median"] <= row["times_alone_median_high"]


@pytest.mark.parametrize("part", [0, -1], ids=["prefix", "new dimensions"])
def test_a_difference_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    real = bench_nested.Embedder.embed

    def broken(self: bench_nested.Embedder, sequences: list[str]) -> object:
        rows = real(self, sequences)
        if self.chain is not None:
            for row in rows:
                row[..., part] += 1e-2 * np.linalg.norm(row)
        return rows

    monkeypatch.setattr(bench_nested.Embedder, "embed", broken)
    code, output, out = _start(tmp_path)
    assert code == 1
    assert ("dimensions are not tiny16's" if part == 0 else "off by") in " ".join(output.split())
    assert not out.exists()


def test_every_second_pair_begins_with_the_other() -> None:
    calls: list[str] = []

    def work(name: str) -> None:
        calls.append(name)
        sum(range(10**5))

    ones, others, ratios = bench_nested.paired_ratios(lambda: work("one"), lambda: work("other"), 4)
    assert calls == ["one", "other", "other", "one"] * 2
    assert ratios == [late / early for early, late in zip(ones, others, strict=True)]


def test_interval_of_the_median_holds_it() -> None:
    values = np.random.default_rng(0).normal(1, 0.1, size=40).tolist()
    low, high = bench_nested.median_interval(values)
    assert low < float(np.median(values)) < high
    assert high - low < 0.15
