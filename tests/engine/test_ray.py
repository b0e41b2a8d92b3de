"""Libraries on a real Ray cluster of this machine: two workers, some of them killed."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import InputError, embed_library, read_embeddings
from protnest.engine.embedder_plan import EmbedderPlan
from protnest.engine.library import LibraryOptions
from protnest.engine.ray_cluster import start_local
from protnest.engine.ray_library import embed_on_ray
from protnest.engine.table_source import TableSource
from safetensors.numpy import load_file, save_file

from support.tiny import random_proteins, save_tiny_model, write_fasta

ray = pytest.importorskip("ray", reason="the package ray is not installed")
pytest.importorskip("pandas", reason="Ray Data needs pandas")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> EmbedderPlan:
    model = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return EmbedderPlan(models=(str(model),), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of two processors; gives its address."""
    yield start_local(2)
    ray.shutdown()


def read_blocks(out: Path) -> pa.Table:
    """All rows of a folder of blocks, in the order of the blocks."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))])


def matrix(table: pa.Table) -> np.ndarray:
    return np.stack(table["embedding"].to_numpy())


class _Killer:
    """Progress that kills a worker when the first block is done, while the others are under way."""

    def __init__(self) -> None:
        self.killed = 0

    def start(self, records: int, work: int, done: int) -> None:
        pass

    def advance(self, residues: int) -> None:
        if not self.killed:
            mine = {os.getpid()}
            for parent, child in sorted(_descent(), key=lambda pair: pair[1]):
                if parent in mine:
                    mine.add(child)
            workers = [pid for pid in mine if b"BlockEmbedder" in _title(pid)]
            os.kill(workers[0], signal.SIGKILL)
            self.killed = workers[0]


def _descent() -> list[tuple[int, int]]:
    pairs = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pairs.append((int(stat.read_text().rsplit(")", 1)[1].split()[1]), int(stat.parent.name)))
    return pairs


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


OPTIONS = LibraryOptions(workers=2, shard_records=20)
ONE = LibraryOptions(workers=1, shard_records=20)
"""Each worker takes seconds of a processor until it has torch."""


def test_killed_worker_is_replaced_and_every_row_is_the_native_engines(
    tmp_path: Path, plan: EmbedderPlan, cluster: str
) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(1000, longest=150))
    embed_library(fasta, tmp_path / "native", plan, LibraryOptions(shard_records=20))
    killer = _Killer()
    result = embed_on_ray(str(fasta), str(tmp_path / "out"), plan, OPTIONS, progress=killer)
    assert killer.killed
    # Known from the workers that reported: one that was killed before it did is not counted.
    assert result.restarts <= 1
    assert (result.embedded, result.resumed, result.workers) == (1000, 0, 2)
    table = read_blocks(tmp_path / "out")
    native = read_embeddings(tmp_path / "native")
    index = pq.read_table(tmp_path / "native" / "index.parquet").drop(["row"])
    assert table.drop(["embedding"]).equals(index)
    assert matrix(table).tobytes() == np.asarray(native.array).tobytes()
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["complete"], run["rows"], run["records"], len(run["blocks"])) == (True, 1000, 1000, 50)
    left = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("part-")}
    assert left == {".lock", "run.json", "rejects.csv"}


def test_finished_blocks_are_not_done_again(tmp_path: Path, plan: EmbedderPlan, cluster: str) -> None:
    """What a disk lost or cut short is; so are blocks that are missing, and no others."""
    fasta = tmp_path / "in.fasta.gz"
    fasta.write_bytes(gzip.compress(write_fasta(tmp_path / "plain", random_proteins(90)).read_bytes()))
    out = tmp_path / "out"
    place = fasta.as_uri()
    assert embed_on_ray(place, out.as_uri(), plan, ONE).embedded == 90
    before = read_blocks(out)
    assert (embed_on_ray(place, str(out), plan, ONE).resumed, len(before)) == (90, 90)
    (out / "part-00001.parquet").unlink()
    cut = out / "part-00003.parquet"
    cut.write_bytes(cut.read_bytes()[:-9])
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-0000[024].parquet")}
    (out / ".part-00001.parquet.0.tmp").write_text("half")
    result = embed_on_ray(place, str(out), plan, ONE)
    assert (result.embedded, result.resumed) == (40, 50)
    assert read_blocks(out).equals(before)
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}
    assert not list(out.glob(".*.tmp"))

    with pytest.raises(InputError, match=r"other settings \(shard_records: 20 there, 10 now\)"):
        embed_on_ray(place, str(out), plan, LibraryOptions(workers=1, shard_records=10))
    (out / "run.json").write_text((out / "run.json").read_text().replace("input_fingerprint", "other"))
    assert embed_on_ray(place, str(out), plan, ONE, overwrite=True).embedded == 90
    assert kept != {name: (out / name).stat().st_mtime_ns for name in kept}
    assert read_blocks(out).equals(before)


def test_run_goes_on_after_its_driver_is_killed(tmp_path: Path, plan: EmbedderPlan, cluster: str) -> None:
    """The driver alone: the cluster outlives it, as a real one does."""
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(600, longest=150))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "protnest.engine.cli", "embed", str(fasta), "--out", str(out), "--engine", "ray"]
    command += ["--model", plan.models[0], "--workers", "2", "--shard-records", "20", "--precision", "fp32", "--json"]
    command += ["--device", "cpu", "--storage-dtype", "fp16"]
    environment = {**os.environ, "RAY_ADDRESS": cluster, "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while driver.poll() is None and not list(out.glob("part-*.parquet")):
        time.sleep(0.005)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, driver.stderr and driver.stderr.read()
    driver.communicate()
    assert json.loads((out / "run.json").read_text())["complete"] is False
    with pytest.raises(InputError, match="read them with pyarrow or lance"):
        read_embeddings(out)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["sequences"] == 600
    assert 0 < report["resumed"] < 600
    embed_library(fasta, tmp_path / "native", plan, LibraryOptions(shard_records=20, storage_dtype="fp16"))
    table = read_blocks(out)
    assert table["position"].to_pylist() == list(range(600))
    assert matrix(table).tobytes() == np.asarray(read_embeddings(tmp_path / "native").array).tobytes()


def test_parquet_in_and_residues_out(tmp_path: Path, plan: EmbedderPlan, cluster: str) -> None:
    proteins = random_proteins(30)
    columns = {"name": [f"p{row} of thirty" for row in range(30)], "residues": [*proteins[:-1], "MJT"]}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")

    def run(out: Path, **options: Any) -> pa.Table:
        invalid = options.pop("invalid")
        embed_on_ray(
            str(tmp_path / "in.parquet"),
            str(out),
            EmbedderPlan(**{**vars(plan), "pool": "residue"}),
            LibraryOptions(workers=1, shard_records=8, **options),
            open_source=lambda path: TableSource(path, id_column="name", sequence_column="residues", invalid=invalid),
        )
        return read_blocks(out)

    with pytest.raises(InputError, match=r"record 30 \(p29 of thirty\): 'J' at residue 2 is not a residue"):
        run(tmp_path / "out", invalid="error")
    table = run(tmp_path / "out", invalid="skip")
    assert table["id"].to_pylist() == [f"p{row} of thirty" for row in range(29)]
    assert table["header"][3].as_py() == "p3 of thirty"
    assert [len(rows) for rows in table["embedding"]] == [len(text) for text in proteins[:-1]]
    assert (tmp_path / "out" / "rejects.csv").read_text().splitlines()[1].startswith("30,p29 of thirty,")
    write_fasta(tmp_path / "in.fasta", proteins[:-1])
    whole = EmbedderPlan(**{**vars(plan), "pool": "residue"})
    embed_library(tmp_path / "in.fasta", tmp_path / "native", whole, LibraryOptions(shard_records=8))
    ours = np.concatenate([np.stack(rows.values.to_numpy(zero_copy_only=False)) for rows in table["embedding"]])
    assert ours.tobytes() == np.asarray(read_embeddings(tmp_path / "native").array).tobytes()


def test_a_record_at_fault_is_named(tmp_path: Path, plan: EmbedderPlan, cluster: str) -> None:
    (tmp_path / "in.fasta").write_text(">good\nMKT\n>bad\nMJT\n")
    with pytest.raises(InputError, match=r"in\.fasta, line 3, record 2 \(bad\): on line 4, 'J' at residue 2"):
        embed_on_ray(str(tmp_path / "in.fasta"), str(tmp_path / "out"), plan, ONE)
    assert not (tmp_path / "out").exists()


def test_a_record_that_cannot_be_embedded_ends_the_run(tmp_path: Path, plan: EmbedderPlan, cluster: str) -> None:
    """It is found by a worker, which knows no lines; what was finished stays."""
    model = tmp_path / "huge"
    shutil.copytree(plan.models[0], model)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("emb_layer_norm_after.weight"))
    tensors[name] = tensors[name] * 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(50))
    huge = EmbedderPlan(**{**vars(plan), "models": (str(model),)})
    options = LibraryOptions(workers=1, shard_records=20, storage_dtype="fp16")
    with pytest.raises(
        InputError, match=r"in\.fasta, line \d+, record \d+ \(protein\d+\): the embedding is not finite"
    ):
        embed_on_ray(str(fasta), str(tmp_path / "out"), huge, options)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["complete"] is False


def test_vanished_blocks_are_missed(tmp_path: Path, plan: EmbedderPlan, cluster: str) -> None:
    """As where each machine writes to a disk of its own."""
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(50))
    out = tmp_path / "out"

    class Thief(_Killer):
        def advance(self, residues: int) -> None:
            for path in out.glob("part-00001.parquet"):
                path.unlink()

    with pytest.raises(InputError, match=r"20 of 50 proteins have no embedding \(protein20, protein21, protein22, ..."):
        embed_on_ray(str(fasta), str(out), plan, ONE, progress=Thief())
    assert [line.split(",")[0] for line in (out / "missing.csv").read_text().splitlines()[1:]] == [
        str(number) for number in range(21, 41)
    ]
    assert embed_on_ray(str(fasta), str(out), plan, ONE).embedded == 20
    assert not (out / "missing.csv").exists()


def test_lance_dataset(tmp_path: Path, plan: EmbedderPlan, cluster: str) -> None:
    import lance

    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(70))
    out = tmp_path / "out"
    embed_on_ray(str(fasta), str(out), plan, ONE, output_format="lance")
    table = lance.dataset(str(out / "embeddings.lance")).to_table()
    assert table["position"].to_pylist() == list(range(70))
    embed_library(fasta, tmp_path / "native", plan, LibraryOptions(shard_records=20))
    assert matrix(table).tobytes() == np.asarray(read_embeddings(tmp_path / "native").array).tobytes()
    (out / "part-00002.json").unlink()
    result = embed_on_ray(str(fasta), str(out), plan, ONE, output_format="lance")
    assert (result.embedded, result.resumed) == (20, 50)
    assert lance.dataset(str(out / "embeddings.lance")).to_table().sort_by("position").equals(table)
