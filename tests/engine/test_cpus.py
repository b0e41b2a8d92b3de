"""How many processors are usable: affinity, quotas of both versions of control groups, and what is asked of OpenMP."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from protnest.engine import cpus
from protnest.engine.cpus import limit_threads, memory_nodes, usable_cpus


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 64),
        ({"cpu.max": "nonsense"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.max": "500000 100000", "cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
@pytest.mark.usefixtures("many_cpus")
def test_quotas(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n", "utf-8")
    assert usable_cpus(tmp_path) == expected


def test_this_process_may_use_what_it_may_run_on() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("usable", "before", "after"), [(2, None, "2"), (64, None, None), (2, "8", "8")], ids=["quota", "all", "user's"]
)
@pytest.mark.usefixtures("many_cpus")
def test_openmp_is_asked_for_as_many(
    monkeypatch: pytest.MonkeyPatch, usable: int, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(cpus, "usable_cpus", lambda: usable)
    monkeypatch.setenv("OMP_NUM_THREADS", before or "")
    if before is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == after


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({}, [tuple(range(64))]),
        ({"node0": "0-63"}, [tuple(range(64))]),
        (
            {"node0": "0-15,32-47", "node1": "16-31,48-63"},
            [(*range(16), *range(32, 48)), (*range(16, 32), *range(48, 64))],
        ),
        # Node 10 after node 2, memory without processors, and processors that this process may not use.
        ({"node10": "2,3", "node2": "0-1", "node3": "", "node4": "64-99"}, [(0, 1), (2, 3)]),
        ({"node0": "nonsense"}, [tuple(range(64))]),
    ],
)
@pytest.mark.usefixtures("many_cpus")
def test_processors_by_socket(tmp_path: Path, lists: dict[str, str], expected: list[tuple[int, ...]]) -> None:
    for node, text in lists.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(text + "\n")
    assert memory_nodes(tmp_path) == expected
