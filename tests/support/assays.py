"""Small assays on disk, their surveys, and a scorer that counts what it is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from protnest.engine.alphabet import TOKENS
from protnest.engine.assay import Assay, AssayOptions, Target
from protnest.engine.score_state import Values
from protnest.engine.score_survey import Survey, SurveyOptions, survey_assays
from protnest.engine.table import Table
from protnest.engine.variants import Variant

WILD_TYPE = "MKTAYIAK"
OTHER = "GSHMWW"
TARGETS = {"one": WILD_TYPE, "two": OTHER, "twin": WILD_TYPE}


def write_tables(folder: Path, tables: Mapping[str, str]) -> list[Path]:
    """Writes texts under their names."""
    for name, text in tables.items():
        (folder / name).write_text(text)
    return [folder / name for name in tables]


def open_assays(paths: Sequence[Path], targets: Mapping[str, str] = TARGETS, **options: Any) -> list[Assay]:
    known = {name: Target(id=name, sequence=sequence) for name, sequence in targets.items()}
    return [Assay(Table(path), known, AssayOptions(**options)) for path in paths]


def survey(paths: Sequence[Path], options: SurveyOptions, *, rejects: Path | None = None, **reading: Any) -> Survey:
    return survey_assays(open_assays(paths, **reading), options, rejects=rejects)


def number_of(text: str) -> float:
    """A number that no other text has."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**28


class Stopped(Exception):
    """A run is stopped, as a kill would."""


class CountingScorer:
    """A `score_run.Scorer` that makes numbers up, and remembers what it was asked.

    What it says of a mutant depends on the mutants that run with it, as the last bits of a real model's numbers do.

    Args:
        after: told of residues, as a real one tells them.
        stop_after: calls after which it raises `Stopped`; None never does.
    """

    def __init__(
        self,
        after: Callable[[int], None] = lambda residues: None,
        *,
        name: str = "made-up",
        by_site: bool = False,
        in_one_go: bool = False,
        against_wild_type: bool = False,
        stop_after: int | None = None,
        asked: list[tuple[str, tuple[Any, ...]]] | None = None,
    ) -> None:
        self.name = name
        self.by_site = by_site
        self.in_one_go = in_one_go
        self.against_wild_type = against_wild_type
        self.limit = 1022
        self.max_tokens = 1
        self.stop_after = stop_after
        self.asked = [] if asked is None else asked
        self._after = after

    def _take(self, wild_type: str, asked: tuple[Any, ...], residues: int) -> None:
        if self.stop_after is not None and self.stop_after <= 0:
            raise Stopped
        if self.stop_after is not None:
            self.stop_after -= 1
        self.asked.append((wild_type, asked))
        self._after(residues)

    def run_sites(self, wild_type: str, places: Sequence[int]) -> Values:
        self._take(wild_type, tuple(places), len(wild_type) * len(places))
        rows = [
            [number_of(f"{self.name} {wild_type} {place} {token}") for token in range(len(TOKENS))] for place in places
        ]
        return np.array(rows, dtype=np.float32) + np.float32(len(places) / 1024)

    def run_mutants(self, variants: Sequence[Variant], wild_type: str) -> Values:
        asked = tuple(variant.sequence for variant in variants)
        self._take(wild_type, asked, sum(map(len, asked)))
        together = len(asked) / 1024
        return np.array([number_of(f"{self.name} {wild_type} {text}") + together for text in asked])

    def cost(self, length: int, wild_type: str) -> int:
        return length


class Followed:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int, int]] = []
        self.advanced = 0

    def start(self, records: int, work: int, done: int) -> None:
        self.started.append((records, work, done))

    def advance(self, residues: int) -> None:
        self.advanced += residues
