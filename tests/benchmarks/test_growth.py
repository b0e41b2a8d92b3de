"""growth: the points that are promised, engines in turns, and a batch that holds all of a point's proteins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from protnest.benchmarks import growth
from protnest.benchmarks.ceiling import forward_flops
from protnest.benchmarks.esm_cpp import find_python
from protnest.benchmarks.growth import BATCHES, LENGTHS, grow, points
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.peers import Lineup, build_lineup
from protnest.engine.config import EncoderConfig

CONFIG = EncoderConfig(layers=1, width=8, heads=2, feedforward=32)


class StandIn:
    """Takes a millisecond a residue on a clock of its own."""

    precision = "fp32"
    says = 1.0

    def __init__(self, name: str, clock: list[float], diary: list[str]) -> None:
        self.name = name
        self._clock, self._diary = clock, diary

    def embed(self, sequences: Sequence[str], budget: int) -> np.ndarray:
        self._diary.append(f"{self.name} {len(sequences)}x{len(sequences[0])} at {budget}")
        self._clock[0] += 0.001 * sum(map(len, sequences))
        return np.full((len(sequences), 1), self.says, dtype=np.float32)


def test_points_are_lengths_and_batches() -> None:
    assert list(points()) == [
        *(("length", length, 1) for length in (64, 128, 256, 512, 1022)),
        *(("batch", 256, count) for count in (1, 2, 4, 8, 16)),
    ]
    assert (LENGTHS[-1], BATCHES[-1]) == (1022, 16)


def test_engines_take_turns_on_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, diary = [0.0], []  # type: tuple[list[float], list[str]]
    monkeypatch.setattr(growth.time, "perf_counter", lambda: clock[0])
    one, two = StandIn("one", clock, diary), StandIn("two", clock, diary)
    reference = StandIn("reference", [0.0], [])
    lineup = Lineup(ours=[one], peers=[two], reference=reference, default_precision="fp32")  # type: ignore[list-item]
    rows = grow("tiny", CONFIG, lineup, torch.device("cpu"), turns=2, lengths=(10,), batches=(3,))
    assert diary == [*["one 1x10 at 1", "two 1x10 at 1"] * 3, *["one 3x256 at 774", "two 3x256 at 774"] * 3]
    assert [(row["engine"], row["axis"], row["residues_each"], row["batch_sequences"]) for row in rows] == [
        *(("one", "length", 10, 1), ("two", "length", 10, 1), ("one", "batch", 256, 3), ("two", "batch", 256, 3)),
    ]
    last = rows[-1]
    assert (last["ms_median"], last["residues_per_s_median"], last["passes"]) == (768.0, 1000.0, 2)
    assert last["gflops"] == round(forward_flops(CONFIG, [258] * 3) / 0.768 / 1e9, 2)


def test_a_wrong_answer_is_not_timed() -> None:
    diary: list[str] = []
    one, two = StandIn("one", [0.0], diary), StandIn("two", [0.0], diary)
    two.says = 1.1
    lineup = Lineup(ours=[one], peers=[two], reference=one, default_precision="fp32")  # type: ignore[list-item]
    with pytest.raises(ParityError, match="two fp32"):
        grow("tiny", CONFIG, lineup, torch.device("cpu"), turns=2, lengths=(10,), batches=())
    assert sum(line.startswith("two") for line in diary) == 1


@pytest.mark.skipif(find_python() is None, reason="esm-cpp is in no environment of its own, see benchmarks/README.md")
def test_esm_cpp_takes_part() -> None:
    config = EncoderConfig(layers=1, width=32, heads=2, feedforward=64)
    lineup = build_lineup(
        config,
        seed=0,
        precisions=["fp32"],
        device=torch.device("cpu"),
        peers=["esm-cpp"],
        esm_cpp_python=find_python(),
    )
    try:
        rows = grow("tiny", config, lineup, torch.device("cpu"), turns=1, lengths=(64,), batches=(2,))
    finally:
        lineup.close()
    assert [f"{row['engine']} {row['precision']}" for row in rows] == [
        "protnest fp32",
        "esm-cpp fp32",
        "esm-cpp int8",
    ] * 2
