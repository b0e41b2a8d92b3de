"""`protnest convert`: copies of a store under any name, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from protnest.engine import Embedder, InputError, embed_library, load_model, read_embeddings
from protnest.engine import formats as formats_module
from protnest.engine.cli import app
from protnest.engine.formats import convert
from protnest.engine.library import LibraryOptions
from typer.testing import CliRunner

from support.tiny import random_proteins, save_tiny_model, write_fasta

SEQUENCES = [*random_proteins(9, seed=3), *random_proteins(3, seed=3)]
"""The last three are the first three again."""
KINDS = ("mean", "residue", "dedup", "dedup-residue", "half")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    model = load_model(save_tiny_model(root / "tiny"), device="cpu", precision="fp32")
    fasta = write_fasta(root / "in.fasta", SEQUENCES)
    fasta.write_text(fasta.read_text().replace("protein4 ", "a/b,c ").replace("protein5 ", "a/b,c "))
    for kind in KINDS:
        options = LibraryOptions(
            shard_records=4, dedup=kind.startswith("dedup"), storage_dtype="fp16" if kind == "half" else "fp32"
        )
        embed_library(
            fasta, root / kind, Embedder(model, pool="residue" if kind.endswith("residue") else "mean"), options
        )
    return root


def _expected(stores: Path, kind: str) -> list[npt.NDArray[np.float32]]:
    """One array a protein, from a store without equal sequences shared."""
    plain = read_embeddings(stores / kind.removeprefix("dedup-").replace("dedup", "mean"))
    return [plain[place] for place in range(len(plain))]


def _run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def _near(got: object, expected: npt.NDArray[np.float32]) -> None:
    # Batches of a store with --dedup hold other proteins: the last bits may differ.
    np.testing.assert_allclose(np.asarray(got, dtype=np.float32), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["mean", "dedup", "residue", "dedup-residue"])
def test_formats_give_every_protein_its_own(
    tmp_path: Path, stores: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats_module, "_ROWS_AT_ONCE", 5)
    ids, expected = read_embeddings(stores / kind).ids, _expected(stores, kind)
    names = {"parquet": "x.parquet", "npy": "x.npy", "h5": "x.h5", "pt": "x"}
    for to, name in names.items():
        code, _, error = _run(stores / kind, "--to", to, "--out", tmp_path / name)
        assert (code, error) == (0, f"{tmp_path / name}: 12 proteins\n")
    flat = np.load(tmp_path / "x.npy")
    offsets = np.load(tmp_path / "x.offsets.npy") if kind.endswith("residue") else None
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["id"].to_pylist() == ids
    with h5py.File(tmp_path / "x.h5") as file:
        assert len(file) == 12
        for place, each in enumerate(expected):
            assert file[str(place)].attrs["original_id"] == ids[place]
            _near(file[str(place)], each)
            _near(table["embedding"][place].as_py(), each)
            _near(flat[place] if offsets is None else flat[offsets[place] : offsets[place + 1]], each)
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        *(f"protein{place}.pt" for place in range(12) if place not in (4, 5)),
        "a_b,c.pt",
        "a_b,c.2.pt",
    }
    content = torch.load(tmp_path / "x" / "a_b,c.2.pt", weights_only=True)
    _near(content["representations" if kind.endswith("residue") else "mean_representations"][2], expected[5])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["mean", "dedup", "half"])
def test_csv_reads_back_to_the_same_numbers(tmp_path: Path, stores: Path, kind: str) -> None:
    embeddings = read_embeddings(stores / kind)
    assert _run(stores / kind, "--to", "csv", "--out", tmp_path / "x.csv")[0] == 0
    with (tmp_path / "x.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", *(f"e{place}" for place in range(32))]
    assert [row[0] for row in rows] == embeddings.ids
    read = np.array([row[1:] for row in rows], dtype=np.float64).astype(embeddings.array.dtype)
    assert np.array_equal(read, np.asarray(embeddings.array))


@pytest.mark.parametrize("kind", ["mean", "dedup"])
def test_h5ad(tmp_path: Path, stores: Path, kind: str) -> None:
    anndata = pytest.importorskip("anndata")
    embeddings = read_embeddings(stores / kind)
    assert _run(stores / kind, "--to", "h5ad", "--out", tmp_path / "x.h5ad")[0] == 0
    made = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert np.array_equal(made.X, np.asarray(embeddings.array))
    assert list(made.obs_names[3:7]) == ["protein3", "a/b,c", "a/b,c-1", "protein6"]
    assert made.obs["id"].tolist() == embeddings.ids
    assert made.obs["header"].tolist()[0] == "protein0 number 0"
    assert made.obs["length"].tolist() == [len(text) for text in SEQUENCES]
    assert list(made.obs.columns) == ["id", "header", "length", "flags"]
    settings = made.uns["protnest"]["settings"]
    assert (settings["model"], settings["pool"], settings["width"]) == ("tiny", "mean", 32)


@pytest.mark.parametrize("to", ["csv", "h5ad"])
def test_residues_have_no_place_in_some(tmp_path: Path, stores: Path, to: str) -> None:
    code, _, error = _run(stores / "residue", "--to", to, "--out", tmp_path / "x")
    assert code == 1
    assert f"holds one embedding a residue, and {to} takes one a protein; these take both: parquet, h5, npy" in error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="AnnData takes one a protein"):
        read_embeddings(stores / "residue").to_anndata()


def test_missing_anndata_names_the_extra(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'protnest\[anndata\]'"):
        read_embeddings(stores / "mean").to_anndata()
    code, _, error = _run(stores / "mean", "--to", "h5ad")
    assert (code, "pip install 'protnest[anndata]'" in error) == (1, True)


def test_default_place_is_that_of_embed(stores: Path) -> None:
    code, out, _ = _run(stores / "half", "--to", "npy", "--json")
    path = stores / "half" / "embeddings.npy"
    assert (code, json.loads(out)) == (0, {"out": str(path), "format": "npy", "sequences": 12})
    assert path.exists()


@pytest.mark.parametrize(("to", "name"), [("npy", "x.npy"), ("pt", "x"), ("npy", "x.offsets.npy")])
def test_what_is_there_is_kept(tmp_path: Path, stores: Path, to: str, name: str) -> None:
    out = tmp_path / name.replace(".offsets", "")
    if to == "pt":
        out.mkdir()
        (out / "old.pt").write_bytes(b"old")
    else:
        (tmp_path / name).write_bytes(b"old")
    code, _, error = _run(stores / "residue", "--to", to, "--out", out)
    assert code == 1
    assert f"{tmp_path / name}: is there already: choose another --out or --overwrite" in error
    if to == "pt":
        code, _, error = _run(stores / "residue", "--to", to, "--out", out, "--overwrite")
        assert (code, "holds other things than this store's .pt files (old.pt)" in error) == (1, True)
        (out / "old.pt").rename(out / "protein0.pt")
    assert _run(stores / "residue", "--to", to, "--out", out, "--overwrite")[0] == 0
    if to == "pt":
        assert len(list(out.iterdir())) == 12
        assert (out / "protein0.pt").read_bytes() != b"old"
    else:
        assert len(np.load(out)) == sum(map(len, SEQUENCES))


def test_wrong_places_are_refused(tmp_path: Path, stores: Path) -> None:
    code, _, error = _run(stores / "mean", "--to", "npy", "--out", tmp_path / "none" / "x.npy")
    assert (code, "none: there is no such folder" in error) == (1, True)
    code, _, error = _run(stores / "mean", "--to", "csv", "--out", stores / "mean" / "run.json", "--overwrite")
    assert (code, "is the store's own file" in error) == (1, True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    code, _, error = _run(stores / "mean", "--to", "pt", "--out", tmp_path / "thesis", "--overwrite")
    assert (code, "holds other things than this store's .pt files (chapter.txt)" in error) == (1, True)
    (tmp_path / "file").write_text("x")
    code, _, error = _run(stores / "mean", "--to", "pt", "--out", tmp_path / "file", "--overwrite")
    assert (code, "is a file; .pt files are written into a folder" in error) == (1, True)
    code, _, error = _run(stores / "mean", "--to", "csv", "--out", tmp_path / "thesis", "--overwrite")
    assert (code, "is a folder" in error) == (1, True)
    code, _, error = _run(stores / "mean", "--to", "pt", "--out", "/", "--overwrite")
    assert (code, "is no name for a copy" in error) == (1, True)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("to", ["npy", "h5", "h5ad", "csv", "pt", "parquet"])
def test_a_full_disk_names_the_copy(tmp_path: Path, stores: Path, to: str) -> None:
    """A real file system, of 16 kB, and a process of its own, which a memory map and HDF5 would both bring down."""
    if not _may_mount():
        pytest.skip("a file system of its own cannot be mounted here")
    model = load_model(stores / "tiny", device="cpu", precision="fp32")
    embed_library(write_fasta(tmp_path / "in.fasta", random_proteins(300)), tmp_path / "store", Embedder(model))
    out = tmp_path / "small"
    out.mkdir()
    code = "from protnest.engine.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", str(tmp_path / "store"), "--to", to, "--out", str(out / "copy")]
    script = f'mount -t tmpfs -o size=16k tmpfs "{out}" && "$@"; code=$?; ls -A "{out}"; exit $code'
    words = ["unshare", "-m", "sh", "-c", script, "sh", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(rf"error: {re.escape(str(out))}/copy\S*: .*", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def _may_mount() -> bool:
    words = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_failed_copy_leaves_nothing(tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(done: int, total: int) -> None:
        if done > 3:
            message = "No space left on device"
            raise OSError(28, message)

    embeddings = read_embeddings(stores / "mean")
    monkeypatch.setattr(formats_module, "_ROWS_AT_ONCE", 2)
    for to in ("parquet", "npy", "h5", "pt", "csv"):
        with pytest.raises(OSError, match="No space left"):
            convert(embeddings, tmp_path, to, follow=fail)
    assert list(tmp_path.iterdir()) == []


def test_names_of_pt_files_never_meet(tmp_path: Path) -> None:
    ids = ["x", "x", "x.2", "x", "a/b", "a_b", "", "..", "y" * 400, "y" * 400]
    stems = formats_module._stems(ids)
    assert len(set(stems)) == len(ids)
    assert stems[:6] == ["x", "x.2", "x.2.2", "x.3", "a_b", "a_b.2"]
    assert all(stem.strip(".") and len(stem) < 252 and "/" not in stem for stem in stems)
