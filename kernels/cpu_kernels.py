"""The C++ kernels that work on torch's tensors: which generation of vector instructions runs, and how tensors travel.

Shapes: N rows, C columns.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

from .extension import load, missing_reason
from .product import Levels, Product

LEVELS = ("portable", "v3", "v4", "v4_bf16")
"""Generations that the kernels are compiled for, slowest first: plain vectors, AVX2, AVX-512, AVX-512 with bf16."""

_USUAL = "v4"
"""The highest that runs unasked. Pairs of bf16 take 1.5 times as long as fp32 factors on the one processor with units
for them that was measured (benchmarks/README.md)."""

_SWITCH = "PROTNEST_CPU_LEVEL"


@functools.cache
def cpu_level() -> str:
    """The generation of vector instructions that C++ kernels run with.

    The environment variable PROTNEST_CPU_LEVEL, read once, asks for another one of `LEVELS`. The extension must
    be there.

    Raises:
        ValueError: it names no level, or one that this processor lacks.
    """
    best: str = module().best_level()
    wanted = os.environ.get(_SWITCH, "") or min(best, _USUAL, key=LEVELS.index)
    if wanted not in LEVELS or LEVELS.index(wanted) > LEVELS.index(best):
        allowed = ", ".join(LEVELS[: LEVELS.index(best) + 1])
        message = f"{_SWITCH}={wanted}: this processor runs {allowed}"
        raise ValueError(message)
    return wanted


def module() -> ModuleType:
    """The extension; whoever calls this has asked `why_not_cpu`."""
    extension = load()
    assert extension is not None
    return extension


def why_not_cpu(product: Product) -> str | None:
    """Why C++ cannot work on this product, in one line; None where it can."""
    if load() is None:
        return missing_reason()
    if product.values_NO.device.type != "cpu":
        return f"tensors are on {product.values_NO.device.type}"
    if product.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype is {product.dtype}, not fp32 or bf16"
    if product.dtype == torch.bfloat16 and product.bias_O is not None:
        return "a bias is left to be added in bf16"
    return "gradients are asked for" if product.requires_grad() else None


def array(tensor: torch.Tensor) -> Any:
    """A tensor as NumPy's array, contiguous; bf16, which NumPy lacks, as 16-bit integers."""
    plain = (tensor.detach() if tensor.requires_grad else tensor).contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()


def product_arrays(product: Product) -> tuple[Any, ...]:
    """(values, bias, steps, sums, scale, shift), None for what there is not."""
    arrays = [array(tensor) for tensor in product.tensors()]
    return (*arrays, *(None,) * (6 - len(arrays)))


def empty_target(N: int, C: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Room for rows: [(N, C) of `dtype`], and for int8 scale and shift fp32 (N,) after it."""
    values_NC = torch.empty((N, C), dtype=dtype)
    return [values_NC, torch.empty(N), torch.empty(N)] if dtype == torch.int8 else [values_NC]


def target_arrays(target: list[torch.Tensor]) -> tuple[Any, ...]:
    """(values, scale, shift) of `empty_target`, None for what there is not."""
    arrays = [array(tensor) for tensor in target]
    return (*arrays, *(None,) * (3 - len(arrays)))


def rows_of(target: list[torch.Tensor]) -> torch.Tensor | Levels:
    """What a filled `empty_target` holds."""
    return Levels(*target) if len(target) > 1 else target[0]
