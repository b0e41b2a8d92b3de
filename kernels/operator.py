"""Operations of C++ as torch knows them, called past its dispatcher where nobody traces.

The dispatcher's first call of an operation in Python imports torch's compiler, 1.7 s of every short command, and each
call takes some 50 us, as long as a small layer's pass. Whoever traces or compiles meets the registered operation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Operator:
    """An operation without gradients, registered as `protnest::NAME`.

    Args:
        name: with its namespace.
        function: typed for `torch.library.custom_op`; positional arguments.
        mutates: names of the arguments that it writes into.

    Attributes:
        definition: what torch knows.
    """

    def __init__(self, name: str, function: Callable[..., Any], *, mutates: Iterable[str] = ()) -> None:
        written = tuple(mutates)
        self.definition = torch.library.custom_op(name, function, mutates_args=written)
        self._function = function
        self._written = [place for place, own in enumerate(inspect.signature(function).parameters) if own in written]

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the operation gives for tensors without numbers; a decorator."""
        return self.definition.register_fake(function)

    def __call__(self, *arguments: Any) -> Any:
        if _is_traced() or any(map(_is_special, arguments)):
            return self.definition(*arguments)
        outcome = self._function(*arguments)
        for place in self._written:
            _count_version(arguments[place])
        return outcome


def _is_traced() -> bool:
    """Whether somebody records what is run, by torch.compile, make_fx, a mode such as FakeTensorMode, or torch.jit."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _count_version(argument: Any) -> None:
    """Tells autograd that a tensor, or those of a list, were written into."""
    for tensor in argument if isinstance(argument, list | tuple) else [argument]:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _is_special(argument: Any) -> bool:
    """Whether it is a tensor of whoever traces, or holds one."""
    if isinstance(argument, list | tuple):
        return any(map(_is_special, argument))
    return isinstance(argument, torch.Tensor) and type(argument) not in (torch.Tensor, torch.nn.Parameter)
