"""What the hardware does itself, as far as the kernels' choices depend on it."""

from __future__ import annotations

import functools
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
