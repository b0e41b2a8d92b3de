"""Proteins with labels: one for each protein, from a table, or one for each residue, from FASTA files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xopen import xopen

from ..engine.errors import InputError
from ..engine.fasta import clean_sequence, read_fasta
from .corpus import is_held_out

_TEST_EVERY = 5
_SETS = ("train", "valid", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A protein and what is known of it.

    Attributes:
        sequence: its residues.
        labels: one, or one a residue; "" where none is known.
        is_test: whether it is there to judge.
    """

    sequence: str
    labels: tuple[str, ...]
    is_test: bool


def read_classes(path: Path) -> list[Labelled]:
    """Reads a table with the columns `sequence` and `label`: tabs or commas, plain or .gz.

    A column `set` says which proteins are for testing ("test"; "train" and "valid" are not); without it, one in five by
    the hash of the sequence.

    Raises:
        InputError: the file cannot be read, lacks a column or rows, or a row holds an invalid sequence, label or set.
    """
    out = []
    try:
        with xopen(path, "rt", encoding="utf-8", newline="") as file:
            header = file.readline()
            delimiter = "\t" if "\t" in header else ","
            names = next(csv.reader([header], delimiter=delimiter), [])
            for name in ("sequence", "label"):
                if name not in names:
                    message = f"has no column {name!r}; it has {', '.join(names) or 'none'}"
                    raise InputError(message, file=path)
            rows = csv.DictReader(file, fieldnames=names, delimiter=delimiter)
            for row in rows:
                out.append(_row(row, path, rows.line_num + 1))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        message = f"not a readable table ({error})"
        raise InputError(message, file=path) from error
    if not out:
        message = "holds no protein"
        raise InputError(message, file=path)
    return out


def _row(row: dict[str, str | None], path: Path, line: int) -> Labelled:
    try:
        sequence = clean_sequence(row["sequence"] or "")
    except InputError as error:
        raise InputError(error.problem, file=path, line=line) from error
    label = (row["label"] or "").strip()
    if not label:
        message = "holds no label"
        raise InputError(message, file=path, line=line)
    return Labelled(sequence=sequence, labels=(label,), is_test=_is_test(row.get("set"), sequence, path, line))


def _is_test(word: str | None, sequence: str, path: Path, line: int) -> bool:
    if word is None:
        return is_held_out(sequence, every=_TEST_EVERY)
    if word.strip().lower() not in _SETS:
        message = f"set is {word!r}; allowed: {', '.join(_SETS)}"
        raise InputError(message, file=path, line=line)
    return word.strip().lower() == "test"


def read_states(sequences: Path, states: Path, mask: Path | None = None) -> list[Labelled]:
    """Reads residues' states: FASTA files with the same ids, whose records have a letter for each residue.

    `SET=test` in a header of `states` says that the protein is for testing, `SET=train` that it is not; of those that
    say neither one in five is, by the hash of its sequence. FLIP's secondary structure is written so.

    Args:
        sequences: proteins.
        states: their residues' states. Proteins that are not in it are left out.
        mask: 0 for residues whose state does not count, 1 for others.

    Raises:
        InputError: a file cannot be read, or its records do not fit the proteins.
    """
    proteins = {record.id: record.sequence for record in read_fasta(sequences, quiet=True)}
    kept = {} if mask is None else {name: text for name, _, text, _ in _lettered(mask)}
    out = []
    for name, header, text, line in _lettered(states):
        if name not in proteins:
            message = f"{sequences.name} holds no protein {name!r}"
            raise InputError(message, file=states, line=line)
        sequence = proteins[name]
        shown = kept.get(name, "") if mask is not None else "1" * len(text)
        if not len(sequence) == len(text) == len(shown):
            message = f"{name}: {len(sequence)} residues, {len(text)} states"
            message += "" if mask is None else f", {len(shown)} places in {mask.name}"
            raise InputError(message, file=states, line=line)
        words = dict(word.split("=", 1) for word in header.split() if "=" in word)
        out.append(
            Labelled(
                sequence=sequence,
                labels=tuple(state if place != "0" else "" for state, place in zip(text, shown, strict=True)),
                is_test=_is_test(words.get("SET"), sequence, states, line),
            )
        )
    if not out:
        message = "holds no record"
        raise InputError(message, file=states)
    return out


def _lettered(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Records of a FASTA file whose letters are no residues: id, header, text, the header's line."""
    header, parts, at = "", [""], 0
    try:
        with xopen(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.startswith(">"):
                    parts.append(line.strip())
                    continue
                if at:
                    yield header.split(maxsplit=1)[0], header, "".join(parts), at
                header, parts, at = line[1:].strip(), [], number
                if not header:
                    message = "a header without an id"
                    raise InputError(message, file=path, line=number)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        message = f"not a readable FASTA file ({error})"
        raise InputError(message, file=path) from error
    if at:
        yield header.split(maxsplit=1)[0], header, "".join(parts), at


def choose(
    proteins: Sequence[Labelled],
    *,
    longest: int | None = None,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> list[Labelled]:
    """Some of the proteins, in their order: at most so many for training and testing, drawn at random.

    Args:
        proteins: all of them.
        longest: proteins of more residues are left out first; None leaves all in.
        train, test: how many; None takes all.
        seed: of the draw.
    """
    short = [protein for protein in proteins if longest is None or len(protein.sequence) <= longest]
    kept: list[int] = []
    for is_test, most in ((False, train), (True, test)):
        places = [place for place, protein in enumerate(short) if protein.is_test == is_test]
        order = np.random.default_rng(seed).permutation(len(places))[:most]
        kept += [places[row] for row in order.tolist()]
    return [short[place] for place in sorted(kept)]
