"""What a scoring run has computed so far, on disk, so that a killed run goes on where it stopped.

    run.json                     schema version and resolved settings
    MODEL-PROTEIN.safetensors    `values` of a protein's units (see `score_survey`), of the first so many

Units are computed in an order that depends on the settings alone, in chunks; a file holds whole chunks. So a resumed
run repeats an interrupted one bit for bit.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .atomic import write_atomically
from .errors import InputError
from .run_folder import differences, lock_folder

SCHEMA_VERSION = 1
_RUN_FILE = "run.json"
# What a crash can cost, beside one chunk.
_SECONDS_BETWEEN_SAVES = 10.0

_logger = logging.getLogger(__name__)

Values = npt.NDArray[np.floating]


class ScoreState:
    """The folder of a run that is under way; use it as a context, which holds its lock.

    Args:
        folder: made if it is not there; None keeps nothing.
        settings: everything that decides the bits; a folder is resumed under equal settings only.
        overwrite: throw away what a run of other settings left.

    Raises:
        InputError: on entering: another run holds the folder, or it holds a run of other settings.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self._folder = folder
        self._settings = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self._saved_at = time.monotonic()
        self._held = ExitStack()

    def __enter__(self) -> ScoreState:
        if self._folder is None:
            return self
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(lock_folder(self._folder))
        except OSError as error:
            message = f"cannot be written to ({error.strerror})"
            raise InputError(message, file=self._folder) from error
        try:
            self._open(self._folder)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _open(self, folder: Path) -> None:
        path = folder / _RUN_FILE
        if path.exists():
            try:
                run = json.loads(path.read_text(encoding="utf-8"))
                changed = differences(run["settings"], self._settings)
                if run["schema_version"] != SCHEMA_VERSION:
                    changed = [f"schema version: {run['schema_version']} there, {SCHEMA_VERSION} now"]
            except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                message = f"not a readable run ({error}); --overwrite starts anew"
                if not self._overwrite:
                    raise InputError(message, file=path) from error
                changed = ["unreadable"]
            if not changed:
                return
            if not self._overwrite:
                message = f"holds an unfinished run with other settings ({'; '.join(changed)}); --overwrite starts anew"
                raise InputError(message, file=folder)
            # run.json goes first: a folder that is half cleared must not look like a run.
            path.unlink()
        for old in folder.glob("*.safetensors"):
            old.unlink()
        text = json.dumps({"schema_version": SCHEMA_VERSION, "settings": self._settings}, indent=1) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def load(self, model: int, target: int) -> Values | None:
        """The values that were saved for a wild type under a model, by their numbers; None where there are none."""
        if self._folder is None:
            return None
        path = self._file(self._folder, model, target)
        try:
            values: Values = load_file(path)["values"]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            _logger.warning("%s is damaged (%s): its part is computed anew", path, error)
            return None
        return values

    def save(self, model: int, target: int, values: Values, *, complete: bool) -> None:
        """Keeps the first values of a wild type; those of an incomplete one every few seconds only."""
        if self._folder is None or not (complete or time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES):
            return
        tensors = {"values": np.ascontiguousarray(values)}
        write_atomically(self._file(self._folder, model, target), lambda temporary: save_file(tensors, temporary))
        self._saved_at = time.monotonic()

    def clear(self) -> None:
        """Removes the folder: what it held is written where the user wanted it."""
        if self._folder is not None:
            shutil.rmtree(self._folder)

    @staticmethod
    def _file(folder: Path, model: int, target: int) -> Path:
        return folder / f"{model}-{target}.safetensors"
