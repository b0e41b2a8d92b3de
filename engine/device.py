"""Which device a model runs on, and in which precision."""

from __future__ import annotations

import torch

from ..kernels.hardware import multiplies_bf16
from .errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of an encoder's tensors, by the names that the command line uses."""

INT8 = "int8"
"""Integer products in an encoder whose other tensors are fp32, see `protnest.engine.quantise`."""

PRECISION_NAMES = ("auto", *PRECISIONS, INT8)
DEVICE_NAMES = ("auto", "cpu", "cuda")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` is the first CUDA GPU where there is one, else the CPU.

    Raises:
        InputError: the device is unknown, or CUDA was asked for where there is none.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        message = f"device is {device!r}; allowed: {', '.join(DEVICE_NAMES)}, cuda:N"
        raise InputError(message) from error
    if resolved.type not in ("cpu", "cuda"):
        message = f"device is {str(device)!r}; allowed: {', '.join(DEVICE_NAMES)}, cuda:N"
        raise InputError(message)
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            message = "device is 'cuda', but torch sees no CUDA GPU here; `protnest info` says what there is"
            raise InputError(message)
        index = torch.cuda.current_device() if resolved.index is None else resolved.index
        if index >= torch.cuda.device_count():
            message = f"device is {str(device)!r}, but there are {torch.cuda.device_count()} GPUs"
            raise InputError(message)
        return torch.device("cuda", index)
    return resolved


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision by name; `auto` is bf16 where the hardware has it, else fp32.

    `int8` gives `torch.int8`, the dtype of the products' integers: no model is brought to it by `.to`.

    Raises:
        InputError: the name is unknown, fp16 was asked for on a CPU, or int8 on a GPU.
    """
    if precision == "auto":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float32
    if precision == INT8:
        if device.type != "cpu":
            message = f"precision is 'int8' on {device}: int8 runs on a CPU alone; use bf16, fp16 or fp32"
            raise InputError(message)
        return torch.int8
    if precision not in PRECISIONS:
        message = f"precision is {precision!r}; allowed: {', '.join(PRECISION_NAMES)}"
        raise InputError(message)
    if precision == "fp16" and device.type == "cpu":
        message = "precision is 'fp16' on a CPU, where ESM-2 can overflow and runs slowly; use bf16 or fp32"
        raise InputError(message)
    return PRECISIONS[precision]


def precision_name(dtype: torch.dtype) -> str:
    """The name of the precision that has this dtype: of `PRECISIONS`, or `int8`.

    Raises:
        ValueError: it has none.
    """
    for name, known in (*PRECISIONS.items(), (INT8, torch.int8)):
        if known == dtype:
            return name
    message = f"{dtype} is no precision of an encoder; allowed: {', '.join(map(str, PRECISIONS.values()))}"
    raise ValueError(message)
