"""Several processes that train the same weights, each on its own share of every step; started by torchrun.

    torchrun --nproc-per-node 4 -m protnest.engine.cli distill ...                  # each GPU holds all weights (DDP)
    torchrun --nproc-per-node 4 -m protnest.engine.cli distill ... --shard fsdp2    # each holds a share of them

P processes give the weights of one that accumulates P times as many portions, up to the order of sums. The first
process alone writes files, judges and talks.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..engine.errors import InputError

SHARDS = ("ddp", "fsdp2")


class Processes:
    """Who trains together; by default one process by itself.

    Args:
        rank: which of them this one is, from 0.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def spread(self, model: nn.Module, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`forward`, which runs `model`, such that gradients become the mean over all processes."""
        return forward

    def holding_back(self, forward: Callable[[Any], Any]) -> AbstractContextManager[object]:
        """Within it gradients stay with this process."""
        return contextlib.nullcontext()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes of a tensor on the CPU."""
        return values

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        """A number that may be spread over the processes, put together."""
        return value

    def wait(self) -> None:
        """Until all are here."""

    def states(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """State of model and optimiser, whole; all processes call it."""
        return model.state_dict(), optimiser.state_dict()

    def load(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, states: tuple[dict[str, Any], dict[str, Any]]
    ) -> tuple[list[str], list[str]]:
        """Sets both to what `states` gave; the model's tensors that were missing, and those unexpected."""
        missing, unexpected = model.load_state_dict(states[0], strict=False)
        optimiser.load_state_dict(states[1])
        return missing, unexpected

    def whole_model(self, model: nn.Module) -> nn.Module:
        """The model with all its weights; all processes call it."""
        return model


ALONE = Processes()


class _Step(nn.Module):
    """A training step's forward pass as a module, so that torch sees every use of the weights."""

    def __init__(self, model: nn.Module, forward: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._run = forward

    def forward(self, portion: Any) -> Any:
        return self._run(portion)


class Replicas(Processes):
    """Every process holds all weights: torch's DistributedDataParallel."""

    def spread(self, model: nn.Module, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return nn.parallel.DistributedDataParallel(_Step(model, forward))

    def holding_back(self, forward: Callable[[Any], Any]) -> AbstractContextManager[object]:
        assert isinstance(forward, nn.parallel.DistributedDataParallel)
        return forward.no_sync()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        total = values.to(device)
        dist.all_reduce(total)
        return total.cpu()

    def wait(self) -> None:
        dist.barrier()


class Shares(Replicas):
    """Every process holds a share of each layer's weights, gradients and moments: torch's fully_shard."""

    _blank: nn.Module

    def spread(self, model: nn.Module, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        from torch.distributed.fsdp import fully_shard

        # fully_shard changes the class of what it is given; a copy of the model as it was takes the whole weights.
        self._blank = copy.deepcopy(model).to("meta")
        step = _Step(model, forward)
        for layer in model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(step)
        return step

    @contextlib.contextmanager
    def holding_back(self, forward: Callable[[Any], Any]) -> Iterator[None]:
        forward.set_requires_gradient_sync(False)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            forward.set_requires_gradient_sync(True)  # type: ignore[attr-defined]

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        return found

    def states(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        return get_state_dict(model, optimiser, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, states: tuple[dict[str, Any], dict[str, Any]]
    ) -> tuple[list[str], list[str]]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True, strict=False)
        found = set_state_dict(
            model, optimiser, model_state_dict=states[0], optim_state_dict=states[1], options=options
        )
        return list(found.missing_keys), list(found.unexpected_keys)

    def whole_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.is_first:
            self._blank.load_state_dict(state, assign=True)
        return self._blank


@contextlib.contextmanager
def joined_processes(device: torch.device, shard: str = "ddp") -> Iterator[Processes]:
    """The processes that torchrun started, or this one by itself.

    Args:
        device: where they train: nccl joins GPUs, gloo CPUs.
        shard: "ddp" or "fsdp2".

    Raises:
        InputError: `shard` is unknown.
    """
    if shard not in SHARDS:
        message = f"shard is {shard!r}; allowed: {', '.join(SHARDS)}"
        raise InputError(message)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        kind = Replicas if shard == "ddp" else Shares
        yield kind(rank=dist.get_rank(), world=dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Under torchrun, the GPU of this process where "cuda" was meant; else the device itself."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
