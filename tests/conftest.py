"""What every test shares: the code under test is the one that was asked for, and torch runs on one thread."""

from __future__ import annotations

import os
from pathlib import Path

import protnest.engine
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    wheel = os.environ.get("PROTNEST_WHEEL")
    home = Path(protnest.engine.__file__).resolve()
    if wheel is not None and not home.is_relative_to(Path(wheel).resolve()):
        message = f"the suite was to run against the wheel in {wheel}, but protnest comes from {home}"
        raise pytest.UsageError(message)
    # Two threads that wait for each other on a busy machine are seven times slower than one.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
