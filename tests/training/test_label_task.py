"""Labels read from embeddings: signal that is there is found, in proteins and residues; the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.training.label_task import LabelReport, probe_labels
from protnest.training.labelled import Labelled
from typer.testing import CliRunner

from support.families import random_chain, tiny_family
from support.tiny import random_proteins

FAMILY = tiny_family()
CHAIN, NAIVE = random_chain(FAMILY), random_chain(FAMILY, naive=True)
NINE = [("raw", 16), ("raw", 24), ("raw", 40), ("nested", 24), ("nested", 40), ("naive", 24), ("naive", 40)]
NINE += [("concat", 40), ("concat", 80)]


def _classified(count: int = 150) -> list[Labelled]:
    """A protein's class is what the largest model's mean embedding says along one direction."""
    texts = random_proteins(count, seed=3)
    means = np.stack([rows.mean(axis=0) for rows in FAMILY[2].encode(texts)])
    along = means @ np.random.default_rng(0).normal(size=40)
    names = np.where(along > np.median(along), "high", "low")
    return [
        Labelled(sequence=text, labels=(str(name),), is_test=row % 3 == 0)
        for row, (text, name) in enumerate(zip(texts, names, strict=True))
    ]


def _stated(count: int = 40) -> list[Labelled]:
    """A residue's state is its letter's group; every fourth one is masked."""
    out = []
    for row, text in enumerate(random_proteins(count, seed=4)):
        states = tuple("" if place % 4 == 3 else "ABC"[ord(letter) % 3] for place, letter in enumerate(text))
        out.append(Labelled(sequence=text, labels=states, is_test=row % 4 == 0))
    return out


def _scores(report: LabelReport, measure: str) -> dict[tuple[str, int], float]:
    found = {}
    for each in report.results:
        if each.measure == measure:
            assert each.score is not None
            assert each.low is not None
            assert each.high is not None
            assert each.low <= each.score <= each.high
            found[each.representation, each.width] = each.score
    return found


def test_classes_of_proteins() -> None:
    report = probe_labels(FAMILY, _classified(), chains=[CHAIN, NAIVE])
    assert (report.kind, report.classes) == ("protein", ("high", "low"))
    assert report.proteins == (100, 50)
    assert report.rows == (100, 50)
    assert 0.3 < report.majority < 0.7
    scores = _scores(report, "accuracy")
    assert list(scores) == NINE
    assert scores["raw", 40] > 0.85
    assert scores["concat", 80] > 0.75
    assert _scores(report, "macro_f1")["raw", 40] > 0.85


def test_states_of_residues() -> None:
    """The letter is in each token's embedding, so even the smallest model tells its group; masked residues are out."""
    proteins = _stated()
    report = probe_labels(FAMILY, proteins, chains=[CHAIN])
    assert (report.kind, report.classes, report.proteins) == ("residue", ("A", "B", "C"), (30, 10))
    counted = [sum(1 for label in each.labels if label) for each in proteins]
    assert report.rows == (
        sum(size for size, each in zip(counted, proteins, strict=True) if not each.is_test),
        sum(size for size, each in zip(counted, proteins, strict=True) if each.is_test),
    )
    scores = _scores(report, "accuracy")
    assert scores["nested", 40] > report.majority + 0.1
    assert scores["concat", 80] > report.majority + 0.1


def test_labels_without_meaning_are_not_found() -> None:
    rng = np.random.default_rng(0)
    proteins = [
        Labelled(sequence=each.sequence, labels=(str(rng.choice(["x", "y"])),), is_test=each.is_test)
        for each in _classified()
    ]
    assert all(0.25 < score < 0.75 for score in _scores(probe_labels(FAMILY, proteins), "accuracy").values())


def test_what_is_refused() -> None:
    proteins = _classified(30)
    with pytest.raises(InputError, match="20 labelled proteins for training and 0 for testing: both are needed"):
        probe_labels(FAMILY, [each for each in proteins if not each.is_test])
    alike = [Labelled(sequence=each.sequence, labels=("x",), is_test=each.is_test) for each in proteins]
    with pytest.raises(InputError, match="1 classes in the training proteins are too few: at least 2"):
        probe_labels(FAMILY, alike)
    with pytest.raises(InputError, match="the order must be"):
        probe_labels(FAMILY[::-1], proteins, chains=[CHAIN])


def test_command(tmp_path: Path) -> None:
    for encoder in FAMILY:
        save_checkpoint(encoder, tmp_path / encoder.name)
    models = ",".join(str(tmp_path / encoder.name) for encoder in FAMILY)
    CHAIN.save(tmp_path / "chain")
    rows = "".join(
        f"{each.sequence}\t{each.labels[0]}\t{'test' if each.is_test else 'train'}\n" for each in _classified(90)
    )
    (tmp_path / "labels.tsv").write_text("sequence\tlabel\tset\n" + rows)
    words = ["probe-labels", str(tmp_path / "labels.tsv"), "--models", models, "--chain", str(tmp_path / "chain")]
    words += ["--train", "50", "--test", "25", "--longest", "45"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out.json"), "--json", "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert report["longest"] == 45
    assert report["proteins"][0] <= 50
    assert report["proteins"][1] <= 25
    assert len(report["results"]) == 7 * 2
    assert {each["representation"] for each in report["results"][-1]["against"]} == {"concat", "raw"}
    shown = CliRunner().invoke(app, [*words, "--plot", str(tmp_path / "plot.svg")])
    assert shown.exit_code == 0, shown.output
    assert "nested linear" in shown.stdout
    assert "macro_f1" in shown.stdout
    assert b"<svg" in (tmp_path / "plot.svg").read_bytes()


def test_command_on_states(tmp_path: Path) -> None:
    save_checkpoint(FAMILY[0], tmp_path / "model")
    sequences = states = mask = ""
    for row, each in enumerate(_stated()):
        sequences += f">p{row}\n{each.sequence}\n"
        states += (
            f">p{row} SET={'test' if each.is_test else 'train'}\n{''.join(label or 'A' for label in each.labels)}\n"
        )
        mask += f">p{row}\n{''.join('1' if label else '0' for label in each.labels)}\n"
    for name, text in (("sequences", sequences), ("states", states), ("mask", mask)):
        (tmp_path / name).write_text(text)
    words = ["probe-labels", str(tmp_path / "states"), "--sequences", str(tmp_path / "sequences")]
    words += ["--models", str(tmp_path / "model"), "--json"]
    masked = CliRunner().invoke(app, [*words, "--mask", str(tmp_path / "mask")])
    assert masked.exit_code == 0, masked.output
    whole = CliRunner().invoke(app, words)
    rows = [json.loads(each.stdout)["rows"] for each in (masked, whole)]
    assert rows[0][0] < rows[1][0]
    wrong = CliRunner().invoke(app, ["probe-labels", "x.tsv", "--models", "y", "--mask", "z"])
    assert wrong.exit_code == 2
    assert "--mask goes with --sequences" in wrong.output
