"""The million's library, what is watched while it runs, and the figures; on a tiny scale."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from protnest.benchmarks.bench_workers import compare_workers, run_embed
from protnest.benchmarks.million import Sample, main, misses, seconds_by_tenth, watch
from protnest.benchmarks.variant_library import LENGTHS, write_variants
from protnest.engine.fasta import read_fasta

from support.tiny import random_proteins, save_tiny_model, write_fasta


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sequences = [protein for protein in random_proteins(200, longest=300) if len(protein) > 10]
    return write_fasta(tmp_path_factory.mktemp("source") / "real.fasta", sequences)


def test_variants_are_the_same_ones_again(tmp_path: Path, source: Path) -> None:
    residues = write_variants(source, tmp_path / "a.fasta", 500)
    write_variants(source, tmp_path / "b.fasta", 300)
    assert (tmp_path / "a.fasta").read_text().startswith((tmp_path / "b.fasta").read_text())
    records = list(read_fasta(tmp_path / "a.fasta"))
    assert len(records) == len({record.id for record in records}) == 500
    assert sum(len(record.sequence) for record in records) == residues
    real = {record.id: record.sequence for record in read_fasta(source)}
    changes = []
    for record in records:
        wild = real[record.header.split()[1]]
        assert LENGTHS[0] <= len(wild) <= LENGTHS[1]
        changes.append(sum(one != other for one, other in zip(record.sequence, wild, strict=True)))
    assert max(changes) <= 10
    assert sum(changes) > 1000


def test_no_protein_of_that_length(tmp_path: Path) -> None:
    short = write_fasta(tmp_path / "short.fasta", ["MKT"])
    with pytest.raises(ValueError, match="no protein of 64 to 226 residues"):
        write_variants(short, tmp_path / "out.fasta", 3)


def _samples(*points: tuple[int, float]) -> list[Sample]:
    return [Sample(shards=shards, cpu_s=cpu_s, peak_bytes=0, wall_s=0.0) for shards, cpu_s in points]


def test_seconds_by_tenth() -> None:
    even = _samples(*((shard, 9.0 + 2.0 * shard) for shard in range(101)))
    assert seconds_by_tenth(even) == pytest.approx([2.0] * 10)
    # Killed after shard 50, begun again with what the start costs; then slower.
    again = _samples(*((shard, 2.0 * shard) for shard in range(51)), (50, 0.5))
    again += _samples(*((shard, 4.0 + 3.0 * (shard - 50)) for shard in range(51, 101)))
    assert seconds_by_tenth(again) == pytest.approx([2.0] * 5 + [3.0] * 5)
    # Two workers in step at first, a shard apart later: what is under way at a tenth's ends hardly counts.
    apart = _samples(*((shard, 4.0 * ((shard + 1) // 2) if shard < 40 else 2.0 * shard + 1.0) for shard in range(491)))
    assert seconds_by_tenth(apart) == pytest.approx([2.0] * 10, rel=0.01)
    few = seconds_by_tenth(_samples((0, 1.0), (5, 3.0), (10, 4.0), (11, 4.5), (20, 9.0)))
    assert few[5] == pytest.approx(0.5)
    assert math.isnan(few[0])


def test_what_misses_is_said() -> None:
    row = {
        "peak_grows_by_bytes": 10**6,
        "idle_share": 0.01,
        "last_tenth_over_first": 1.01,
        "shards": 489,
        "sequences": 10,
        "asked": 10,
    }
    assert misses(row) == []
    assert misses(row | {"peak_grows_by_bytes": 301 * 10**6}) == ["memory grew by 301 MB, allowed are 300"]
    assert misses(row | {"idle_share": 0.06}) == ["stages beside the model took 6.0% of the time, allowed are 5%"]
    assert misses(row | {"last_tenth_over_first": 0.94}) == [
        "the last tenth of shards took 0.940 of the first's processor time, allowed are 0.95 to 1.05"
    ]
    assert misses(row | {"last_tenth_over_first": 0.5, "idle_share": 0.5, "shards": 99}) == []
    assert misses(row | {"sequences": 9}) == ["9 sequences of 10 are in the store"]


def test_a_failed_run_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        list(watch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "out"))
    with pytest.raises(RuntimeError, match="No such file"):
        run_embed(tmp_path / "missing.fasta", tmp_path / "out")


def test_on_a_tiny_scale(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    arguments = [str(source), "--out", str(out), "--count", "9000", "--part", "100", "--model", str(model)]
    monkeypatch.setattr(sys, "argv", ["million", *arguments, "--rows", str(rows)])
    main()
    row = json.loads(rows.read_text())
    assert (row["sequences"], row["asked"], row["part"], row["shards"]) == (9000, 9000, 100, 5)
    assert row["peak_bytes"] >= row["peak_bytes_part"] > 10**8
    assert json.loads(capsys.readouterr().out)["residues"] == row["residues"]
    # Again: all is there, and the figures are those of what was seen before.
    monkeypatch.setattr(sys, "argv", ["million", *arguments])
    main()
    assert json.loads(capsys.readouterr().out)["cpu_s_a_shard_by_tenth"] == row["cpu_s_a_shard_by_tenth"]


def test_workers_beside_one(tmp_path: Path, source: Path) -> None:
    write_variants(source, tmp_path / "library.fasta", 300)
    model = save_tiny_model(tmp_path / "tiny")
    row = compare_workers(tmp_path / "library.fasta", tmp_path, model=str(model), pairs=1)
    assert (row["sequences"], row["workers"], len(row["seconds_of_many"])) == (300, 2, 1)
    assert row["faster"] > 0
