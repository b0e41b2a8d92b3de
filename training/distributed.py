"""Several processes that train the same weights, each on its own share of every step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Processes:
    """Who trains together.

    Attributes:
        rank: which of them this one is, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def spread(self, model: nn.Module, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`forward`, such that its gradients become the mean over all processes."""
        return forward

    def holding_back(self, forward: Callable[[Any], Any], *, unless: bool) -> AbstractContextManager[object]:
        """Keeps gradients to this process until the last portion of a step."""
        return contextlib.nullcontext()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, fp64 on the CPU."""
        return values

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        """A number that may be spread over the processes, put together."""
        return value


ALONE = Processes()
