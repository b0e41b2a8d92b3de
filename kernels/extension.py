"""Loads `protnest.kernels._C`, the C++ twins, once; or tells why they are missing.

Without the extension (no compiler at installation) the Python twins run, with the same results to the last bit. Set the
environment variable PROTNEST_NO_EXTENSION=1 before the first call to run them although it is there; unset, empty and
`0` leave it on. It is read once per process.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

IMPLS = ("auto", "reference", "cpu")
"""What operations with a C++ twin accept as `impl`."""

_SWITCH = "PROTNEST_NO_EXTENSION"
_logger = logging.getLogger(__name__)


@functools.cache
def _load_once() -> tuple[ModuleType | None, str | None]:
    """The extension and None, or None and the reason."""
    switch = os.environ.get(_SWITCH, "")
    if switch not in ("", "0"):
        return None, f"{_SWITCH}={switch} is set"
    # On Linux the extension's threads are OpenMP's, whose runtime torch brings along: loaded first, it is found where
    # the system has none, and both share its threads.
    import torch  # noqa: F401

    try:
        return importlib.import_module("._C", __package__), None
    except ImportError as error:
        return None, f"the C++ extension does not load (built without a compiler?): {error}"


def load() -> ModuleType | None:
    """The extension module; None when it is missing, see `missing_reason`."""
    return _load_once()[0]


def missing_reason() -> str | None:
    """Why `load` gives None, in one line; None when the extension is there."""
    return _load_once()[1]


def select(operation: str, impl: str) -> ModuleType | None:
    """Decides which twin runs `operation`.

    Args:
        operation: its name, for messages.
        impl: `auto` takes the extension where it loads and logs its choice once per operation, as a warning where the
            extension is missing unasked, since that path is slower (6 times in `tokenise`, 60 in `plan_batches`);
            `reference` and `cpu` (the extension) run or raise.

    Returns:
        The extension module, or None for the reference.

    Raises:
        ValueError: `impl` is none of `IMPLS`.
        RuntimeError: `cpu` was named and the extension is missing.
    """
    if impl not in IMPLS:
        message = f"{operation}: impl is {impl!r}, allowed are {', '.join(map(repr, IMPLS))}"
        raise ValueError(message)
    if impl == "reference":
        return None
    module = load()
    if impl == "cpu" and module is None:
        message = f"{operation}: impl='cpu' cannot run: {missing_reason()}"
        raise RuntimeError(message)
    if impl == "auto":
        _log_choice(operation)
    return module


@functools.cache
def _log_choice(operation: str) -> None:
    reason = missing_reason()
    if reason is None:
        _logger.info("%s: auto runs the C++ extension", operation)
    else:
        level = logging.INFO if reason.startswith(_SWITCH) else logging.WARNING
        _logger.log(level, "%s: auto runs the Python reference: %s", operation, reason)
