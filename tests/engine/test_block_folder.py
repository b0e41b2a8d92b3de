"""Folders of blocks, on a disk and on a file system that is none; workers that share a cluster out; Parquet in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from protnest.engine import Embedder, InputError, block_folder, load_model, ray_cluster, ray_library
from protnest.engine.block_folder import MOST_TRIES, Block, BlockFolder, find_place
from protnest.engine.embedder_plan import EmbedderPlan
from protnest.engine.fasta import Record
from protnest.engine.library import LibraryOptions, embed_library
from protnest.engine.library_settings import EmbedderFacts
from protnest.engine.ray_actor import BlockEmbedder, job_of_table, table_of_job
from protnest.engine.ray_cluster import Placement, check_ray, place_workers
from protnest.engine.ray_library import embed_on_ray
from protnest.engine.shard_job import ShardJob
from protnest.engine.store import Entry
from pyarrow import fs

from support.tiny import random_proteins, save_tiny_model, write_fasta

TABLE = pa.table({"id": ["a", "b", "a"]})


@pytest.fixture(params=["disk", "other", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockFolder]:
    """A disk; a file system that renames; one on which a file appears when it is whole."""
    if request.param == "disk":
        yield BlockFolder(str(tmp_path / "out"))
        return
    whole = ("mock",) if request.param == "object store" else ()
    with mock.patch.object(block_folder, "_APPEAR_WHOLE", whole):
        yield BlockFolder("mock://bucket/out", filesystem=fs.FileSystem.from_uri("mock:///bucket/out"))


def test_blocks_are_listed_when_they_are_whole(folder: BlockFolder) -> None:
    with folder.held():
        assert (folder.names(), folder.blocks(), folder.read_run()) == ([], {}, None)
        block = folder.write_block(3, TABLE)
        assert folder.write_block(3, TABLE) == block
        folder.write("part-00004.parquet", b"half a file")
        folder.write(".part-00005.parquet.x.tmp", b"half")
        assert folder.blocks() == {3: Block(3, 3, block.size_bytes)}
        folder.tidy()
        assert folder.names() == ["part-00003.parquet", "part-00004.parquet"]
        assert folder.finish([3], TABLE.schema) == 1
        folder.write_run({"complete": True})
        folder.write_run({"complete": False})
        run = folder.read_run()
        assert run is not None
        assert (run["complete"], run["engine"]) == (False, "ray")
        folder.write("thesis.txt", b"years of work")
        folder.clear()
        assert folder.names() == ["thesis.txt"]


def test_tries_that_died_are_counted(folder: BlockFolder) -> None:
    with folder.held():
        for before in range(MOST_TRIES):
            trying = folder.trying(7)
            assert trying.__enter__() == before
            # The worker dies here.
        with folder.trying(8) as other:
            assert other == 0
        assert len(folder.names()) == MOST_TRIES
        with folder.trying(7) as died:
            assert died == MOST_TRIES
        assert folder.names() == []


def test_pages_have_checksums(tmp_path: Path) -> None:
    folder = BlockFolder(str(tmp_path))
    folder.write_block(0, pa.table({"embedding": np.random.default_rng(0).normal(size=1000)}))
    path = tmp_path / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable run"),
        ("[]", "is the store of another engine"),
        ('{"schema_version": 2}', "is the store of another engine"),
        ('{"engine": "ray", "schema_version": 99}', "has schema version 99"),
    ],
)
def test_other_runs_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=message):
        BlockFolder(str(tmp_path)).read_run()


def test_places() -> None:
    assert find_place("out")[1] == str(Path("out").absolute())
    assert find_place("file:///tmp/out")[1] == "/tmp/out"
    with pytest.raises(InputError, match="nonsense://x: cannot be opened"):
        find_place("nonsense://x")
    with pytest.raises(InputError, match=r"format is 'h5'; with --engine ray allowed: parquet, lance"):
        BlockFolder("out", "h5")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    remote = fs.SubTreeFileSystem("/proc", fs.LocalFileSystem())
    with pytest.raises(InputError, match=r"s3://b/out: cannot be written to"):
        BlockFolder("s3://b/out", filesystem=(remote, "no/out")).held().__enter__()
    with pytest.raises(InputError, match="cannot be written to"):
        BlockFolder("/proc/no-out").held().__enter__()


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "expected"),
    [
        ([(8, 0)], "auto", None, Placement(workers=1, cpus=8)),
        ([(8, 0), (4, 0)], "cpu", None, Placement(workers=2, cpus=4)),
        ([(16, 0), (16, 0)], "auto", 6, Placement(workers=6, cpus=5)),
        ([(0, 0), (2, 0)], "auto", 2, Placement(workers=2, cpus=1)),
        ([(16, 4), (16, 4)], "auto", None, Placement(workers=8, gpus=1)),
        ([(16, 4)], "cuda", 3, Placement(workers=3, gpus=1)),
        ([(16, 4)], "cpu", 2, Placement(workers=2, cpus=8)),
    ],
)
def test_a_cluster_is_shared_out(
    nodes: list[tuple[int, int]], device: str, workers: int | None, expected: Placement
) -> None:
    assert place_workers(nodes, device=device, workers=workers) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "message"),
    [
        ([(2, 0)], "cpu", 3, "3 workers need a processor each, the cluster has 2"),
        ([(2, 0)], "cuda", None, "1 workers need a GPU each, the cluster has 0"),
        ([(2, 1)], "auto", 2, "2 workers need a GPU each, the cluster has 1"),
        ([(2, 0)], "cuda:1", None, "device is 'cuda:1'; with --engine ray allowed: auto, cpu, cuda"),
    ],
)
def test_too_small_a_cluster(nodes: list[tuple[int, int]], device: str, workers: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        place_workers(nodes, device=device, workers=workers)


def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    with mock.patch.object(ray_cluster.importlib.util, "find_spec", return_value=None):
        with pytest.raises(InputError, match=r"--engine ray needs Ray Data: pip install 'protnest\[ray\]'"):
            check_ray()
        with pytest.raises(InputError, match="needs Ray Data"):
            embed_on_ray("in.fasta", str(tmp_path / "out"), EmbedderPlan())
        with pytest.raises(InputError, match=r"format lance needs pylance: pip install 'protnest\[lance\]'"):
            BlockFolder(str(tmp_path / "out"), "lance")


def test_options_of_the_native_engine_are_refused(tmp_path: Path) -> None:
    with mock.patch.object(ray_library, "check_ray"):
        for options in (LibraryOptions(dedup=True), LibraryOptions(shard=(1, 2))):
            with pytest.raises(InputError, match="is for --engine native"):
                embed_on_ray("in.fasta", str(tmp_path / "out"), EmbedderPlan(), options)


def test_nothing_imports_ray() -> None:
    code = "import sys, protnest.engine.cli, protnest.engine.ray_library; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_library_in_an_object_store_is_copied_and_named(tmp_path: Path) -> None:
    remote, _ = fs.FileSystem.from_uri("mock:///")
    remote.create_dir("bucket")
    with remote.open_output_stream("bucket/in.fasta.gz", compression=None) as file:
        file.write(b"content")
    with mock.patch.object(ray_library, "find_place", return_value=(remote, "bucket/in.fasta.gz")):
        with ray_library._local_copy("s3://bucket/in.fasta.gz") as path:
            assert (path.name, path.read_bytes()) == ("in.fasta.gz", b"content")
            odd = InputError("is odd", file=path, line=3, record=2, record_id="x")
            with pytest.raises(InputError) as caught, ray_library._naming(path, "s3://bucket/in.fasta.gz"):
                raise odd
        assert not path.exists()
        assert str(caught.value) == "s3://bucket/in.fasta.gz, line 3, record 2 (x): is odd"
    with mock.patch.object(ray_library, "find_place", return_value=(remote, "bucket/none")):
        with pytest.raises(InputError, match=r"s3://bucket/none: cannot be read"):
            ray_library._local_copy("s3://bucket/none").__enter__()


def test_a_block_travels_as_it_is() -> None:
    records = [Record(index=4, id="ä", header="ä b", sequence="MK"), Record(index=6, id="c", header="c", sequence="M")]
    entries = [Entry(records[0], 0, ("masked", "windowed")), Entry(records[1], 1)]
    job = job_of_table(
        table_of_job(ShardJob(5, 40, [Entry(each.record, 40 + each.row, each.flags) for each in entries]))
    )
    assert [(each.record.index, each.record.id, each.record.header, each.record.sequence) for each in job.entries] == [
        (4, "ä", "ä b", "MK"),
        (6, "c", "c", "M"),
    ]
    assert [each.flags for each in job.entries] == [("masked", "windowed"), ()]
    assert (job.number, len(job.fresh)) == (5, 2)


@pytest.fixture
def worker(tmp_path: Path) -> BlockEmbedder:
    plan = EmbedderPlan(models=(str(save_tiny_model(tmp_path / "tiny")),), device="cpu", precision="fp32")
    settings = EmbedderFacts.of(plan.make()).settings
    folder = BlockFolder(str(tmp_path / "out"))
    with pytest.raises(InputError, match="is not the one that the run began with"):
        BlockEmbedder(plan=plan, settings={"model": "x"}, folder=folder, storage_dtype="fp32", threads=1)
    return BlockEmbedder(plan=plan, settings=settings, folder=folder, storage_dtype="fp16", threads=1)


def test_a_worker_tells_what_went_wrong(worker: BlockEmbedder, tmp_path: Path) -> None:
    record = Record(index=4, id="x", header="x", sequence="MKT")
    table = table_of_job(ShardJob(0, 0, [Entry(record, 0)]))
    (report,) = worker(table).to_pylist()
    assert "cannot be written to" in report["problem"]
    assert report["fault_position"] is None
    folder = tmp_path / "out"
    folder.mkdir()
    (report,) = worker(table).to_pylist()
    assert (report["problem"], report["rows"], report["residues"]) == (None, 1, 3)
    for place in range(MOST_TRIES):
        (folder / f".part-00000.try{place}.tmp").touch()
    (report,) = worker(table).to_pylist()
    assert report["problem"].startswith(
        f"{MOST_TRIES} workers died over the records 5 (x) to 5 (x): too little memory?"
    )
    with mock.patch.object(worker._embedder, "embed_clean", return_value=1e6 * torch.ones(1, 32).numpy()):
        (report,) = worker(table).to_pylist()
    assert (report["fault_position"], report["fault_id"]) == (4, "x")
    assert "is not finite" in report["problem"]


def test_facts_say_what_the_embedder_says(tmp_path: Path) -> None:
    encoder = load_model(save_tiny_model(tmp_path / "tiny"), device="cpu", precision="fp32")
    for long in ("window", "error"):
        embedder = Embedder(encoder, long=long)
        facts = EmbedderFacts.of(embedder)
        for residues in (60, 61, 6100):
            assert facts.why_too_long(residues) == embedder.why_too_long(residues)


def test_native_engine_leaves_rays_folder_alone(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(3))
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"schema_version": 2, "engine": "ray"}))
    embedder = Embedder(load_model(save_tiny_model(tmp_path / "tiny"), device="cpu", precision="fp32"))
    with pytest.raises(InputError, match="read them with pyarrow or lance"):
        embed_library(fasta, out, embedder, overwrite=True)
