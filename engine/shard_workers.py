"""Many processes on one store: whoever is free takes the next shard, and what a killed one had is done again.

One process owns the store: it reads the library, gives out shards, and lists in run.json what comes back. A worker may
die at any moment, of a signal or of too little memory. Its shards then go to another one, and a new one is started; a
shard that brought down three is given up, and its records are named.
"""

from __future__ import annotations

import collections
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import InputError
from .shard_job import RecordFault, ShardJob
from .shard_worker import WORKERS_LOCK, WorkerPlan
from .stages import StageTimes
from .store import Shard

_MOST_DEATHS = 3
"""Of workers that had the same shard in hand."""
_PATIENCE_S = 60.0
"""How long workers of a killed run are waited for. They die within milliseconds, unless the disk hangs."""


@dataclass(eq=False)
class _Hand:
    """A worker, as its owner knows it.

    Attributes:
        process: itself.
        connection: to it.
        told: when it was told what to do; 0.0 before.
        held: shards that it has and that are not listed yet, oldest first.
        has_begun: it has made its embedder, and asked for a shard.
        is_idle: it asked for a shard that it has not got yet.
        is_over: it was told that there is no more, and has said its last.
    """

    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    told: float = 0.0
    held: collections.OrderedDict[int, ShardJob] = field(default_factory=collections.OrderedDict)
    has_begun: bool = False
    is_idle: bool = False
    is_over: bool = False


class ShardWorkers:
    """Processes that embed shards; use it as a context, which starts and ends them.

    They take seconds to come up, in which there is something else to do: what they shall work on is told to `run`.

    Args:
        count: how many; none is a context that does nothing.
        threads: on which each computes.

    Attributes:
        restarts: workers that died and were replaced.
    """

    def __init__(self, count: int, *, threads: int) -> None:
        self._count = count
        self._threads = threads
        self._plans: list[WorkerPlan] = []
        self._hands: list[_Hand] = []
        self._again: collections.deque[ShardJob] = collections.deque()
        # By shard; under -1 of workers that had not begun, since the last shard was finished.
        self._deaths: collections.Counter[int] = collections.Counter()
        self._times = StageTimes()
        self.restarts = 0

    def __enter__(self) -> ShardWorkers:
        self._hands = [_start(self._threads) for _ in range(self._count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hand in self._hands:
            hand.connection.close()
            hand.process.kill()
        for hand in self._hands:
            hand.process.wait()

    def run(
        self,
        plans: list[WorkerPlan],
        jobs: Iterator[ShardJob],
        *,
        on_shard: Callable[[ShardJob, Shard], None],
        on_advance: Callable[[int], None],
    ) -> StageTimes:
        """Gives out all jobs and waits until they are done; seconds are added up over the workers.

        Args:
            plans: one a worker, all of the same store.
            jobs: shards of that store.
            on_shard: called with each finished shard, and its job, in whatever order they are finished.
            on_advance: called with residues that were run.

        Raises:
            InputError: workers of an earlier run are still at work; a worker cannot make its embedder.
            RecordFault: a record cannot be embedded, or a shard that begins with it brought down three workers.
            OSError: a shard cannot be written.
        """
        self._plans, self._on_shard, self._on_advance = plans, on_shard, on_advance
        _await_earlier_workers(plans[0].folder)
        for hand, plan in zip(self._hands, plans, strict=True):
            _begin(hand, plan)
        with ThreadPoolExecutor(1, "reader") as reader:
            ahead = reader.submit(next, jobs, None)
            is_read = False
            while True:
                for hand in [each for each in self._hands if each.is_idle]:
                    job = self._again.popleft() if self._again else None
                    if job is None and not is_read:
                        job = ahead.result()
                        is_read = job is None
                        if not is_read:
                            ahead = reader.submit(next, jobs, None)
                    if job is not None:
                        self._give(hand, job)
                # A worker that has nothing to do is kept while others hold shards, which may come back.
                if is_read and not self._again and not any(hand.held for hand in self._hands):
                    break
                self._listen()
            for hand in self._hands:
                _tell(hand, None)
            while any(not hand.is_over for hand in self._hands):
                self._listen(may_restart=False)
        return self._times

    def _give(self, hand: _Hand, job: ShardJob) -> None:
        hand.is_idle = False
        hand.held[job.number] = job
        _tell(hand, job)

    def _listen(self, *, may_restart: bool = True) -> None:
        alive = {hand.connection: hand for hand in self._hands if not hand.is_over}
        for connection in wait(list(alive)):
            hand = alive[connection]  # type: ignore[index]
            try:
                message = hand.connection.recv()
            except (EOFError, OSError):
                self._bury(hand, may_restart=may_restart)
                continue
            self._hear(hand, *message)

    def _hear(self, hand: _Hand, word: str, *rest: Any) -> None:
        if word == "ready":
            if not hand.has_begun:
                self._times.loading += time.perf_counter() - hand.told
            hand.has_begun = hand.is_idle = True
        elif word == "advance":
            self._on_advance(*rest)
        elif word == "done":
            (shard,) = rest
            self._deaths.pop(-1, None)
            self._on_shard(hand.held.pop(shard.number), shard)
        elif word == "over":
            hand.is_over = True
            self._times.add(*rest)
        elif word == "fault":
            raise RecordFault(*rest)
        elif word == "refused":
            raise InputError(*rest)
        elif word == "failed":
            raise OSError(*rest)
        else:
            raise RuntimeError(*rest)

    def _bury(self, hand: _Hand, *, may_restart: bool) -> None:
        """Takes back what a dead worker held, and puts a new one in its place."""
        status = hand.process.wait()
        hand.connection.close()
        self._again.extend(hand.held.values())
        # The oldest is the one it was computing or writing; the one behind it was only waiting.
        if hand.held:
            job = next(iter(hand.held.values()))
            self._deaths[job.number] += 1
            if self._deaths[job.number] == _MOST_DEATHS:
                raise RecordFault(job.entries[0].record, _given_up(job, status))
        elif may_restart and not hand.has_begun:
            self._deaths[-1] += 1
            if self._deaths[-1] == _MOST_DEATHS:
                message = f"workers die before they have done anything ({_in_words(status)})"
                raise InputError(message)
        if may_restart:
            self.restarts += 1
            place = self._hands.index(hand)
            self._hands[place] = _start(self._threads)
            _begin(self._hands[place], self._plans[place])
        else:
            hand.is_over = True


def _start(threads: int) -> _Hand:
    ours, theirs = Pipe()
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, "-m", "protnest.engine.shard_worker", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    theirs.close()
    return _Hand(process, ours)


def _begin(hand: _Hand, plan: WorkerPlan) -> None:
    hand.told = time.perf_counter()
    _tell(hand, plan)


def _tell(hand: _Hand, message: object) -> None:
    try:
        hand.connection.send(message)
    except OSError:
        pass  # It is dead, which the next look at its connection finds.


def _await_earlier_workers(folder: Path) -> None:
    """Waits for workers of a run that was killed a moment ago: two must not write the same file."""
    until = time.monotonic() + _PATIENCE_S
    with (folder / WORKERS_LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > until:
                    message = "workers of an earlier run are still writing to this folder"
                    raise InputError(message, file=folder) from error
                time.sleep(0.05)
            else:
                return


def _given_up(job: ShardJob, status: int) -> str:
    last = job.entries[-1].record
    return (
        f"{_MOST_DEATHS} workers died ({_in_words(status)}) over the shard from here to record {last.index + 1} "
        f"({last.id}): too little memory? Fewer --workers or a smaller --max-tokens need less"
    )


def _in_words(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
