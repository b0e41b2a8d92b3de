"""Units of work: each runs once, whatever stops the run and wherever its mutant stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protnest.engine.alphabet import TOKENS
from protnest.engine.score_run import RunResult, ScoreRun
from protnest.engine.score_state import ScoreState
from protnest.engine.score_survey import Survey, SurveyOptions

from support.assays import OTHER, WILD_TYPE, CountingScorer, Followed, Stopped, survey, write_tables

TABLES = {
    "one.csv": "mutant\nK2A\nA4G:K2R\nWT\nK2A\nM1A\nT3A\nT3C\nT3D\nT3E\nK2A\n",
    "more.csv": "target,mutant\ntwin,T3A\ntwo,G1A\none,K2A\ntwo,S2A\ntwin,Y5A\ntwo,S2C\ntwo,S2D\none,Y5C\ntwo,G1A\n",
    "two.csv": "mutant\nS2D\nW6A\n",
}
KINDS: dict[str, dict[str, Any]] = {
    "masked": {"by_site": True},
    "wild type at once": {"by_site": True, "in_one_go": True},
    "mutants": {},
    "against the wild type": {"against_wild_type": True},
}
MODELS = ("first", "second")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two sites or mutants of either protein, as one goes beyond neither.
    monkeypatch.setattr("protnest.engine.score_run._CHUNK_RESIDUES", 16)
    # Every chunk is kept.
    monkeypatch.setattr("protnest.engine.score_state._SECONDS_BETWEEN_SAVES", -1.0)


class Runner:
    """Runs of one survey with one kind of scorer."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = KINDS[kind]
        self.survey: Survey = survey(
            write_tables(folder, TABLES),
            SurveyOptions(
                by_site=self.kind.get("by_site", False), with_wild_type=self.kind.get("against_wild_type", False)
            ),
        )
        self.progress = Followed()
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def run(self, folder: Path | None, *, stop_after: int | None = None) -> RunResult:
        left = stop_after

        def load(model: int, after: Callable[[int], None]) -> CountingScorer:
            already = len(self.asked) - begun
            now = None if left is None else left - already
            return CountingScorer(after, name=MODELS[model], stop_after=now, asked=self.asked, **self.kind)

        begun = len(self.asked)
        self.progress = Followed()
        with ScoreState(folder, {}) as state:
            return ScoreRun(self.survey, MODELS, load, state, self.progress).run()


@pytest.fixture(params=KINDS)
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return Runner(tmp_path, request.param)


def times_asked(asked: list[tuple[str, tuple[Any, ...]]]) -> Counter[tuple[str, Any]]:
    return Counter((wild_type, unit) for wild_type, units in asked for unit in units)


def same(one: RunResult, two: RunResult) -> bool:
    assert list(one.values) == list(two.values)
    pairs = [pair for name in one.values for pair in zip(one.values[name], two.values[name], strict=True)]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def test_every_unit_runs_once_under_each_model(runner: Runner) -> None:
    result = runner.run(None)
    asked = times_asked(runner.asked)
    assert set(asked.values()) == {len(MODELS)}
    if runner.kind.get("by_site"):
        expected = {(WILD_TYPE, place) for place in range(5)} | {(OTHER, place) for place in (0, 1, 5)}
    else:
        mutants = {"MATAYIAK", "MRTGYIAK", WILD_TYPE, "AKTAYIAK", "MKAAYIAK", "MKCAYIAK", "MKDAYIAK", "MKEAYIAK"}
        mutants |= {"MKTAAIAK", "MKTACIAK"}
        expected = {(WILD_TYPE, text) for text in mutants}
        expected |= {(OTHER, text) for text in ("ASHMWW", "GAHMWW", "GCHMWW", "GDHMWW", "GSHMWA")}
        expected |= {(OTHER, OTHER)} if runner.kind else set()
    assert set(asked) == expected
    assert result.residues == runner.progress.advanced
    for name, values in result.values.items():
        units = runner.survey.proteins[name].places or runner.survey.proteins[name].units
        columns = (len(TOKENS),) if runner.kind.get("by_site") else ()
        assert [value.shape for value in values] == [(len(units), *columns)] * 2


def test_values_stand_at_their_units_numbers(tmp_path: Path) -> None:
    runner = Runner(tmp_path, "against the wild type")
    values = runner.run(None).values[WILD_TYPE]
    (one, *_) = runner.survey.assays
    sequences = [entry.variant.sequence for entry in one.entries() if entry.variant is not None]
    for number, name in enumerate(MODELS):
        scorer = CountingScorer(name=name, against_wild_type=True)
        alone = {
            text: scorer.run_mutants([variant], WILD_TYPE)[0]
            for text, variant in zip(
                sequences, (entry.variant for entry in one.entries() if entry.variant is not None), strict=True
            )
        }
        got = [values[number][unit] for unit in one.units]
        np.testing.assert_allclose(got, [alone[text] for text in sequences], rtol=0, atol=2 / 1024)
        assert abs(values[number][0] - alone[WILD_TYPE]) <= 2 / 1024, "the wild type is the first unit"


def test_chunks_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    runner = Runner(tmp_path, "mutants")
    runner.run(None)
    # Two mutants of 8 are 16 residues; of 6 it takes three. What is left over runs when the last of a protein is met.
    sizes = [(wild_type, len(asked)) for wild_type, asked in runner.asked[: len(runner.asked) // 2]]
    assert [size for wild_type, size in sizes if wild_type == WILD_TYPE] == [2] * 5
    assert [size for wild_type, size in sizes if wild_type == OTHER] == [3, 2]
    whole = Runner(tmp_path, "wild type at once")
    whole.run(None)
    assert [asked for _, asked in whole.asked] == [(0, 1, 2, 3, 4), (0, 1, 5)] * 2


def test_a_batch_is_always_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.engine.score_run._CHUNK_RESIDUES", 1)
    monkeypatch.setattr("protnest.engine.score_run._CHUNK_BATCHES", 24)
    runner = Runner(tmp_path, "masked")
    runner.run(None)
    assert [asked for _, asked in runner.asked] == [(0, 1, 2), (3, 4), (0, 1, 5)] * 2


def test_resumed_anywhere_it_is_the_uninterrupted_run(runner: Runner, tmp_path: Path) -> None:
    whole = runner.run(None)
    calls = runner.asked.copy()
    for stop_after in range(len(calls)):
        folder = tmp_path / f"stopped{stop_after}"
        runner.asked.clear()
        with pytest.raises(Stopped):
            runner.run(folder, stop_after=stop_after)
        assert len(runner.asked) == stop_after
        assert same(runner.run(folder), whole)
        # Whole chunks were kept: none runs twice.
        assert sorted(runner.asked) == sorted(calls)


def test_stopped_again_and_again(runner: Runner, tmp_path: Path) -> None:
    whole = runner.run(None)
    calls = runner.asked.copy()
    runner.asked.clear()
    for _ in calls:
        with pytest.raises(Stopped):
            runner.run(tmp_path / "work", stop_after=0)
        try:
            runner.run(tmp_path / "work", stop_after=1)
        except Stopped:
            pass
    assert same(runner.run(tmp_path / "work"), whole)
    assert sorted(runner.asked) == sorted(calls)


def test_what_was_not_kept_runs_again(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved in the middle of a protein or not, the rest is the same to the bit."""
    monkeypatch.setattr("protnest.engine.score_state._SECONDS_BETWEEN_SAVES", 1e9)
    whole = runner.run(None)
    calls = len(runner.asked)
    for stop_after in range(calls):
        folder = tmp_path / f"stopped{stop_after}"
        with pytest.raises(Stopped):
            runner.run(folder, stop_after=stop_after)
        assert same(runner.run(folder), whole)


def test_a_damaged_part_runs_again_alone(runner: Runner, tmp_path: Path) -> None:
    whole = runner.run(tmp_path / "work")
    (tmp_path / "work" / "1-0.safetensors").write_bytes(b"damaged")
    runner.asked.clear()
    assert same(runner.run(tmp_path / "work"), whole)
    assert {wild_type for wild_type, _ in runner.asked} == {WILD_TYPE}
    assert set(times_asked(runner.asked).values()) == {1}


def test_a_finished_run_runs_nothing(runner: Runner, tmp_path: Path) -> None:
    whole = runner.run(tmp_path / "work")
    runner.asked.clear()
    again = runner.run(tmp_path / "work")
    assert same(again, whole)
    assert (runner.asked, again.residues) == ([], 0)
    records, work, done = runner.progress.started[0]
    assert (records, done) == (21, work), "what all models have done is known"


def test_progress_ends_where_it_said(tmp_path: Path) -> None:
    for kind in ("masked", "mutants", "against the wild type"):
        runner = Runner(tmp_path, kind)
        runner.run(None)
        assert runner.progress.started == [(21, runner.progress.advanced, 0)]


def test_wild_types_alone_touch_no_site(tmp_path: Path) -> None:
    found = survey(write_tables(tmp_path, {"one.csv": "mutant\nWT\n"}), SurveyOptions(by_site=True))
    scorer = CountingScorer(by_site=True)
    with ScoreState(None, {}) as state:
        result = ScoreRun(found, ["x"], lambda model, after: scorer, state, Followed()).run()
    assert scorer.asked == []
    assert result.values[WILD_TYPE][0].shape[0] == 0
