"""A process that embeds shards for another one: `python -m protnest.engine.shard_worker FILE_DESCRIPTOR`.

It is given a connection, over which it gets first what to make of itself, then shards as it asks for them. It writes
them to the store itself, so that embeddings do not travel between processes. Whoever gave it the connection lists them.

    to it       WorkerPlan, then for each `ready` a ShardJob, or None when there is no more to do
    from it     ("ready",) ("advance", residues) ("done", Shard) ("over", StageTimes)
                ("fault", Record, problem) ("failed", errno, strerror, file) ("refused", message) ("broken", traceback)

When the other process dies, this one does at once, in the middle of whatever it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .allocator import keep_memory
from .embedder_plan import EmbedderPlan
from .errors import InputError
from .shard_job import RecordFault, ShardJob, embed_job
from .stages import Arrays, run_stages
from .store import write_shard

WORKERS_LOCK = ".workers.lock"
"""Held, shared, by every worker of a store for as long as it lives: a worker outlives a killed run by a moment."""


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """What a worker is told before its first shard.

    Attributes:
        embedder: what it embeds with.
        folder: the store.
        storage_dtype: "fp32" or "fp16".
        cpus: processors that it keeps to; empty for any.
    """

    embedder: EmbedderPlan
    folder: Path
    storage_dtype: str
    cpus: tuple[int, ...] = ()


class _Worker:
    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        while True:
            try:
                self._received.put(self._connection.recv())
            except (EOFError, OSError):
                # The other process is gone: no one would list what is written from now on.
                os._exit(1)

    def send(self, *message: object) -> None:
        with self._sending:
            self._connection.send(message)

    def run(self) -> None:
        plan: WorkerPlan = self._received.get()
        if plan.cpus:
            os.sched_setaffinity(0, plan.cpus)
        with (plan.folder / WORKERS_LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            embedder = plan.embedder.make()

            def embed(job: ShardJob) -> Arrays:
                with self._ending():
                    return embed_job(
                        job,
                        embedder,
                        storage_dtype=plan.storage_dtype,
                        after_batch=lambda residues: self.send("advance", residues),
                    )

            def write(job: ShardJob, arrays: Arrays) -> None:
                with self._ending():
                    self.send("done", write_shard(plan.folder, job.number, job.entries, arrays))

            behind = embedder.device.type == "cuda"
            self.send("over", run_stages(self._jobs(), embed, write, writes_behind=behind))

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """After an error no more jobs come; without this word, the stage that waits for one would wait for ever."""
        try:
            yield
        except BaseException:
            self._received.put(None)
            raise

    def _jobs(self) -> Iterator[ShardJob]:
        while True:
            self.send("ready")
            job = self._received.get()
            if job is None:
                return
            yield job


def main() -> None:
    """Works until there is no more to do; errors travel over the connection."""
    # Ctrl-C reaches every process of a terminal: it is for the other one to say what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_memory()
    worker = _Worker(Connection(int(sys.argv[1])))
    try:
        worker.run()
    except RecordFault as error:
        worker.send("fault", error.record, error.problem)
    except InputError as error:
        worker.send("refused", str(error))
    except OSError as error:
        worker.send("failed", error.errno, error.strerror, error.filename)
    except Exception:  # noqa: BLE001 - whatever it was, the other process is told, and says so.
        worker.send("broken", traceback.format_exc())


if __name__ == "__main__":
    main()
