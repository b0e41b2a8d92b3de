"""Pictures of scores: drawn as asked, refused before anything is computed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from protnest.engine.cli import app
from protnest.training.score_plot import Point, draw_scores
from typer.testing import CliRunner

POINTS = [
    Point(line="raw", model="small", score=0.1, low=0.0, high=0.3),
    Point(line="raw", model="large", score=0.2, low=0.1, high=0.3),
    Point(line="nested pcr", model="large", score=0.3, low=0.2, high=0.4),
    Point(line="naive", model="large", score=None, low=None, high=None),
]
SIZES = {"small": 128, "large": 192}


def test_every_line_and_panel_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "scores.svg"
    draw_scores(path, {"mean": POINTS, "site": POINTS[:2]}, SIZES, score="Spearman", title="scan.csv")
    # Text is drawn as outlines, but matplotlib leaves it beside them as comments.
    text = path.read_text()
    for word in ("raw", "nested pcr", "mean", "site", "Spearman", "scan.csv", "192"):
        assert f"<!-- {word} -->" in text, word
    draw_scores(tmp_path / "scores.pdf", {"mean": POINTS}, SIZES, score="Spearman", title="scan.csv")
    assert (tmp_path / "scores.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    "command", [["probe", "--wt", "none.fasta", "--mutants", "none.csv"], ["probe-labels", "none"]]
)
def test_refused_before_anything_is_read(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*command, "--models", "nowhere", "--plot"]
    ending = CliRunner().invoke(app, [*words, str(tmp_path / "plot.gif")])
    assert ending.exit_code == 1
    assert "ends in '.gif'; pictures end in .png, .svg, .pdf" in " ".join(ending.output.split())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = CliRunner().invoke(app, [*words, str(tmp_path / "plot.png")])
    assert missing.exit_code == 1
    assert "pip install 'protnest[plot]'" in " ".join(missing.output.split())
