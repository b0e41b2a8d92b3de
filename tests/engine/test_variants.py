"""Variants: applied where they say, refused where they cannot be; scans read with their lines."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from protnest.engine import InputError
from protnest.engine.variants import confine, parse_region, parse_variant, read_scan, read_wild_type

from support.shared_data import shared_path

WILD_TYPE = "MKTAYIAK"


@pytest.mark.parametrize(
    ("name", "sites", "sequence"),
    [
        ("M1A", (0,), "AKTAYIAK"),
        ("K8W", (7,), "MKTAYIAW"),
        ("A4G:K2R", (3, 1), "MRTGYIAK"),
        (" a4g ", (3,), "MKTGYIAK"),
        ("A4A", (3,), "MKTAYIAK"),
    ],
)
def test_variants(name: str, sites: tuple[int, ...], sequence: str) -> None:
    variant = parse_variant(name, WILD_TYPE)
    assert (variant.sites, variant.sequence) == (sites, sequence)
    assert variant.is_single == (len(sites) == 1)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "'' is not spelt like A24G"),
        ("A0G", "residue 0 lies before the protein's first, which is 1"),
        ("A-3G", "residue -3 lies before the protein's first, which is 1"),
        ("A4", "'A4' is not spelt like A24G"),
        ("A4G:", "'' is not spelt like A24G"),
        ("A9G", "residue 9 lies beyond the protein's 8"),
        ("G4A", "residue 4 of the wild type is A, not G"),
        ("A4J", "'J' is not a residue"),
        ("A4G:A4C", "residue 4 is there twice"),
    ],
)
def test_variants_that_cannot_be(name: str, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        parse_variant(name, WILD_TYPE)


def test_regions() -> None:
    variant = confine(parse_variant("A4G:K8R", WILD_TYPE), *parse_region("3-8"))
    assert (variant.name, variant.sites, variant.sequence) == ("A4G:K8R", (1, 5), "TGYIAR")
    assert confine(variant, 1, 6) == variant
    with pytest.raises(InputError, match="residues 3 to 9 are no part of a protein of 8"):
        confine(parse_variant("A4G", WILD_TYPE), 3, 9)
    with pytest.raises(InputError, match="'A4G:K8R': residue 8 lies outside of 2 to 7"):
        confine(parse_variant("A4G:K8R", WILD_TYPE), 2, 7)
    for text in ("", "3", "3-", "0-4", "8-3", "a-b"):
        with pytest.raises(InputError, match=re.escape(f"region {text!r} is not spelt like 331-531")):
            parse_region(text)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_scan(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan{suffix}"
    text = "other,mutant,DMS_score\nx,A4G,0.5\ny,A4G:K2R,-1e-3\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    variants, scores = read_scan(path, WILD_TYPE)
    assert [variant.name for variant in variants] == ["A4G", "A4G:K2R"]
    assert scores == [0.5, -1e-3]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mutant,score\nA4G,1\n", "has no column 'DMS_score'; it has mutant, score"),
        ("", "has no column 'mutant'; it has none"),
        ("mutant,DMS_score\n", "holds no variant"),
        ("mutant,DMS_score\nA4G,1\nG4A,2\n", "line 3: variant 'G4A': residue 4 of the wild type is A"),
        ("mutant,DMS_score\nA4G,nan\n", "line 2: DMS_score is 'nan', expected a number"),
        ("mutant,DMS_score\nA4G\n", "line 2: DMS_score is None, expected a number"),
    ],
)
def test_scans_that_cannot_be(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "scan.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(problem)):
        read_scan(path, WILD_TYPE)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a readable CSV file"):
        read_scan(tmp_path / "none.csv", WILD_TYPE)
    (tmp_path / "bad.csv.gz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a readable CSV file"):
        read_scan(tmp_path / "bad.csv.gz", WILD_TYPE)


def test_wild_type(tmp_path: Path) -> None:
    path = tmp_path / "wt.fasta"
    path.write_text(">one\nMKT\n")
    assert read_wild_type(path) == "MKT"
    path.write_text(">one\nMKT\n>two\nACD\n")
    assert read_wild_type(path, "two") == "ACD"
    with pytest.raises(InputError, match=r"holds 2 records \(one, two, ...\): name one"):
        read_wild_type(path)
    with pytest.raises(InputError, match="holds no record 'three'; it has one, two"):
        read_wild_type(path, "three")


def test_real_scans_fit_their_wild_types() -> None:
    folder = shared_path("dms")
    for path in sorted(folder.glob("*.csv.gz")):
        name = path.name.removesuffix(".csv.gz")
        if "4site" in name:
            continue  # 149,361 rows
        variants, scores = read_scan(path, read_wild_type(folder / "wt.fasta", name))
        assert len(variants) == len(scores) > 1000
