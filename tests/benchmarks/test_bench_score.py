"""bench_score: fair-esm's loop is its script's, weights are the same, a difference ends it, ratios are of turns."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from protnest.benchmarks import bench_score, score_comparison, score_engines
from protnest.benchmarks.bench_score import plan_scores, score, score_tables
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.score_comparison import (
    GAINS,
    Agreement,
    Run,
    ScorePlan,
    check_scores,
    compare_scores,
    score_scans,
    share_of,
    take_turns,
    times_faster,
)
from protnest.benchmarks.score_engines import (
    FairEsmLoop,
    Problem,
    all_singles,
    fair_esm_twin,
    find_problem,
    spread_over,
    whole_last_layer,
)
from protnest.engine import Encoder, score_variants
from protnest.engine.config import PUBLISHED
from protnest.engine.variants import parse_variant
from typer.testing import CliRunner

from support.scoring import SCORER, TOUCHED, WILD_TYPE, tiny_problem

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> Problem:
    pytest.importorskip("esm")
    return tiny_problem()


@pytest.fixture(scope="module")
def loop(problem: Problem) -> FairEsmLoop:
    return FairEsmLoop(problem.encoder, problem.wild_type, device=CPU)


@pytest.fixture
def run(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bench_score, "find_problem", lambda model, *, scans, seed: problem)
    monkeypatch.setattr(bench_score, "SCANS", write_scans(tmp_path / "scans"))
    app = typer.Typer()
    app.command()(score)

    def invoke(*options: str) -> tuple[Any, list[dict[str, Any]]]:
        out = tmp_path / "rows.jsonl"
        result = CliRunner().invoke(app, [*options, "--out", str(out)])
        lines = out.read_text("utf-8").splitlines() if out.exists() else []
        return result, [json.loads(line) for line in lines]

    return invoke


def write_scans(folder: Path) -> Path:
    """Two scans, of 1 and 2 variants, and their wild types."""
    folder.mkdir()
    (folder / "wt.fasta").write_text(">b\nMKTAY\n>a\nMKTAYIA\n")
    for name, variants in {"a": ["M1A"], "b": ["K2G", "M1A:K2G"]}.items():
        rows = "".join(f"{variant},0.5\n" for variant in variants)
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress(f"mutant,DMS_score\n{rows}".encode()))
    return folder


def test_the_loop_is_the_scripts(problem: Problem, loop: FairEsmLoop) -> None:
    """Each token of `<cls>` protein `<eos>` masked, all else as it was; the row of that token."""
    model, alphabet = fair_esm_twin(problem.encoder), loop.model.alphabet
    ids = [alphabet.cls_idx, *map(alphabet.get_idx, WILD_TYPE), alphabet.eos_idx]
    expected = []
    for token in range(len(ids)):
        masked = torch.tensor([[alphabet.mask_idx if place == token else id_ for place, id_ in enumerate(ids)]])
        expected.append(model(masked)["logits"].log_softmax(-1)[0, token])
    assert loop.tokens == len(ids)
    for copies in (1, 5, 100):
        got = loop.log_probabilities(range(len(ids)), copies)
        torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=2e-5)
    torch.testing.assert_close(loop.log_probabilities([7, 3], 2), torch.stack([expected[7], expected[3]]))


def test_scores_are_differences_at_the_variants_own_token(problem: Problem, loop: FairEsmLoop) -> None:
    tokens = [place + 1 for place in TOUCHED]
    theirs = loop.score(problem.variants, tokens, 4)
    ours = score_variants(problem.encoder, WILD_TYPE, [variant.name for variant in problem.variants])
    assert theirs.shape == ours.shape == (19 * len(TOUCHED),)
    assert np.abs(theirs - ours).max() < 1e-4 < 0.1 < np.abs(ours).max()
    np.testing.assert_array_equal(loop.score(problem.variants[:19], tokens, 4), theirs[:19])


def test_fair_esm_in_bf16_runs_and_leaves_the_other_as_it_was(problem: Problem, loop: FairEsmLoop) -> None:
    tokens = [place + 1 for place in TOUCHED]
    expected = loop.score(problem.variants, tokens)
    cast = loop.in_bf16()
    for got in (cast.score(problem.variants, tokens), loop.score(problem.variants, tokens, autocast=True)):
        assert got.dtype == np.float32
        assert 1e-3 < np.abs(got - expected).max() < 0.5
    assert {parameter.dtype for parameter in cast.model.parameters()} == {torch.bfloat16}
    np.testing.assert_array_equal(loop.score(problem.variants, tokens), expected)


@pytest.mark.parametrize("lost", ["fc1", "lm_head.bias", "lm_head.dense"])
def test_weights_that_do_not_arrive_are_seen(problem: Problem, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    real_body, real_head = score_engines.fair_esm_names, score_engines.head_names
    body = [pair for pair in real_body(SCORER.layers) if lost not in pair[0]]
    monkeypatch.setattr(score_engines, "fair_esm_names", lambda layers: body)
    calls: list[int] = []

    def head() -> dict[str, tuple[str, ...]]:
        # The second call names what is carried over; the others, what is compared.
        calls.append(1)
        return {own: names for own, names in real_head().items() if len(calls) != 2 or lost not in names[0]}

    monkeypatch.setattr(score_engines, "head_names", head)
    with pytest.raises(RuntimeError, match="fair-esm's weights differ from ours"):
        fair_esm_twin(problem.encoder)


def test_whole_last_layer_is_another_way_to_the_same(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [variant.name for variant in problem.variants[:40]]
    expected = score_variants(problem.encoder, WILD_TYPE, names)

    def refuse(self: Encoder, *given: object) -> torch.Tensor:
        message = "the short cut"
        raise AssertionError(message)

    monkeypatch.setattr(Encoder, "row_logits", refuse)
    with whole_last_layer(problem.encoder):
        np.testing.assert_allclose(score_variants(problem.encoder, WILD_TYPE, names), expected, atol=1e-4)
    with pytest.raises(AssertionError, match="the short cut"):
        score_variants(problem.encoder, WILD_TYPE, names)
    with pytest.raises(KeyError), whole_last_layer(problem.encoder):
        raise KeyError
    assert "row_logits" not in vars(problem.encoder)


def test_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights and a made-up protein with all its singles; a real scan where it is there."""
    monkeypatch.setitem(PUBLISHED, score_engines.RANDOM, SCORER)
    monkeypatch.setattr(score_engines, "REAL", tmp_path / "none")
    made_up = find_problem(scans=tmp_path, seed=3)
    assert made_up.model == "random esm2_t6_8M_UR50D, seed 3"
    assert made_up.protein == "made up, seed 3"
    assert (len(made_up.wild_type), len(made_up.variants), len(made_up.touched)) == (286, 286 * 19, 286)
    assert len({variant.sequence for variant in made_up.variants}) == 286 * 19
    spread = score_variants(made_up.encoder, made_up.wild_type, [each.name for each in made_up.variants[:380]]).std()
    assert 0.5 < spread < 8
    (tmp_path / "wt.fasta").write_text(f">{score_engines.PROTEIN}\nMKTAY\n")
    table = b"mutant,DMS_score\nK2G,1\nK2A,2\nY5A,1\n"
    (tmp_path / f"{score_engines.PROTEIN}.csv.gz").write_bytes(gzip.compress(table))
    real = find_problem("nano-xs", scans=tmp_path)
    assert (real.model, real.protein, real.wild_type) == ("nano-xs", score_engines.PROTEIN, "MKTAY")
    assert real.touched == [1, 4]
    assert [variant.name for variant in real.variants_at([1])] == ["K2G", "K2A"]
    with pytest.raises(ValueError, match="single substitutions alone, not 'M1A:K2G'"):
        replace(real, variants=[parse_variant("M1A:K2G", "MKTAY")])


@pytest.mark.parametrize(
    ("places", "count", "expected"),
    [
        (range(5), 9, [0, 1, 2, 3, 4]),
        (range(6), 4, [0, 2, 3, 5]),
        (range(0, 18, 2), 3, [0, 8, 16]),
        ([4, 7, 9], 2, [4, 9]),
        ([], 0, []),
    ],
)
def test_a_part_is_spread_from_end_to_end(places: Sequence[int], count: int, expected: list[int]) -> None:
    assert spread_over(places, count) == expected


def test_a_part_holds_no_place_twice() -> None:
    for count in range(1, 264):
        chosen = spread_over(range(263), count)
        assert len(set(chosen)) == count
        assert chosen == sorted(chosen)


def test_ratios_are_taken_within_turns() -> None:
    order: list[str] = []
    checked: list[str] = []

    def work(name: str) -> np.ndarray[Any, Any]:
        order.append(name)
        return np.full(1, len(order), dtype=np.float32)

    works = {name: lambda name=name: work(name) for name in ("theirs", "fp32", "bf16")}
    runs = take_turns(CPU, works, 2, lambda name, scores: checked.append(f"{name} {scores[0]:.0f}"))
    assert order == ["theirs", "fp32", "bf16"] * 2
    assert checked == ["theirs 1", "fp32 2", "bf16 3", "theirs 4", "fp32 5", "bf16 6"]
    assert [len(each) for each in runs.values()] == [2, 2, 2]
    nothing = np.zeros(0, dtype=np.float32)
    slow = [Run(6.0, 1.0, nothing), Run(10.0, 4.0, nothing), Run(90.0, 9.0, nothing)]
    fast = [Run(3.0, 1.0, nothing), Run(2.0, 1.0, nothing), Run(30.0, 3.0, nothing)]
    # The medians' ratio would be 10 / 3.
    assert times_faster(slow, fast) == (3.0, 2.0, 5.0)
    assert times_faster(slow, fast, cpu=True) == (3.0, 1.0, 4.0)


def test_a_factors_share_is_of_the_logarithm() -> None:
    assert share_of(2.0, 8.0) == pytest.approx(100 / 3)
    assert share_of(1.0, 8.0) == 0
    assert share_of(1.2, 0.9) is None


@pytest.mark.parametrize(
    ("precision", "change", "right"),
    [
        ("fp32", 0.9e-4, True),
        ("fp32", 1.1e-4, False),
        ("bf16", 0.4, True),
        ("bf16", 0.6, False),
        ("int8", 1.9, True),
        ("int8", 2.1, False),
        # One of a thousand: bf16's rank correlation lets it pass.
        ("bf16", math.nan, False),
    ],
)
def test_one_score_that_is_off(precision: str, change: float, right: bool) -> None:
    expected = np.linspace(-4, 4, 1000, dtype=np.float32)
    got = expected.copy()
    got[500] += change
    if right:
        found = check_scores(precision, expected, got)
        assert isinstance(found, Agreement)
        assert found.difference == pytest.approx(change, rel=1e-2)
        assert found.spearman > 0.999
        return
    with pytest.raises(
        ParityError, match=rf"ours {precision}: scores differ .*allowed {score_comparison.ALLOWED[precision]:g}\)"
    ):
        check_scores(precision, expected, got)


def test_an_order_that_is_off_and_scores_that_are_missing() -> None:
    generator = np.random.default_rng(0)
    expected = generator.normal(0, 0.2, size=500).astype(np.float32)
    with pytest.raises(ParityError, match="rank correlation 0"):
        check_scores("int8", expected, expected + generator.normal(0, 0.1, size=500).astype(np.float32))
    with pytest.raises(ParityError, match=r"scores of shape \(499,\), expected \(500,\)"):
        check_scores("fp32", expected, expected[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "pairs must be positive, got 0"),
        ({"positions": 0}, "positions must be positive, got 0"),
        ({"precisions": ()}, "precisions must not be empty"),
        ({"copies": ()}, "copies must not be empty"),
    ],
)
def test_plans_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScorePlan(**options)


def test_plans_of_devices() -> None:
    assert replace(plan_scores(CPU), precisions=ScorePlan().precisions) == ScorePlan()
    assert tuple(plan_scores(CPU).precisions) == ScorePlan().precisions
    quick = plan_scores(CPU, quick=True)
    assert (quick.pairs, quick.positions, quick.whole) == (3, 16, False)
    own = plan_scores(CPU, precisions="int8,fp32", positions=7, pairs=2, quick=True)
    assert (own.precisions, own.positions, own.pairs) == (["int8", "fp32"], 7, 2)
    on_gpu = plan_scores(torch.device("cuda"))
    assert tuple(on_gpu.precisions) == ("fp32", "bf16", "fp16")
    assert max(on_gpu.copies) > 16


def test_a_run_appends_rows_of_all_parts(run: Any) -> None:
    result, rows = run("--pairs", "2", "--positions", "9", "--precisions", "fp32,bf16")
    assert result.exit_code == 0, result.output
    assert "times faster" in result.stdout
    found = [(row["part"], row["engine"], row["precision"], row.get("gain") or row["data"]) for row in rows]
    ours = [("protnest", "fp32"), ("protnest", "bf16")]
    engines = [("fair-esm", "fp32"), *ours]
    whole = [engines[0], *(own for own in ours for _ in range(2))]
    assert found == [
        *(("pairs", *engine, "made up") for engine in engines),
        *(("gains", *engine, gain) for engine in ours for gain in GAINS),
        *(("whole", *engine, "made up") for engine in whole),
        *(("scans", "protnest", "fp32", scan) for scan in ("a", "b", "all")),
    ]
    for row in rows:
        assert (row["suite"], row["device"], row["model"], row["schema_version"]) == ("score", "cpu", "tiny", 1)
    for row in rows[:-3]:
        assert (row["residues"], row["variants"], row["touched"]) == (22, 19 * 18, 18)


def test_what_rows_hold(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    plan = ScorePlan(precisions=("bf16",), pairs=3, positions=9, copies=(1, 4), whole=True)
    told: list[str] = []
    rows = compare_scores(problem, plan, told.append)
    assert told[0] == "parity: 171 variants of 9 residues"
    theirs, ours, *gains = rows[:5]
    whole = rows[5:]
    assert theirs["copies"] in (1, 4)
    assert set(theirs["copies_seconds_per_position"]) == {"1", "4"}
    assert set(theirs["in_bf16"]) == {"cast", "autocast"}
    for way in theirs["in_bf16"].values():
        assert way["times_slower"] > 0
        assert 1e-3 < way["difference"] < 0.5
        assert 0.99 < way["spearman"] < 1
    assert (theirs["times_faster_median"], theirs["times_faster_whole"]) == (None, None)
    assert (ours["positions"], ours["pairs"]) == (9, 3)
    for name in ("ms_per_position", "cpu_ms_per_position", "times_faster", "times_faster_cpu"):
        assert 0 < ours[f"{name}_min"] <= ours[f"{name}_median"] <= ours[f"{name}_max"]
    # 22 residues, <cls> and <eos>; variants touch 18.
    assert ours["times_faster_whole"] == pytest.approx(ours["times_faster_median"] * 24 / 18)
    assert 1e-6 < ours["max_difference"] <= 0.5
    assert 0.995 <= ours["spearman"] < 1
    assert theirs["max_difference"] == 0
    assert [(row["gain"], row["positions"], row["positions_without"]) for row in gains] == [
        (GAINS[0], 9, 11),
        (GAINS[1], 9, 9),
        (GAINS[2], 9, 9),
    ]
    for row in gains:
        assert row["times_faster_min"] <= row["times_faster_median"] <= row["times_faster_max"]
        assert row["percent_of_whole"] == share_of(row["times_faster_median"], ours["times_faster_whole"])
    assert [(row["engine"], row["positions"]) for row in whole] == [
        ("fair-esm", 24),
        ("protnest", 18),
        ("protnest", 22),
    ]
    for row in whole:
        assert row["times_faster"] == pytest.approx(whole[0]["seconds"] / row["seconds"])
        assert row["times_faster_cpu"] == pytest.approx(whole[0]["cpu_seconds"] / row["cpu_seconds"])
    assert compare_scores(problem, replace(plan, whole=False))[-1]["part"] == "gains"


def test_gains_are_of_what_they_name(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each turn ours as it is, on more residues, with the last layer whole, and with one copy a batch."""
    calls: list[tuple[int, int | None, bool]] = []
    real = score_comparison.score_variants

    def watched(encoder: Encoder, wild_type: str, names: list[str], *, max_tokens: int | None) -> Any:
        sites = {int(name[1:-1]) for name in names}
        calls.append((len(sites), max_tokens, "row_logits" in vars(encoder)))
        return real(encoder, wild_type, names, max_tokens=max_tokens)

    def clock(device: torch.device, work: Any) -> Run:
        """6 s for fair-esm's loop, 3 s for one copy a batch, 2 s for ours else."""
        before = len(calls)
        scores_N = work()
        seconds = 6.0 if len(calls) == before else 3.0 if calls[-1][1] == 1 else 2.0
        return Run(seconds, seconds, scores_N)

    monkeypatch.setattr(score_comparison, "score_variants", watched)
    monkeypatch.setattr(score_comparison, "timed", clock)
    plan = ScorePlan(precisions=("fp32",), pairs=2, positions=9, copies=(1,), whole=False)
    rows = compare_scores(problem, plan)
    assert [row["times_faster_median"] for row in rows] == [None, 3.0, 1.0, 1.0, 1.5]
    parity, pairs, gains = calls[:1], calls[1:3], calls[3:]
    assert parity + pairs == [(9, None, False)] * 3
    assert gains == [(9, None, False), (11, None, False), (9, None, True), (9, 1, False)] * 2


def test_cpu_time_is_told_of_one_thread_alone(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows = compare_scores(problem, ScorePlan(precisions=("fp32",), pairs=2, positions=3, copies=(1,)))
    for row in rows:
        assert all(value is None for key, value in row.items() if "cpu" in key), row["part"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_difference_ends_the_run(run: Any, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    real = score_comparison.score_variants

    def broken(encoder: Encoder, *given: Any, **options: Any) -> Any:
        off = {"fp32": 2e-4, "bf16": 1.0, "int8": 3.0}[encoder.precision]
        return real(encoder, *given, **options) + off * (encoder.precision == precision)

    monkeypatch.setattr(score_comparison, "score_variants", broken)
    result, rows = run("--pairs", "2", "--positions", "9")
    assert (result.exit_code, rows) == (1, [])
    assert f"error: ours {precision}: scores differ from fair-esm's by up to" in " ".join(result.output.split())
    assert "interleaved pairs" not in result.output


def test_a_difference_in_a_timed_pass_ends_the_run(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = score_comparison.score_variants, []

    def broken(*given: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*given, **options) + 2e-4 * (len(calls) == 3)

    monkeypatch.setattr(score_comparison, "score_variants", broken)
    with pytest.raises(ParityError, match="ours fp32"):
        compare_scores(problem, ScorePlan(precisions=("fp32",), pairs=4, positions=3, copies=(1,)))
    assert len(calls) == 3


def test_without_fair_esm_there_is_nothing_to_compare_with(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_engines, "is_installed", lambda name: False)
    result, rows = run("--pairs", "2")
    assert (result.exit_code, rows) == (1, [])
    assert "error: fair-esm (module esm) is not installed" in " ".join(result.output.split())


def test_json_is_one_object(run: Any) -> None:
    result, rows = run("--pairs", "2", "--positions", "3", "--precisions", "fp32", "--quick", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["suite"], report["device"]) == ("score", "cpu")
    assert report["rows"] == rows
    assert {row["part"] for row in rows} == {"pairs", "gains", "scans"}


@pytest.mark.parametrize(
    "options", [("--precisions", "fp16"), ("--pairs", "1"), ("--positions", "0"), ("--device", "tpu")]
)
def test_wrong_words_are_usage_errors(run: Any, options: tuple[str, str]) -> None:
    result, rows = run(*options)
    assert (result.exit_code, rows) == (2, [])


def test_scans_are_read_and_scored_unmasked(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, str]] = []
    real = score_comparison.score_variants

    def watched(encoder: Encoder, wild_type: str, variants: Sequence[Any], *, method: str) -> Any:
        calls.append((wild_type, len(variants), method))
        return real(encoder, wild_type, variants, method=method)  # type: ignore[arg-type]

    monkeypatch.setattr(score_comparison, "score_variants", watched)
    rows = score_scans(problem.encoder, write_scans(tmp_path / "scans"))
    assert calls == [("MKTAYIA", 1, "wt-marginal"), ("MKTAY", 2, "wt-marginal")]
    assert [(row["data"], row["residues"], row["variants"]) for row in rows] == [
        ("a", 7, 1),
        ("b", 5, 2),
        ("all", 12, 3),
    ]
    for row in rows:
        assert row["seconds"] == pytest.approx(row["read_seconds"] + row["score_seconds"])
    assert rows[-1]["seconds"] == pytest.approx(rows[0]["seconds"] + rows[1]["seconds"])
    assert score_scans(problem.encoder, tmp_path) == []


def test_a_table_for_each_part(problem: Problem) -> None:
    rows = compare_scores(problem, ScorePlan(precisions=("fp32",), pairs=2, positions=3, copies=(1,)))
    assert [table.row_count for table in score_tables(rows)] == [2, 3, 3]
    assert score_tables([]) == []
    assert len(all_singles("MK")) == 38
