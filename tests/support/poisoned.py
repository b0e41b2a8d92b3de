"""Where Triton's kernels are tested, and memory that shows what was read or left out: NaN around and in all of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
on_triton = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or INTERPRETED),
        reason="triton: torch sees no CUDA GPU, and TRITON_INTERPRET=1 is not set",
    ),
]

# A broken kernel may read where nothing is, which ends a GPU's process; and each would be compiled several times.
for_mutants = pytest.mark.skipif(not INTERPRETED, reason="broken kernels run with TRITON_INTERPRET=1 only")


def half_ulp(dtype: torch.dtype) -> float:
    """What one rounding to `dtype` may change, of the value. The interpreter cuts bf16 off, which is twice as much."""
    return torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == torch.bfloat16 else 2)


def guarded(values: torch.Tensor, *, pages: int = 64) -> torch.Tensor:
    """The same values on `DEVICE`, contiguous, with `pages` rows of NaN before and behind them."""
    inner = values.contiguous()
    around = inner.new_full((pages + len(inner) + pages, *inner.shape[1:]), torch.nan, device=DEVICE)
    around[pages : pages + len(inner)] = inner.to(DEVICE)
    return around[pages : pages + len(inner)]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
