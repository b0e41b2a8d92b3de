"""The stages of a run: their order, their pace, and their errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from protnest.engine.shard_job import ShardJob
from protnest.engine.stages import Arrays, StageTimes, run_stages

JOBS = 6


def _jobs(log: list[str], fail_at: int | None = None) -> Iterator[ShardJob]:
    for number in range(JOBS):
        if number == fail_at:
            message = "read"
            raise OSError(message)
        log.append(f"read {number}")
        yield ShardJob(number, 0, [])


def _embed(job: ShardJob) -> Arrays:
    return {"embeddings": np.full((1, 1), job.number)}


@pytest.mark.parametrize("writes_behind", [False, True])
def test_all_are_written_in_order(writes_behind: bool) -> None:
    log: list[str] = []
    written: list[tuple[int, float]] = []

    def write(job: ShardJob, arrays: Arrays) -> None:
        written.append((job.number, float(arrays["embeddings"][0, 0])))

    times = run_stages(_jobs(log), _embed, write, writes_behind=writes_behind)
    assert written == [(number, float(number)) for number in range(JOBS)]
    assert times.model > 0


def test_one_is_read_ahead_and_no_more() -> None:
    log: list[str] = []

    def embed(job: ShardJob) -> Arrays:
        time.sleep(0.05)
        assert log[-1] == f"read {min(job.number + 1, JOBS - 1)}"
        return _embed(job)

    run_stages(_jobs(log), embed, lambda job, arrays: None, writes_behind=False)


@pytest.mark.parametrize("writes_behind", [False, True])
def test_whether_the_model_waits_for_the_disk(writes_behind: bool) -> None:
    """On a GPU it has begun with the next shard while one is written, and never with the one after that."""
    begun: list[int] = []
    second = threading.Event()
    seen: list[int] = []

    def embed(job: ShardJob) -> Arrays:
        begun.append(job.number)
        if job.number == 1:
            second.set()
        return _embed(job)

    def write(job: ShardJob, arrays: Arrays) -> None:
        if job.number == 0:
            second.wait(timeout=2 if writes_behind else 0.1)
        time.sleep(0.02)
        seen.append(begun[-1] - job.number)

    times = run_stages(_jobs([]), embed, write, writes_behind=writes_behind)
    assert seen[0] == (1 if writes_behind else 0)
    assert max(seen) == (1 if writes_behind else 0)
    assert times.awaiting_writer > 0.05


def test_a_slow_reader_is_seen() -> None:
    def jobs() -> Iterator[ShardJob]:
        for number in range(3):
            time.sleep(0.05)
            yield ShardJob(number, 0, [])

    times = run_stages(jobs(), _embed, lambda job, arrays: None, writes_behind=True)
    assert times.awaiting_reader > 0.1
    assert times.model < 0.05


def test_errors_of_each_stage_end_the_run() -> None:
    written: list[int] = []

    def write(job: ShardJob, arrays: Arrays) -> None:
        if job.number == 3:
            message = "written"
            raise OSError(message)
        written.append(job.number)

    def embed(job: ShardJob) -> Arrays:
        if job.number == 4:
            message = "embedded"
            raise ValueError(message)
        return _embed(job)

    with pytest.raises(OSError, match="read"):
        run_stages(_jobs([], fail_at=2), _embed, write, writes_behind=False)
    assert written == [0, 1]
    written.clear()
    with pytest.raises(OSError, match="written"):
        run_stages(_jobs([]), _embed, write, writes_behind=True)
    assert written == [0, 1, 2]
    written.clear()
    with pytest.raises(ValueError, match="embedded"):
        run_stages(_jobs([]), embed, lambda job, arrays: written.append(job.number), writes_behind=True)
    assert written == [0, 1, 2, 3]


def test_times_add_up() -> None:
    times = StageTimes(model=1.0, checking=0.5)
    times.add(StageTimes(model=2.0, awaiting_writer=0.25))
    assert (times.model, times.checking, times.awaiting_writer) == (3.0, 0.5, 0.25)
