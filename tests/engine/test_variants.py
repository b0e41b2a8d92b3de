"""Variants: applied where they say, refused where they cannot be; scans read with their lines."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
from protnest.engine import InputError
from protnest.engine.variants import (
    SlipError,
    Variant,
    confine,
    find_offset,
    parse_region,
    parse_variant,
    read_scan,
    read_wild_type,
    variant_of_sequence,
    wild_type_variant,
)

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
        ("A4U", (3,), "MKTUYIAK"),
        ("A4O", (3,), "MKTOYIAK"),
        ("A4G: K8R ", (3, 7), "MKTGYIAR"),
        ("K2R:K8A:M1L", (1, 7, 0), "LRTAYIAA"),
        ("A04G", (3,), "MKTGYIAK"),
    ],
)
def test_variants(name: str, sites: tuple[int, ...], sequence: str) -> None:
    variant = parse_variant(name, WILD_TYPE)
    assert (variant.sites, variant.sequence) == (sites, sequence)
    assert variant.is_single == (len(sites) == 1)
    assert (variant.name, variant.is_indel, variant.flags) == (name.strip(), False, ())


@pytest.mark.parametrize("name", ["WT", "wt", "_wt", "wild-type", "wildtype", " WT "])
def test_the_wild_type(name: str) -> None:
    variant = parse_variant(name, WILD_TYPE, offset=5)
    assert variant == Variant(name=name.strip(), sites=(), sequence=WILD_TYPE, is_indel=False, flags=())
    assert not variant.is_single
    assert wild_type_variant(WILD_TYPE) == Variant(name="WT", sites=(), sequence=WILD_TYPE)
    assert wild_type_variant(WILD_TYPE, "mine").name == "mine"


@pytest.mark.parametrize(
    ("name", "offset", "sites"),
    [("M24A", 23, (0,)), ("K31R:M24A", 23, (7, 0)), ("M-2A", -3, (0,)), ("K0R", -2, (1,)), ("M1A", 0, (0,))],
)
def test_numbers_less_an_offset(name: str, offset: int, sites: tuple[int, ...]) -> None:
    variant = parse_variant(name, WILD_TYPE, offset=offset)
    assert (variant.name, variant.sites) == (name, sites)
    assert all(variant.sequence[site] != WILD_TYPE[site] for site in sites)
    assert len(variant.sequence) == len(WILD_TYPE)


@pytest.mark.parametrize(
    ("name", "offset", "problem"),
    [
        ("M23A", 23, "variant 'M23A': residue 23 lies before the protein's first, which is 24 (less the offset, 0)"),
        ("K32R", 23, "variant 'K32R': residue 32 lies beyond the protein's 8 (less the offset, 9)"),
        ("K24R", 23, "variant 'K24R': residue 24 of the wild type is M, not K"),
        ("M-3A", -3, "variant 'M-3A': residue -3 lies before the protein's first, which is -2 (less the offset, 0)"),
        ("K9R", 0, "variant 'K9R': residue 9 lies beyond the protein's 8"),
        ("A4G:K3R", 0, "variant 'A4G:K3R': residue 3 of the wild type is T, not K"),
        ("*4A", 0, "variant '*4A': residue 4 of the wild type is A, not *"),
    ],
)
def test_slips(name: str, offset: int, problem: str) -> None:
    """What may come of counting from another residue has an error of its own."""
    with pytest.raises(SlipError, match=f"{re.escape(problem)}$"):
        parse_variant(name, WILD_TYPE, offset=offset)


@pytest.mark.parametrize("letter", ["J", "X", "B", "Z", "x", "j"])
def test_letters_that_are_masked(letter: str) -> None:
    variant = parse_variant(f"K2R:A4{letter}", WILD_TYPE, invalid="mask")
    assert (variant.sites, variant.sequence, variant.flags) == ((1, 3), "MRTXYIAK", ("masked",))
    kept = parse_variant("K2R:A4U", WILD_TYPE, invalid="mask")
    assert (kept.sequence, kept.flags) == ("MRTUYIAK", ())


@pytest.mark.parametrize("invalid", ["error", "mask", "skip"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("A4*", "variant 'A4*': '*' is a stop codon, of which a protein model knows nothing"),
        ("A4J", "variant 'A4J': 'J' is not a residue"),
        ("A4X", "variant 'A4X': 'X' stands for no one amino acid"),
        ("A4b", "variant 'A4b': 'B' stands for no one amino acid"),
        ("A4Z", "variant 'A4Z': 'Z' stands for no one amino acid"),
    ],
)
def test_letters_that_are_refused(name: str, problem: str, invalid: Any) -> None:
    """Stop codons always, and they are no slip."""
    if invalid == "mask" and "*" not in name:
        assert parse_variant(name, WILD_TYPE, invalid=invalid).sequence == "MKTXYIAK"
        return
    with pytest.raises(InputError, match=f"{re.escape(problem)}$") as caught:
        parse_variant(name, WILD_TYPE, invalid=invalid)
    assert not isinstance(caught.value, SlipError)


def test_ambiguous_wild_types_are_named() -> None:
    assert parse_variant("X2A", "MXT").sequence == "MAT"


# Mutated sequences


@pytest.mark.parametrize(
    ("sequence", "sites", "name"),
    [
        ("MKTGYIAK", (3,), "A4G"),
        ("AKTGYIAW", (0, 3, 7), "M1A:A4G:K8W"),
        (WILD_TYPE, (), "WT"),
        (" mktgyiak\n", (3,), "A4G"),
        ("MKTG YIAK", (3,), "A4G"),
        ("MKTGYIAK*", (3,), "A4G"),
        ("MKTXYIAK", (3,), "A4X"),
    ],
)
def test_sequences_of_equal_length(sequence: str, sites: tuple[int, ...], name: str) -> None:
    variant = variant_of_sequence(sequence, WILD_TYPE)
    cleaned = sequence.upper().replace(" ", "").strip("*\n")
    assert variant == Variant(name=name, sites=sites, sequence=cleaned)
    assert variant_of_sequence(sequence, WILD_TYPE, name="mine") == Variant(name="mine", sites=sites, sequence=cleaned)
    if "X" not in cleaned:
        spelt = parse_variant(name, WILD_TYPE)
        assert (spelt.sites, spelt.sequence) == (sites, cleaned)


@pytest.mark.parametrize("sequence", ["MKT", "MKTAYIA", "MKTAYIAKK", "mktayiakk*", "W"])
def test_sequences_of_other_lengths(sequence: str) -> None:
    variant = variant_of_sequence(sequence, WILD_TYPE)
    cleaned = sequence.upper().strip("*")
    assert variant == Variant(name=f"{len(cleaned)} residues", sites=(), sequence=cleaned, is_indel=True)
    assert variant_of_sequence(sequence, WILD_TYPE, name="mine").name == "mine"


@pytest.mark.parametrize(
    ("sequence", "sites", "cleaned", "is_indel", "flags"),
    [
        ("MKTJYIAK", (3,), "MKTXYIAK", False, ("masked",)),
        ("MXTjYIAK", (1, 3), "MXTXYIAK", False, ("masked",)),
        ("MKTxYIAK", (3,), "MKTXYIAK", False, ()),
        ("MJ", (), "MX", True, ("masked",)),
        ("Mx", (), "MX", True, ()),
        ("MKTGYIAK*", (3,), "MKTGYIAK", False, ()),
    ],
)
def test_sequences_that_are_masked(
    sequence: str, sites: tuple[int, ...], cleaned: str, is_indel: bool, flags: tuple[str, ...]
) -> None:
    variant = variant_of_sequence(sequence, WILD_TYPE, name="mine", invalid="mask")
    assert variant == Variant(name="mine", sites=sites, sequence=cleaned, is_indel=is_indel, flags=flags)


@pytest.mark.parametrize("invalid", ["error", "mask"])
@pytest.mark.parametrize(
    ("sequence", "problem"),
    [
        ("", "the sequence is empty"),
        ("*", "the sequence is empty"),
        ("MK*AYIAK", "residue 3 of 8 is '*': '*' is a stop codon, of which a protein model knows nothing"),
        (" *MKT*", "residue 1 of 5 is '*'"),
    ],
)
def test_sequences_that_cannot_be(sequence: str, problem: str, invalid: Any) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        variant_of_sequence(sequence, WILD_TYPE, invalid=invalid)


def test_sequences_of_letters_that_are_none() -> None:
    with pytest.raises(InputError, match="'J' at residue 2 is not a residue"):
        variant_of_sequence("MJT", WILD_TYPE)


# Offsets


@pytest.mark.parametrize(
    ("names", "offset"),
    [
        (["A4G", "K8R"], 0),
        (["M24A:K31R"], 23),
        (["m24a", " K31R ", "T26*", "WT", "not one"], 23),
        (["M-2A"], -3),
        # The slip of one of those who count from 0.
        (["M0A", "K1R", "Y4A"], -1),
        (["A4G", "A7G"], 0),
        # One residue may lie in two places, and others tell which.
        (["K2R"], None),
        (["K2R", "M1A"], 0),
        (["A24G:A27G"], 20),
        # Each fits somewhere, together they do not.
        (["M1A", "T4A"], None),
        (["W1A"], None),
        # Beyond both ends.
        (["A4G", "K8R", "Y14A"], None),
        (["K2R", "T3A", "M0A"], None),
        (["M1A", "K0R"], None),
        (["WT", ""], None),
        ([], None),
    ],
)
def test_offsets_are_found(names: list[str], offset: int | None) -> None:
    assert find_offset(names, WILD_TYPE) == offset
    assert find_offset(iter(names), WILD_TYPE) == offset
    if offset is not None:
        for name in names:
            if name.strip()[1:-1].lstrip("-").isdigit() and "*" not in name:
                parse_variant(name, WILD_TYPE, offset=offset)


def test_offsets_of_repeats() -> None:
    assert find_offset(["A5G", "A6G"], "AAAA") is None
    assert find_offset(["A5G", "A6G", "A7G", "A8G"], "AAAA") == 4
    assert find_offset(["A5G"], "") is None


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


# Regions, scans and wild types


def test_regions() -> None:
    variant = confine(parse_variant("A4G:K8R", WILD_TYPE), *parse_region("3-8"))
    assert (variant.name, variant.sites, variant.sequence) == ("A4G:K8R", (1, 5), "TGYIAR")
    assert confine(variant, 1, 6) == variant
    with pytest.raises(InputError, match="residues 3 to 9 are no part of a protein of 8"):
        confine(parse_variant("A4G", WILD_TYPE), 3, 9)
    with pytest.raises(InputError, match="'A4G:K8R': residue 8 lies outside of 2 to 7"):
        confine(parse_variant("A4G:K8R", WILD_TYPE), 2, 7)
    masked = parse_variant("A4J", WILD_TYPE, invalid="mask")
    assert confine(masked, 2, 5) == Variant(name="A4J", sites=(2,), sequence="KTXY", flags=("masked",))
    with pytest.raises(InputError, match="variant '3 residues' inserts or deletes residues: its regions are not"):
        confine(variant_of_sequence("MKT", WILD_TYPE), 1, 2)
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
