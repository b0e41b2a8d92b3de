"""The controlled 2x2: does entropy weighting help, does smoothing, do they help each other, and does a teacher at all?

    baseline      a teacher's soft targets
    uncertainty   with rows weighted by the teacher's entropy
    smoothing     with targets smoothed by its confidence
    both
    labels        no teacher

Each cell gets the same learning rates and warm-ups, tried with one seed and chosen by perplexity on some held-out
proteins; then so many seeds at its best, judged on other held-out proteins. All that a seed decides (weights, order,
crops, masks) is the same for all cells. The weights' normalisation changes the soft loss's share of cells with entropy
weighting alone; where both ways are asked for, such a cell is there twice.

    plan.json     schema version, what the grid is of
    runs/         STUDENT/CELL/SETTINGS, each a run's folder as `distill` leaves it, with scores.json beside
    grid.json     the report; grid.md, the same as a page
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.atomic import write_atomically
from ..engine.device import precision_name, resolve_device, resolve_precision
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.models import load_checkpoint
from ..engine.run_folder import check_empty, differences, lock_folder
from ..engine.schema_version import check_schema_version
from .composition import letter_counts
from .corpus import read_shares
from .distillation import Callbacks, check_pair, distill
from .grid_plan import GridConfig, Run, name_of
from .grid_report import CellScores, markdown, report_student
from .grid_scores import Judges, RunScores, held_out_halves
from .perplexity import letter_perplexity
from .students import DECODER_PRESETS, build_student
from .teacher import model_fingerprint
from .trainer import NotFiniteError

SCHEMA_VERSION = 1
PLAN_FILE, REPORT_FILE, PAGE_FILE = "plan.json", "grid.json", "grid.md"
_CACHED_MASKS = 4


@dataclass(frozen=True, kw_only=True)
class GridCallbacks:
    """What a caller is told of on the way.

    Attributes:
        on_run: a run begins, or is found finished: which, its number from 1, of how many, whether it was finished.
        run: what is told of each run.
    """

    on_run: Callable[[Run, int, int, bool], None] = lambda run, number, of, finished: None
    run: Callbacks = dataclasses.field(default_factory=Callbacks)


def run_grid(
    teacher: str | Path,
    data: Path,
    out: Path,
    config: GridConfig,
    *,
    device: str = "auto",
    cache: Path | None = None,
    save_every_s: float = 120.0,
    callbacks: GridCallbacks | None = None,
) -> dict[str, Any]:
    """Trains and judges every student of a grid; what is finished in `out` is not trained again.

    Args:
        teacher: as `load_model` takes it.
        data: FASTA; one sequence in twenty, by its hash, is held out to choose and to judge by.
        out: the grid's folder. The grid there may grow (students, rates, warm-ups, normalisations, seeds).
        config: what is tried.
        device: where.
        cache: folder for the teacher's answers, in which each seed has one of its own.
        save_every_s: seconds between checkpoints of a run.
        callbacks: what to tell of.

    Returns:
        What grid.json holds.

    Raises:
        InputError: as `distill`; fewer than two proteins are held out; `out` holds a grid of other settings; or all
            rates of a cell diverged.
    """
    resolved = resolve_device(device)
    grid = _Grid(teacher, data, out, config, str(resolved), cache, save_every_s, callbacks or GridCallbacks())
    with _entered(out, grid.settings, grid.growing):
        report = grid.run()
        _write_json(out / REPORT_FILE, report)
        page = markdown(report)
        write_atomically(out / PAGE_FILE, lambda path: path.write_text(page, encoding="utf-8"))
    return report


class _Grid:
    """A grid with its data read."""

    def __init__(
        self,
        teacher: str | Path,
        data: Path,
        out: Path,
        config: GridConfig,
        device: str,
        cache: Path | None,
        save_every_s: float,
        callbacks: GridCallbacks,
    ) -> None:
        self._teacher, self._data, self._out, self._config = teacher, data, out, config
        self._device, self._cache, self._save_every_s, self._callbacks = device, cache, save_every_s, callbacks
        precision = precision_name(resolve_precision(config.base.trainer.precision, resolve_device(device)))
        taught_by = load_checkpoint(teacher, device=device, precision=precision)
        self._contexts = dict[str, int]()
        for student in config.students:
            vocabulary = None if isinstance(taught_by, Encoder) else taught_by.vocabulary
            built = build_student(student, vocabulary=config.base.vocabulary or vocabulary, seed=0)
            check_pair(built, taught_by)
            seen = [
                each.config.max_residues if isinstance(each, Encoder) else each.config.places
                for each in (built, taught_by)
            ]
            self._contexts[student] = min(seen)
        self._train, held_out = read_shares(data)
        self._halves = held_out_halves(held_out, config.base.held_out, file=data)
        self._judges = Judges(self._halves, device=device, precision=precision)
        self._number = 0
        base = config.base
        shared = {**dataclasses.asdict(base.trainer), **dataclasses.asdict(base.options)}
        for varied in ("learning_rate", "warmup_steps", "uncertainty", "smooth", "weight_normalization"):
            del shared[varied]
        text = "\n".join((*self._train.sequences, "", *held_out.sequences))
        settings = {
            "grid": config.kind,
            "teacher": model_fingerprint(taught_by),
            "data": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
            **shared,
            **{
                name: getattr(base, name)
                for name in ("vocabulary", "epochs", "rows", "mask_share", "cache_top_k", "held_out")
            },
            "mask_epochs": self._mask_epochs(),
            "cached": cache is not None,
        }
        # As they come back from a file: a tuple is a list there.
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.growing = {
            "students": list(config.students),
            "learning_rates": list(config.learning_rates),
            "warmups": list(config.warmups),
            "weight_normalizations": list(config.weight_normalizations),
            "seeds": config.seeds,
        }
        self._name = taught_by.name

    def _mask_epochs(self) -> int:
        """The same for all cells: by default a cache makes masks come again, and labels alone have no cache."""
        given = self._config.base.mask_epochs
        return (0 if self._cache is None else _CACHED_MASKS) if given is None else given

    def run(self) -> dict[str, Any]:
        students = {name_of(student): report_student(self._cells(student)) for student in self._config.students}
        said = self._judges.whole(self._out / "teacher_scores.json", self._teacher)
        return {
            "grid": self._config.kind,
            "teacher": self._name,
            "data": {"file": self._data.name, "train_sequences": len(self._train)},
            "proteins": {name: len(each) for name, each in self._halves.items()},
            "settings": self.settings | self.growing,
            "students": students,
            "teacher_perplexity": said,
            "unigram": dataclasses.asdict(
                letter_perplexity(
                    letter_counts(self._halves["judged"]), letter_counts(self._train.sequences).sum(axis=0)
                )
            ),
        }

    def _cells(self, student: str) -> dict[str, CellScores]:
        tried = {run: self._scores(run) for run in self._config.selections(student)}
        found = {}
        for cell in self._config.cells:
            of_cell = {run: scores.log_perplexity("selection") for run, scores in tried.items() if run.cell == cell}
            best = min(of_cell, key=lambda run: of_cell[run])
            if tried[best].diverged is not None:
                message = f"{name_of(student)}, {cell.name}: every learning rate diverged: {tried[best].diverged}"
                raise InputError(message)
            students = [tried[run] if run in tried else self._scores(run) for run in self._config.repetitions(best)]
            known = tried[best].proteins("judged")
            found[cell.name] = CellScores(
                learning_rate=best.learning_rate,
                warmup_steps=best.warmup_steps,
                tried=tuple((run.learning_rate, run.warmup_steps, value) for run, value in of_cell.items()),
                seeds=tuple(run.seed for run in self._config.repetitions(best)),
                students=tuple(
                    known.diverged() if each.diverged is not None else each.proteins("judged") for each in students
                ),
            )
        return found

    def _scores(self, run: Run) -> RunScores:
        """Of a finished run; trains and judges it first where it is not."""
        folder = self._out / "runs" / run.folder
        path = folder / "scores.json"
        finished = path.exists()
        self._number += 1
        self._callbacks.on_run(run, self._number, self._config.runs, finished)
        if finished:
            return RunScores.read(path)
        try:
            self._distill(run, folder)
        except NotFiniteError as error:
            scores = RunScores(diverged=error.problem)
        else:
            scores = self._judges.score(folder)
        scores.write(path)
        return scores

    def _distill(self, run: Run, folder: Path) -> None:
        base, cell = self._config.base, run.cell
        vocabulary = base.vocabulary
        if vocabulary is None and not cell.taught and run.student in DECODER_PRESETS:
            # Without a teacher a preset knows no tokens, or others.
            vocabulary = str(self._teacher)
        config = dataclasses.replace(
            base,
            student=run.student,
            vocabulary=vocabulary,
            mask_epochs=self._mask_epochs(),
            trainer=dataclasses.replace(
                base.trainer, learning_rate=run.learning_rate, warmup_steps=run.warmup_steps, seed=run.seed
            ),
            options=dataclasses.replace(
                base.options,
                uncertainty=cell.uncertainty,
                smooth=cell.smooth,
                weight_normalization=cell.weight_normalization,
            ),
            # The grid judges on proteins of its own choice, the same for all seeds.
            held_out=1,
        )
        cache = None
        if self._cache is not None and cell.taught:
            cache = self._cache / f"context{self._contexts[run.student]}-seed{run.seed}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        distill(
            self._teacher if cell.taught else None,
            self._data,
            folder,
            config,
            device=self._device,
            cache=cache,
            save_every_s=self._save_every_s,
            callbacks=self._callbacks.run,
        )


@contextmanager
def _entered(out: Path, settings: dict[str, Any], growing: dict[str, Any]) -> Iterator[None]:
    """Holds the grid's folder, and keeps in it what the grid is of."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot be a grid's folder ({error.strerror})"
        raise InputError(message, file=out) from error
    with lock_folder(out):
        path = out / PLAN_FILE
        if path.exists():
            _check_plan(path, settings, growing)
        else:
            check_empty(out, lacks="grid")
        _write_json(path, {"schema_version": SCHEMA_VERSION, "settings": settings, "growing": growing})
        yield


def _check_plan(path: Path, settings: dict[str, Any], growing: dict[str, Any]) -> None:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        version, there, grown = plan["schema_version"], dict(plan["settings"]), dict(plan["growing"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"not a readable plan of a grid ({error})"
        raise InputError(message, file=path) from error
    check_schema_version(version, SCHEMA_VERSION, file=path)
    changed = differences(there, settings)
    for name, now in growing.items():
        before = grown[name]
        shrunk = now < before if isinstance(now, int) else not set(before) <= set(now)
        if shrunk:
            changed.append(f"{name}: {before} there, {now} now, which lacks some")
    if changed:
        message = f"holds a grid with other settings ({'; '.join(changed)}); choose another --out"
        raise InputError(message, file=path.parent)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
