"""What happens to long runs: kills, full disks, folders that vanish, dying workers, signals, clocks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from protnest.engine import Embedder, InputError, embed_library, load_model, read_embeddings
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.embedder_plan import EmbedderPlan
from protnest.engine.encoder import Encoder
from protnest.engine.library import LibraryOptions
from protnest.engine.record_source import FastaSource
from protnest.engine.shard_workers import ShardWorkers

from support.tiny import TINY, random_proteins, save_tiny_model, write_fasta

KILLED_RUNS = Path(__file__).resolve().parents[1] / "support" / "killed_runs.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHARD_RECORDS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def plan(model: Path) -> EmbedderPlan:
    return EmbedderPlan(models=(str(model),), device="cpu", precision="fp32", max_tokens=512)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("library") / "in.fasta", random_proteins(1200, longest=200))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, library: Path, model: Path) -> Path:
    """The store of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(_command(library, out, model), check=True, capture_output=True, env=ENVIRONMENT)
    return out


def _command(fasta: Path, out: Path, model: Path, workers: int = 1) -> list[str]:
    options = ["--model", str(model), "--shard-records", str(SHARD_RECORDS), "--max-tokens", "512"]
    options += ["--precision", "fp32", "--device", "cpu", "--workers", str(workers), "--json"]
    return [sys.executable, "-m", "protnest.engine.cli", "embed", str(fasta), "--out", str(out), *options]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def _children(pid: int | str = "self") -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _await(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def _shards_listed(out: Path) -> int:
    try:
        return len(json.loads((out / "run.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def _await_shards(out: Path, least: int) -> None:
    _await(lambda: _shards_listed(out) >= least)


def test_fifty_kills_at_fifty_moments(tmp_path: Path, model: Path) -> None:
    """Each store ends as if nothing had happened, and no kill costs more than the shard that was being embedded."""
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(60, longest=100))
    command = [sys.executable, str(KILLED_RUNS), str(fasta), str(model), str(tmp_path), "50"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 50
    assert sum(run["killed"] for run in runs) >= 55, "too few runs were killed at all, or a second time"
    whole = _contents(tmp_path / "whole")
    shards = len(json.loads(whole["run.json"])["shards"])
    assert shards == 8
    for run in runs:
        assert _contents(Path(run["folder"])) == whole, run
        assert run["begun"] <= shards + run["killed"], run


def test_killed_runs_of_two_workers(tmp_path: Path, library: Path, model: Path, whole: Path) -> None:
    """Workers die with the run that started them, at once: the next one finds the folder free."""
    out = tmp_path / "out"
    command = _command(library, out, model, workers=2)
    for listed in (1, 8, 18):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
        _await_shards(out, listed)
        workers = _children(process.pid)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed: make it longer"
        assert len(workers) == 2
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    ours, theirs = _contents(out), _contents(whole)
    assert ours == theirs


class _AtAdvance:
    """Progress that does something each time a batch is done."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.batches = 0
        self._act = act

    def start(self, records: int, work: int, done: int) -> None:
        pass

    def advance(self, residues: int) -> None:
        self.batches += 1
        self._act(self.batches)


def test_a_killed_worker_is_replaced(tmp_path: Path, plan: EmbedderPlan) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(300, longest=100))
    options = LibraryOptions(shard_records=20, workers=2)
    embed_library(fasta, tmp_path / "whole", plan, LibraryOptions(shard_records=20))

    def act(batch: int) -> None:
        if batch in (5, 20):
            os.kill(_children()[-1], signal.SIGKILL)

    result = embed_library(fasta, tmp_path / "out", plan, options, progress=_AtAdvance(act))
    assert result.restarts == 2
    assert (result.embedded, result.workers) == (300, 2)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")
    assert not _children()


def test_a_shard_that_kills_its_workers_is_given_up(
    tmp_path: Path, plan: EmbedderPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(30, longest=100))
    heard = ShardWorkers._hear

    def kill_who_works(self: ShardWorkers, hand: Any, word: str, *rest: Any) -> None:
        if word == "advance":
            hand.process.kill()
        heard(self, hand, word, *rest)

    monkeypatch.setattr(ShardWorkers, "_hear", kill_who_works)
    where = r"line 1, record 1 \(protein0\): 3 workers died \(SIGKILL\) over the shard from here to record 30"
    with pytest.raises(InputError, match=where):
        embed_library(fasta, tmp_path / "out", plan, LibraryOptions(workers=2))
    assert not _children()


def test_workers_that_cannot_begin(tmp_path: Path, plan: EmbedderPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(5))
    monkeypatch.setattr("protnest.engine.shard_workers.sys.executable", shutil.which("false"))
    with pytest.raises(InputError, match=r"workers die before they have done anything \(exit code 1\)"):
        embed_library(fasta, tmp_path / "out", plan, LibraryOptions(workers=2))


def test_a_worker_that_fails_is_heard(tmp_path: Path, plan: EmbedderPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the model when a worker loads it is told as it stands."""
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(5))
    made = EmbedderPlan.make

    def make(self: EmbedderPlan) -> Embedder:
        embedder = made(self)
        Path(self.models[0], "config.json").write_text("{")
        return embedder

    moved = shutil.copytree(plan.models[0], tmp_path / "moved")
    monkeypatch.setattr(EmbedderPlan, "make", make)
    broken = EmbedderPlan(models=(str(moved),), device="cpu", precision="fp32")
    with pytest.raises(InputError, match=r"moved/config\.json"):
        embed_library(fasta, tmp_path / "out", broken, LibraryOptions(workers=2))


def test_each_gpu_has_a_worker(plan: EmbedderPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(workers: int | None, device: str) -> list[str]:
        return [each.device for each in LibraryOptions(workers=workers).workers_on(plan.on(device))]

    assert devices(None, "auto") == []
    assert devices(2, "auto") == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert devices(None, "auto") == devices(None, "cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices(4, "auto") == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert devices(1, "auto") == devices(None, "cuda:1") == devices(None, "cpu") == []
    assert devices(2, "cuda:1") == ["cuda:1", "cuda:1"]
    assert devices(2, "cpu") == ["cpu", "cpu"]


def test_two_workers_need_a_plan(tmp_path: Path, model: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(5))
    embedder = Embedder(load_model(model, device="cpu", precision="fp32"))
    with pytest.raises(InputError, match="pass an EmbedderPlan"):
        embed_library(fasta, tmp_path / "out", embedder, LibraryOptions(workers=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_poisoned_record_is_named(tmp_path: Path, workers: int) -> None:
    encoder = Encoder(TINY)
    torch.nn.init.constant_(encoder.final_norm.bias, 1e6)
    save_checkpoint(encoder, tmp_path / "huge")
    plan = EmbedderPlan(models=(str(tmp_path / "huge"),), device="cpu", precision="fp32")
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(5))
    options = LibraryOptions(storage_dtype="fp16", workers=workers)
    with pytest.raises(InputError, match=r"in\.fasta, line 1, record 1 \(protein0\): the embedding is not finite"):
        embed_library(fasta, tmp_path / "out", plan, options)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(tmp_path: Path, library: Path, model: Path, whole: Path, workers: int) -> None:
    """Files may not grow beyond 5,000 bytes, and shards are of 5,200: nothing half is left, and the run goes on."""
    out = tmp_path / "out"
    command = _command(library, out, model, workers)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    failed = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limit, check=False)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "part-0000" in failed.stderr
    assert "File too large" in failed.stderr
    assert not [path.name for path in out.iterdir() if path.name.endswith((".tmp", ".safetensors"))]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    assert _contents(out) == _contents(whole)


def test_a_folder_that_vanishes(tmp_path: Path, plan: EmbedderPlan) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(100))

    def act(batch: int) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    with pytest.raises(OSError, match=r"part-00000.*No such file"):
        embed_library(fasta, tmp_path / "out", plan, LibraryOptions(shard_records=10), progress=_AtAdvance(act))


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_stops_clean(tmp_path: Path, library: Path, model: Path, whole: Path, workers: int) -> None:
    out = tmp_path / "out"
    command = _command(library, out, model, workers)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    _await_shards(out, 3)
    children = _children(process.pid)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert len(children) == (0 if workers == 1 else 2)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    report = json.loads(done.stdout)
    assert report["resumed"] >= 3 * SHARD_RECORDS
    assert _contents(out) == _contents(whole)


def test_two_runs_on_one_folder(tmp_path: Path, library: Path, model: Path) -> None:
    out = tmp_path / "out"
    command = _command(library, out, model)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    try:
        _await_shards(out, 1)
        process.send_signal(signal.SIGSTOP)  # or it might be done before the second one begins
        second = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    finally:
        process.kill()
        process.communicate()
    assert second.returncode == 1
    assert "another run is writing to this folder" in second.stderr.replace("\n", " ")


def test_clocks_decide_nothing(tmp_path: Path, plan: EmbedderPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from the future and the past, and a clock that runs backwards between two calls."""
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(50))
    options = LibraryOptions(shard_records=10)
    embed_library(fasta, tmp_path / "whole", plan, options)

    class _Stopped(BaseException):
        pass

    def stop(batch: int) -> None:
        if batch == 4:
            raise _Stopped

    clock = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    with pytest.raises(_Stopped):
        embed_library(fasta, tmp_path / "out", plan, options, progress=_AtAdvance(stop))
    for number, path in enumerate(sorted((tmp_path / "out").iterdir())):
        os.utime(path, (0, 0) if number % 2 else (2**32, 2**32))
    result = embed_library(fasta, tmp_path / "out", plan, options)
    assert result.resumed > 0
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_a_library_that_changes_while_it_is_read(tmp_path: Path, plan: EmbedderPlan) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(500, longest=200))
    lengthened = LibraryOptions(shard_records=10)

    def lengthen(batch: int) -> None:
        write_fasta(fasta, random_proteins(501, longest=200))

    with pytest.raises(InputError, match=r"in\.fasta: has changed since it was checked: it held 500 proteins"):
        embed_library(fasta, tmp_path / "out", plan, lengthened, progress=_AtAdvance(lengthen))
    with pytest.raises(InputError, match="is not finished"):
        read_embeddings(tmp_path / "out")


def test_a_damaged_shard_is_not_adopted(tmp_path: Path, plan: EmbedderPlan) -> None:
    """Of an unfinished run, whole shards that are not listed are taken, and listed ones that changed are not."""
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(40))
    options = LibraryOptions(shard_records=10)
    out = tmp_path / "out"
    embed_library(fasta, tmp_path / "whole", plan, options)

    class _Stopped(BaseException):
        pass

    class _Source(FastaSource):
        def read(self, **kwargs: object) -> object:  # type: ignore[override]
            for record in super().read(**kwargs):  # type: ignore[arg-type]
                if kwargs.get("quiet") and record.index == 31:
                    raise _Stopped
                yield record

    with pytest.raises(_Stopped):
        embed_library(_Source(fasta), out, plan, options)
    run = json.loads((out / "run.json").read_text())
    assert [shard["number"] for shard in run["shards"]] == [0, 1, 2]
    unlisted = run["shards"].pop(1)
    (out / "run.json").write_text(json.dumps(run))
    damaged = out / "part-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes() + b"x")
    result = embed_library(fasta, out, plan, options)
    assert (result.resumed, result.embedded) == (20, 20)
    assert unlisted in json.loads((out / "run.json").read_text())["shards"]
    assert _contents(out) == _contents(tmp_path / "whole")


def test_equal_sequences_are_embedded_once(tmp_path: Path, plan: EmbedderPlan) -> None:
    different = random_proteins(7, seed=5, longest=60)
    order = [0, 1, 0, 2, 2, 2, 3, 1, 4, 5, 5, 0, 6]
    fasta = write_fasta(tmp_path / "in.fasta", [different[which] for which in order])
    once = write_fasta(tmp_path / "once.fasta", different)
    options = LibraryOptions(shard_records=3, dedup=True)
    result = embed_library(fasta, tmp_path / "out", plan, options)
    embed_library(once, tmp_path / "once", plan, LibraryOptions(shard_records=3))
    assert (result.survey.records, result.survey.rows, result.embedded) == (13, 7, 13)
    assert result.survey.work == sum(map(len, different))
    for path in (tmp_path / "once").glob("part-*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    index = pq.read_table(tmp_path / "out" / "index.parquet").to_pydict()
    assert index["row"] == order
    assert index["id"] == [f"protein{number}" for number in range(13)]


def test_many_copies_stay_in_bounds(tmp_path: Path, plan: EmbedderPlan) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", ["MKT"] * 100 + ["MKV"])
    result = embed_library(fasta, tmp_path / "out", plan, LibraryOptions(shard_records=2, dedup=True))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [shard["records"] for shard in run["shards"]] == [32, 32, 32, 5]
    assert [shard["rows"] for shard in run["shards"]] == [1, 0, 0, 1]
    assert result.embedded == 101
    assert embed_library(fasta, tmp_path / "out", plan, LibraryOptions(shard_records=2, dedup=True)).resumed == 101


def test_dedup_and_array_jobs_do_not_go_together() -> None:
    with pytest.raises(InputError, match="--dedup with --shard 1/2"):
        LibraryOptions(dedup=True, shard=(1, 2))
