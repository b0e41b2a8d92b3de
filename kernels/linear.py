"""Linear layer whose bf16 is fast on every CPU.

    out = x W^T + b         products summed in fp32, the result rounded to the inputs' dtype

On a CPU without bf16 units a bf16 product runs through slow emulation: a whole encoder of 8M parameters runs at 0.4 of
fp32's speed (AVX-512 without the bf16 extension). There the inputs are widened instead, which is exact, multiplied in
fp32, and the result rounded: the same arithmetic as a bf16 unit's, at fp32's speed. Everything else is torch's own.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .extension import load
from .hardware import multiplies_bf16
from .product import wants_gradients


def needs_widening(x: torch.Tensor) -> bool:
    """Whether products of this tensor run faster when widened to fp32 first."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bf16(x.device)


def leaves_bias(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether a product had better leave its bias to the pass that follows.

    torch copies the bias into the output and then adds the product to it: a pass of its own over the rows, 5 % of an
    encoder of 8M parameters. The C++ passes add it as they read.
    """
    plain = x_NI.device.type == "cpu" and x_NI.dtype == torch.float32
    return plain and not wants_gradients(x_NI, weight_OI) and load() is not None


def linear_reference(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` written out in fp64, rounded once at the end."""
    out = x_NI.double() @ weight_OI.double().T
    return (out if bias_O is None else out + bias_O.double()).to(x_NI.dtype)


def linear(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Linear layer; differentiable.

    Args:
        x_NI: (N, I), any floating dtype.
        weight_OI: (O, I), of the same dtype.
        bias_O: (O,), of the same dtype.

    Returns:
        (N, O) of the inputs' dtype.

    Raises:
        ValueError: dtypes or widths disagree.
    """
    if x_NI.shape[-1] != weight_OI.shape[-1]:
        message = f"x has shape {tuple(x_NI.shape)}, the weight {tuple(weight_OI.shape)}: their last axes must agree"
        raise ValueError(message)
    if torch.is_autocast_enabled(x_NI.device.type) or not needs_widening(x_NI):
        return F.linear(x_NI, weight_OI, bias_O)
    if weight_OI.dtype != x_NI.dtype:
        message = f"x is {x_NI.dtype}, the weight {weight_OI.dtype}: they must agree"
        raise ValueError(message)
    wide_bias_O = None if bias_O is None else bias_O.float()
    return F.linear(x_NI.float(), weight_OI.float(), wide_bias_O).to(x_NI.dtype)
