"""Scoring jobs whole: what decides their bits, where they stop and go on, and tables that nobody meant."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from protnest.engine import InputError
from protnest.engine.assay import AssayOptions
from protnest.engine.encoder import Encoder
from protnest.engine.score_job import ScoreJobResult, run_job
from protnest.engine.score_models import ScoreJob
from protnest.engine.score_run import ScoreRun
from protnest.engine.table import Table

from support.assays import Followed, Stopped
from support.tiny import save_tiny_model

WILD_TYPES = {"one": "MKTAYIAKQRQISFVKSHFS", "two": "GSHMWWACDE"}
TABLE = "target,mutant,mutated_sequence,n\n" + "".join(
    f"{name},{wild_type[site]}{site + 1}{letter},,{site}\n"
    for name, wild_type in WILD_TYPES.items()
    for site in range(4)
    for letter in "ACDV"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("models")
    return tuple(str(save_tiny_model(folder / f"tiny{seed}", seed=seed)) for seed in range(2))


@pytest.fixture
def job(tmp_path: Path, models: tuple[str, ...]) -> ScoreJob:
    wt = tmp_path / "wt.fasta"
    wt.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in WILD_TYPES.items()))
    (tmp_path / "one.csv").write_text(TABLE)
    return ScoreJob(
        wild_types=wt,
        tables=(tmp_path / "one.csv",),
        out=tmp_path / "s.csv",
        models=models[:1],
        device="cpu",
        precision="fp32",
        on_error="skip",
    )


def run(job: ScoreJob) -> ScoreJobResult:
    return run_job(job, Followed())


def settings(job: ScoreJob) -> dict[str, Any]:
    assert job.out is not None
    found: dict[str, Any] = json.loads(job.out.with_name(f"{job.out.name}.run.json").read_text())["settings"]
    return found


class StopAfter(Followed):
    """Progress that stops the run when so many batches are done."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def advance(self, residues: int) -> None:
        if self.left == 0:
            raise Stopped
        self.left -= 1


@pytest.mark.parametrize("method", ["masked-marginal", "wt-marginal", "mutant-marginal", "pseudo-ll"])
def test_stopped_anywhere_it_ends_the_same(
    job: ScoreJob, models: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("protnest.engine.score_run._CHUNK_RESIDUES", 200)
    monkeypatch.setattr("protnest.engine.score_run._CHUNK_BATCHES", 1)
    monkeypatch.setattr("protnest.engine.score_state._SECONDS_BETWEEN_SAVES", -1.0)
    job = dataclasses.replace(job, method=method, models=models, max_tokens=250)
    whole = run(job)
    assert job.out is not None
    expected = job.out.read_bytes()
    batches = 0
    while True:
        cut = dataclasses.replace(job, out=job.out.with_name(f"cut{batches}.csv"))
        assert cut.out is not None
        try:
            run_job(cut, StopAfter(batches))
        except Stopped:
            assert not cut.out.exists()
            assert cut.out.with_name(f".{cut.out.name}.work").is_dir()
            again = run(cut)
            assert again.residues <= whole.residues
            assert cut.out.read_bytes() == expected
            assert not cut.out.with_name(f".{cut.out.name}.work").exists()
            batches += 1 + batches // 2
        else:
            break
    assert batches >= 4


def test_stopped_while_tables_are_written(job: ScoreJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.csv").write_text(TABLE)
    job = dataclasses.replace(job, tables=(*job.tables, tmp_path / "b.csv"), out=tmp_path / "out")
    whole = dataclasses.replace(job, out=tmp_path / "whole")
    run(whole)
    written = 0
    real = ScoreRun.run

    def count(self: ScoreRun) -> Any:
        nonlocal written
        result = real(self)
        written = result.residues
        return result

    monkeypatch.setattr(ScoreRun, "run", count)
    with monkeypatch.context() as patch:
        patch.setattr("protnest.engine.score_job.ScoreOutputs.write_record", lambda *given, **details: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(job)
    assert written > 0
    assert (tmp_path / "out" / "b.csv").exists()
    assert not (tmp_path / "out" / "run.json").exists()
    (tmp_path / "out" / "b.csv").unlink()
    assert run(job).residues == 0, "all that was run was kept"
    for name in ("one.csv", "b.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.csv", "one.csv", "run.json"]


def test_a_table_that_was_removed_is_written_again(job: ScoreJob) -> None:
    run(job)
    assert job.out is not None
    before = job.out.read_bytes()
    job.out.unlink()
    assert not run(job).finished_before
    assert job.out.read_bytes() == before


CHANGES: dict[str, dict[str, Any]] = {
    "method": {"method": "wt-marginal"},
    "compat": {"method": "pseudo-ll", "compat": "fair-esm"},
    "precision": {"precision": "bf16"},
    "max_tokens": {"max_tokens": 100},
    "aggregate": {"aggregate": "max"},
    "on_error": {"on_error": "error"},
    "columns": {"score_column": "ours"},
    "offset": {"reading": AssayOptions(offset=1)},
    "target": {"reading": AssayOptions(target="one")},
    "invalid": {"reading": AssayOptions(invalid="mask")},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_bits_is_in_the_settings(job: ScoreJob, name: str, tmp_path: Path) -> None:
    run(job)
    other = dataclasses.replace(job, **CHANGES[name])
    with pytest.raises(InputError, match=f"was written with other settings .*{name}: "):
        run(other)


@pytest.mark.parametrize(
    "changes",
    [{"mutant_column": "n"}, {"sequence_column": "n"}, {"target_column": "n"}],
    ids=lambda each: next(iter(each)),
)
def test_columns_are_settings(job: ScoreJob, changes: dict[str, str]) -> None:
    job = dataclasses.replace(job, reading=AssayOptions(target="one"))
    run(job)
    with pytest.raises(InputError, match="columns: "):
        run(dataclasses.replace(job, reading=AssayOptions(target="one", **changes)))  # type: ignore[arg-type]


def test_files_and_models_are_settings(job: ScoreJob, models: tuple[str, ...], tmp_path: Path) -> None:
    run(job)
    with pytest.raises(InputError, match="models: "):
        run(dataclasses.replace(job, models=models[1:]))
    with pytest.raises(InputError, match="models: "):
        run(dataclasses.replace(job, models=models))
    job.tables[0].write_text(TABLE + "one,K2F,,1\n")
    with pytest.raises(InputError, match="tables: "):
        run(job)
    job.tables[0].write_text(TABLE)
    job.wild_types.write_text(job.wild_types.read_text() + ">three\nMKT\n")
    with pytest.raises(InputError, match="wild_types: "):
        run(job)


def test_what_decides_no_bits_is_not(job: ScoreJob, tmp_path: Path) -> None:
    run(job)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "one.csv").write_text(TABLE)
    (moved / "wt.fa").write_bytes(job.wild_types.read_bytes())
    same = dataclasses.replace(job, wild_types=moved / "wt.fa", tables=(moved / "one.csv",))
    same = dataclasses.replace(same, report=True, truth_column="n", cutoff=2)
    result = run(same)
    assert (result.finished_before, result.residues) == (True, 0)
    assert [judgement.positives for judgement in result.judgements if judgement.subset == "all"] == [4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, "method is 'best'"),
        ({"compat": "fair-esm"}, "compat is 'fair-esm' with masked-marginal"),
        ({"aggregate": "sum"}, "aggregate is 'sum'"),
    ],
)
def test_unknown_choices_are_refused(job: ScoreJob, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(job, **changes))
    assert job.out is not None
    assert not job.out.exists()


def test_scores_that_are_not_finite_write_nothing(job: ScoreJob, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Encoder.row_logits
    monkeypatch.setattr(Encoder, "row_logits", lambda *given: real(*given) * float("nan"))
    with pytest.raises(InputError, match=r"one\.csv, line 2, record 1: the score is not finite"):
        run(job)
    assert job.out is not None
    assert not job.out.exists()


HEADERS = [
    "mutant",
    "mutated_sequence",
    "target",
    "DMS_score",
    "DMS_score_bin",
    "n",
    "",
    "score",
    "mutant ",
    "é,;",
    '"',
]
CELLS = [
    "K2A",
    "WT",
    "k2a:A4G",
    "K2",
    "A-1G",
    "K2*",
    "K2J",
    "M0A",
    "K2A:K2A",
    "A9999999999999999999999G",
    "",
    " ",
    "one",
]
CELLS += [
    "two",
    "three",
    "1.5",
    "nan",
    "inf",
    "-0",
    "1e999",
    "MKTAYIAKQRQISFVKSHFS",
    "MKTAYIAKQRQISFVKSHF",
    "MKT*",
    "*",
]
CELLS += [
    '"',
    "'",
    "\r",
    "\n",
    "\t",
    ";",
    "#",
    "\0",
    "\ufeff",
    "é",
    "\U0001d538",
    "K\uff12A",
    "\u017f1A",
    "\u0130",
    "=1+1",
    "G1S",
    "X" * 200,
]


def hostile(rng: random.Random) -> bytes:
    """A small table with a few things wrong with it."""
    columns = rng.sample(["mutant", "mutated_sequence", "target", "DMS_score", "n"], rng.randint(1, 5))
    if rng.random() < 0.9:
        columns = list(dict.fromkeys(["mutant", *columns]))
    good = {
        "mutant": ["K2A", "T3G:K2R", "WT", "A4A"],
        "mutated_sequence": [""],
        "target": ["one"],
        "DMS_score": ["1.5"],
    }
    rows = [[rng.choice(good.get(name, ["x"])) for name in columns] for _ in range(rng.randint(0, 6))]
    if rng.random() < 0.15:
        columns[rng.randrange(len(columns))] = rng.choice(HEADERS)
    for row in rows:
        if rng.random() < 0.4:
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        if rng.random() < 0.1:
            row.append(rng.choice(CELLS))
        if rng.random() < 0.05:
            row.pop()
    quoted = rng.random() < 0.5
    lines = []
    for row in [columns, *rows]:
        lines.append(",".join('"' + cell.replace('"', '""') + '"' if quoted else cell for cell in row))
    content = bytearray(rng.choice(["\n", "\r\n", "\r"]).join(lines).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 3)):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.05:
        del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


def test_hostile_tables(job: ScoreJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is scored, all rows accounted for, or refused as a user's mistake; 300 of them, many of each."""
    from protnest.engine.models import load_model

    encoder = load_model(job.models[0] if job.models else "", device="cpu", precision="fp32")
    monkeypatch.setattr("protnest.engine.score_models.load_model", lambda *given, **options: encoder)
    rng = random.Random(6)
    scored = refused = 0
    for number in range(300):
        folder = tmp_path / str(number)
        folder.mkdir()
        table = folder / rng.choice(["one.csv"] * 6 + ["one.tsv", "one.txt"])
        table.write_bytes(hostile(rng))
        reading = AssayOptions(invalid=rng.choice(["error", "mask"]), offset=rng.choice([0, 0, 0, 1]))
        method = rng.choice(["masked-marginal", "wt-marginal", "mutant-marginal", "pseudo-ll"])
        out = folder / f"s{rng.choice(['.csv', '.tsv', '.parquet'])}"
        changed = dataclasses.replace(
            job, tables=(table,), out=out, reading=reading, method=method, report=rng.random() < 0.3
        )
        problem = ""
        try:
            result = run(changed)
        except InputError as error:
            problem = str(error)
        if problem:
            refused += 1
            assert table.name in problem, table.read_bytes()
            assert [path.name for path in folder.iterdir()] == [table.name], problem
            continue
        scored += 1
        rows = list(Table(table).rows(ragged=True))
        rejects = folder / "s.rejects.csv"
        bad = set()
        if rejects.exists():
            with rejects.open(newline="", encoding="utf-8") as file:
                bad = {int(each["row"]) for each in csv.DictReader(file)}
        assert (result.rows, result.rejected) == (len(rows), len(bad))
        written = [row.cells for row in Table(out).rows()]
        assert len(written) == len(rows) - len(bad)
        if out.suffix != ".parquet":
            kept = [row.cells for row in rows if row.number not in bad]
            assert [cells[: len(kept[0])] for cells in written] == kept
    assert min(scored, refused) > 60, (scored, refused)
