"""Heads fitted on scans: the textbook's ridge on all variants, the probe's own features, and true to a real assay.

Shapes: N variants, P features.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from protnest.engine import Chain, InputError, load_model
from protnest.engine.ridge_head import RidgeHead, score_with_head, wild_type_hash
from protnest.engine.variants import Variant, parse_variant, read_scan, read_wild_type
from protnest.training import ridge_probe
from protnest.training.head_fit import HeadPlan, ScanOrigin, check_out, fit_head
from protnest.training.probe import ProbeResult, probe, scan_features
from protnest.training.representation import chain_rows
from protnest.training.ridge_probe import FOLDS, fitted, split

from support.families import models_of, random_chain, tiny_family
from support.shared_data import shared_path

Floats = npt.NDArray[np.float64]

FAMILY = tiny_family()
CHAIN, OTHER, NAIVE = random_chain(FAMILY), random_chain(FAMILY, seed=1), random_chain(FAMILY, naive=True)
WILD_TYPE = "MKTAYIAKQRQISFVKSHFS"
ORIGIN = ScanOrigin(file="scan.csv", column="activity", wild_type=WILD_TYPE)


def _variants(count: int = 60) -> list[Variant]:
    rng = np.random.default_rng(0)
    names = []
    for number in range(count):
        sites = sorted(rng.choice(20, size=1 + number % 2, replace=False).tolist())
        names.append(":".join(f"{WILD_TYPE[site]}{site + 1}{rng.choice(list('ACDEFGHIKL'))}" for site in sites))
    return [parse_variant(name, WILD_TYPE) for name in names]


VARIANTS = _variants()
FEATURES = scan_features(FAMILY, VARIANTS, chains=[CHAIN])
SCORES: list[float] = (
    FEATURES[2]["mean"] @ np.random.default_rng(2).normal(size=40) + 3 + np.random.default_rng(3).normal(size=60)
).tolist()


@pytest.fixture(scope="module")
def results() -> list[ProbeResult]:
    return probe(FAMILY, VARIANTS, SCORES, chains=[NAIVE, CHAIN, OTHER], features=FEATURES)


def _judged(results: list[ProbeResult], kind: str, pooling: str, number: int = 0) -> ProbeResult:
    """The `number`-th row of the largest model's."""
    return [
        each
        for each in results
        if (each.representation, each.model, each.pooling, each.subset) == (kind, "tiny40", pooling, "all")
    ][number]


def test_fitted_is_the_textbooks() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(83, 12)) * rng.uniform(0.1, 3, 12) + 5
    y = x @ rng.normal(size=12) + 2 * rng.normal(size=83) + 7
    folds = split(83)

    def ridge(rows: npt.NDArray[np.bool_], strength: float) -> tuple[Floats, float]:
        centred = x[rows] - x[rows].mean(0)
        covariance = centred.T @ centred / rows.sum()
        penalty = strength * np.trace(covariance) / 12 * np.eye(12)
        weight = np.linalg.solve(covariance + penalty, centred.T @ y[rows] / rows.sum())
        return weight, float(y[rows].mean() - x[rows].mean(0) @ weight)

    errors = []
    for strength in ridge_probe.STRENGTHS:
        error = 0.0
        for fold in range(FOLDS):
            weight, bias = ridge(folds != fold, strength)
            error += float(np.square(y[folds == fold] - x[folds == fold] @ weight - bias).sum())
        errors.append(error)
    wanted = ridge_probe.STRENGTHS[int(np.argmin(errors))]
    assert ridge_probe.STRENGTHS[0] < wanted < ridge_probe.STRENGTHS[-1], "the grid's ends decide nothing"
    weight, bias, strength = fitted(x, y, folds)
    assert strength == wanted
    all_weight, all_bias = ridge(np.ones(83, dtype=bool), wanted)
    np.testing.assert_allclose(weight, all_weight, rtol=1e-8)
    assert bias == pytest.approx(all_bias, rel=1e-8)
    with pytest.raises(ValueError, match="3 examples do not fill 5 folds"):
        fitted(np.zeros((3, 2)), np.zeros(3), split(3))
    with pytest.raises(ValueError, match="3 features, 4 targets and 3 folds: they must agree"):
        fitted(np.zeros((3, 2)), np.zeros(4), split(3))


@pytest.mark.parametrize("pooling", ["mean", "site"])
@pytest.mark.parametrize("kind", ["nested", "raw"])
def test_scores_of_the_scan_itself_are_the_ridges(
    tmp_path: Path, results: list[ProbeResult], kind: str, pooling: str
) -> None:
    """Saved, loaded, and embedded anew by the engine."""
    plan = HeadPlan.of(3, [CHAIN], features=kind, pooling=pooling)
    fit_head(plan, FAMILY, SCORES, FEATURES, results, ORIGIN).save(tmp_path / "head")
    head = RidgeHead.load(tmp_path / "head")
    x = FEATURES[2][pooling] if kind == "raw" else chain_rows(CHAIN, [each[pooling] for each in FEATURES])[2]
    weight, bias, strength = fitted(x, np.array(SCORES), split(60))
    wanted = x @ weight + bias
    chain, models = (CHAIN, FAMILY) if kind == "nested" else (None, FAMILY[2:])
    scores = score_with_head(head, models, VARIANTS, chain=chain, wild_type=WILD_TYPE)
    assert abs(scores - wanted).max() <= 1e-4 * np.ptp(wanted)
    assert head.models == models_of(models)
    assert head.chain_fingerprint == (None if chain is None else chain.fingerprint)
    assert (head.strength, head.pooling, head.width) == (strength, pooling, 40)


def test_what_a_head_says_of_itself(results: list[ProbeResult]) -> None:
    origin = dataclasses.replace(ORIGIN, region=(1, 20))
    plan = HeadPlan.of(3, [NAIVE, CHAIN, OTHER])
    head = fit_head(plan, FAMILY, SCORES, FEATURES, results, origin, seed=0)
    judged = _judged(results, "nested", "site")
    assert judged.spearman != _judged(results, "nested", "site", 1).spearman, "the other chain's row is another"
    assert head.data == {
        "scan": "scan.csv",
        "column": "activity",
        "variants": 60,
        "wild_type": {"residues": 20, "hash": wild_type_hash(WILD_TYPE)},
        "region": [1, 20],
        "folds": 5,
        "seed": 0,
        "precision": "fp32",
        "spearman": judged.spearman,
        "low": judged.low,
        "high": judged.high,
    }
    raw = fit_head(HeadPlan.of(3, [CHAIN], features="raw", pooling="mean"), FAMILY, SCORES, FEATURES, results, ORIGIN)
    assert raw.data["spearman"] == _judged(results, "raw", "mean").spearman
    assert raw.data["region"] is None


def test_models_of_one_name_are_told_apart_by_width(results: list[ProbeResult]) -> None:
    encoders = [copy.deepcopy(encoder) for encoder in FAMILY]
    for encoder in encoders:
        encoder.name = "model"
    alike = [dataclasses.replace(each, model="model") for each in results]
    head = fit_head(HeadPlan.of(3, []), encoders, SCORES, FEATURES, alike, ORIGIN)
    assert head.data["spearman"] == _judged(results, "raw", "site").spearman


def test_the_folds_are_the_probes(monkeypatch: pytest.MonkeyPatch, results: list[ProbeResult]) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "protnest.training.head_fit.fitted", lambda x, y, folds: drawn.append(folds) or (np.zeros(x.shape[1]), 0.0, 1.0)
    )
    fit_head(HeadPlan.of(3, []), FAMILY, SCORES, FEATURES, results, ORIGIN, seed=7)
    assert np.array_equal(drawn[0], split(60, seed=7))


def test_features_are_not_made_twice() -> None:
    ran: list[int] = []
    two, made = FAMILY[:2], FEATURES[:2]
    again = probe(
        two,
        VARIANTS[:30],
        SCORES[:30],
        features=[{k: v[:30] for k, v in each.items()} for each in made],
        after_batch=ran.append,
    )
    assert not ran
    assert again == probe(two, VARIANTS[:30], SCORES[:30], after_batch=ran.append)
    assert sum(ran) == 2 * 30 * 20


@pytest.mark.parametrize(
    ("models", "chains", "features", "chain"),
    [
        (3, [CHAIN], None, CHAIN),
        (3, [NAIVE, CHAIN, OTHER], None, CHAIN),
        (3, [CHAIN], "raw", None),
        (3, [CHAIN], "nested", CHAIN),
        (3, [NAIVE], None, None),
        (3, [], None, None),
        (1, [CHAIN], None, None),
    ],
)
def test_what_is_saved(models: int, chains: list[Chain], features: str | None, chain: Chain | None) -> None:
    plan = HeadPlan.of(models, chains, features=features)
    assert plan.chain is chain
    assert plan.features == ("raw" if chain is None else "nested")
    assert plan.pooling == "site"
    assert HeadPlan.of(models, chains, pooling="mean").pooling == "mean"


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    for chains in ([], [NAIVE]):
        with pytest.raises(InputError, match="nested features take a chain that is not naive; none is given"):
            HeadPlan.of(3, chains, features="nested")
    with pytest.raises(InputError, match="nested features take two models of the chain or more, got 1"):
        HeadPlan.of(1, [CHAIN], features="nested")
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}: is a folder; --save names a file"):
        check_out(tmp_path)
    with pytest.raises(InputError, match="its folder is not there"):
        check_out(tmp_path / "none" / "head")
    check_out(tmp_path / "head")
    check_out(Path("head"))


def test_a_protein_whose_windows_would_differ() -> None:
    """The family's lengths are 30, 20 and 25: the chain runs windows of 20."""
    plan = HeadPlan.of(3, [CHAIN])
    plan.check_lengths(FAMILY, 20)
    with pytest.raises(
        InputError, match="for 21 residues: the chain runs windows of 20, tiny16 in its probe those of 30"
    ):
        plan.check_lengths(FAMILY, 21)
    plan.check_lengths(FAMILY[1:2], 21)
    HeadPlan.of(3, [CHAIN], features="raw").check_lengths(FAMILY, 1000)


def test_a_probe_takes_substitutions_only() -> None:
    variants = [*VARIANTS, Variant(name="A4del", sites=(), sequence=WILD_TYPE[1:])]
    with pytest.raises(InputError, match="'A4del' has no substituted site: a probe takes substitutions only"):
        scan_features(FAMILY, variants)
    with pytest.raises(InputError, match="19 variants are too few"):
        scan_features(FAMILY, VARIANTS[:19])
    with pytest.raises(InputError, match="the order must be"):
        scan_features(FAMILY[::-1], VARIANTS, chains=[CHAIN])


def test_the_other_half_of_a_real_scan() -> None:
    """GB1 with nano-xs: what was left out is ranked about as well as cross-validation said."""
    folder, name = shared_path("dms"), "GB1_Olson_2014_singles"
    wild_type = read_wild_type(folder / "wt.fasta", name)
    variants, scores = read_scan(folder / f"{name}.csv.gz", wild_type)
    drawn = np.random.default_rng(0).permutation(len(variants))[:600].tolist()
    fit, held = drawn[:300], drawn[300:]
    encoder = load_model("nano-xs", device="cpu", precision="fp32")
    seen, targets = [variants[row] for row in fit], [scores[row] for row in fit]
    features = scan_features([encoder], seen)
    results = probe([encoder], seen, targets, features=features)
    origin = ScanOrigin(file=name, column="DMS_score", wild_type=wild_type)
    head = fit_head(HeadPlan.of(1, [], pooling="mean"), [encoder], targets, features, results, origin)
    predicted = features[0]["mean"] @ head.weight_W + head.bias
    again = score_with_head(head, encoder, seen, wild_type=wild_type)
    assert abs(again - predicted).max() <= 1e-4 * predicted.std()
    others = score_with_head(head, encoder, [variants[row] for row in held], wild_type=wild_type)
    orders = [np.argsort(np.argsort(each)) for each in (others, np.array(scores)[held])]
    found = np.corrcoef(*orders)[0, 1]
    assert found > 0.3
    assert head.data["low"] - 0.05 <= found <= head.data["high"] + 0.05
