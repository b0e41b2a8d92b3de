"""Scoring assays: tables of variants in, the same tables with a score out, in bounded memory, resumable.

A table is read up to three times. The first reading (`score_survey`) checks every row and finds the units of work.
Units of all tables run once each, model by model; where they are mutants, the second reading brings their sequences
back. The last reading (`score_table`) looks scores up and writes them beside the table's own columns.

Shapes: N rows of a table that can be scored, U units of a protein, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .library import Progress
from .score_state import ScoreState, Values
from .score_survey import Protein, Survey
from .variants import Variant, wild_type_variant

# What is computed between two chances to save, in residues and in batches, whichever is more.
_CHUNK_RESIDUES = 1 << 18
_CHUNK_BATCHES = 16


class Scorer(Protocol):
    """One model, and what it is asked.

    Attributes:
        name: in messages and columns.
        by_site: units are the touched residues of a wild type, and their values logits (V,); else units are distinct
            mutants, and their values numbers.
        in_one_go: the residues of a wild type run together.
        against_wild_type: a mutant's score is its value less the wild type's, which is the protein's first unit.
        limit: residues that run at a time.
        max_tokens: most tokens in a batch.
    """

    name: str
    by_site: bool
    in_one_go: bool
    against_wild_type: bool
    limit: int
    max_tokens: int

    def run_sites(self, wild_type: str, places: Sequence[int]) -> Values:
        """Logits (P, V) at residues of the wild type, counted from 0."""
        ...

    def run_mutants(self, variants: Sequence[Variant], wild_type: str) -> Values:
        """A number for each of distinct mutants: float64 (N,)."""
        ...

    def cost(self, length: int, wild_type: str) -> int:
        """Residues that run for a mutant of so many."""
        ...


@dataclass(frozen=True, eq=False)
class RunResult:
    """What came out.

    Attributes:
        values: for each protein of the survey, by its wild type, the values (U,) or (U, V) under each model.
        residues: run by this call.
        seconds: that it took, models' loading included.
    """

    values: dict[str, list[Values]]
    residues: int
    seconds: float


class ScoreRun:
    """Runs the units of a survey, model by model.

    Args:
        survey: of the tables.
        names: what models are called.
        load: gives the scorer of a place in `names`; called when it is needed, one after another.
        state: where values are kept until all is written.
        progress: is told how far the run is.
    """

    def __init__(
        self,
        survey: Survey,
        names: Sequence[str],
        load: Callable[[int, Callable[[int], None]], Scorer],
        state: ScoreState,
        progress: Progress,
    ) -> None:
        self._survey = survey
        self._names = names
        self._load = load
        self._state = state
        self._progress = progress
        self._residues = 0

    def run(self) -> RunResult:
        """Runs all units that the state does not hold yet.

        Raises:
            InputError: a model cannot be loaded or has no head, or a sequence does not fit into memory.
        """
        started = time.perf_counter()
        values: dict[str, list[Values]] = {wild_type: [] for wild_type in self._survey.proteins}
        saved = [
            [self._state.load(model, number) for number in range(len(values))] for model in range(len(self._names))
        ]
        for model, found in enumerate(saved):
            scorer = self._load(model, self._advance)
            if model == 0:
                self._start(scorer, saved)
            if scorer.by_site:
                done = [
                    self._run_sites(scorer, model, number, protein, found[number])
                    for number, protein in enumerate(self._survey.proteins.values())
                ]
            else:
                done = self._run_mutants(scorer, model, found)
            for each, value in zip(values.values(), done, strict=True):
                each.append(value)
        return RunResult(values, self._residues, time.perf_counter() - started)

    def _advance(self, residues: int) -> None:
        self._residues += residues
        self._progress.advance(residues)

    def _start(self, scorer: Scorer, saved: Sequence[Sequence[Values | None]]) -> None:
        """Progress is guessed from the first model; others may see fewer residues at a time."""
        total = done = 0
        for number, protein in enumerate(self._survey.proteins.values()):
            if scorer.in_one_go:
                costs = [min(len(protein.wild_type), scorer.limit)]
            elif scorer.by_site:
                costs = [min(len(protein.wild_type), scorer.limit)] * len(protein.places)
            else:
                costs = [scorer.cost(length, protein.wild_type) for length in protein.lengths]
            total += sum(costs)
            known = [values for model in saved if (values := model[number]) is not None]
            done += sum(sum(costs[: len(values)]) for values in known)
        rows = self._survey.rows - self._survey.rejected
        self._progress.start(rows, total * len(self._names), done)

    def _chunk(self, scorer: Scorer) -> int:
        return max(_CHUNK_RESIDUES, _CHUNK_BATCHES * scorer.max_tokens)

    def _run_sites(self, scorer: Scorer, model: int, number: int, protein: Protein, found: Values | None) -> Values:
        parts = [] if found is None else [found]
        done = sum(map(len, parts))
        each = min(len(protein.wild_type), scorer.limit)
        step = len(protein.places) if scorer.in_one_go else max(1, self._chunk(scorer) // each)
        while done < len(protein.places):
            parts.append(scorer.run_sites(protein.wild_type, protein.places[done : done + step]))
            done += len(parts[-1])
            self._state.save(model, number, np.concatenate(parts), complete=done == len(protein.places))
        return np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)

    def _run_mutants(self, scorer: Scorer, model: int, found: Sequence[Values | None]) -> list[Values]:
        proteins = self._survey.proteins
        values = [np.empty(0) if each is None else each for each in found]
        numbers = {wild_type: number for number, wild_type in enumerate(proteins)}
        waiting: dict[str, list[Variant]] = {wild_type: [] for wild_type in proteins}
        costs = dict.fromkeys(proteins, 0)

        def flush(wild_type: str) -> None:
            number, protein = numbers[wild_type], proteins[wild_type]
            done = scorer.run_mutants(waiting[wild_type], wild_type)
            values[number] = np.concatenate((values[number], done))
            self._state.save(model, number, values[number], complete=len(values[number]) == len(protein.units))
            waiting[wild_type], costs[wild_type] = [], 0

        if all(len(value) == len(protein.units) for value, protein in zip(values, proteins.values(), strict=True)):
            return values
        for wild_type, unit, variant in self._units(scorer):
            # Units are numbered as they appear: a new one is the next, and others have been met.
            if unit != len(values[numbers[wild_type]]) + len(waiting[wild_type]):
                continue
            waiting[wild_type].append(variant)
            costs[wild_type] += scorer.cost(len(variant.sequence), wild_type)
            if costs[wild_type] >= self._chunk(scorer) or unit == len(proteins[wild_type].units) - 1:
                flush(wild_type)
        return values

    def _units(self, scorer: Scorer) -> Iterator[tuple[str, int, Variant]]:
        """The wild type, the unit and the mutant of each row of all tables, in order."""
        met: set[str] = set()
        for surveyed in self._survey.assays:
            for unit, entry in zip(surveyed.units, surveyed.entries(), strict=True):
                assert entry.target is not None
                assert entry.variant is not None
                wild_type = entry.target.sequence
                if scorer.against_wild_type and wild_type not in met:
                    met.add(wild_type)
                    yield wild_type, 0, wild_type_variant(wild_type)
                yield wild_type, unit, entry.variant
