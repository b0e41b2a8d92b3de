"""Fits from Grams against least squares and SVD on the rows themselves, stage by stage; judged as at inference.

Shapes: R rows, X width of the row so far, D of the new model, N dimensions that a stage adds.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from protnest.engine import Chain, Embedder, InputError, read_embeddings
from protnest.engine.chain import ChainModel, Stage
from protnest.engine.cli import app
from protnest.training import regressor as regressor_module
from protnest.training.chain_fit import fit_chain
from protnest.training.corpus import is_held_out
from protnest.training.gram import GramPair
from protnest.training.gram_pass import accumulate, chain_models
from typer.testing import CliRunner

from support.families import tiny_family
from support.nested_mutants import fit_chain_on_raw
from support.tiny import random_proteins, save_tiny_model, write_fasta

Floats = npt.NDArray[np.float64]

WIDTHS = (8, 12, 20)
REGRESSORS = ["linear", "ridge", "pcr"]


def _embeddings(rows: int, *, condition: float = 10.0, seed: int = 0, noise: float = 0.3) -> list[Floats]:
    """Three models' rows out of shared factors, each with factors of its own, of a given condition, and a mean."""
    rng = np.random.default_rng(0)
    mixers = [np.linalg.qr(rng.normal(size=(24, width)))[0] for width in WIDTHS]
    turns = [np.linalg.qr(rng.normal(size=(width, width)))[0] for width in WIDTHS]
    means = [rng.normal(size=width) * 3 for width in WIDTHS]
    rng = np.random.default_rng((1, seed))
    factors = rng.normal(size=(rows, 24))
    embeddings = []
    for mixer, turn, mean in zip(mixers, turns, means, strict=True):
        own = factors @ mixer + noise * rng.normal(size=(rows, mixer.shape[1]))
        spread = np.geomspace(1, 1 / condition, mixer.shape[1])
        embeddings.append(own * spread @ turn + mean)
    return embeddings


def _pair(train: list[Floats], held_out: list[Floats]) -> GramPair:
    widths = [rows.shape[1] for rows in train]
    pair = GramPair.empty([ChainModel(name=f"m{width}", width=width, max_residues=50) for width in widths])
    for gram, rows in ((pair.train, train), (pair.held_out, held_out)):
        gram.add(torch.from_numpy(np.concatenate(rows, axis=1)))
    pair.sequences = (90, 10)
    return pair


@functools.cache
def _data(condition: float = 10.0) -> tuple[list[Floats], list[Floats]]:
    return _embeddings(4000, condition=condition), _embeddings(700, condition=condition, seed=1)


def _parts(stage: Stage) -> tuple[Floats, Floats, Floats, Floats]:
    assert stage.weight_XD is not None
    assert stage.bias_D is not None
    weight, bias, mean, components = (
        each.double().numpy() for each in (stage.weight_XD, stage.bias_D, stage.mean, stage.components)
    )
    return weight, bias, mean, components


def _append(row: Floats, y: Floats, stage: Stage) -> Floats:
    weight, bias, mean, components = _parts(stage)
    return np.concatenate((row, (y - row @ weight - bias - mean) @ components.T), axis=1)


def _r2(y: Floats, predicted: Floats) -> float:
    return float(1 - np.square(y - predicted).sum() / np.square(y - y.mean(0)).sum())


def _angle(one: Floats, other: Floats) -> float:
    """Sine of the largest principal angle between the row spaces."""
    one, other = np.linalg.qr(one.T)[0], np.linalg.qr(other.T)[0]
    return float(np.linalg.norm(one - other @ (other.T @ one), 2))


# Against least squares and SVD on the rows


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e4])
def test_linear_fit_equals_least_squares_and_svd(condition: float) -> None:
    train, _ = _data(condition)
    chain = fit_chain(_pair(*_data(condition)), regressor="linear")
    row = train[0]
    for stage, y in zip(chain.stages, train[1:], strict=True):
        weight, bias, mean, components = _parts(stage)
        centred = row - row.mean(0)
        direct = np.linalg.lstsq(centred, y - y.mean(0), rcond=None)[0]
        predicted = centred @ direct + y.mean(0)
        got = row @ weight + bias + mean
        # W is stored in fp32, which on inputs of condition 1e4 is the larger of the two.
        stored = np.finfo(np.float32).eps * (np.abs(centred) @ np.abs(weight))
        assert (np.abs(got - predicted) <= 1e-6 * np.abs(y).max() + stored).all()
        residual = y - predicted
        values, axes = np.linalg.svd(residual - residual.mean(0), full_matrices=False)[1:]
        N = len(components)
        gap = 1 - values[N] ** 2 / values[N - 1] ** 2
        assert gap >= 1e-3, "no gap to judge by"
        assert _angle(components, axes[:N]) <= 1e-6
        np.testing.assert_allclose(components @ components.T, np.eye(N), atol=1e-6)
        np.testing.assert_allclose(mean, 0, atol=1e-6 * np.abs(bias).max())
        assert (components[np.arange(N), np.abs(components).argmax(1)] > 0).all()
        row = _append(row, y, stage)


def test_ridge_takes_the_strength_that_held_out_rows_like_best(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = _embeddings(60), _embeddings(300, seed=1)
    monkeypatch.setattr(regressor_module, "_RIDGE_GRID", (1e-6, 1e-3, 0.03, 0.1, 0.3, 1.0, 10.0))
    chain = fit_chain(_pair(train, held_out), regressor="ridge")
    rows = [train[0], held_out[0]]
    for stage, report, y, y_out in zip(chain.stages, chain.report, train[1:], held_out[1:], strict=True):
        weight, _, _, _ = _parts(stage)
        mean, centred = rows[0].mean(0), rows[0] - rows[0].mean(0)
        covariance = centred.T @ centred / 60
        unit = np.trace(covariance) / covariance.shape[0]
        scores = {}
        for strength in (1e-6, 1e-3, 0.03, 0.1, 0.3, 1.0, 10.0):
            direct = np.linalg.solve(
                covariance + strength * unit * np.eye(len(covariance)), centred.T @ (y - y.mean(0)) / 60
            )
            scores[strength] = (_r2(y_out, (rows[1] - mean) @ direct + y.mean(0)), direct)
        best = max(scores, key=lambda strength: scores[strength][0])
        assert report["strength"] == best
        assert 1e-6 < best < 10, "the grid's ends decide nothing"
        np.testing.assert_allclose(weight, scores[best][1], atol=1e-6)
        assert abs(report["held_out_r2"] - scores[best][0]) <= 1e-6
        rows = [_append(row, new, stage) for row, new in zip(rows, (y, y_out), strict=True)]


def _published_pcr(x: Floats, y: Floats) -> tuple[Floats, int]:
    """The published regression written out: centred SVD, noise as the median of the small eigenvalues, the edge."""
    n, p = x.shape
    axes, singular = (part for part in np.linalg.svd(x - x.mean(0), full_matrices=False)[:0:-1])
    values = singular**2 / (n - 1)
    edge = (1 + np.sqrt(p / n)) ** 2
    noise = values[values / values.mean() < edge]
    kept = int((values > np.median(noise) * edge).sum())
    scores = (x - x.mean(0)) @ axes[:kept].T
    coefficients = np.linalg.lstsq(scores, y - y.mean(0), rcond=None)[0]
    return scores @ coefficients + y.mean(0), kept


def test_pcr_follows_the_published_rule() -> None:
    train, _ = _data()
    chain = fit_chain(_pair(*_data()))
    assert chain.regressor == "pcr"
    row = train[0]
    for stage, report, y in zip(chain.stages, chain.report, train[1:], strict=True):
        weight, bias, _, _ = _parts(stage)
        wanted, kept = _published_pcr(row, y)
        assert report["kept"] == kept
        assert 0 < kept < row.shape[1]
        assert np.abs(row @ weight + bias - wanted).max() <= 1e-6 * np.abs(y).max()
        row = _append(row, y, stage)


def test_pcr_threshold() -> None:
    """The noise is the median of the eigenvalues below the edge; where no component lies above the threshold, those
    that make up 95 % of the variance are kept."""
    edge = (1 + (4 / 50) ** 0.5) ** 2
    values = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    assert [value for value in values.tolist() if value / 1.875 < edge] == [2.0, 1.0, 0.5]
    assert regressor_module.component_threshold(values, 50) == pytest.approx(1.0 * edge)
    even = torch.tensor([9.0, 2.0, 1.0], dtype=torch.float64)
    assert regressor_module.component_threshold(even, 10**9) == pytest.approx(1.5, rel=1e-3)
    equal = torch.ones(30, dtype=torch.float64)
    kept, threshold = regressor_module._kept_components(equal, 1000)
    assert threshold == pytest.approx((1 + 0.03**0.5) ** 2 * 1000 / 999)
    assert kept in (29, 30)  # the 29th reaches 96.7 %, were it not for rounding


def test_naive_fit_equals_svd_of_the_concatenation() -> None:
    train, held_out = _data()
    chain = fit_chain(_pair(train, held_out), regressor="naive")
    assert chain.is_naive
    row = train[0]
    for stage, report, y in zip(chain.stages, chain.report, train[1:], strict=True):
        joined = np.concatenate((row, y), axis=1)
        values, axes = np.linalg.svd(joined - joined.mean(0), full_matrices=False)[1:]
        components = stage.components.double().numpy()
        N = y.shape[1]
        assert _angle(components, axes[:N]) <= 1e-6
        assert report["explained"] == pytest.approx((values[:N] ** 2).sum() / (values**2).sum(), abs=1e-9)
        row = (joined - stage.mean.double().numpy()) @ components.T
        np.testing.assert_allclose(row.mean(0), 0, atol=1e-6)


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_rank_deficient_inputs(regressor: str) -> None:
    """Doubled and constant columns: the held-out R² is that of the minimum-norm solution."""
    deficient = []
    for rows in _data():
        first = rows[0].copy()
        first[:, 5] = first[:, 4]
        first[:, 6] = first[:, 0] - 2 * first[:, 1]
        first[:, 7] = 1.0
        second = rows[1].copy()
        second[:, 11] = second[:, 10]
        deficient.append([first, second, rows[2]])
    train, held_out = deficient
    chain = fit_chain(_pair(train, held_out), regressor=regressor)
    assert all(torch.isfinite(tensor).all() for stage in chain.stages for tensor in stage.tensors().values())
    rows_so_far = [train[0], held_out[0]]
    for stage, report, y, y_out in zip(chain.stages, chain.report, train[1:], held_out[1:], strict=True):
        weight, bias, _, _ = _parts(stage)
        got = _r2(y_out, rows_so_far[1] @ weight + bias)
        assert abs(got - report["held_out_r2"]) <= 1e-4
        if regressor == "linear":
            direct = np.linalg.lstsq(rows_so_far[0] - rows_so_far[0].mean(0), y - y.mean(0), rcond=1e-6)[0]
            wanted = _r2(y_out, (rows_so_far[1] - rows_so_far[0].mean(0)) @ direct + y.mean(0))
            assert abs(got - wanted) <= 1e-4
        rows_so_far = [_append(row, new, stage) for row, new in zip(rows_so_far, (y, y_out), strict=True)]


def test_nothing_left_to_add_gives_constant_dimensions() -> None:
    """A larger model that is a linear image of the smaller one: the new dimensions are zero, and said to be dropped."""
    train, held_out = ([rows[0], rows[0] @ np.ones((8, 12)) + rows[0] @ np.eye(8, 12)] for rows in _data())
    chain = fit_chain(_pair(train, held_out), regressor="linear")
    assert chain.report[0]["dropped"] >= 1
    assert chain.report[0]["held_out_r2"] == pytest.approx(1)
    row = _append(held_out[0], held_out[1], chain.stages[0])
    np.testing.assert_allclose(row[:, 8:], 0, atol=1e-4)


def test_same_fit_twice_and_from_merged_halves() -> None:
    train, held_out = _data()
    whole = fit_chain(_pair(train, held_out))
    assert fit_chain(_pair(train, held_out)).fingerprint == whole.fingerprint
    first = _pair([rows[:1500] for rows in train], [rows[:200] for rows in held_out])
    first.merge(_pair([rows[1500:] for rows in train], [rows[200:] for rows in held_out]))
    merged = fit_chain(first)
    for one, other in zip(merged.stages, whole.stages, strict=True):
        for name, tensor in one.tensors().items():
            torch.testing.assert_close(tensor, other.tensors()[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_report_is_what_the_rows_say(regressor: str) -> None:
    train, held_out = _data()
    chain = fit_chain(_pair(train, held_out), regressor=regressor)
    rows = [train[0], held_out[0]]
    for stage, report, *new in zip(chain.stages, chain.report, train[1:], held_out[1:], strict=True):
        weight, bias, _, components = _parts(stage)
        for name, explained, row, y in zip(
            ("train_r2", "held_out_r2"), ("explained", "held_out_explained"), rows, new, strict=True
        ):
            assert report[name] == pytest.approx(_r2(y, row @ weight + bias), abs=1e-6)
            residual = y - row @ weight - bias
            residual -= residual.mean(0)
            share = np.square(residual @ components.T).sum() / np.square(residual).sum()
            assert report[explained] == pytest.approx(share, abs=1e-6)
        X = rows[0].shape[1]
        rows = [_append(row, y, stage) for row, y in zip(rows, new, strict=True)]
        correlations = np.corrcoef(rows[1].T)[:X, X:]
        assert report["max_correlation"] == pytest.approx(np.abs(correlations).max(), abs=1e-5)


# As at inference


@functools.cache
def _fitted_on_proteins() -> tuple[GramPair, tuple[str, ...]]:
    """A pass over proteins of which more than 500 are held out."""
    proteins = random_proteins(5600, seed=11, longest=20)
    held_out = tuple(sequence for sequence in proteins if is_held_out(sequence, every=10))
    family = tiny_family()
    pair = GramPair.empty(chain_models(family))
    accumulate(family, proteins, pair, max_tokens=4096)
    assert len(held_out) == pair.sequences[1] >= 500
    return pair, held_out


def _r2_at_inference(chain: Chain, sequences: Sequence[str]) -> list[float]:
    """Of each stage's regression, on the rows that the embedder gives it."""
    family = tiny_family()
    scores = []
    for stage, count in zip(chain.stages, itertools.count(1), strict=False):
        rows = Embedder(family[:count], chain=chain, pool="residue").embed(sequences)
        row = np.concatenate([np.asarray(each, dtype=np.float64) for each in rows])
        y = np.concatenate([each.astype(np.float64) for each in family[count].encode(sequences)])
        weight, bias, _, _ = _parts(stage)
        scores.append(_r2(y, row @ weight + bias))
    return scores


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_held_out_r2_at_inference_is_that_of_training(regressor: str) -> None:
    pair, held_out = _fitted_on_proteins()
    chain = fit_chain(pair, regressor=regressor)
    for score, report in zip(_r2_at_inference(chain, held_out), chain.report, strict=True):
        assert score >= report["train_r2"] - 0.02
        assert score == pytest.approx(report["held_out_r2"], abs=1e-3)
        assert report["train_r2"] > 0.04, "nothing to lose"


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_the_published_mismatch_fails_that_test(regressor: str) -> None:
    pair, held_out = _fitted_on_proteins()
    right = fit_chain(pair, regressor=regressor)
    first, second = _r2_at_inference(fit_chain_on_raw(pair, regressor=regressor), held_out)
    assert first >= right.report[0]["train_r2"] - 0.02
    assert second < right.report[1]["train_r2"] - 0.02


# The command, and the way from it to embeddings


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from protnest.engine.checkpoint import save_checkpoint

    home = tmp_path_factory.mktemp("models")
    for encoder in tiny_family():
        save_checkpoint(encoder, home / encoder.name)
    return [str(home / encoder.name) for encoder in tiny_family()]


def _run(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_from_fasta_to_nested_embeddings(tmp_path: Path, folders: list[str]) -> None:
    fasta = str(write_fasta(tmp_path / "in.fasta", random_proteins(80, seed=4, longest=60)))
    chain = str(tmp_path / "chain.safetensors")
    models = ",".join(folders)
    fitted = _run("fit-chain", fasta, "--models", models, "--out", chain)
    assert fitted["widths"] == [16, 24, 40]
    assert fitted["train_sequences"] + fitted["held_out_sequences"] == 80
    assert len(fitted["stages"]) == 2
    assert Path(fitted["gram"]) == tmp_path / "chain.safetensors.gram"
    again = _run("fit-chain", fasta, "--models", models, "--out", chain + "2", "--gram", fitted["gram"])
    assert Chain.load(chain + "2").fingerprint == Chain.load(chain).fingerprint
    assert again["stages"] == fitted["stages"]

    for pool in ("mean", "residue"):
        base = ["embed", fasta, "--chain", chain, "--model", models, "--pool", pool, "--shard-records", "30"]
        out = {name: str(tmp_path / f"{pool}-{name}") for name in ("whole", "sequential", "cut")}
        report = _run(*base, "--out", out["whole"])
        assert report["model"] == "tiny16,tiny24,tiny40"
        assert report["width"] == 40
        _run(*base, "--out", out["sequential"], "--sequential")
        assert _run(*base, "--out", out["cut"], "--dims", "20")["model"] == "tiny16,tiny24"
        whole, sequential, cut = (read_embeddings(out[name]) for name in ("whole", "sequential", "cut"))
        assert np.array_equal(np.asarray(whole.array), np.asarray(sequential.array))
        assert np.array_equal(np.asarray(whole.array)[:, :20], np.asarray(cut.array))
        assert cut.run["settings"]["dims"] == [16, 20]
        assert whole.run["settings"]["chain_fingerprint"] == Chain.load(chain).fingerprint
        assert whole.run["settings"]["max_residues"] == 20
        assert whole.run["settings"]["model_fingerprints"] == [e.fingerprint for e in tiny_family()]
        assert _run(*base, "--out", out["whole"])["resumed"] == 80

    _run("fit-chain", fasta, "--models", models, "--out", chain, "--regressor", "linear")
    other = CliRunner().invoke(app, [*base, "--out", out["whole"]])
    assert other.exit_code == 1
    assert "chain_fingerprint" in other.output
    assert "other settings" in other.output


def test_naive_command(tmp_path: Path, folders: list[str]) -> None:
    fasta = str(write_fasta(tmp_path / "in.fasta", random_proteins(80, seed=4)))
    chain = str(tmp_path / "chain.safetensors")
    models = ",".join(folders[:2])
    assert _run("fit-chain", fasta, "--models", models, "--out", chain, "--naive")["regressor"] == "naive"
    report = _run("embed", fasta, "--chain", chain, "--model", models, "--out", str(tmp_path / "out"))
    assert report["width"] == 24


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--models", "{1},{0}"], "widths must grow along a chain: tiny24 has 24, tiny16 after it 16"),
        (["--models", "{0}"], "a chain takes at least two models, got 1"),
        (["--models", "{0},nano-q"], "no model 'nano-q'"),
    ],
)
def test_wrong_command(tmp_path: Path, folders: list[str], words: list[str], problem: str) -> None:
    fasta = str(write_fasta(tmp_path / "in.fasta", random_proteins(20)))
    given = [word.format(*folders) for word in words]
    result = CliRunner().invoke(app, ["fit-chain", fasta, "--out", str(tmp_path / "c"), *given])
    assert result.exit_code == 1
    assert problem in result.output


def test_embedding_with_the_wrong_models(tmp_path: Path, folders: list[str]) -> None:
    fasta = str(write_fasta(tmp_path / "in.fasta", random_proteins(80, seed=4)))
    chain = str(tmp_path / "chain.safetensors")
    _run("fit-chain", fasta, "--models", ",".join(folders), "--out", chain)
    other = str(save_tiny_model(tmp_path / "other"))
    base = ["embed", fasta, "--out", str(tmp_path / "out")]
    for words, problem in (
        (["--chain", chain, "--model", f"{folders[1]},{folders[0]}"], "got its tiny24: the order must be"),
        (["--chain", chain, "--model", f"{folders[0]},{other}"], "got other of width 32"),
        (["--chain", chain, "--model", ",".join(folders), "--dims", "41"], "dims is 41; this chain gives 1 to 40"),
        (["--model", ",".join(folders)], "3 models and no chain"),
        (["--chain", fasta, "--model", folders[0]], "not a readable chain"),
        (["--chain", chain + "x", "--model", folders[0]], "no such file"),
    ):
        result = CliRunner().invoke(app, [*base, *words])
        assert result.exit_code == 1, words
        assert problem in result.output


# What cannot be fitted


def test_fewer_residues_than_dimensions() -> None:
    train, held_out = _data()
    few = [rows[:40] for rows in train]
    with pytest.raises(
        InputError, match=re.escape("40 residues are too few to fit 40 dimensions (8 + 12 + 20): add seq")
    ):
        fit_chain(_pair(few, held_out))


def test_nothing_held_out() -> None:
    train, held_out = _data()
    with pytest.raises(InputError, match="none of 100 sequences is held out: one in ten is, by hash"):
        fit_chain(_pair(train, [rows[:0] for rows in held_out]))


def test_embeddings_that_do_not_vary() -> None:
    train, held_out = ([rows[0], np.ones_like(rows[1])] for rows in _data())
    with pytest.raises(InputError, match="the embeddings do not vary: nothing to fit for m12"):
        fit_chain(_pair(train, held_out))


def test_unknown_regressor() -> None:
    with pytest.raises(ValueError, match="regressor is 'lasso'; allowed: pcr, ridge, linear, naive"):
        fit_chain(_pair(*_data()), regressor="lasso")
