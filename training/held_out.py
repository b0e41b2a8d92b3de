"""The proteins that a model is judged on: those that it was not trained on, each once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError
from ..engine.fasta import InvalidPolicy, Record, Reject, read_fasta
from .composition import LETTERS, letter_counts
from .corpus import is_held_out

_logger = logging.getLogger(__name__)

_COUNTED_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Sequences to judge by.

    Attributes:
        sequences: each once, none of them among those for training.
        facts: how they came about, for a report: `found` records in the file, `rejected` and `masked` for their
            letters, `by_hash` left out as training's share, `repeated`, `in_training`, `judged`, and how many
            `train_sequences` they were held against (None: not checked).
        train_letters_A: int64 (20,), amino acids of the sequences for training, None without any.
    """

    sequences: tuple[str, ...]
    facts: dict[str, Any]
    train_letters_A: npt.NDArray[np.int64] | None


@dataclass(frozen=True, kw_only=True)
class HeldOutChoice:
    """Which of a file's proteins are judged.

    Attributes:
        train: FASTA file that the model was trained on; what it holds is left out.
        by_hash: the files were split as `pretrain` does: one sequence in twenty, by its hash, is judged, and those
            alone; the others were trained on.
        sequences: at most so many, drawn at random; None for all.
        seed: of the draw.
        invalid: what becomes of letters outside the alphabet.
    """

    train: Path | None = None
    by_hash: bool = False
    sequences: int | None = None
    seed: int = 0
    invalid: InvalidPolicy = "error"


@dataclass(frozen=True, kw_only=True)
class Read:
    """The sequences of a file.

    Attributes:
        sequences: in the file's order.
        found, rejected, masked: how many records it holds, and of these were left out or have X for other letters.
    """

    sequences: tuple[str, ...]
    found: int
    rejected: int
    masked: int


def read_sequences(fasta: Path, *, invalid: InvalidPolicy = "error") -> Read:
    """Reads all proteins of a FASTA file.

    Raises:
        InputError: as `read_fasta`, and where no protein is left.
    """
    rejects = list[Reject]()
    records = [(record.sequence, bool(record.flags)) for record in _records(fasta, invalid, rejects)]
    if not records:
        message = f"none of {len(rejects)} sequences can be used: {rejects[0].reason}"
        raise InputError(message, file=fasta)
    return Read(
        sequences=tuple(sequence for sequence, _ in records),
        found=len(records) + len(rejects),
        rejected=len(rejects),
        masked=sum(masked for _, masked in records),
    )


def _records(fasta: Path, invalid: InvalidPolicy, rejects: list[Reject]) -> Iterator[Record]:
    return read_fasta(fasta, invalid=invalid, on_reject=rejects.append)


def read_held_out(fasta: Path, choice: HeldOutChoice) -> HeldOut:
    """Reads the proteins that may be judged by; training's are read as a stream.

    Raises:
        InputError: a file cannot be read, a record is at fault, or nothing is left to judge by.
    """
    read = read_sequences(fasta, invalid=choice.invalid)
    ours = [each for each in read.sequences if not choice.by_hash or is_held_out(each)]
    if not ours:
        message = f"none of {len(read.sequences)} sequences is in the share, one in twenty by hash, that is held out"
        raise InputError(message, file=fasta)
    distinct = dict.fromkeys(ours, False)
    trained, letters_A = 0, None
    if choice.train is not None:
        letters_A = np.zeros(len(LETTERS), dtype=np.int64)
        for some in _training(choice):
            trained += len(some)
            letters_A += letter_counts(some).sum(axis=0)
            distinct.update((each, True) for each in some if each in distinct)
    left = [each for each, is_known in distinct.items() if not is_known]
    known = len(distinct) - len(left)
    if not left:
        message = f"all {known} sequences are among those for training ({choice.train}): nothing to judge by"
        raise InputError(message, file=fasta)
    if choice.sequences is not None and choice.sequences < len(left):
        chosen = np.sort(np.random.default_rng(choice.seed).permutation(len(left))[: choice.sequences])
        left = [left[place] for place in chosen.tolist()]
    facts = {
        "file": fasta.name,
        "found": read.found,
        "rejected": read.rejected,
        "masked": read.masked,
        "by_hash": len(read.sequences) - len(ours) if choice.by_hash else None,
        "repeated": len(ours) - len(distinct),
        "train": None if choice.train is None else choice.train.name,
        "train_sequences": None if choice.train is None else trained,
        "in_training": None if choice.train is None else known,
        "judged": len(left),
    }
    return HeldOut(sequences=tuple(left), facts=facts, train_letters_A=letters_A)


def _training(choice: HeldOutChoice) -> Iterator[Sequence[str]]:
    assert choice.train is not None
    some = list[str]()
    for record in _records(choice.train, choice.invalid, []):
        if choice.by_hash and is_held_out(record.sequence):
            continue
        some.append(record.sequence)
        if len(some) == _COUNTED_AT_ONCE:
            yield some
            some = []
    yield some
