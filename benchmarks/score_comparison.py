"""Variant scoring beside fair-esm's loop: first green, then its best form, then interleaved pairs, then what gained it.

In each turn fair-esm's loop and ours in every precision run over the same residues of one protein, spread over it, and
ratios are taken within the turn. Masked tokens cost the same wherever they are, so that a part of them tells the rate;
the whole protein is run once, apart.

What is allowed: in fp32 scores within 1e-4 of fair-esm's. In other precisions a difference of three to five times what
right ones were seen at over a whole protein with a real 8M checkpoint, whose scores spread by 2.2 (bf16 0.1, int8 0.6),
and nearly its order (seen at 0.9999 and 0.998): scores without a mask rank at 0.92.

Shapes: L residues of the protein, N variants.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from protnest.benchmarks.ceiling import synchronise
from protnest.benchmarks.course import Spread, spread
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.peers import FAIR_ESM, PROTNEST, Vectors, at_precision
from protnest.benchmarks.rows import Row
from protnest.benchmarks.score_engines import FairEsmLoop, Problem, spread_over, whole_last_layer
from protnest.engine import Encoder, score_variants
from protnest.engine.ranking import spearman
from protnest.engine.variants import Variant, parse_variant, read_scan, read_wild_type

ALLOWED = {"fp32": 1e-4, "fp16": 0.1, "bf16": 0.5, "int8": 2.0}
"""Largest difference of a score from fair-esm's in fp32, in nats."""
LEAST_SPEARMAN = {"fp32": 0.999, "fp16": 0.999, "bf16": 0.995, "int8": 0.98}
"""Least rank correlation with fair-esm's scores in fp32."""
GAINS = ("touched positions alone", "last layer for masked rows alone", "packed batches")

# Tokens on which forms of fair-esm's loop are tried, at least; and its bf16.
_TRIED_TOKENS = 16
_BF16_TOKENS = 8
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """How variant scoring is measured.

    Attributes:
        precisions: of ours.
        pairs: turns of fair-esm's loop with ours, and of ours with itself without a gain.
        positions: residues that each of them runs, spread over those that variants touch.
        copies: of the protein in a batch, among which fair-esm's loop has its choice.
        tries: passes of each of these forms; the fastest counts.
        whole: also run the whole protein once.
        device: where.
    """

    precisions: Sequence[str] = ("fp32", "bf16", "int8")
    pairs: int = 5
    positions: int = 48
    copies: Sequence[int] = (1, 4, 16)
    tries: int = 2
    whole: bool = True
    device: torch.device = _CPU

    def __post_init__(self) -> None:
        for name in ("precisions", "copies"):
            if not getattr(self, name):
                message = f"{name} must not be empty"
                raise ValueError(message)
        for name in ("pairs", "positions", "tries"):
            if getattr(self, name) < 1:
                message = f"{name} must be positive, got {getattr(self, name)}"
                raise ValueError(message)

    def quick(self) -> ScorePlan:
        """The same with at most 16 positions and 3 pairs, and without the whole protein."""
        return replace(self, pairs=min(self.pairs, 3), positions=min(self.positions, 16), tries=1, whole=False)


class Agreement(NamedTuple):
    """Scores beside fair-esm's in fp32: largest difference in nats, and rank correlation."""

    difference: float
    spearman: float


class Run(NamedTuple):
    """One timed pass: on the clock on the wall, in CPU time of the process, and the scores that came out."""

    seconds: float
    cpu_seconds: float
    scores_N: Vectors


def check_scores(precision: str, expected_N: Vectors, got_N: Vectors) -> Agreement:
    """Compares scores with fair-esm's in fp32.

    Raises:
        ParityError: they differ by more than is allowed, or are not numbers.
    """
    if got_N.shape != expected_N.shape:
        message = f"ours {precision}: scores of shape {got_N.shape}, expected {expected_N.shape}; nothing is timed"
        raise ParityError(message)
    found = _agreement(expected_N, got_N)
    if not (found.difference <= ALLOWED[precision] and found.spearman >= LEAST_SPEARMAN[precision]):
        message = (
            f"ours {precision}: scores differ from fair-esm's by up to {found.difference:.2g} (allowed "
            f"{ALLOWED[precision]:g}), rank correlation {found.spearman:.4f} (at least {LEAST_SPEARMAN[precision]:g}); "
            "nothing is timed"
        )
        raise ParityError(message)
    return found


def _agreement(expected_N: Vectors, got_N: Vectors) -> Agreement:
    got, expected = got_N.astype(np.float64), expected_N.astype(np.float64)
    return Agreement(float(np.abs(got - expected).max()), spearman(got, expected))


def timed(device: torch.device, work: Callable[[], Vectors]) -> Run:
    """One pass, the device's work included."""
    synchronise(device)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    scores_N = work()
    synchronise(device)
    return Run(time.perf_counter() - begin, time.process_time() - cpu_begin, scores_N)


def take_turns(
    device: torch.device,
    works: Mapping[str, Callable[[], Vectors]],
    turns: int,
    check: Callable[[str, Vectors], object],
) -> dict[str, list[Run]]:
    """Runs all works once in each turn, in their order; `check` is given each name and its scores."""
    runs: dict[str, list[Run]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            runs[name].append(timed(device, work))
            check(name, runs[name][-1].scores_N)
    return runs


def times_faster(slow: Sequence[Run], fast: Sequence[Run], *, cpu: bool = False) -> Spread:
    """Seconds of one over those of the other, turn by turn."""
    pairs = zip(slow, fast, strict=True)
    return spread([a.cpu_seconds / b.cpu_seconds if cpu else a.seconds / b.seconds for a, b in pairs])


def _named(name: str, values: Spread | None) -> Row:
    ends = ("median", "min", "max")
    return {f"{name}_{end}": None if values is None else values[place] for place, end in enumerate(ends)}


class ScoreCourse:
    """The passes over one protein."""

    def __init__(self, problem: Problem, plan: ScorePlan, tell: Callable[[str], None] = lambda text: None) -> None:
        self._problem, self._plan, self._tell = problem, plan, tell
        self._loop = FairEsmLoop(problem.encoder, problem.wild_type, device=plan.device)
        self._ours = {name: at_precision(problem.encoder, name, plan.device) for name in plan.precisions}
        self._places = spread_over(problem.touched, plan.positions)
        self._variants = problem.variants_at(self._places)
        self._copies = 1
        # CPU time is one thread's work; of several it counts their waiting.
        self._counts_cpu = plan.device.type == "cpu" and torch.get_num_threads() == 1

    def run(self) -> list[Row]:
        """All rows.

        Raises:
            ParityError: scores of ours are wrong.
        """
        self._tell(f"parity: {len(self._variants)} variants of {len(self._places)} residues")
        expected_N = self._theirs()
        for name, encoder in self._ours.items():
            check_scores(name, expected_N, self._score(encoder, self._variants))
        about_loop = self._try_forms()
        rows, whole_ratios = self._pairs(expected_N, about_loop)
        rows += self._gains(expected_N, whole_ratios)
        if self._plan.whole:
            rows += self._whole()
        return rows

    def _theirs(self) -> Vectors:
        return self._loop.score(self._variants, [place + 1 for place in self._places], self._copies)

    def _score(self, encoder: Encoder, variants: Sequence[Variant], *, max_tokens: int | None = None) -> Vectors:
        # By name, as users have them: reading the names is part of our time.
        names = [variant.name for variant in variants]
        return score_variants(encoder, self._problem.wild_type, names, max_tokens=max_tokens)

    def _try_forms(self) -> Row:
        """Chooses the copies a batch of fair-esm's loop."""
        tokens = [place + 1 for place in self._places]
        tried = spread_over(tokens, max(_TRIED_TOKENS, *self._plan.copies))
        self._tell(f"fair-esm's loop: {', '.join(map(str, self._plan.copies))} copies a batch")
        seconds: dict[int, list[float]] = {copies: [] for copies in self._plan.copies}
        for _ in range(self._plan.tries):
            for copies, found in seconds.items():
                work = partial(self._loop.score, (), tried, copies)
                found.append(timed(self._plan.device, work).seconds / len(tried))
        self._copies = min(seconds, key=lambda copies: min(seconds[copies]))
        return {
            "copies": self._copies,
            "copies_seconds_per_position": {str(copies): min(found) for copies, found in seconds.items()},
            "in_bf16": self._try_bf16(),
        }

    def _try_bf16(self) -> dict[str, Row]:
        """What fair-esm's loop would gain and lose in bf16: its model brought to it, and torch's autocast."""
        places = spread_over(self._places, _BF16_TOKENS)
        variants, tokens = self._problem.variants_at(places), [place + 1 for place in places]
        cast = self._loop.in_bf16()
        ways = {
            "fp32": partial(self._loop.score, variants, tokens, self._copies),
            "cast": partial(cast.score, variants, tokens, self._copies),
            "autocast": partial(self._loop.score, variants, tokens, self._copies, autocast=True),
        }
        runs = {way: timed(self._plan.device, work) for way, work in ways.items()}
        expected = runs.pop("fp32")
        return {
            way: {
                "times_slower": run.seconds / expected.seconds,
                **_agreement(expected.scores_N, run.scores_N)._asdict(),
            }
            for way, run in runs.items()
        }

    def _pairs(self, expected_N: Vectors, about_loop: Row) -> tuple[list[Row], dict[str, float]]:
        """Rows of the interleaved pairs, and how many times faster each precision is on the whole protein."""
        self._tell(f"{self._plan.pairs} interleaved pairs")
        works: dict[str, Callable[[], Vectors]] = {FAIR_ESM: self._theirs}
        for name, encoder in self._ours.items():
            works[name] = partial(self._score, encoder, self._variants)
        agreements: dict[str, list[Agreement]] = {}

        def check(name: str, scores_N: Vectors) -> None:
            precision = "fp32" if name == FAIR_ESM else name
            agreements.setdefault(name, []).append(check_scores(precision, expected_N, scores_N))

        runs = take_turns(self._plan.device, works, self._plan.pairs, check)
        rows: list[Row] = []
        whole: dict[str, float] = {}
        more = self._loop.tokens / len(self._problem.touched)
        for name, own in runs.items():
            is_peer = name == FAIR_ESM
            faster = None if is_peer else times_faster(runs[FAIR_ESM], own)
            faster_cpu = times_faster(runs[FAIR_ESM], own, cpu=True) if self._counts_cpu and not is_peer else None
            if faster is not None:
                whole[name] = faster.median * more
            rows.append(
                {
                    "part": "pairs",
                    "engine": FAIR_ESM if is_peer else PROTNEST,
                    "precision": "fp32" if is_peer else name,
                    "positions": len(self._places),
                    "pairs": len(own),
                    **_named("ms_per_position", self._each(own)),
                    **_named("cpu_ms_per_position", self._each(own, cpu=True) if self._counts_cpu else None),
                    **_named("times_faster", faster),
                    **_named("times_faster_cpu", faster_cpu),
                    "times_faster_whole": whole.get(name),
                    "max_difference": max(each.difference for each in agreements[name]),
                    "spearman": min(each.spearman for each in agreements[name]),
                    **(about_loop if is_peer else {}),
                }
            )
        return rows, whole

    def _each(self, runs: Sequence[Run], *, cpu: bool = False) -> Spread:
        """Milliseconds for each position."""
        return spread([1e3 * (run.cpu_seconds if cpu else run.seconds) / len(self._places) for run in runs])

    def _gains(self, expected_N: Vectors, whole_ratios: Mapping[str, float]) -> list[Row]:
        """What each of three things gains: ours without it beside ours, in turns."""
        untouched = self._untouched()
        extra = spread_over(untouched, round(len(self._places) * len(untouched) / len(self._problem.touched)))
        more = [*self._variants, *self._any_singles(extra)]
        rows: list[Row] = []
        for precision, encoder in self._ours.items():
            self._tell(f"ours {precision} without each gain")

            def whole_layer(encoder: Encoder = encoder) -> Vectors:
                with whole_last_layer(encoder):
                    return self._score(encoder, self._variants)

            def check(name: str, scores_N: Vectors, precision: str = precision) -> None:
                check_scores(precision, expected_N, scores_N[: len(expected_N)])

            works: dict[str, Callable[[], Vectors]] = {
                PROTNEST: partial(self._score, encoder, self._variants),
                GAINS[0]: partial(self._score, encoder, more),
                GAINS[1]: whole_layer,
                GAINS[2]: partial(self._score, encoder, self._variants, max_tokens=1),
            }
            runs = take_turns(self._plan.device, works, self._plan.pairs, check)
            for gain in GAINS:
                found = times_faster(runs[gain], runs[PROTNEST])
                in_cpu = times_faster(runs[gain], runs[PROTNEST], cpu=True) if self._counts_cpu else None
                rows.append(
                    {
                        "part": "gains",
                        "engine": PROTNEST,
                        "precision": precision,
                        "gain": gain,
                        "positions": len(self._places),
                        "positions_without": len(self._places) + (len(extra) if gain == GAINS[0] else 0),
                        "pairs": self._plan.pairs,
                        **_named("times_faster", found),
                        **_named("times_faster_cpu", in_cpu),
                        "percent_of_whole": share_of(found.median, whole_ratios[precision]),
                    }
                )
        return rows

    def _whole(self) -> list[Row]:
        """The whole protein once: all tokens by fair-esm's loop; by ours all touched residues, and all residues."""
        problem, device = self._problem, self._plan.device
        tokens, untouched = list(range(self._loop.tokens)), self._untouched()
        self._tell(f"the whole protein: {len(tokens)} tokens by fair-esm's loop, {len(problem.touched)} by ours")
        theirs = timed(device, partial(self._loop.score, problem.variants, tokens, self._copies))
        rows = [self._whole_row(FAIR_ESM, "fp32", len(tokens), theirs, theirs)]
        for name, encoder in self._ours.items():
            own = timed(device, partial(self._score, encoder, problem.variants))
            rows.append(self._whole_row(PROTNEST, name, len(problem.touched), own, theirs))
            if untouched:
                own = timed(device, partial(self._score, encoder, [*problem.variants, *self._any_singles(untouched)]))
                rows.append(self._whole_row(PROTNEST, name, len(problem.wild_type), own, theirs))
        return rows

    def _untouched(self) -> list[int]:
        return sorted(set(range(len(self._problem.wild_type))) - set(self._problem.touched))

    def _any_singles(self, places: Sequence[int]) -> list[Variant]:
        """Some substitution of each of these residues."""
        wild_type = self._problem.wild_type
        pairs = [(place, "A" if wild_type[place] != "A" else "G") for place in places]
        return [parse_variant(f"{wild_type[place]}{place + 1}{after}", wild_type) for place, after in pairs]

    def _whole_row(self, engine: str, precision: str, positions: int, own: Run, theirs: Run) -> Row:
        agreement = check_scores(precision, theirs.scores_N, own.scores_N[: len(theirs.scores_N)])
        return {
            "part": "whole",
            "engine": engine,
            "precision": precision,
            "positions": positions,
            "seconds": own.seconds,
            "cpu_seconds": own.cpu_seconds if self._counts_cpu else None,
            "times_faster": theirs.seconds / own.seconds,
            "times_faster_cpu": theirs.cpu_seconds / own.cpu_seconds if self._counts_cpu else None,
            "max_difference": agreement.difference,
            "spearman": agreement.spearman,
        }


def share_of(gain: float, whole: float) -> float | None:
    """How much of a ratio one of its factors is, in percent of its logarithm; None where there is no gain to share."""
    return 100 * math.log(gain) / math.log(whole) if whole > 1 else None


def compare_scores(problem: Problem, plan: ScorePlan, tell: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Rows of one protein: parts "pairs", "gains" and, where it is wanted, "whole".

    Raises:
        ParityError: scores of ours are wrong; nothing after that was timed.
        RuntimeError: fair-esm is not installed, or has other weights.
    """
    facts = {
        "model": problem.model,
        "data": problem.protein,
        "residues": len(problem.wild_type),
        "variants": len(problem.variants),
        "touched": len(problem.touched),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    return [facts | row for row in ScoreCourse(problem, plan, tell).run()]


def score_scans(encoder: Encoder, folder: Path) -> list[Row]:
    """Unmasked marginals of every scan in a folder (`*.csv.gz`, `wt.fasta`), one after another, reading included.

    Returns:
        A row for each scan, and one for all together; none where there is no scan.

    Raises:
        InputError: a scan cannot be read.
    """
    rows: list[Row] = []
    for path in sorted(folder.glob("*.csv.gz")):
        name = path.name.removesuffix(".csv.gz")
        begin = time.perf_counter()
        wild_type = read_wild_type(folder / "wt.fasta", name)
        variants = read_scan(path, wild_type)[0]
        read = time.perf_counter()
        scores_N = score_variants(encoder, wild_type, variants, method="wt-marginal")
        end = time.perf_counter()
        assert np.isfinite(scores_N).all()
        rows.append(_scan_row(encoder.precision, name, len(wild_type), len(variants), read - begin, end - read))
    if rows:
        sums = [sum(row[key] for row in rows) for key in ("residues", "variants", "read_seconds", "score_seconds")]
        rows.append(_scan_row(encoder.precision, "all", *sums))
    return rows


def _scan_row(
    precision: str, scan: str, residues: int, variants: int, read_seconds: float, score_seconds: float
) -> Row:
    return {
        "part": "scans",
        "engine": PROTNEST,
        "precision": precision,
        "data": scan,
        "residues": residues,
        "variants": variants,
        "read_seconds": read_seconds,
        "score_seconds": score_seconds,
        "seconds": read_seconds + score_seconds,
    }
