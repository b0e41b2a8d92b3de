"""plot_embed: the newest row of one machine counts, a picture comes out, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from protnest.benchmarks import plot_embed
from protnest.benchmarks.plot_embed import PlotError, latest, read_rows
from typer.testing import CliRunner

APP = typer.Typer()
APP.command()(plot_embed.plot)


def _row(engine: str, median: float, **changes: Any) -> dict[str, Any]:
    given = {"suite": "embed", "device": "cpu", "cpu": "Xeon", "threads": 2, "shape": "8M", "precision": "fp32"}
    rates = {f"residues_per_s_{end}": median * share for end, share in (("median", 1), ("min", 0.9), ("max", 1.2))}
    return {**given, "engine": engine, "mix": "uniprot", **rates, **changes}


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_newest_row_of_each_engine_counts() -> None:
    rows = [_row("ours", 1), _row("peer", 2), _row("ours", 3), _row("ours", 4, precision="bf16")]
    assert [row["residues_per_s_median"] for row in latest(rows, mix="uniprot")] == [3, 2, 4]


def test_machines_and_mixes_stay_apart() -> None:
    old = _row("ours", 1)
    del old["mix"]
    rows = [old, _row("ours", 2, mix="uniform"), _row("ours", 3, cpu="EPYC"), _row("peer", 4, cpu="EPYC", threads=4)]
    assert [row["residues_per_s_median"] for row in latest(rows, mix="uniprot")] == [4]
    assert [row["residues_per_s_median"] for row in latest(rows, mix="uniprot", device="xeon")] == [1]
    assert [row["residues_per_s_median"] for row in latest(rows, mix="uniform")] == [2]
    with pytest.raises(PlotError, match="no rows of the mix antibody"):
        latest(rows, mix="antibody")
    with pytest.raises(PlotError, match="on a machine called 'M3'"):
        latest(rows, mix="uniprot", device="M3")


def test_a_picture_comes_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [_row("protnest", 9), _row("peer", 2), _row("peer", 1, shape="35M"), {"suite": "verdict"}]
    source, out = _write(tmp_path / "rows.jsonl", rows), tmp_path / "docs" / "a.png"
    result = CliRunner().invoke(APP, ["--rows", str(source), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ('{"suite": "embed"\n', "line 1: not JSON"), ("", "no rows of the mix uniprot")],
)
def test_errors_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    source = tmp_path / "rows.jsonl"
    if text is not None:
        source.write_text(text)
    result = CliRunner().invoke(APP, ["--rows", str(source), "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 1
    assert message in result.output


def test_rows_of_other_suites_are_left_out(tmp_path: Path) -> None:
    rows = [_row("ours", 1), {"suite": "growth"}, {"suite": "verdict"}]
    assert len(read_rows(_write(tmp_path / "rows.jsonl", rows))) == 1
