"""Tensors in, tensors out: one file per operation."""

if not __name__.startswith("protnest."):
    _message = f"import protnest.kernels, not {__name__}: the bare folder name belongs to other projects"
    raise ImportError(_message)

# Each function has its file's name. Bound here, after the file was first imported, the name stays the function: Python
# sets a package's attribute to the submodule only on the submodule's first import. A lazy `__getattr__` would lose it.
from .plan_batches import plan_batches
from .tokenise import tokenise

__all__ = ["plan_batches", "tokenise"]
