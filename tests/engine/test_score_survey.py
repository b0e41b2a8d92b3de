"""The first reading: every row is checked once, and nothing is to be run twice."""

from __future__ import annotations

import csv
import logging
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import InputError
from protnest.engine.score_survey import SurveyOptions
from protnest.engine.scoring import check_variant
from protnest.engine.variants import Variant

from support.assays import OTHER, WILD_TYPE, survey, write_tables

BY_SITE = SurveyOptions(by_site=True)
BY_MUTANT = SurveyOptions(by_site=False)
SKIP = SurveyOptions(by_site=False, on_error="skip")

TABLES = {
    "one.csv": "mutant,x\nK2A,1\nA4G:K2R,2\nWT,3\nK2A,4\nK8K,5\n",
    "more.csv": "x,target,mutant\na,twin,T3A\nb,two,G1A\nc,one,K2A\nd,twin,K8K\n",
}


def test_sites_of_equal_wild_types_are_one_proteins(tmp_path: Path) -> None:
    found = survey(write_tables(tmp_path, TABLES), BY_SITE)
    assert {name: protein.places for name, protein in found.proteins.items()} == {WILD_TYPE: [1, 2, 3, 7], OTHER: [0]}
    assert [len(assay.units) for assay in found.assays] == [0, 0]
    assert not any(protein.units for protein in found.proteins.values())
    assert (found.rows, found.rejected) == (9, 0)


def test_mutants_are_numbered_as_they_appear(tmp_path: Path) -> None:
    found = survey(write_tables(tmp_path, TABLES), BY_MUTANT)
    one, more = found.assays
    # K8K is the wild type itself, and the twin's T3A is the same protein's next mutant.
    assert (one.units.tolist(), more.units.tolist()) == ([0, 1, 2, 0, 2], [3, 0, 0, 2])
    assert {name: len(protein.units) for name, protein in found.proteins.items()} == {WILD_TYPE: 4, OTHER: 1}
    assert (one.targets.tolist(), one.target_ids) == ([0] * 5, {"one": 0})
    assert (more.targets.tolist(), more.target_ids) == ([0, 1, 2, 0], {"twin": 0, "two": 1, "one": 2})
    assert one.is_single().tolist() == [True, False, False, True, True]
    assert one.is_single().dtype == bool
    assert found.proteins[WILD_TYPE].lengths.tolist() == [8] * 4


def test_the_wild_type_comes_first_where_it_is_asked_for(tmp_path: Path) -> None:
    found = survey(write_tables(tmp_path, TABLES), SurveyOptions(by_site=False, with_wild_type=True))
    assert [assay.units.tolist() for assay in found.assays] == [[1, 2, 0, 1, 0], [3, 1, 1, 0]]
    assert {name: len(protein.units) for name, protein in found.proteins.items()} == {WILD_TYPE: 4, OTHER: 2}


def test_places_may_tell_equal_sequences_apart(tmp_path: Path) -> None:
    table = {"one.csv": "mutant\nK2K\nT3T\nK2A:T3T\nT3T:K2A\nK2A\n"}
    paths = write_tables(tmp_path, table)
    assert survey(paths, BY_MUTANT).assays[0].units.tolist() == [0, 0, 1, 1, 1]
    assert survey(paths, SurveyOptions(by_site=False, by_place=True)).assays[0].units.tolist() == [0, 1, 2, 2, 3]


def test_lengths_are_the_mutants(tmp_path: Path) -> None:
    found = survey(write_tables(tmp_path, {"one.csv": "mutated_sequence\nMKT\nMKTAYIAKK\nMKT\n"}), BY_MUTANT)
    assert found.proteins[WILD_TYPE].lengths.tolist() == [3, 9]


def test_rows_are_read_again_without_the_rejected(tmp_path: Path) -> None:
    paths = write_tables(tmp_path, {"one.csv": "mutant\nK2A\nG3A\nWT\nA9G\nT3A\n"})
    found = survey(paths, SKIP)
    (assay,) = found.assays
    assert assay.accepted.tolist() == [1, 0, 1, 0, 1]
    assert (assay.rows, assay.rejected, found.rows, found.rejected) == (5, 2, 5, 2)
    assert [entry.row.number for entry in assay.entries()] == [1, 3, 5]
    assert len(assay.units) == len(assay.targets) == len(assay.singles) == 3


def test_a_row_that_cannot_be_scored_stops_with_its_place(tmp_path: Path) -> None:
    paths = write_tables(tmp_path, {"one.csv": "mutant\nK2A\n\nG3A\n", "two.csv": "mutant\nG1A\n"})
    where = f"{paths[0]}, line 4, record 2 (G3A): variant 'G3A': residue 3 of the wild type is T, not G"
    with pytest.raises(InputError) as caught:
        survey(paths, BY_SITE, rejects=tmp_path / "rejects.csv")
    assert str(caught.value) == where
    assert not (tmp_path / "rejects.csv").exists()


def test_rejects_of_all_tables_are_listed(tmp_path: Path) -> None:
    tables = {"one.csv": "mutant\nK2A\n\nG3A\n", "more.csv": "target,mutant\nsix,K2A\ntwo,G1A\ntwo\ntwo,G1*\n"}
    paths = write_tables(tmp_path, tables)
    rejects = tmp_path / "out" / "rejects.csv"
    found = survey(paths, SKIP, rejects=rejects)
    rows = list(csv.reader(rejects.open(encoding="utf-8")))
    assert rows[0] == ["file", "row", "line", "target", "mutant", "reason"]
    assert [row[:5] for row in rows[1:]] == [
        [str(paths[0]), "2", "4", "one", "G3A"],
        [str(paths[1]), "1", "2", "", "K2A"],
        [str(paths[1]), "3", "4", "", ""],
        [str(paths[1]), "4", "5", "two", "G1*"],
    ]
    assert rows[1][5] == "variant 'G3A': residue 3 of the wild type is T, not G"
    assert found.rows - found.rejected == 2


def test_no_rejects_no_file(tmp_path: Path) -> None:
    survey(write_tables(tmp_path, TABLES), SKIP, rejects=tmp_path / "rejects.csv")
    assert not (tmp_path / "rejects.csv").exists()


def test_a_table_without_a_row_to_score_says_why(tmp_path: Path) -> None:
    paths = write_tables(tmp_path, {"one.csv": "mutant\nG3A\nG4A\n"})
    message = f"{paths[0]}: none of its 2 rows can be scored; the first: {paths[0]}, line 2, record 1 (G3A): variant"
    with pytest.raises(InputError, match=re.escape(message)):
        survey(paths, SKIP, rejects=tmp_path / "rejects.csv")
    assert not (tmp_path / "rejects.csv").exists()


def test_a_method_may_refuse_variants(tmp_path: Path) -> None:
    def check(variant: Variant, wild_type: str) -> None:
        assert wild_type == WILD_TYPE
        check_variant(variant, "wt-marginal")

    paths = write_tables(tmp_path, {"one.csv": "mutated_sequence\nMKTAYIAA\nMKTAYIA\n"})
    with pytest.raises(InputError, match=r"line 3, record 2 \(MKTAYIA\): variant '7 residues' inserts or deletes"):
        survey(paths, SurveyOptions(by_site=True, check=check))
    assert survey(paths, SurveyOptions(by_site=True, check=check, on_error="skip")).rejected == 1
    assert survey(paths, BY_SITE).rejected == 0


def test_an_offset_is_suggested_once_for_each_wild_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "target,mutant\none,K2A\none,M11A\none,K12A\none,T13A\ntwo,G11A\ntwo,S12A\ntwo,H13A\nsix,M1A\n"
    with caplog.at_level(logging.WARNING, logger="protnest"):
        survey(write_tables(tmp_path, {"x.csv": text}), SKIP)
    assert [record.getMessage().partition("; with ")[2] for record in caplog.records] == [
        "--offset 10 all of the first 3 variants fit"
    ]
    with pytest.raises(InputError, match=r"line 3.*residue 11 lies beyond the protein's 8$"):
        survey([tmp_path / "x.csv"], BY_MUTANT)


def test_columns_of_text_files_have_kinds(tmp_path: Path) -> None:
    text = "mutant,count,value,name\nK2A,1,0.5,x\nG3A,one,one,\nK2R,2,,y\n"
    assert survey(write_tables(tmp_path, {"one.csv": text}), SKIP).assays[0].kinds == (
        *("text", "integer", "number", "text"),
    ), "a rejected row's cells are not written"


def test_columns_of_parquet_files_keep_theirs(tmp_path: Path) -> None:
    schema = pa.schema([("mutant", pa.string()), ("n", pa.int16()), ("x", pa.float32()), ("on", pa.bool_())])
    table = pa.table({"mutant": ["K2A", "WT"], "n": [1, None], "x": [0.1, 2.0], "on": [True, False]}, schema=schema)
    pq.write_table(table, tmp_path / "one.parquet")
    (assay,) = survey([tmp_path / "one.parquet"], BY_SITE).assays
    assert assay.kinds == tuple(schema)
    pq.write_table(table.select(["mutant"]), tmp_path / "one.parquet")
    assert survey([tmp_path / "one.parquet"], BY_SITE).assays[0].kinds == (schema.field(0),)


def test_rows_with_masked_letters_are_counted(tmp_path: Path) -> None:
    paths = write_tables(tmp_path, {"one.csv": "mutant\nK2J\nK2A\nT3J\n"})
    assert survey(paths, BY_SITE, invalid="mask").assays[0].flagged == 2


MEASURED = "mutant,DMS_score,DMS_score_bin,n\nK2A,1.5,1,2\nK2R, ,0,3\nK2G,-1e3,,x\nK2C,nan,1.0,5\n"


def measuring(on_error: str = "error", **changes: object) -> SurveyOptions:
    fields: dict[str, object] = {"number_columns": ("DMS_score", "DMS_score_bin", "absent")}
    fields["class_columns"] = ("DMS_score_bin",)
    return SurveyOptions(by_site=True, on_error=on_error, **{**fields, **changes})  # type: ignore[arg-type]


def test_measurements_are_read(tmp_path: Path) -> None:
    (assay,) = survey(write_tables(tmp_path, {"one.csv": MEASURED}), measuring()).assays
    assert list(assay.numbers) == ["DMS_score", "DMS_score_bin"]
    np.testing.assert_array_equal(assay.numbers["DMS_score"], [1.5, math.nan, -1000, math.nan])
    np.testing.assert_array_equal(assay.numbers["DMS_score_bin"], [1, 0, math.nan, 1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("K2R,NA,1", "line 3, record 2 (K2R): DMS_score is 'NA', expected a finite number"),
        ("K2R,inf,1", "line 3, record 2 (K2R): DMS_score is 'inf', expected a finite number"),
        ("K2R,1,-inf", "line 3, record 2 (K2R): DMS_score_bin is '-inf', expected 0 or 1"),
        ("K2R,1,2", "line 3, record 2 (K2R): DMS_score_bin is '2', expected 0 or 1"),
        ("K2R,1,yes", "line 3, record 2 (K2R): DMS_score_bin is 'yes', expected 0 or 1"),
    ],
)
def test_measurements_that_are_none(tmp_path: Path, row: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    """They stop a run, or are missing; a row is scored whether its measurement can be read or not."""
    paths = write_tables(tmp_path, {"one.csv": f"mutant,DMS_score,DMS_score_bin\nK2A,1,1\n{row}\n"})
    with pytest.raises(InputError, match=re.escape(message)):
        survey(paths, measuring())
    with caplog.at_level(logging.WARNING, logger="protnest"):
        found = survey(paths, measuring("skip"), rejects=tmp_path / "rejects.csv")
    assert found.rejected == 0
    assert not (tmp_path / "rejects.csv").exists()
    column = message.split(": ")[1].split()[0]
    assert math.isnan(found.assays[0].numbers[column][1])
    assert [record.getMessage() for record in caplog.records] == [
        f"{paths[0]}: {column} is no number in 1 rows: missing"
    ]


def test_rejected_rows_have_no_measurements(tmp_path: Path) -> None:
    paths = write_tables(tmp_path, {"one.csv": "DMS_score,mutant\n1,K2A\n2,G2A\n3,T3A\n"})
    assert survey(paths, measuring("skip")).assays[0].numbers["DMS_score"].tolist() == [1, 3]
