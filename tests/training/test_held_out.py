"""What is judged by: nothing that was trained on, nothing twice, nothing empty."""

from __future__ import annotations

from pathlib import Path

import pytest
from protnest.engine import InputError
from protnest.training import held_out as module
from protnest.training.composition import letter_counts
from protnest.training.corpus import is_held_out
from protnest.training.held_out import HeldOutChoice, read_held_out, read_sequences

from support.tiny import random_proteins, write_fasta

PROTEINS = list(dict.fromkeys(random_proteins(300, seed=6, longest=60)))


def test_all_of_a_file(tmp_path: Path) -> None:
    found = read_held_out(write_fasta(tmp_path / "a.fasta", PROTEINS[:9]), HeldOutChoice())
    assert found.sequences == tuple(PROTEINS[:9])
    assert found.train_letters_A is None
    assert found.facts == {
        "file": "a.fasta",
        "found": 9,
        "rejected": 0,
        "masked": 0,
        "by_hash": None,
        "repeated": 0,
        "train": None,
        "train_sequences": None,
        "in_training": None,
        "judged": 9,
    }


@pytest.mark.parametrize("at_once", [3, 1000])
def test_trained_and_repeated_ones_are_left_out(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COUNTED_AT_ONCE", at_once)
    ours = write_fasta(tmp_path / "a.fasta", [*PROTEINS[:9], PROTEINS[2], PROTEINS[0].lower()])
    trained = [*PROTEINS[20:30], PROTEINS[4], PROTEINS[0], PROTEINS[4]]
    train = write_fasta(tmp_path / "train.fasta", trained)
    found = read_held_out(ours, HeldOutChoice(train=train))
    assert found.sequences == tuple(PROTEINS[place] for place in (1, 2, 3, 5, 6, 7, 8))
    facts = found.facts
    assert (facts["found"], facts["repeated"], facts["in_training"], facts["judged"]) == (11, 2, 2, 7)
    assert (facts["train"], facts["train_sequences"]) == ("train.fasta", 13)
    assert found.train_letters_A is not None
    assert found.train_letters_A.tolist() == letter_counts(trained).sum(axis=0).tolist()


def test_by_hash(tmp_path: Path) -> None:
    """One file, split as `pretrain` does: none of those held out counts as trained on."""
    fasta = write_fasta(tmp_path / "a.fasta", PROTEINS)
    wanted = tuple(each for each in PROTEINS if is_held_out(each))
    others = [each for each in PROTEINS if not is_held_out(each)]
    found = read_held_out(fasta, HeldOutChoice(train=fasta, by_hash=True))
    assert found.sequences == wanted
    assert len(wanted) > 5
    assert (found.facts["by_hash"], found.facts["in_training"]) == (len(others), 0)
    assert found.facts["train_sequences"] == len(others)
    assert found.train_letters_A is not None
    assert found.train_letters_A.tolist() == letter_counts(others).sum(axis=0).tolist()


def test_so_many_at_random(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", PROTEINS)
    first, again, other = (read_held_out(fasta, HeldOutChoice(sequences=20, seed=seed)).sequences for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 20
    assert [PROTEINS.index(each) for each in first] == sorted(PROTEINS.index(each) for each in first)
    assert first != tuple(PROTEINS[:20])
    assert len(read_held_out(fasta, HeldOutChoice(sequences=10_000)).sequences) == len(PROTEINS)


def test_letters_outside(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", ["MKT", "MK1T", "MKTA"])
    with pytest.raises(InputError, match=r"a\.fasta, line 3, record 2 \(protein1\)"):
        read_sequences(fasta)
    skipped = read_sequences(fasta, invalid="skip")
    assert (skipped.sequences, skipped.found, skipped.rejected, skipped.masked) == (("MKT", "MKTA"), 3, 1, 0)
    masked = read_held_out(fasta, HeldOutChoice(invalid="mask"))
    assert masked.sequences == ("MKT", "MKXT", "MKTA")
    assert (masked.facts["found"], masked.facts["rejected"], masked.facts["masked"]) == (3, 0, 1)


def test_nothing_to_judge_by(tmp_path: Path) -> None:
    (tmp_path / "empty.fasta").write_text("")
    with pytest.raises(InputError, match=r"empty\.fasta: .*no records|empty"):
        read_held_out(tmp_path / "empty.fasta", HeldOutChoice())
    bad = write_fasta(tmp_path / "bad.fasta", ["M1", "M2"])
    with pytest.raises(InputError, match="none of 2 sequences can be used"):
        read_sequences(bad, invalid="skip")
    ours = write_fasta(tmp_path / "a.fasta", PROTEINS[:4])
    train = write_fasta(tmp_path / "train.fasta", PROTEINS[:50])
    with pytest.raises(InputError, match=r"a\.fasta: all 4 sequences are among those for training"):
        read_held_out(ours, HeldOutChoice(train=train))
    others = write_fasta(tmp_path / "b.fasta", [each for each in PROTEINS if not is_held_out(each)][:9])
    with pytest.raises(InputError, match="none of 9 sequences is in the share, one in twenty by hash"):
        read_held_out(others, HeldOutChoice(by_hash=True))
    with pytest.raises(InputError, match="cannot be opened"):
        read_held_out(ours, HeldOutChoice(train=tmp_path / "none.fasta"))
