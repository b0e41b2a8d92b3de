"""Tables written: cells come back as they were, files are whole or absent, memory stays where it was."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from protnest.engine import InputError
from protnest.engine.table import Table
from protnest.engine.table_writer import REJECT_COLUMNS, ColumnKinds, Rejects, TableWriter, check_output

ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")


def write(path: Path, columns: Sequence[str], kinds: Sequence[Any], rows: Sequence[Sequence[object]]) -> Path:
    with TableWriter(path, columns, kinds) as writer:
        for row in rows:
            writer.write([row])
    return path


def text_of(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.name.endswith(".gz") else content).decode()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def find_kinds(*columns: Sequence[str | None]) -> tuple[str, ...]:
    found = ColumnKinds(len(columns))
    for row in zip(*columns, strict=True):
        found.see(row)
    return found.kinds


@pytest.mark.parametrize("ending", ENDINGS[:4])
def test_text(tmp_path: Path, ending: str) -> None:
    rows = [
        ("A24G", 7, np.float32(-1.2345678), None),
        ('x,"y"\tz', np.int64(-7), 0.1, float("nan")),
        ("a\r", True, np.float32("nan"), np.float32(1e-20)),
        ("\nb", np.bool_(False), np.float16(0.1), ""),
    ]
    path = write(
        tmp_path / f"t{ending}", ("mutant", "n", "score", "other"), ("text", "integer", "number", "text"), rows
    )
    delimiter = "\t" if ".tsv" in ending else ","
    assert text_of(path).startswith(delimiter.join(("mutant", "n", "score", "other\n")))
    assert ("A24G", "7", "-1.2345678", "\n")[:3] == tuple(text_of(path).split("\n")[1].split(delimiter)[:3])
    expected = [
        ("A24G", "7", "-1.2345678", ""),
        ('x,"y"\tz', "-7", "0.1", ""),
        ("a\r", "true", "", "1e-20"),
        ("\nb", "false", "0.1", ""),
    ]
    assert [row.cells for row in Table(path).rows()] == expected
    assert [path.name] == names(tmp_path)


def test_text_ends_with_line_feeds(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ("a", "b"), ("text", "text"), [("1", "x\r\ny"), ("2", "")])
    assert path.read_bytes() == b'a,b\n1,"x\r\ny"\n2,\n'


def test_equal_rows_are_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one.csv.gz", ("a",), ("text",), [("x",)]).read_bytes()
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert write(tmp_path / "two.csv.gz", ("a",), ("text",), [("x",)]).read_bytes() == one
    assert one[4:8] == bytes(4), "no date"
    assert b"one" not in one, "no name"


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.sampled_from(
    ["", '"', "\r", "\n", "\r\n", ",", '","', "a\rb", " x ", "#", "\u2028", "\ufeff", "007"]
)
ONE_BY_ONE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ONE_BY_ONE
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6), st.sampled_from(ENDINGS))
@example([("", ""), ("\r", '"')], ".csv")
def test_text_comes_back(tmp_path: Path, rows: list[tuple[str, str]], ending: str) -> None:
    path = write(tmp_path / f"t{ending}", ("a b", "c"), ("text", "text"), rows)
    table = Table(path)
    assert (table.columns, [row.cells for row in table.rows()]) == (("a b", "c"), rows)
    copy = write(tmp_path / f"copy{ending}", table.columns, table.kinds, [row.cells for row in table.rows()])
    assert copy.read_bytes() == path.read_bytes()


@ONE_BY_ONE
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=6), st.lists(st.floats(allow_nan=False)))
@example([-1.2345678, 1e16, 16777216.0, 1e-45, float("inf")], [])
def test_floats_come_back(tmp_path: Path, singles: list[float], doubles: list[float]) -> None:
    rows: list[tuple[object]] = [(np.float32(value),) for value in singles]
    rows += [(value,) for value in doubles]
    path = write(tmp_path / "t.csv", ("score",), ("number",), rows)
    back = [row.cells[0] for row in Table(path).rows()]
    assert [np.float32(cell) for cell in back[: len(singles)]] == [np.float32(value) for value in singles]
    assert [float(cell) for cell in back[len(singles) :]] == doubles
    parquet = write(tmp_path / "t.parquet", ("score",), ("number",), rows)
    assert [row.cells[0] for row in Table(parquet).rows()] == [*map(float, map(np.float32, singles)), *doubles]
    typed = write(tmp_path / "u.parquet", ("score",), ("number",), [(cell,) for cell in back[len(singles) :]])
    assert pq.read_table(typed)["score"].to_pylist() == doubles


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    decimals = pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-2.00")], pa.decimal128(9, 2))
    columns = {
        "mutant": pa.array(["A1G", None, ""], pa.large_string()),
        "n": pa.array([1, None, -3], pa.int8()),
        "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
        "single": pa.array([0.1, None, float("nan")], pa.float32()),
        "double": pa.array([0.1, None, float("nan")]),
        "half": pa.array([0.1, None, float("nan")], pa.float16()),
        "good": pa.array([True, None, False]),
        "word": pa.array(["x", None, "y"]).dictionary_encode(),
        "code": pa.array([7, None, 9], pa.int16()).dictionary_encode(),
        "day": pa.array([datetime.date(2024, 2, 29), None, None]),
        "time": pa.array([1_700_000_000_123_456_789, None, 0], pa.timestamp("ns", "UTC")),
        "price": decimals,
        "raw": pa.array([b"\xff", None, b""]),
        "list": pa.array([[1.5], None, []], pa.list_(pa.float32())),
        "struct": pa.array([{"a": 1}, None, {"a": None}]),
        "nothing": pa.nulls(3),
    }
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    fields.append(pa.field("sure", pa.int32(), nullable=False, metadata={"unit": "residues"}))
    source = pa.table([*columns.values(), pa.array([1, 2, 3], pa.int32())], schema=pa.schema(fields))
    pq.write_table(source, tmp_path / "in.parquet", row_group_size=2)
    table = Table(tmp_path / "in.parquet")
    columns_out, kinds = (*table.columns, "score"), (*table.kinds, pa.float32())
    scored = [(*row.cells, np.float32(row.number / 3)) for row in table.rows()]
    found = pq.read_table(write(tmp_path / "out.parquet", columns_out, kinds, scored))
    as_read = pq.read_schema(tmp_path / "in.parquet")  # A list's `item` became an `element`.
    assert found.schema.equals(pa.schema([*as_read, ("score", pa.float32())]), check_metadata=True)
    assert found.schema.field("sure").metadata[b"unit"] == b"residues"
    assert not found.schema.field("sure").nullable
    for name in source.column_names:
        if name != "time":  # Python's times have no nanoseconds.
            assert repr(found[name].to_pylist()) == repr(source[name].to_pylist()), name
    assert found["time"].cast(pa.int64()).to_pylist() == [1_700_000_000_123_456_789, None, 0]
    assert found["score"].to_pylist() == [np.float32(row / 3) for row in (1, 2, 3)]


def test_parquet_to_text(tmp_path: Path) -> None:
    columns = {
        "single": pa.array([0.1, None, float("nan")], pa.float32()),
        "day": pa.array([datetime.date(2024, 2, 29), None, None]),
        "time": pa.array([1_700_000_000_123_456_789, None, 0], pa.timestamp("ns")),
        "price": pa.array([decimal.Decimal("1.10"), None, None]),
        "code": pa.array([7, None, 9]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = Table(tmp_path / "t.parquet")
    path = write(tmp_path / "t.csv", table.columns, table.kinds, [row.cells for row in table.rows()])
    time = "1970-01-01 00:00:00.000000000"
    assert path.read_text().splitlines()[1:] == [
        "0.1,2024-02-29,2023-11-14 22:13:20.123456789,1.10,7",
        ",,,,",
        f",,{time},,9",
    ]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int8()), pa.struct([("a", pa.int8())]), pa.binary(), pa.large_binary(), pa.map_("int8", "int8")],
)
def test_kinds_that_text_cannot_hold(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(InputError, match=r"t\.csv: cannot hold the column 'x' of type .*; write \.parquet"):
        TableWriter(tmp_path / "t.csv", ("x",), (kind,))
    TableWriter(tmp_path / "t.parquet", ("x",), (kind,))


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-20", "0", "", None], "integer"),
        ([str(2**63 - 1), str(-(2**63))], "integer"),
        (["1", str(2**63)], "text"),
        (["1", str(-(2**63) - 1)], "text"),
        (["1" * 5000], "text"),
        (["007"], "text"),
        (["0", "00"], "text"),
        (["-0"], "number"),
        (["+1"], "text"),
        (["1,000"], "text"),
        ([" 1"], "text"),
        (["1\n"], "text"),
        (["1_0"], "text"),
        (["٣"], "text"),
        (["1.5", "2", "-0.0", "", "1.50"], "number"),
        (["2", "1.5"], "number"),
        (["0.5", str(2**53)], "number"),
        (["0.5", str(2**53 + 1)], "text"),
        ([str(2**53 + 1), "0.5"], "text"),
        ([str(-(2**53) - 1), "", "0.5"], "text"),
        ([str(2**53 + 1), "1", "0.5"], "text"),
        (["1e-05", "1e+16", "1.5e5", "1.5E-3"], "number"),
        (["1e5"], "text"),
        (["0.5", "12E4"], "text"),
        ([".5"], "text"),
        (["5."], "text"),
        (["0,5"], "text"),
        (["00.5"], "text"),
        (["1.2.3"], "text"),
        (["0.5", "nan"], "text"),
        (["NA", "1"], "text"),
        (["1", "NA"], "text"),
        (["inf"], "text"),
        (["1.0e+999"], "text"),
        (["1.0e-400"], "text"),
        (["4.9e-324"], "text"),
        (["0.0e-400"], "number"),
        (["0.1234567890123456"], "number"),
        (["0.12345678901234567"], "number"),
        (["0.123456789012345678"], "text"),
        (["-0.00012345678901234567"], "number"),
        (["1234567.12345678901"], "text"),
        (["", None], "text"),
        ([], "text"),
        (["A24G"], "text"),
    ],
)
def test_kinds_of_columns(cells: list[str | None], kind: str) -> None:
    assert find_kinds(cells, ["x"] * len(cells)) == (kind, "text")


@ONE_BY_ONE
@given(
    st.lists(st.integers(), min_size=1)
    | st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(), min_size=1)
)
def test_columns_keep_their_numbers(tmp_path: Path, values: list[float]) -> None:
    cells = [str(value) for value in values]
    kinds = find_kinds(cells)
    path = write(tmp_path / "t.parquet", ("x",), kinds, [(cell,) for cell in cells])
    back = pq.read_table(path)["x"].to_pylist()
    if kinds == ("integer",):
        assert [str(value) for value in back] == cells
    elif kinds == ("number",):
        assert back == values
    else:
        assert back == cells
        assert any(abs(value) > 2**53 for value in values) or any(0 < abs(value) < 1e-307 for value in values)


def test_text_to_parquet_is_typed(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("mutant,place,score,id\nA1G,1,0.5,007\nA2G,,,\nA3G,3,1e-05,1\n")
    table = Table(tmp_path / "in.csv")
    found = ColumnKinds(len(table.columns))
    for row in table.rows():
        found.see(row.cells)
    rows = [(*row.cells, score) for row, score in zip(table.rows(), (np.float32(0.1), None, np.nan), strict=True)]
    path = write(tmp_path / "t.parquet", (*table.columns, "new"), (*found.kinds, "number"), rows)
    written = pq.read_table(path)
    assert [str(field.type) for field in written.schema] == ["string", "int64", "double", "string", "double"]
    assert written["place"].to_pylist() == [1, None, 3]
    assert written["score"].to_pylist() == [0.5, None, 1e-05]
    assert written["id"].to_pylist() == ["007", "", "1"]
    assert written["new"].to_pylist() == [float(np.float32(0.1)), None, None]


def test_row_groups_are_large(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "t.parquet", ("a",), ("integer",)) as writer:
        writer.write([])
        for begin in range(0, 100_000, 500):
            writer.write([(number,) for number in range(begin, begin + 500)])
    written = pq.ParquetFile(tmp_path / "t.parquet")
    assert written.num_row_groups == 2
    assert written.read()["a"].to_pylist() == list(range(100_000))
    with TableWriter(tmp_path / "t.parquet", ("a",), ("text",)) as writer:
        for _ in range(10):
            writer.write([("x" * 2**20,)])
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 3, "4 MiB each"


def test_empty_tables(tmp_path: Path) -> None:
    for ending in ENDINGS:
        path = write(tmp_path / f"t{ending}", ("a", "b"), ("text", "integer"), [])
        assert Table(path).columns == ("a", "b")


@pytest.mark.parametrize("ending", ENDINGS)
def test_errors_leave_nothing_behind(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t{ending}"

    def fail() -> None:
        with TableWriter(path, ("a",), ("text",)) as writer:
            writer.write([("x",)] * 10)
            assert names(tmp_path), "a temporary file, which shows that this is the right folder"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == []
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == [path.name]
    with TableWriter(path, ("a",), ("text",)) as writer:
        writer.write([("x",)])
        assert path.read_bytes() == b"old", "until the end"
    assert path.read_bytes() != b"old"
    assert names(tmp_path) == [path.name]


def test_files_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TableWriter(tmp_path / "folder" / "t.csv", ("a",), ("text",))
    (tmp_path / "folder").write_text("a file by now")
    with pytest.raises(InputError, match=r"t\.csv: cannot be written: File exists"):
        writer.__enter__()
    writer = TableWriter(tmp_path / ("x" * 251 + ".csv"), ("a",), ("text",))
    with pytest.raises(InputError, match=r"\.csv: cannot be written: File name too long"):
        writer.__enter__()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "t.csv", ("a",), ("text",), [("x",)])
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "cell", "problem"),
    [
        ("integer", "x", "a cell of the column 'a' is no int64: invalid literal"),
        ("integer", 2**63, "a cell of the column 'a' is no int64: "),
        ("number", "x", "a cell of the column 'a' is no double: could not convert"),
        ("text", 5, "a cell of the column 'a' is no string: "),
        (pa.int8(), 200, "a cell of the column 'a' is no int8: "),
        (pa.field("b", pa.int8(), nullable=False), "x", "a cell of the column 'a' is no int8: "),
    ],
)
def test_cells_that_do_not_fit(tmp_path: Path, kind: Any, cell: object, problem: str) -> None:
    with pytest.raises(InputError, match=rf"t\.parquet: {problem}"):
        write(tmp_path / "t.parquet", ("a",), (kind,), [(cell,)])
    assert names(tmp_path) == []


def test_cells_without_a_spelling(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"t\.csv: a cell of type bytes has no spelling in text"):
        write(tmp_path / "t.csv", ("a",), ("text",), [(b"x",)])


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_callers_errors(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    with pytest.raises(InputError, match=r"would hold the column 'score' twice"):
        TableWriter(path, ("score", "a", "score"), ("text",) * 3)
    with pytest.raises(ValueError, match="zip"):
        TableWriter(path, ("a", "b"), ("text",))
    with pytest.raises(ValueError, match="a row has 3 cells, expected 2"):
        write(path, ("a", "b"), ("text", "text"), [("x", "y"), ("x", "y", "z")])


def test_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in (*ENDINGS, ".CSV.GZ"):
        check_output(tmp_path / "new" / "folder" / f"t{ending}")
    check_output(Path("t.csv"))
    assert names(tmp_path) == [], "nothing is made"
    for name in ("t", "t.txt", "t.xlsx", "t.gz", "t.parquet.gz", ".csv"):
        with pytest.raises(
            InputError, match=r"unknown ending; allowed are \.csv, \.tsv, \.csv\.gz, \.tsv\.gz and \.parq"
        ):
            check_output(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"folder\.csv: is a folder, expected the name of a file"):
        check_output(tmp_path / "folder.csv")
    with pytest.raises(InputError, match=r"t\.csv: cannot be written: .*/file is no folder"):
        check_output(tmp_path / "file" / "more" / "t.csv")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"t\.csv: cannot be written: no permission to write to "):
        check_output(tmp_path / "more" / "t.csv")


def test_a_folder_is_made(tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "folder" / "t.csv", ("a",), ("text",), [("x",)])
    assert path.read_text() == "a\nx\n"


def test_rejects(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rejects.csv"
    with Rejects(path) as rejects:
        pass
    assert rejects.count == 0
    assert not path.parent.exists()
    with Rejects(path) as rejects:
        rejects.add(file=Path("in.csv"), row=2, line=3, target="P1", mutant="A0G, or so", reason="no 'residue'\n0")
        assert not path.exists(), "only at the end"
        rejects.add(file="in.parquet", row=7, line=None, target=None, mutant=None, reason="empty")
        assert rejects.count == 2
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            list(REJECT_COLUMNS),
            ["in.csv", "2", "3", "P1", "A0G, or so", "no 'residue'\n0"],
            ["in.parquet", "7", "", "", "", "empty"],
        ]
    old = path.read_bytes()

    def fail() -> None:
        with Rejects(path) as rejects:
            rejects.add(file="in.csv", row=1, line=2, target="P1", mutant="x", reason="y")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == old
    assert names(path.parent) == ["rejects.csv"]
    with pytest.raises(InputError, match="unknown ending"):
        Rejects(tmp_path / "rejects.txt")


MEASURED = """
import sys
from pathlib import Path
from protnest.engine.table import Table
from protnest.engine.table_writer import ColumnKinds, TableWriter

def copy(source, target, kinds):
    table, block = Table(source), []
    with TableWriter(target, table.columns, kinds or table.kinds) as writer:
        for row in table.rows():
            block.append(row.cells)
            if len(block) == 500:
                writer.write(block)
                block = []

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
with TableWriter(folder / "t.csv", ("mutant", "score"), ("text", "number")) as writer:
    for begin in range(0, rows, 500):
        writer.write([(f"A{row}G and more", row / 7) for row in range(begin, begin + 500)])
table = Table(folder / "t.csv")
kinds = ColumnKinds(2)
for row in table.rows():
    kinds.see(row.cells)
assert row.number == rows and kinds.kinds == ("text", "number")
copy(folder / "t.csv", folder / "t.parquet", kinds.kinds)
copy(folder / "t.parquet", folder / "u.parquet", None)
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    peak_kib = [
        int(subprocess.check_output([sys.executable, "-c", MEASURED, str(tmp_path), str(rows)]))
        for rows in (30_000, 300_000)
    ]
    # 31 MiB: Arrow's pool and one row group fill up, and 900,000 rows take no more than 300,000. Rows held add to it.
    assert peak_kib[1] - peak_kib[0] < 48 * 1024
