"""Probes: ridge with cross-validation against the textbook's; rows of a chain from pooled embeddings.

Shapes: N examples, P features.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from protnest.engine import Embedder, Encoder, InputError
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.engine.ranking import spearman
from protnest.engine.ridge_head import RidgeHead, score_with_head
from protnest.engine.variants import Variant, parse_variant, read_scan
from protnest.training import ridge_probe
from protnest.training.probe import probe, variant_features
from protnest.training.representation import chain_rows, representations, rivals
from protnest.training.ridge_probe import FOLDS, cross_validated, split
from typer.testing import CliRunner

from support.families import random_chain, tiny_family

Floats = npt.NDArray[np.float64]

FAMILY = tiny_family()
CHAIN, NAIVE = random_chain(FAMILY), random_chain(FAMILY, naive=True)
WILD_TYPE = "MKTAYIAKQRQISFVKSHFS"


def _scan(count: int = 60) -> tuple[list[Variant], list[float]]:
    rng = np.random.default_rng(0)
    variants = []
    for number in range(count):
        sites = sorted(rng.choice(20, size=1 + number % 2, replace=False).tolist())
        variants.append(":".join(f"{WILD_TYPE[site]}{site + 1}{rng.choice(list('ACDEFGHIKL'))}" for site in sites))
    return [parse_variant(name, WILD_TYPE) for name in variants], rng.normal(size=count).tolist()


def _regression(N: int = 83, P: int = 12, noise: float = 2.0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(N, P)) * rng.uniform(0.1, 3, P) + 5
    return features, features @ rng.normal(size=P) + noise * rng.normal(size=N) + 7


def _textbook(x: Floats, y: Floats, strength: float) -> tuple[Floats, float]:
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    unit = np.trace(covariance) / len(covariance)
    weight = np.linalg.solve(covariance + strength * unit * np.eye(len(covariance)), centred.T @ y / len(x))
    return weight, float(y.mean() - x.mean(0) @ weight)


def test_cross_validation_is_the_textbooks() -> None:
    x, y = _regression()
    folds = split(len(y))
    chosen = []
    wanted = np.empty(len(y))
    for fold in range(FOLDS):
        inside = folds != fold
        errors = []
        for strength in ridge_probe.STRENGTHS:
            squares = 0.0
            for inner in set(range(FOLDS)) - {fold}:
                fitted, judged = inside & (folds != inner), folds == inner
                weight, bias = _textbook(x[fitted], y[fitted], strength)
                squares += np.square(y[judged] - x[judged] @ weight - bias).sum()
            errors.append(squares)
        chosen.append(ridge_probe.STRENGTHS[int(np.argmin(errors))])
        weight, bias = _textbook(x[inside], y[inside], chosen[-1])
        wanted[~inside] = x[~inside] @ weight + bias
    np.testing.assert_allclose(cross_validated(x, y, folds), wanted, rtol=1e-8)
    assert ridge_probe.STRENGTHS[0] < max(chosen) < ridge_probe.STRENGTHS[-1], "the grid's ends decide nothing"


def test_no_example_sees_its_own_target() -> None:
    x, y = _regression()
    folds = split(len(y))
    before = cross_validated(x, y, folds)
    changed = y.copy()
    changed[folds == 2] += 100 * np.random.default_rng(0).normal(size=(folds == 2).sum())
    after = cross_validated(x, changed, folds)
    assert np.array_equal(before[folds == 2], after[folds == 2])
    assert not np.isclose(before[folds != 2], after[folds != 2]).any()


def test_noise_is_not_predicted() -> None:
    """More features than examples, and nothing in them."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(100, 150)), rng.normal(size=100)
    assert abs(spearman(cross_validated(x, y, split(100)), y)) < 0.3


def test_split_is_even_and_seeded() -> None:
    folds = split(83)
    assert set(np.bincount(folds).tolist()) == {16, 17}
    assert np.array_equal(folds, split(83))
    assert not np.array_equal(folds, split(83, seed=1))
    assert (np.diff(folds) != 1).any()


def test_features_are_means_over_all_residues_and_over_sites() -> None:
    variants, _ = _scan(10)
    features = variant_features(FAMILY[0], variants)
    for row, variant in enumerate(variants):
        (residues_LD,) = FAMILY[0].encode([variant.sequence])
        np.testing.assert_allclose(features["mean"][row], residues_LD.mean(0), atol=1e-5)
        np.testing.assert_allclose(features["site"][row], residues_LD[list(variant.sites)].mean(0), atol=1e-5)


@pytest.mark.parametrize("chain", [CHAIN, NAIVE], ids=["nested", "naive"])
def test_chain_rows_are_the_embedders(chain: object) -> None:
    variants, _ = _scan(10)
    pooled = [variant_features(encoder, variants)["mean"] for encoder in FAMILY]
    rows = chain_rows(chain, pooled)  # type: ignore[arg-type]
    wanted = Embedder(FAMILY, chain=chain).embed([variant.sequence for variant in variants])  # type: ignore[arg-type]
    np.testing.assert_allclose(rows[-1], np.asarray(wanted), atol=1e-4)
    assert [row.shape[1] for row in rows] == [16, 24, 40]


def test_what_is_compared() -> None:
    raw = [np.zeros((5, encoder.dim)) for encoder in FAMILY]
    listed = representations(["a", "b", "c"], raw, [CHAIN, NAIVE])
    names = [(each.kind, each.model, each.rows_NW.shape[1]) for each in listed]
    assert names == [
        ("raw", "a", 16),
        ("raw", "b", 24),
        ("raw", "c", 40),
        ("nested", "b", 24),
        ("nested", "c", 40),
        ("naive", "b", 24),
        ("naive", "c", 40),
        ("concat", "b", 40),
        ("concat", "c", 80),
    ]
    assert [each.regressor for each in listed] == [None] * 3 + ["linear"] * 2 + ["naive"] * 2 + [None] * 2
    held = {
        (each.kind, each.model): [(listed[place].kind, listed[place].model) for place in places]
        for each, places in zip(listed, rivals(listed), strict=True)
    }
    assert held == {
        ("raw", "a"): [],
        ("raw", "b"): [("raw", "a")],
        ("raw", "c"): [("raw", "b")],
        ("nested", "b"): [("raw", "a"), ("raw", "b"), ("naive", "b"), ("concat", "b")],
        ("nested", "c"): [("nested", "b"), ("raw", "c"), ("naive", "c"), ("concat", "c")],
        ("naive", "b"): [("raw", "a"), ("raw", "b")],
        ("naive", "c"): [("naive", "b"), ("raw", "c")],
        ("concat", "b"): [("raw", "a"), ("raw", "b")],
        ("concat", "c"): [("concat", "b"), ("raw", "c")],
    }


def test_two_nested_chains_are_not_mixed_up() -> None:
    """Each row is held against the smaller row of its own chain."""
    raw = [np.zeros((5, encoder.dim)) for encoder in FAMILY]
    listed = representations(["a", "b", "c"], raw, [CHAIN, random_chain(FAMILY, seed=1)])
    for each, places in zip(listed, rivals(listed), strict=True):
        if each.kind == "nested":
            assert all(listed[place].chain in (None, each.chain) for place in places)


def test_signal_is_found() -> None:
    """A score that is a direction of the largest model's embedding is ranked by it, and by rows that hold it."""
    variants, _ = _scan(80)
    raw = variant_features(FAMILY[2], variants)["site"]
    scores = (raw @ np.random.default_rng(0).normal(size=40)).tolist()
    results = {
        (each.representation, each.model, each.pooling, each.subset): each
        for each in probe(FAMILY, variants, scores, chains=[CHAIN])
    }
    assert results["raw", "tiny40", "site", "all"].spearman > 0.9  # type: ignore[operator]
    assert results["concat", "tiny40", "site", "all"].spearman > 0.8  # type: ignore[operator]
    for each in results.values():
        assert each.spearman is not None
        assert each.low is not None
        assert each.high is not None
        assert each.low <= each.spearman <= each.high
    nested, raw40 = results["nested", "tiny40", "site", "all"], results["raw", "tiny40", "site", "all"]
    beside = {(each.representation, each.model): each for each in nested.against}
    against = beside["raw", "tiny40"]
    assert against.difference == pytest.approx(nested.spearman - raw40.spearman)  # type: ignore[operator]
    assert against.low <= against.difference <= against.high  # type: ignore[operator]
    # Paired: both make the same mistakes, so their difference is known better than either.
    assert against.high - against.low < nested.high - nested.low + raw40.high - raw40.low  # type: ignore[operator]
    counts = {each.subset: each.variants for each in results.values()}
    assert counts == {"all": 80, "singles": 40, "multiples": 40}


def test_too_few_or_other_models() -> None:
    variants, scores = _scan(19)
    with pytest.raises(InputError, match="19 variants are too few for 5 folds: at least 20"):
        probe(FAMILY, variants, scores)
    variants, scores = _scan(30)
    with pytest.raises(InputError, match="the order must be"):
        probe(FAMILY[::-1], variants, scores, chains=[CHAIN])
    with pytest.raises(ValueError, match="3 examples do not fill 5 folds"):
        cross_validated(np.zeros((3, 2)), np.zeros(3), split(3))
    with pytest.raises(ValueError, match="3 features, 4 targets and 3 folds: they must agree"):
        cross_validated(np.zeros((3, 2)), np.zeros(4), split(3))


def test_command(tmp_path: Path) -> None:
    for encoder in FAMILY:
        save_checkpoint(encoder, tmp_path / encoder.name)
    models = ",".join(str(tmp_path / encoder.name) for encoder in FAMILY)
    CHAIN.save(tmp_path / "chain")
    NAIVE.save(tmp_path / "naive")
    variants, scores = _scan(40)
    (tmp_path / "wt.fasta").write_text(f">wt\n{WILD_TYPE}\n")
    rows = "".join(f"{variant.name},{score}\n" for variant, score in zip(variants, scores, strict=True))
    (tmp_path / "scan.csv").write_text(f"mutant,DMS_score\n{rows}")
    words = ["probe", "--wt", str(tmp_path / "wt.fasta"), "--mutants", str(tmp_path / "scan.csv"), "--models", models]
    words += ["--chain", str(tmp_path / "chain"), "--chain", str(tmp_path / "naive"), "--variants", "30"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out.json"), "--json", "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert (report["found"], report["variants"], report["folds"]) == (40, 30, 5)
    assert len(report["results"]) == 2 * 9 * 3
    picture = tmp_path / "plot.png"
    shown = CliRunner().invoke(app, [*words, "--plot", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "nested" in shown.stdout
    assert "multiples" in shown.stdout


def test_region_is_what_the_models_see(tmp_path: Path) -> None:
    """Residues before and after it change nothing; a substitution outside of it is an error."""
    save_checkpoint(FAMILY[0], tmp_path / "a")
    variants, scores = _scan(30)
    reports = []
    for wild_type, shift, more in ((WILD_TYPE, 0, []), (f"MMM{WILD_TYPE}WWWW", 3, ["--region", "4-23"])):
        rows = ""
        for variant, score in zip(variants, scores, strict=True):
            parts = [f"{part[0]}{int(part[1:-1]) + shift}{part[-1]}" for part in variant.name.split(":")]
            rows += f"{':'.join(parts)},{score}\n"
        (tmp_path / "scan.csv").write_text(f"mutant,DMS_score\n{rows}")
        (tmp_path / "wt.fasta").write_text(f">wt\n{wild_type}\n")
        words = ["probe", "--wt", str(tmp_path / "wt.fasta"), "--mutants", str(tmp_path / "scan.csv"), "--json"]
        result = CliRunner().invoke(app, [*words, "--models", str(tmp_path / "a"), "--precision", "fp32", *more])
        assert result.exit_code == 0, result.output
        reports.append(json.loads(result.stdout))
    assert reports[0]["results"] == reports[1]["results"]
    assert (reports[0]["region"], reports[1]["region"]) == (None, "4-23")
    outside = CliRunner().invoke(app, [*words, "--models", str(tmp_path / "a"), "--region", "4-8"])
    assert outside.exit_code == 1
    assert "lies outside of 4 to 8" in " ".join(outside.output.split())


def _words(folder: Path, *, models: list[Encoder], scan: int = 30) -> list[str]:
    """A probe of these models, with a chain and a naive one in the folder."""
    for encoder in models:
        save_checkpoint(encoder, folder / encoder.name)
    CHAIN.save(folder / "chain")
    NAIVE.save(folder / "naive")
    variants, scores = _scan(scan)
    (folder / "wt.fasta").write_text(f">wt\n{WILD_TYPE}\n")
    rows = "".join(f"{variant.name},{score}\n" for variant, score in zip(variants, scores, strict=True))
    (folder / "scan.csv").write_text(f"mutant,activity\n{rows}")
    names = ",".join(str(folder / encoder.name) for encoder in models)
    words = ["probe", "--wt", str(folder / "wt.fasta"), "--mutants", str(folder / "scan.csv"), "--models", names]
    return [*words, "--column", "activity", "--precision", "fp32"]


def test_save(tmp_path: Path) -> None:
    """By default the nested row of the first chain that is one, at the mutated sites."""
    words = _words(tmp_path, models=FAMILY[:2])
    words += ["--chain", str(tmp_path / "naive"), "--chain", str(tmp_path / "chain"), "--region", "1-20", "--seed", "3"]
    result = CliRunner().invoke(app, [*words, "--variants", "25", "--save", str(tmp_path / "head"), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    head = RidgeHead.load(tmp_path / "head")
    (judged,) = (
        each
        for each in report["results"]
        if (each["representation"], each["width"], each["pooling"], each["subset"]) == ("nested", 24, "site", "all")
    )
    scores = {key: judged[key] for key in ("spearman", "low", "high")}
    assert report["head"] == {
        "out": str(tmp_path / "head"),
        "features": "nested",
        "pooling": "site",
        "width": 24,
        "strength": head.strength,
        **scores,
    }
    assert head.chain_fingerprint == CHAIN.fingerprint
    assert {key: head.data[key] for key in scores} == scores
    assert (head.data["scan"], head.data["column"], head.data["variants"]) == ("scan.csv", "activity", 25)
    assert (head.region, head.data["seed"], head.data["precision"]) == ((1, 20), 3, "fp32")
    variants, _ = read_scan(tmp_path / "scan.csv", WILD_TYPE, column="activity")
    assert np.isfinite(score_with_head(head, FAMILY, variants, chain=CHAIN, wild_type=WILD_TYPE)).all()


def test_save_what_is_asked_for(tmp_path: Path) -> None:
    words = [*_words(tmp_path, models=FAMILY[:2]), "--chain", str(tmp_path / "chain"), "--save", str(tmp_path / "head")]
    result = CliRunner().invoke(app, [*words, "--save-pooling", "mean", "--save-features", "raw"])
    assert result.exit_code == 0, result.output
    assert "reads raw features, mean" in " ".join(result.output.split())
    head = RidgeHead.load(tmp_path / "head")
    assert [model.name for model in head.models] == ["tiny24"]
    assert (head.pooling, head.chain_fingerprint, head.region) == ("mean", None, None)


def test_save_says_first_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = _words(tmp_path, models=FAMILY[:2])
    monkeypatch.setattr(Embedder, "embed_clean", lambda *_, **__: pytest.fail("something was embedded"))
    save = ["--save", str(tmp_path / "head")]
    for more, code, problem in (
        (["--save-pooling", "mean"], 2, "--save-pooling and --save-features go with --save"),
        (["--save-features", "raw"], 2, "go with --save"),
        (["--save", str(tmp_path)], 1, "is a folder; --save names a file"),
        (["--save", str(tmp_path / "none" / "head")], 1, "its folder is not there"),
        ([*save, "--save-features", "nested"], 1, "a chain that is not naive; none is given"),
        ([*save, "--save-features", "nested", "--chain", str(tmp_path / "naive")], 1, "that is not naive"),
    ):
        result = CliRunner().invoke(app, [*words, *more], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        assert problem in " ".join(result.output.replace("│", " ").split())
    long = WILD_TYPE + "A"
    (tmp_path / "wt.fasta").write_text(f">wt\n{long}\n")
    result = CliRunner().invoke(app, [*words, *save, "--chain", str(tmp_path / "chain")])
    assert result.exit_code == 1
    assert "the chain runs windows of 20, tiny16 in its probe those of 30" in " ".join(result.output.split())
    assert not (tmp_path / "head").exists()
