"""Workers on a Ray cluster: how many, what each has, and what runs on the nodes while the driver looks on.

The one file that imports Ray, and only when it is asked to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .cpus import usable_cpus
from .embedder_plan import EmbedderPlan
from .errors import InputError
from .library_settings import EmbedderFacts

_OBJECT_STORE_BYTES = 256 << 20
"""Of a cluster that is started here. Only records and reports of blocks lie in it, some hundred kB each."""


def check_ray() -> None:
    """Raises InputError if Ray Data is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("ray", "pandas")):
        message = "--engine ray needs Ray Data: pip install 'protnest[ray]'"
        raise InputError(message)


_MOST_STARTS = 3
"""Ray gives a node half a minute to come up, which a busy machine may not."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What each of several workers has.

    Attributes:
        workers: how many.
        cpus: processors of each.
        gpus: of each, 0 or 1.
    """

    workers: int
    cpus: int = 1
    gpus: int = 0

    @property
    def remote(self) -> dict[str, int]:
        """What Ray is asked for."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


def place_workers(nodes: list[tuple[int, int]], *, device: str, workers: int | None) -> Placement:
    """Shares a cluster out: a GPU a worker where there are some, else as many processors as each can have.

    Args:
        nodes: (processors, GPUs) of each.
        device: "auto", "cpu" or "cuda".
        workers: how many; None for one a GPU, and without GPUs one a node.

    Raises:
        InputError: the cluster has too little for so many.
    """
    gpus = sum(gpus for _, gpus in nodes)
    if device == "cuda" or (device == "auto" and gpus):
        if not 1 <= (workers or gpus) <= gpus:
            message = f"{workers or 1} workers need a GPU each, the cluster has {gpus}"
            raise InputError(message)
        return Placement(workers=workers or gpus, gpus=1)
    if device not in ("auto", "cpu"):
        message = f"device is {device!r}; with --engine ray allowed: auto, cpu, cuda: Ray says which one"
        raise InputError(message)
    processors = [cpus for cpus, _ in nodes if cpus]
    count = workers or max(1, len(processors))
    for each in range(max(processors, default=0), 0, -1):
        if sum(cpus // each for cpus in processors) >= count:
            return Placement(workers=count, cpus=each)
    message = f"{count} workers need a processor each, the cluster has {sum(processors)}"
    raise InputError(message)


def start_local(cpus: int) -> str:
    """Starts a cluster of this machine alone, for this process, and returns its address.

    Raises:
        InputError: it does not come up.
    """
    # Where nobody has said otherwise, nothing is told to anyone outside; and Ray's C++ side does not write warnings
    # to standard error about how its Python side calls it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    for attempt in range(_MOST_STARTS):
        try:
            context = ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except Exception as error:
            ray.shutdown()
            if attempt == _MOST_STARTS - 1:
                message = f"Ray does not start on this machine: {error}"
                raise InputError(message) from error
        else:
            return str(context.address_info["gcs_address"])
    raise AssertionError


@contextlib.contextmanager
def on_cluster() -> Iterator[list[tuple[int, int]]]:
    """Connects to the cluster that RAY_ADDRESS names, or starts one of this machine, which ends with the context.

    Yields:
        (processors, GPUs) of each node.
    """
    import ray

    was_there = ray.is_initialized()
    if not was_there:
        before = signal.getsignal(signal.SIGTERM)
        if "RAY_ADDRESS" in os.environ:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        else:
            start_local(usable_cpus())
        if threading.current_thread() is threading.main_thread():
            # What a signal means to the program is not for a library of its to say.
            signal.signal(signal.SIGTERM, before)
    try:
        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in found]
    finally:
        if not was_there:
            ray.shutdown()


def find_facts(plan: EmbedderPlan, placement: Placement) -> EmbedderFacts:
    """Makes the embedder where a worker will be, and tells what is known of it then.

    Raises:
        InputError: it cannot be made there.
    """
    import ray

    with _told():
        facts: EmbedderFacts = ray.get(ray.remote(_facts).options(**placement.remote).remote(plan))
    return facts


def _facts(plan: EmbedderPlan) -> EmbedderFacts:
    return EmbedderFacts.of(plan.make())


def map_blocks(
    read: Callable[[], Iterator[pa.Table]], worker: type, arguments: dict[str, Any], placement: Placement
) -> Iterator[dict[str, Any]]:
    """Reads tables of one row each, on the driver's node and never far ahead, and has workers take one at a time.

    A worker that dies is replaced, and what it had is done again, as often as it takes. Rows come in whatever order
    they are done.

    Args:
        read: gives the tables, the same ones each time.
        worker: makes of a table of one row another.
        arguments: of its making.
        placement: of the workers.

    Raises:
        InputError: the reader or a worker's making raised it, or Ray gave up.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Less than any row has: Ray cuts and joins blocks by size, and here each row shall be one.
    context.target_max_block_size = 1
    with _told(), ray.data.DataContext.current(context):
        tables = ray.data.read_datasource(_datasource(read), num_cpus=0, override_num_blocks=1)
        reports = tables.map_batches(
            worker,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs=arguments,
            # One in work, one waiting: so a worker never waits for the driver.
            compute=ray.data.ActorPoolStrategy(size=placement.workers, max_tasks_in_flight_per_actor=2),
            **placement.remote,
        )
        yield from reports.iter_rows()


def _datasource(read: Callable[[], Iterator[pa.Table]]) -> Any:
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    class Blocks(Datasource):  # type: ignore[misc, unused-ignore]
        """One task that gives block after block: a compressed file cannot be read from its middle."""

        @property
        def supports_distributed_reads(self) -> bool:
            return False

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, **_: Any) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read, unknown, per_task_row_limit=per_task_row_limit)]

    return Blocks()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What Ray wraps and raises, as the error that lies in it."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, InputError) as error:
        cause: Any = error
        while cause is not None:
            if type(cause) is InputError:
                raise cause from None
            cause = getattr(cause, "cause", None) or cause.__cause__
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        message = f"Ray gave up ({type(error).__name__}: {reason.strip()[:300]}); what is finished stays"
        raise InputError(message) from error
