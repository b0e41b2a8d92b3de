"""What a Triton kernel is launched with, as data, so that a machine without a GPU can compile it for every GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One way in which a kernel can be launched.

    Attributes:
        name: which it is, for messages.
        kernel: the `triton.JITFunction`.
        signature: type of each argument by name, as Triton's compiler takes them: `*fp32`, `i32`, `constexpr`.
        constexprs: value of each constant by name.
        num_warps, num_stages: options of the compiler.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int


def is_interpreting() -> bool:
    """Whether Triton runs its kernels in NumPy on the CPU, as TRITON_INTERPRET=1 asks before the first import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
