"""Ten thousand hostile FASTA files: every record becomes a row or a reject, or the file is refused by name."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from protnest.engine import Embedder, InputError, embed_library, fasta, load_model, read_embeddings
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.config import EncoderConfig
from protnest.engine.encoder import Encoder
from protnest.engine.library import LibraryOptions
from safetensors.numpy import load_file

from support.hostile_fasta import Expected, expect, hostile_file
from support.hostile_tables import expect_rows, hostile_table

FEW, MANY = 1_500, 10_000
IN_CI, BY_HAND = 6, 50
LONGEST = 60
TABLES = 500
HEADER = ["record", "id", "reason"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(Encoder(EncoderConfig(layers=1, width=8, heads=1, feedforward=8, max_residues=LONGEST)), folder)
    return folder


@pytest.fixture
def embedder(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Embedder]:
    # A flush to the disk per written file would be most of the time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    chunk_bytes = fasta.CHUNK_BYTES
    yield Embedder(load_model(model, device="cpu", precision="fp32"))
    fasta.CHUNK_BYTES = chunk_bytes


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a run is asked for."""

    invalid: Any
    shard_records: int
    dedup: bool
    pool: Any
    long: Any

    @property
    def options(self) -> LibraryOptions:
        return LibraryOptions(invalid=self.invalid, shard_records=self.shard_records, dedup=self.dedup)

    @property
    def arguments(self) -> list[str]:
        words = ["--invalid", self.invalid, "--shard-records", str(self.shard_records), "--pool", self.pool]
        return [*words, "--long", self.long, *(["--dedup"] if self.dedup else [])]


def choose(seed: int) -> Choices:
    """Most often, to leave out or to mask."""
    rng = random.Random(f"choices {seed}")
    return Choices(
        invalid=rng.choice(["skip", "skip", "mask", "mask", "error"]),
        shard_records=rng.choice([2048, 2048, 2048, 1, 3]),
        dedup=rng.random() < 0.25,
        pool=rng.choice(["mean", "mean", "mean", "residue"]),
        long=rng.choice([*["window"] * 9, "error"]),
    )


def expected_rows(records: list[Expected], choices: Choices) -> dict[int, tuple[Expected, str]] | None:
    """Record and residues by place, of those that are kept; None if the file is refused."""
    rows = {}
    for place, record in enumerate(records):
        residues = record.clean or (record.masked if choices.invalid == "mask" else None)
        if residues is not None:
            rows[place] = record, residues
    if not rows or (choices.invalid == "error" and len(rows) < len(records)):
        return None
    if choices.long == "error" and any(len(residues) > LONGEST for _, residues in rows.values()):
        return None
    return rows


def read_rejects(folder: Path) -> list[int]:
    """Places, from 0, of the records left out; each row is checked."""
    with (folder / "rejects.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == HEADER
    assert all(len(row) == 3 and row[2] for row in rows[1:]), rows
    return [int(row[0]) - 1 for row in rows[1:]]


def check_store(out: Path, records: list[Expected], choices: Choices) -> tuple[int, int]:
    """Asserts that the store holds each record as a row or as a reject; returns how many of both."""
    rows = expected_rows(records, choices)
    assert rows is not None, "embedded, but had to be refused"
    index = pq.read_table(out / "index.parquet").to_pydict()
    assert index["position"] == list(rows)
    assert index["header"] == [record.header for record, _ in rows.values()]
    assert index["id"] == [record.id for record, _ in rows.values()]
    assert index["length"] == [len(residues) for _, residues in rows.values()]
    masked = [record.clean is None for record, _ in rows.values()]
    assert ["masked" in flags.split(",") for flags in index["flags"]] == masked
    rejects = read_rejects(out)
    assert sorted([*index["position"], *rejects]) == list(range(len(records)))
    assert read_embeddings(out).ids == index["id"]
    shards = [load_file(path) for path in sorted(out.glob("part-*.safetensors"))]
    different = (
        list(dict.fromkeys(residues for _, residues in rows.values())) if choices.dedup else list(range(len(rows)))
    )
    names = {"mean": "embeddings", "residue": "offsets"}
    extra = choices.pool == "residue"
    assert sum(len(shard[names[choices.pool]]) - extra for shard in shards) == len(different)
    assert all(np.isfinite(shard["embeddings"]).all() for shard in shards)
    if extra:
        run_once = different if choices.dedup else [residues for _, residues in rows.values()]
        assert sum(len(shard["embeddings"]) for shard in shards) == sum(map(len, run_once))
    if choices.dedup:
        assert index["row"] == [different.index(residues) for _, residues in rows.values()]
    else:
        assert index["row"] == different
    return len(rows), len(rejects)


def check_refusal(error: str, path: Path, out: Path, records: list[Expected] | None, choices: Choices) -> None:
    """Asserts that a file was refused with cause, by a message that names it, and that nothing looks like a store."""
    assert str(path) in error
    assert error.replace("\n", "").isprintable()
    assert not (out / "run.json").exists()
    assert records is None or expected_rows(records, choices) is None, f"refused without cause: {error}"


def embed_files(
    folder: Path,
    embedder: Embedder,
    seeds: range,
    make: Callable[[int], tuple[str, bytes]] = hostile_file,
    judge: Callable[[bytes, str], list[Expected] | None] = expect,
) -> Counter[str]:
    """Embeds the file of each seed, and counts what came of it."""
    counts: Counter[str] = Counter()
    out = folder / "out"
    for seed in seeds:
        name, data = make(seed)
        path = folder / name
        path.write_bytes(data)
        choices = choose(seed)
        embedder.pool, embedder.long = choices.pool, choices.long
        fasta.CHUNK_BYTES = random.Random(seed).choice([1, 2, 3, 7, 1 << 16, 1 << 16])
        try:
            records = judge(data, name)
            try:
                result = embed_library(path, out, embedder, choices.options)
            except InputError as error:
                check_refusal(str(error), path, out, records, choices)
                counts["refused"] += 1
                counts["refused as a whole"] += records is None
            else:
                assert records is not None, "embedded, but had to be refused"
                rows, rejects = check_store(out, records, choices)
                assert (result.survey.records, result.survey.rejected) == (rows, rejects)
                counts.update({"embedded": 1, "records": len(records), "rows": rows, "rejects": rejects})
        except BaseException:
            print(f"seed {seed}, {name}, {choices}: {data[:2000]!r}")
            raise
        shutil.rmtree(out, ignore_errors=True)
        path.unlink()
    return counts


def check_counts(counts: Counter[str], files: int) -> None:
    print(dict(counts))
    assert counts["embedded"] + counts["refused"] == files
    assert counts["rows"] + counts["rejects"] == counts["records"]
    # A generator of files that are all refused would prove nothing.
    assert counts["embedded"] > files / 2
    assert counts["refused as a whole"] > files / 20
    assert counts["rejects"] > files / 10


def test_hostile_files(tmp_path: Path, embedder: Embedder) -> None:
    check_counts(embed_files(tmp_path, embedder, range(FEW)), FEW)


def test_hostile_tables(tmp_path: Path, embedder: Embedder) -> None:
    check_counts(embed_files(tmp_path, embedder, range(TABLES), hostile_table, expect_rows), TABLES)


@pytest.mark.slow
def test_ten_thousand_hostile_files(tmp_path: Path, embedder: Embedder) -> None:
    check_counts(embed_files(tmp_path, embedder, range(MANY)), MANY)


def run_files(folder: Path, model: Path, seeds: range) -> Counter[str]:
    """The same through the executable, a process a file."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        name, data = hostile_file(seed)
        path, out = folder / str(seed) / name, folder / str(seed) / "out"
        path.parent.mkdir()
        path.write_bytes(data)
        choices, records = choose(seed), expect(data, name)
        command = [sys.executable, "-m", "protnest.engine.cli", "embed", str(path), "--out", str(out)]
        command += ["--model", str(model), "--precision", "fp32", "--json", *choices.arguments]
        done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        errors = done.stderr.decode("utf-8")
        where = f"seed {seed}, {choices}: {data[:2000]!r}\n{errors}"
        assert done.returncode in (0, 1), where
        assert "Traceback" not in errors, where
        if done.returncode:
            assert done.stdout == b"", where
            check_refusal(errors, path, out, records, choices)
            counts["refused"] += 1
            continue
        assert records is not None, where
        rows, rejects = check_store(out, records, choices)
        report: dict[str, Any] = json.loads(done.stdout)
        different = len(set(pq.read_table(out / "index.parquet")["row"].to_pylist()))
        assert (report["rejected"], report["sequences"]) == (rejects, different), where
        counts.update({"embedded": 1, "records": len(records), "rows": rows, "rejects": rejects})
    return counts


def test_hostile_files_through_the_executable(tmp_path: Path, model: Path) -> None:
    counts = run_files(tmp_path, model, range(IN_CI))
    assert min(counts["embedded"], counts["refused"], counts["rejects"]) > 0, counts


@pytest.mark.slow
def test_fifty_hostile_files_through_the_executable(tmp_path: Path, model: Path) -> None:
    counts = run_files(tmp_path, model, range(BY_HAND))
    print(dict(counts))
    assert min(counts["embedded"], counts["refused"], counts["rejects"]) > 5, counts


@pytest.mark.parametrize(
    ("data", "headers", "ids", "clean", "masked"),
    [
        (b"\xef\xbb\xbf>a x\r\nmk v*\r\r>b\nM>c\nK", ["a x", "b"], ["a", "b"], ["MKV", None], ["MKV", None]),
        (
            b"#c\n>a\n#>b\nMJ\xc3\n\xa9K\n>\n>c\xff\nMK\n",
            ["a", None, None],
            ["a", None, None],
            [None] * 3,
            ["MXXK", None, None],
        ),
        (b" >a\nMK\n\t>b\n**\n", ["a", "b"], ["a", "b"], ["MK", None], ["MK", None]),
    ],
)
def test_oracle(
    data: bytes, headers: list[str | None], ids: list[str | None], clean: list[str | None], masked: list[str | None]
) -> None:
    found = expect(data, "x.fasta") or []
    assert [record.header for record in found] == headers
    assert [record.id for record in found] == ids
    assert [record.clean for record in found] == clean
    assert [record.masked for record in found] == masked


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "x.fasta"),
        (b"#>a\n\n", "x.fasta"),
        (b"x\n>a\nMK\n", "x.fasta"),
        (b">a\nMK\n", "x.fasta.gz"),
        (b"\xff\xfe>\0a\0", "x.fasta"),
        (b"\x1f\x8b>a\nMK\n", "x.fasta"),
    ],
)
def test_oracle_refuses(data: bytes, name: str) -> None:
    assert expect(data, name) is None
