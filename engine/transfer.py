"""Between host and GPU without waiting: inputs through pinned memory, results fetched while the next batch runs.

Pageable memory makes every copy wait until the GPU has done all that was asked of it before. Pinned buffers come from
torch's own cache, which hands a buffer out again only when the copy that used it is done. At most two batches' results
are on their way at a time: so two batches' inputs and results alternate in the same buffers, and the host runs no
further ahead than that. On a CPU nothing is copied and nothing waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

_MOST_UNDERWAY = 2
# Pinned memory is taken from everybody on the machine. A copy as large takes so long that waiting for it costs little.
_MOST_PINNED_BYTES = 1 << 28


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, without waiting for the copy; the tensor itself where it is there already."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Copy:
    """A copy to the host that has been asked for: valid once `arrived` is."""

    host: torch.Tensor
    arrived: torch.cuda.Event

    def wait(self) -> Array:
        self.arrived.synchronize()
        array: Array = self.host.numpy()
        return array


def _begin_copy(tensor: torch.Tensor) -> _Copy:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.device(tensor.device):
        host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
    return _Copy(host, arrived)


def _is_worth_it(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and tensor.nbytes <= _MOST_PINNED_BYTES


class Arrivals:
    """Results on their way to the host; each is used in the order in which it was expected."""

    def __init__(self) -> None:
        self._underway: deque[tuple[_Copy, Callable[[Array], None]]] = deque()

    def expect(self, tensor: torch.Tensor, use: Callable[[Array], None]) -> None:
        """Calls `use` with the tensor's values when they are there: on a CPU at once, else in `finish` at the latest.

        The tensor may be let go of or overwritten by later work of the same stream; the array is the caller's only
        during the call.
        """
        if not _is_worth_it(tensor):
            self.finish()
            use(tensor.cpu().numpy())
            return
        self._underway.append((_begin_copy(tensor), use))
        while len(self._underway) > _MOST_UNDERWAY:
            self._use_first()

    def finish(self) -> None:
        """Waits for all that is still on its way."""
        while self._underway:
            self._use_first()

    def _use_first(self) -> None:
        copy, use = self._underway.popleft()
        use(copy.wait())
