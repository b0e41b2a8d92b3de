"""Supervised probes of a mutational scan: does a nested row know more than each model, and the bigger prefix more?

Each variant is embedded by every model once. Its features are the mean over all residues and the mean over its mutated
sites. Rows of a chain are made from these: pooling weights add up to one, so a chain's affine map commutes with it.

Shapes: N variants, D width of a model, W of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..engine.bootstrap import bootstrap_spearman, finite, interval
from ..engine.chain import Chain
from ..engine.embedder import Embedder
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.family import Family
from ..engine.ranking import spearman
from ..engine.variants import Variant
from .paired_difference import Against, held_against
from .representation import representations, rivals
from .ridge_probe import FOLDS, Floats, cross_validated, split

_VARIANTS_AT_ONCE = 128
POOLINGS = ("mean", "site")


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """How one representation ranks the variants.

    Attributes:
        representation: "raw", "nested", "naive" or "concat".
        regressor: of the chain behind it, None without one.
        model: the largest model behind it.
        width: features.
        pooling: "mean" over all residues, or "site", over the mutated ones.
        subset: "all", "singles" or "multiples".
        variants: how many it is judged on.
        spearman, low, high: of predictions with their fold left out, with a 95 % bootstrap interval; None where it is
            not defined.
        against: differences of `spearman` to others'.
    """

    representation: str
    regressor: str | None
    model: str
    width: int
    pooling: str
    subset: str
    variants: int
    spearman: float | None
    low: float | None
    high: float | None
    against: tuple[Against, ...] = ()


def variant_features(
    encoder: Encoder, variants: Sequence[Variant], *, after_batch: Callable[[int], None] = lambda residues: None
) -> dict[str, Floats]:
    """Mean over all residues and over the mutated sites: fp64 (N, D) each, by the names in `POOLINGS`."""
    embedder = Embedder(encoder, pool="residue")
    out = {pooling: np.empty((len(variants), encoder.dim)) for pooling in POOLINGS}
    for begin in range(0, len(variants), _VARIANTS_AT_ONCE):
        some = variants[begin : begin + _VARIANTS_AT_ONCE]
        rows = embedder.embed_clean([variant.sequence for variant in some], after_batch=after_batch)
        for place, (variant, rows_LD) in enumerate(zip(some, rows, strict=True), start=begin):
            out["mean"][place] = rows_LD.mean(axis=0, dtype=np.float64)
            out["site"][place] = rows_LD[list(variant.sites)].mean(axis=0, dtype=np.float64)
    return out


def scan_features(
    encoders: Sequence[Encoder],
    variants: Sequence[Variant],
    *,
    chains: Sequence[Chain] = (),
    after_batch: Callable[[int], None] = lambda residues: None,
) -> list[dict[str, Floats]]:
    """Each model's `variant_features`, once it is known that a probe can be made of them.

    Raises:
        InputError: too few variants, one without a substituted site, or models that are not a chain's.
    """
    _check(encoders, variants, chains)
    return [variant_features(encoder, variants, after_batch=after_batch) for encoder in encoders]


def _check(encoders: Sequence[Encoder], variants: Sequence[Variant], chains: Sequence[Chain]) -> None:
    if len(variants) < 4 * FOLDS:
        message = f"{len(variants)} variants are too few for {FOLDS} folds: at least {4 * FOLDS}"
        raise InputError(message)
    if without := [variant.name for variant in variants if not variant.sites]:
        message = f"variant {without[0]!r} has no substituted site: a probe takes substitutions only"
        raise InputError(message)
    family = Family.of(list(encoders))
    for chain in chains:
        chain.check_models(family.members)


def probe(
    encoders: Sequence[Encoder],
    variants: Sequence[Variant],
    scores: Sequence[float],
    *,
    chains: Sequence[Chain] = (),
    seed: int = 0,
    features: Sequence[dict[str, Floats]] | None = None,
    after_batch: Callable[[int], None] = lambda residues: None,
) -> list[ProbeResult]:
    """Judges each model alone, each nested prefix, naive rows and plain concatenations on one scan.

    All use the same folds and the same bootstrap draws, so that their differences are paired.

    Args:
        encoders: smallest first.
        variants, scores: the scan.
        chains: nested or naive, whose models these are.
        seed: of folds and bootstrap.
        features: what `scan_features` gave for these models and variants; made here by default.
        after_batch: called with the residues that have just been run.

    Raises:
        InputError: too few variants, one without a substituted site, or models that are not a chain's.
    """
    if features is None:
        features = scan_features(encoders, variants, chains=chains, after_batch=after_batch)
    targets_N = np.array(scores, dtype=np.float64)
    folds_N = split(len(variants), seed=seed)
    names = [encoder.name for encoder in encoders]
    is_single = np.array([variant.is_single for variant in variants])
    subsets = {"all": np.ones(len(variants), dtype=bool)}
    if is_single.any() and not is_single.all():
        subsets |= {"singles": is_single, "multiples": ~is_single}
    results = []
    for pooling in POOLINGS:
        listed = representations(names, [each[pooling] for each in features], chains)
        predictions = [cross_validated(each.rows_NW, targets_N, folds_N) for each in listed]
        others = rivals(listed)
        for subset, member in subsets.items():
            pairs = [(predicted_N[member], targets_N[member]) for predicted_N in predictions]
            scores = [spearman(*pair) for pair in pairs]
            samples = [bootstrap_spearman(*pair, seed=seed) for pair in pairs]
            for place, each in enumerate(listed):
                low, high = interval(samples[place])
                results.append(
                    ProbeResult(
                        representation=each.kind,
                        regressor=each.regressor,
                        model=each.model,
                        width=each.rows_NW.shape[1],
                        pooling=pooling,
                        subset=subset,
                        variants=int(member.sum()),
                        spearman=finite(scores[place]),
                        low=finite(low),
                        high=finite(high),
                        against=held_against(listed, place, others[place], scores, samples),
                    )
                )
    return results


def as_report(results: Sequence[ProbeResult], **facts: object) -> dict[str, Any]:
    """What the JSON file holds."""
    return {**facts, "folds": FOLDS, "results": [asdict(result) for result in results]}
