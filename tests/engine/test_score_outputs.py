"""Where scores go: files for one table, a folder for several, and nothing that is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from protnest.engine import InputError
from protnest.engine.score_outputs import SCHEMA_VERSION, ScoreOutputs

SETTINGS = {"method": "pseudo-ll", "tables": [["a.csv", "x"]], "cutoff": None}


@pytest.mark.parametrize(
    ("name", "stem"),
    [("s.csv", "s"), ("s.tsv.gz", "s"), ("S.V2.CSV.GZ", "S.V2"), ("s.parquet", "s"), ("all.scored.tsv", "all.scored")],
)
def test_one_table_gives_a_file(tmp_path: Path, name: str, stem: str) -> None:
    assert ScoreOutputs.at(tmp_path / name, [Path("a.csv")]) == ScoreOutputs(
        tables=(tmp_path / name,),
        record=tmp_path / f"{name}.run.json",
        work=tmp_path / f".{name}.work",
        rejects=tmp_path / f"{stem}.rejects.csv",
        report=tmp_path / f"{stem}.report.json",
    )


def test_several_tables_give_a_folder(tmp_path: Path) -> None:
    sources = [Path(name) for name in ("x/a.csv", "b.TSV.gz", "c.parquet", "d.txt", "e.txt.gz", "F.TXT")]
    found = ScoreOutputs.at(tmp_path / "out.v1", sources)
    names = ["a.csv", "b.TSV.gz", "c.parquet", "d.csv", "e.csv", "F.csv"]
    assert found.tables == tuple(tmp_path / "out.v1" / name for name in names)
    rest = [
        path.relative_to(tmp_path / "out.v1").name for path in (found.record, found.work, found.rejects, found.report)
    ]
    assert rest == ["run.json", ".work", "rejects.csv", "report.json"]


def test_one_table_may_go_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "there.csv").mkdir()
    for out in (tmp_path / "there.csv", tmp_path / "new"):
        assert ScoreOutputs.at(out, [Path("a.csv")]).tables == (out / "a.csv",)


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    several = [Path("a.csv"), Path("b.csv")]
    cases = [
        (tmp_path / "file", several, "file: is a file's name; the scores of 2 tables go to a folder"),
        (
            tmp_path / "file",
            several[:1],
            "file: is a file's name; the scores of 1 table go to a folder, or to .csv, .tsv",
        ),
        (tmp_path / "new.csv", several, "new.csv: is a file's name; the scores of 2 tables"),
        (
            tmp_path / "out",
            [Path("x/a.csv"), Path("y/a.csv")],
            "a.csv: would be written twice: y/a.csv is not the only",
        ),
        (tmp_path / "out", [Path("a.txt"), Path("a.csv")], "would be written twice: a.csv is not the only table"),
        (
            tmp_path / "out",
            [Path("rejects.csv")],
            "would be written twice: rejects.csv is called as the list of rejects",
        ),
        (tmp_path / "file" / "s.csv", several[:1], "cannot be written"),
        (tmp_path / "file" / "out", several, "cannot be written"),
    ]
    for out, sources, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            ScoreOutputs.at(out, sources)


@pytest.mark.parametrize(
    ("out", "source", "other"),
    [
        ("a.csv", "a.csv", None),
        (".", "a.csv", None),
        ("x/../a.csv", "a.csv", None),
        ("s.csv", "s.rejects.csv", None),
        ("wt.csv", "a.csv", "wt.csv"),
        ("s.csv", "a.csv", "s.report.json"),
        ("s.csv", "a.csv", "s.csv.run.json"),
    ],
)
def test_nothing_that_is_read_is_written_over(tmp_path: Path, out: str, source: str, other: str | None) -> None:
    others = [] if other is None else [tmp_path / other]
    with pytest.raises(InputError, match="is read and would be written over; choose another --out"):
        ScoreOutputs.at(tmp_path / out, [tmp_path / source], others=others)


def test_links_to_what_is_read_are_seen_through(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mutant\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")
    with pytest.raises(InputError, match="is read and would be written over"):
        ScoreOutputs.at(tmp_path / "link.csv", [tmp_path / "a.csv"])


@pytest.fixture
def outputs(tmp_path: Path) -> ScoreOutputs:
    return ScoreOutputs.at(tmp_path / "out", [Path("a.csv"), Path("b.csv")])


def test_finished_or_not(outputs: ScoreOutputs) -> None:
    one, two = outputs.tables
    one.parent.mkdir()
    assert not outputs.is_finished(SETTINGS, overwrite=False)
    one.write_text("scores")
    with pytest.raises(
        InputError, match=re.escape(f"{one}: is there already, and run.json, which would say what it is")
    ):
        outputs.is_finished(SETTINGS, overwrite=False)
    assert not outputs.is_finished(SETTINGS, overwrite=True)
    outputs.work.mkdir()
    assert not outputs.is_finished(SETTINGS, overwrite=False), "one of two tables was written before a run was killed"
    outputs.write_record(SETTINGS, files=[])
    assert not outputs.is_finished(SETTINGS, overwrite=False)
    two.write_text("scores")
    assert outputs.is_finished(SETTINGS, overwrite=False)
    assert not outputs.is_finished(SETTINGS, overwrite=True)
    record = json.loads(outputs.record.read_text())
    assert record == {"schema_version": SCHEMA_VERSION, "settings": SETTINGS, "files": []}
    one.unlink()
    two.unlink()
    assert not outputs.is_finished({"other": 1}, overwrite=False), "a record without tables keeps nobody from writing"


def test_other_settings_are_named(outputs: ScoreOutputs) -> None:
    outputs.record.parent.mkdir()
    outputs.tables[1].write_text("scores")
    outputs.write_record(SETTINGS)
    message = f"{outputs.tables[1]}: was written with other settings (method: pseudo-ll there, wt-marginal now); choose"
    with pytest.raises(InputError, match=re.escape(message)):
        outputs.is_finished({**SETTINGS, "method": "wt-marginal"}, overwrite=False)
    assert not outputs.is_finished({**SETTINGS, "method": "wt-marginal"}, overwrite=True)
    record = json.loads(outputs.record.read_text())
    outputs.record.write_text(json.dumps({**record, "schema_version": 2}))
    with pytest.raises(InputError, match=r"other settings \(schema version: 2 there, 1 now\)"):
        outputs.is_finished(SETTINGS, overwrite=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema_version": 1}', '{"settings": 3, "schema_version": 1}', "\udcff"]
)
def test_unreadable_records_are_told(outputs: ScoreOutputs, text: str) -> None:
    outputs.record.parent.mkdir()
    outputs.tables[0].write_text("scores")
    outputs.record.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=r"run\.json: not a readable record of a run .*; --overwrite starts anew"):
        outputs.is_finished(SETTINGS, overwrite=False)
    assert not outputs.is_finished(SETTINGS, overwrite=True)


def test_beginning_forgets_the_older_run(outputs: ScoreOutputs) -> None:
    outputs.begin(rejected=0)
    outputs.record.parent.mkdir()
    outputs.record.write_text("{}")
    outputs.rejects.write_text("of this run")
    outputs.begin(rejected=1)
    assert (outputs.record.exists(), outputs.rejects.exists()) == (False, True)
    outputs.begin(rejected=0)
    assert not outputs.rejects.exists()
