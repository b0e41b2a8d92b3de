"""Files written by earlier releases are read by this one. An archive is never rewritten; a new schema adds its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from protnest.engine import read_embeddings
from protnest.engine.store import SCHEMA_VERSION

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


def test_every_schema_version_has_an_archive() -> None:
    for version in range(1, SCHEMA_VERSION + 1):
        assert list(ARCHIVES.glob(f"store-v{version}-*"))
