"""What tests of trainings share: one thread, and a command line that leaves logging as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads decide the order of sums, and so the bits; and on tensors this small a second one gains nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command() -> Iterator[CliRunner]:
    """The command line configures logging, as a program may; here it is put back."""
    loggers = [logging.getLogger(name) for name in ("protnest", "protnest.kernels")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield CliRunner()
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
