"""Reading stores back, and their copies in other formats."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from protnest.engine import Embedder, InputError, embed_library, load_model, read_embeddings, sharded_array
from protnest.engine import embeddings as embeddings_module
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
    return {name: root / name for name in ("mean", "residue", "tiny")}


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
    with pytest.raises(IndexError, match=r"array\[3\]\[:5\], not array\[3, :5\]"):
        array[0, 1]  # type: ignore[index]
    with pytest.raises(IndexError, match="by whole numbers, a slice or a mask, got float64"):
        array[[0.5]]
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


@pytest.mark.parametrize("pool", ["mean", "residue"])
def test_equal_sequences_read_as_if_each_had_its_own(tmp_path: Path, stores: dict[str, Path], pool: str) -> None:
    """A store with --dedup gives what one without gives, whichever way its array is asked."""
    sequences = [*SEQUENCES[:3], SEQUENCES[1], "MKT", *SEQUENCES[3:9], "MKT", SEQUENCES[0], SEQUENCES[1]]
    fasta = write_fasta(tmp_path / "in.fasta", sequences)
    embedder = Embedder(load_model(stores["tiny"], device="cpu", precision="fp32"), pool=pool)
    embed_library(fasta, tmp_path / "plain", embedder, LibraryOptions(shard_records=4))
    embed_library(fasta, tmp_path / "shared", embedder, LibraryOptions(shard_records=4, dedup=True))
    plain, shared = read_embeddings(tmp_path / "plain"), read_embeddings(tmp_path / "shared")
    assert plain.row_N is None
    assert shared.row_N is not None
    assert shared.row_N.tolist() == [0, 1, 2, 1, 3, 4, 5, 6, 7, 8, 9, 3, 0, 1]
    assert shared.ids == plain.ids
    assert len(shared) == 14
    whole = np.asarray(plain.array)
    array = shared.array
    assert (array.shape, array.dtype, len(array)) == (whole.shape, whole.dtype, len(whole))
    count = len(whole)
    mask = np.arange(count) % 3 == 0
    spans = (slice(None), slice(3, 4), slice(2, 12), slice(-3, None), slice(9, 2), slice(None, None, 7))
    for key in (0, -1, np.int64(5), [3, -1, 3], np.array([[1, 2], [11, 0]]), mask, *spans, slice(12, 3, -4)):
        got, expected = array[key], whole[key]  # type: ignore[index]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    assert array[[]].shape == (0, 32)
    with pytest.raises(IndexError, match=f"outside of {count} rows"):
        array[count]
    for place in range(14):
        np.testing.assert_allclose(shared[place], plain[place], rtol=0, atol=2e-5)
        assert np.array_equal(shared[place], shared[sequences.index(sequences[place])])
    if pool == "residue":
        assert shared.offsets is not None
        assert np.array_equal(shared.offsets, np.cumsum([0, *map(len, sequences)]))
    stored = [(first, rows.shape) for first, rows in shared.shard_arrays()]
    assert sum(shape[0] for _, shape in stored) < count
    lines = pq.read_table(tmp_path / "shared" / "index.parquet")
    wrong = lines.set_column(5, "row", [[99] * 14])
    pq.write_table(wrong, tmp_path / "shared" / "index.parquet")
    with pytest.raises(InputError, match=r"index\.parquet: names embeddings up to 99, but there are 10"):
        read_embeddings(tmp_path / "shared")


def test_random_access_by_id(stores: dict[str, Path], whole: npt.NDArray[np.float32]) -> None:
    embeddings = read_embeddings(stores["mean"])
    assert embeddings.rows_of("protein7") == [7]
    assert embeddings.rows_of("a/b|c") == [4, 5]
    embeddings.rows_of("a/b|c").append(9)
    assert embeddings.rows_of("a/b|c") == [4, 5]
    assert np.array_equal(embeddings.by_id("a/b|c"), whole[4])
    assert np.array_equal(embeddings.by_id("protein22"), whole[22])
    residues = read_embeddings(stores["residue"])
    assert np.array_equal(residues.by_id("protein3"), residues[3])
    for wanted, near in (
        ("PROTEIN7", "near: protein7$"),
        ("sp|protein8|X", "near: protein8$"),
        ("b|c", r"near: a/b\|c$"),
        ("proteni12", "near: protein12"),
        ("nothing", "holds no protein 'nothing'$"),
    ):
        with pytest.raises(InputError, match=near):
            embeddings.by_id(wanted)


def test_shards_are_seen_without_a_copy(stores: dict[str, Path], whole: npt.NDArray[np.float32]) -> None:
    found = list(read_embeddings(stores["mean"]).shard_arrays())
    assert [first for first, _ in found] == [0, 5, 10, 15, 20]
    assert all(isinstance(rows, np.memmap) and not rows.flags.writeable for _, rows in found)
    assert np.array_equal(np.concatenate([rows for _, rows in found]), whole)


def test_many_shards_hold_few_files_open(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_array, "_OPEN_AT_ONCE", 2)
    array = read_embeddings(stores["mean"]).array
    before = len(list(Path("/proc/self/fd").iterdir()))
    for key in (slice(None), np.random.default_rng(0).permutation(23)):
        array[key]
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_arrow_batches(stores: dict[str, Path], whole: npt.NDArray[np.float32]) -> None:
    reader = read_embeddings(stores["mean"]).to_arrow(proteins_at_once=10)
    assert str(reader.schema.field("embedding").type) == "fixed_size_list<item: float>[32]"
    batches = list(reader)
    assert [len(batch) for batch in batches] == [10, 10, 3]
    assert np.array_equal(np.array(batches[1]["embedding"].to_pylist(), np.float32), whole[10:20])
    residues = read_embeddings(stores["residue"])
    table = residues.to_arrow(proteins_at_once=4).read_all()
    assert table["id"].to_pylist() == residues.ids
    for place in (0, 4, 22):
        assert np.array_equal(np.array(table["embedding"][place].as_py(), np.float32), residues[place])


def test_arrow_batches_of_residues_are_bounded(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes: so many that fit, and at least one protein."""
    residues = read_embeddings(stores["residue"])
    assert residues.offsets is not None
    lengths = np.diff(residues.offsets)
    most = int(np.median(lengths)) * 3
    monkeypatch.setattr(embeddings_module, "_ARROW_BYTES", most * 32 * 4)
    batches = list(residues.to_arrow())
    assert pa.Table.from_batches(batches)["id"].to_pylist() == residues.ids
    begin = 0
    for batch in batches:
        rows = int(lengths[begin : begin + len(batch)].sum())
        assert rows <= most or len(batch) == 1
        begin += len(batch)
        assert begin == len(residues) or rows + lengths[begin] > most
    monkeypatch.setattr(embeddings_module, "_ARROW_BYTES", 1)
    assert [len(batch) for batch in residues.to_arrow()] == [1] * len(residues)


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
    (tmp_path / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"index\.parquet: not a readable index"):
        read_embeddings(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**run, "settings": {**run["settings"], "storage_dtype": "fp16"}}))
    with pytest.raises(InputError, match=r"part-00000.* float16 and shape \(n, 32\) expected, got float32 \(5, 32"):
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
    with pytest.raises(InputError, match="format is 'xls'; allowed: safetensors, parquet, h5, npy, pt, h5ad, csv"):
        check_format("xls")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'protnest\[h5\]'"):
        check_format("h5")
