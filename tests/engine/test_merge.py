"""Stores of an array job put together: bit for bit what one run writes, or refused with what is missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from protnest.engine import Embedder, InputError, embed_library, load_model, read_embeddings
from protnest.engine import merge as merge_module
from protnest.engine.cli import app
from protnest.engine.library import LibraryOptions
from protnest.engine.merge import merge_stores
from protnest.engine.verify import verify_store
from typer.testing import CliRunner

from support.tiny import random_proteins, save_tiny_model

JOBS = 3


class _Jobs:
    """One library embedded in one run, and by three jobs, mean-pooled and residue by residue."""

    def __init__(self, root: Path) -> None:
        self.root = root
        letters = random_proteins(30, seed=8)
        letters[11] = "MJT"
        self.fasta = root / "in.fasta"
        self.fasta.write_text("".join(f">p{place % 25} about\n{text}\n" for place, text in enumerate(letters)))
        self._model = load_model(save_tiny_model(root / "tiny"), device="cpu", precision="fp32")
        for pool in ("mean", "residue"):
            self.embed(root / pool / "whole", pool, (1, 1))
            for index in range(1, JOBS + 1):
                self.embed(root / pool / f"job{index}", pool, (index, JOBS))

    def embed(self, out: Path, pool: str, shard: tuple[int, int], *, records: int = 4) -> None:
        options = LibraryOptions(invalid="skip", shard_records=records, shard=shard)
        embed_library(self.fasta, out, Embedder(self._model, pool=pool), options)

    def folders(self, pool: str = "mean") -> list[Path]:
        return [self.root / pool / f"job{index}" for index in range(1, JOBS + 1)]

    def copies(self, to: Path) -> list[Path]:
        return [Path(shutil.copytree(folder, to / folder.name)) for folder in self.folders()]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> _Jobs:
    return _Jobs(tmp_path_factory.mktemp("jobs"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def _no_links(source: Path, path: Path) -> None:
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("pool", ["mean", "residue"])
@pytest.mark.parametrize("linked", [True, False])
def test_the_merged_store_is_the_undivided_one(
    tmp_path: Path, jobs: _Jobs, pool: str, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linked:
        monkeypatch.setattr(os, "link", _no_links)
    followed: list[tuple[int, int]] = []
    folders = jobs.folders(pool)
    before = [_contents(folder) for folder in folders]
    mixed = [folders[2], folders[0], folders[1]]
    merged = merge_stores(mixed, tmp_path / "out", follow=lambda done, total: followed.append((done, total)))
    assert (merged.jobs, merged.shards, merged.rows, merged.resumed, merged.duplicates) == (3, 8, 29, 0, 5)
    whole = _contents(jobs.root / pool / "whole")
    assert _contents(tmp_path / "out") == whole
    assert verify_store(tmp_path / "out").is_whole
    assert [_contents(folder) for folder in folders] == before
    assert len(followed) == 8
    assert followed[-1][0] == followed[-1][1]
    links = (tmp_path / "out" / "part-00003.safetensors").stat().st_nlink
    assert (links > 1) == linked
    assert merge_stores(folders, tmp_path / "out").resumed == 8


@pytest.mark.parametrize("listed", [0, 1, 5])
def test_a_killed_merge_goes_on(tmp_path: Path, jobs: _Jobs, listed: int) -> None:
    class Killed(BaseException):
        pass

    real = merge_module._take_file
    left = listed

    def take(*arguments: Any) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        real(*arguments)

    with mock.patch.object(merge_module, "_take_file", take), pytest.raises(Killed):
        merge_stores(jobs.folders(), tmp_path / "out")
    with pytest.raises(InputError, match="is not finished"):
        read_embeddings(tmp_path / "out")
    if listed:
        (tmp_path / "out" / "part-00000.parquet").unlink()
    assert merge_stores(jobs.folders(), tmp_path / "out").resumed == listed
    assert _contents(tmp_path / "out") == _contents(jobs.root / "mean" / "whole")


def test_the_undivided_run_finds_nothing_left_to_do(tmp_path: Path, jobs: _Jobs) -> None:
    merge_stores(jobs.folders(), tmp_path / "out")
    before = _contents(tmp_path / "out")
    jobs.embed(tmp_path / "out", "mean", (1, 1))
    assert _contents(tmp_path / "out") == before


def test_jobs_without_shards_are_merged(tmp_path: Path, jobs: _Jobs) -> None:
    """More jobs than shards: the last ones have nothing."""
    for index in (1, 2, 3):
        jobs.embed(tmp_path / f"job{index}", "mean", (index, 3), records=20)
    jobs.embed(tmp_path / "whole", "mean", (1, 1), records=20)
    folders = [tmp_path / f"job{index}" for index in (1, 2, 3)]
    assert len(read_embeddings(folders[2])) == 0
    assert verify_store(folders[2]).is_whole
    assert merge_stores(folders, tmp_path / "out").shards == 2
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_one_undivided_store_is_copied(tmp_path: Path, jobs: _Jobs) -> None:
    merge_stores([jobs.root / "mean" / "whole"], tmp_path / "out")
    assert _contents(tmp_path / "out") == _contents(jobs.root / "mean" / "whole")


def test_missing_jobs_are_named(tmp_path: Path, jobs: _Jobs) -> None:
    first, second, third = jobs.folders()
    with pytest.raises(InputError, match="not complete: 2 of 3 jobs are missing, --shard 1/3, 3/3"):
        merge_stores([second], tmp_path / "out")
    with pytest.raises(InputError, match=r"job1: is --shard 1/3, and so is .*job1"):
        merge_stores([first, second, first, third], tmp_path / "out")
    with pytest.raises(InputError, match="no store to merge"):
        merge_stores([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together_is_refused(tmp_path: Path, jobs: _Jobs) -> None:
    first, second, third = jobs.folders()
    other = jobs.folders("residue")[1]
    with pytest.raises(InputError, match=r"residue/job2: is not of the same run .*\(pool: mean there, residue now"):
        merge_stores([first, other, third], tmp_path / "out")
    with pytest.raises(InputError, match=r"whole: is not of the same run .*\(shard: 3 there, 1 now\)"):
        merge_stores([first, jobs.root / "mean" / "whole"], tmp_path / "out")
    with pytest.raises(InputError, match="is one of the stores that are to be merged"):
        merge_stores([first, second, third], second)
    merge_stores(jobs.folders("residue"), tmp_path / "out")
    with pytest.raises(InputError, match="other settings"):
        merge_stores([first, second, third], tmp_path / "out")
    merge_stores([first, second, third], tmp_path / "out", overwrite=True)
    assert _contents(tmp_path / "out") == _contents(jobs.root / "mean" / "whole")


def _change_run(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    run = json.loads((folder / "run.json").read_text())
    change(run)
    (folder / "run.json").write_text(json.dumps(run))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda job: _change_run(job, lambda run: run.update(complete=False)), "--shard 2/3 is not finished"),
        (lambda job: _change_run(job, lambda run: run.update(schema_version=1)), "schema version 1, without checksums"),
        (
            lambda job: _change_run(job, lambda run: run["shards"].pop(1)),
            "job2: says .* complete, but lacks shard 4",
        ),
        (lambda job: (job / "rejects.csv").write_text("record,id,reason\n"), "the jobs' rejects.csv differ"),
        (lambda job: _flip(job / "index.parquet"), r"index\.parquet: is damaged"),
        (lambda job: _flip(job / "part-00004.safetensors"), r"job2/part-00004\.safetensors: is damaged"),
    ],
)
@pytest.mark.parametrize("linked", [True, False])
def test_damaged_jobs_are_refused(
    tmp_path: Path,
    jobs: _Jobs,
    damage: Callable[[Path], object],
    message: str,
    linked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not linked:
        monkeypatch.setattr(os, "link", _no_links)
    folders = jobs.copies(tmp_path)
    damage(folders[1])
    with pytest.raises(InputError, match=message):
        merge_stores(folders, tmp_path / "out")
    shutil.rmtree(folders[1])
    shutil.copytree(jobs.folders()[1], folders[1])
    merge_stores(folders, tmp_path / "out")
    assert _contents(tmp_path / "out") == _contents(jobs.root / "mean" / "whole")


def test_command(tmp_path: Path, jobs: _Jobs) -> None:
    run = CliRunner()
    names = [str(folder) for folder in jobs.folders()]
    failed = run.invoke(app, ["merge", *names[:2], "--out", str(tmp_path / "out")])
    assert failed.exit_code == 1
    assert "1 of 3 jobs are missing, --shard 3/3" in failed.stderr
    done = run.invoke(app, ["merge", *names, "--out", str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "8 shards, 29 embeddings, of 3 jobs; 5 duplicate ids, kept" in done.stderr
    report = json.loads(run.invoke(app, ["merge", *names, "--out", str(tmp_path / "out"), "--json"]).stdout)
    assert report == {
        "out": str(tmp_path / "out"),
        "jobs": 3,
        "shards": 8,
        "rows": 29,
        "resumed": 8,
        "duplicates": 5,
    }
