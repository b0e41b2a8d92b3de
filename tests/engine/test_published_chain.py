"""Published npz scalers: applied as their own formulas say, told apart by their means, refused where they are damaged.

Shapes: p width of a stage's input, D of the new model, k components kept, R rows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from protnest.engine import Chain, InputError
from protnest.engine.cli import app
from protnest.engine.published_chain import read_published
from typer.testing import CliRunner

Floats = npt.NDArray[np.float64]
Files = list[dict[str, Any]]

WIDTHS = (6, 9, 15)


def _stage(rng: np.random.Generator, p: int, D: int, *, input_mean: Floats, output_mean: Floats) -> dict[str, Any]:
    """A pcr file's arrays, named and shaped as published."""
    components = np.linalg.qr(rng.normal(size=(p, p)))[0]
    k = p - 2
    return {
        "regressor__coef_": rng.normal(size=(D, k)),
        "regressor__intercept_": rng.normal(size=D),
        "regressor__input_mean_": input_mean,
        "regressor__output_mean_": output_mean,
        "regressor__input_components_": components,
        "regressor__input_eigenvalues_": np.sort(rng.random(p))[::-1],
        "regressor__n_significant_pcs_": np.array(k),
        "regressor__johnstone_threshold_": np.array(0.1),
        "regressor__sigma_sq_": np.array(0.1),
        "pca__mean_": rng.normal(size=D),
        "pca__components_": np.linalg.qr(rng.normal(size=(D, D - p)))[0].T,
        "pca__explained_variance_": rng.random(D - p),
        "pca__explained_variance_ratio_": rng.random(D - p),
        "pca__n_components": np.array(D - p),
    }


def _pcr(fitted_on: str) -> Files:
    rng = np.random.default_rng(0)
    raw = [rng.normal(size=width) + 3 for width in WIDTHS]
    later = {
        "raw": raw[1],
        "accumulated": np.concatenate((raw[0], np.zeros(3))),
        "unknown": rng.normal(size=WIDTHS[1]) + 3,
    }[fitted_on]
    return [
        _stage(rng, 6, 9, input_mean=raw[0], output_mean=raw[1]),
        _stage(rng, 9, 15, input_mean=later, output_mean=raw[2]),
    ]


def _linear() -> Files:
    rng = np.random.default_rng(1)
    files = []
    for p, D in ((6, 9), (9, 15)):
        kept = _stage(rng, p, D, input_mean=np.zeros(p), output_mean=np.zeros(D))
        arrays = {name: array for name, array in kept.items() if name.startswith("pca__")}
        arrays["regressor__coef_"] = rng.normal(size=(D, p))
        arrays["regressor__intercept_"] = rng.normal(size=D)
        arrays |= {"regressor__n_features_in_": np.array(p), "regressor__rank_": np.array(p)}
        files.append(arrays)
    return files


def _naive() -> Files:
    rng = np.random.default_rng(2)
    return [
        {
            "pca__mean_": rng.normal(size=p + D),
            "pca__components_": np.linalg.qr(rng.normal(size=(p + D, D)))[0].T,
        }
        for p, D in ((6, 9), (9, 15))
    ]


def _save(folder: Path, files: Files, *, dtype: Any = np.float32) -> list[Path]:
    paths = []
    for number, arrays in enumerate(files):
        paths.append(folder / f"rd-scaler-{number}.npz")
        stored = {name: array.astype(dtype) if array.ndim else array for name, array in arrays.items()}
        np.savez(paths[-1], **stored)
    return paths


def _published(files: Files, embeddings: list[Floats]) -> Floats:
    """What the published formulas make of raw embeddings, stage by stage."""
    row = embeddings[0]
    for arrays, y in zip(files, embeddings[1:], strict=True):
        if "regressor__coef_" not in arrays:
            row = (np.concatenate((row, y), axis=1) - arrays["pca__mean_"]) @ arrays["pca__components_"].T
            continue
        if "regressor__input_components_" in arrays:
            kept = int(arrays["regressor__n_significant_pcs_"])
            scores = (row - arrays["regressor__input_mean_"]) @ arrays["regressor__input_components_"][:, :kept]
            predicted = scores @ arrays["regressor__coef_"].T + arrays["regressor__intercept_"]
            predicted = predicted + arrays["regressor__output_mean_"]
        else:
            predicted = row @ arrays["regressor__coef_"].T + arrays["regressor__intercept_"]
        residual = y - predicted
        row = np.concatenate((row, (residual - arrays["pca__mean_"]) @ arrays["pca__components_"].T), axis=1)
    return row


def _applied(chain: Chain, embeddings: list[Floats]) -> Floats:
    """The chain's folds on the same embeddings, with LayerNorms that do nothing."""
    row = torch.from_numpy(embeddings[0])
    for stage, y in zip(chain.stages, embeddings[1:], strict=True):
        fold = stage.fold(torch.ones(y.shape[1]), torch.zeros(y.shape[1]))
        added = torch.from_numpy(y) @ fold.projection_DN.double() + row @ fold.base_XN.double() + fold.offset_N.double()
        row = added if chain.is_naive else torch.cat((row, added), dim=1)
    return row.numpy()


@pytest.mark.parametrize(
    ("files", "regressor", "fitted_on"),
    [
        (_pcr("raw"), "pcr", "raw"),
        (_pcr("accumulated"), "pcr", "accumulated"),
        (_pcr("unknown"), "pcr", "unknown"),
        (_pcr("raw")[:1], "pcr", "accumulated"),
        (_linear(), "linear", "unknown"),
        (_naive(), "naive", "unknown"),
    ],
    ids=["raw", "accumulated", "neither", "one stage", "linear", "naive"],
)
def test_published_files(tmp_path: Path, files: Files, regressor: str, fitted_on: str) -> None:
    chain = read_published(_save(tmp_path, files)[::-1])
    assert chain.regressor == regressor
    assert chain.fitted_on == fitted_on
    assert chain.widths == WIDTHS[: len(files) + 1]
    assert all(model.fingerprint is None for model in chain.models)
    rng = np.random.default_rng(7)
    embeddings = [rng.normal(size=(20, width)) + 1 for width in chain.widths]
    wanted = _published(files, embeddings)
    np.testing.assert_allclose(_applied(chain, embeddings), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    chain.save(tmp_path / "chain.safetensors")
    assert Chain.load(tmp_path / "chain.safetensors").fitted_on == fitted_on


def test_published_widths_get_published_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = _stage(rng, 320, 480, input_mean=np.zeros(320), output_mean=np.zeros(480))
    chain = read_published(_save(tmp_path, [arrays]))
    assert [model.name for model in chain.models] == ["esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D"]
    assert chain.max_residues == 1022


def test_command(tmp_path: Path) -> None:
    paths = [str(path) for path in _save(tmp_path, _pcr("raw"))]
    out = tmp_path / "chain.safetensors"
    result = CliRunner().invoke(app, ["import-chain", *paths, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["fitted_on"], report["widths"]) == ("raw", list(WIDTHS))
    assert Chain.load(out).fitted_on == "raw"
    told = CliRunner().invoke(app, ["import-chain", *paths, "--out", str(out)])
    assert "fitted on raw embeddings: each stage's input mean is that of a raw embedding" in told.output
    assert CliRunner().invoke(app, ["import-chain", paths[0] + "x", "--out", str(out)]).exit_code == 1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    bad = tmp_path / "bad.npz"
    with pytest.raises(InputError, match="no file: pass the scalers"):
        read_published([])
    with pytest.raises(InputError, match="no such file"):
        read_published([bad])
    bad.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="not a readable npz file of plain arrays"):
        read_published([bad])
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match="is one array, not an npz file"):
        read_published([tmp_path / "one.npy"])
    np.savez(bad, regressor__coef_=np.array([{"code": "runs"}], dtype=object))
    with pytest.raises(InputError, match="not a readable npz file of plain arrays"):
        read_published([bad])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    first, second = _pcr("raw")
    with pytest.raises(InputError, match=re.escape("lacks regressor__intercept_; it holds pca__components_")):
        read_published(_save(tmp_path, [{k: v for k, v in first.items() if k != "regressor__intercept_"}]))
    with pytest.raises(InputError, match="its arrays do not fit each other"):
        read_published(_save(tmp_path, [{**first, "regressor__input_mean_": np.zeros(5)}]))
    later = _stage(np.random.default_rng(0), 10, 15, input_mean=np.zeros(10), output_mean=np.zeros(15))
    with pytest.raises(InputError, match=r"takes rows of 10, but .*rd-scaler-0\.npz, before it, gives 9"):
        read_published(_save(tmp_path, [first, later]))
    with pytest.raises(InputError, match=r"is pcr, but .*rd-scaler-0\.npz is linear"):
        read_published(_save(tmp_path, [_linear()[0], second]))
    with pytest.raises(InputError, match=r"stage 1: components has shape"):
        read_published(_save(tmp_path, [{**first, "pca__components_": np.zeros((2, 9))}]))
