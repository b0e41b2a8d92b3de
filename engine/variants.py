"""Variants of a protein: `A24G`, several substitutions joined with colons, counted from 1."""

from __future__ import annotations

import csv
import gzip
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .alphabet import RESIDUES
from .errors import InputError
from .fasta import read_fasta

_SUBSTITUTION = re.compile(r"([A-Za-z])([1-9]\d*)([A-Za-z])")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A mutated protein.

    Attributes:
        name: as it was given, `A24G:H26P`.
        sites: places of the substitutions in the sequence, from 0, in the name's order.
        sequence: the mutant's residues.
    """

    name: str
    sites: tuple[int, ...]
    sequence: str

    @property
    def is_single(self) -> bool:
        return len(self.sites) == 1


def parse_variant(name: str, wild_type: str) -> Variant:
    """Applies a variant to its wild type.

    Raises:
        InputError: it is not spelt `A24G` or `A24G:H26P`, lies outside of the protein, names another residue than the
            wild type has there, names a residue that is none, or a site twice.
    """
    letters = list(wild_type)
    sites: list[int] = []
    for part in name.strip().split(":"):
        match = _SUBSTITUTION.fullmatch(part.strip())
        if match is None:
            message = f"variant {name!r}: {part!r} is not spelt like A24G (several are joined with colons)"
            raise InputError(message)
        before, place, after = match[1].upper(), int(match[2]), match[3].upper()
        if place > len(wild_type):
            message = f"variant {name!r}: residue {place} lies beyond the protein's {len(wild_type)}"
            raise InputError(message)
        if wild_type[place - 1] != before:
            message = f"variant {name!r}: residue {place} of the wild type is {wild_type[place - 1]}, not {before}"
            raise InputError(message)
        if after not in RESIDUES:
            message = f"variant {name!r}: {after!r} is not a residue"
            raise InputError(message)
        if place - 1 in sites:
            message = f"variant {name!r}: residue {place} is there twice"
            raise InputError(message)
        sites.append(place - 1)
        letters[place - 1] = after
    return Variant(name=name.strip(), sites=tuple(sites), sequence="".join(letters))


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
        InputError: the region is empty or lies outside of the protein, or a substitution lies outside of the region.
    """
    if not 1 <= first <= last <= len(variant.sequence):
        message = f"residues {first} to {last} are no part of a protein of {len(variant.sequence)}"
        raise InputError(message)
    if outside := [site + 1 for site in variant.sites if not first <= site + 1 <= last]:
        message = f"variant {variant.name!r}: residue {outside[0]} lies outside of {first} to {last}"
        raise InputError(message)
    sites = tuple(site - first + 1 for site in variant.sites)
    return Variant(name=variant.name, sites=sites, sequence=variant.sequence[first - 1 : last])


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
