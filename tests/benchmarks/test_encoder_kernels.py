"""Kernels and graphs without a GPU: what is counted, what is wrong is seen, and all but Triton runs at tiny sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from protnest.benchmarks import encoder_kernels, gpu
from protnest.benchmarks.encoder_kernels import TORCH, TRITON, graph_rows, kernel_cases, kernel_rows
from protnest.engine import Embedder
from protnest.engine.config import EncoderConfig

CPU = torch.device("cpu")
TINY = EncoderConfig(layers=1, width=48, heads=2, feedforward=96)
SIZES: dict[str, Any] = {"tokens": 200, "longest": 40, "ceiling_rows": (32,), "repeats": 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_kernels, "copy_gbytes_per_s", lambda device, repeats: 2.0)
    monkeypatch.setattr(encoder_kernels, "gemm_gflops", lambda *given, **options: 4.0)
    monkeypatch.setattr(encoder_kernels, "best_seconds", lambda work, device, repeats: 0.25 + 0 * len(str(work())))


def test_what_a_step_costs() -> None:
    attention, add_norm, gelu = kernel_cases(TINY, torch.bfloat16, CPU, [3, 5])
    # Two products of 2 L L K a head; three tensors in, one out.
    assert (attention.flops, attention.moved_bytes) == (4 * 48 * (9 + 25), 4 * 8 * 48 * 2)
    assert (add_norm.flops, add_norm.moved_bytes) == (0, 8 * 48 * (4 + 2 + 4 + 2))
    assert (gelu.flops, gelu.moved_bytes) == (0, 8 * 96 * (2 + 2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_runs_on_the_cpu(precision: str) -> None:
    rows = kernel_rows("tiny", TINY, precision, CPU, engines=[TORCH], **SIZES)
    assert [row["kernel"] for row in rows] == ["rotary_attention", "add_norm", "bias_gelu"]
    assert all(row["ok"] and row["ms"] == 250 for row in rows)
    size, tokens = 4 if precision == "fp32" else 2, rows[0]["tokens"]
    assert 100 < tokens <= 200
    # Bytes at 2 GB/s, of a quarter of a second.
    assert rows[2]["percent_of_roofline"] == pytest.approx(100 * tokens * 96 * 2 * size / 2e9 / 0.25)
    assert rows[0]["roofline_ms"] > 1e3 * tokens * 48 * 4 * size / 2e9 * 0.99
    assert "tiny" in gpu._summary(rows)
    assert "rotary_attention torch 250.000 ms" in gpu._summary(rows)
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("wrong", [1.05, torch.nan])
def test_a_wrong_kernel_is_seen(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = encoder_kernels.kernel_cases

    def cases(*given: Any) -> list[Any]:
        made = real(*given)
        for case in made:
            right = case.steps[TORCH]
            case.steps[TRITON] = lambda *inputs, right=right: right(*inputs) * wrong
        return made

    monkeypatch.setattr(encoder_kernels, "kernel_cases", cases)
    rows = kernel_rows("tiny", TINY, "bf16", CPU, **SIZES)
    assert [row["ok"] for row in rows] == [False, True] * 3
    assert gpu._summary(rows).count("WRONG") == 3
    json.dumps(rows, allow_nan=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_triton_agrees_with_torch(precision: str) -> None:
    config = EncoderConfig(layers=1, width=480, heads=20, feedforward=1920)
    rows = kernel_rows("35M", config, precision, torch.device("cuda"), tokens=4096)
    assert len(rows) == 6
    assert all(row["ok"] for row in rows), rows


def test_graphs_are_compared_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    monkeypatch.setattr(encoder_kernels, "_clock", lambda embedder, *given: ran.append(embedder._cuda_graphs) or 0.5)
    rows = graph_rows("tiny", TINY, CPU, precision="fp32", budgets=(64, 128), batches=10, pairs=3, longest=30)
    assert ran == [True, False] * 6
    assert [(row["budget_tokens"], row["engine"]) for row in rows] == [
        *((64, engine) for engine in ("graphs", "eager")),
        *((128, engine) for engine in ("graphs", "eager")),
    ]
    assert all(row["ok"] and row["graphs"] == 0 for row in rows)
    assert [row["ours_times_faster_median"] for row in rows] == [None, 1.0, None, 1.0]
    assert (
        gpu._summary(rows)
        == "tiny fp32: 64 tokens 1.00 times faster with graphs; 128 tokens 1.00 times faster with graphs"
    )
    json.dumps(rows, allow_nan=False)


def test_other_embeddings_with_graphs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Embedder.embed

    def embed(self: Embedder, *given: Any, **options: Any) -> Any:
        return real(self, *given, **options) * (1.01 if self._cuda_graphs else 1)

    monkeypatch.setattr(Embedder, "embed", embed)
    rows = graph_rows("tiny", TINY, CPU, precision="fp32", budgets=(64,), batches=2, pairs=3, longest=30)
    assert not any(row["ok"] for row in rows)
