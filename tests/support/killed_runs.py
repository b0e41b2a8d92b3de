"""Runs that are killed at chosen moments, each in a process of its own, for tests/engine/test_faults.py.

    killed_runs.py FASTA MODEL FOLDER COUNT

embeds FASTA into FOLDER/whole, then COUNT times into a folder of its own, killed (-9) once or twice on the way: before
or after one of the calls by which something reaches the disk, or when a batch is done. Prints one JSON line a folder:
how often it was killed, and how often embedding a shard was begun.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protnest.engine import Embedder, embed_library, load_model
from protnest.engine import library as library_module
from protnest.engine.library import LibraryOptions

OPTIONS = LibraryOptions(shard_records=8)


class _Moments:
    """Counts moments, and kills the process at one of them."""

    def __init__(self, fatal: int | None) -> None:
        self._fatal = fatal
        self._lock = threading.Lock()
        self.count = 0

    def pass_one(self) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with a moment before it and one after it."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.pass_one()
            result = call(*args, **kwargs)
            self.pass_one()
            return result

        return wrapped

    def start(self, records: int, work: int, done: int) -> None:
        self.pass_one()

    def advance(self, residues: int) -> None:
        self.pass_one()


def run_killed(fasta: Path, out: Path, embedder: Embedder, fatal: int | None, log: Path) -> int:
    """Runs in a child, which dies at moment `fatal`; gives how many moments it lived through, -1 if it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        moments = _Moments(fatal)
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, moments.around(getattr(os, name)))
        embed_job = library_module.embed_job

        def embed_logged(*args: Any, **kwargs: Any) -> Any:
            with log.open("a") as file:
                file.write("begun\n")
            return embed_job(*args, **kwargs)

        library_module.embed_job = embed_logged
        embed_library(fasta, out, embedder, OPTIONS, progress=moments)
        os.write(writing, str(moments.count).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if os.WIFSIGNALED(status):
        return -1
    if os.waitstatus_to_exitcode(status):
        message = f"the run in {out} failed"
        raise SystemExit(message)
    return int(text)


def main() -> None:
    fasta, model, folder = map(Path, sys.argv[1:4])
    embedder = Embedder(load_model(model, device="cpu", precision="fp32"), max_tokens=128)
    total = run_killed(fasta, folder / "whole", embedder, None, folder / "whole.log")
    moments = random.Random(7)
    for number in range(int(sys.argv[4])):
        out, log = folder / str(number), folder / f"{number}.log"
        fatal = [moments.randint(1, total)]
        killed = 0
        while fatal:
            killed += run_killed(fasta, out, embedder, fatal.pop(), log) < 0
            if killed == 1 and moments.random() < 0.5:
                fatal.append(moments.randint(1, total))
        run_killed(fasta, out, embedder, None, log)
        begun = len(log.read_text().splitlines())
        print(json.dumps({"folder": str(out), "killed": killed, "begun": begun}), flush=True)


if __name__ == "__main__":
    main()
