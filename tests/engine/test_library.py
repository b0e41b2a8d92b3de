"""Whole runs: FASTA in, store out; resumed, killed, refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from protnest.engine import Embedder, Encoder, InputError, embed_library, load_model, read_embeddings
from protnest.engine.atomic import write_atomically
from protnest.engine.embedder_plan import EmbedderPlan
from protnest.engine.library import LibraryOptions
from protnest.engine.library_survey import survey_library
from protnest.engine.packing import PackedBatch
from protnest.engine.record_source import FastaSource
from protnest.engine.shard_job import cut_jobs
from protnest.engine.store import SCHEMA_VERSION, StoreWriter

from support.tiny import random_proteins, save_tiny_model, write_fasta


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def embedder(model: Path) -> Embedder:
    return Embedder(load_model(model, device="cpu", precision="fp32"))


class _Killed(BaseException):
    pass


class _StopAfter:
    """Progress that stops the run when so many batches are done, as a kill would."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def start(self, records: int, work: int, done: int) -> None:
        pass

    def advance(self, residues: int) -> None:
        if self.left == 0:
            raise _Killed
        self.left -= 1


@pytest.mark.parametrize("workers", [1, 2])
def test_the_report_says_where_the_time_went(tmp_path: Path, model: Path, workers: int) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(200))
    plan = EmbedderPlan(models=(str(model),), device="cpu", precision="fp32")
    result = embed_library(fasta, tmp_path / "out", plan, LibraryOptions(shard_records=20, workers=workers))
    times = vars(result.times)
    assert min(times.values()) >= 0
    assert min(times[name] for name in ("loading", "checking", "model", "finishing")) > 0
    assert result.idle_share is not None
    waited = sum(times.values()) - times["model"]
    # All of it, but for the moments in which files are opened and processes told.
    assert 0.7 * result.idle_share < waited / (workers * result.wall_s) <= 1.001 * result.idle_share


def test_rows_follow_the_file(tmp_path: Path, embedder: Embedder) -> None:
    sequences = random_proteins(50)
    fasta = write_fasta(tmp_path / "in.fasta", sequences)
    result = embed_library(fasta, tmp_path / "out", embedder, LibraryOptions(shard_records=7))
    assert (result.embedded, result.resumed, result.residues) == (50, 0, sum(map(len, sequences)))

    stored = read_embeddings(tmp_path / "out")
    assert stored.ids == [f"protein{row}" for row in range(50)]
    assert stored.array.shape == (50, 32)
    expected = embedder.embed(sequences)
    assert isinstance(expected, np.ndarray)
    # Shards are planned apart, so rows may differ from one great call in the last bits.
    np.testing.assert_allclose(np.asarray(stored.array), expected, rtol=0, atol=2e-5)
    index = pq.read_table(tmp_path / "out" / "index.parquet").to_pydict()
    assert index["position"] == list(range(50))
    assert index["header"][3] == "protein3 number 3"
    assert index["length"] == [len(sequence) for sequence in sequences]
    assert set(index["flags"]) == {""}


def test_run_file_says_what_was_done(tmp_path: Path, embedder: Embedder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(5))
    embed_library(fasta, tmp_path / "out", embedder, details={"versions": {"protnest": "x"}})
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["schema_version"] == SCHEMA_VERSION
    assert run["complete"] is True
    assert run["rows"] == 5
    assert run["settings"]["model_fingerprint"] == embedder.model.fingerprint
    assert run["versions"] == {"protnest": "x"}
    assert run["input"]["path"] == str(fasta)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == [".lock", "index.parquet", "part-00000.safetensors", "rejects.csv", "run.json"]
    assert (tmp_path / "out" / "part-00000.safetensors").stat().st_mode & 0o044, "others cannot read the shard"


@pytest.mark.parametrize("pool", ["mean", "max", "bos", "residue"])
@pytest.mark.parametrize("batches", [0, 3, 9])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, embedder: Embedder, pool: str, batches: int
) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(60, longest=150))
    options = LibraryOptions(shard_records=8)
    embedder.pool, embedder.max_tokens = pool, 128
    embed_library(fasta, tmp_path / "whole", embedder, options)
    with pytest.raises(_Killed):
        embed_library(fasta, tmp_path / "cut", embedder, options, progress=_StopAfter(batches))
    with pytest.raises(InputError, match="is not finished"):
        read_embeddings(tmp_path / "cut")
    result = embed_library(fasta, tmp_path / "cut", embedder, options)
    assert result.embedded + result.resumed == 60
    whole, cut = read_embeddings(tmp_path / "whole"), read_embeddings(tmp_path / "cut")
    assert whole.ids == cut.ids
    assert np.asarray(whole.array).tobytes() == np.asarray(cut.array).tobytes()
    assert np.array_equal(whole.offsets if pool == "residue" else [], cut.offsets if pool == "residue" else [])


def _command(fasta: Path, out: Path, model: Path) -> list[str]:
    options = ["--model", str(model), "--shard-records", "40", "--max-tokens", "512", "--precision", "fp32", "--json"]
    return [sys.executable, "-m", "protnest.engine.cli", "embed", str(fasta), "--out", str(out), *options]


def test_kill_at_ten_random_moments(tmp_path: Path, model: Path) -> None:
    """kill -9, ten times in one run and at ten different moments: the store ends as if nothing had happened."""
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(2500, longest=200))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    subprocess.run(_command(fasta, tmp_path / "whole", model), check=True, capture_output=True, env=environment)
    whole_s = time.monotonic() - started
    out = tmp_path / "killed"
    moments = random.Random(4)
    killed = 0
    for _ in range(10):
        process = subprocess.Popen(
            _command(fasta, out, model), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        # Starting up takes most of the time; the moments lie in what follows it.
        while process.poll() is None and not (out / "run.json").exists():
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, whole_s / 6))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
    assert killed >= 5, "the run was over before it could be killed: make it longer"
    done = subprocess.run(_command(fasta, out, model), check=True, capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout)["sequences"] == 2500
    whole, resumed = read_embeddings(tmp_path / "whole"), read_embeddings(out)
    assert whole.ids == resumed.ids
    assert np.asarray(whole.array).tobytes() == np.asarray(resumed.array).tobytes()
    assert pq.read_table(tmp_path / "whole" / "index.parquet").equals(pq.read_table(out / "index.parquet"))


def test_finished_run_is_left_alone(tmp_path: Path, embedder: Embedder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(9))
    embed_library(fasta, tmp_path / "out", embedder)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != ".lock"}
    result = embed_library(fasta, tmp_path / "out", embedder)
    assert (result.embedded, result.resumed) == (0, 9)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_settings_are_refused_and_named(tmp_path: Path, embedder: Embedder, model: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(9))
    embed_library(fasta, tmp_path / "out", embedder)
    other = Embedder(embedder.model, pool="max")
    with pytest.raises(InputError, match=r"other settings \(pool: mean there, max now\)"):
        embed_library(fasta, tmp_path / "out", other)
    longer = write_fasta(tmp_path / "in.fasta", random_proteins(10))
    with pytest.raises(InputError, match="input_fingerprint"):
        embed_library(longer, tmp_path / "out", embedder)
    reseeded = Embedder(load_model(save_tiny_model(tmp_path / "tiny", seed=1), device="cpu", precision="fp32"))
    with pytest.raises(InputError, match="model_fingerprint"):
        embed_library(fasta, tmp_path / "out", reseeded)
    assert read_embeddings(tmp_path / "out").run["settings"]["pool"] == "mean"
    embed_library(longer, tmp_path / "out", other, overwrite=True)
    assert len(read_embeddings(tmp_path / "out")) == 10


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_damaged_shard_is_computed_again(tmp_path: Path, embedder: Embedder, damage: str) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(20))
    options = LibraryOptions(shard_records=5)
    embed_library(fasta, tmp_path / "out", embedder, options)
    before = np.asarray(read_embeddings(tmp_path / "out").array)
    part = tmp_path / "out" / "part-00002.safetensors"
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"part-00002\.safetensors"):
        read_embeddings(tmp_path / "out")
    result = embed_library(fasta, tmp_path / "out", embedder, options)
    assert (result.embedded, result.resumed) == (5, 15)
    assert np.asarray(read_embeddings(tmp_path / "out").array).tobytes() == before.tobytes()


def test_folder_in_use_is_refused(tmp_path: Path, embedder: Embedder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(3))
    with StoreWriter(tmp_path / "out", {"pool": "mean"}, details={}):
        with pytest.raises(InputError, match="another run is writing"):
            embed_library(fasta, tmp_path / "out", embedder)
    with pytest.raises(InputError, match="other settings"):
        embed_library(fasta, tmp_path / "out", embedder)


def test_foreign_folder_is_not_touched(tmp_path: Path, embedder: Embedder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(3))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"not empty and holds no run \(thesis.txt\)"):
        embed_library(fasta, out, embedder, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError, match="is a file"):
        embed_library(fasta, fasta, embedder)


def test_unwritable_folder_is_named(tmp_path: Path, embedder: Embedder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(3))
    with pytest.raises(InputError, match="cannot be written to"):
        embed_library(fasta, Path("/proc/protnest-out"), embedder)


def test_rejects_are_listed_and_nothing_is_lost(tmp_path: Path, embedder: Embedder) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">good\nMKT\n>bad\nMJT\n>empty\n\n>good\nMKV\n")
    with pytest.raises(InputError, match=r"in\.fasta, line .*record 2 \(bad\)"):
        embed_library(fasta, tmp_path / "out", embedder)
    assert not (tmp_path / "out").exists()
    result = embed_library(fasta, tmp_path / "out", embedder, LibraryOptions(invalid="skip"))
    assert (result.embedded, result.survey.rejected, result.duplicates) == (2, 2, 1)
    lines = (tmp_path / "out" / "rejects.csv").read_text().splitlines()
    assert lines[0] == "record,id,reason"
    assert [line.split(",")[:2] for line in lines[1:]] == [["2", "bad"], ["3", "empty"]]
    assert pq.read_table(tmp_path / "out" / "index.parquet")["position"].to_pylist() == [0, 3]
    masked = embed_library(fasta, tmp_path / "masked", embedder, LibraryOptions(invalid="mask"))
    assert masked.flags == {"masked": 1}
    assert pq.read_table(tmp_path / "masked" / "index.parquet")["flags"].to_pylist() == ["", "masked", ""]


def test_pipe_is_refused(tmp_path: Path, embedder: Embedder) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device"):
        embed_library(tmp_path / "pipe", tmp_path / "out", embedder)


def test_comment_lines_are_told_once(tmp_path: Path, embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in.fasta").write_text("# made by hand\n>a\nMKT\n")
    embed_library(tmp_path / "in.fasta", tmp_path / "out", embedder)
    assert [record.message.endswith("skipped as comments: 1") for record in caplog.records].count(True) == 1


def test_nothing_left_to_embed(tmp_path: Path, embedder: Embedder) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">bad\nMJT\n")
    with pytest.raises(InputError, match=r"all 1 records were left out, record 1 since .*'J'"):
        embed_library(fasta, tmp_path / "out", embedder, LibraryOptions(invalid="skip"))


@pytest.mark.parametrize(("long", "flag"), [("window", "windowed"), ("full", "full-length"), ("truncate", "truncated")])
def test_long_proteins_are_flagged(tmp_path: Path, model: Path, long: str, flag: str) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", ["M" * 60, "K" * 61])
    embedder = Embedder(load_model(model, device="cpu", precision="fp32"), long=long)
    result = embed_library(fasta, tmp_path / "out", embedder)
    assert result.flags == {flag: 1}
    assert result.survey.beyond == 1
    assert result.survey.work == {"window": 60 + 120, "full": 121, "truncate": 120}[long]


def test_long_error_names_the_record(tmp_path: Path, model: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", ["M" * 60, "K" * 61])
    embedder = Embedder(load_model(model, device="cpu", precision="fp32"), long="error")
    with pytest.raises(InputError, match=r"in\.fasta, line 3, record 2 \(protein1\): 61 residues.* at most 60"):
        embed_library(fasta, tmp_path / "out", embedder)


def test_an_id_of_control_characters_does_not_reach_the_terminal(tmp_path: Path, model: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", ["K" * 61], prefix="\x1b[2J")
    embedder = Embedder(load_model(model, device="cpu", precision="fp32"), long="error")
    with pytest.raises(InputError, match=r"record 1 \(\\x1b\[2J0\): 61 residues"):
        embed_library(fasta, tmp_path / "out", embedder)


def test_a_record_beyond_the_memory_is_named(tmp_path: Path, embedder: Embedder) -> None:
    """In its place in the file, not in its shard."""
    fasta = write_fasta(tmp_path / "in.fasta", ["MKT"] * 5 + ["M" * 40])
    real = Encoder._run

    def run(self: Encoder, batch: PackedBatch, layers: tuple[int, ...]) -> object:
        if len(batch.tokens_T) > 41:
            raise torch.OutOfMemoryError
        return real(self, batch, layers)

    where = r"in\.fasta, line 11, record 6 \(protein5\): a run of 40 residues does not fit into the memory of cpu"
    with mock.patch.object(Encoder, "_run", run), pytest.raises(InputError, match=where):
        embed_library(fasta, tmp_path / "out", embedder, LibraryOptions(shard_records=4))


def test_shards_of_several_jobs_make_up_the_whole(tmp_path: Path, embedder: Embedder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(23))
    embed_library(fasta, tmp_path / "whole", embedder, LibraryOptions(shard_records=4))
    positions: list[int] = []
    for number in (1, 2, 3):
        out = tmp_path / f"job{number}"
        embed_library(fasta, out, embedder, LibraryOptions(shard_records=4, shard=(number, 3)))
        positions += pq.read_table(out / "index.parquet")["position"].to_pylist()
        for part in out.glob("part-*.safetensors"):
            assert part.read_bytes() == (tmp_path / "whole" / part.name).read_bytes()
    assert sorted(positions) == list(range(23))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage_dtype": "fp8"}, "storage dtype is 'fp8'; allowed: fp32, fp16"),
        ({"shard": (0, 2)}, "shard is 0/2"),
        ({"shard": (3, 2)}, "shard is 3/2"),
        ({"shard_records": 0}, "shard_records must be positive"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LibraryOptions(**options)


def test_half_precision_storage(tmp_path: Path, embedder: Embedder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(6))
    embed_library(fasta, tmp_path / "full", embedder)
    embed_library(fasta, tmp_path / "half", embedder, LibraryOptions(storage_dtype="fp16"))
    half = read_embeddings(tmp_path / "half").array
    assert half.dtype == np.float16
    full = np.asarray(read_embeddings(tmp_path / "full").array)
    assert np.array_equal(np.asarray(half), full.astype(np.float16))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_overflow_is_an_error_and_not_an_infinity(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(3))
    huge = np.full((3, 32), 1.0, dtype=np.float32)
    huge[1, 7] = 1e6
    monkeypatch.setattr(embedder, "embed_clean", lambda sequences, after_batch: huge)
    with pytest.raises(InputError, match=r"record 2 \(protein1\): the embedding is not finite"):
        embed_library(fasta, tmp_path / "out", embedder, LibraryOptions(storage_dtype="fp16"))
    with pytest.raises(InputError, match="is not finished"):
        read_embeddings(tmp_path / "out")
    assert embed_library(fasta, tmp_path / "wide", embedder).embedded == 3


def test_shards_are_cut_by_records_and_residues(tmp_path: Path, embedder: Embedder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", ["M" * length for length in (3, 3, 3, 9, 1, 1, 1, 1)])
    source = FastaSource(fasta)
    survey = survey_library(source, embedder)
    jobs = list(cut_jobs(source, survey, flags=lambda record: record.flags, max_records=3, max_residues=7))
    lengths = [[len(entry.record.sequence) for entry in job.entries] for job in jobs]
    assert lengths == [[3, 3], [3], [9], [1, 1, 1], [1]]
    assert [job.first_row for job in jobs] == [0, 2, 3, 4, 7]
    assert [job.number for job in jobs] == [0, 1, 2, 3, 4]


def test_survey_counts(tmp_path: Path, embedder: Embedder) -> None:
    sequences = random_proteins(30, longest=100)
    fasta = write_fasta(tmp_path / "in.fasta", sequences)
    survey = survey_library(FastaSource(fasta), embedder)
    assert (survey.records, survey.residues) == (30, sum(map(len, sequences)))
    assert survey.longest == max(map(len, sequences))
    assert survey.fingerprint == survey_library(FastaSource(fasta), embedder).fingerprint
    sequences[7] = "M" + sequences[7][1:].replace("A", "G") + "A"
    assert survey.fingerprint != survey_library(FastaSource(write_fasta(fasta, sequences)), embedder).fingerprint


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        message = "disk full"
        raise OSError(message)

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
