"""Files written by earlier releases are read by this one. An archive is never rewritten; a new schema adds its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from protnest.engine import Chain, read_embeddings
from protnest.engine.chain import SCHEMA_VERSION as CHAIN_VERSION
from protnest.engine.ridge_head import SCHEMA_VERSION as HEAD_VERSION
from protnest.engine.ridge_head import RidgeHead
from protnest.engine.store import SCHEMA_VERSION
from protnest.engine.verify import verify_store

ARCHIVES = Path(__file__).resolve().parent.parent / "archives"


@pytest.mark.parametrize(
    ("pool", "rows", "total"), [("mean", 2, 5.2095489501953125), ("residue", 66, 163.42317962646484)]
)
def test_store_version_1(pool: str, rows: int, total: float) -> None:
    folder = ARCHIVES / f"store-v1-{pool}"
    embeddings = read_embeddings(folder)
    assert embeddings.run["schema_version"] == 1
    assert embeddings.ids == ["a", "a"]
    assert embeddings.array.shape == (rows, 32)
    assert float(np.asarray(embeddings.array, dtype=np.float64).sum()) == total
    index = pq.read_table(folder / "index.parquet").to_pydict()
    assert index == {
        "position": [0, 2],
        "id": ["a", "a"],
        "header": ["a first", "a again"],
        "length": [5, 61],
        "flags": ["", "windowed"],
    }
    if pool == "residue":
        assert embeddings.offsets is not None
        assert embeddings.offsets.tolist() == [0, 5, 66]


@pytest.mark.parametrize(
    ("kind", "rows", "total"),
    [
        ("mean", 3, 8.1158447265625),
        ("dedup", 3, 8.1158447265625),
        ("residue", 71, 186.2700638771057),
        ("dedup-residue", 71, 186.2700638771057),
    ],
)
def test_store_version_2(kind: str, rows: int, total: float) -> None:
    """The first and the third protein are alike: with dedup they share an embedding, and read as if they did not."""
    folder = ARCHIVES / f"store-v2-{kind}"
    embeddings = read_embeddings(folder)
    assert embeddings.run["schema_version"] == 2
    assert embeddings.ids == ["a", "a", "b|1"]
    assert embeddings.array.shape == (rows, 32)
    assert embeddings.array.dtype == np.float16
    assert float(np.asarray(embeddings.array, dtype=np.float64).sum()) == total
    assert np.array_equal(embeddings[0], embeddings[2])
    is_dedup = kind.startswith("dedup")
    index = pq.read_table(folder / "index.parquet").to_pydict()
    assert index == {
        "position": [0, 2, 3],
        "id": ["a", "a", "b|1"],
        "header": ["a first", "a again", "b|1 as the first"],
        "length": [5, 61, 5],
        "flags": ["", "windowed", ""],
        "row": [0, 1, 0] if is_dedup else [0, 1, 2],
    }
    assert embeddings.run["rows"] == len(embeddings.run["shards"]) == (2 if is_dedup else 3)
    if kind.endswith("residue"):
        assert embeddings.offsets is not None
        assert embeddings.offsets.tolist() == [0, 5, 66, 71]


@pytest.mark.parametrize("folder", sorted(ARCHIVES.glob("store-v*")), ids=lambda folder: folder.name)
def test_stores_verify(folder: Path) -> None:
    found = verify_store(folder)
    assert found.damages == []
    assert any("no checksums" in note for note in found.notes) == ("-v1-" in folder.name)


@pytest.mark.parametrize(
    ("kind", "fingerprint"),
    [("nested", "530ebb1685377a015f2115a6230e3cee"), ("naive", "60d3e1a75446afca0c5f2c3448a0d68b")],
)
def test_chain_version_1(kind: str, fingerprint: str) -> None:
    chain = Chain.load(ARCHIVES / f"chain-v1-{kind}.safetensors")
    assert chain.fingerprint == fingerprint
    assert chain.is_naive == (kind == "naive")
    assert chain.widths == (4, 8, 12)
    assert [model.name for model in chain.models] == ["tiny4", "tiny8", "tiny12"]
    assert chain.max_residues == 20
    assert [stage["held_out_r2"] for stage in chain.report] == [0.5, 0.25]


def test_head_version_1() -> None:
    head = RidgeHead.load(ARCHIVES / "head-v1.safetensors")
    assert head.fingerprint == "7dae37fbf935ea162dd3741198278938"
    assert head.chain_fingerprint == "530ebb1685377a015f2115a6230e3cee"
    assert [model.name for model in head.models] == ["tiny4", "tiny8", "tiny12"]
    assert (head.width, head.pooling, head.region, head.strength) == (12, "site", (3, 12), 0.01)
    assert (head.data["wild_type"]["residues"], head.data["variants"], head.data["spearman"]) == (20, 60, 0.5)
    assert head.predict(np.eye(12)).tolist() == [0.25 + place / 8 for place in range(12)]


def test_every_schema_version_has_an_archive() -> None:
    for version in range(1, SCHEMA_VERSION + 1):
        assert list(ARCHIVES.glob(f"store-v{version}-*"))
    for version in range(1, CHAIN_VERSION + 1):
        assert list(ARCHIVES.glob(f"chain-v{version}-*"))
    for version in range(1, HEAD_VERSION + 1):
        assert list(ARCHIVES.glob(f"head-v{version}*"))
