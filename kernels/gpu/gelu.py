"""Bias and exact GELU in one launch.

    out = z / 2 (1 + erf(z / sqrt(2)))      z = x + bias

In fp32, rounded once: a bias that a matrix product had added would have been rounded before. Every value is read once
and written once; nothing else takes time.

Shapes: N rows, F feed-forward width.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import Launch

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_BN, _BF, _WARPS = 4, 512, 4
_INVERSE_ROOT_2 = tl.constexpr(math.sqrt(0.5))


@triton.jit
def _bias_gelu_fwd_kernel(x_ptr, bias_ptr, out_ptr, N, F, BN: tl.constexpr, BF: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BF + tl.arange(0, BF)
    there = (rows[:, None] < N) & (columns[None, :] < F)
    places = rows[:, None] * F + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < F, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + places, mask=there, other=0.0).to(tl.float32) + bias[None, :]
    out = 0.5 * z * (1.0 + tl.erf(z * _INVERSE_ROOT_2))
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=there)


def bias_gelu(x_NF: torch.Tensor, bias_F: torch.Tensor) -> torch.Tensor:
    """`gelu(x_NF + bias_F)`, exact; (N, F) of the dtype of `x_NF`. Waits for nothing.

    Args:
        x_NF: (N, F), contiguous; fp32, bf16 or fp16.
        bias_F: (F,) of one of these dtypes.

    Raises:
        ValueError: a shape, a dtype or a stride is not as above.
    """
    if x_NF.dim() != 2 or bias_F.shape != x_NF.shape[1:]:
        message = f"expected x (N, F) and bias (F,), got {tuple(x_NF.shape)} and {tuple(bias_F.shape)}"
        raise ValueError(message)
    for name, given in (("x", x_NF), ("bias", bias_F)):
        if given.dtype not in _TYPES or not given.is_contiguous():
            message = f"{name} is {given.dtype}, expected it contiguous in one of {', '.join(map(str, _TYPES))}"
            raise ValueError(message)
    N, F = x_NF.shape
    out_NF = torch.empty_like(x_NF)
    if N and F:
        grid = (triton.cdiv(N, _BN), triton.cdiv(F, _BF))
        _bias_gelu_fwd_kernel[grid](x_NF, bias_F, out_NF, N, F, BN=_BN, BF=_BF, num_warps=_WARPS)
    return out_NF


def launches() -> list[Launch]:
    """The ways in which the kernel is launched."""
    return [_launch(dtype) for dtype in _TYPES]


def _launch(dtype: torch.dtype) -> Launch:
    constexprs: dict[str, object] = {"BN": _BN, "BF": _BF}
    signature = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{_TYPES[dtype]}") | {"N": "i32", "F": "i32"}
    return Launch(
        name=f"bias_gelu {_TYPES[dtype]}",
        kernel=_bias_gelu_fwd_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=_WARPS,
    )
