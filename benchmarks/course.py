"""The passes over one lineup: each one timed, checked against the reference, and told of.

`comparison` says which passes there are, and in which order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from protnest.benchmarks.ceiling import forward_flops, synchronise
from protnest.benchmarks.esm_cpp import ESM_CPP, Answer, EsmCpp
from protnest.benchmarks.memory import PeakMemory
from protnest.benchmarks.parity import check_parity
from protnest.benchmarks.peers import FAIR_ESM, TRANSFORMERS, Engine, Lineup, Vectors
from protnest.benchmarks.proteins import first_tokens
from protnest.engine.config import EncoderConfig

# Fewest turns before a deadline may end a duel: a median of fewer says nothing.
_LEAST_PAIRS = 3
# A budget is tried on twice its tokens at least, so that there are full batches to run.
_BATCHES_TO_TRY = 2

AfterPass = Callable[[str], None]


class Spread(NamedTuple):
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError where there are no values."""
    return Spread(statistics.median(values), min(values), max(values))


class Pass(NamedTuple):
    """One engine's run over some sequences.

    Attributes:
        seconds: wall time, tokenising and pooling included.
        residues: run, without special tokens.
        flops: that the sequences need without padding.
        error: largest error of a protein, see `parity`.
        kind: what came out, "embeddings" or "logits".
        growth_bytes: memory at the peak beyond what was held before, where it was watched and the system tells.
    """

    seconds: float
    residues: int
    flops: int
    error: float
    kind: str = "embeddings"
    growth_bytes: int | None = None

    @property
    def residues_per_s(self) -> float:
        return self.residues / self.seconds

    @property
    def gflops(self) -> float:
        """GFLOP/s of useful work."""
        return self.flops / self.seconds / 1e9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one shape is measured.

    Attributes:
        sequences: what is embedded, in random order.
        budgets: tokens a batch to choose among; 1 runs one sequence at a time.
        precisions: of ours, and of peers that have them.
        pairs: turns of each peer with ours.
        checked: how many of the first sequences are compared with the reference, in every pass.
        device: where.
        ceiling_rows: row counts M at which the matrix-product ceiling is looked for.
        most_pass_seconds: a duel takes as many of the first sequences as the slower engine does in about this time.
        deadline: value of `time.perf_counter()` after which no budget is tried and no pair begins beyond the third.
        seed: of the weights.
        peers: which packages to compare with; those that are not installed are left out.
        esm_cpp_python: of the environment that has esm-cpp; None leaves it out.
    """

    sequences: Sequence[str]
    budgets: Sequence[int]
    precisions: Sequence[str]
    pairs: int
    checked: int
    device: torch.device
    ceiling_rows: Sequence[int]
    most_pass_seconds: float = float("inf")
    deadline: float = float("inf")
    seed: int = 0
    peers: Sequence[str] = field(default=(FAIR_ESM, TRANSFORMERS, ESM_CPP))
    esm_cpp_python: Path | None = None

    def __post_init__(self) -> None:
        for name in ("sequences", "budgets", "precisions"):
            if not getattr(self, name):
                message = f"{name} must not be empty"
                raise ValueError(message)
        for name in ("pairs", "checked"):
            if getattr(self, name) < 1:
                message = f"{name} must be positive, got {getattr(self, name)}"
                raise ValueError(message)

    def is_late(self) -> bool:
        return time.perf_counter() > self.deadline


class Course:
    """The passes over one lineup; each one is timed, checked and told of."""

    def __init__(self, config: EncoderConfig, lineup: Lineup, plan: Plan, after_pass: AfterPass) -> None:
        self._config = config
        self._lineup = lineup
        self._plan = plan
        self._after_pass = after_pass
        checked = plan.sequences[: plan.checked]
        self._expected: dict[str, Vectors] = {"embeddings": lineup.reference.embed(checked, max(plan.budgets))}
        if lineup.logits_reference is not None:
            self._expected["logits"] = lineup.logits_reference.embed(checked, max(plan.budgets))

    def _answer(self, engine: Engine, sequences: Sequence[str], budget: int, *, watch: bool) -> Answer:
        if isinstance(engine, EsmCpp):
            return engine.answer(sequences, budget, watch=watch)
        memory = PeakMemory(self._plan.device) if watch else None
        synchronise(self._plan.device)
        begin = time.perf_counter()
        vectors_BD = engine.embed(sequences, budget)
        synchronise(self._plan.device)
        seconds = time.perf_counter() - begin
        return Answer(vectors_BD, seconds, growth_bytes=memory.growth_bytes() if memory else None)

    def run(self, engine: Engine, sequences: Sequence[str], budget: int, *, watch: bool = False) -> Pass:
        """One timed pass; with `watch` its memory is watched, which costs time.

        Raises:
            ParityError: the first rows are not the reference's.
        """
        answer = self._answer(engine, sequences, budget, watch=watch)
        expected = self._expected[answer.kind][: len(sequences)]
        error = check_parity(engine.name, engine.precision, expected, answer.vectors_BD)
        self._after_pass(f"{engine.name} {engine.precision}")
        flops = forward_flops(self._config, [len(sequence) + 2 for sequence in sequences])
        return Pass(answer.seconds, sum(map(len, sequences)), flops, error, answer.kind, answer.growth_bytes)

    def check_all(self) -> None:
        """Every engine against the reference, alone and in batches, before anything is timed; it warms them up, too."""
        for engine in self._lineup.engines:
            for budget in sorted({min(self._plan.budgets), max(self._plan.budgets)}):
                self.run(engine, self._plan.sequences[: self._plan.checked], budget)

    def _enough(self, budget: int) -> Sequence[str]:
        """The first sequences, enough for full batches and for the check."""
        least = self._plan.sequences[: self._plan.checked]
        return max(least, first_tokens(self._plan.sequences, _BATCHES_TO_TRY * budget), key=len)

    def try_budgets(self, engine: Engine) -> dict[int, float]:
        """Residues/s at each budget, one pass each; budgets that do not fit into memory or time are left out."""
        rates: dict[int, float] = {}
        for budget in self._plan.budgets:
            if rates and self._plan.is_late():
                break
            try:
                done = self.run(engine, self._enough(budget), budget)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            rates[budget] = done.residues_per_s
        if not rates:
            message = f"{engine.name} {engine.precision}: none of the budgets {list(self._plan.budgets)} fits in memory"
            raise MemoryError(message)
        return rates

    def watch_memory(self, engine: Engine, budget: int) -> int | None:
        """Bytes at a pass's peak beyond what was held before it; watching costs time, so this is a pass of its own."""
        return self.run(engine, self._enough(budget), budget, watch=True).growth_bytes

    def duel(self, peer: Engine, rivals: Sequence[Engine], rates: dict[Engine, dict[int, float]]) -> list[list[Pass]]:
        """Passes of the peer and of each rival, each at its best budget; one of each in every turn."""
        sequences = list(self._plan.sequences)
        if self._plan.most_pass_seconds < float("inf"):
            slowest = min(max(rates[engine].values()) for engine in (peer, *rivals))
            sequences = first_tokens(sequences, max(1, round(slowest * self._plan.most_pass_seconds)))
        turns: list[list[Pass]] = []
        for turn in range(self._plan.pairs):
            if turn >= _LEAST_PAIRS and self._plan.is_late():
                break
            turns.append([self.run(engine, sequences, best(rates[engine])) for engine in (peer, *rivals)])
        return [list(passes) for passes in zip(*turns, strict=True)]


def best(rates: dict[int, float]) -> int:
    """The budget with the highest rate."""
    return max(rates, key=lambda budget: rates[budget])
