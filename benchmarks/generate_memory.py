"""How much memory generating takes, weights included: each engine in a process of its own.

    python -m protnest.benchmarks.generate_memory '{"maker": "protnest", "folder": ..., ...}'

is the other side: it loads the model, generates at each batch, and prints one JSON object. What its process holds
before the model is loaded, libraries above all, is told apart; on a GPU all figures are those of torch's allocator, as
in the published table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from protnest.benchmarks.generate_engines import OURS, Batched, Engine, Ours, Pipeline, TransformersModel, load_ours
from protnest.benchmarks.generate_problems import Problem
from protnest.benchmarks.memory import PeakMemory
from protnest.engine.decoder_config import DecoderConfig

TRANSFORMERS = "transformers"
_NO_SIZE = Problem(
    shape="none",
    tokens=8,
    config=DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=300, places=8),
)
_SECONDS = 1800.0
_ERROR_CHARACTERS = 1000


@dataclass(frozen=True, kw_only=True)
class MemoryTask:
    """What one process does.

    Attributes:
        maker: "transformers" or "protnest".
        folder: of the checkpoint.
        precision: of its products.
        batches: sequences at a time, one after another; transformers runs its pipeline at 1.
        tokens: of each sequence, the prompt's counted.
        device: where.
        threads: of the CPU.
    """

    maker: str
    folder: str
    precision: str
    batches: tuple[int, ...]
    tokens: int
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes beyond what was held before the model was loaded; None where the system does not tell.

    Attributes:
        libraries_bytes: held before it, by Python and all that is imported: no part of the others.
        load_peak_bytes: at the peak of loading.
        held_bytes: after it.
        peak_bytes: at the peak of generating, by batch.
    """

    libraries_bytes: int | None
    load_peak_bytes: int | None
    held_bytes: int | None
    peak_bytes: dict[int, int | None]


def transformers_engine(theirs: TransformersModel, *, tokens: int, batch: int) -> Engine:
    """The pipeline where sequences run one at a time, else `generate`."""
    return Pipeline(theirs, tokens=tokens) if batch == 1 else Batched(theirs, tokens=tokens, batch=batch)


def watch(task: MemoryTask) -> MemoryUse:
    """Does the task in this process.

    Raises:
        ValueError: there is no such maker.
        RuntimeError: transformers is not installed.
    """
    if task.maker not in _MAKERS:
        message = f"no maker {task.maker!r}; allowed are {', '.join(_MAKERS)}"
        raise ValueError(message)
    torch.set_num_threads(task.threads)
    load = _MAKERS[task.maker]
    # What a first step imports is hundreds of megabytes of libraries: a model of no size fetches it before.
    with tempfile.TemporaryDirectory() as folder:
        _NO_SIZE.write(Path(folder))
        make = load(replace(task, folder=folder, tokens=_NO_SIZE.tokens))
        for batch in (1, 2):
            make(batch).generate(batch)
        del make
    device = torch.device(task.device)
    before = PeakMemory(device)
    make = load(task)
    load_peak = before.growth_bytes()
    held = PeakMemory(device).held_bytes
    peaks: dict[int, int | None] = {}
    for batch in task.batches:
        engine = make(batch)
        peak = PeakMemory(device)
        engine.generate(batch)
        peaks[batch] = _beyond(_sum(peak.held_bytes, peak.growth_bytes()), before.held_bytes)
    return MemoryUse(
        libraries_bytes=before.held_bytes,
        load_peak_bytes=load_peak,
        held_bytes=_beyond(held, before.held_bytes),
        peak_bytes=peaks,
    )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _beyond(whole: int | None, before: int | None) -> int | None:
    return None if whole is None or before is None else max(0, whole - before)


def _load_transformers(task: MemoryTask) -> Callable[[int], Engine]:
    theirs = TransformersModel(Path(task.folder), precision=task.precision, device=torch.device(task.device))
    return lambda batch: transformers_engine(theirs, tokens=task.tokens, batch=batch)


def _load_ours(task: MemoryTask) -> Callable[[int], Engine]:
    decoder = load_ours(Path(task.folder), precision=task.precision, device=torch.device(task.device))
    return lambda batch: Ours(decoder, batch=batch)


_MAKERS = {TRANSFORMERS: _load_transformers, OURS: _load_ours}


def measure_memory(task: MemoryTask) -> MemoryUse:
    """Does the task in a process of its own.

    Raises:
        RuntimeError: the process failed; with the end of what it printed.
    """
    command = [sys.executable, "-m", "protnest.benchmarks.generate_memory", json.dumps(asdict(task))]
    # A safe path: the checkout's folders `kernels` and `engine` must not be found by their bare names.
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(task.threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        message = f"watching the memory of {task.maker} {task.precision} took more than {_SECONDS:.0f} s"
        raise RuntimeError(message) from error
    if done.returncode:
        ending = (done.stderr or done.stdout).strip()[-_ERROR_CHARACTERS:]
        message = f"watching the memory of {task.maker} {task.precision} failed: {ending}"
        raise RuntimeError(message)
    found = json.loads(done.stdout.splitlines()[-1])
    found["peak_bytes"] = {int(batch): peak for batch, peak in found["peak_bytes"].items()}
    return MemoryUse(**found)


def main(arguments: Sequence[str]) -> None:
    """Does the task that the only argument holds, and prints its memory."""
    given = json.loads(arguments[0])
    task = MemoryTask(**given | {"batches": tuple(given["batches"])})
    print(json.dumps(asdict(watch(task))))


if __name__ == "__main__":
    main(sys.argv[1:])
