"""What the hardware does itself, as far as the kernels' choices depend on it."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform

import torch


@functools.cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices itself. Elsewhere bf16 is right too, but no faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.machine().lower() in ("arm64", "aarch64"):
        # Older torch cannot say; then fp32 is the safe answer.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("arm_bf16") or capabilities.get("bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def is_interpreting() -> bool:
    """Whether Triton runs its kernels in NumPy on the CPU, as TRITON_INTERPRET=1 asks before the first import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on tensors of this device, in one line; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'protnest[gpu]')"
    if device.type == "cpu" and is_interpreting():
        return None
    if device.type != "cuda":
        return f"tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None
