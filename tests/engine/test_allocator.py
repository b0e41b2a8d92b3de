"""Freed memory stays with the process once that is asked for; in processes of their own, since it cannot be unasked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from protnest.engine import allocator

_FAULTS = """
import resource, sys
import torch
from protnest.engine.allocator import keep_memory

def work():
    blocks = [torch.ones(16 << 20) for _ in range(4)]
    return sum(float(block[0]) for block in blocks)

if sys.argv[1] == "keep":
    assert keep_memory()
for _ in range(6):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(word: str) -> int:
    done = subprocess.run([sys.executable, "-c", _FAULTS, word], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_memory_is_kept() -> None:
    pages = 4 * (64 << 20) // 4096
    assert _faults("leave") > pages // 2, "the C library keeps memory by itself: nothing is left to test"
    assert _faults("keep") < pages // 8


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_memory()


def test_other_c_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_memory()
