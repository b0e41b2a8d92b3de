"""Tensors in, tensors out: one file per operation.

The operations below are imported on first use, so that importing this package loads neither torch nor Triton.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if not __name__.startswith("protnest."):
    _message = f"import protnest.kernels, not {__name__}: the bare folder name belongs to other projects"
    raise ImportError(_message)

if TYPE_CHECKING:
    from .kd_loss import kd_loss
    from .linear_kd_loss import linear_kd_loss
    from .nested_embed import nested_embed
    from .plan_batches import plan_batches
    from .tokenise import tokenise

__all__ = ["kd_loss", "linear_kd_loss", "nested_embed", "plan_batches", "tokenise"]


class _Operations(ModuleType):
    """A package in which an operation and its file share a name, and the name is always the operation's.

    Python sets a package's attribute to a file of it when that file is first imported, whoever imports it; without
    this class `from protnest.kernels import tokenise` would give the function or the file, by what ran before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        is_file = name in __all__ and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_file else value)

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        return getattr(importlib.import_module(f".{name}", __name__), name)


sys.modules[__name__].__class__ = _Operations
