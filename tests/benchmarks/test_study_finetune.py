"""The fine-tuning study: what a cell and the table hold, that a study goes on, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from protnest.benchmarks import finetune_study, study_finetune
from protnest.benchmarks.finetune_study import Cell, judge_designs, plan_cells, read_model, run_cells
from protnest.benchmarks.finetune_study_family import StudyFamily, StudyPlan, read_study_family
from protnest.benchmarks.finetune_study_report import study_figure, study_markdown
from protnest.engine.decoder_config import DecoderConfig
from protnest.engine.errors import InputError
from protnest.engine.fasta import read_fasta
from protnest.training.finetuning import FinetuneConfig
from typer.testing import CliRunner

from support.learning import save_toy, toy_decoder, toy_encoder
from support.planted_families import planted_families
from support.tiny import random_proteins, write_fasta

pytest.importorskip("pyhmmer")
pytest.importorskip("parasail")

APP = typer.Typer()
APP.command()(study_finetune.measure)
DECODER = DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=33, places=96)
PLAN = StudyPlan(sizes=(20, 1000), epochs=3, seen=70, designs=12, judged=6, identity=0.65)
# Two large clusters, which only training has room for, and three of eight, one for each share.
MEMBERS = [
    *planted_families(2, 34, kept=0.95, residues=72, seed=2)[0],
    *planted_families(3, 8, kept=0.95, residues=72, seed=3)[0],
]


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with two that are too short and one that is too long."""
    others = ["M" * 59, "MKT", "ACDEFGHIKL" * 31]
    return write_fasta(tmp_path_factory.mktemp("data") / "planted.fasta", [*others, *MEMBERS])


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("toys")
    return {name: save_toy(folder / name, toy_decoder(seed, DECODER)) for seed, name in enumerate(("one", "other"))}


@pytest.fixture(scope="module")
def family(fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFamily:
    return read_study_family(fasta, tmp_path_factory.mktemp("family"), PLAN, seed=0)


@pytest.fixture(scope="module")
def study(
    fasta: Path, toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Cell], list[dict[str, Any]], dict[str, list[str]]]:
    """A whole study, its cells and rows, and what each fine-tuning trained on and was judged by."""
    out, shares = tmp_path_factory.mktemp("study"), dict[str, list[str]]()
    real = finetune_study.finetune

    def watched(model: Any, data: Path, work: Path, config: FinetuneConfig, **options: Any) -> Any:
        assert (config.method, config.identity, config.judged, config.seed) == ("full", 0.65, 6, 1)
        report = real(model, data, work, config, **options)
        for share in ("train", "test"):
            shares[f"{work.name} {share}"] = [each.sequence for each in read_fasta(work / f"{share}.fasta")]
        return report

    models = [read_model(name, folder) for name, folder in toys.items()]
    cells = plan_cells(models, [read_study_family(fasta, out, PLAN, seed=1)], PLAN, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_study, "finetune", watched)
        return out, cells, run_cells(cells), shares


def test_epochs_are_fewer_where_proteins_are_many() -> None:
    plan = StudyPlan(epochs=20, seen=1500)
    assert [plan.epochs_for(n) for n in (50, 75, 76, 100, 500, 786, 1500, 3000)] == [20, 20, 20, 15, 3, 2, 1, 1]
    assert StudyPlan(epochs=7, seen=0).epochs_for(5000) == 7
    quick = plan.quick()
    assert (quick.sizes, quick.epochs, quick.designs) == ((20,), 2, 20)


def test_a_family_is_filtered_split_and_known(family: StudyFamily) -> None:
    everyone = [*family.shares.train.sequences, *family.shares.validation.sequences, *family.shares.test.sequences]
    assert sorted(everyone) == sorted(MEMBERS)
    assert (family.name, family.facts["found"], family.facts["kept"]) == ("planted", 95, 92)
    lengths = [len(each) for each in family.shares.train.sequences]
    assert family.limits == (min(lengths), max(lengths))
    assert family.sizes == (20, len(lengths))
    assert family.skipped == (1000,)
    assert family.facts["recognised_train"]["value"] == 1.0
    # Clusters are ancestors here, whole ones: no profile of the training share can know another ancestor's.
    assert family.facts["recognised_test"]["value"] == 0.0
    assert family.facts["recognised_test"]["n"] == len(family.shares.test.sequences) == 8
    written = [each.sequence for each in read_fasta(family.fasta)]
    assert sorted(written) == sorted(MEMBERS)
    assert written != MEMBERS


def test_the_order_of_the_file_does_not_matter(family: StudyFamily, tmp_path: Path) -> None:
    again = read_study_family(write_fasta(tmp_path / "a.fasta", MEMBERS[::-1]), tmp_path, PLAN, seed=0)
    assert again.fingerprint == family.fingerprint
    assert again.shares.train.sequences == family.shares.train.sequences
    other = read_study_family(write_fasta(tmp_path / "a.fasta", MEMBERS), tmp_path, PLAN, seed=1)
    assert other.shares.train.sequences != family.shares.train.sequences


def test_sizes_that_are_there_need_nobody_to_stand_in(fasta: Path, tmp_path: Path) -> None:
    found = read_study_family(fasta, tmp_path, StudyPlan(sizes=(20, 30)), seed=0)
    assert (found.sizes, found.skipped) == ((20, 30), ())


def test_designs_are_held_against_the_family(family: StudyFamily) -> None:
    members = list(family.shares.train.sequences[:20])
    found = judge_designs(members, family, n=20)
    assert found["hits"] == pytest.approx({"value": 1.0, "low": 0.838876, "high": 1.0, "n": 20}, abs=1e-5)
    assert found["shuffled"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.161124, "n": 20}, abs=1e-5)
    assert found["residues"]["value"] == pytest.approx(sum(map(len, members)) / 20)
    assert (found["copies"], found["nearest"]["value"]) == (20, 1.0)
    # Of five proteins to train on the others are no copies, but all are of the whole share.
    assert judge_designs(members, family, n=5)["copies"] == 5
    assert judge_designs(members, family, n=0)["copies"] == 20
    strangers = [each for each in random_proteins(40, seed=8, longest=90) if len(each) > 40]
    half = judge_designs([*strangers[:5], *members[:5]], family, n=20)
    assert half["hits"] == pytest.approx({"value": 0.5, "low": 0.236593, "high": 0.763407, "n": 10}, abs=1e-5)


def test_cells_hold_what_was_asked(study: tuple[Path, list[Cell], list[dict[str, Any]], Any]) -> None:
    out, cells, rows, _ = study
    assert [(row["n"], row["model"]) for row in rows] == [
        (n, model) for n in (0, 20, cells[0].family.facts["train"]) for model in ("one", "other")
    ]
    for cell, row in zip(cells, rows, strict=True):
        assert json.loads(cell.path.read_text()) == row
        assert (row["suite"], row["family"], row["seed"], row["device"]) == ("finetune", "planted", 1, "cpu")
        assert [each["temperature"] for each in row["designs"]] == [1.0, 0.7]
        for each in row["designs"]:
            path = out / "designs" / f"{cell.name}-t{each['temperature']:g}.fasta"
            lengths = [len(record.sequence) for record in read_fasta(path)]
            assert len(lengths) == each["hits"]["n"] == 12
            assert cell.family.limits[0] <= min(lengths)
            assert max(lengths) <= cell.family.limits[1]
            assert each["residues"]["value"] == pytest.approx(sum(lengths) / 12)
            assert each["at_most"]["value"] == sum(each == cell.family.limits[1] for each in lengths) / 12
        one, other = ((out / "designs" / f"{cell.name}-t{each}.fasta").read_text() for each in ("1", "0.7"))
        assert one != other
    assert [row["settings"]["epochs"] for row in rows] == [0, 0, 3, 3, 1, 1]
    assert [row.get("epochs") for row in rows] == [None, None, 3, 3, 1, 1]
    assert not list((out / "work").iterdir())


def test_before_is_the_decoder_as_it_came(study: tuple[Path, list[Cell], list[dict[str, Any]], Any]) -> None:
    """N = 0 is judged on the test share that the fine-tunings are judged on; after them it is better."""
    rows = study[2]
    for model in ("one", "other"):
        untuned, *tuned = (row for row in rows if row["model"] == model)
        assert untuned["test"]["sequences"] == 6
        for row in tuned:
            assert row["test"]["before"]["value"] == pytest.approx(untuned["test"]["after"]["value"], rel=1e-5)
            assert row["test"]["ratio"]["value"] < 1
            assert row["test"]["ratio"]["low"] <= row["test"]["ratio"]["value"] <= row["test"]["ratio"]["high"]


def test_all_decoders_see_the_same_proteins(study: tuple[Path, list[Cell], Any, dict[str, list[str]]]) -> None:
    _, cells, _, shares = study
    for cell in cells:
        if cell.n:
            assert tuple(shares[f"{cell.name} train"]) == cell.family.shares.train.sequences[: cell.n]
            assert tuple(shares[f"{cell.name} test"]) == cell.family.shares.test.sequences[:6]


def test_what_is_there_is_not_run_again(
    study: tuple[Path, list[Cell], list[dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cells, rows, _ = study
    lost, ran = cells[3], list[str]()
    lost.path.unlink()
    real = Cell.run

    def watched(cell: Cell, *given: Any) -> Any:
        ran.append(cell.name)
        return real(cell, *given)

    monkeypatch.setattr(Cell, "run", watched)
    told: list[tuple[int, bool]] = []
    again = run_cells(cells, tell=lambda place, cell, row, there: told.append((place, there)))
    assert ran == [lost.name]
    assert told == [(place, place != 3) for place in range(6)]
    assert [row["test"] for row in again] == [row["test"] for row in rows]
    for row, old in zip(again, rows, strict=True):
        assert [each["hits"] for each in row["designs"]] == [each["hits"] for each in old["designs"]]


def test_a_fine_tuning_that_is_done_is_not_repeated(
    family: StudyFamily, toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between tuning and generating."""
    model = read_model("one", toys["one"])
    earlier, cell = (Cell(model, family, 20, plan, tmp_path) for plan in (replace(PLAN, epochs=1), PLAN))
    with monkeypatch.context() as patch:
        patch.setattr(Cell, "_designs", lambda *given: 1 / 0)
        # What an earlier study with other settings left there is thrown away.
        for each in (earlier, cell):
            with pytest.raises(ZeroDivisionError):
                each.run()
    assert not cell.path.exists()
    written = (tmp_path / "work" / cell.name / "training.json").stat().st_mtime_ns
    seen = []
    real = finetune_study.load_decoder

    def watched(folder: Path, **options: Any) -> Any:
        seen.append((folder / "training.json").stat().st_mtime_ns)
        return real(folder, **options)

    monkeypatch.setattr(finetune_study, "load_decoder", watched)
    assert cell.run()["epochs"] == 3
    assert seen == [written]
    assert not (tmp_path / "work" / cell.name).exists()


def test_cells_of_other_settings_are_refused(
    study: tuple[Path, list[Cell], list[dict[str, Any]], Any], toys: dict[str, Path], tmp_path: Path
) -> None:
    out, cells, _, _ = study
    family, plan = cells[0].family, replace(PLAN, epochs=2)
    with pytest.raises(InputError, match=r"one-n20-s1\.json: was made under other settings \(epochs: 3 there, 2 now\)"):
        run_cells(plan_cells([cells[0].model], [family], plan, out))
    swapped = read_model("one", toys["other"])
    with pytest.raises(InputError, match=r"one-n0-s1\.json: was made under other settings \(model: "):
        run_cells(plan_cells([swapped], [family], PLAN, out))
    for text in ("{", "[]", '{"n": 3}'):
        cell = Cell(cells[0].model, family, 0, PLAN, tmp_path)
        cell.path.parent.mkdir(exist_ok=True)
        cell.path.write_text(text)
        with pytest.raises(InputError, match=r"n0-s1\.json: is no cell of a study"):
            cell.read()


def test_the_table_says_what_the_rows_say(study: tuple[Path, list[Cell], list[dict[str, Any]], Any]) -> None:
    rows = study[2]
    text = study_markdown(rows)
    assert "## planted, seed 1" in text
    assert "92 of 95 proteins kept by length; clusters by kmers at 0.65: 5, the largest has 34;" in text
    assert "6 of 8 to judge by" in text
    assert "100.0 (95.2 to 100.0) of the training share and 0.0 (0.0 to 32.4) of the test share" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert {len(line) for line in lines} == {15}
    for line, row in zip(lines[2:], rows, strict=True):
        assert line[:2] == [str(row["n"]), row["model"]]
        after, hits = row["test"]["after"], row["designs"][1]["hits"]
        tuned = f"{after['value']:.2f} ({after['low']:.2f} to {after['high']:.2f})"
        assert line[3] == (tuned if row["n"] else "")
        assert line[6].startswith(f"{100 * hits['value']:.1f} ({100 * hits['low']:.1f} to {100 * hits['high']:.1f}); ")
        assert line[7] == f"{row['designs'][0]['residues']['value']:.0f}"
    # Three epochs, not stopped by validation.
    assert [line[13] for line in lines[2:6]] == ["", "", "3+ (3)", "3+ (3)"]
    assert "| 3 (3) |" in study_markdown([row | {"stopped_early": True} for row in rows])
    seeds = [row | {"seed": seed} for seed in (0, 1) for row in rows]
    assert study_markdown(seeds).count("## planted, seed") == 2


def test_the_picture_has_a_column_for_each_family(
    study: tuple[Path, list[Cell], list[dict[str, Any]], Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    rows = study[2]
    two = [*rows, *(row | {"family": "second", "seed": seed} for row in rows for seed in (0, 1))]
    figure = study_figure(two)
    above, _, below, other = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["planted", "second", "", ""]
    assert [label.get_text() for label in above.get_xticklabels()] == ["0", "20", str(rows[-1]["n"])]
    lines = {line.get_label(): line for line in (*above.lines, *below.lines)}
    wanted = [row["test"]["after"]["value"] for row in rows if row["model"] == "one"]
    assert list(lines["one"].get_ydata()) == pytest.approx(wanted)  # type: ignore[arg-type]
    wanted = [100 * row["designs"][1]["hits"]["value"] for row in rows if row["model"] == "other"]
    assert list(lines["other, T = 0.7"].get_ydata()) == pytest.approx(wanted)  # type: ignore[arg-type]
    # Two seeds that say the same have the same mean.
    mean = next(line for line in other.lines if line.get_label() == "other, T = 0.7")
    assert list(mean.get_ydata()) == pytest.approx(wanted)  # type: ignore[arg-type]
    study_finetune.draw_study(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def _call(fasta: Path, toys: dict[str, Path], out: Path, *more: str) -> Any:
    models = [each for name, folder in toys.items() for each in ("--model", f"{name}={folder}")]
    return CliRunner().invoke(APP, [*models, "--family", str(fasta), "--out", str(out), "--quick", *more])


def test_the_command(fasta: Path, toys: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "study.svg"
    done = _call(fasta, toys, tmp_path / "out", "--plot", str(picture))
    assert done.exit_code == 0, done.output
    assert "4 of 4: planted-other-n20-s0: perplexity" in done.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "study.jsonl").read_text().splitlines()]
    assert [(row["n"], row["model"]) for row in rows] == [(0, "one"), (0, "other"), (20, "one"), (20, "other")]
    assert (tmp_path / "out" / "study.md").read_text() == study_markdown(rows)
    assert picture.stat().st_size > 1000
    again = _call(fasta, toys, tmp_path / "out")
    assert again.exit_code == 0
    assert again.output.count("(was there)") == 4
    assert len((tmp_path / "out" / "study.jsonl").read_text().splitlines()) == 4


def test_skipped_sizes_are_named(
    fasta: Path, toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_finetune, "run_cells", lambda cells, **given: [])
    models = ["--model", f"one={toys['one']}"]
    done = CliRunner().invoke(
        APP, [*models, "--family", str(fasta), "--out", str(tmp_path / "out"), "--n", "20,500,1000"]
    )
    assert done.exit_code == 0, done.output
    assert "skipped: N = 500, 1000, all 76 stand in" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "one"], "expected NAME=DIR"),
        (["--model", "=x"], "expected NAME=DIR"),
        (["--model", "a/b=x"], "expected NAME=DIR"),
        (["--model", "one=x", "--model", "one=y"], "is there twice"),
        (["--model", "one=x", "--n", "0,20"], "expected positive whole numbers"),
        (["--model", "one=x", "--n", "few"], "expected positive whole numbers"),
    ],
)
def test_wrong_usage(options: list[str], message: str, fasta: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(APP, [*options, "--family", str(fasta), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_what_cannot_be_studied(fasta: Path, toys: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fails(message: str, data: Path = fasta, models: dict[str, Path] = toys, more: tuple[str, ...] = ()) -> None:
        done = _call(data, models, out, *more)
        assert done.exit_code == 1, done.output
        assert message in " ".join(done.output.split())

    encoder = save_toy(tmp_path / "encoder", toy_encoder())
    fails("encoder is an encoder, which cannot generate", models={"one": encoder})
    fails("neither a bundled name", models={"one": tmp_path / "none"})
    fails("two families are called planted", more=("--family", str(fasta)))
    fails("pictures end in .png", more=("--plot", "a.txt"))
    few = write_fasta(tmp_path / "few.fasta", MEMBERS[:8])
    fails("few.fasta: 8 of 8 proteins have 60 to 300 residues: 1 clusters", data=few)
    short = write_fasta(tmp_path / "short.fasta", ["MKTAYIAK", "MKT"])
    fails("short.fasta: 0 of 2 proteins have 60 to 300 residues", data=short)
    lone = [each for each in random_proteins(150, seed=5, longest=90) if len(each) > 60]
    small = [*MEMBERS[:12], *lone[:4]]
    fails("proteins to train on, expected at least 20", data=write_fasta(tmp_path / "small.fasta", small))
    fails("no profile recognises 5 of", data=write_fasta(tmp_path / "lone.fasta", lone))
    assert not (out / "cells").exists()
