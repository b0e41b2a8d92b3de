"""What can be launched: a kernel with its types, constants and options, as the ahead-of-time compiler wants it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One configuration of one kernel.

    Attributes:
        name: of the configuration, unique within its file.
        kernel: the Triton function.
        signature: type of each argument in Triton's words, "constexpr" for constants.
        constexprs: values of the constants.
        num_warps: of 32 threads each.
        num_stages: depth of software pipelining.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int = 2
