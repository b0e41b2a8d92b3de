"""Every Triton kernel compiles for every chip, within its shared memory and without spilling registers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from protnest.benchmarks.ahead_of_time import (
    KERNEL_FILES,
    SHARED_LIMIT_BYTES,
    Compiled,
    compile_launch,
    find_launches,
)

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]


def test_every_kernel_file_is_listed() -> None:
    files = {path.stem for path in (ROOT / "kernels" / "gpu").glob("*.py")} - {"__init__", "launch"}
    assert set(KERNEL_FILES) == files


@pytest.mark.skipif("PROTNEST_WHEEL" in os.environ, reason="the wheel's kernels are the checkout's, compiled already")
@pytest.mark.parametrize("chip", SHARED_LIMIT_BYTES)
def test_kernels_fit(chip: str) -> None:
    faults = {}
    for name, launch in find_launches().items():
        compiled = compile_launch(name, launch, chip)
        assert compiled.registers > 0
        if compiled.faults:
            faults[name] = compiled.faults
    assert not faults


def test_faults_are_named() -> None:
    compiled = Compiled("kernel", "sm_86", shared_bytes=101377, registers=255, stack_bytes=48)
    assert compiled.faults == ["101377 bytes of shared memory, 101376 allowed", "48 bytes of registers spilt"]
    assert not Compiled("kernel", "sm_90", shared_bytes=101377, registers=255, stack_bytes=0).faults


def test_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="cannot compile"):
        compile_launch("kernel", None, "sm_86")


def test_unknown_chip_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "ahead_of_time.py", "--chips", "sm_75"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert "sm_75" in done.stderr
