"""Engines beside each other on one model shape: first green, then each one's best budget, then interleaved pairs.

A machine that others use, or that slows down as it warms, makes rates drift by more than engines differ. So every peer
is timed in turns with ours (peer, ours, peer, ours, ...), and the ratio is taken within each turn: drift hits both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from protnest.benchmarks.ceiling import precision_gflops
from protnest.benchmarks.course import AfterPass, Course, Pass, Plan, Spread, best, spread
from protnest.benchmarks.peers import FAIR_ESM, Engine, Lineup, Protnest, build_lineup
from protnest.benchmarks.rows import Row
from protnest.engine.config import PUBLISHED, EncoderConfig

__all__ = ["SHAPES", "Comparison", "Plan", "Spread", "compare", "contest", "spread"]

SHAPES: dict[str, EncoderConfig] = {name.split("_")[2]: config for name, config in PUBLISHED.items()}
"""The published architectures by their size alone: 8M, 35M, 150M, 650M, 3B, 15B."""

# Budgets are tried in one pass each, and single passes on a busy machine were seen 25 % apart: a peer within this share
# of the fastest one may be the fastest.
_CONTENDERS = 0.75
FASTEST = "fastest peer"


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Passes of a peer and, in the same turns, of each of ours that it met."""

    peer: Engine
    theirs: list[Pass]
    ours: dict[Protnest, list[Pass]]

    def faster(self, own: Protnest) -> Spread:
        """The peer's seconds over ours, turn by turn."""
        return spread([peer.seconds / mine.seconds for peer, mine in zip(self.theirs, self.ours[own], strict=True)])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out for one shape.

    Attributes:
        rows: one for each of our precisions, and one for each peer and precision of ours that it met.
        verdict: what decides, see `verdict`; None where there are no peers.
    """

    rows: list[Row]
    verdict: Row | None


def passes_planned(lineup: Lineup, plan: Plan) -> int:
    """How many passes `compare` makes at most."""
    checks = len({min(plan.budgets), max(plan.budgets)})
    each = len(lineup.engines) * (checks + len(plan.budgets) + 1)
    return each + plan.pairs * (len(lineup.peers) * (1 + len(lineup.ours)) or len(lineup.ours))


def compare(
    shape: str,
    config: EncoderConfig,
    plan: Plan,
    *,
    begun: Callable[[int], AfterPass] = lambda passes: lambda engine: None,
) -> list[Row]:
    """The rows of `contest`, without its verdict."""
    return contest(shape, config, plan, begun=begun).rows


def contest(
    shape: str,
    config: EncoderConfig,
    plan: Plan,
    *,
    begun: Callable[[int], AfterPass] = lambda passes: lambda engine: None,
) -> Comparison:
    """Measures every engine that is installed on one model shape.

    A peer takes turns with ours in the precisions that `Lineup.rivals` names; the fastest peers with all of ours.

    Args:
        shape: what rows call the model.
        config: the architecture; weights are random.
        plan: what to run.
        begun: given the most passes that there will be, returns what is called with the engine's name after each.

    Raises:
        ParityError: an engine's embeddings are wrong; nothing after that was timed.
        RuntimeError: the engines' weights differ.
    """
    lineup = build_lineup(
        config,
        seed=plan.seed,
        precisions=plan.precisions,
        device=plan.device,
        peers=plan.peers,
        esm_cpp_python=plan.esm_cpp_python,
    )
    try:
        course = Course(config, lineup, plan, begun(passes_planned(lineup, plan)))
        return _contest(shape, config, plan, lineup, course)
    finally:
        lineup.close()


def _contest(shape: str, config: EncoderConfig, plan: Plan, lineup: Lineup, course: Course) -> Comparison:
    course.check_all()
    precisions = {engine.precision for engine in lineup.engines}
    before = _gemm_gflops(config, plan, precisions)
    rates: dict[Engine, dict[int, float]] = {engine: course.try_budgets(engine) for engine in lineup.engines}
    grown: dict[Engine, int | None] = {
        engine: course.watch_memory(engine, best(rates[engine])) for engine in lineup.engines
    }
    duels = list(_duels(lineup, course, rates))
    own_passes: dict[Protnest, list[Pass]] = {own: [] for own in lineup.ours}
    for duel in duels:
        for own, passes in duel.ours.items():
            own_passes[own] += passes
    for own, passes in own_passes.items():
        if not passes:
            passes += course.duel(own, (), rates)[0]
    # Whatever shares the machine can only lower a ceiling: the higher of two measurements is nearer to it.
    gemm = {name: max(before[name], rate) for name, rate in _gemm_gflops(config, plan, precisions).items()}

    def describe(engine: Engine, passes: Sequence[Pass]) -> Row:
        about = _engine_row(engine, passes, rates[engine], gemm)
        return {"shape": shape, **about, "peak_growth_bytes": grown[engine]}

    rows = [describe(own, passes) | _no_rival() for own, passes in own_passes.items()]
    for duel in duels:
        rows += [describe(duel.peer, duel.theirs) | _rival_row(duel, own) for own in duel.ours]
    return Comparison(rows=rows, verdict={"shape": shape, **verdict(duels, rates)} if duels else None)


def _duels(lineup: Lineup, course: Course, rates: dict[Engine, dict[int, float]]) -> Iterator[Duel]:
    """One duel of each peer; of those that seem the fastest, with all of ours in every turn."""
    fastest = max((max(rates[peer].values()) for peer in lineup.peers), default=0.0)
    for peer in lineup.peers:
        contends = max(rates[peer].values()) >= _CONTENDERS * fastest
        rivals = lineup.ours if contends else lineup.rivals(peer)
        theirs, *passes = course.duel(peer, rivals, rates)
        yield Duel(peer=peer, theirs=theirs, ours=dict(zip(rivals, passes, strict=True)))


def verdict(duels: Sequence[Duel], rates: dict[Engine, dict[int, float]]) -> Row:
    """How many times faster each of ours is than the fastest peer of any precision, and than fair-esm.

    Against each of ours the fastest peer is the one with the smallest ratio, among all that met it.
    """
    ratios: Row = {}
    for title, met in ((FASTEST, duels), (FAIR_ESM, [duel for duel in duels if duel.peer.name == FAIR_ESM])):
        for own in dict.fromkeys(own for duel in met for own in duel.ours):
            duel = min((each for each in met if own in each.ours), key=lambda each: each.faster(own).median)
            faster = duel.faster(own)
            ratios[f"ours {own.precision} / {title}"] = {
                "median": round(faster.median, 3),
                "min": round(faster.low, 3),
                "max": round(faster.high, 3),
                "pairs": len(duel.theirs),
                "peer": f"{duel.peer.name} {duel.peer.precision}",
                "peer_budget_tokens": best(rates[duel.peer]),
                "ours_budget_tokens": best(rates[own]),
            }
    return {"ratios": ratios}


def _gemm_gflops(config: EncoderConfig, plan: Plan, precisions: Collection[str]) -> dict[str, float]:
    return {
        name: precision_gflops(config, name, plan.device, rows=plan.ceiling_rows)
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
        "gives": passes[0].kind,
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


def _rival_row(duel: Duel, own: Protnest) -> Row:
    faster = duel.faster(own)
    return {
        "ours_precision": own.precision,
        "ours_times_faster_median": round(faster.median, 3),
        "ours_times_faster_min": round(faster.low, 3),
        "ours_times_faster_max": round(faster.high, 3),
    }


def _no_rival() -> Row:
    return dict.fromkeys(
        ("ours_precision", "ours_times_faster_median", "ours_times_faster_min", "ours_times_faster_max")
    )
