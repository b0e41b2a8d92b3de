"""When to stop, and the best weights so far: on disk, where they cost no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..engine.atomic import write_atomically
from ..engine.errors import InputError

BEST_FILE = "best.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run with early stopping stands; epoch 0 is the model before any step.

    Attributes:
        losses: of validation, after each epoch, from epoch 0.
        best_epoch: the first of those with the least loss.
        patience: epochs without a smaller loss after which the run stops.
    """

    losses: tuple[float, ...] = ()
    best_epoch: int = 0
    patience: int

    @property
    def should_stop(self) -> bool:
        return len(self.losses) - 1 - self.best_epoch >= self.patience

    def after(self, loss: float) -> Progress:
        """With the loss of one more epoch."""
        losses = (*self.losses, loss)
        best = len(self.losses) if not self.losses or loss < self.losses[self.best_epoch] else self.best_epoch
        return Progress(losses=losses, best_epoch=best, patience=self.patience)

    @property
    def improved(self) -> bool:
        """Whether the last epoch is the best one."""
        return self.best_epoch == len(self.losses) - 1

    def state(self) -> dict[str, Any]:
        """For a trainer's `extra`."""
        return {**asdict(self), "losses": list(self.losses)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        return cls(**{**state, "losses": tuple(state["losses"])})


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


def save_best(model: nn.Module, folder: Path) -> None:
    """Writes the weights that are trained.

    Raises:
        InputError: the disk is full, or the like.
    """
    tensors = {name: each.cpu().contiguous() for name, each in _trained(model).items()}
    _guarded(folder / BEST_FILE, lambda path: save_file(tensors, path))


def _guarded(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write_atomically(path, write)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        message = f"cannot be written ({reason}); the last checkpoint of the run is kept"
        raise InputError(message, file=path) from error


@torch.no_grad()
def load_best(model: nn.Module, folder: Path) -> None:
    """Sets the weights that are trained to the best ones.

    Raises:
        InputError: they are not there, or another model's.
    """
    path = folder / BEST_FILE
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        message = f"the best weights cannot be read ({error})"
        raise InputError(message, file=path) from error
    trained = _trained(model)
    if found.keys() != trained.keys():
        message = f"holds the weights of another model: {', '.join(sorted(found.keys() ^ trained.keys())[:3])}"
        raise InputError(message, file=path)
    for name, tensor in trained.items():
        tensor.copy_(found[name])
