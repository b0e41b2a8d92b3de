"""What a training run tells of its steps: log.csv, and TensorBoard's events where that is installed."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..engine.atomic import write_atomically
from ..engine.errors import InputError
from .trainer import StepReport

LOG_FILE = "log.csv"
TENSORBOARD_FOLDER = "tensorboard"
COLUMNS = ("step", "seconds", "loss", "learning_rate", "gradient_norm", "tokens")


class TrainingLog:
    """Writes one line a step; use it as a context.

    What a killed run logged beyond its last checkpoint is cut off first: those steps are taken again.

    Args:
        folder: of the run.
        steps_done: steps that the state has; lines of later ones are dropped.
        tensorboard: write its events too where it is installed.
    """

    def __init__(self, folder: Path, *, steps_done: int, tensorboard: bool = True) -> None:
        self._path = folder / LOG_FILE
        lines = self._path.read_text(encoding="utf-8").splitlines()[1:] if self._path.exists() else []
        kept = lines[:steps_done]
        text = "\n".join([",".join(COLUMNS), *kept]) + "\n"
        write_atomically(self._path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._before_s = float(kept[-1].split(",")[1]) if kept else 0.0
        self._started = time.monotonic()
        self._file: IO[str] | None = None
        self._events = _event_writer(folder / TENSORBOARD_FOLDER, steps_done) if tensorboard else None

    def __enter__(self) -> TrainingLog:
        # Line by line: what a kill leaves is whole lines.
        self._file = self._path.open("a", buffering=1, encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        if self._events is not None:
            self._events.close()

    @property
    def seconds(self) -> float:
        """Of training so far, those of earlier runs up to the checkpoint included."""
        return self._before_s + time.monotonic() - self._started

    def add(self, report: StepReport) -> None:
        """Logs a step.

        Raises:
            InputError: it cannot be written.
        """
        assert self._file is not None
        numbers = f"{report.loss:.6g},{report.learning_rate:.6g},{report.gradient_norm:.6g},{report.tokens}"
        try:
            self._file.write(f"{report.step},{self.seconds:.2f},{numbers}\n")
        except OSError as error:
            message = f"cannot be written ({error.strerror}); the last checkpoint is kept, and the run goes on from it"
            raise InputError(message, file=self._path) from error
        if self._events is not None:
            for name in ("loss", "learning_rate", "gradient_norm"):
                self._events.add_scalar(name, getattr(report, name), report.step)


def _event_writer(folder: Path, steps_done: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # purge_step hides what a killed run logged beyond its last checkpoint.
    return SummaryWriter(str(folder), purge_step=steps_done + 1)
