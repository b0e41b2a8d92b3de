"""Reading labelled proteins: tables, residues' states with masks, draws; and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from protnest.engine import InputError
from protnest.training.labelled import Labelled, choose, read_classes, read_states


def _table(folder: Path, text: str, name: str = "labels.tsv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_tables(tmp_path: Path) -> None:
    rows = "accession\tlabel\tset\tsequence\nA\tnucleus\ttrain\tMKT\nB\tgolgi\ttest\tmkv*\nC\tgolgi\tvalid\tMA\n"
    wanted = [("MKT", ("nucleus",), False), ("MKV", ("golgi",), True), ("MA", ("golgi",), False)]
    path = _table(tmp_path, rows)
    assert [(each.sequence, each.labels, each.is_test) for each in read_classes(path)] == wanted
    packed = tmp_path / "labels.csv.gz"
    packed.write_bytes(gzip.compress(rows.replace("\t", ",").encode()))
    assert [(each.sequence, each.labels, each.is_test) for each in read_classes(packed)] == wanted


def test_without_a_set_one_in_five_is_for_testing(tmp_path: Path) -> None:
    letters = "ACDEFGHIKLMNPQRSTVWY"
    rows = "".join(f"{one}{two}MKT,x\n" for one in letters for two in letters)
    found = read_classes(_table(tmp_path, "sequence,label\n" + rows))
    assert 50 < sum(each.is_test for each in found) < 110
    assert found == read_classes(_table(tmp_path, "sequence,label\n" + rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "labels.tsv: has no column 'sequence'; it has none"),
        ("label\tset\n", "has no column 'sequence'; it has label, set"),
        ("sequence\tlabel\n", "labels.tsv: holds no protein"),
        ("sequence\tlabel\nMKT\tx\nMK1\ty\n", "line 3"),
        ("sequence\tlabel\nMKT\t\n", "line 2.*holds no label"),
        ("sequence\tlabel\tset\nMKT\tx\tlater\n", "set is 'later'; allowed: train, valid, validation, test"),
    ],
)
def test_tables_at_fault(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_classes(_table(tmp_path, text))
    with pytest.raises(InputError, match="not a readable table"):
        read_classes(tmp_path / "nowhere.tsv")


def test_states(tmp_path: Path) -> None:
    proteins = _table(tmp_path, ">a\nMKTA\n>b\nMV\n>unused\nMMM\n", "sequences.fasta")
    states = _table(tmp_path, ">a SET=train VALIDATION=False\nCH\nHE\n>b SET=test\nEE\n", "states.fasta")
    mask = _table(tmp_path, ">b\n11\n>a\n0111\n", "mask.fasta")
    found = read_states(proteins, states, mask)
    assert found == [
        Labelled(sequence="MKTA", labels=("", "H", "H", "E"), is_test=False),
        Labelled(sequence="MV", labels=("E", "E"), is_test=True),
    ]
    assert read_states(proteins, states)[0].labels == ("C", "H", "H", "E")


@pytest.mark.parametrize(
    ("states", "mask", "message"),
    [
        (">c\nCC\n", None, "states.fasta, line 1: sequences.fasta holds no protein 'c'"),
        (">a\nCC\n", None, "a: 4 residues, 2 states"),
        (">a\nCCCC\n", ">b\n1111\n", "a: 4 residues, 4 states, 0 places in mask.fasta"),
        (">a\nCCCC\n", ">a\n111\n", "a: 4 residues, 4 states, 3 places in mask.fasta"),
        (">\nCCCC\n", None, "line 1: a header without an id"),
        (">a SET=never\nCCCC\n", None, "set is 'never'"),
        ("", None, "holds no record"),
    ],
)
def test_states_at_fault(tmp_path: Path, states: str, mask: str | None, message: str) -> None:
    proteins = _table(tmp_path, ">a\nMKTA\n", "sequences.fasta")
    masked = None if mask is None else _table(tmp_path, mask, "mask.fasta")
    with pytest.raises(InputError, match=message):
        read_states(proteins, _table(tmp_path, states, "states.fasta"), masked)
    with pytest.raises(InputError, match="not a readable FASTA file"):
        read_states(proteins, tmp_path / "nowhere.fasta")


def test_draws() -> None:
    proteins = [Labelled(sequence="M" * length, labels=("x",), is_test=length % 3 == 0) for length in range(1, 61)]
    chosen = choose(proteins, longest=45, train=12, test=5, seed=3)
    assert [each.is_test for each in chosen].count(True) == 5
    assert [each.is_test for each in chosen].count(False) == 12
    lengths = [len(each.sequence) for each in chosen]
    assert lengths == sorted(lengths)
    assert max(lengths) <= 45
    assert chosen == choose(proteins, longest=45, train=12, test=5, seed=3)
    assert chosen != choose(proteins, longest=45, train=12, test=5, seed=4)
    assert choose(proteins) == proteins
