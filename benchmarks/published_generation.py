"""How fast ProtGPT2 and its students generate as published, and what the published figures amount to.

Wijaya 2026 (bioRxiv 10.64898/2026.02.17.706304), `results/throughput_benchmark.json` of its repository: an NVIDIA L40S,
transformers' text-generation pipeline, one sequence a call, fp32, at most 200 tokens, top-k 950, repetition penalty
1.2, 100 calls after 5 to warm up. Sequences might end early, tokens were not counted, and memory is the peak of torch's
allocator, weights included.
"""

from __future__ import annotations

from dataclasses import dataclass

from protnest.benchmarks.rows import Row

MAX_TOKENS = 200
"""Length of each sequence, `<|endoftext|>` counted."""
TEACHER = "protgpt2"
SEQUENCES_CLAIMED = 1_000_000
BATCHED_TEACHER = (50, 12.95)
"""Of the same repository, `results/plddt_benchmark.json`: sequences of the teacher in one batch, and seconds of that,
loading included."""


@dataclass(frozen=True, kw_only=True)
class PublishedRate:
    """One model's published figures.

    Attributes:
        shape: its name in `DECODER_SHAPES`.
        parameters: counted.
        seconds_per_sequence, deviation_seconds: mean and standard deviation.
        sequences_per_minute, residues_per_s: as printed.
        residues: mean length.
        times_faster_per_sequence, times_faster_per_residue: than the teacher, as printed.
        peak_mib, weights_mib: of torch's allocator at its peak, and of the weights in fp32.
        claimed_hours: what a million sequences are said to take; None where nothing is said.
    """

    shape: str
    parameters: int
    seconds_per_sequence: float
    deviation_seconds: float
    sequences_per_minute: float
    residues: int
    residues_per_s: float
    times_faster_per_sequence: float
    times_faster_per_residue: float
    peak_mib: float
    weights_mib: float
    claimed_hours: float | None = None


def _rate(shape: str, parameters: int, figures: tuple[float, ...], hours: float | None = None) -> PublishedRate:
    seconds, deviation, per_minute, residues, rate, faster, faster_residues, peak, weights = figures
    return PublishedRate(
        shape=shape,
        parameters=parameters,
        seconds_per_sequence=seconds,
        deviation_seconds=deviation,
        sequences_per_minute=per_minute,
        residues=int(residues),
        residues_per_s=rate,
        times_faster_per_sequence=faster,
        times_faster_per_residue=faster_residues,
        peak_mib=peak,
        weights_mib=weights,
        claimed_hours=hours,
    )


PUBLISHED_RATES: tuple[PublishedRate, ...] = (
    _rate("protgpt2", 774_030_080, (2.872, 1.270, 20.9, 362, 126, 1.0, 1.0, 3210.7, 2953), 48),
    _rate("medium", 203_668_480, (1.188, 0.470, 50.5, 386, 325, 2.42, 2.58, 835.9, 777)),
    _rate("small", 81_912_576, (0.696, 0.249, 86.2, 400, 575, 4.13, 4.56, 343.3, 312)),
    _rate("tiny", 38_866_432, (0.541, 0.182, 110.9, 424, 783, 5.31, 6.21, 169.8, 148), 6),
)
"""The teacher, then its students; the smallest, of 16M, was not timed."""


def hours_for(sequences: int, per_minute: float) -> float:
    """Hours that so many sequences take at a rate."""
    return sequences / per_minute / 60


def published_rows() -> list[Row]:
    """Part "published": the figures as printed, and beside them the same recomputed from seconds and mean length.

    `hours_per_million` is what a million sequences take at the printed rate; of the teacher `batched_per_minute` is
    what the same repository reached with it in one batch, loading included.
    """
    teacher = PUBLISHED_RATES[0]
    rows: list[Row] = []
    for each in PUBLISHED_RATES:
        rate = each.residues / each.seconds_per_sequence
        batched, seconds = BATCHED_TEACHER
        rows.append(
            {
                "part": "published",
                "shape": each.shape,
                "parameters": each.parameters,
                "engine": "transformers pipeline, L40S",
                "precision": "fp32",
                "batch": 1,
                "seconds_per_sequence": each.seconds_per_sequence,
                "sequences_per_minute": each.sequences_per_minute,
                "residues_per_s": each.residues_per_s,
                "times_faster_per_sequence": each.times_faster_per_sequence,
                "times_faster_per_residue": each.times_faster_per_residue,
                "peak_mib": each.peak_mib,
                "weights_mib": each.weights_mib,
                "recomputed_sequences_per_minute": 60 / each.seconds_per_sequence,
                "recomputed_residues_per_s": rate,
                "recomputed_per_sequence": teacher.seconds_per_sequence / each.seconds_per_sequence,
                "recomputed_per_residue": rate * teacher.seconds_per_sequence / teacher.residues,
                "claimed_hours_per_million": each.claimed_hours,
                "hours_per_million": hours_for(SEQUENCES_CLAIMED, each.sequences_per_minute),
                "batched_per_minute": 60 * batched / seconds if each is teacher else None,
            }
        )
    return rows
