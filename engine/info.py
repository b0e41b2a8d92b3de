"""What runs on this machine, and why: versions, devices, precisions, kernels, bundled models."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import resource
import sys
from typing import Any

import torch

from ..kernels import extension
from ..kernels.cpu_kernels import cpu_level
from ..kernels.hardware import multiplies_bf16
from ..kernels.quantised_linear import why_not_int8
from .config import BUNDLED, BUNDLED_CHAINS, PUBLISHED
from .cpus import usable_cpus
from .decoder_config import BUNDLED_DECODERS
from .device import precision_name, resolve_device, resolve_precision

_PACKAGES = ("protnest", "torch", "numpy", "safetensors", "pyarrow", "dnaio")


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of what it computes and writes with."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def peak_memory_bytes() -> int:
    """Most memory that this process has held at once, as the operating system counts it (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe() -> dict[str, dict[str, Any]]:
    """What `protnest info` shows, by section."""
    device = resolve_device("auto")
    reason = extension.missing_reason()
    return {
        "versions": versions(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "usable processors": usable_cpus(),
            "torch threads": torch.get_num_threads(),
        },
        "runs on": {
            "device": str(device),
            "GPU": _gpu(),
            "precision auto": precision_name(resolve_precision("auto", device)),
            "bf16": "in hardware"
            if multiplies_bf16(device)
            else "no units for it here: it runs in fp32 units and is no faster than fp32",
            "int8": why_not_int8() or "in hardware",
        },
        "kernels": {
            "C++ extension": "loaded" if reason is None else f"absent, Python twins run instead: {reason}",
            "attention": _attention(device),
            "triton": _installed("triton"),
        },
        "models": {
            "bundled": ", ".join(f"{name} ({config.width})" for name, config in BUNDLED.items()),
            "bundled decoders": ", ".join(f"{name} ({config.width})" for name, config in BUNDLED_DECODERS.items()),
            "bundled chains": ", ".join(f"{name} ({' -> '.join(of)})" for name, of in BUNDLED_CHAINS.items()),
            "published": ", ".join(PUBLISHED),
        },
    }


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return f"none that torch sees ({f'built for CUDA {built}' if built else 'this torch is built without CUDA'})"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in devices)


def _attention(device: torch.device) -> str:
    if device.type == "cpu":
        if extension.missing_reason() is None:
            return f"C++ with the rotary turn fused in, vectors of level {cpu_level()}"
        return "scaled_dot_product_attention per sequence"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "scaled_dot_product_attention per sequence: this torch lacks varlen attention"
    return "varlen for fp16 and bf16, scaled_dot_product_attention per sequence for fp32"


def _installed(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else "not installed"
