"""The distillation loss by several engines on one problem: first green, then peak memory, then interleaved pairs.

Every peer is timed in turns with ours, and the ratio is taken within each turn, as in `comparison`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from protnest.benchmarks.ceiling import product_gflops, synchronise
from protnest.benchmarks.comparison import Spread, spread
from protnest.benchmarks.kd_engines import PEERS, PUBLISHED, Engine, Result, build_duels, protnest
from protnest.benchmarks.kd_problems import BOTH, FORWARD, LOGITS, Data, Problem
from protnest.benchmarks.memory import PeakMemory
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.rows import Row
from protnest.kernels.kd_options import KDOptions

# The oracle at full size is `chunked`, whose memory is bounded; on so many rows it is itself compared with fp64.
_TWIN_ROWS = 12
# Fewest turns before a deadline may end a duel: a median of fewer says nothing.
_LEAST_PAIRS = 3
# A turn repeats a pass until the faster engine has run this long, so that clocks and launches do not count.
_LEAST_TURN_SECONDS = 0.1
# Rows of the matrix products that give the ceiling: of the size of a chunk, and of a batch.
_SMALL_VOCABULARY = 1024
_CEILING_ROWS = {"cpu": (128, 512), "cuda": (2048, 8192)}
_CEILING_ROWS_SMALL_VOCABULARY = (1024, 16384)

AfterStep = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class KDPlan:
    """How one problem is measured.

    Attributes:
        device: where.
        copy_gbytes_per_s: ceiling of copying memory there.
        pairs: turns of each peer with ours.
        directions: "forward", "forward+backward" or both.
        peers: see `kd_engines.PEERS`.
        ours: implementation of ours; by default the device's fastest.
        deadline: value of `time.perf_counter()` after which no pair begins beyond the third.
    """

    device: torch.device
    copy_gbytes_per_s: float
    pairs: int = 5
    directions: Sequence[str] = (FORWARD, BOTH)
    peers: tuple[str, ...] = PEERS
    ours: str | None = None
    deadline: float = float("inf")

    def __post_init__(self) -> None:
        if self.pairs < 1:
            message = f"pairs must be positive, got {self.pairs}"
            raise ValueError(message)


class Errors(NamedTuple):
    """Error of the loss, of its size; and the largest of a gradient, of its norm, None where there are none."""

    loss: float
    gradient: float | None


class Measured(NamedTuple):
    """What is known of an engine before it is timed; `failure` says why it could not run."""

    errors: Errors | None = None
    peak_bytes: int | None = None
    failure: str | None = None


def compare_kd(problem: Problem, plan: KDPlan, *, after_step: AfterStep = lambda what: None) -> list[Row]:
    """Measures ours and its peers.

    Args:
        problem: the loss and its sizes.
        plan: how.
        after_step: called with what was done.

    Returns:
        A row for each engine and direction; ours has one for each part of the loss that was compared.

    Raises:
        ParityError: a loss or a gradient is wrong; nothing of the problem was timed after that.
        RuntimeError: ours cannot run here.
    """
    # Else a cache of compiled code that is full makes torch give up compiling.
    torch.compiler.reset()
    duels = build_duels(problem, plan.device, ours=plan.ours, peers=plan.peers)
    check_twin(problem, plan.device, [ours for ours, _ in duels])
    after_step("fp64")
    data = Data.of_problem(problem, plan.device)
    courses = {
        (direction, ours): _Course(problem, data, direction, plan, after_step)
        for direction in _directions(problem, plan)
        for ours, _ in duels
    }
    rivals = dict(duels)
    known = {key: course.check((key[1], *rivals[key[1]])) for key, course in courses.items()}
    before = _gemm_gflops(problem, plan.device)
    rows: list[Row] = []
    for (direction, ours), course in courses.items():
        rows += course.rows(ours, rivals[ours], known[direction, ours])
    # Whatever shares the machine can only lower a ceiling: the higher of two measurements is nearer to it.
    gemm = before and max(before, _gemm_gflops(problem, plan.device) or 0.0)
    return [row | _share_of_ceiling(problem, row, plan.copy_gbytes_per_s, gemm) for row in rows]


def _gemm_gflops(problem: Problem, device: torch.device) -> float | None:
    """GFLOP/s of the heads' products, None where there are no heads."""
    if problem.operation == LOGITS:
        return None
    large = problem.vocabulary > _SMALL_VOCABULARY
    tried = _CEILING_ROWS[device.type] if large else _CEILING_ROWS_SMALL_VOCABULARY
    rows = sorted({min(problem.rows, count) for count in tried})
    return product_gflops(problem.product_shapes(), problem.dtype, device, rows=rows, repeats=2)


def _share_of_ceiling(problem: Problem, row: Row, copy: float, gemm: float | None) -> Row:
    """The rate at which useful work is done, and its share of what the machine can do."""
    if gemm is None:
        ceiling, work = copy, problem.moved_bytes(row["direction"]) / 1e9
    else:
        ceiling, work = gemm, problem.product_flops(row["direction"]) / 1e9
    rate = row["ms_median"] and 1e3 * work / row["ms_median"]
    return {
        "gbytes_per_s": rate and (round(rate, 2) if gemm is None else None),
        "gflops": rate and (None if gemm is None else round(rate, 2)),
        "gemm_gflops": gemm and round(gemm, 1),
        "percent_of_ceiling": rate and round(100 * rate / ceiling, 1),
    }


def _directions(problem: Problem, plan: KDPlan) -> Sequence[str]:
    # linear_kd_loss is for training: its forward pass alone is not what it is made for.
    return plan.directions if problem.operation == LOGITS else [BOTH]


def check_twin(problem: Problem, device: torch.device, engines: Sequence[Engine]) -> None:
    """Compares ours and the oracle with the fp64 reference on a few rows of the same kind.

    Raises:
        ParityError: a loss or a gradient is wrong.
    """
    twin = dataclasses.replace(problem, rows=min(problem.rows, _TWIN_ROWS))
    data = Data.of_problem(twin, device)
    for ours in engines:
        gold = protnest("reference", ours.options).run(data.to(device, torch.float64), BOTH)
        for engine in (ours, protnest("chunked", ours.options)):
            check_kd(engine, twin, gold, engine.run(data, BOTH))


def check_kd(engine: Engine, problem: Problem, gold: Result, got: Result) -> Errors:
    """The errors of a loss and of its gradients.

    Raises:
        ParityError: one is beyond what the engine is allowed, or not a number.
    """
    errors = measure_errors(gold, got)
    allowed = allowed_errors(engine, problem)
    for what, error, bound in zip(Errors._fields, errors, allowed, strict=True):
        if error is not None and not error <= bound:
            message = (
                f"{engine.name}: the {what} of {problem.name} is off by {error:.2e}, allowed {bound:.0e}; "
                "nothing is timed"
            )
            raise ParityError(message)
    return errors


def allowed_errors(engine: Engine, problem: Problem) -> tuple[float, float]:
    """Errors of loss and gradient that count as right."""
    loss, gradient = engine.allowed(problem.precision)
    if problem.operation != LOGITS and problem.precision != "fp32":
        # Logits are rounded before the loss sees them.
        loss = max(loss, gradient)
    return loss, gradient


def measure_errors(gold: Result, got: Result) -> Errors:
    """Errors of a loss and its gradients against what is right, in the dtype of that or in fp32."""
    loss_error = float((got[0] - gold[0]).abs() / gold[0].abs())
    gradient_errors = [_relative(own, right) for own, right in zip(got[1], gold[1], strict=True)]
    # max() of numbers of which one is NaN may be another.
    largest = float(torch.tensor(gradient_errors).max()) if gradient_errors else None
    return Errors(loss_error, largest)


def _relative(got: torch.Tensor, right: torch.Tensor) -> float:
    right = right.to(torch.promote_types(right.dtype, torch.float32))
    return float(torch.linalg.vector_norm(got.to(right.dtype) - right) / torch.linalg.vector_norm(right))


class _Course:
    """One problem in one direction: what is checked, watched and timed."""

    def __init__(self, problem: Problem, data: Data, direction: str, plan: KDPlan, after_step: AfterStep) -> None:
        self._problem = problem
        self._data = data
        self._direction = direction
        self._plan = plan
        self._after_step = after_step
        self._gold_losses: dict[KDOptions, torch.Tensor] = {}

    def _run(self, engine: Engine) -> Result:
        result = engine.run(self._data, self._direction)
        synchronise(self._plan.device)
        return result

    def check(self, engines: Sequence[Engine]) -> dict[Engine, Measured]:
        """Each engine's first pass, which also compiles, against the oracle; the first engine is ours."""
        options = engines[0].options
        gold = self._run(protnest("chunked", options))
        self._gold_losses[options] = gold[0]
        known: dict[Engine, Measured] = {}
        for engine in engines:
            try:
                known[engine] = Measured(check_kd(engine, self._problem, gold, self._run(engine)))
            except RuntimeError as error:
                # A peer that finds no memory or does not compile has a row that says so; ours has to run.
                if engine is engines[0]:
                    raise
                torch.cuda.empty_cache()
                known[engine] = Measured(failure=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            self._after_step(f"{engine.name} checked")
        return known

    def _watch(self, engine: Engine) -> int | None:
        """Bytes at a pass's peak beyond what was held before it."""
        memory = PeakMemory(self._plan.device)
        self._run(engine)
        peak = memory.growth_bytes()
        self._after_step(f"{engine.name} watched")
        return peak

    def _clock(self, engine: Engine, times: int = 1) -> float:
        """Seconds of a pass.

        Raises:
            ParityError: the last pass's loss is wrong.
        """
        synchronise(self._plan.device)
        begin = time.perf_counter()
        for _ in range(times):
            result = engine.run(self._data, self._direction)
        synchronise(self._plan.device)
        seconds = (time.perf_counter() - begin) / times
        check_kd(engine, self._problem, (self._gold_losses[engine.options], ()), (result[0], ()))
        self._after_step(f"{engine.name} timed")
        return seconds

    def _duel(self, ours: Engine, peer: Engine) -> list[tuple[float, float]]:
        """Seconds of a pass of the peer and of ours, turn by turn."""
        fastest = min(self._clock(peer), self._clock(ours))
        times = max(1, round(_LEAST_TURN_SECONDS / fastest))
        turns: list[tuple[float, float]] = []
        for turn in range(self._plan.pairs):
            if turn >= _LEAST_PAIRS and time.perf_counter() > self._plan.deadline:
                break
            turns.append((self._clock(peer, times), self._clock(ours, times)))
        return turns

    def rows(self, ours: Engine, peers: Sequence[Engine], known: dict[Engine, Measured]) -> list[Row]:
        """Watches memory, times, and says what was found."""
        able = [engine for engine in (ours, *peers) if known[engine].failure is None]
        for engine in able:
            known[engine] = known[engine]._replace(peak_bytes=self._watch(engine))
        turns = {peer: self._duel(ours, peer) for peer in able[1:]}
        own = [second for pairs in turns.values() for _, second in pairs]
        own = own or [self._clock(ours) for _ in range(self._plan.pairs)]
        rows = [self._row(ours, known[ours], own) | _no_rival()]
        for peer in peers:
            pairs = turns.get(peer, [])
            row = self._row(peer, known[peer], [first for first, _ in pairs])
            rows.append(row | _rival(ours, pairs, self._times_less_memory(known[ours], known[peer])))
        return rows

    def _row(self, engine: Engine, known: Measured, seconds: Sequence[float]) -> Row:
        problem, student_width, teacher_width = self._problem, *self._problem.widths
        lengths = problem.lengths()
        linear = problem.operation != LOGITS
        time_ms = spread([1e3 * value for value in seconds]) if seconds else None
        return {
            "operation": problem.operation,
            "vocabulary": problem.vocabulary,
            "rows": problem.rows,
            "segments": problem.segments,
            "segment_count": len(lengths),
            "longest_segment_rows": max(lengths),
            "student_width": student_width if linear else None,
            "teacher_width": teacher_width if linear else None,
            "precision": problem.precision,
            "direction": self._direction,
            "part": "whole" if engine.options == PUBLISHED else "kl",
            "engine": engine.name,
            "failure": known.failure,
            "passes": len(seconds),
            **_spread_row("ms", time_ms),
            "loss_error": known.errors and known.errors.loss,
            "gradient_error": known.errors and known.errors.gradient,
            "peak_extra_bytes": self._extra(known),
        }

    def _extra(self, known: Measured) -> int | None:
        """The peak without the gradients that a fused head has to give."""
        if known.peak_bytes is None or self._problem.operation == LOGITS:
            return known.peak_bytes
        return max(0, known.peak_bytes - self._data.gradient_bytes)

    def _times_less_memory(self, own: Measured, known: Measured) -> float | None:
        own_bytes, bytes_ = self._extra(own), self._extra(known)
        return round(bytes_ / own_bytes, 2) if own_bytes and bytes_ is not None else None


def _spread_row(name: str, values: Spread | None) -> Row:
    return {
        f"{name}_{kind}": None if values is None else round(value, 4)
        for kind, value in zip(("median", "min", "max"), values or (0.0, 0.0, 0.0), strict=True)
    }


def _rival(ours: Engine, pairs: Sequence[tuple[float, float]], times_less_memory: float | None) -> Row:
    faster = spread([theirs / mine for theirs, mine in pairs]) if pairs else None
    row = _spread_row("ours_times_faster", faster)
    return {"ours": ours.name, **row, "ours_times_less_memory": times_less_memory}


def _no_rival() -> Row:
    return {"ours": None, **_spread_row("ours_times_faster", None), "ours_times_less_memory": None}
