"""How much memory a pass takes beyond what was held when it began."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Linux: what to write to start the peak anew, see proc(5).
_RESET_PEAK = "5"


class PeakMemory:
    """Watches the peak between its making and `growth_bytes()`: of the GPU's allocations, or of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._start()

    @property
    def held_bytes(self) -> int | None:
        """Bytes held when it was made; None where the system does not tell."""
        return self._before

    def _start(self) -> int | None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            # glibc keeps what was freed; a pass that reuses it would seem to need nothing.
            ctypes.CDLL(None).malloc_trim(0)
            _RESET.write_text(_RESET_PEAK)
        except (OSError, AttributeError):
            return None
        return _status_bytes("VmRSS")

    def growth_bytes(self) -> int | None:
        """Bytes at the peak beyond those at the start; None where the system does not tell (not Linux, no CUDA)."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _status_bytes("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _status_bytes(key: str) -> int | None:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None
