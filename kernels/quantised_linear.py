"""Linear layer in int8: rows of activations and rows of weights each on their own scale, products of exact integers.

    x[n,i] ~ scale[n] q[n,i] + shift[n]                         (quantise_rows, asymmetric: no integer zero point)
    W[o,i] ~ ws[o] w[o,i]                                       (quantise_weight, symmetric)
    acc[n,o] = sum_i q[n,i] w[o,i]                              (quantised_linear, int32, exact)
    y[n,o] = scale[n] (ws[o] acc[n,o]) + (shift[n] c[o] + b[o]),  c[o] = ws[o] sum_i w[o,i]           (Product.numbers)

A row's q, acc and y depend on that row alone, bit for bit, whatever else is in the batch and whichever implementation
runs. Whoever computes x' = (x - mu) / s beforehand and folds s and mu into W and b makes int8 good enough for a protein
model (`protnest.engine.quantise`); nothing here knows of it.

Implementations of the product: `int8` is oneDNN's through `torch._int_mm`. Where the CPU has VNNI or AMX it runs at 3
to 4 times fp32's rate. Elsewhere oneDNN adds pairs of products in saturating int16, so its sums are wrong: a product
of extremes tells, once a process, and `auto` turns to `fp32`, products of integer-valued floats in blocks of 1,024
inputs, whose partial sums stay below 2^24 and so are exact in any order, at fp32's rate.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import logging
import platform
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_logger = logging.getLogger(__name__)

LARGEST = 127
"""Of a weight's integers, in magnitude. An activation's run from -128 to 127."""

# 128 * 127 * 1,024 < 2^24: fp32 holds every partial sum exactly.
_EXACT_INPUTS = 1024
# 128 * 127 * 131,072 < 2^31.
_MOST_INPUTS = 131_072


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight matrix on one scale a row.

    Attributes:
        values_OI: int8 (O, I), -127 to 127.
        scale_O: fp32 (O,), `ws` of the equations; 0 for a row of zeros.
        sum_O: fp32 (O,), `c` of the equations: each row's sum, dequantised.
    """

    values_OI: torch.Tensor
    scale_O: torch.Tensor
    sum_O: torch.Tensor


def quantise_weight(weight_OI: torch.Tensor) -> QuantisedWeight:
    """Rounds each row to the nearest of 255 levels, the largest magnitude at 127, ties to even.

    Args:
        weight_OI: (O, I), floating, finite; in fp32, whatever its dtype.

    Raises:
        ValueError: it has not two axes, no inputs or too many, another dtype, or a value that is not finite.
    """
    if weight_OI.dim() != 2 or not weight_OI.is_floating_point():
        message = f"weight is {weight_OI.dtype} {tuple(weight_OI.shape)}, want floating point (O, I)"
        raise ValueError(message)
    _check_inputs("weight", weight_OI.shape[1])
    weight_OI = weight_OI.detach().float()
    largest_O = weight_OI.abs().amax(dim=1)
    if broken := (~torch.isfinite(largest_O)).nonzero()[:, 0].tolist():
        message = f"weight row {broken[0]} is not finite"
        raise ValueError(message)
    scale_O = largest_O / LARGEST
    divisor_O = torch.where(scale_O > 0, scale_O, 1.0)
    values_OI = (weight_OI / divisor_O[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    sum_O = (values_OI.sum(dim=1) * scale_O.double()).float()
    return QuantisedWeight(values_OI, scale_O, sum_O)


def quantised_linear_reference(q_NI: torch.Tensor, values_OI: torch.Tensor) -> torch.Tensor:
    """`quantised_linear` in 64-bit integers: slow, on any device that multiplies them."""
    return (q_NI.long() @ values_OI.long().T).to(torch.int32)


def _int8(q_NI: torch.Tensor, values_OI: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(q_NI, values_OI.t())


def _fp32(q_NI: torch.Tensor, values_OI: torch.Tensor) -> torch.Tensor:
    acc_NO = torch.zeros(q_NI.shape[0], values_OI.shape[0], dtype=torch.int32)
    for begin in range(0, q_NI.shape[1], _EXACT_INPUTS):
        columns = slice(begin, begin + _EXACT_INPUTS)
        acc_NO += F.linear(q_NI[:, columns].float(), values_OI[:, columns].float()).to(torch.int32)
    return acc_NO


_IMPLEMENTATIONS = {"int8": _int8, "fp32": _fp32, "reference": quantised_linear_reference}


@functools.cache
def why_not_int8() -> str | None:
    """Why int8 products of this CPU are wrong or slow, in one line; None where they are exact. Measured once."""
    if not hasattr(torch, "_int_mm"):
        return f"torch {torch.__version__} lacks torch._int_mm"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"int8 products of torch on {platform.machine()} are not known to be fast"
    if not torch._C._has_mkldnn:
        return "torch was built without oneDNN, and multiplies integers one by one"
    for rows in (1, 64):
        q_NI = torch.full((rows, 320), LARGEST, dtype=torch.int8)
        if (_int8(q_NI, q_NI[:1].expand(64, -1).contiguous()) != LARGEST * LARGEST * 320).any():
            return "the CPU has no VNNI: its int8 products saturate"
    return None


@functools.cache
def _choose_auto() -> str:
    reason = why_not_int8()
    choice = "int8" if reason is None else "fp32"
    _logger.info("quantised_linear runs %s%s", choice, f": {reason}" if reason else "")
    return choice


def quantised_linear(q_NI: torch.Tensor, weight: QuantisedWeight, *, impl: str = "auto") -> torch.Tensor:
    """Sums of products of integers, exact in every implementation. On a CPU; not differentiable.

    Args:
        q_NI: int8 (N, I), contiguous; N may be 0.
        weight: of `quantise_weight`, (O, I).
        impl: "auto" (int8 where it is exact, else fp32; says once which), "int8", "fp32" or "reference"; a named one
            runs or raises.

    Returns:
        int32 (N, O).

    Raises:
        ValueError: dtypes, shapes or devices are not as above, or `impl` is unknown.
        RuntimeError: impl is "int8" and the CPU's int8 products are not exact.
    """
    values_OI = weight.values_OI
    if q_NI.dtype != torch.int8 or values_OI.dtype != torch.int8:
        message = f"q is {q_NI.dtype}, the weight {values_OI.dtype}: both must be int8"
        raise ValueError(message)
    if q_NI.dim() != 2 or values_OI.dim() != 2 or q_NI.shape[1] != values_OI.shape[1]:
        message = f"q has shape {tuple(q_NI.shape)}, the weight {tuple(values_OI.shape)}: want (N, I) and (O, I)"
        raise ValueError(message)
    _check_inputs("q", q_NI.shape[1])
    if q_NI.device.type != "cpu" or values_OI.device.type != "cpu":
        message = f"q is on {q_NI.device}, the weight on {values_OI.device}: int8 runs on the CPU alone"
        raise ValueError(message)
    if impl == "auto":
        impl = _choose_auto()
    elif impl not in _IMPLEMENTATIONS:
        message = f"impl is {impl!r}; allowed: auto, {', '.join(_IMPLEMENTATIONS)}"
        raise ValueError(message)
    elif impl == "int8" and (reason := why_not_int8()) is not None:
        message = f"impl='int8' cannot run here: {reason}"
        raise RuntimeError(message)
    if not q_NI.shape[0] or not values_OI.shape[0]:
        return torch.zeros(q_NI.shape[0], values_OI.shape[0], dtype=torch.int32)
    return _IMPLEMENTATIONS[impl](q_NI.contiguous(), values_OI)


def _check_inputs(name: str, inputs: int) -> None:
    if not 0 < inputs <= _MOST_INPUTS:
        message = f"{name} has {inputs} inputs; 1 to {_MOST_INPUTS:,} are allowed, beyond which int32 sums overflow"
        raise ValueError(message)
