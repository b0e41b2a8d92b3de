"""Engines beside each other on one model shape: first green, then each one's best budget, then interleaved pairs.

A machine that others use, or that slows down as it warms, makes rates drift by more than engines differ. So every peer
is timed in turns with ours (peer, ours, peer, ours, ...), and the ratio is taken within each turn: drift hits both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from protnest.benchmarks.ceiling import forward_flops, gemm_gflops, synchronise
from protnest.benchmarks.memory import PeakMemory
from protnest.benchmarks.parity import check_parity
from protnest.benchmarks.peers import Engine, Lineup, Protnest, Vectors, build_lineup
from protnest.benchmarks.proteins import first_tokens
from protnest.benchmarks.rows import Row
from protnest.engine.config import PUBLISHED, EncoderConfig
from protnest.engine.device import PRECISIONS

SHAPES: dict[str, EncoderConfig] = {name.split("_")[2]: config for name, config in PUBLISHED.items()}
"""The published architectures by their size alone: 8M, 35M, 150M, 650M, 3B, 15B."""

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
    """

    seconds: float
    residues: int
    flops: int
    error: float

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
    peers: Sequence[str] = field(default=("fair-esm", "transformers"))

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


class _Course:
    """The passes over one lineup; each one is timed, checked and told of."""

    def __init__(self, config: EncoderConfig, lineup: Lineup, plan: Plan, after_pass: AfterPass) -> None:
        self._config = config
        self._lineup = lineup
        self._plan = plan
        self._after_pass = after_pass
        self._expected_BD: Vectors = lineup.reference.embed(plan.sequences[: plan.checked], max(plan.budgets))

    def run(self, engine: Engine, sequences: Sequence[str], budget: int) -> Pass:
        """One timed pass.

        Raises:
            ParityError: the first rows are not the reference's.
        """
        synchronise(self._plan.device)
        begin = time.perf_counter()
        vectors_BD = engine.embed(sequences, budget)
        synchronise(self._plan.device)
        seconds = time.perf_counter() - begin
        expected_BD = self._expected_BD[: len(sequences)]
        error = check_parity(engine.name, engine.precision, expected_BD, vectors_BD)
        self._after_pass(f"{engine.name} {engine.precision}")
        flops = forward_flops(self._config, [len(sequence) + 2 for sequence in sequences])
        return Pass(seconds, sum(map(len, sequences)), flops, error)

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
        memory = PeakMemory(self._plan.device)
        self.run(engine, self._enough(budget), budget)
        return memory.growth_bytes()

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


def passes_planned(lineup: Lineup, plan: Plan) -> int:
    """How many passes `compare` makes at most."""
    checks = len({min(plan.budgets), max(plan.budgets)})
    each = len(lineup.engines) * (checks + len(plan.budgets) + 1)
    return each + plan.pairs * (sum(1 + len(lineup.rivals(peer)) for peer in lineup.peers) or len(lineup.ours))


def compare(
    shape: str,
    config: EncoderConfig,
    plan: Plan,
    *,
    begun: Callable[[int], AfterPass] = lambda passes: lambda engine: None,
) -> list[Row]:
    """Measures every engine that is installed on one model shape.

    Args:
        shape: what rows call the model.
        config: the architecture; weights are random.
        plan: what to run.
        begun: given the most passes that there will be, returns what is called with the engine's name after each.

    Returns:
        A row for each of our precisions, and one for each peer and precision of ours that it met.

    Raises:
        ParityError: an engine's embeddings are wrong; nothing after that was timed.
        RuntimeError: the engines' weights differ.
    """
    lineup = build_lineup(config, seed=plan.seed, precisions=plan.precisions, device=plan.device, peers=plan.peers)
    course = _Course(config, lineup, plan, begun(passes_planned(lineup, plan)))
    course.check_all()
    precisions = {engine.precision for engine in lineup.engines}
    before = _gemm_gflops(config, plan, precisions)
    rates: dict[Engine, dict[int, float]] = {engine: course.try_budgets(engine) for engine in lineup.engines}
    grown: dict[Engine, int | None] = {
        engine: course.watch_memory(engine, best(rates[engine])) for engine in lineup.engines
    }
    ours: dict[Protnest, list[Pass]] = {engine: [] for engine in lineup.ours}
    met: list[tuple[Engine, Protnest, list[Pass], list[Pass]]] = []
    for peer in lineup.peers:
        rivals = lineup.rivals(peer)
        theirs, *of_rivals = course.duel(peer, rivals, rates)
        for rival, passes in zip(rivals, of_rivals, strict=True):
            ours[rival] += passes
            met.append((peer, rival, theirs, passes))
    for engine, passes in ours.items():
        if not passes:
            passes += course.duel(engine, (), rates)[0]
    # Whatever shares the machine can only lower a ceiling: the higher of two measurements is nearer to it.
    gemm = {name: max(before[name], rate) for name, rate in _gemm_gflops(config, plan, precisions).items()}

    def describe(engine: Engine, passes: Sequence[Pass]) -> Row:
        about = _engine_row(engine, passes, rates[engine], gemm)
        return {"shape": shape, **about, "peak_growth_bytes": grown[engine]}

    rows = [describe(engine, passes) | _no_rival() for engine, passes in ours.items()]
    rows += [describe(peer, theirs) | _rival_row(rival, theirs, passes) for peer, rival, theirs, passes in met]
    return rows


def _gemm_gflops(config: EncoderConfig, plan: Plan, precisions: Collection[str]) -> dict[str, float]:
    return {
        name: gemm_gflops(config, PRECISIONS[name], plan.device, rows=plan.ceiling_rows)
        for name in sorted({*precisions, "fp32"})
    }


def _engine_row(engine: Engine, passes: Sequence[Pass], rates: dict[int, float], gemm: dict[str, float]) -> Row:
    # 16-bit numbers can always be widened and multiplied in fp32, which some CPUs do faster.
    ceiling = max(gemm[engine.precision], gemm["fp32"])
    rate = spread([done.residues_per_s for done in passes])
    gflops = statistics.median(done.gflops for done in passes)
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "budget_tokens": best(rates),
        "budgets_residues_per_s": {str(budget): round(value, 1) for budget, value in rates.items()},
        "passes": len(passes),
        "pass_residues": max(done.residues for done in passes),
        "residues_per_s_median": round(rate.median, 1),
        "residues_per_s_min": round(rate.low, 1),
        "residues_per_s_max": round(rate.high, 1),
        "gflops": round(gflops, 2),
        "gemm_gflops": round(gemm[engine.precision], 1),
        "ceiling_gflops": round(ceiling, 1),
        "percent_of_ceiling": round(100 * gflops / ceiling, 1),
        "parity_error": max(done.error for done in passes),
    }


def _rival_row(rival: Engine, theirs: Sequence[Pass], passes: Sequence[Pass]) -> Row:
    faster = spread([peer.seconds / own.seconds for peer, own in zip(theirs, passes, strict=True)])
    return {
        "ours_precision": rival.precision,
        "ours_times_faster_median": round(faster.median, 3),
        "ours_times_faster_min": round(faster.low, 3),
        "ours_times_faster_max": round(faster.high, 3),
    }


def _no_rival() -> Row:
    return dict.fromkeys(
        ("ours_precision", "ours_times_faster_median", "ours_times_faster_min", "ours_times_faster_max")
    )
