"""The sequences that a model is trained on, and those held out to judge it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.alphabet import BOS_ID, EOS_ID, RESIDUE_TABLE
from ..engine.errors import InputError
from ..engine.fasta import read_fasta
from ..kernels import tokenise

Tokens = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised proteins in memory, one byte a residue, or two or four a byte pair.

    Attributes:
        tokens_T: uint8, all sequences back to back, each with `<cls>` and `<eos>`; a decoder's are uint8, uint16 or
            int32, with what its vocabulary begins and ends sequences with.
        cu_seqlens: int64 (B + 1,), where each begins.
        ids: what messages call them; empty where nobody knows.
    """

    tokens_T: npt.NDArray[Any]
    cu_seqlens: npt.NDArray[np.int64]
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.cu_seqlens.size - 1

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.tokens_T[self.cu_seqlens[index] : self.cu_seqlens[index + 1]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens and where each sequence begins."""
        digest = hashlib.blake2b(self.tokens_T.tobytes(), digest_size=16)
        digest.update(self.cu_seqlens.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def lengths_B(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self.cu_seqlens)

    def describe(self, index: int) -> str:
        """A sequence's id, or its number where ids are not known."""
        return self.ids[index] if self.ids else f"sequence {index}"


def is_held_out(sequence: str, *, every: int = 20) -> bool:
    """Whether a sequence belongs to the held-out share, one in `every`: decided by its hash, so the same everywhere."""
    return int.from_bytes(hashlib.blake2b(sequence.encode(), digest_size=8).digest(), "big") % every == 0


@dataclass(frozen=True, eq=False)
class Share:
    """Proteins of a file that are trained on, or those that are held out.

    Attributes:
        ids: the first words of their headers.
        sequences: letters of the alphabet.
    """

    ids: tuple[str, ...]
    sequences: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sequences)

    def corpus(self) -> Corpus:
        """In ESM-2's tokens, whole."""
        encoded = [sequence.encode() for sequence in self.sequences]
        return Corpus(*tokenise(encoded, RESIDUE_TABLE, bos=BOS_ID, eos=EOS_ID), self.ids)


def read_shares(fasta: Path) -> tuple[Share, Share]:
    """Reads a FASTA file: the share to train on, and the one in twenty that is held out.

    Raises:
        InputError: a record is invalid, or either share is empty.
    """
    shares: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for record in read_fasta(fasta):
        shares[is_held_out(record.sequence)].append((record.id, record.sequence))
    if not shares[0] or not shares[1]:
        count = len(shares[0]) + len(shares[1])
        message = f"{count} sequences are too few: one in twenty, by hash, is held out"
        raise InputError(message, file=fasta)
    train, held_out = (
        Share(tuple(each for each, _ in share), tuple(sequence for _, sequence in share)) for share in shares
    )
    return train, held_out


def read_corpus(fasta: Path) -> tuple[Corpus, Corpus]:
    """Reads a FASTA file into a training corpus and a held-out one.

    Raises:
        InputError: as `read_shares`.
    """
    train, held_out = read_shares(fasta)
    return train.corpus(), held_out.corpus()


def crop(tokens: Tokens, max_residues: int, rng: np.random.Generator) -> Tokens:
    """At most `max_residues` residues of a sequence between its `<cls>` and `<eos>`, from a place drawn at random."""
    surplus = tokens.size - 2 - max_residues
    if surplus <= 0:
        return tokens
    begin = 1 + int(rng.integers(surplus + 1))
    return np.concatenate((tokens[:1], tokens[begin : begin + max_residues], tokens[-1:]))
