"""The controlled 2x2: a fair plan, choice by one seed, runs that are never repeated, and its numbers by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.kernels.kd_options import KDOptions
from protnest.training import grid as grid_module
from protnest.training.corpus import read_shares
from protnest.training.distillation import Callbacks, DistillConfig
from protnest.training.grid import GridCallbacks, run_grid
from protnest.training.grid_plan import Cell, GridConfig, Run
from protnest.training.grid_plot import draw_grid
from protnest.training.grid_report import (
    CellScores,
    ProteinScores,
    answer,
    contrast,
    markdown,
    over_seeds,
    report_student,
    t_quantile,
)
from protnest.training.grid_scores import HALVES, RunScores, held_out_halves
from protnest.training.trainer import TrainerConfig

from support.learning import TOY_DECODER, fasta_to_train, save_toy, toy_decoder, toy_encoder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "teacher": save_toy(tmp_path / "teacher", toy_encoder(1)),
        "student": save_toy(tmp_path / "student", toy_encoder(0)),
        "data": fasta_to_train(tmp_path / "in.fasta", held_out=6),
        "out": tmp_path / "out",
    }


def _config(student: Path | str = "nano-xs", **changes: Any) -> GridConfig:
    trainer = TrainerConfig(steps=2, batch_tokens=100, seed=5)
    base = DistillConfig(student=str(student), trainer=trainer, held_out=6, **changes.pop("base", {}))
    given: dict[str, Any] = {"students": (str(student),), "learning_rates": (0.01, 0.03), "warmups": (1,), "seeds": 2}
    return GridConfig(base=base, **(given | changes))


def _grid(files: dict[str, Path], config: GridConfig, **more: Any) -> dict[str, Any]:
    return run_grid(files["teacher"], files["data"], files["out"], config, device="cpu", **more)


# The plan


def test_every_cell_gets_the_same() -> None:
    config = _config(
        learning_rates=(1e-3, 2e-3, 3e-3), warmups=(0, 7), seeds=4, weight_normalizations=("count", "weight")
    )
    cells = {cell.name: cell for cell in config.cells}
    assert list(cells) == [
        "baseline",
        "smoothing",
        "uncertainty",
        "both",
        "uncertainty-weight",
        "both-weight",
        "labels",
    ]
    switches = {name: (cell.taught, cell.uncertainty, cell.smooth) for name, cell in cells.items()}
    assert switches["baseline"] == (True, False, False)
    assert switches["smoothing"] == (True, False, True)
    assert switches["uncertainty"] == switches["uncertainty-weight"] == (True, True, False)
    assert switches["both"] == switches["both-weight"] == (True, True, True)
    assert not cells["labels"].taught
    assert [cell.weight_normalization for cell in config.cells] == [*["count"] * 4, "weight", "weight", "count"]
    runs = config.selections("nano-xs")
    tried = {name: [(r.learning_rate, r.warmup_steps, r.seed) for r in runs if r.cell.name == name] for name in cells}
    assert tried["labels"] == [(rate, warmup, 5) for rate in (1e-3, 2e-3, 3e-3) for warmup in (0, 7)]
    assert all(each == tried["labels"] for each in tried.values())
    repeated = config.repetitions(runs[3])
    assert [run.seed for run in repeated] == [5, 6, 7, 8]
    assert {replace(run, seed=5) for run in repeated} == {runs[3]}
    assert config.runs == 7 * (6 + 3)
    assert len({run.folder for run in (*runs, *repeated)}) == 42 + 3


def test_held_out_proteins_choose_or_judge(files: dict[str, Path]) -> None:
    held_out = read_shares(files["data"])[1]
    halves = held_out_halves(held_out, 5, file=files["data"])
    assert [len(halves[name]) for name in HALVES] == [2, 3]
    assert len({each for half in halves.values() for each in half}) == 5
    assert set(halves["selection"]) | set(halves["judged"]) <= set(held_out.sequences)
    with pytest.raises(InputError, match=r"in\.fasta: 1 held-out proteins: a grid needs"):
        held_out_halves(held_out, 1, file=files["data"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "3x3"}, "no grid '3x3'; there is 2x2"),
        ({"learning_rates": ()}, "a grid needs learning rates to try, and there are none"),
        ({"warmups": (3, 3)}, "warm-ups are 3, 3: one is there twice"),
        ({"students": ("a/x", "b/x")}, "students are x, x: one is there twice"),
        ({"weight_normalizations": ("sum",)}, "weight_normalization is 'sum'; allowed: count, weight"),
        ({"seeds": 0}, "seeds is 0, expected 1 or more"),
        ({"learning_rates": (0.0,)}, "learning_rate must be positive"),
        ({"warmups": (-1,)}, "warmup_steps must not be negative"),
        ({"base": {"init": "layers"}}, "init is 'layers': in a grid all begin alike"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        _config(**changes)
    assert problem in str(caught.value)


# Its runs


class _Killed(BaseException):
    pass


def test_a_grid_chooses_judges_and_goes_on_where_it_was_killed(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, began = _config(files["student"], seeds=1), list[tuple[Run, bool]]()

    def on_run(run: Run, number: int, of: int, finished: bool) -> None:
        began.append((run, finished))
        assert (number, of) == (len(began), 10)

    report = _grid(files, config, callbacks=GridCallbacks(on_run=on_run))
    assert report == json.loads((files["out"] / "grid.json").read_text())
    assert not any(finished for _, finished in began)
    assert len({run for run, _ in began}) == 10
    found = report["students"]["student"]
    halves = held_out_halves(read_shares(files["data"])[1], 6, file=files["data"])
    assert report["proteins"] == {"selection": 3, "judged": 3}
    for name, cell in found["cells"].items():
        values = {}
        for rate in (0.01, 0.03):
            folder = files["out"] / "runs" / "student" / name / f"lr{rate}-warmup1-seed5"
            values[rate] = RunScores.read(folder / "scores.json")
            recipe = json.loads((folder / "training.json").read_text())["recipe"]
            assert (recipe["learning_rate"], recipe["warmup_steps"], recipe["seed"]) == (rate, 1, 5)
        assert [each["perplexity"] for each in cell["tried"]] == pytest.approx(
            [math.exp(scores.log_perplexity("selection")) for scores in values.values()]
        )
        best = min(values, key=lambda rate: values[rate].log_perplexity("selection"))
        assert (cell["learning_rate"], cell["at_edge"], cell["seeds"]) == (best, True, [5])
        assert cell["perplexities"][0] == pytest.approx(math.exp(values[best].log_perplexity("judged")))
        assert values[best].proteins("judged").nll_B.shape == (len(halves["judged"]),)
    identities = {
        name: json.loads(next((files["out"] / "runs/student" / name).glob("*/run.json")).read_text())["identity"]
        for name in found["cells"]
    }
    assert identities["labels"]["teacher"] is None
    assert len({each["initial"] for each in identities.values()}) == 1
    taught = {name: (each["uncertainty"], each["smooth"]) for name, each in identities.items() if each["teacher"]}
    assert taught == {
        "baseline": (False, False),
        "smoothing": (False, True),
        "uncertainty": (True, False),
        "both": (True, True),
    }
    assert (files["out"] / "grid.md").read_text() == markdown(report)

    # Once more: every run is found, none is trained.
    with monkeypatch.context() as patch:
        patch.setattr(grid_module, "distill", None)
        began.clear()
        assert _grid(files, config, callbacks=GridCallbacks(on_run=on_run)) == report
    assert all(finished for _, finished in began)

    # Another, killed in its fourth run.
    killed, steps = files | {"out": tmp_path / "killed"}, []

    def after_step(step: Any) -> None:
        steps.append(step)
        if len(steps) == 7:
            raise _Killed

    with pytest.raises(_Killed):
        _grid(killed, config, callbacks=GridCallbacks(run=Callbacks(after_step=after_step)))
    assert not (killed["out"] / "grid.json").exists()
    began.clear()
    assert _grid(killed, config, callbacks=GridCallbacks(on_run=on_run)) == report
    assert [finished for _, finished in began] == [True] * 3 + [False] * 7
    for name in ("grid.json", "grid.md"):
        assert (killed["out"] / name).read_bytes() == (files["out"] / name).read_bytes()

    # It may grow, and then trains what is new alone.
    began.clear()
    grown = replace(config, seeds=2)
    found = _grid(files, grown, callbacks=GridCallbacks(on_run=lambda *each: began.append((each[0], each[3]))))
    assert [run.seed for run, finished in began if not finished] == [6] * 5
    assert len({run for run, _ in began}) == len(began) == grown.runs
    for cell in found["students"]["student"]["cells"].values():
        assert cell["seeds"] == [5, 6]
        assert cell["perplexities"][0] != cell["perplexities"][1]
    changed = replace(grown, base=replace(config.base, options=KDOptions(temperature=3.0), rows="all"))
    for other, problem in (
        (changed, r"rows: masked there, all now; temperature: 2.0 there, 3.0 now"),
        (config, "seeds: 2 there, 1 now, which lacks some"),
        (replace(grown, learning_rates=(0.01,)), r"learning_rates: \[0.01, 0.03\] there, \[0.01\] now"),
    ):
        with pytest.raises(
            InputError, match=f"out: holds a grid with other settings .*{problem}.*choose another --out"
        ):
            _grid(files, other)


def test_masks_are_the_same_with_a_cache_and_for_labels(files: dict[str, Path], tmp_path: Path) -> None:
    config = _config(files["student"], learning_rates=(0.01,))
    _grid(files, config, cache=tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["context20-seed5", "context20-seed6"]
    identities = [json.loads(path.read_text())["identity"] for path in files["out"].glob("runs/*/*/*/run.json")]
    assert len(identities) == 10
    masks = {json.dumps({key: each[key] for key in each if "mask" in key}, sort_keys=True) for each in identities}
    assert len(masks) == 1
    assert "4" in masks.pop()


def test_a_rate_that_diverges_is_kept_as_such(files: dict[str, Path]) -> None:
    config = _config(files["student"], learning_rates=(0.01, 1e30), seeds=1)
    report = _grid(files, config)
    for cell in report["students"]["student"]["cells"].values():
        assert cell["learning_rate"] == 0.01
        assert cell["tried"][1]["perplexity"] is None
    began = list[bool]()
    _grid(files, config, callbacks=GridCallbacks(on_run=lambda *each: began.append(each[3])))
    assert began == [True] * 10
    with pytest.raises(
        InputError, match=r"student, baseline: every learning rate diverged: .* at step 1, in a batch of"
    ):
        _grid(files | {"out": files["out"].parent / "other"}, replace(config, learning_rates=(1e30,)))


def test_decoders_too(files: dict[str, Path], tmp_path: Path) -> None:
    files["teacher"] = save_toy(tmp_path / "decoder", toy_decoder(1, replace(TOY_DECODER, layers=3)))
    student = save_toy(tmp_path / "gpt", toy_decoder(0))
    report = _grid(files, _config(student, learning_rates=(0.01,), seeds=1, weight_normalizations=("weight",)))
    assert list(report["students"]["gpt"]["synergy"]) == ["weight"]
    assert report["teacher_perplexity"]["value"] > 1


def test_wrong_models_and_folders_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no model 'nobody'"):
        _grid(files | {"teacher": Path("nobody")}, _config(files["student"]))
    with pytest.raises(InputError, match="no student 'nano-xl'"):
        _grid(files, _config("nano-xl"))
    with pytest.raises(InputError, match="they predict other things"):
        _grid(files, _config("nano-gpt"))
    assert not files["out"].exists()
    files["out"].mkdir()
    (files["out"] / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and holds no grid \(notes.txt\)"):
        _grid(files, _config(files["student"]))
    for text, problem in (("{", "not a readable plan"), ('{"schema_version": 9, "settings": {}, "growing": {}}', "9")):
        (files["out"] / "plan.json").write_text(text)
        with pytest.raises(InputError, match=problem):
            _grid(files, _config(files["student"]))
    with pytest.raises(InputError, match="cannot be a grid's folder"):
        _grid(files | {"out": files["data"]}, _config(files["student"]))
    (files["out"] / "scores.json").write_text('{"halves": {}, "diverged": null}')
    with pytest.raises(InputError, match="not readable as a student's scores"):
        RunScores.read(files["out"] / "scores.json")


# Its numbers


def _cell(*students: list[float], rate: float = 2.0) -> CellScores:
    """Students by what they say of two proteins of 1 and 3 residues, in nats."""
    residues_B = np.array([1.0, 3.0])
    return CellScores(
        learning_rate=rate,
        warmup_steps=1,
        tried=((1.0, 1, 0.5), (2.0, 1, 0.25), (3.0, 1, math.inf)),
        seeds=tuple(range(len(students))),
        students=tuple(ProteinScores(nll_B=np.array(each), residues_B=residues_B) for each in students),
    )


_CELLS = {
    "baseline": _cell([4.0, 8.0], [4.0, 4.0]),  # 3 and 2 nats a residue
    "smoothing": _cell([2.0, 8.0], [3.0, 3.0]),  # 2.5 and 1.5
    "uncertainty": _cell([4.0, 6.0], [2.0, 4.0], rate=1.0),  # 2.5 and 1.5
    "both": _cell([1.0, 3.0], [1.0, 1.0]),  # 1 and 0.5
    "labels": _cell([5.0, 15.0], [4.0, 12.0]),  # 5 and 4
}


def test_differences_and_synergy_by_hand() -> None:
    report = report_student(_CELLS)
    # (1 - 2.5 - 2.5 + 3), (0.5 - 1.5 - 1.5 + 2)
    synergy = report["synergy"]["count"]
    assert list(report["synergy"]) == ["count"]
    assert synergy["over_seeds"]["value"] == pytest.approx(-0.75)
    assert synergy["over_seeds"]["n"] == 2
    reach = 12.706205 * 0.25  # sd of (-1, -0.5) over the root of 2
    assert synergy["over_seeds"]["low"] == pytest.approx(-0.75 - reach)
    assert synergy["over_seeds"]["high"] == pytest.approx(-0.75 + reach)
    # By protein, the seeds' mean: (1 - 2 - 4 + 4 + 1 - 3 - 2 + 4) / 2 = -0.5 of 1 residue,
    # (3 - 8 - 6 + 8 + 1 - 3 - 4 + 4) / 2 = -2.5 of 3.
    assert synergy["over_proteins"]["value"] == pytest.approx((-0.5 - 2.5) / 4)
    assert (synergy["over_proteins"]["n"], synergy["verdict"]) == (2, "open")
    assert synergy["over_proteins"]["low"] == pytest.approx(-2.5 / 3)
    assert synergy["over_proteins"]["high"] == pytest.approx(-0.5)
    assert len(report["differences"]) == 10
    (labels,) = [d for d in report["differences"] if (d["cell"], d["against"]) == ("labels", "baseline")]
    assert labels["over_seeds"]["value"] == pytest.approx(2.0)
    assert (labels["over_seeds"]["low"], labels["verdict"]) == (2.0, "above")
    cell = report["cells"]["baseline"]
    assert cell["log_perplexity"] == {"mean": 2.5, "sd": pytest.approx(math.sqrt(0.5))}
    assert cell["perplexity"]["mean"] == pytest.approx((math.exp(3) + math.exp(2)) / 2)
    assert [each["perplexity"] for each in cell["tried"]] == [math.exp(0.5), math.exp(0.25), None]
    assert [report["cells"][name]["at_edge"] for name in ("baseline", "uncertainty")] == [False, True]


def test_answers_are_what_both_intervals_say() -> None:
    certain = {"value": -0.5, "low": -0.6, "high": -0.4, "n": 9}
    mixed = {"value": -0.5, "low": -0.9, "high": 0.1, "n": 3}
    for proteins, seeds, verdict, words in (
        (certain, certain, "below", "Yes: both together lower"),
        ({**certain, "value": 0.5}, certain, "above", "No, the opposite"),
        (certain, mixed, "open", "Not shown: 0 is within an interval (-0.5000 nats a residue; over proteins -0.6"),
        (certain, {**mixed, "low": None, "high": None}, "open", "Open: one seed cannot tell"),
        ({**certain, "value": None}, mixed, "open", "Not known: a student diverged"),
    ):
        assert answer({"over_proteins": proteins, "over_seeds": seeds, "verdict": verdict}).startswith(words)
    one, two, high = _cell([1.0, 3.0], [1.0, 3.0]), _cell([2.0, 6.0], [2.0, 6.0]), _cell([1.0, 9.0], [9.0, 0.0])
    cells = {"one": one, "two": two, "high": high}
    assert contrast(cells, {"one": 1, "two": -1})["verdict"] == "below"
    assert contrast(cells, {"two": 1, "one": -1})["verdict"] == "above"
    assert contrast(cells, {"high": 1, "one": -1})["verdict"] == "open"


def test_student_t() -> None:
    for freedom, expected in ((1, 12.7062), (2, 4.30265), (10, 2.22814), (11, 2.20099), (15, 2.13145), (100, 1.98397)):
        assert t_quantile(freedom) == pytest.approx(expected, abs=2e-4)
    assert over_seeds([3.0]).low is None
    assert over_seeds([3.0, math.inf]).value is None


def test_a_diverged_seed_leaves_its_cell_undefined(tmp_path: Path) -> None:
    broken = _CELLS["both"].students[1].diverged()
    cells = _CELLS | {"both": replace(_CELLS["both"], students=(_CELLS["both"].students[0], broken))}
    found = report_student(cells)
    synergy = found["synergy"]["count"]
    assert synergy["over_proteins"]["value"] is synergy["over_seeds"]["value"] is None
    assert found["cells"]["both"]["perplexities"][1] is found["cells"]["both"]["perplexity"]["mean"] is None
    known = {"value": 5.0, "low": 4.0, "high": 6.0, "n": 2}
    report = {
        "grid": "2x2",
        "teacher": "t",
        "data": {"file": "in.fasta"},
        "proteins": {"selection": 2, "judged": 2},
        "settings": {"seed": 0},
        "students": {"s": found},
        "teacher_perplexity": known,
        "unigram": known,
    }
    json.dumps(report, allow_nan=False)
    page = markdown(report)
    assert "| both | 2 | 1 | diverged | 2 | undefined | undefined |" in page
    assert "At the end of the learning rates that were tried: uncertainty: try more." in page
    row = next(line for line in page.splitlines() if line.startswith("| smoothing"))
    # Against labels the sign turns, and so do the interval's ends.
    assert "| -0.5000 (" in row
    assert r"-2.5000 (-2.6667 to -2.0000 \| -2.5000 to -2.5000)" in row
    draw_grid(tmp_path / "grid.png", report)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_says_what_it_is() -> None:
    run = Run(student="a/b", cell=Cell(name="both"), learning_rate=1e-5, warmup_steps=3, seed=2)
    assert str(run) == "b, both, learning rate 1e-05, warm-up 3, seed 2"
    assert run.folder == Path("b/both/lr1e-05-warmup3-seed2")
