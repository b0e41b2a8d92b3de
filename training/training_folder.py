"""A training run's folder on disk: who may write there, what is kept, and how a killed run goes on.

    run.json        schema version, identity of the run, `complete`: the mark by which the folder is known as a run's
    state.pt        the last checkpoint: weights, optimiser, place
    log.csv         one line a step
    tensorboard/    the same for TensorBoard, where it is installed
    training.json   the report, at the end

The model's own files come beside them. Each is written under a temporary name, flushed and renamed, so that a kill or a
full disk leaves the last good one. A lock that dies with its process keeps two runs out of one folder.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..engine.atomic import write_atomically
from ..engine.errors import InputError
from ..engine.json_object import read_object
from ..engine.run_folder import check_empty, differences, enter_folder
from ..engine.schema_version import check_schema_version
from .distributed import ALONE, Processes
from .trainer import StepReport, Trainer
from .training_log import LOG_FILE, TENSORBOARD_FOLDER, TrainingLog

SCHEMA_VERSION = 2
RUN_FILE = "run.json"
STATE_FILE = "state.pt"
REPORT_FILE = "training.json"
MODEL_FILES = ("config.json", "model.safetensors", "vocab.txt", "tokenizer.json")
"""Of a checkpoint in Hugging Face layout."""


class TrainingFolder:
    """One run's folder; use it as a context, which holds the folder's lock.

    Args:
        folder: made if it is not there.
        identity: all that decides the result, as JSON: `Trainer.identity` and the data. A run is resumed under an equal
            one only.
        overwrite: throw away a run of another identity: its own files and nothing else.
        processes: who trains together; the first one alone writes, the others enter after it.

    Attributes:
        report: what a finished run left in training.json, None where it is not finished.

    Raises:
        InputError: another run is writing there; it holds a run of another identity and `overwrite` is not set; or it
            holds files and no run.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], *, overwrite: bool = False, processes: Processes = ALONE
    ) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.report: dict[str, Any] | None = None
        self._overwrite = overwrite
        self._processes = processes
        self._held = contextlib.ExitStack()

    def __enter__(self) -> TrainingFolder:
        if self._processes.is_first:
            self._enter()
        self._processes.wait()
        if not self._processes.is_first:
            self._open()
        return self

    def _enter(self) -> None:
        self._held.enter_context(enter_folder(self.folder))
        try:
            self._open()
        except BaseException:
            self._held.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _open(self) -> None:
        if not (self.folder / RUN_FILE).exists():
            check_empty(self.folder)
            self._write_run(complete=False)
            return
        run = self._read_run()
        if changed := differences(run["identity"], self.identity):
            if not self._overwrite:
                message = f"holds a run with other settings ({'; '.join(changed)}); choose another --out or --overwrite"
                raise InputError(message, file=self.folder)
            self._clear()
            self._write_run(complete=False)
        elif run["complete"] and (self.folder / REPORT_FILE).exists():
            self.report = read_object(self.folder / REPORT_FILE)

    def _clear(self) -> None:
        # run.json goes last: a folder that is half cleared is still known as a run's.
        for name in (STATE_FILE, LOG_FILE, REPORT_FILE, *MODEL_FILES):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob(f"{TENSORBOARD_FOLDER}/events.out.tfevents.*"):
            path.unlink()
        (self.folder / RUN_FILE).unlink()

    def _read_run(self) -> dict[str, Any]:
        run = read_object(self.folder / RUN_FILE)
        check_schema_version(run.get("schema_version"), SCHEMA_VERSION, file=self.folder / RUN_FILE)
        if not isinstance(run.get("identity"), dict) or "complete" not in run:
            message = "is no training run's"
            raise InputError(message, file=self.folder / RUN_FILE)
        return run

    def _write_run(self, *, complete: bool) -> None:
        run = {"schema_version": SCHEMA_VERSION, "complete": complete, "identity": self.identity}
        self._write(RUN_FILE, lambda path: path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            write_atomically(self.folder / name, write)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where a disk is full
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            message = f"cannot be written ({reason}); what was there before is kept, and the run goes on from it"
            raise InputError(message, file=self.folder / name) from error

    def train(
        self,
        trainer: Trainer,
        *,
        until: int | None = None,
        save_every_s: float = 120.0,
        after_step: Callable[[StepReport], None] = lambda report: None,
    ) -> float:
        """Goes on from the last checkpoint where there is one, trains, and saves: now and then, and at the end.

        Args:
            trainer: of this folder's identity; where it has taken no step, the saved state is loaded into it.
            until: stop after so many steps, `trainer.config.steps` by default.
            save_every_s: seconds between checkpoints.
            after_step: called after each step, when all that belongs to it is written.

        Returns:
            Seconds of training so far, those of earlier runs included.

        Raises:
            InputError: the state is unreadable, loss or gradient are not finite, or the disk is full: the last
                checkpoint stays.
        """
        self.resume(trainer)
        last_saved = time.monotonic()
        with contextlib.ExitStack() as held:
            log = None
            if self._processes.is_first:
                log = held.enter_context(TrainingLog(self.folder, steps_done=trainer.step))

            def keep(report: StepReport) -> None:
                nonlocal last_saved
                if log is not None:
                    log.add(report)
                if self._is_due(last_saved + save_every_s):
                    self.save(trainer)
                    last_saved = time.monotonic()
                after_step(report)

            trainer.run(until=until, after_step=keep)
            self.save(trainer)
            return 0.0 if log is None else log.seconds

    def _is_due(self, when: float) -> bool:
        """Whether the first process's clock is beyond `when`: processes save together or not at all."""
        due = self._processes.is_first and time.monotonic() >= when
        return bool(self._processes.sum(torch.tensor(float(due))))

    def save(self, trainer: Trainer) -> None:
        """Writes the trainer's state.

        Raises:
            InputError: the disk is full, or the like; the state before stays.
        """
        state = {"version": SCHEMA_VERSION, "identity": self.identity, **trainer.state()}
        if self._processes.is_first:
            self._write(STATE_FILE, lambda path: torch.save(state, path))

    def resume(self, trainer: Trainer) -> bool:
        """Sets a trainer that has taken no step to the saved state, where there is one; says whether it did.

        Raises:
            InputError: as `load`.
        """
        found = trainer.step == 0 and (self.folder / STATE_FILE).exists()
        if found:
            self.load(trainer)
        return found

    def load(self, trainer: Trainer) -> None:
        """Sets the trainer to the saved state.

        Raises:
            InputError: it is unreadable, of another identity or of another schema version.
        """
        path = self.folder / STATE_FILE
        try:
            state: dict[str, Any] = torch.load(path, map_location=trainer.device, weights_only=True)
            version, theirs = state["version"], state["identity"]
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            message = f"not a readable training state ({str(error).splitlines()[0] if str(error) else 'it is empty'})"
            raise InputError(message, file=path) from error
        if version != SCHEMA_VERSION:
            message = f"state has schema version {version}, this release reads {SCHEMA_VERSION}"
            raise InputError(message, file=path)
        if changed := differences(theirs, self.identity):
            message = f"the run there has other settings: {'; '.join(changed)}"
            raise InputError(message, file=path)
        try:
            trainer.load_state(state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            message = f"not this model's training state ({str(error).splitlines()[0]})"
            raise InputError(message, file=path) from error

    def finish(self, report: dict[str, Any]) -> None:
        """Writes the report, JSON without NaN, and marks the run complete; the first process calls it."""
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        self._write(REPORT_FILE, lambda path: path.write_text(text, encoding="utf-8"))
        self._write_run(complete=True)
