"""Tables read: every format to the cell and the line, every refusal with its place, hostile files."""

from __future__ import annotations

import datetime
import gzip
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import InputError
from protnest.engine.table import MAX_ROW_BYTES, Row, Table

ROWS = [("A24G", "0.5"), ("A24G:H26P", ""), ("H26P", "-1e-3")]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    return path


def cells(path: Path) -> list[tuple[Any, ...]]:
    return [row.cells for row in Table(path).rows()]


@pytest.mark.parametrize("name", ["t.csv", "t.CSV", "t.csv.gz", "t.tsv", "t.tsv.GZ"])
def test_text_formats(tmp_path: Path, name: str) -> None:
    delimiter = "\t" if ".tsv" in name else ","
    path = write(tmp_path, name, "".join(delimiter.join(row) + "\n" for row in [("mutant", "score"), *ROWS]))
    table = Table(str(path))
    assert (table.path, table.columns, table.kinds) == (path, ("mutant", "score"), ("text", "text"))
    assert table.kind == name.split(".")[1].lower()
    expected = [Row(number, number + 1, row) for number, row in enumerate(ROWS, 1)]
    assert list(table.rows()) == expected
    assert list(table.rows()) == expected, "a second reading"
    assert list(table.rows(begin=1)) == expected[1:]
    assert list(table.rows(begin=3)) == list(table.rows(begin=9)) == []


def test_lines_of_quoted_cells(tmp_path: Path) -> None:
    content = '\ufeffa,"b\r\nb"\r\n\r\n1,"x, ""y""\n\nz"\r\n\r\n 2 ,é#\r\n3,\r\n"4","5"'
    table = Table(write(tmp_path, "t.csv", content))
    assert table.columns == ("a", "b\r\nb")
    rows = [(4, ("1", 'x, "y"\n\nz')), (8, (" 2 ", "é#")), (9, ("3", "")), (10, ("4", "5"))]
    assert list(table.rows()) == [Row(number, *row) for number, row in enumerate(rows, 1)]


def test_lines_that_end_with_cr(tmp_path: Path) -> None:
    table = Table(write(tmp_path, "t.csv", 'a,b\r1,"x\ry"\r\r2,z'))
    assert list(table.rows()) == [Row(1, 2, ("1", "x\ry")), Row(2, 5, ("2", "z"))]


@pytest.mark.parametrize(
    ("content", "columns", "row"),
    [
        ("a;b\n0,5;1\n", ("a", "b"), ("0,5", "1")),
        ("a\tb\nx;y\t1,2\n", ("a", "b"), ("x;y", "1,2")),
        ("a;b\tc\nx;y\n", ("a", "b\tc"), ("x", "y")),
        ("a;x,b\n1;2,3\n", ("a;x", "b"), ("1;2", "3")),
        ('"a;x","b"\n1,2\n', ("a;x", "b"), ("1", "2")),
        ('"a,x";b\n1,2;3\n', ("a,x", "b"), ("1,2", "3")),
        ('"a;b"\n1;2\n', ("a;b",), ("1;2",)),
        ("name\n1;2\n", ("name",), ("1;2",)),
    ],
)
def test_delimiter_is_the_headers(tmp_path: Path, content: str, columns: tuple[str, ...], row: tuple[str, ...]) -> None:
    path = write(tmp_path, "t.csv", content)
    assert Table(path).columns == columns
    assert cells(path) == [row]


def test_tsv_is_split_at_tabs_only(tmp_path: Path) -> None:
    path = write(tmp_path, "t.tsv", "a,b\nx,y\n")
    assert Table(path).columns == ("a,b",)
    assert cells(path) == [("x,y",)]


LIST = "# mine, A1G\r\n\r\n A24G \r\n#\r\nnonsense, and #more\r\nA24G:H26P"


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
def test_lists(tmp_path: Path, name: str) -> None:
    table = Table(write(tmp_path, name, LIST))
    assert (table.kind, table.columns, table.kinds, table.place("mutant")) == ("list", ("mutant",), ("text",), 0)
    assert list(table.rows()) == [Row(1, 3, ("A24G",)), Row(2, 5, ("nonsense, and #more",)), Row(3, 6, ("A24G:H26P",))]
    assert list(table.rows(begin=2)) == [Row(3, 6, ("A24G:H26P",))]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv.gz"])
def test_variants_without_a_header(tmp_path: Path, name: str) -> None:
    table = Table(write(tmp_path, name, "\n A24G:H26P \n# no variant\nH26P\n"))
    assert (table.kind, table.columns) == ("list", ("mutant",))
    assert list(table.rows()) == [Row(1, 2, ("A24G:H26P",)), Row(2, 4, ("H26P",))]


@pytest.mark.parametrize("header", ["mutant", "p53R", "A24G and more", "A24", "A0G", "B24G"])
def test_headers_that_are_no_variants(tmp_path: Path, header: str) -> None:
    table = Table(write(tmp_path, "t.csv", f"{header}\n# 1\n"))
    assert (table.kind, table.columns) == ("csv", (header,))
    assert list(table.rows()) == [Row(1, 2, ("# 1",))]


def test_variants_beside_others_are_a_header(tmp_path: Path) -> None:
    assert Table(write(tmp_path, "t.csv", "A24G,H26P\n1,2\n")).columns == ("A24G", "H26P")


def test_place(tmp_path: Path) -> None:
    table = Table(write(tmp_path, "t.csv", "Mutant ,score,x\n1,2,3\n"))
    assert [table.place(name) for name in table.columns] == [0, 1, 2]
    problem = "t.csv: has no column 'mutant'; it has 'Mutant ', 'score', 'x'; did you mean 'Mutant '?"
    with pytest.raises(InputError, match=re.escape(problem)):
        table.place("mutant")
    with pytest.raises(InputError, match=r"has no column 'quite other'; it has 'Mutant ', 'score', 'x'$"):
        table.place("quite other")
    with pytest.raises(InputError, match="did you mean 'score'"):
        table.place("SCORE")
    many = Table(write(tmp_path, "many.csv", ",".join(f"c{place:02d}" for place in range(25)) + "\n"))
    with pytest.raises(InputError, match=r"'c18', 'c19' and 5 more$"):
        many.place("zzz")


def test_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, same = write(tmp_path, "1.csv", "a\n" + "x\n" * 200_000), write(tmp_path, "2.csv", "a\n" + "x\n" * 200_000)
    other = write(tmp_path, "3.csv", "a\n" + "x\n" * 199_999 + "y\n")
    assert Table(one).fingerprint() == Table(same).fingerprint() != Table(other).fingerprint()
    assert re.fullmatch("[0-9a-f]{32}", Table(one).fingerprint())
    table = Table(one)
    one.unlink()
    with pytest.raises(InputError, match=r"1\.csv: cannot be opened: No such file"):
        table.fingerprint()
    with pytest.raises(InputError, match=r"1\.csv: cannot be opened: No such file"):
        list(table.rows())


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.csv", "", "t.csv: is empty"),
        ("t.csv.gz", "", "t.csv.gz: is empty"),
        ("t.csv", "\ufeff\r\n\n", "t.csv: is empty"),
        ("t.txt", "\n# nothing\n", "t.txt: is empty"),
        ("t.csv", "a,b,a,c,b,a\n", "line 1: has columns of the same name: 'a', 'b'"),
        ("t.csv", "\na,b,a\n", "line 2: has columns of the same name: 'a'"),
        ("t.csv", "a,, \n", "line 1: column 2 of 3 has no name"),
        ("t.csv", '""\n1\n', "line 1: column 1 of 1 has no name"),
        ("t.csv", "a,b\0\n", "line 1: holds a NUL byte: this looks like binary data or UTF-16"),
        ("t.csv", "a,b\n".encode("utf-16"), "line 1: is UTF-16 text: save it as UTF-8"),
        ("t.csv", b"\xfe\xff" + "a,b\n".encode("utf-16-be"), "line 1: is UTF-16 text: save it as UTF-8"),
        ("t.csv", "a,b\n".encode("utf-16-le"), "line 1: holds a NUL byte"),
        ("t.csv", b"a,b\xe9\n", "line 1: is not UTF-8 text (byte 0xE9): save it as UTF-8"),
        ("t.csv", gzip.compress(b"a,b\n", mtime=0), "line 1: is compressed: its name must end with .gz"),
        ("t.csv", 'a,"b\n1,2\n', "line 1: the row that begins here cannot be read: unexpected end of data; is a quote"),
        ("t.csv", '"a"b,c\n', "line 1: the row that begins here cannot be read: ',' expected after '\"'; is a quote"),
        ("t.xlsx", "a", "t.xlsx: has an unknown ending; allowed are .csv, .tsv and .txt (each also .gz) and .parquet"),
        ("t", "a", "has an unknown ending"),
        (".csv", "a", "has an unknown ending"),
        ("t.gz", "a", "has an unknown ending"),
        ("t.parquet.gz", "a", "has an unknown ending"),
        ("t.parquet", "", "t.parquet: not a readable parquet file ("),
        ("t.parquet", "mutant,score\n1,2\n", "t.parquet: not a readable parquet file ("),
    ],
)
def test_headers_that_cannot_be(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=re.escape(problem)):
        Table(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a,b\n", "t.csv: holds no rows"),
        ("a,b\n\r\n\n", "t.csv: holds no rows"),
        ("a,b\n1,2\n\n1,2,3\n", "line 4: row 2 has 3 cells, expected 2 as in the header"),
        ('a,b\n"\n",2\n1\n', "line 4: row 2 has 1 cells, expected 2 as in the header"),
        ("a,b\n1,2\n ", "line 3: row 2 has 1 cells, expected 2"),
        ("a,b\n1,2\n1,\0\n", "line 3: holds a NUL byte"),
        (b"a,b\n1,2\n1,\xff\n", "line 3: is not UTF-8 text (byte 0xFF)"),
        ('a,b\n1,2\n1,"2\n\n3,4\n', "line 3: the row that begins here cannot be read: unexpected end of data"),
        ('a,b\n"\n",2\n1,"2" 3\n', "line 4: the row that begins here cannot be read: ',' expected"),
        ('a,b\n1,"2\n' + "3,4\n" * 50_000, "line 2: the row that begins here cannot be read: field larger than"),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, content: str | bytes, problem: str) -> None:
    table = Table(write(tmp_path, "t.csv", content))
    for begin in (0, 100):
        with pytest.raises(InputError, match=re.escape(problem)):
            list(table.rows(begin=begin))


def test_rows_before_an_error_are_given_out(tmp_path: Path) -> None:
    rows = Table(write(tmp_path, "t.csv", "a,b\n1,2\n3\n")).rows()
    assert next(rows) == Row(1, 2, ("1", "2"))
    with pytest.raises(InputError, match="line 3"):
        next(rows)


def test_lists_of_wrong_bytes(tmp_path: Path) -> None:
    table = Table(write(tmp_path, "t.txt", b"A24G\n\n\xff\n"))
    with pytest.raises(InputError, match=r"t\.txt, line 3: is not UTF-8 text"):
        list(table.rows())


def test_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ROW_BYTES == 16 * 2**20
    long = b"," * MAX_ROW_BYTES
    for name in ("t.csv", "t.csv.gz", "t.txt"):
        table = Table(write(tmp_path, name, b"A24G\n" if name == "t.txt" else b"a,b\n1,2\n"))
        write(tmp_path, name, (b"A24G\n#" if name == "t.txt" else b"a,b\n1") + long + b"\n")
        with pytest.raises(InputError, match="line 2: a row of more than 16,777,216 bytes"):
            list(table.rows())
    monkeypatch.setattr("protnest.engine.table.MAX_ROW_BYTES", 100)
    path = write(tmp_path, "t.csv", "a,b\n" + '"' + "x" * 95 + '",1\n' + "1,2\n" * 100)
    assert len(cells(path)) == 101, "every row is within the limit, and their sum is not"
    assert len(cells(write(tmp_path, "t.txt", "A24G\n" * 100))) == 100
    path = write(tmp_path, "t.csv", "a,b\n1,2\n" + '"\n",' * 60)
    with pytest.raises(InputError, match=r"line 2\d: a row of more than 100 bytes: .*, or a quote was left open"):
        list(Table(path).rows())


def test_places_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name, problem in {
        "folder.csv": "is a folder, expected a file",
        "pipe.csv": "is no plain file: a table is read several times",
        "none.csv": "cannot be opened: No such file or directory",
        "none.parquet": "cannot be opened: No such file or directory",
        "x" * 300 + ".csv": "cannot be opened: File name too long",
    }.items():
        with pytest.raises(InputError, match=re.escape(f"{name}: {problem}")):
            Table(tmp_path / name)


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "t.csv", "a,b\n")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"t\.csv: cannot be opened: Permission denied"):
        Table(path)


def test_broken_gzip(tmp_path: Path) -> None:
    text = "a,b\n" + "".join(f"{random.Random(row).random()},{row}\n" for row in range(30_000))
    whole = gzip.compress(text.encode())
    path = tmp_path / "t.csv.gz"
    path.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(InputError, match=r"t\.csv\.gz: is named \.gz but holds no gzip data"):
        Table(path)
    path.write_bytes(whole)
    table = Table(path)
    assert sum(1 for _ in table.rows()) == 30_000
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    path.write_bytes(bytes(damaged))
    with pytest.raises(
        InputError, match=r"t\.csv\.gz, line \d+: "
    ):  # Which fault shows first depends on the decompressor.
        list(table.rows())
    problems = {
        "the compressed data end too early": (whole[: len(whole) // 2], whole[:-4]),
        "cannot be read on: ": (whole[:-8] + bytes(8),),
    }
    for problem, contents in problems.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(InputError, match=rf"t\.csv\.gz, line \d+: {problem}") as caught:
                list(table.rows())
            assert caught.value.line is not None
            assert caught.value.line <= 30_002
    path.write_bytes(whole + gzip.compress(b"1,2\n"))
    assert sum(1 for _ in table.rows()) == 30_001, "several gzip members are one file"


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet(tmp_path: Path) -> None:
    columns = {
        "mutant": pa.array(["A1G", None, ""]),
        "place": pa.array([1, None, -(2**63)], pa.int64()),
        "single": pa.array([0.1, None, float("inf")], pa.float32()),
        "half": pa.array([0.1, None, 2], pa.float16()),
        "double": pa.array([0.1, None, 2], pa.float64()),
        "good": pa.array([True, None, False]),
        "word": pa.array(["x", None, "x"]).dictionary_encode(),
        "day": pa.array([datetime.date(2024, 2, 29), None, None]),
        "time": pa.array([1_700_000_000_123_456_789, None, 0], pa.timestamp("ns")),
        "list": pa.array([[1], None, []], pa.list_(pa.int8())),
    }
    table = Table(parquet(tmp_path / "t.parquet", columns))
    assert (table.kind, table.columns, table.place("half")) == ("parquet", tuple(columns), 3)
    assert [field.type for field in table.kinds] == [column.type for column in columns.values()]
    rows = list(table.rows())
    assert [(row.number, row.line) for row in rows] == [(1, None), (2, None), (3, None)]
    assert rows[0].cells[:7] == ("A1G", 1, np.float32(0.1), np.float16(0.1), 0.1, True, "x")
    kinds = [str, int, np.float32, np.float16, float, bool, str, pa.Date32Scalar, pa.TimestampScalar, pa.ListScalar]
    assert list(map(type, rows[0].cells)) == kinds
    assert rows[1].cells == (None,) * 10
    assert rows[2].cells[:3] == ("", -(2**63), np.float32("inf"))
    assert rows[0].cells[8].value == 1_700_000_000_123_456_789


def test_parquet_row_groups(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"n": list(range(1, 5001))}, row_group_size=1300)
    table = Table(path)
    expected = [Row(number, None, (number,)) for number in range(1, 5001)]
    for begin in (0, 1, 1299, 1300, 1301, 2600, 4999, 5000, 9999):
        assert list(table.rows(begin=begin)) == expected[begin:], begin


def test_parquet_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    batch = pa.RecordBatch.from_arrays([pa.array([1])] * 2, names=["a", "a"])
    pq.write_table(pa.Table.from_batches([batch]), path)
    with pytest.raises(InputError, match=r"t\.parquet: has columns of the same name: 'a'"):
        Table(path)
    for columns, problem in (({}, "has no columns"), ({"a": [1], "": [2]}, "column 2 of 2 has no name")):
        with pytest.raises(InputError, match=problem):
            Table(parquet(path, columns))
    with pytest.raises(InputError, match=r"t\.parquet: holds no rows"):
        list(Table(parquet(path, {"a": pa.array([], pa.int8())})).rows())
    whole = parquet(path, {"a": list(range(10_000)), "b": [str(row) for row in range(10_000)]}).read_bytes()
    for content in (whole[:-10], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"t\.parquet: not a readable parquet file \(.+\)"):
            Table(path)
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    table = Table(path)
    with pytest.raises(InputError, match=r"t\.parquet: not a readable parquet file \(.+\)"):
        list(table.rows())


def _bytes(rng: random.Random) -> bytes:
    pieces = [b"a,b\n", b'"', b",", b"\n", b"\r", b"\r\n", b";", b"\t", b"A24G", b"#", b"\xff", b"\0", b"\xef\xbb\xbf"]
    pieces += [b"1,2\n", b"a;b\n", b" ", "é\u2028".encode(), b"\xff\xfe", b"\x1f\x8b", bytes([rng.randrange(256)])]
    return b"".join(rng.choices(pieces, k=rng.randrange(12)))


def _damage(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(damaged))
        damaged[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(damaged)


def test_hostile_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    columns = {"mutant": ["A24G", None] * 20, "x": pa.array([0.5] * 40, pa.float32()), "l": [[1], []] * 20}
    good = parquet(tmp_path / "good.parquet", columns).read_bytes()
    makers: dict[str, Callable[[], bytes]] = {
        "t.csv": lambda: _bytes(rng),
        "t.tsv": lambda: _bytes(rng),
        "t.txt": lambda: _bytes(rng),
        "t.csv.gz": lambda: _damage(gzip.compress(b"a,b\n" + _bytes(rng)), rng),
        "t.parquet": lambda: _damage(good, rng),
    }
    read = refused = 0
    for case in range(600):
        name, make = list(makers.items())[case % len(makers)]
        path = tmp_path / name
        path.write_bytes(content := make())
        try:
            table = Table(path)
            assert all(len(row.cells) == len(table.columns) for row in table.rows())
            read += 1
        except InputError as error:
            assert error.file == str(path)  # noqa: PT017
            refused += 1
        except BaseException:
            print(f"{name}: {content!r}")
            raise
    assert read > 40
    assert refused > 400
