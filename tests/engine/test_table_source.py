"""Proteins from tables: which columns, which rows, and what is said of those at fault."""

from __future__ import annotations

import gzip
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import InputError, embed_library
from protnest.engine.alphabet import RESIDUES
from protnest.engine.embedder_plan import EmbedderPlan
from protnest.engine.fasta import InvalidPolicy, Record, Reject
from protnest.engine.library import LibraryOptions
from protnest.engine.library_source import open_source
from protnest.engine.mutant_source import MutantSource
from protnest.engine.record_source import FastaSource, RecordSource, locate_error
from protnest.engine.table import Table
from protnest.engine.table_source import TableSource

from support.tiny import random_proteins, save_tiny_model, write_fasta


def _csv(folder: Path, text: str, name: str = "in.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _parquet(folder: Path, **columns: Any) -> Path:
    path = folder / "in.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def _rows(source: RecordSource) -> list[tuple[int, str, str]]:
    return [(record.index, record.id, record.sequence) for record in source.read()]


def _read_all(source: RecordSource) -> tuple[list[Record], list[Reject]]:
    rejects: list[Reject] = []
    return list(source.read(on_reject=rejects.append)), rejects


# Columns


@pytest.mark.parametrize("name", ["in.csv", "in.CSV.gz", "in.tsv", "in.tsv.gz"])
def test_text_tables(tmp_path: Path, name: str) -> None:
    text = "note,id,sequence\nx,first of all,MKT\n\ny,second,acde fg*\n".replace(",", "\t" if "tsv" in name else ",")
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    source = TableSource(path)
    assert list(source.read()) == [
        Record(index=0, id="first of all", header="first of all", sequence="MKT"),
        Record(index=1, id="second", header="second", sequence="ACDEFG"),
    ]
    assert _rows(source) == [(0, "first of all", "MKT"), (1, "second", "ACDEFG")], "a second reading"
    assert [source.locate(index) for index in (0, 1, 2)] == [2, 4, None]


def test_parquet(tmp_path: Path) -> None:
    ids = pa.array(["a", "b", "a"]).dictionary_encode()
    source = TableSource(_parquet(tmp_path, sequence=["MKT", "AC", "W"], id=ids))
    assert _rows(source) == [(0, "a", "MKT"), (1, "b", "AC"), (2, "a", "W")]
    assert source.locate(1) is None


def test_only_columns_that_are_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table may hold embeddings beside its sequences."""
    asked = []
    read = pq.ParquetFile.iter_batches

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["columns"])
        return read(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    path = _parquet(tmp_path, embedding=[[1.0] * 8] * 2, seq=["MKT", "AC"], more=["?", "?"], name=["a", "b"])
    assert _rows(TableSource(path)) == [(0, "a", "MKT"), (1, "b", "AC")]
    assert asked == [["seq", "name"]]


@pytest.mark.parametrize(
    ("header", "options", "columns"),
    [
        ("id,sequence", {}, ("id", "sequence")),
        ("name,seq,id", {}, ("id", "seq")),
        ("accession,name,protein_sequence", {}, ("name", "protein_sequence")),
        ("Entry,Entry Name,Sequence", {}, ("Entry", "Sequence")),
        ("ID,id,sequence", {}, ("id", "sequence")),
        ("protein,heavy,sequence", {"id_column": "protein", "sequence_column": "heavy"}, ("protein", "heavy")),
        ("id,sequence,heavy", {"sequence_column": "heavy"}, ("id", "heavy")),
        ("sequence,x", {"id_column": "sequence"}, ("sequence", "sequence")),
        ("sequence", {}, (None, "sequence")),
    ],
)
def test_which_columns(tmp_path: Path, header: str, options: dict[str, str], columns: tuple[str | None, str]) -> None:
    names = header.split(",")
    path = _csv(tmp_path, f"{header}\n{','.join('ACDEF'[: len(names)])}\n")
    source = TableSource(path, **options)
    assert (source.id_column, source.sequence_column) == columns
    assert source.settings == {"id_column": columns[0], "sequence_column": columns[1]}
    cells = dict(zip(names, "ACDEF", strict=False))
    identity = "1" if columns[0] is None else cells[columns[0]]
    assert _rows(source) == [(0, identity, cells[columns[1]])]


def test_without_ids_rows_have_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = TableSource(_csv(tmp_path, "sequence\nMKT\n1\nAC\n"), invalid="skip")
    with caplog.at_level(logging.WARNING):
        assert _rows(source) == [(0, "1", "MKT"), (2, "3", "AC")]
    assert "called by their rows' numbers; --id-col names a column" in caplog.text
    assert "rows left out as invalid: 1 of 3" in caplog.text
    caplog.clear()
    list(source.read(quiet=True))
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id_column": "protien"}, r"has no column 'protien'; it has 'protein', 'heavy'; did you mean 'protein'\?"),
        ({"id_column": ""}, "has no column ''"),
        ({"sequence_column": "Heavy"}, r"has no column 'Heavy'; .* did you mean 'heavy'\?"),
        ({}, "has no column of sequences, sequence or seq or protein_sequence; it has 'protein', 'heavy'; --seq-col"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, options: dict[str, str], message: str) -> None:
    path = _csv(tmp_path, "protein,heavy\na,MKT\n")
    with pytest.raises(InputError, match=message) as caught:
        TableSource(path, **options)
    assert caught.value.file == str(path)


def test_files_that_are_no_tables_of_proteins(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a list of variants, which --wt makes proteins of"):
        TableSource(_csv(tmp_path, "A24G\nL30V\n"))
    with pytest.raises(InputError, match="cannot be opened"):
        TableSource(tmp_path / "gone.csv")
    with pytest.raises(InputError, match="holds no rows"):
        list(TableSource(_csv(tmp_path, "id,sequence\n")).read())
    with pytest.raises(InputError, match="unknown ending"):
        TableSource(_csv(tmp_path, "", "in.parquet.gz"))


# Rows at fault

FAULTS = [
    ("b,MK1", "b", "'1' at residue 3 is not a residue; allowed are"),
    ("b,", "b", "the sequence is empty"),
    ("b, *", "b", "the sequence is empty"),
    ("b,NaN", "b", "the sequence is empty: NaN stands for no value"),
    ("b,None", "b", "the sequence is empty: None stands for no value"),
    (" ,MKT", "", "the row has no id: its cell of 'id' is empty"),
    ('"b\nc",MKT', "", r"the id 'b\nc' holds a control character"),
    ("b\x7f,MKT", "", r"the id 'b\x7f' holds a control character"),
    ("b", "", "1 cells, expected 2 as in the header"),
    ("b,MKT,", "", "3 cells, expected 2 as in the header"),
]


@pytest.mark.parametrize(("row", "name", "problem"), FAULTS)
def test_rows_at_fault(tmp_path: Path, row: str, name: str, problem: str) -> None:
    path = _csv(tmp_path, f"id,sequence\na,MKT\n{row}\nd,AC\n")
    with pytest.raises(InputError) as caught:
        list(TableSource(path).read())
    error = caught.value
    assert problem in error.problem
    assert 'invalid="skip" leaves the record out' in error.problem
    assert ('"mask" puts X' in error.problem) == ("MK1" in row)
    assert (error.file, error.line, error.record, error.record_id or "") == (str(path), 3, 2, name)

    records, rejects = _read_all(TableSource(path, invalid="skip"))
    assert [(record.index, record.id) for record in records] == [(0, "a"), (2, "d")]
    assert [(reject.index, reject.id) for reject in rejects] == [(1, name)]
    assert problem in rejects[0].reason

    records, rejects = _read_all(TableSource(path, invalid="mask"))
    assert len(records) + len(rejects) == 3
    if "MK1" in row:
        assert records[1] == Record(index=1, id="b", header="b", sequence="MKX", flags=("masked",))
        assert [record.flags for record in records] == [(), ("masked",), ()]
    else:
        assert rejects[0].reason.startswith(problem[:20])


def test_no_mask_hides_a_record_within_a_record(tmp_path: Path) -> None:
    records, rejects = _read_all(TableSource(_csv(tmp_path, "id,sequence\na,MK\nb,MK>c\n"), invalid="mask"))
    assert ([record.id for record in records], [reject.id for reject in rejects]) == (["a"], ["b"])


def test_x_of_the_table_is_not_flagged_as_masked(tmp_path: Path) -> None:
    source = TableSource(_csv(tmp_path, "id,sequence\na,MXx\nb,MX-*\nc,x?\n"), invalid="mask")
    assert [(each.sequence, each.flags) for each in source.read()] == [
        ("MXX", ()),
        ("MX-", ()),
        ("XX", ("masked",)),
    ]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"id": ["a"], "sequence": pa.array([None], pa.string())}, "the sequence is empty"),
        ({"id": pa.array([None], pa.string()), "sequence": ["MKT"]}, "the row has no id"),
        ({"id": ["a"], "sequence": [5]}, "the cell of 'sequence' is int 5, expected text"),
        ({"id": ["a"], "sequence": [["M", "K"]]}, "the cell of 'sequence' is list"),
        ({"id": ["a"], "sequence": [b"MKT"]}, "the cell of 'sequence' is bytes"),
        ({"id": [5.5], "sequence": ["MKT"]}, "the cell of 'id' is float 5.5, expected text or a whole number"),
        ({"id": [True], "sequence": ["MKT"]}, "the cell of 'id' is bool True"),
        ({"id": ["a\0b"], "sequence": ["MKT"]}, r"the id 'a\x00b' holds a control character"),
    ],
)
def test_cells_of_parquet_at_fault(tmp_path: Path, columns: dict[str, Any], problem: str) -> None:
    path = _parquet(tmp_path, **columns)
    with pytest.raises(InputError) as caught:
        list(TableSource(path).read())
    assert problem in caught.value.problem
    assert (caught.value.line, caught.value.record) == (None, 1)
    for policy in ("skip", "mask"):
        records, rejects = _read_all(TableSource(path, invalid=policy))
        assert (records, len(rejects)) == ([], 1)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint64(), pa.large_string(), pa.string_view()])
def test_ids_may_be_whole_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["7", "12"] if "string" in str(kind) else [7, 12]
    path = _parquet(tmp_path, id=pa.array(values, kind), sequence=pa.array(["MKT", "AC"], pa.string_view()))
    assert _rows(TableSource(path)) == [(0, "7", "MKT"), (1, "12", "AC")]


@pytest.mark.parametrize("policy", ["error", "skip", "mask"])
def test_hostile_tables_lose_nothing(tmp_path: Path, policy: InvalidPolicy) -> None:
    """Whatever the bytes are: an InputError, or each row a record or a reject."""
    rng = random.Random(7)
    hostile = [b'"', b"\n", b"\r", b",", b"\0", b"\xff", b"\xc3\xa9", b"*", b"x", b"\t", b" ", b"#", b">", b"1", b"NaN"]
    path, read_through, named = tmp_path / "in.csv", 0, set()
    for _ in range(150):
        data = bytearray(b"id,sequence\n" + b"".join(b"p%d,MKTAYIAKQR\n" % row for row in range(6)))
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 3)] = rng.choice(hostile)
        path.write_bytes(data)
        try:
            records, rejects = _read_all(TableSource(path, invalid=policy))
            rows = sum(1 for _ in Table(path).rows(ragged=True))
        except InputError as error:
            named.add(error.file)
            continue
        read_through += 1
        assert len(records) + len(rejects) == rows
        places = sorted([each.index for each in records] + [each.index for each in rejects])
        assert places == list(range(rows))
        assert all(set(record.sequence) <= set(RESIDUES) and record.sequence for record in records)
    assert named == {str(path)}
    assert read_through > (5 if policy == "error" else 40)


def test_a_record_is_located(tmp_path: Path) -> None:
    path = _csv(tmp_path, 'id,sequence\n\n"a",MKT\nb,"AC\nDE"\nc,W\n')
    source = TableSource(path)
    last = list(source.read())[2]
    error = locate_error(source, last, "is too much")
    assert str(error) == f"{path}, line 6, record 3 (c): is too much"


def test_it_can_be_sent_to_another_process(tmp_path: Path) -> None:
    for path in (_csv(tmp_path, "id,sequence\na,MKT\n"), _parquet(tmp_path, id=["a"], sequence=["MKT"])):
        source = TableSource(path, invalid="skip")
        sent = pickle.loads(pickle.dumps(source))
        assert (_rows(sent), sent.settings, sent.invalid) == (_rows(source), source.settings, "skip")


# What opens which


def test_which_source(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.txt", ["MKT"])
    assert open_source(fasta, invalid="mask") == FastaSource(fasta, "mask")
    assert open_source(tmp_path / "gone.fa.gz") == FastaSource(tmp_path / "gone.fa.gz")
    table = open_source(_csv(tmp_path, "x,y\na,MKT\n"), invalid="skip", id_column="x", sequence_column="y")
    assert isinstance(table, TableSource)
    assert (table.id_column, table.sequence_column, table.invalid) == ("x", "y", "skip")
    mutants = open_source(_csv(tmp_path, "M1A\n", "list.txt"), wild_types=fasta, invalid="skip")
    assert isinstance(mutants, MutantSource)
    assert (mutants.invalid, _rows(mutants)) == ("skip", [(0, "M1A", "AKT")])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("dedup", [False, True])
def test_stores_of_a_table_and_of_fasta_have_the_same_rows(tmp_path: Path, kind: str, dedup: bool) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    sequences = random_proteins(30)
    sequences[17] = sequences[3]
    plan = EmbedderPlan(models=(str(model),), device="cpu", precision="fp32")
    options = LibraryOptions(shard_records=7, dedup=dedup)
    ids = [f"protein{row}" for row in range(30)]
    if kind == "csv":
        rows = "".join(f"{name},{sequence}\n" for name, sequence in zip(ids, sequences, strict=True))
        path = _csv(tmp_path, "name,sequence\n" + rows)
    else:
        path = _parquet(tmp_path, name=ids, sequence=sequences)
    embed_library(write_fasta(tmp_path / "in.fasta", sequences), tmp_path / "fasta", plan, options)
    result = embed_library(path, tmp_path / "table", plan, options)
    assert result.settings["sequence_column"] == "sequence"
    ours, theirs = (sorted((tmp_path / store).glob("part-*")) for store in ("table", "fasta"))
    assert [part.read_bytes() for part in ours] == [part.read_bytes() for part in theirs]
    assert len(ours) > 3
    assert pq.read_table(tmp_path / "table" / "index.parquet")["id"].to_pylist() == ids
    again = embed_library(path, tmp_path / "table", plan, options)
    assert again.embedded == 0
    with pytest.raises(InputError, match="id_column"):
        embed_library(TableSource(path, id_column="sequence"), tmp_path / "table", plan, options)
