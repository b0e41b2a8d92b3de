"""How many rows a product had better have, where each number of them is compiled anew.

oneDNN, which multiplies bf16 on CPUs with units for it, makes machine code for every shape that it meets, and keeps
what it made. Batches of whole proteins have a number of tokens of their own each: then products of width 128 take
three times as long, and the process grows by a gigabyte (benchmarks/README.md). Rows that nobody reads are cheaper.
Products of fp32 and int8 do not grow so.
"""

from __future__ import annotations

import torch

from .hardware import multiplies_bf16

_FEWEST = 16
"""A tile of AMX has so many rows: fewer cost the same."""
_STEPS = 8
"""Numbers of rows from a power of two to the next; at most one row in so many is added. A library's batches are nearly
full, which is a number of its own: of Swiss-Prot's rows less than one in a thousand is added."""


def is_compiled(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of this dtype is compiled for its number of rows."""
    return device.type == "cpu" and dtype == torch.bfloat16 and multiplies_bf16(device)


def rows_to_multiply(rows: int) -> int:
    """The least number of rows, from `rows` on, that is one of few."""
    power = 1 << max(0, rows - 1).bit_length()
    step = max(_FEWEST, power // (2 * _STEPS))
    return -(-rows // step) * step
