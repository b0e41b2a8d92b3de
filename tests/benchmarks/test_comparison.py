"""comparison: ratios within turns, the best budget, nothing timed before all is right, deadlines.

The engines are stand-ins that move a clock of the test's own, so every number in a row is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from protnest.benchmarks import comparison
from protnest.benchmarks import course as course_file
from protnest.benchmarks.ceiling import forward_flops
from protnest.benchmarks.comparison import SHAPES, Plan, compare, contest, spread
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.peers import Lineup
from protnest.engine.config import EncoderConfig

CONFIG = EncoderConfig(layers=1, width=8, heads=2, feedforward=32)
SEQUENCES = ["M" * length for length in (10, 20, 30, 40)]


class Clock:
    """Time that passes only when an engine says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class StandIn:
    """Says the right thing after `seconds(budget)` for each residue; every pass is written down."""

    def __init__(self, name: str, clock: Clock, seconds: Callable[[int], float], diary: list[str]) -> None:
        self.name, self.precision = name, "fp32"
        self._clock, self._seconds, self._diary = clock, seconds, diary
        self.wrong = False

    def embed(self, sequences: Sequence[str], budget: int) -> np.ndarray:
        self._diary.append(f"{self.name} {len(sequences)} at {budget}")
        self._clock.now += self._seconds(budget) * sum(map(len, sequences))
        vectors = np.array([[len(sequence), 1.0] for sequence in sequences], dtype=np.float32)
        return vectors * (0.9 if self.wrong else 1)


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Ours: 1 ms a residue at 64 tokens, 2 ms one by one. The peer: three times that, best one by one. Ceiling 1."""
    clock, diary = Clock(), []  # type: tuple[Clock, list[str]]
    ours = StandIn("protnest", clock, lambda budget: 0.001 if budget == 64 else 0.002, diary)
    peer = StandIn("peer", clock, lambda budget: 0.003 if budget == 1 else 0.004, diary)
    lineup = Lineup(ours=[ours], peers=[peer], reference=ours, default_precision="fp32")  # type: ignore[list-item]
    monkeypatch.setattr(course_file, "time", clock)
    monkeypatch.setattr(comparison, "build_lineup", lambda *given, **options: lineup)
    monkeypatch.setattr(comparison, "precision_gflops", lambda *given, **options: 1.0)
    return SimpleNamespace(clock=clock, diary=diary, ours=ours, peer=peer)


def _plan(**changes: object) -> Plan:
    given: dict[str, object] = {
        **{"sequences": SEQUENCES, "budgets": (1, 64), "precisions": ("fp32",), "pairs": 4, "checked": 2},
        **{"device": torch.device("cpu"), "ceiling_rows": (8,)},
    }
    return Plan(**(given | changes))  # type: ignore[arg-type]


def test_rows_say_what_happened(course: SimpleNamespace) -> None:
    told: list[str] = []
    ours, peer = compare("tiny", CONFIG, _plan(), begun=lambda passes: told.append)
    assert (ours["engine"], ours["budget_tokens"], ours["passes"]) == ("protnest", 64, 4)
    assert (peer["engine"], peer["budget_tokens"], peer["passes"]) == ("peer", 1, 4)
    assert ours["residues_per_s_median"] == pytest.approx(1000, abs=0.1)
    assert peer["residues_per_s_median"] == pytest.approx(1000 / 3, abs=0.1)
    assert peer["budgets_residues_per_s"] == {"1": 333.3, "64": 250.0}
    assert (peer["ours_precision"], peer["ours_times_faster_median"]) == ("fp32", 3.0)
    assert ours["ours_precision"] is ours["ours_times_faster_median"] is None
    gflops = forward_flops(CONFIG, [length + 2 for length in (10, 20, 30, 40)]) / 0.1 / 1e9
    assert ours["gflops"] == round(gflops, 2)
    assert ours["percent_of_ceiling"] == round(100 * gflops, 1)
    assert len(told) == 2 * (2 + 2 + 1) + 4 * 2 == len(course.diary) - 1


def test_peer_and_ours_take_turns(course: SimpleNamespace) -> None:
    compare("tiny", CONFIG, _plan())
    assert course.diary[-8:] == ["peer 4 at 1", "protnest 4 at 64"] * 4


def test_ratio_is_taken_within_each_turn(course: SimpleNamespace) -> None:
    """A machine that halves its speed from turn to turn moves rates, and no ratio."""

    def slowdown() -> int:
        return 2 ** sum(line.startswith("peer") for line in course.diary)

    course.peer._seconds = lambda budget: 0.003 * slowdown()
    course.ours._seconds = lambda budget: 0.001 * slowdown()
    row = compare("tiny", CONFIG, _plan(budgets=(1,)))[1]
    assert row["residues_per_s_max"] == pytest.approx(8 * row["residues_per_s_min"], rel=0.1)
    assert row["ours_times_faster_min"] == row["ours_times_faster_max"] == 3


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_nothing_is_timed_while_an_answer_is_wrong(
    course: SimpleNamespace, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    getattr(course, wrong).wrong = True
    right = course.peer if wrong == "ours" else course.ours
    lineup = Lineup(ours=[course.ours], peers=[course.peer], reference=right, default_precision="fp32")
    monkeypatch.setattr(comparison, "build_lineup", lambda *given, **options: lineup)
    with pytest.raises(ParityError, match=f"{getattr(course, wrong).name} fp32"):
        compare("tiny", CONFIG, _plan())
    # All passes were over the checked sequences alone.
    assert all(" 2 at " in line for line in course.diary)


def test_deadline_keeps_three_pairs_and_one_budget(course: SimpleNamespace) -> None:
    ours, peer = compare("tiny", CONFIG, _plan(pairs=9, deadline=0.0))
    assert (ours["passes"], peer["passes"]) == (3, 3)
    assert list(peer["budgets_residues_per_s"]) == ["1"]


def test_a_duel_takes_what_the_slower_runs_in_the_time_given(course: SimpleNamespace) -> None:
    peer = compare("tiny", CONFIG, _plan(most_pass_seconds=0.1))[1]
    # 0.1 s at 333 residues/s: 33 tokens; the first two proteins have 34 with their special tokens, 30 without.
    assert peer["pass_residues"] == 30


def test_budgets_that_do_not_fit_in_memory_are_left_out(course: SimpleNamespace) -> None:
    def seconds(budget: int) -> float:
        if len(course.diary) > 5 and budget == 64:
            raise torch.OutOfMemoryError
        return 0.003

    course.peer._seconds = seconds
    assert list(compare("tiny", CONFIG, _plan())[1]["budgets_residues_per_s"]) == ["1"]


def test_ours_is_measured_where_there_are_no_peers(course: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Lineup(ours=[course.ours], peers=[], reference=course.ours, default_precision="fp32")
    monkeypatch.setattr(comparison, "build_lineup", lambda *given, **options: alone)
    (row,) = compare("tiny", CONFIG, _plan())
    assert row["passes"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": []}, "sequences must not be empty"),
        ({"budgets": ()}, "budgets must not be empty"),
        ({"pairs": 0}, "pairs must be positive, got 0"),
        ({"checked": 0}, "checked must be positive, got 0"),
    ],
)
def test_plans_are_validated(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(**changes)


def _more(course: SimpleNamespace, name: str, precision: str, seconds: float) -> StandIn:
    engine = StandIn(name, course.clock, lambda budget: seconds, course.diary)
    engine.precision = precision
    return engine


def test_the_verdict_is_against_the_fastest_peer_of_any_precision(
    course: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16, int8 = _more(course, "protnest", "bf16", 0.0008), _more(course, "protnest", "int8", 0.0005)
    fair, quantised = _more(course, "fair-esm", "fp32", 0.01), _more(course, "esm-cpp", "int8", 0.002)
    lineup = Lineup(
        ours=[course.ours, bf16, int8],  # type: ignore[list-item]
        peers=[fair, course.peer, quantised],  # type: ignore[list-item]
        reference=course.ours,
        default_precision="fp32",
    )
    monkeypatch.setattr(comparison, "build_lineup", lambda *given, **options: lineup)
    outcome = contest("tiny", CONFIG, _plan())
    assert outcome.verdict is not None
    ratios = outcome.verdict["ratios"]
    medians = {name: (ratio["median"], ratio["peer"]) for name, ratio in ratios.items()}
    assert medians == {
        "ours fp32 / fastest peer": (2.0, "esm-cpp int8"),
        "ours bf16 / fastest peer": (2.5, "esm-cpp int8"),
        "ours int8 / fastest peer": (4.0, "esm-cpp int8"),
        "ours fp32 / fair-esm": (10.0, "fair-esm fp32"),
        "ours bf16 / fair-esm": (12.5, "fair-esm fp32"),
    }
    assert {ratio["pairs"] for ratio in ratios.values()} == {4}
    # The fastest one met all of ours in every turn.
    assert course.diary[-16:] == ["esm-cpp 4 at 1", "protnest 4 at 64", "protnest 4 at 1", "protnest 4 at 1"] * 4


def test_without_peers_there_is_no_verdict(course: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Lineup(ours=[course.ours], peers=[], reference=course.ours, default_precision="fp32")
    monkeypatch.setattr(comparison, "build_lineup", lambda *given, **options: alone)
    assert contest("tiny", CONFIG, _plan()).verdict is None


def test_engines_with_processes_are_ended(course: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(Lineup, "close", lambda self: closed.append(True))
    course.peer.wrong = True
    with pytest.raises(ParityError):
        contest("tiny", CONFIG, _plan())
    assert closed == [True]


def test_spread_and_shapes() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert list(SHAPES) == ["8M", "35M", "150M", "650M", "3B", "15B"]
