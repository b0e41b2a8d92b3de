"""The last reading: rows as they were, each with its own score."""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import InputError
from protnest.engine.alphabet import TOKEN_IDS
from protnest.engine.assay import Entry
from protnest.engine.score_run import RunResult, ScoreRun
from protnest.engine.score_state import ScoreState
from protnest.engine.score_survey import Survey, SurveyOptions
from protnest.engine.score_table import ScoreColumns, look_up, write_scores
from protnest.engine.table import Table

from support.assays import OTHER, WILD_TYPE, CountingScorer, Followed, number_of, survey, write_tables

TABLE = (
    'n,target,mutant,note\n1,one,K2A,"a,b"\n2,two,G1A,\n3,one,G9A,bad\n4,one,A4G:K2R, x\n5,one,K2A,é\n6,two,WT,"q"""\n'
)


def run(found: Survey, options: SurveyOptions, models: tuple[str, ...] = ("a",)) -> RunResult:
    def load(model: int, after: Any) -> CountingScorer:
        return CountingScorer(
            after, name=models[model], by_site=options.by_site, against_wild_type=options.with_wild_type
        )

    with ScoreState(None, {}) as state:
        return ScoreRun(found, models, load, state, Followed()).run()


def scores_of(found: Survey, result: RunResult, options: SurveyOptions, number: int = 0) -> npt.NDArray[np.float64]:
    parts = look_up(
        found, found.assays[number], result, by_site=options.by_site, against_wild_type=options.with_wild_type
    )
    return np.concatenate([scores for _, scores in parts], axis=1)


@pytest.fixture(params=[1, 2, 4096])
def _rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.engine.score_table._ROWS_AT_ONCE", request.param)


@pytest.mark.usefixtures("_rows_at_once")
@pytest.mark.parametrize("with_wild_type", [False, True])
def test_mutants_have_their_units_values(tmp_path: Path, with_wild_type: bool) -> None:
    options = SurveyOptions(by_site=False, with_wild_type=with_wild_type, on_error="skip")
    found = survey(write_tables(tmp_path, {"t.csv": TABLE, "one.csv": "mutant\nK8A\nWT\n"}), options)
    result = run(found, options, ("a", "b"))

    def expected(model: str, wild_type: str, mutant: str) -> float:
        together = (len(found.proteins[wild_type].units)) / 1024
        base = number_of(f"{model} {wild_type} {wild_type}") + together if with_wild_type else 0
        return number_of(f"{model} {wild_type} {mutant}") + together - base

    rows = [
        (WILD_TYPE, "MATAYIAK"),
        (OTHER, "ASHMWW"),
        (WILD_TYPE, "MRTGYIAK"),
        (WILD_TYPE, "MATAYIAK"),
        (OTHER, OTHER),
    ]
    got = scores_of(found, result, options)
    np.testing.assert_array_equal(got, [[expected(model, *row) for row in rows] for model in ("a", "b")])
    second = [(WILD_TYPE, "MKTAYIAA"), (WILD_TYPE, WILD_TYPE)]
    got = scores_of(found, result, options, 1)
    np.testing.assert_array_equal(got, [[expected(model, *row) for row in second] for model in ("a", "b")])


@pytest.mark.usefixtures("_rows_at_once")
def test_sites_scores_are_sums_of_differences(tmp_path: Path) -> None:
    options = SurveyOptions(by_site=True, on_error="skip")
    found = survey(write_tables(tmp_path, {"t.csv": TABLE}), options)
    result = run(found, options, ("a", "b"))

    def gain(model: int, wild_type: str, place: int, letter: str) -> float:
        row = result.values[wild_type][model][found.proteins[wild_type].places.index(place)].astype(np.float64)
        return float(row[TOKEN_IDS[letter]] - row[TOKEN_IDS[wild_type[place]]])

    for model, scores in enumerate(scores_of(found, result, options)):
        k2a, g1a = gain(model, WILD_TYPE, 1, "A"), gain(model, OTHER, 0, "A")
        both = gain(model, WILD_TYPE, 3, "G") + gain(model, WILD_TYPE, 1, "R")
        np.testing.assert_array_equal(scores, np.array([k2a, g1a, both, k2a, 0], dtype=np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("by_site", [False, True])
def test_scores_that_are_not_finite_are_refused(tmp_path: Path, bad: float, by_site: bool) -> None:
    options = SurveyOptions(by_site=by_site, on_error="skip")
    (path,) = write_tables(tmp_path, {"t.csv": TABLE})
    found = survey([path], options)
    result = run(found, options, ("a", "b"))
    # K2A and A4G:K2R stand at site 2; the latter alone is the second mutant.
    result.values[WILD_TYPE][1][0 if by_site else 1] = bad
    line, row = (2, 1) if by_site else (5, 4)
    message = f"{path}, line {line}, record {row}: the score is not finite: fp16 ends at 65,504; take --precision bf16"
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match=re.escape(message)):
        scores_of(found, result, options)


def score(
    folder: Path, source: Path, out: Path | None, columns: ScoreColumns, **reading: Any
) -> npt.NDArray[np.float32]:
    options = SurveyOptions(by_site=False, on_error="skip")
    found = survey([source], options, **reading)
    result = run(found, options, columns.models or ("a",))
    columns.check(found.assays[0].assay.source)
    parts = look_up(found, found.assays[0], result, by_site=False, against_wild_type=False)
    return write_scores(found.assays[0], parts, columns, out)


def read(path: Path) -> list[list[str]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    return list(csv.reader(text.splitlines(keepends=True), delimiter="\t" if ".tsv" in path.name else ","))


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz", "s.tsv", "s.tsv.gz"])
def test_rows_keep_their_cells_and_order(tmp_path: Path, name: str) -> None:
    (source,) = write_tables(tmp_path, {"t.csv": TABLE})
    scores = score(tmp_path, source, tmp_path / "new" / name, ScoreColumns(score="ours"))
    rows = read(tmp_path / "new" / name)
    kept = [row for row in read(source) if "bad" not in row]
    assert [row[:-1] for row in rows] == kept
    assert rows[0][-1] == "ours"
    assert [np.float32(row[-1]) for row in rows[1:]] == scores.tolist()
    assert (scores.dtype, len(scores)) == (np.float32, 5)


@pytest.mark.parametrize("aggregate", ["mean", "median", "min", "max"])
def test_ensembles_keep_each_models_scores(tmp_path: Path, aggregate: str) -> None:
    (source,) = write_tables(tmp_path, {"t.csv": TABLE})
    columns = ScoreColumns(models=("a", "b", "c"), aggregate=aggregate, flags=True)
    assert columns.names == ("score", "score_a", "score_b", "score_c", "flags")
    scores = score(tmp_path, source, tmp_path / "s.parquet", columns)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["n", "target", "mutant", "note", *columns.names]
    each = [
        [number_of(f"{model} {WILD_TYPE} {text}") + 2 / 1024 for text in ("MATAYIAK", "MRTGYIAK")] for model in "abc"
    ]
    for place, model in enumerate("abc"):
        got = table[f"score_{model}"].to_numpy()[[0, 2, 3]]
        np.testing.assert_array_equal(got, np.array([*each[place], each[place][0]], dtype=np.float32))
    expected = getattr(np, aggregate)(np.array(each), axis=0).astype(np.float32)
    np.testing.assert_array_equal(scores[[0, 2, 3]], [*expected, expected[0]])
    assert table["score"].to_pylist() == scores.tolist()
    assert table["flags"].to_pylist() == [""] * 5


def test_a_csv_gets_types_in_parquet(tmp_path: Path) -> None:
    text = "mutant,count,value,text\nK2A,1,0.5,7\nK2R,,1.25,x\nG3A,none,none,none\nWT,-3,,\n"
    (source,) = write_tables(tmp_path, {"one.csv": text})
    score(tmp_path, source, tmp_path / "s.parquet", ScoreColumns())
    table = pq.read_table(tmp_path / "s.parquet")
    types = [pa.string(), pa.int64(), pa.float64(), pa.string(), pa.float32()]
    assert table.schema.types == types
    assert table["count"].to_pylist() == [1, None, -3]
    assert table["value"].to_pylist() == [0.5, 1.25, None]
    assert table["text"].to_pylist() == ["7", "x", ""]


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("mutant", pa.large_string(), nullable=False),
            ("n", pa.int8()),
            ("x", pa.float32()),
            ("on", pa.bool_()),
            ("day", pa.date32()),
            ("list", pa.list_(pa.int32())),
            ("kind", pa.dictionary(pa.int8(), pa.string())),
        ]
    )
    columns = [["K2A", "G3A", "WT"], [1, 2, None], [0.1, 0.2, None], [True, True, None], [1, 2, 3], [[1], [2], []]]
    columns.append(["u", "v", "u"])
    table = pa.Table.from_arrays(
        [pa.array(cells, field.type) for cells, field in zip(columns, schema, strict=True)], schema=schema
    )
    pq.write_table(table, tmp_path / "one.parquet")
    score(tmp_path, tmp_path / "one.parquet", tmp_path / "s.parquet", ScoreColumns())
    written = pq.read_table(tmp_path / "s.parquet")
    assert written.schema.names == [*schema.names, "score"]
    assert written.schema.field("score").type == pa.float32()
    assert written.drop_columns(["score"]).to_pylist() == table.take([0, 2]).to_pylist()
    assert [field.type for field in written.schema][:-1] == pq.read_schema(tmp_path / "one.parquet").types
    assert written.schema.field("mutant").nullable is False
    with pytest.raises(InputError, match=r"s\.csv: cannot hold the column 'list' of type list<"):
        score(tmp_path, tmp_path / "one.parquet", tmp_path / "s.csv", ScoreColumns())


def test_what_a_file_cannot_hold_is_known_before_anything_runs(tmp_path: Path) -> None:
    pq.write_table(pa.table({"mutant": ["K2A"], "raw": [b"x"]}), tmp_path / "one.parquet")
    (surveyed,) = survey([tmp_path / "one.parquet"], SurveyOptions(by_site=True)).assays
    ScoreColumns().check_output(surveyed, tmp_path / "s.parquet")
    with pytest.raises(InputError, match="cannot hold the column 'raw' of type binary"):
        ScoreColumns().check_output(surveyed, tmp_path / "s.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["one.parquet"]


def test_lists_get_columns(tmp_path: Path) -> None:
    (source,) = write_tables(tmp_path, {"one.txt": "# by hand\n K2A\n\nWT\n"})
    scores = score(tmp_path, source, tmp_path / "s.csv", ScoreColumns())
    assert read(tmp_path / "s.csv") == [["mutant", "score"], ["K2A", str(scores[0])], ["WT", str(scores[1])]]


def test_flags_tell_of_letters_replaced(tmp_path: Path) -> None:
    (source,) = write_tables(tmp_path, {"one.csv": "mutant\nK2J\nK2A\n"})
    score(tmp_path, source, tmp_path / "s.csv", ScoreColumns(flags=True), invalid="mask")
    assert [row[-1] for row in read(tmp_path / "s.csv")] == ["flags", "masked", ""]


def test_nothing_is_written_without_a_place(tmp_path: Path) -> None:
    (source,) = write_tables(tmp_path, {"one.csv": "mutant\nK2A\nWT\n"})
    assert len(score(tmp_path, source, None, ScoreColumns())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["one.csv"]


def test_an_error_on_the_way_leaves_the_older_table(tmp_path: Path) -> None:
    (source,) = write_tables(tmp_path, {"one.csv": "mutant\nK2A\nWT\n"})
    (tmp_path / "s.csv").write_text("older")
    options = SurveyOptions(by_site=False)
    found = survey([source], options)

    def fail(entries: list[Entry], scores: object) -> None:
        raise KeyboardInterrupt

    parts = look_up(found, found.assays[0], run(found, options), by_site=False, against_wild_type=False)
    with pytest.raises(KeyboardInterrupt):
        write_scores(found.assays[0], parts, ScoreColumns(), tmp_path / "s.csv", after_rows=fail)
    assert (tmp_path / "s.csv").read_text() == "older"
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        (
            "mutant,score",
            ScoreColumns(),
            "one.csv: has a column 'score' of its own; --score-col gives ours another name",
        ),
        ("mutant,s_b", ScoreColumns(score="s", models=("a", "b")), "has a column 's_b' of its own; --score-col gives"),
        ("mutant,flags", ScoreColumns(flags=True), "has a column 'flags' of its own; rename it"),
        ("mutant,x", ScoreColumns(models=("a", "a")), "models of one name (a, a) would share the column 'score_a'"),
        ("mutant,x", ScoreColumns(score="flags", flags=True), "scores and flags would share the column 'flags'"),
        ("mutant,x", ScoreColumns(score=" "), "the column of scores needs a name"),
    ],
)
def test_columns_that_clash(tmp_path: Path, header: str, columns: ScoreColumns, message: str) -> None:
    (source,) = write_tables(tmp_path, {"one.csv": f"{header}\nK2A,1\n"})
    with pytest.raises(InputError, match=re.escape(message)):
        columns.check(Table(source))


def test_one_models_columns_do_not_clash(tmp_path: Path) -> None:
    (source,) = write_tables(tmp_path, {"one.csv": "mutant,score_a,flags\nK2A,1,2\n"})
    ScoreColumns(models=("a",)).check(Table(source))
