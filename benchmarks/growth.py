"""How time grows: with one protein's length, with the proteins in a batch, and with the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
from protnest.benchmarks.ceiling import forward_flops, synchronise
from protnest.benchmarks.course import spread
from protnest.benchmarks.esm_cpp import Answer, EsmCpp
from protnest.benchmarks.parity import check_parity
from protnest.benchmarks.peers import Engine, Lineup
from protnest.benchmarks.rows import Row
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.engine.config import EncoderConfig
from torch import device as Device

LENGTHS = (64, 128, 256, 512, 1022)
BATCHES = (1, 2, 4, 8, 16)
BATCH_RESIDUES = 256


def points(lengths: Sequence[int] = LENGTHS, batches: Sequence[int] = BATCHES) -> Iterator[tuple[str, int, int]]:
    """Axis, residues and sequences of every point."""
    for length in lengths:
        yield "length", length, 1
    for count in batches:
        yield "batch", BATCH_RESIDUES, count


def _answer(engine: Engine, sequences: Sequence[str], budget: int, device: Device) -> Answer:
    if isinstance(engine, EsmCpp):
        return engine.answer(sequences, budget)
    synchronise(device)
    begin = time.perf_counter()
    vectors_BD = engine.embed(sequences, budget)
    synchronise(device)
    return Answer(vectors_BD, time.perf_counter() - begin)


def _check(lineup: Lineup, sequences: Sequence[str], budget: int, device: Device) -> None:
    """One pass of each engine, which warms it up, against the reference."""
    for engine in lineup.engines:
        answer = _answer(engine, sequences, budget, device)
        reference = lineup.reference if answer.kind == "embeddings" else lineup.logits_reference
        assert reference is not None  # whoever gives logits comes with their reference
        check_parity(engine.name, engine.precision, reference.embed(sequences, budget), answer.vectors_BD)


def grow(
    shape: str,
    config: EncoderConfig,
    lineup: Lineup,
    device: Device,
    *,
    turns: int,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    seed: int = 0,
) -> list[Row]:
    """A row for each point and engine; engines take turns, after one pass each that is held to the reference.

    A point's proteins run as one batch, whatever engine; esm-cpp as one sequence at a time where there is only one.

    Raises:
        ParityError: an engine's answer is wrong.
    """
    generator = np.random.default_rng(seed)
    letters = np.frombuffer(AMINO_ACIDS.encode("ascii"), dtype=np.uint8)
    rows: list[Row] = []
    engines: list[Engine] = [*lineup.engines]
    for axis, residues, count in points(lengths, batches):
        sequences = [generator.choice(letters, residues).tobytes().decode("ascii") for _ in range(count)]
        budget = 1 if count == 1 else count * (residues + 2)
        _check(lineup, sequences, budget, device)
        taken: dict[Engine, list[float]] = {engine: [] for engine in engines}
        for _ in range(turns):
            for engine in engines:
                taken[engine].append(_answer(engine, sequences, budget, device).seconds)
        flops = forward_flops(config, [residues + 2] * count)
        for engine, seconds in taken.items():
            middle = spread(seconds)
            rows.append(
                {
                    "shape": shape,
                    "engine": engine.name,
                    "precision": engine.precision,
                    "axis": axis,
                    "residues_each": residues,
                    "batch_sequences": count,
                    "passes": turns,
                    "ms_median": round(1e3 * middle.median, 3),
                    "ms_min": round(1e3 * middle.low, 3),
                    "ms_max": round(1e3 * middle.high, 3),
                    "residues_per_s_median": round(count * residues / middle.median, 1),
                    "gflops": round(flops / middle.median / 1e9, 2),
                }
            )
    return rows
