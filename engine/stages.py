"""The stages that shards go through: read, embedded, written; each at its own pace, none far ahead of the next.

One shard is read ahead while the model has another, and no more are ever held. A GPU does not wait for the disk,
either: it embeds a shard while the one before is being written, and a kill costs up to two. On a CPU, where flushing a
shard to the disk takes some hundredths of a second and embedding it seconds, a kill costs only the shard that is being
embedded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from .shard_job import ShardJob

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(kw_only=True)
class StageTimes:
    """Where the wall time went, in seconds; of several workers added up, so that what all wait for counts for each.

    Attributes:
        loading: making the embedder; of a process of its own, until it asks for its first shard.
        checking: the first reading, before anything ran.
        model: embedding.
        awaiting_reader: the model had nothing to do, since the next shard was not read yet.
        awaiting_writer: the same, since the shard before had not been written yet.
        finishing: merging the index.
    """

    loading: float = 0.0
    checking: float = 0.0
    model: float = 0.0
    awaiting_reader: float = 0.0
    awaiting_writer: float = 0.0
    finishing: float = 0.0

    def add(self, other: StageTimes) -> None:
        """Adds another's times to these."""
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + seconds)


def run_stages(
    jobs: Iterator[ShardJob],
    embed: Callable[[ShardJob], Arrays],
    write: Callable[[ShardJob, Arrays], None],
    *,
    writes_behind: bool,
) -> StageTimes:
    """Takes jobs, embeds each in the calling thread, and has them read and written by two others, in order.

    Args:
        jobs: what there is to do.
        embed: gives a shard's tensors.
        write: writes and lists a shard.
        writes_behind: begin with a shard before the last one is written.

    An error of any stage ends the run, after what is being written is written. It is raised here.
    """
    times = StageTimes()
    with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
        ahead = reader.submit(next, jobs, None)
        behind: Future[None] | None = None
        clock = _Clock()
        while (job := ahead.result()) is not None:
            times.awaiting_reader += clock.lap()
            ahead = reader.submit(next, jobs, None)
            arrays = embed(job)
            times.model += clock.lap()
            if behind is not None:
                behind.result()
            times.awaiting_writer += clock.lap()
            behind = writer.submit(write, job, arrays)
            del arrays
            if not writes_behind:
                behind.result()
                times.awaiting_writer += clock.lap()
        times.awaiting_reader += clock.lap()
        if behind is not None:
            behind.result()
        times.awaiting_writer += clock.lap()
    return times


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        last, self._last = self._last, now
        return now - last
