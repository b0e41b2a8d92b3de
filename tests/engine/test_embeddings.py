"""Reading stores back, and their copies in other formats."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from protnest.engine import Embedder, InputError, embed_library, load_model, read_embeddings
from protnest.engine import formats as formats_module
from protnest.engine.formats import check_format, convert
from protnest.engine.library import LibraryOptions
from protnest.engine.store import SCHEMA_VERSION

from support.tiny import random_proteins, save_tiny_model, write_fasta

SEQUENCES = random_proteins(23, seed=3)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of 23 proteins in shards of 5, mean-pooled and residue by residue; ids 4 and 5 are equal and hostile."""
    root = tmp_path_factory.mktemp("stores")
    model = load_model(save_tiny_model(root / "tiny"), device="cpu", precision="fp32")
    fasta = write_fasta(root / "in.fasta", SEQUENCES)
    fasta.write_text(fasta.read_text().replace("protein4 ", "a/b|c ").replace("protein5 ", "a/b|c "))
    for pool in ("mean", "residue"):
        embed_library(fasta, root / pool, Embedder(model, pool=pool), LibraryOptions(shard_records=5))
    return {pool: root / pool for pool in ("mean", "residue")}


@pytest.fixture
def whole(stores: dict[str, Path]) -> npt.NDArray[np.float32]:
    return np.asarray(read_embeddings(stores["mean"]).array)


def test_array_behaves_like_an_array(stores: dict[str, Path], whole: npt.NDArray[np.float32]) -> None:
    array = read_embeddings(str(stores["mean"])).array
    assert (array.shape, array.dtype, array.ndim, len(array)) == ((23, 32), np.dtype(np.float32), 2, 23)
    for key in (0, 4, 5, 22, -1, -23, np.int64(7)):
        assert np.array_equal(array[key], whole[key])
    spans = (slice(None), slice(3, 4), slice(4, 16), slice(5, 10), slice(-3, None), slice(9, 2), slice(None, None, 7))
    for span in (*spans, slice(20, 3, -4), slice(40, 50)):
        assert np.array_equal(array[span], whole[span])
    rows = np.array([22, 0, -1, 7, 7])
    assert np.array_equal(array[rows], whole[rows])
    assert np.array_equal(array[[3, 1]], whole[[3, 1]])
    mask = np.arange(23) % 3 == 0
    assert np.array_equal(array[mask], whole[mask])
    assert np.asarray(array, dtype=np.float64).dtype == np.float64


def test_array_refuses_what_is_outside(stores: dict[str, Path]) -> None:
    array = read_embeddings(stores["mean"]).array
    for key in (23, -24, [0, 99]):
        with pytest.raises(IndexError, match="outside of 23 rows"):
            array[key]
    with pytest.raises(IndexError, match="a mask over 23 rows"):
        array[np.array([True, False])]
    with pytest.raises(ValueError, match="always a copy"):
        np.array(array, copy=False)


def test_proteins_one_by_one(stores: dict[str, Path], whole: npt.NDArray[np.float32]) -> None:
    pooled, residues = read_embeddings(stores["mean"]), read_embeddings(stores["residue"])
    assert pooled.offsets is None
    assert residues.offsets is not None
    assert len(pooled) == len(residues) == 23
    assert pooled.ids[4] == pooled.ids[5] == "a/b|c"
    for row, sequence in enumerate(SEQUENCES):
        assert residues[row].shape == (len(sequence), 32)
        np.testing.assert_allclose(residues[row].mean(axis=0), whole[row], rtol=0, atol=1e-5)
        assert np.array_equal(pooled[row - 23], whole[row])
    assert np.array_equal(residues[-1], residues[22])
    for row in (23, -24):
        with pytest.raises(IndexError, match="protein"):
            pooled[row]


def test_what_is_no_store_is_refused(tmp_path: Path, stores: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no such file: this folder holds no embeddings"):
        read_embeddings(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="not a readable run"):
        read_embeddings(tmp_path)
    run = json.loads((stores["mean"] / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "schema_version": 99}))
    with pytest.raises(InputError, match=f"schema version 99, this release reads {SCHEMA_VERSION}"):
        read_embeddings(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**run, "complete": False}))
    with pytest.raises(InputError, match=r"not finished \(23 rows so far\)"):
        read_embeddings(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"part-00000\.safetensors: not a readable shard"):
        read_embeddings(tmp_path)
    for part in stores["mean"].glob("part-*"):
        (tmp_path / part.name).write_bytes(part.read_bytes())
    pq.write_table(pq.read_table(stores["mean"] / "index.parquet").slice(1), tmp_path / "index.parquet")
    with pytest.raises(InputError, match="23 embeddings, but the index lists 22"):
        read_embeddings(tmp_path)


def test_npy(tmp_path: Path, stores: dict[str, Path], whole: npt.NDArray[np.float32]) -> None:
    assert np.array_equal(np.load(convert(read_embeddings(stores["mean"]), tmp_path, "npy")), whole)
    residues = read_embeddings(stores["residue"])
    flat = np.load(convert(residues, tmp_path, "npy"))
    offsets = np.load(tmp_path / "offsets.npy")
    assert np.array_equal(flat[offsets[6] : offsets[7]], residues[6])


def test_parquet(
    tmp_path: Path, stores: dict[str, Path], whole: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats_module, "_ROWS_AT_ONCE", 7)
    table = pq.read_table(convert(read_embeddings(stores["mean"]), tmp_path, "parquet"))
    assert table["id"].to_pylist() == read_embeddings(stores["mean"]).ids
    assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), whole)
    residues = read_embeddings(stores["residue"])
    lists = pq.read_table(convert(residues, tmp_path, "parquet"))["embedding"].to_pylist()
    for row in range(23):
        assert np.array_equal(np.array(lists[row], dtype=np.float32), residues[row])


def test_h5_follows_bio_embeddings(tmp_path: Path, stores: dict[str, Path]) -> None:
    residues = read_embeddings(stores["residue"])
    with h5py.File(convert(residues, tmp_path, "h5")) as file:
        assert len(file) == 23
        assert file["4"].attrs["original_id"] == "a/b|c"
        assert np.array_equal(file["5"][:], residues[5])


@pytest.mark.parametrize(("pool", "key"), [("mean", "mean_representations"), ("residue", "representations")])
def test_pt_follows_fair_esm(tmp_path: Path, stores: dict[str, Path], pool: str, key: str) -> None:
    embeddings = read_embeddings(stores[pool])
    folder = convert(embeddings, tmp_path, "pt")
    assert len(list(folder.iterdir())) == 23
    for name, row in (("protein7", 7), ("a_b|c", 4), ("a_b|c.2", 5)):
        content = torch.load(folder / f"{name}.pt", weights_only=True)
        assert content["label"] == embeddings.ids[row]
        assert np.array_equal(content[key][2].numpy(), embeddings[row])


def test_unknown_format_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="format is 'csv'; allowed: safetensors, parquet, h5, npy, pt"):
        check_format("csv")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'protnest\[h5\]'"):
        check_format("h5")
