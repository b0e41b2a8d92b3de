"""bench_kd: a whole run at tiny sizes; what a row holds; no speed while a loss or a gradient is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from protnest.benchmarks import bench_kd, kd_comparison, kd_engines
from protnest.benchmarks.kd_comparison import KDPlan, compare_kd
from protnest.benchmarks.kd_engines import COMPILED, EAGER, KL_ONLY, PUBLISHED, Engine, build_duels, protnest
from protnest.benchmarks.kd_problems import BOTH, FORWARD, HEADS, LOGITS, Data, Problem
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.published_kd import published_kd_loss
from protnest.kernels import kd_loss
from protnest.kernels.kd_options import KDOptions
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

APP = typer.Typer()
APP.command()(bench_kd.measure)
CPU = torch.device("cpu")
TINY = Problem(operation=LOGITS, vocabulary=33, rows=300, segments="proteins")
KEYS = {
    *("operation", "vocabulary", "rows", "segments", "segment_count", "longest_segment_rows"),
    *("student_width", "teacher_width", "precision", "direction", "part", "engine", "failure", "passes"),
    *("ms_median", "ms_min", "ms_max", "loss_error", "gradient_error", "peak_extra_bytes"),
    *("gbytes_per_s", "gflops", "gemm_gflops", "percent_of_ceiling", "ours"),
    *("ours_times_faster_median", "ours_times_faster_min", "ours_times_faster_max", "ours_times_less_memory"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The extension need not be built, and a turn need not last.
    monkeypatch.setitem(kd_engines.OURS, "cpu", "chunked")
    monkeypatch.setattr(kd_comparison, "_LEAST_TURN_SECONDS", 0.0)
    monkeypatch.setattr(kd_comparison, "product_gflops", lambda *given, **options: 1.0)
    monkeypatch.setattr(bench_kd, "copy_gbytes_per_s", lambda device: 1.0)

    def start(*options: str) -> tuple[int, str, list[dict[str, Any]]]:
        out = tmp_path / "rows.jsonl"
        given = ["--vocabularies", "33", "--rows", "80", "--pairs", "2", "--peers", "eager,reference"]
        result = CliRunner().invoke(APP, [*given, "--out", str(out), *options])
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return result.exit_code, result.output, rows

    return start


def test_a_run_appends_rows_and_prints_a_table(run: Any) -> None:
    code, output, rows = run()
    assert code == 0, output
    assert [(row["operation"], row["segments"], row["direction"], row["engine"]) for row in rows] == [
        (operation, segments, direction, engine)
        for operation, segments in itertools.product((LOGITS, HEADS), ("long", "proteins"))
        for direction in ([FORWARD, BOTH] if operation == LOGITS else [BOTH])
        for engine in ("chunked", "eager", "reference")
    ]
    for row in rows:
        assert row.keys() >= KEYS | {"suite", "commit", "device", "copy_gbytes_per_s", "liger_kernel"}
        assert (row["suite"], row["vocabulary"], row["rows"], row["failure"]) == ("kd", 33, 80, None)
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        assert row["loss_error"] < 1e-4
        assert (row["gradient_error"] is None) == (row["direction"] == FORWARD)
        assert (row["ours"] is None) == (row["engine"] == "chunked") == (row["ours_times_faster_median"] is None)
        assert (row["student_width"], row["teacher_width"]) in [(None, None), (320, 640)]
        assert row["percent_of_ceiling"] > 0
    assert rows[1]["passes"] == 2
    assert rows[0]["passes"] == 4
    assert "linear_kd_loss V=33 N=80 proteins" in output


def test_quick_is_small(run: Any) -> None:
    code, output, rows = run("--quick", "--operations", "kd_loss", "--pairs", "9")
    assert code == 0, output
    assert {(row["direction"], row["segments"]) for row in rows} == {(BOTH, "proteins")}
    assert rows[1]["passes"] == 3


@pytest.mark.parametrize("broken", ["loss", "gradient", "not a number"])
def test_a_broken_loss_ends_it_with_exit_code_1(run: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any, **options: Any) -> torch.Tensor:
        right = kd_loss(*given, **options)
        if options["impl"] == "reference":
            return right
        if broken == "gradient":
            # The value is right, its gradient is a tenth of a per cent too large.
            return right * 1.001 - (right * 0.001).detach()
        return right * (1.0001 if broken == "loss" else torch.nan)

    monkeypatch.setattr(kd_engines, "kd_loss", wrong)
    code, output, rows = run()
    assert (code, rows) == (1, [])
    what = "gradient" if broken == "gradient" else "loss"
    assert f"chunked: the {what} of kd_loss V=33" in " ".join(output.split())


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, clocked = kd_engines.published_kd_loss, []
    monkeypatch.setattr(kd_engines, "published_kd_loss", lambda *given: real(*given) * 1.01)
    monkeypatch.setattr(kd_comparison._Course, "_clock", lambda *given: clocked.append(given))
    with pytest.raises(ParityError, match=r"eager: the loss of .* off by 1\.0.e-02, allowed 1e-03"):
        compare_kd(TINY, KDPlan(device=CPU, copy_gbytes_per_s=1, ours="chunked", peers=(EAGER,)))
    assert clocked == []


def test_a_loss_that_turns_wrong_while_timed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    real = kd_engines.published_kd_loss
    # Checked in two directions, watched once in the first of them, and then timed.
    monkeypatch.setattr(kd_engines, "published_kd_loss", lambda *given: real(*given) * (1 + (next(calls) >= 3)))
    with pytest.raises(ParityError, match="eager: the loss"):
        compare_kd(TINY, KDPlan(device=CPU, copy_gbytes_per_s=1, ours="chunked", peers=(EAGER,)))


def test_a_peer_without_memory_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*given: Any) -> torch.Tensor:
        message = "tried to allocate 20 GiB\nand more"
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(kd_engines, "published_kd_loss", too_large)
    plan = KDPlan(device=CPU, copy_gbytes_per_s=1, pairs=1, directions=[BOTH], ours="chunked", peers=(EAGER,))
    ours, eager = compare_kd(TINY, plan)
    assert eager["failure"] == "OutOfMemoryError: tried to allocate 20 GiB"
    assert eager["ms_median"] is eager["ours_times_faster_median"] is eager["percent_of_ceiling"] is None
    assert (ours["failure"], ours["passes"]) == (None, 1)
    assert eager.keys() == ours.keys() == KEYS
    assert "20 GiB" in bench_kd.kd_table([ours, eager]).columns[3]._cells[1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_the_published_code_needs_many_times_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd_comparison, "_TWIN_ROWS", 2)
    problem = Problem(operation=LOGITS, vocabulary=20_000, rows=100, segments="proteins")
    plan = KDPlan(device=CPU, copy_gbytes_per_s=1, pairs=1, directions=[BOTH], ours="chunked", peers=(EAGER,))
    ours, eager = compare_kd(problem, plan)
    table = 4 * problem.rows * problem.vocabulary
    assert 0.9 * table < ours["peak_extra_bytes"] < 2 * table
    assert eager["peak_extra_bytes"] > 4 * table
    assert eager["ours_times_less_memory"] == round(eager["peak_extra_bytes"] / ours["peak_extra_bytes"], 2)


@pytest.mark.parametrize("changes", [{}, {"uncertainty": False}, {"smooth": False}, {"temperature": 1.0, "alpha": 0}])
def test_the_published_loss_is_ours_but_for_its_logarithms(changes: dict[str, Any]) -> None:
    options = dataclasses.replace(KDOptions(), **changes)
    data = Data.of_problem(TINY, CPU)
    labels_N = data.labels_N.clone()
    labels_N[::7] = options.ignore_index
    segments = data.cu_seqlens.numel() - 1
    theirs = published_kd_loss(*data.student, *data.teacher, labels_N, data.segment_N, segments, options)
    ours = kd_loss(*data.student, *data.teacher, labels_N, data.cu_seqlens, **vars(options), impl="reference")
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, data.student)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


def test_engines_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ((ours, peers),) = build_duels(TINY, CPU, ours="chunked")
    assert (ours.name, ours.options) == ("chunked", PUBLISHED)
    assert [peer.name for peer in peers] == ["eager", "compiled", "reference"]
    monkeypatch.setattr(kd_engines, "liger_runs", lambda device: True)
    (_, _), (ours, (liger,)) = build_duels(TINY, CPU, ours="chunked")
    assert (liger.name, liger.options, ours.options) == ("liger", KL_ONLY, KL_ONLY)
    linear = dataclasses.replace(TINY, operation=HEADS)
    assert len(build_duels(linear, CPU, ours="chunked")) == 1
    with pytest.raises(ValueError, match="no lager; allowed are eager"):
        build_duels(TINY, CPU, peers=("lager",))


def test_the_part_that_liger_computes_is_compared_with_that_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel needs a GPU: here torch's own divergence stands in for it."""

    def divergence(data: Data, temperature: float) -> torch.Tensor:
        student_NV, teacher_NV = (table / temperature for table in (*data.student, *data.teacher))
        log_student_NV, target_NV = student_NV.log_softmax(-1), teacher_NV.softmax(-1)
        return temperature**2 * torch.nn.functional.kl_div(log_student_NV, target_NV, reduction="batchmean")

    monkeypatch.setattr(kd_engines, "liger_runs", lambda device: True)
    monkeypatch.setattr(kd_engines, "_liger", divergence)
    plan = KDPlan(device=CPU, copy_gbytes_per_s=1, pairs=1, directions=[BOTH], ours="chunked", peers=("liger",))
    rows = compare_kd(TINY, plan)
    found = [(row["engine"], row["part"], row["ours"]) for row in rows]
    assert found == [("chunked", "whole", None), ("chunked", "kl", None), ("liger", "kl", "chunked")]
    assert rows[2]["gradient_error"] < 1e-5


def test_problems_say_what_they_need() -> None:
    assert TINY.moved_bytes(FORWARD) == 2 * 4 * 300 * 33
    assert TINY.moved_bytes(BOTH) == 5 * 4 * 300 * 33
    lengths = TINY.lengths()
    assert sum(lengths) == 300
    assert all(50 <= length <= 250 for length in lengths[:-1])
    assert Problem(operation=HEADS, vocabulary=9, rows=2500, segments="long").lengths() == [1024, 1024, 452]
    assert Problem(operation=HEADS, vocabulary=9, rows=2048, segments="long").lengths() == [1024, 1024]
    for field, value in (("operation", "loss"), ("segments", "short"), ("precision", "int8"), ("rows", 0)):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(TINY, **{field: value})
    with pytest.raises(ValueError, match="pairs must be positive"):
        KDPlan(device=CPU, copy_gbytes_per_s=1, pairs=0)


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_flops_are_those_that_torch_counts(direction: str) -> None:
    problem = dataclasses.replace(TINY, operation=HEADS, rows=64)
    data = Data.of_problem(problem, CPU)
    with FlopCounterMode(display=False) as counter:
        protnest("reference", PUBLISHED).run(data, direction)
    assert problem.product_flops(direction) == counter.get_total_flops()


def test_data_differ_in_entropy_and_are_the_same_again() -> None:
    for operation in (LOGITS, HEADS):
        problem = dataclasses.replace(TINY, operation=operation, vocabulary=2000)
        data = Data.of_problem(problem, CPU)
        table = data.teacher[0] if operation == LOGITS else torch.nn.functional.linear(*data.teacher)
        entropy_N = torch.distributions.Categorical(logits=table).entropy()
        assert float(entropy_N.max() - entropy_N.min()) > 1
        assert torch.equal(data.student[0], Data.of_problem(problem, CPU).student[0])
        other = Data.of_problem(dataclasses.replace(problem, seed=1), CPU)
        assert not torch.equal(data.labels_N, other.labels_N)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_loss_is_the_same() -> None:
    plan = KDPlan(device=CPU, copy_gbytes_per_s=1, pairs=1, ours="chunked", peers=(EAGER, COMPILED))
    rows = compare_kd(dataclasses.replace(TINY, rows=60), plan)
    assert [row["engine"] for row in rows] == ["chunked", "eager", "compiled"] * 2
    assert [row["failure"] for row in rows] == [None] * 6


def test_peers_that_cannot_run_are_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: None)
    code, output, rows = run("--peers", "eager,compiled,liger", "--operations", "kd_loss", "--segments", "long")
    assert code == 0, output
    assert "left out: compiled (torch.compile needs" in output
    assert "left out: liger (needs liger-kernel and a CUDA GPU)" in output
    assert {row["engine"] for row in rows} == {"chunked", "eager"}


def test_ours_has_to_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kd_engines.OURS, "cpu", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, output, rows = run()
    assert (code, rows) == (1, [])
    assert "impl='triton' cannot run here" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--operations", "kl"], "unknown: kl"),
        (["--vocabularies", "33,0"], "expected positive whole numbers"),
        (["--segments", "short"], "allowed are long, proteins"),
        (["--peers", "nobody"], "unknown: nobody"),
        (["--precision", "int8"], "expected one of fp32, bf16, fp16"),
        (["--device", "tpu"], "allowed are cpu, cuda"),
        (["--rows", "0"], "--rows"),
    ],
)
def test_wrong_usage_is_named(run: Any, options: list[str], message: str) -> None:
    code, output, rows = run(*options)
    plain = " ".join(output.replace("│", " ").split())
    assert (code, rows) == (2, [])
    assert message in plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_without_cuda_it_says_so(run: Any) -> None:
    code, output, _ = run("--device", "cuda")
    assert code == 2
    assert "torch sees no CUDA GPU" in " ".join(output.replace("│", " ").split())


def test_engines_are_told_apart() -> None:
    """Two with the same options are two keys."""
    engines: set[Engine] = {protnest("chunked", PUBLISHED), protnest("chunked", PUBLISHED)}
    assert len(engines) == 2
