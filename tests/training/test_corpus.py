"""The corpus: which sequences are held out, and how long ones are cropped.

Shapes: B sequences, T tokens of all of them.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from protnest.engine import InputError
from protnest.engine.alphabet import BOS_ID, EOS_ID, RESIDUE_TABLE, TOKENS
from protnest.kernels import tokenise
from protnest.training.corpus import Corpus, crop, is_held_out, read_corpus, read_shares

from support.tiny import random_proteins, write_fasta


def _texts(corpus: Corpus) -> list[str]:
    texts = []
    for index in range(len(corpus)):
        first, *residues, last = corpus[index].tolist()
        assert (first, last) == (BOS_ID, EOS_ID)
        texts.append("".join(TOKENS[token] for token in residues))
    return texts


# The split


def test_the_split_is_a_promise() -> None:
    """Perplexities of different releases compare only while the same sequences are held out."""
    assert [residues for residues in range(1, 101) if is_held_out("A" * residues)] == [26, 32]
    for sequence in random_proteins(200):
        digest = hashlib.blake2b(sequence.encode("ascii"), digest_size=8).hexdigest()
        assert is_held_out(sequence) == (int(digest, 16) % 20 == 0)
        assert is_held_out(sequence, every=3) == (int(digest, 16) % 3 == 0)


def test_about_one_in_twenty_is_held_out() -> None:
    sequences = set(random_proteins(8000, seed=5, longest=40))
    sequences = {sequence for sequence in sequences if len(sequence) > 8}
    held_out = sum(map(is_held_out, sequences))
    expected, spread = len(sequences) / 20, (len(sequences) * 0.05 * 0.95) ** 0.5
    assert abs(held_out - expected) < 4 * spread


def test_corpus_holds_every_sequence_in_order(tmp_path: Path) -> None:
    sequences = [*random_proteins(150, seed=3), "XBUZO.-", "mktx", "MKTX"]
    train, held_out = read_corpus(write_fasta(tmp_path / "in.fasta", sequences))
    upper = [sequence.upper() for sequence in sequences]
    assert _texts(train) == [sequence for sequence in upper if not is_held_out(sequence)]
    assert _texts(held_out) == [sequence for sequence in upper if is_held_out(sequence)]
    for corpus in (train, held_out):
        assert corpus.tokens_T.dtype == np.uint8
        assert corpus.cu_seqlens.dtype == np.int64
        assert corpus.lengths_B.tolist() == [len(text) + 2 for text in _texts(corpus)]
        assert len(corpus) == corpus.lengths_B.size > 0


def test_the_split_does_not_depend_on_order_or_repeats(tmp_path: Path) -> None:
    sequences = random_proteins(150, seed=3)
    shares = [set(_texts(corpus)) for corpus in read_corpus(write_fasta(tmp_path / "in.fasta", sequences))]
    shuffled = np.random.default_rng(0).permutation(np.array(sequences * 2)).tolist()
    again = [set(_texts(corpus)) for corpus in read_corpus(write_fasta(tmp_path / "again.fasta", shuffled))]
    assert shares == again
    assert not shares[0] & shares[1], "a repeated sequence is trained on and judged by"


def test_the_fingerprint_is_of_every_residue_and_their_order() -> None:
    def fingerprint(*sequences: str) -> str:
        return Corpus(*tokenise([s.encode() for s in sequences], RESIDUE_TABLE, bos=BOS_ID, eos=EOS_ID)).fingerprint

    first = fingerprint("MKT", "ACD")
    assert fingerprint("MKT", "ACD") == fingerprint("mkt", "ACD") == first
    others = [fingerprint("ACD", "MKT"), fingerprint("MKT", "ACE"), fingerprint("MKT"), fingerprint("MKTACD")]
    assert len({first, *others}) == 5


def test_gzipped_files_are_read(tmp_path: Path) -> None:
    plain = write_fasta(tmp_path / "in.fasta", random_proteins(60, seed=3))
    packed = tmp_path / "in.fasta.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for one, other in zip(read_corpus(plain), read_corpus(packed), strict=True):
        np.testing.assert_array_equal(one.tokens_T, other.tokens_T)


def test_too_few_sequences_are_refused(tmp_path: Path) -> None:
    sequences = random_proteins(150, seed=3)
    for share in ([s for s in sequences if not is_held_out(s)][:3], [s for s in sequences if is_held_out(s)][:1]):
        fasta = write_fasta(tmp_path / "few.fasta", share)
        with pytest.raises(InputError, match=rf"few.fasta: {len(share)} sequences are too few: one in twenty"):
            read_corpus(fasta)


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        read_corpus(tmp_path / "absent.fasta")
    fasta = write_fasta(tmp_path / "bad.fasta", ["MKT", "MK1T"])
    with pytest.raises(InputError, match=r"bad.fasta, line 3, record 2 \(protein1\): .*'1' at residue 3"):
        read_corpus(fasta)


def test_sequences_are_called_by_their_ids(tmp_path: Path) -> None:
    sequences = random_proteins(150, seed=3)
    fasta = write_fasta(tmp_path / "in.fasta", sequences)
    for share, corpus in zip(read_shares(fasta), read_corpus(fasta), strict=True):
        assert corpus.ids == share.ids
        for number in range(len(share)):
            assert sequences[int(corpus.describe(number).removeprefix("protein"))] == share.sequences[number]
    nameless = Corpus(corpus.tokens_T, corpus.cu_seqlens)
    assert nameless.describe(2) == "sequence 2"


# Crops


def _numbered(residues: int) -> npt.NDArray[np.uint8]:
    """`<cls>`, then 100, 101, ... in the place of residues, `<eos>`."""
    return np.array([BOS_ID, *range(100, 100 + residues), EOS_ID], dtype=np.uint8)


@pytest.mark.parametrize("residues", [1, 9, 10])
def test_short_sequences_are_left_alone(residues: int) -> None:
    tokens = _numbered(residues)
    np.testing.assert_array_equal(crop(tokens, 10, np.random.default_rng(0)), _numbered(residues))


@pytest.mark.parametrize(("residues", "most"), [(11, 10), (30, 10), (2, 1), (100, 99)])
def test_crops_are_a_run_of_residues_between_specials(residues: int, most: int) -> None:
    tokens = _numbered(residues)
    rng = np.random.default_rng(0)
    for _ in range(20):
        cropped = crop(tokens, most, rng)
        assert cropped.dtype == np.uint8
        first, *inner, last = cropped.tolist()
        assert (first, last) == (BOS_ID, EOS_ID)
        assert inner == list(range(inner[0], inner[0] + most))
        assert inner[0] >= 100
        assert inner[-1] < 100 + residues
    np.testing.assert_array_equal(tokens, _numbered(residues))


def test_crops_begin_anywhere_with_equal_chance() -> None:
    tokens, rng, draws = _numbered(14), np.random.default_rng(0), 5000
    begins = np.bincount([int(crop(tokens, 10, rng)[1]) - 100 for _ in range(draws)], minlength=5)
    assert begins.size == 5
    chance = 1 / 5
    assert np.abs(begins - draws * chance).max() < 4.5 * (draws * chance * (1 - chance)) ** 0.5


def test_the_generator_decides_the_crop() -> None:
    tokens = _numbered(100)
    crops = [crop(tokens, 10, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert crops[0] == crops[1] != crops[2]
