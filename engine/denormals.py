"""Numbers below 1.2e-38, over which a processor takes a hundred times as long, as zeros.

Attention that has become sure of itself is full of them: its probabilities, and then every product with these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_denormals() -> Iterator[None]:
    """On this thread of the CPU such numbers are 0, as results and as inputs; afterwards all is as it was."""
    was = has_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if was:
            torch.set_flush_denormal(False)


def has_denormals() -> bool:
    """Whether this thread's arithmetic knows them."""
    return bool((torch.tensor(1e-30) * torch.tensor(1e-10)).item())
