"""ceiling: operations counted as torch counts them, rates that are rates; memory and the machine's facts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from protnest.benchmarks.ceiling import copy_gbytes_per_s, forward_flops, gemm_gflops, precision_gflops
from protnest.benchmarks.memory import PeakMemory
from protnest.benchmarks.peers import random_encoder
from protnest.engine import encoder as encoder_file
from protnest.engine.config import EncoderConfig
from protnest.engine.packing import pack
from protnest.kernels.rotary_attention import rotary_attention
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
CONFIG = EncoderConfig(layers=3, width=24, heads=3, feedforward=60)


def test_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch counts matrix products; the reference's attention is written in them.
    monkeypatch.setattr(encoder_file, "rotary_attention", partial(rotary_attention, impl="reference"))
    sequences = ["MKTAYIAKQR", "M", "GSHMLEDPWVNCFY"]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        random_encoder(CONFIG, seed=0)(pack(sequences))
    assert forward_flops(CONFIG, [len(sequence) + 2 for sequence in sequences]) == counter.get_total_flops()


def test_rates_are_positive_and_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert 0 < gemm_gflops(CONFIG, dtype, CPU, rows=(16, 32), repeats=1) < 1e6
    for precision in ("fp32", "int8"):
        assert 0 < precision_gflops(CONFIG, precision, CPU, rows=(16, 32), repeats=1) < 1e6
    assert 0 < copy_gbytes_per_s(CPU, size_bytes=1 << 20, repeats=1) < 1e5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_sees_what_was_freed_again() -> None:
    memory = PeakMemory(CPU)
    size_bytes = 1 << 27
    kept = torch.ones(size_bytes // 4)
    del kept
    grown = memory.growth_bytes()
    assert grown is not None
    assert 0.9 * size_bytes < grown < 1.5 * size_bytes


def test_peak_memory_is_none_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("protnest.benchmarks.memory._RESET", tmp_path / "missing" / "clear_refs")
    assert PeakMemory(CPU).growth_bytes() is None
