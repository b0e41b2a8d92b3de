"""esm-cpp beside the others: a worker process in an environment of its own, since it needs numpy < 2.

    python -m venv out/esm-cpp
    out/esm-cpp/bin/pip install esm-cpp 'numpy<2'

The worker stays alive between passes and takes the time itself, so that sending proteins and vectors does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from protnest.benchmarks.rows import ROOT
from protnest.engine import Encoder
from protnest.engine.checkpoint import save_checkpoint
from safetensors.torch import load_file, save_file

Vectors = npt.NDArray[np.float32]

ESM_CPP = "esm-cpp"
VARIABLE = "PROTNEST_ESM_CPP_PYTHON"
"""Environment variable with the Python that has esm-cpp."""
PRECISIONS = ("fp32", "int8")
_WORKER = Path(__file__).with_name("esm_cpp_worker.py")
_ROTARY_BASE = 10_000.0
_DIED = "its process died"


class Answer(NamedTuple):
    """What a pass gives.

    Attributes:
        vectors_BD: means over residues, float32.
        seconds: that it took.
        kind: "embeddings", or "logits" (V wide) from a forward that gives nothing else.
        growth_bytes: memory at its peak beyond what was held before, where that was asked for and the system tells.
    """

    vectors_BD: Vectors
    seconds: float
    kind: str = "embeddings"
    growth_bytes: int | None = None


def find_python(given: Path | None = None) -> Path | None:
    """The Python that has esm-cpp: the one given, that of `VARIABLE`, or out/esm-cpp/bin/python; None where it is not.

    Raises:
        ValueError: one was named, and has no esm-cpp.
    """
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    python = named or ROOT / "out" / "esm-cpp" / "bin" / "python"
    if version(python):
        return python
    if named is not None:
        message = f"{named} cannot import esm_cpp; make it with `python -m venv` and `pip install esm-cpp 'numpy<2'`"
        raise ValueError(message)
    return None


@cache
def version(python: Path) -> str | None:
    """Version of the esm-cpp that this Python has; None where it has none, or is none."""
    command = [str(python), "-c", "import esm_cpp; print(esm_cpp.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=_environment(1))
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[-1]


def _environment(threads: int) -> dict[str, str]:
    # Paths of this environment would show the other one this numpy.
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"ESM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}


def save_for_esm_cpp(encoder: Encoder, folder: Path) -> Path:
    """Writes fp32 weights as esm-cpp reads them: Hugging Face's names, and each layer's rotary frequencies."""
    save_checkpoint(encoder, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    K = encoder.config.head_width
    frequencies = _ROTARY_BASE ** -(torch.arange(0, K, 2, dtype=torch.float32) / K)
    for layer in range(encoder.config.layers):
        tensors[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = frequencies.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return file


class EsmCpp:
    """`esm_cpp.Model`, one sequence at a time for embeddings, in packed batches for logits: it has no others.

    Args:
        encoder: fp32 on the CPU, with a language-model head.
        precision: "fp32", or "int8", which is its `quantize_weights()`.
        python: has esm-cpp.
        threads: of its pool.

    Raises:
        RuntimeError: the worker could not load the model.
    """

    name = ESM_CPP

    def __init__(self, encoder: Encoder, *, precision: str, python: Path, threads: int) -> None:
        if precision not in PRECISIONS:
            message = f"precision is {precision!r}; esm-cpp has {', '.join(PRECISIONS)}"
            raise ValueError(message)
        self.precision = precision
        # A folder of its own each: the worker may map the file for as long as it lives.
        self._folder = tempfile.TemporaryDirectory(prefix="protnest-esm-cpp-")
        file = save_for_esm_cpp(encoder, Path(self._folder.name))
        log = Path(self._folder.name) / "log.txt"
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [str(python), "-u", str(_WORKER), str(file), precision],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=_environment(threads),
            )
        self._log = log
        self._close = weakref.finalize(self, _end, self._process, self._folder)
        self.facts = self._read_line()

    def embed(self, sequences: Sequence[str], budget: int) -> Vectors:
        """As every engine's; at budgets above 1 means of logits, see `answer`."""
        return self.answer(sequences, budget).vectors_BD

    def answer(self, sequences: Sequence[str], budget: int, *, watch: bool = False) -> Answer:
        """One pass, timed inside the worker.

        Raises:
            RuntimeError: esm-cpp failed or died.
        """
        request = {"sequences": list(sequences), "budget": budget, "watch": watch}
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError as error:
            raise self._failure(_DIED) from error
        about = self._read_line()
        stdout = self._process.stdout
        assert stdout is not None
        shape = about["rows"], about["columns"]
        data = stdout.read(4 * shape[0] * shape[1])
        vectors_BD: Vectors = np.frombuffer(data, dtype="<f4").reshape(shape)
        return Answer(vectors_BD, about["seconds"], about["kind"], about["growth_bytes"])

    def close(self) -> None:
        """Ends the worker and removes its weights."""
        self._close()

    def _read_line(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise self._failure(_DIED)
        about: dict[str, Any] = json.loads(line)
        if "error" in about:
            raise self._failure(about["error"])
        return about

    def _failure(self, what: str) -> RuntimeError:
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        return RuntimeError(f"esm-cpp {self.precision}: {what}; it printed: {' | '.join(said) or 'nothing'}")


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            # What was not sent to a process that died cannot be sent any more.
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    folder.cleanup()
