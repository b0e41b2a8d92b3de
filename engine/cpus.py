"""How many of the machine's processors this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_NODES = Path("/sys/devices/system/node")


def usable_cpus(cgroups: Path = _CGROUPS) -> int:
    """Processors that this process may run on and has time for: a container on 64 cores may have paid for two.

    The affinity of the process, and the quotas of its control groups (Linux, versions 1 and 2), rounded up. Threads
    beyond that number wait for each other while none runs.

    Args:
        cgroups: where control groups are mounted.
    """
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroups)
    return max(1, affine if math.isinf(quota) else min(affine, math.ceil(quota)))


def memory_nodes(nodes: Path = _NODES) -> list[tuple[int, ...]]:
    """Processors that this process may run on, by the memory that they are next to, which is to say by socket.

    One group of all where the machine does not say (other systems than Linux, some containers).

    Args:
        nodes: where the kernel lists them.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    lists = sorted(nodes.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:]))
    groups = [tuple(sorted(usable & _parse_list(" ".join(_words(path))))) for path in lists]
    return [group for group in groups if group] or [tuple(sorted(usable))]


def _parse_list(text: str) -> set[int]:
    """The numbers of a list as the kernel writes it: 0-3,8-11."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.strip().isdigit():
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def limit_threads() -> None:
    """Asks libraries that are loaded from now on for as many threads as there are usable processors.

    They would take all of the machine's, which a quota then stops for most of the time. OMP_NUM_THREADS, where it is
    set already, is the user's choice and stays.
    """
    usable = usable_cpus()
    if "OMP_NUM_THREADS" not in os.environ and usable < (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = str(usable)


def _quota(cgroups: Path) -> float:
    """Processors' worth of time; infinity where nothing limits it."""
    quotas = [math.inf]
    for folder in _own_groups(cgroups):
        quotas += [_version_2(folder / "cpu.max"), _version_1(folder)]
    return min(quotas)


def _own_groups(cgroups: Path) -> list[Path]:
    """The group's folder and those above it: a limit on any of them holds. In a container its own is the root."""
    folders = [cgroups, cgroups / "cpu", cgroups / "cpu,cpuacct"]
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = cgroups / controllers if controllers else cgroups
        group = root / path.lstrip("/")
        folders += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return folders


def _version_2(file: Path) -> float:
    words = _words(file)
    if len(words) != 2 or not words[0].isdigit() or not words[1].isdigit():
        return math.inf  # "max", or no such file
    return int(words[0]) / max(int(words[1]), 1)


def _version_1(folder: Path) -> float:
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    if len(quota) != 1 or len(period) != 1 or not quota[0].isdigit() or not period[0].isdigit():
        return math.inf  # -1 is no limit
    return int(quota[0]) / max(int(period[0]), 1)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").split()
    except OSError:
        return []
