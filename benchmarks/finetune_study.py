"""Fine-tuning on few proteins, cell by cell: a family, a decoder, N proteins and a seed.

A cell tunes a decoder with `training.finetuning`, asks its perplexity on the test share, lets it generate, and asks how
many designs the training share's profiles recognise; N = 0 is the decoder as it came. Each cell is a JSON file, written
when it is done, so that a study that was killed goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from protnest.benchmarks.family_profiles import recognised
from protnest.benchmarks.finetune_study_family import (
    TEST_SHARE,
    VALIDATION_SHARE,
    StudyFamily,
    StudyPlan,
    write_records,
)
from protnest.benchmarks.rows import Row, machine_facts, write_document
from protnest.engine.decoder import Decoder
from protnest.engine.device import resolve_device
from protnest.engine.errors import InputError
from protnest.engine.generation import GenerationOptions, Generator
from protnest.engine.models import load_decoder
from protnest.engine.run_folder import differences
from protnest.engine.sampling import SamplingOptions
from protnest.training.corpus import Share
from protnest.training.estimate import Estimate, mean, share
from protnest.training.finetuning import Callbacks, FinetuneConfig, finetune
from protnest.training.finetuning_subject import LanguageSubject
from protnest.training.novelty import novelty
from protnest.training.teacher import model_fingerprint

TEMPERATURES = (1.0, 0.7)
"""At 1 designs are what a decoder believes; at 0.7 small decoders stay nearer to what is likely. Nothing else bends the
choice: a penalty on repetition would forbid most of an alphabet of 20 letters."""


@dataclass(frozen=True, kw_only=True)
class StudyModel:
    """A decoder by the name that it has in the study."""

    name: str
    folder: Path
    fingerprint: str
    parameters: int


def read_model(name: str, folder: Path) -> StudyModel:
    """Reads a decoder, to know that it is one.

    Raises:
        InputError: there is none, or it is an encoder.
    """
    decoder = load_decoder(folder, device="cpu", precision="fp32")
    parameters = sum(each.numel() for each in decoder.parameters())
    return StudyModel(name=name, folder=folder, fingerprint=model_fingerprint(decoder), parameters=parameters)


class Cell:
    """One decoder on N proteins of one family.

    Args:
        model: the decoder.
        family: under its seed.
        n: proteins to train on; 0 for the decoder as it came.
        plan: of the study.
        out: the study's folder.
    """

    def __init__(self, model: StudyModel, family: StudyFamily, n: int, plan: StudyPlan, out: Path) -> None:
        self.model, self.family, self.n = model, family, n
        self._plan, self._out = plan, out
        self.name = f"{family.name}-{model.name}-n{n}-s{family.seed}"
        self.path = out / "cells" / f"{self.name}.json"
        self.settings: Row = {
            "model": model.fingerprint,
            "family": family.fingerprint,
            "n": n,
            "seed": family.seed,
            "epochs": plan.epochs_for(n) if n else 0,
            "designs": plan.designs,
            "judged": plan.judged,
            "identity": plan.identity,
            "temperatures": list(TEMPERATURES),
        }

    def read(self) -> Row | None:
        """What an earlier run left, None where it left nothing.

        Raises:
            InputError: it cannot be read, or was made under other settings.
        """
        if not self.path.exists():
            return None
        try:
            row: Row = json.loads(self.path.read_text(encoding="utf-8"))
            theirs = row["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"is no cell of a study ({type(error).__name__}): remove it, and the cell is run again"
            raise InputError(message, file=self.path) from error
        if changed := differences(theirs, self.settings):
            message = f"was made under other settings ({'; '.join(changed)}): choose another --out"
            raise InputError(message, file=self.path)
        return row

    def run(self, callbacks: Callbacks | None = None) -> Row:
        """Tunes, judges, generates, and writes the cell.

        Raises:
            InputError: as `finetune`.
        """
        plan, family, work = self._plan, self.family, self._out / "work" / self.name
        device = resolve_device(plan.device)
        tuned = self._tuned(work, callbacks)
        decoder = load_decoder(work if self.n else self.model.folder, device=str(device), precision="fp32")
        if not self.n:
            test = family.shares.test
            first = replace(family.shares, test=Share(test.ids[: plan.judged], test.sequences[: plan.judged]))
            subject = LanguageSubject(decoder, first, seed=family.seed)
            tuned = {"test": subject.judge(subject.score(), seed=family.seed)}
        row = {
            **machine_facts(device),
            "suite": "finetune",
            "family": family.name,
            "model": self.model.name,
            "parameters": self.model.parameters,
            "n": self.n,
            "seed": family.seed,
            "settings": self.settings,
            **tuned,
            "designs": [self._designs(decoder, temperature) for temperature in TEMPERATURES],
            "family_facts": family.facts,
        }
        write_document(self.path, row)
        if self.n:
            shutil.rmtree(work)  # Its checkpoints are large, and all that the study asks of them is written.
        return row

    def _tuned(self, work: Path, callbacks: Callbacks | None) -> Row:
        if not self.n:
            return {}
        plan = self._plan
        config = FinetuneConfig(
            n=self.n,
            epochs=plan.epochs_for(self.n),
            judged=plan.judged,
            identity=plan.identity,
            clusters_by="kmers",
            validation_share=VALIDATION_SHARE,
            test_share=TEST_SHARE,
            seed=self.family.seed,
        )
        work.parent.mkdir(exist_ok=True)
        # What lies in this cell's own folder under other settings was left by a run whose cell was removed.
        report = finetune(
            self.model.folder,
            self.family.fasta,
            work,
            config,
            device=plan.device,
            overwrite=True,
            callbacks=callbacks,
        )
        kept = ("test", "epochs", "best_epoch", "stopped_early", "validation_losses", "seconds")
        return {name: report[name] for name in kept} | {"learning_rate": report["recipe"]["learning_rate"]}

    def _designs(self, decoder: Decoder, temperature: float) -> Row:
        plan, family = self._plan, self.family
        least, most = family.limits
        sampling = SamplingOptions(temperature=temperature, top_k=None, repetition_penalty=1.0)
        options = GenerationOptions(
            min_residues=least, max_residues=most, seed=family.seed, batch=plan.designs, sampling=sampling
        )
        started = time.perf_counter()
        designs = [each.sequence for each in Generator(decoder, options).run(plan.designs)]
        seconds = time.perf_counter() - started
        folder = self._out / "designs"
        folder.mkdir(exist_ok=True)
        records = [(f"design_{number}", text) for number, text in enumerate(designs, start=1)]
        write_records(folder / f"{self.name}-t{temperature:g}.fasta", records)
        return {
            "temperature": temperature,
            "limits": [least, most],
            **judge_designs(designs, family, n=self.n),
            "at_most": asdict(share(sum(len(each) >= most for each in designs), len(designs))),
            "seconds": round(seconds, 1),
        }


def judge_designs(designs: Sequence[str], family: StudyFamily, *, n: int) -> Row:
    """What a family says of designs, as JSON.

    Args:
        designs: sequences.
        family: whose profiles are asked.
        n: proteins that the decoder was tuned on; 0 holds designs against the whole training share.

    Returns:
        `hits`: share that a profile recognises; `shuffled`: the same with each design's residues in random order;
        `residues`: mean length; `nearest`: mean identity to the nearest protein for training, among those that share
        most 5-mers; `copies`: designs that are one. Estimates are value, low, high, n.
    """
    rng = np.random.default_rng(family.seed)
    shuffled = ["".join(rng.permutation(list(each)).tolist()) for each in designs]
    known = family.shares.train.sequences[: n or None]
    # All pairs would take longer than all else of a cell.
    near = novelty(designs, known, seed=family.seed, all_pairs_cells=0)

    def hits(sequences: Sequence[str]) -> Estimate:
        return share(len(recognised(family.profiles, sequences)), len(sequences))

    return {
        "hits": asdict(hits(designs)),
        "shuffled": asdict(hits(shuffled)),
        "residues": asdict(mean(np.array([float(len(each)) for each in designs]), seed=family.seed)),
        "nearest": asdict(near.identity),
        "copies": near.copies,
    }


def plan_cells(models: Sequence[StudyModel], families: Sequence[StudyFamily], plan: StudyPlan, out: Path) -> list[Cell]:
    """All cells, those of one family after each other, N = 0 first."""
    return [Cell(model, family, n, plan, out) for family in families for n in (0, *family.sizes) for model in models]


def run_cells(
    cells: Sequence[Cell],
    *,
    tell: Callable[[int, Cell, Row, bool], None] = lambda place, cell, row, again: None,
    follow: Callable[[Cell], AbstractContextManager[Callbacks | None]] = lambda cell: nullcontext(),
) -> list[Row]:
    """Rows of all cells; those that an earlier run wrote are read.

    Args:
        cells: of `plan_cells`.
        tell: given each cell's place, itself, its row, and whether it was there already.
        follow: a context around each cell that is run, which gives what its fine-tuning tells of.

    Raises:
        InputError: as `Cell.read`, of all cells before the first one is run, and `Cell.run`.
    """
    there = [cell.read() for cell in cells]
    rows = []
    for place, (cell, found) in enumerate(zip(cells, there, strict=True)):
        row = found
        if row is None:
            with follow(cell) as callbacks:
                row = cell.run(callbacks)
        tell(place, cell, row, found is not None)
        rows.append(row)
    return rows
