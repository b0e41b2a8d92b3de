"""The sequences that a model is trained on, and those held out to judge it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..engine.alphabet import BOS_ID, EOS_ID, RESIDUE_TABLE
from ..engine.errors import InputError
from ..engine.fasta import read_fasta
from ..kernels import tokenise

Tokens = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised proteins in memory, one byte a residue.

    Attributes:
        tokens_T: uint8, all sequences back to back, each with `<cls>` and `<eos>`.
        cu_seqlens: int64 (B + 1,), where each begins.
    """

    tokens_T: Tokens
    cu_seqlens: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return self.cu_seqlens.size - 1

    def __getitem__(self, index: int) -> Tokens:
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


def is_held_out(sequence: str, *, every: int = 20) -> bool:
    """Whether a sequence belongs to the held-out share, one in `every`: decided by its hash, so the same everywhere."""
    return int.from_bytes(hashlib.blake2b(sequence.encode(), digest_size=8).digest(), "big") % every == 0


def read_corpus(fasta: Path) -> tuple[Corpus, Corpus]:
    """Reads a FASTA file into a training corpus and a held-out one.

    Raises:
        InputError: a record is invalid, or either share is empty.
    """
    shares: tuple[list[bytes], list[bytes]] = ([], [])
    for record in read_fasta(fasta):
        shares[is_held_out(record.sequence)].append(record.sequence.encode())
    if not shares[0] or not shares[1]:
        count = len(shares[0]) + len(shares[1])
        message = f"{count} sequences are too few: one in twenty, by hash, is held out"
        raise InputError(message, file=fasta)
    train, held_out = (Corpus(*tokenise(share, RESIDUE_TABLE, bos=BOS_ID, eos=EOS_ID)) for share in shares)
    return train, held_out


def epoch_batches(
    lengths_B: npt.NDArray[np.int64], max_tokens: int, *, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """Cuts one epoch's shuffled sequences into consecutive batches of at most `max_tokens` tokens.

    A longer sequence has a batch of its own. The same arguments give the same batches.
    """
    order = np.random.default_rng((seed, epoch)).permutation(lengths_B.size)
    batches: list[npt.NDArray[np.int64]] = []
    begin = filled = 0
    for place, index in enumerate(order.tolist()):
        length = int(lengths_B[index])
        if filled and filled + length > max_tokens:
            batches.append(order[begin:place])
            begin, filled = place, 0
        filled += length
    return [*batches, order[begin:]]


def crop(tokens: Tokens, max_residues: int, rng: np.random.Generator) -> Tokens:
    """At most `max_residues` residues of a sequence between its `<cls>` and `<eos>`, from a place drawn at random."""
    surplus = tokens.size - 2 - max_residues
    if surplus <= 0:
        return tokens
    begin = 1 + int(rng.integers(surplus + 1))
    return np.concatenate((tokens[:1], tokens[begin : begin + max_residues], tokens[-1:]))


def iterate_batches(
    lengths_B: npt.NDArray[np.int64], max_tokens: int, *, seed: int, first_step: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Batches without end, epoch after epoch, beginning with that of `first_step`."""
    epoch, passed = 0, 0
    while True:
        batches = epoch_batches(lengths_B, max_tokens, seed=seed, epoch=epoch)
        yield from batches[max(0, first_step - passed) :]
        passed += len(batches)
        epoch += 1
