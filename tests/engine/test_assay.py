"""Assays: whose variant a row is, and which; wild types; offsets that would mend a table."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import InputError
from protnest.engine.assay import AllSingles, Assay, AssayOptions, Target, fingerprint_targets, read_targets
from protnest.engine.table import Table

WILD_TYPE = "MKTAYIAK"
OTHER = "GSHMWW"


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def assay(path: Path, text: str, targets: dict[str, str] | None = None, **options: object) -> Assay:
    known = targets or {"one": WILD_TYPE}
    held = {name: Target(id=name, sequence=sequence) for name, sequence in known.items()}
    return Assay(Table(write(path, text)), held, AssayOptions(**options))  # type: ignore[arg-type]


def problems(found: Assay) -> list[str | None]:
    return [None if entry.problem is None else entry.problem.problem for entry in found.entries()]


def sequences(found: Assay) -> list[str | None]:
    return [None if entry.variant is None else entry.variant.sequence for entry in found.entries()]


@pytest.mark.parametrize("name", ["wt.fasta", "wt.fasta.gz", "wt.fa"])
def test_wild_types_of_a_fasta_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ">two more words\nGSHM\nww*\n>one\nMKTAYIAK\n")
    expected = {"two": Target(id="two", sequence="GSHMWW"), "one": Target(id="one", sequence="MKTAYIAK")}
    assert read_targets(path) == expected
    assert list(read_targets(path)) == ["two", "one"]


@pytest.mark.parametrize("ids", ["target", "DMS_id", "id", "name"])
@pytest.mark.parametrize("residues", ["target_seq", "sequence", "wt_sequence"])
def test_wild_types_of_tables(tmp_path: Path, ids: str, residues: str) -> None:
    path = write(tmp_path / "wt.csv.gz", f"x,{ids},{residues}\n1, B ,gshm\n2,A,MKT*\n")
    assert list(read_targets(path).values()) == [Target(id="B", sequence="GSHM"), Target(id="A", sequence="MKT")]


def test_the_first_of_several_columns_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "wt.tsv", "name\tsequence\tDMS_id\ttarget_seq\nn\tGGG\td\tMKT\n")
    assert read_targets(path) == {"d": Target(id="d", sequence="MKT")}


def test_wild_types_of_parquet_files_may_be_called_by_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [0, 7], "sequence": ["MKT", "GSH"]}), tmp_path / "wt.parquet")
    targets = read_targets(tmp_path / "wt.parquet")
    assert list(targets) == ["0", "7"]
    pq.write_table(pa.table({"target": [7, 0, None], "mutant": ["G1A", "M1A", "M1A"]}), tmp_path / "scan.parquet")
    found = Assay(Table(tmp_path / "scan.parquet"), targets, AssayOptions())
    assert sequences(found) == ["ASH", "AKT", None]
    assert problems(found)[2] == "names no wild type: the cell of target is empty"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("wt.csv", "id,seq\na,MKT\n", "needs a column target or DMS_id or id or name and a column target_seq or "),
        ("wt.csv", "ident,sequence\na,MKT\n", "holds no wild types: it needs a column"),
        ("wt.csv", "id,sequence\n", "wt.csv: holds no rows"),
        ("wt.csv", "id,sequence\na,MKT\nb,GS\na,MKT\n", "wt.csv, line 4: holds the wild type 'a' twice"),
        ("wt.csv", "id,sequence\na,MKT\nb,M1T\n", "wt.csv, line 3, record 2 (b): "),
        ("wt.csv", "id,sequence\na,MKT\nb,\n", "wt.csv, line 3, record 2 (b): "),
        ("wt.csv", "id,sequence\n ,MKT\n", "line 2, record 1: a wild type without an id: the cell of id is empty"),
        ("wt.csv", "id,sequence\na,MKT,x\n", "line 2: row 1 has 3 cells"),
        ("wt.fasta", ">a\nMKT\n>a\nGGG\n", "wt.fasta: holds the wild type 'a' twice"),
        ("wt.fasta", "", "wt.fasta"),
        ("wt.fasta", ">a\nMJT\n", "record 1 (a)"),
        ("none.fasta", None, "none.fasta"),
        ("none.csv", None, "none.csv: cannot be opened"),
        ("wt.parquet.gz", "x", "unknown ending"),
    ],
)
def test_wild_types_that_cannot_be_read(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_targets(tmp_path / name)


def test_masked_wild_types_are_flagged(tmp_path: Path) -> None:
    expected = {
        "a": Target(id="a", sequence="MXTX", flags=("masked",)),
        "b": Target(id="b", sequence="MXT"),
    }
    table = write(tmp_path / "wt.csv", "id,sequence\na,MJTx\nb,MxT\n")
    fasta = write(tmp_path / "wt.fasta", ">a\nMJTx\n>b\nMxT\n")
    assert read_targets(table, invalid="mask") == read_targets(fasta, invalid="mask") == expected


def test_targets_by_column(tmp_path: Path) -> None:
    text = "target,mutant\none,M1A\n two ,G1A\nthree,M1A\n,M1A\n"
    found = assay(tmp_path / "one.csv", text, {"one": WILD_TYPE, "two": OTHER}, target="two")
    assert found.target is None, "the column counts, not the name of the file or --target"
    entries = list(found.entries())
    assert [entry.target and entry.target.id for entry in entries] == ["one", "two", None, None]
    assert sequences(found) == ["AKTAYIAK", "ASHMWW", None, None]
    assert problems(found)[2:] == [
        "no wild type is called 'three'; there are one, two",
        "names no wild type: the cell of target is empty",
    ]
    assert assay(tmp_path / "x.csv", text.replace("target", "DMS_id"), target_column="DMS_id").target is None


@pytest.mark.parametrize("name", ["two.csv", "two.csv.gz", "two.TSV", "two.txt", "two.txt.gz"])
def test_target_by_the_files_name(tmp_path: Path, name: str) -> None:
    text = "G1A\n" if ".txt" in name else "mutant\nG1A\n"
    found = assay(tmp_path / name, text, {"one": WILD_TYPE, "two": OTHER})
    assert found.target == Target(id="two", sequence=OTHER)
    assert sequences(found) == ["ASHMWW"]


def test_target_by_option_or_as_the_only_one(tmp_path: Path) -> None:
    known = {"one": WILD_TYPE, "two": OTHER}
    both = assay(tmp_path / "one.csv", "mutant\nG1A\n", known, target="two").target
    only = assay(tmp_path / "x.csv", "mutant\nM1A\n").target
    assert (both and both.id, only and only.id) == ("two", "one")


@pytest.mark.parametrize(
    ("text", "known", "options", "message"),
    [
        (
            "mutant\nM1A\n",
            {"one": "M", "two": "K"},
            {},
            "none of the 2 wild types' (one, two, ...), and --target names",
        ),
        ("mutant\nM1A\n", {"one": "M"}, {"target": "six"}, "x.csv: no wild type is called 'six'; there are one"),
        ("a,b\n1,2\n", {"one": "M"}, {}, "x.csv: has neither a column 'mutant' nor 'mutated_sequence'; it has a, b"),
        ("mutant\nM1A\n", {"one": "M"}, {"mutant_column": "m"}, "has neither a column 'm' nor 'mutated_sequence'"),
    ],
)
def test_tables_that_say_too_little(
    tmp_path: Path, text: str, known: dict[str, str], options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        assay(tmp_path / "x.csv", text, known, **options)


def test_mutants_and_sequences_must_agree(tmp_path: Path) -> None:
    text = "mutant,mutated_sequence\n"
    text += "K2A,MATAYIAK\n,mktayiag*\nK2A,\n,\nK2A,MGTAYIAK\nWT,MKTAYIAK\nWT,MKTAYIAG\nK2A,MATAYIA\n ,MKT\n"
    found = assay(tmp_path / "x.csv", text)
    expected = ["MATAYIAK", "MKTAYIAG", "MATAYIAK", None, None, "MKTAYIAK", None, None, "MKT"]
    assert sequences(found) == expected
    empty, other, wild, short = (problem for problem in problems(found) if problem is not None)
    assert empty == "names no variant: the cell is empty; the wild type itself is written WT"
    assert other == "variant 'K2A': mutated_sequence holds another one, K2G"
    assert wild == "variant 'WT': mutated_sequence holds another one, K8G"
    assert short == "variant 'K2A': mutated_sequence holds another one, 7 residues"
    rows = [entry.row for entry in found.entries()]
    assert [found.mutant(row) for row in rows[:4]] == ["K2A", "mktayiag*", "K2A", ""]
    variants = [entry.variant for entry in found.entries()]
    assert [variant and variant.is_indel for variant in variants] == [
        False,
        False,
        False,
        None,
        None,
        False,
        None,
        None,
        True,
    ]


def test_one_column_of_sequences(tmp_path: Path) -> None:
    """ProteinGym's insertions and deletions stand in the column `mutant`, whole."""
    found = assay(tmp_path / "x.csv", "mutant\nMKTAYIA\nMKTAYIAG\n", sequence_column="mutant")
    assert sequences(found) == ["MKTAYIA", "MKTAYIAG"]
    assert assay(tmp_path / "y.csv", "mutated_sequence\nMKTAYIAG\n").mutant(next(found.source.rows())) == "MKTAYIA"


def test_letters_that_are_no_residues(tmp_path: Path) -> None:
    text = "mutant,mutated_sequence\nK2J,\n,MJTAYIAK\n,MKTAYIAKJ\nK2*,\nK2A,MATAYIAK\n"
    assert [problem is None for problem in problems(assay(tmp_path / "x.csv", text))] == [False] * 4 + [True]
    masked = assay(tmp_path / "x.csv", text, invalid="mask")
    assert sequences(masked) == ["MXTAYIAK", "MXTAYIAK", "MKTAYIAKX", None, "MATAYIAK"]
    flags = [entry.variant and entry.variant.flags for entry in masked.entries()]
    assert flags == [("masked",), ("masked",), ("masked",), None, ()]


def test_ragged_rows_are_told(tmp_path: Path) -> None:
    found = assay(tmp_path / "x.csv", "a,mutant\n1,K2A\n2\n3,K2G,x\n")
    assert problems(found) == [None, "1 cells, expected 2 as in the header", "3 cells, expected 2 as in the header"]
    ragged = [entry for entry in found.entries() if entry.problem is not None]
    assert [found.mutant(entry.row) for entry in ragged] == ["", "K2G"]
    assert str(found.locate(ragged[0])) == f"{tmp_path}/x.csv, line 3, record 2: 1 cells, expected 2 as in the header"


def first_problem(found: Assay) -> str:
    return str(found.locate(next(entry for entry in found.entries() if entry.problem is not None)))


def test_an_offset_that_fits_is_suggested(tmp_path: Path) -> None:
    # M, K, T at 24, 25, 26; the WT row and the one misspelt count for nothing.
    found = assay(tmp_path / "x.csv", "mutant\nWT\nM24A\nK25A:T26G\nA27C\n")
    message = first_problem(found)
    assert message.startswith(f"{tmp_path}/x.csv, line 3, record 2 (M24A): variant 'M24A': residue 24 lies beyond")
    assert message.endswith("; with --offset 23 all of the first 4 variants fit")
    assert problems(assay(tmp_path / "x.csv", "mutant\nM24A\nK25A:T26G\n", offset=23)) == [None, None]
    zero_based = assay(tmp_path / "x.csv", "mutant\nM0A\nK1A\nT2A\n")
    assert first_problem(zero_based).endswith("; with --offset -1 all of the first 3 variants fit")


def test_no_offset_is_suggested_where_none_would_help(tmp_path: Path) -> None:
    for text in ("K2A\nG3A\n", "A5C\n", "K2*\nM1A\n", "K2\nM24A\nK25A\n"):
        message = first_problem(assay(tmp_path / "x.csv", f"mutant\n{text}"))
        assert "--offset" not in message, text
    # Under the offset in use they do fit, all but the one that names a place beyond.
    found = assay(tmp_path / "x.csv", "mutant\nM24A\nK25A\n", offset=23)
    entry = next(found.entries())._replace(problem=first_slip(tmp_path))
    assert found.hint(entry) == ""


def first_slip(folder: Path) -> InputError:
    slip = next(assay(folder / "slip.csv", "mutant\nM24A\n").entries()).problem
    assert slip is not None
    return slip


def test_offsets_are_suggested_target_by_target(tmp_path: Path) -> None:
    text = "target,mutant\none,K2A\none,M1A\ntwo,H13A\ntwo,M14A\ntwo,M14\ntwo\ntwo,M99A,x\n"
    found = assay(tmp_path / "x.csv", text, {"one": WILD_TYPE, "two": OTHER})
    assert first_problem(found).endswith("; with --offset 10 all of the first 3 variants fit")


def test_suggestions_read_the_tables_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.engine.assay._ROWS_ASKED", 3)
    found = assay(tmp_path / "x.csv", "mutant\nM24A\nK25A\nT26A\nG1A\n")
    assert first_problem(found).endswith("; with --offset 23 all of the first 3 variants fit")


@pytest.mark.parametrize("offset", [0, 23, -3])
def test_all_singles(offset: int) -> None:
    targets = [Target(id="one", sequence="MX"), Target(id="two", sequence="U-K")]
    source = AllSingles(targets, offset=offset, path=Path("all.csv"))
    assert (source.columns, source.kinds) == (("target", "mutant"), ("text", "text"))
    rows = list(source.rows())
    # 19 where the wild type has one of the 20, 20 where it has X or U, none for a gap.
    assert len(rows) == 19 + 20 + 20 + 19
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert {row.line for row in rows} == {None}
    assert rows[0].cells == ("one", f"M{1 + offset}A")
    assert rows[18].cells == ("one", f"M{1 + offset}Y")
    assert rows[19].cells == ("one", f"X{2 + offset}A")
    assert rows[-1].cells == ("two", f"K{3 + offset}Y")
    assert len({row.cells for row in rows}) == len(rows)
    assert list(source.rows(begin=20)) == rows[20:]
    found = Assay(source, {target.id: target for target in targets}, AssayOptions(offset=offset))
    assert problems(found) == [None] * len(rows)
    entries = list(found.entries())
    assert {entry.variant.sequence for entry in entries if entry.variant} > {"AX", "MY", "A-K", "U-Y"}
    assert all(entry.variant and entry.variant.is_single for entry in entries)


def test_all_singles_have_the_callers_columns(tmp_path: Path) -> None:
    targets = {name: Target(id=name, sequence="MK") for name in ("a", "b")}
    options = AssayOptions(target_column="DMS_id", mutant_column="change")
    source = AllSingles([*targets.values()], path=tmp_path / "all.csv", columns=("DMS_id", "change"))
    assert problems(Assay(source, targets, options)) == [None] * 76


def test_fingerprints_tell_targets_apart() -> None:
    one, two = Target(id="a", sequence="MK"), Target(id="b", sequence="MKT")
    lists = [[one], [two], [one, two], [two, one], [Target(id="aM", sequence="K")], [Target(id="a", sequence="MX")]]
    lists.append([Target(id="a", sequence="MX", flags=("masked",))])
    prints = [fingerprint_targets(targets) for targets in lists]
    assert len(set(prints)) == len(prints)
    assert AllSingles([one, two], path=Path("x")).fingerprint() == prints[2]
