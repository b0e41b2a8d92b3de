"""Mutants of a wild type as a library: which proteins rows stand for, and what is said of those at fault."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import Embedder, InputError, embed_library, load_model, read_embeddings
from protnest.engine.fasta import Record, Reject
from protnest.engine.library import LibraryOptions
from protnest.engine.mutant_source import MutantSource
from protnest.engine.record_source import RecordSource, locate_error

from support.tiny import save_tiny_model

WILD_TYPE = "MKTAYIAKQR"


@pytest.fixture
def wt(tmp_path: Path) -> Path:
    path = tmp_path / "wt.fasta"
    path.write_text(f">blat a lactamase\n{WILD_TYPE}\n")
    return path


def _table(folder: Path, text: str, name: str = "scan.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _rows(source: RecordSource) -> list[tuple[int, str, str]]:
    return [(record.index, record.id, record.sequence) for record in source.read()]


def _read_all(source: RecordSource) -> tuple[list[Record], list[Reject]]:
    rejects: list[Reject] = []
    return list(source.read(on_reject=rejects.append)), rejects


def test_a_scan(tmp_path: Path, wt: Path) -> None:
    source = MutantSource(_table(tmp_path, "DMS_score,mutant\n1,K2A\n2,M1L:R10W\n3,WT\n4,K2A\n"), wt)
    assert next(iter(source.read())) == Record(index=0, id="K2A", header="K2A blat", sequence="MATAYIAKQR")
    assert _rows(source) == [
        (0, "K2A", "MATAYIAKQR"),
        (1, "M1L:R10W", "LKTAYIAKQW"),
        (2, "WT", WILD_TYPE),
        (3, "K2A", "MATAYIAKQR"),
    ]
    assert [source.locate(index) for index in (0, 3, 4)] == [2, 5, None]
    sent = pickle.loads(pickle.dumps(source))
    assert (_rows(sent), sent.settings) == (_rows(source), source.settings)


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_lists_and_parquet(tmp_path: Path, wt: Path, kind: str) -> None:
    if kind == "parquet":
        path = tmp_path / "scan.parquet"
        pq.write_table(pa.table({"mutant": ["K2A", "T3S"]}), path)
    else:
        path = _table(tmp_path, "K2A\nT3S\n", f"scan.{kind}")
    source = MutantSource(path, wt)
    assert _rows(source) == [(0, "K2A", "MATAYIAKQR"), (1, "T3S", "MKSAYIAKQR")]
    assert source.locate(1) == (None if kind == "parquet" else 2)


def test_whole_sequences(tmp_path: Path, wt: Path) -> None:
    """Substitutions are spelt; what no name can tell is called by its row."""
    text = "mutated_sequence\nMATAYIAKQR\nMKTAYIAKQW\nMKTAYIAK\nMKTAYIAKQRGG\nmktayiakqr\n"
    assert _rows(MutantSource(_table(tmp_path, text), wt)) == [
        (0, "K2A", "MATAYIAKQR"),
        (1, "R10W", "MKTAYIAKQW"),
        (2, "row3", "MKTAYIAK"),
        (3, "row4", "MKTAYIAKQRGG"),
        (4, "WT", WILD_TYPE),
    ]


def test_columns_of_other_names(tmp_path: Path, wt: Path) -> None:
    path = _table(tmp_path, "variant,protein,mutant\nK2A,,X\n,MKTAYIAKQW,Y\n")
    source = MutantSource(path, wt, mutant_column="variant", sequence_column="protein")
    assert _rows(source) == [(0, "K2A", "MATAYIAKQR"), (1, "R10W", "MKTAYIAKQW")]
    assert (source.settings["mutant_column"], source.settings["sequence_column"]) == ("variant", "protein")
    for wrong in ({"mutant_column": "variants"}, {"sequence_column": "protien"}):
        with pytest.raises(InputError, match=r"has no column .* did you mean '(variant|protein)'\?"):
            MutantSource(path, wt, **wrong)


def test_offset(tmp_path: Path, wt: Path) -> None:
    path = _table(tmp_path, "mutant\nK25A\nR33W\n")
    source = MutantSource(path, wt, offset=23)
    assert _rows(source) == [(0, "K25A", "MATAYIAKQR"), (1, "R33W", "MKTAYIAKQW")]
    assert source.settings["offset"] == 23
    with pytest.raises(InputError, match="with --offset 23 all of the first 2 variants fit"):
        list(MutantSource(path, wt).read())


def test_several_wild_types(tmp_path: Path) -> None:
    wt = tmp_path / "wt.fasta"
    wt.write_text(">a\nMKT\n>b\nWWW\n")
    path = _table(tmp_path, "target,mutant\nb,W1A\na,M1A\n")
    source = MutantSource(path, wt)
    assert [(each.id, each.header, each.sequence) for each in source.read()] == [
        ("W1A", "W1A b", "AWW"),
        ("M1A", "M1A a", "AKT"),
    ]
    assert source.settings["wild_type"] is None

    path = _table(tmp_path, "mutant\nW2A\n")
    assert _rows(MutantSource(path, wt, target="b")) == [(0, "W2A", "WAW")]
    assert _rows(MutantSource(_table(tmp_path, "mutant\nK2A\n", "a.csv"), wt)) == [(0, "K2A", "MAT")]
    with pytest.raises(InputError, match="does not say whose variants it holds"):
        MutantSource(path, wt)
    with pytest.raises(InputError, match="no wild type is called 'c'; there are a, b"):
        MutantSource(path, wt, target="c")


def test_settings_tell_wild_types_apart(tmp_path: Path, wt: Path) -> None:
    path = _table(tmp_path, "mutant\nM1A\n")
    source = MutantSource(path, wt)
    assert source.settings == {
        "wild_type": "blat",
        "wild_type_fingerprint": source.settings["wild_type_fingerprint"],
        "mutant_column": "mutant",
        "sequence_column": "mutated_sequence",
        "offset": 0,
    }
    hashes = set()
    for text in (f">blat\n{WILD_TYPE}\n", f">blat\n{WILD_TYPE}A\n", f">other\n{WILD_TYPE}\n"):
        wt.write_text(text)
        hashes.add(MutantSource(path, wt).settings["wild_type_fingerprint"])
    assert len(hashes) == 3
    # Proteins that no row is of decide nothing.
    wt.write_text(f">blat\n{WILD_TYPE}\n>more\nMKT\n")
    more = MutantSource(path, wt, target="blat").settings["wild_type_fingerprint"]
    assert more == source.settings["wild_type_fingerprint"]


@pytest.mark.parametrize(
    ("row", "name", "problem"),
    [
        ("A2G", "A2G", "residue 2 of the wild type is K, not A"),
        ("K99A", "K99A", "residue 99 lies beyond the protein's 10"),
        ("K2*", "K2*", "is a stop codon"),
        ("nonsense", "nonsense", "is not spelt like A24G"),
        ('""', "", "names no variant: the cell is empty"),
        ("K2A,x", "K2A", "2 cells, expected 1 as in the header"),
    ],
)
def test_rows_at_fault(tmp_path: Path, wt: Path, row: str, name: str, problem: str) -> None:
    path = _table(tmp_path, f"mutant\nK2A\n{row}\nT3S\n")
    with pytest.raises(InputError) as caught:
        list(MutantSource(path, wt).read())
    error = caught.value
    assert problem in error.problem
    assert error.problem.endswith('invalid="skip" leaves the record out')
    assert (error.file, error.line, error.record, error.record_id or "") == (str(path), 3, 2, name)
    for policy in ("skip", "mask"):
        records, rejects = _read_all(MutantSource(path, wt, invalid=policy))
        assert [(record.index, record.id, record.flags) for record in records] == [(0, "K2A", ()), (2, "T3S", ())]
        assert [(reject.index, reject.id) for reject in rejects] == [(1, name)]
        assert problem in rejects[0].reason


def test_left_out_rows_are_counted(tmp_path: Path, wt: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = MutantSource(_table(tmp_path, "mutant\nA2G\nK2A\n"), wt, invalid="skip")
    with caplog.at_level(logging.WARNING):
        assert len(list(source.read())) == 1
        assert "rows left out as invalid: 1 of 2" in caplog.text
        caplog.clear()
        list(source.read(quiet=True))
        list(source.read(on_reject=lambda _: None))
    assert not caplog.text


def test_masks(tmp_path: Path, wt: Path) -> None:
    path = _table(tmp_path, "mutant\nK2J\nK2A\n")
    assert [(each.sequence[:3], each.flags) for each in MutantSource(path, wt, invalid="mask").read()] == [
        ("MXT", ("masked",)),
        ("MAT", ()),
    ]
    # What is masked in the wild type is so in all of its mutants.
    wt.write_text(">blat\nMKT1\n")
    with pytest.raises(InputError, match=r"wt\.fasta, line 1, record 1 \(blat\): on line 2, '1' at residue 4"):
        MutantSource(path, wt, invalid="skip")
    records = list(MutantSource(path, wt, invalid="mask").read())
    assert [(each.sequence, each.flags) for each in records] == [("MXTX", ("masked",)), ("MATX", ("masked",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [("other\nK2A\n", "has neither a column 'mutant' nor 'mutated_sequence'"), ("mutant\n", "holds no rows")],
)
def test_tables_that_hold_no_variants(tmp_path: Path, wt: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(MutantSource(_table(tmp_path, text), wt).read())


def test_a_record_is_located(tmp_path: Path, wt: Path) -> None:
    path = _table(tmp_path, "mutant\nK2A\n\nT3S\n")
    source = MutantSource(path, wt)
    assert str(locate_error(source, list(source.read())[1], "no")) == f"{path}, line 4, record 2 (T3S): no"


def test_a_store_of_mutants(tmp_path: Path, wt: Path) -> None:
    embedder = Embedder(load_model(save_tiny_model(tmp_path / "tiny"), device="cpu", precision="fp32"))
    path = _table(tmp_path, "mutant\nK2A\nbad\nT3S\n")
    source = MutantSource(path, wt, invalid="skip")
    result = embed_library(source, tmp_path / "out", embedder, LibraryOptions(invalid="skip"))
    assert (result.embedded, result.survey.rejected) == (2, 1)
    stored = read_embeddings(tmp_path / "out")
    assert stored.ids == ["K2A", "T3S"]
    expected: Any = embedder.embed(["MATAYIAKQR", "MKSAYIAKQR"])
    assert abs(stored.array[:] - expected).max() < 2e-5
    assert stored.run["settings"]["wild_type"] == "blat"
    assert (tmp_path / "out" / "rejects.csv").read_text().splitlines()[1].startswith("2,bad,")
    # Another protein of the same name is another run.
    wt.write_text(f">blat\n{WILD_TYPE}W\n")
    with pytest.raises(InputError, match="wild_type_fingerprint"):
        embed_library(
            MutantSource(path, wt, invalid="skip"), tmp_path / "out", embedder, LibraryOptions(invalid="skip")
        )
