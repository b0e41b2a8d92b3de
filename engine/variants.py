"""Variants of a protein: `A24G`, several substitutions joined with colons, counted from 1."""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from .alphabet import RESIDUES
from .errors import InputError
from .fasta import InvalidPolicy, clean_sequence, read_fasta

_SUBSTITUTION = re.compile(r"([A-Za-z*])(-?\d+)([A-Za-z*])")
_WILD_TYPE_NAMES = ("WT", "wt", "_wt", "wild-type", "wildtype")
_AMBIGUOUS = "XBZ"
"""Letters of the alphabet that stand for no one amino acid. U and O do."""
_STOP = "*"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A mutated protein.

    Attributes:
        name: as it was given, `A24G:H26P`.
        sites: places of the substitutions in the sequence, from 0, in the name's order; none for the wild type and
            none where residues are inserted or deleted.
        sequence: the mutant's residues.
        is_indel: residues are inserted or deleted.
        flags: what was done to it: `("masked",)` where letters were replaced by X, else `()`.
    """

    name: str
    sites: tuple[int, ...]
    sequence: str
    is_indel: bool = False
    flags: tuple[str, ...] = ()

    @property
    def is_single(self) -> bool:
        return len(self.sites) == 1


class SlipError(InputError):
    """A substitution that does not fit its wild type, as it happens where residues are counted from another one."""


def wild_type_variant(wild_type: str, name: str = "WT") -> Variant:
    """The wild type itself, as a variant."""
    return Variant(name=name, sites=(), sequence=wild_type)


def parse_variant(name: str, wild_type: str, *, offset: int = 0, invalid: InvalidPolicy = "error") -> Variant:
    """Applies a variant to its wild type.

    Args:
        name: `A24G`, `A24G:H26P`, or `WT` for the wild type itself; A24A changes nothing.
        wild_type: its residues.
        offset: subtracted from each number: 23 where the first residue is called 24.
        invalid: "mask" puts X where a substitution names no amino acid, and flags the variant "masked".

    Raises:
        SlipError: it lies outside of the protein, or names another residue than the wild type has there.
        InputError: it is not spelt `A24G` or `A24G:H26P`, names a residue that is none, a stop codon, or a site twice.
    """
    if name.strip() in _WILD_TYPE_NAMES:
        return wild_type_variant(wild_type, name.strip())
    letters = list(wild_type)
    sites: list[int] = []
    masked = False
    for part in name.strip().split(":"):
        before, number, after = _split(name, part)
        place = number - offset
        if not 1 <= place <= len(wild_type):
            message = f"variant {name!r}: residue {number} {_outside(place, len(wild_type), offset)}"
            raise SlipError(message)
        if wild_type[place - 1] != before:
            message = f"variant {name!r}: residue {number} of the wild type is {wild_type[place - 1]}, not {before}"
            raise SlipError(message)
        if after not in RESIDUES or after in _AMBIGUOUS:
            if invalid != "mask" or after == _STOP:
                message = f"variant {name!r}: {_describe(after)}"
                raise InputError(message)
            after, masked = "X", True
        if place - 1 in sites:
            message = f"variant {name!r}: residue {number} is there twice"
            raise InputError(message)
        sites.append(place - 1)
        letters[place - 1] = after
    flags = ("masked",) if masked else ()
    return Variant(name=name.strip(), sites=tuple(sites), sequence="".join(letters), flags=flags)


def _split(name: str, part: str) -> tuple[str, int, str]:
    match = _SUBSTITUTION.fullmatch(part.strip())
    if match is None:
        message = (
            f"variant {name!r}: {part!r} is not spelt like A24G (several are joined with colons; WT is the wild type)"
        )
        raise InputError(message)
    return match[1].upper(), int(match[2]), match[3].upper()


def _outside(place: int, residues: int, offset: int) -> str:
    shown = f" (less the offset, {place})" if offset else ""
    if place < 1:
        return f"lies before the protein's first, which is {offset + 1}{shown}"
    return f"lies beyond the protein's {residues}{shown}"


def _describe(letter: str) -> str:
    if letter == _STOP:
        return "'*' is a stop codon, of which a protein model knows nothing"
    return f"{letter!r} is not a residue" if letter not in RESIDUES else f"{letter!r} stands for no one amino acid"


def variant_of_sequence(
    sequence: str, wild_type: str, *, name: str | None = None, invalid: InvalidPolicy = "error"
) -> Variant:
    """The variant that a mutated sequence is: substitutions where it is as long as the wild type, else an indel.

    Args:
        sequence: the mutant's residues; lower case and spaces are accepted.
        wild_type: its residues.
        name: what messages call it; by default its substitutions, or its length.
        invalid: "mask" puts X for letters outside the alphabet, and flags the variant "masked".

    Raises:
        InputError: the sequence is empty, or holds a stop codon or a letter outside the alphabet.
    """
    text = sequence.strip()
    if _STOP in text.rstrip(_STOP):
        message = f"residue {text.index(_STOP) + 1} of {len(text)} is '*': {_describe(_STOP)}"
        raise InputError(message)
    residues = clean_sequence(text, invalid)
    flags = ("masked",) if invalid == "mask" and residues.count("X") > text.upper().count("X") else ()
    if len(residues) != len(wild_type):
        shown = name or f"{len(residues)} residues"
        return Variant(name=shown, sites=(), sequence=residues, is_indel=True, flags=flags)
    sites = tuple(site for site, pair in enumerate(zip(wild_type, residues, strict=True)) if pair[0] != pair[1])
    spelt = ":".join(f"{wild_type[site]}{site + 1}{residues[site]}" for site in sites) or "WT"
    return Variant(name=name or spelt, sites=sites, sequence=residues, flags=flags)


def find_offset(names: Iterable[str], wild_type: str) -> int | None:
    """The offset under which all these variants fit the wild type; None where there is none, or more than one.

    Args:
        names: `A24G`, `A24G:H26P`; others are passed over.
        wild_type: its residues.
    """
    named = {
        (match[1].upper(), int(match[2]))
        for name in names
        for part in name.split(":")
        if (match := _SUBSTITUTION.fullmatch(part.strip())) is not None
    }
    if not named:
        return None
    # The one that fits must put the first residue named somewhere on a residue like it.
    letter, number = min(named, key=lambda each: wild_type.count(each[0]))
    candidates = [number - place for place, residue in enumerate(wild_type, start=1) if residue == letter]
    fitting = [
        offset
        for offset in candidates
        if all(
            0 < place - offset <= len(wild_type) and wild_type[place - offset - 1] == before for before, place in named
        )
    ]
    return fitting[0] if len(fitting) == 1 else None


def parse_region(text: str) -> tuple[int, int]:
    """First and last residue of a region spelt `331-531`.

    Raises:
        InputError: it is spelt otherwise, or empty.
    """
    match = re.fullmatch(r"\s*([1-9]\d*)\s*-\s*([1-9]\d*)\s*", text)
    if match is None or int(match[1]) > int(match[2]):
        message = f"region {text!r} is not spelt like 331-531, first and last residue counted from 1"
        raise InputError(message)
    return int(match[1]), int(match[2])


def confine(variant: Variant, first: int, last: int) -> Variant:
    """The part of a variant from residue `first` to `last`, counted from 1, both included; it keeps its name.

    Raises:
        InputError: the region is empty or lies outside of the protein, a substitution lies outside of the region, or
            residues are inserted or deleted.
    """
    if variant.is_indel:
        message = f"variant {variant.name!r} inserts or deletes residues: its regions are not the wild type's"
        raise InputError(message)
    if not 1 <= first <= last <= len(variant.sequence):
        message = f"residues {first} to {last} are no part of a protein of {len(variant.sequence)}"
        raise InputError(message)
    if outside := [site + 1 for site in variant.sites if not first <= site + 1 <= last]:
        message = f"variant {variant.name!r}: residue {outside[0]} lies outside of {first} to {last}"
        raise InputError(message)
    sites = tuple(site - first + 1 for site in variant.sites)
    return replace(variant, sites=sites, sequence=variant.sequence[first - 1 : last])


def read_scan(path: Path, wild_type: str, *, column: str = "DMS_score") -> tuple[list[Variant], list[float]]:
    """Reads a mutational scan: a CSV, plain or .gz, with the columns `mutant` and `column`.

    Raises:
        InputError: the file cannot be read, lacks a column or rows, or a row holds no variant or number.
    """
    variants, scores = [], []
    try:
        with _open(path) as file:
            rows = csv.DictReader(file)
            names = rows.fieldnames or []
            if missing := [name for name in ("mutant", column) if name not in names]:
                message = f"has no column {missing[0]!r}; it has {', '.join(names) or 'none'}"
                raise InputError(message, file=path)
            for row in rows:
                variants.append(_variant(row["mutant"] or "", wild_type, path, rows.line_num))
                scores.append(_score(row[column], column, path, rows.line_num))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        message = f"not a readable CSV file ({error})"
        raise InputError(message, file=path) from error
    if not variants:
        message = "holds no variant"
        raise InputError(message, file=path)
    return variants, scores


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="", encoding="utf-8")
    return path.open(newline="", encoding="utf-8")


def _variant(name: str, wild_type: str, path: Path, line: int) -> Variant:
    try:
        return parse_variant(name, wild_type)
    except InputError as error:
        raise InputError(error.problem, file=path, line=line) from error


def _score(text: str | None, column: str, path: Path, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        message = f"{column} is {text!r}, expected a number"
        raise InputError(message, file=path, line=line)
    return value


def read_wild_type(path: Path, name: str | None = None) -> str:
    """The wild type's residues from a FASTA file: its only record, or the one of that id.

    Raises:
        InputError: the file is invalid, holds several records and no id is given, or none of that id.
    """
    records = list(read_fasta(path, quiet=True))
    ids = [record.id for record in records]
    if name is None:
        if len(records) > 1:
            message = f"holds {len(records)} records ({', '.join(ids[:5])}, ...): name one"
            raise InputError(message, file=path)
        return records[0].sequence
    if name not in ids:
        message = f"holds no record {name!r}; it has {', '.join(ids[:10])}"
        raise InputError(message, file=path)
    return records[ids.index(name)].sequence
