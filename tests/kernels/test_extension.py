"""Loading the C++ extension, doing without it, and the names that protnest.kernels exports."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from protnest.kernels import extension

LOGGER = "protnest.kernels.extension"
needs_extension = pytest.mark.skipif(extension.load() is None, reason=f"cpu: {extension.missing_reason()}")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The state of a new process, and the true one again afterwards."""
    monkeypatch.delenv("PROTNEST_NO_EXTENSION", raising=False)
    extension._load_once.cache_clear()
    extension._log_choice.cache_clear()
    yield monkeypatch
    extension._load_once.cache_clear()
    extension._log_choice.cache_clear()


def _run(code: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def _without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, package: str | None = None) -> ModuleType:
        raise ImportError(f"{package}{name}: undefined symbol")  # noqa: EM102

    monkeypatch.setattr(importlib, "import_module", refuse)


def test_switch_makes_auto_run_the_twins_and_cpu_raise() -> None:
    code = """
import sys
import numpy as np
from protnest.kernels import plan_batches, tokenise
from protnest.kernels.extension import load, missing_reason
from protnest.kernels.tokenise import tokenise_reference

assert load() is None and missing_reason() == "PROTNEST_NO_EXTENSION=1 is set", missing_reason()
table = np.arange(256, dtype=np.uint8)
order, batch_offsets = plan_batches([3, 1, 2], 4)
assert (order.tolist(), batch_offsets.tolist()) == ([0, 1, 2], [0, 2, 3])
tokens_T, cu_seqlens_B1 = tokenise([b"A"], table, bos=0, eos=2)
assert (tokens_T.tolist(), cu_seqlens_B1.tolist()) == ([0, 65, 2], [0, 3])
for call in (lambda: plan_batches([1], 4, impl="cpu"), lambda: tokenise([b"A"], table, bos=0, eos=2, impl="cpu")):
    try:
        call()
    except RuntimeError as error:
        print(error)
print("protnest.kernels._C" in sys.modules)
"""
    assert _run(code, PROTNEST_NO_EXTENSION="1").splitlines() == [
        "plan_batches: impl='cpu' cannot run: PROTNEST_NO_EXTENSION=1 is set",
        "tokenise: impl='cpu' cannot run: PROTNEST_NO_EXTENSION=1 is set",
        "False",
    ]


@needs_extension
@pytest.mark.parametrize("value", ["", "0"])
def test_switch_left_off(fresh: pytest.MonkeyPatch, value: str) -> None:
    fresh.setenv("PROTNEST_NO_EXTENSION", value)
    module = extension.load()
    assert module is not None
    assert module.__name__ == "protnest.kernels._C"
    assert extension.missing_reason() is None


def test_one_that_does_not_load_gives_the_reason(fresh: pytest.MonkeyPatch) -> None:
    _without_extension(fresh)
    assert extension.load() is None
    reason = extension.missing_reason()
    assert reason is not None
    assert "protnest.kernels._C: undefined symbol" in reason
    with pytest.raises(RuntimeError, match=r"plan_batches: impl='cpu' cannot run: .*undefined symbol"):
        extension.select("plan_batches", "cpu")
    assert extension.select("plan_batches", "auto") is None


def test_other_errors_are_not_swallowed(fresh: pytest.MonkeyPatch) -> None:
    def fail(name: str, package: str | None = None) -> ModuleType:
        raise OSError(name)

    fresh.setattr(importlib, "import_module", fail)
    with pytest.raises(OSError, match="_C"):
        extension.load()


@needs_extension
def test_auto_logs_its_choice_once(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    for _ in range(2):
        extension.select("plan_batches", "auto")
        extension.select("plan_batches", "cpu")
        extension.select("plan_batches", "reference")
    assert caplog.record_tuples == [(LOGGER, logging.INFO, "plan_batches: auto runs the C++ extension")]


def test_auto_warns_only_when_missing_unasked(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    fresh.setenv("PROTNEST_NO_EXTENSION", "1")
    assert extension.select("tokenise", "auto") is None
    fresh.delenv("PROTNEST_NO_EXTENSION")
    extension._load_once.cache_clear()
    extension._log_choice.cache_clear()
    _without_extension(fresh)
    assert extension.select("tokenise", "auto") is None
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    assert "undefined symbol" in caplog.messages[1]


def test_unknown_impl() -> None:
    with pytest.raises(ValueError, match="tokenise: impl is 'gpu', allowed are 'auto', 'reference', 'cpu'"):
        extension.select("tokenise", "gpu")


@pytest.mark.parametrize("name", ["plan_batches", "tokenise"])
@pytest.mark.parametrize(
    "before",
    [
        "",
        "import protnest.kernels.{name}",
        "from protnest.kernels.{name} import {name}_reference",
        "import importlib; importlib.import_module('protnest.kernels.{name}')",
    ],
)
def test_the_package_exports_functions_not_files(name: str, before: str) -> None:
    code = f"{before.format(name=name)}\nfrom protnest.kernels import {name}\nprint(type({name}).__name__)"
    assert _run(code).strip() == "function"


def test_importing_loads_no_extension() -> None:
    assert _run("import sys, protnest.kernels; print('protnest.kernels._C' in sys.modules)").strip() == "False"
