"""gpu.py without a GPU: every section runs on the CPU at tiny sizes, sees what is wrong, and cannot stop the others."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from protnest.benchmarks import encoder_kernels, generate_comparison, gpu, gpu_suite
from protnest.benchmarks.gpu_suite import (
    MIXED_LENGTHS,
    generate_rows,
    kd_parity_rows,
    kd_rows,
    mixed_batch,
    parity_rows,
    run_tests,
    split_batch,
    throughput_rows,
)
from protnest.benchmarks.kd_engines import Engine, protnest
from protnest.benchmarks.kd_problems import Problem
from protnest.engine.alphabet import MASK_ID
from protnest.engine.config import EncoderConfig

from support.generating import tiny_generation

CPU = torch.device("cpu")
SHORT = (1, 2, 7, 33)
TINY = EncoderConfig(layers=1, width=16, heads=2, feedforward=64)

_TESTS = """
import pytest
@pytest.mark.gpu
def test_right(): pass
@pytest.mark.gpu
def test_wrong(): assert False
@pytest.mark.gpu
@pytest.mark.skip(reason="no such thing here")
def test_left_out(): pass
def test_other(): assert False
"""


def test_mixed_batch_holds_masks_and_lengths() -> None:
    batch = mixed_batch(seed=0, lengths=MIXED_LENGTHS)
    assert batch.lengths_B == tuple(length + 2 for length in MIXED_LENGTHS)
    masks = [int((tokens == MASK_ID).sum()) for tokens in torch.split(batch.tokens_T, list(batch.lengths_B))]
    assert masks[1] == MIXED_LENGTHS[1]
    assert masks[0::2] == [0, 0, 0, 0]
    assert 0 < masks[5] < MIXED_LENGTHS[5] // 2
    again = torch.cat([single.tokens_T for single in split_batch(batch)])
    assert torch.equal(again, batch.tokens_T)


def test_parity_is_green_on_the_cpu() -> None:
    rows = parity_rows("tiny", TINY, ["fp32", "bf16", "fp16"], CPU, lengths=SHORT)
    assert [(row["precision"], row["output"]) for row in rows] == [
        *itertools.product(["fp32", "bf16", "fp16"], ["hidden", "logits", "alone"])
    ]
    assert all(row["ok"] and 0 < row["error"] < row["bound"] for row in rows)


@pytest.mark.parametrize("wrong", ["scaled", "not a number"])
def test_parity_sees_a_wrong_device(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = gpu_suite._outputs, itertools.count()

    def outputs(*given: object) -> dict[str, torch.Tensor]:
        right = real(*given)  # type: ignore[arg-type]
        # Gold comes first, then each precision on the CPU and on the device.
        if next(calls) in (2, 4):
            right["hidden"] = right["hidden"].clone()
            right["hidden"][3] *= 1.05 if wrong == "scaled" else torch.nan
        return right

    monkeypatch.setattr(gpu_suite, "_outputs", outputs)
    rows = parity_rows("tiny", TINY, ["fp32", "bf16"], CPU, lengths=SHORT)
    assert [row["output"] for row in rows if not row["ok"]] == ["hidden", "hidden"]
    json.dumps(rows, allow_nan=False)


def test_throughput_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "copy_gbytes_per_s", lambda device: 1.0)
    rows = throughput_rows(
        "tiny",
        TINY,
        CPU,
        deadline=time.perf_counter() + 5,
        sequences=10,
        budgets=(64, 128),
        precisions=("fp32",),
        pairs=3,
        checked=4,
        ceiling_rows=(32,),
        longest=40,
        seconds_per_pass=0.1,
    )
    assert rows[0]["engine"] == "protnest"
    assert all(row["residues_per_s_median"] > 0 and row["ok"] for row in rows)
    assert "protnest fp32" in gpu._summary(rows)
    json.dumps(rows, allow_nan=False)


def test_losses_are_compared_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = kd_parity_rows(CPU, ours="chunked", vocabularies=(5, 33), rows=70)
    assert len(rows) == 2 * 2 * 3 * 4
    assert all(row["ok"] and 0 < row["gradient_error"] <= row["gradient_bound"] for row in rows)
    assert gpu._summary(rows) == "all shapes: 48 of 48 within their bounds"
    monkeypatch.setattr(gpu_suite, "protnest", lambda impl, options: _scaled(protnest(impl, options), impl))
    wrong = kd_parity_rows(CPU, ours="chunked", vocabularies=(5,), precisions=("fp32",), rows=70)
    assert not any(row["ok"] for row in wrong)
    json.dumps(wrong, allow_nan=False)


def _scaled(engine: Engine, impl: str) -> Engine:
    factor = 1.0 if impl == "reference" else 1.001
    return dataclasses.replace(engine, loss=lambda data: engine.loss(data) * factor)


@pytest.mark.parametrize("operation", ["kd_loss", "linear_kd_loss"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_timed_on_the_cpu(operation: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "copy_gbytes_per_s", lambda device: 1.0)
    problem = Problem(operation=operation, vocabulary=33, rows=40, segments="proteins", precision=precision)
    rows = kd_rows(problem, CPU, deadline=0.0, ours="chunked", peers=("eager", "liger"), pairs=9)
    directions = ["forward", "forward+backward"] if operation == "kd_loss" else ["forward+backward"]
    expected = [(direction, engine) for direction in directions for engine in ("chunked", "eager")]
    assert [(row["direction"], row["engine"]) for row in rows] == expected
    assert all(row["ok"] and row["passes"] == 3 and row["copy_gbytes_per_s"] == 1 for row in rows)
    assert f"{operation} V=33 {precision}: forward" in gpu._summary(rows)
    json.dumps(rows, allow_nan=False)


def test_generation_is_timed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    for name in ("read_gbytes_per_s", "product_gflops"):
        monkeypatch.setattr(generate_comparison, name, lambda *given, **options: 1.0)
    rows = generate_rows(tiny_generation(tokens=6), CPU, pairs=2, batch=2, memory=False)
    engines = ["transformers pipeline", "protnest", "transformers generate", "protnest"]
    expected = [(name, precision) for name in engines for precision in ("fp32", "bf16")]
    assert [(row["engine"], row["precision"]) for row in rows] == expected
    assert all(row["ok"] and row["pairs"] == 2 for row in rows)
    summary = gpu._summary(rows)
    assert summary.startswith("tiny: transformers pipeline fp32 x 1 ")
    assert f"ours {rows[-1]['times_generate_median']:.2f} times faster" in summary
    json.dumps(rows, allow_nan=False)


def test_test_section_counts_outcomes(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_device.py").write_text(_TESTS)
    (tmp_path / "tests" / "test_unrelated.py").write_text("import no_such_package\n")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: needs one']\n")
    (row,) = run_tests(tmp_path, seconds=120)
    assert row["passed"] == 1
    assert [name.split("::")[1].split(":")[0] for name in row["failed"]] == ["test_wrong"]
    assert "no such thing here" in row["skipped"][0]
    assert (row["broken"], row["exit_code"], row["ok"]) == ([], 1, False)
    assert "1 passed, 1 failed, 0 broken, 1 skipped" in gpu._summary([row])
    with pytest.raises(FileNotFoundError, match="is this a checkout"):
        run_tests(tmp_path / "tests", seconds=120)


def test_a_failing_section_is_a_row() -> None:
    def broken() -> list[dict[str, object]]:
        message = "the kernel is gone"
        raise RuntimeError(message)

    (row,) = gpu.run_guarded("parity", broken)
    assert (row["section"], row["ok"]) == ("parity", False)
    assert "RuntimeError: the kernel is gone" in row["traceback"]
    assert gpu._summary([row]) == "failed with RuntimeError: the kernel is gone"


def test_sections_go_on_after_one_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole of `main` on a device that is not there."""

    def broken(*given: object, **options: object) -> list[dict[str, object]]:
        raise RuntimeError(given[0])

    row = {"shape": "8M", "engine": "protnest", "precision": "bf16", "residues_per_s_median": 1.0, "ok": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("protnest.benchmarks.rows.machine_facts", lambda device, commit: {"commit": commit})
    monkeypatch.setattr(gpu_suite, "run_tests", broken)
    monkeypatch.setattr(gpu_suite, "parity_rows", broken)
    monkeypatch.setattr(gpu_suite, "kd_rows", broken)
    monkeypatch.setattr(encoder_kernels, "kernel_rows", broken)
    monkeypatch.setattr(encoder_kernels, "graph_rows", lambda *given: [{"shape": "8M", "ok": True}])
    monkeypatch.setattr(gpu_suite, "generate_rows", lambda problem, device: [{"shape": problem.shape, "ok": True}])
    monkeypatch.setattr(gpu_suite, "kd_parity_rows", lambda device: [{"shape": "kd_loss V=33", "ok": True}])
    monkeypatch.setattr(gpu_suite, "throughput_rows", lambda *given, **o: [row | {"ours_times_faster_median": None}])
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out), "--shapes", "8M", "--commit", "abc"]) == 1
    document = json.loads(out.read_text())
    assert [row["section"] for row in document["rows"]].count("parity") == len(gpu_suite.SMALL_SHAPES) + 2
    assert [row["ok"] for row in document["rows"] if row["section"] == "kernels"] == [False, False]
    assert [row["ok"] for row in document["rows"] if row["section"] == "graphs"] == [True]
    losses = [row["ok"] for row in document["rows"] if row["section"] == "kd"]
    assert losses == [True, *[False] * len(gpu_suite.KD_PROBLEMS)]
    assert [row["shape"] for row in document["rows"] if row["section"] == "generate"] == ["tiny", "protgpt2"]
    assert document["rows"][-1]["section"] == "throughput"
    assert (document["rows"][-1]["ok"], document["ok"], document["machine"]) == (True, False, {"commit": "abc"})
    assert gpu.main(["--out", str(out), "--shapes", "8M", "--sections", "throughput"]) == 0
    assert gpu.main(["--out", str(out), "--shapes", "8M", "--minutes", "0", "--sections", "throughput"]) == 1
    assert "out of time: 0.0 minutes" in json.loads(out.read_text())["rows"][0]["traceback"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_without_cuda_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "gpu.json")
    assert gpu.main(["--out", out, "--shapes", "9M"]) == 2
    assert "no 9M; allowed are 8M" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--out", out, "--sections", "test"])
    assert "allowed are tests,parity,kernels,kd,graphs,generate,throughput" in capsys.readouterr().err.replace(
        ", ", ","
    )


def test_shapes_cover_the_published_head_widths() -> None:
    widths = {config.head_width for config in gpu_suite.SMALL_SHAPES.values()}
    assert {16, 24, 64, 128} <= widths
    assert np.all([width % 8 == 0 for width in widths])
