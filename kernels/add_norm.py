"""Residual and LayerNorm in one pass.

    x += product                                                   the residual stream, fp32
    out = (x - mean x) / sqrt(var x + eps) * weight + bias         in what the next product takes

Rows are as long as a model is wide; mean and variance are those of a row, the variance in a second pass over it.

Implementations:
    reference  torch's operations: differentiable, any device and dtype.
    cpu        csrc/row_passes.cpp: a row is read once and stays in the first-level cache; also adds the bias that the
               product left, turns its integers into numbers, and rounds the outcome to int8 levels. Writes into
               `x_TD` itself.
    triton     kernels/gpu/add_norm.py.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from .cpu_kernels import array, cpu_level, empty_target, module, product_arrays, rows_of, target_arrays, why_not_cpu
from .hardware import why_not_triton
from .operator import Operator
from .product import Levels, Product, check_product, wants_gradients
from .quantise_rows import quantise_rows_reference

IMPLS = ("auto", "reference", "cpu", "triton")


class Norm(NamedTuple):
    """A LayerNorm's numbers: weight and bias (D,), eps."""

    weight_D: torch.Tensor
    bias_D: torch.Tensor
    eps: float


def add_norm_reference(
    x_TD: torch.Tensor, product: Product | None, norm: Norm | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | Levels | None]:
    """`add_norm` in torch's operations; leaves `x_TD` alone."""
    if product is not None:
        x_TD = x_TD + product.numbers()
    if norm is None:
        return x_TD, None
    weight_D, bias_D = norm.weight_D.to(x_TD.dtype), norm.bias_D.to(x_TD.dtype)
    out_TD = F.layer_norm(x_TD, x_TD.shape[-1:], weight_D, bias_D, norm.eps)
    return x_TD, quantise_rows_reference(out_TD) if dtype == torch.int8 else out_TD.to(dtype)


# The caller makes the target: torch.compile takes no operator that writes into its arguments and returns a list.
def _add_norm_in_cpp(
    x_TD: torch.Tensor,
    target: Sequence[torch.Tensor],
    product: Sequence[torch.Tensor],
    weight_D: Optional[torch.Tensor],  # noqa: UP045  torch 2.11 reads schemas from these annotations, and knows no `|`
    bias_D: Optional[torch.Tensor],  # noqa: UP045
    eps: float,
    level: str,
) -> None:
    added = product_arrays(Product.of(list(product))) if product else None
    module().add_norm(
        x_TD.numpy(),
        added,
        None if weight_D is None else array(weight_D.float()),
        None if bias_D is None else array(bias_D.float()),
        eps,
        target_arrays(list(target)) if target else None,
        level,
        torch.get_num_threads(),
    )


_add_norm = Operator("protnest::add_norm", _add_norm_in_cpp, mutates=("x_TD", "target"))


@_add_norm.register_fake
def _(
    x_TD: torch.Tensor,
    target: Sequence[torch.Tensor],
    product: Sequence[torch.Tensor],
    weight_D: Optional[torch.Tensor],  # noqa: UP045
    bias_D: Optional[torch.Tensor],  # noqa: UP045
    eps: float,
    level: str,
) -> None:
    return None


def _why_not_cpu(x_TD: torch.Tensor, product: Product | None, norm: Norm | None, dtype: torch.dtype) -> str | None:
    if x_TD.dtype != torch.float32 or not x_TD.is_contiguous():
        return f"x is {x_TD.dtype}, contiguous: {x_TD.is_contiguous()}; it takes contiguous fp32"
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"dtype is {dtype}, not fp32, bf16 or int8"
    parameters = () if norm is None else (norm.weight_D, norm.bias_D)
    if wants_gradients(x_TD, *parameters):
        return "gradients are asked for"
    return why_not_cpu(Product(x_TD)) or (None if product is None else why_not_cpu(product))


def _why_not_triton(x_TD: torch.Tensor, product: Product | None, norm: Norm | None, dtype: torch.dtype) -> str | None:
    if x_TD.dtype != torch.float32 or norm is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "it takes fp32 x with a norm, and gives fp32, bf16 or fp16"
    if product is not None and len(product.tensors()) > 1:
        return "the product is not plain numbers"
    tensors = (x_TD, norm.weight_D, norm.bias_D, *([] if product is None else product.tensors()))
    if wants_gradients(*tensors):
        return "gradients are asked for"
    return why_not_triton(x_TD.device)


def _choose(x_TD: torch.Tensor, product: Product | None, norm: Norm | None, dtype: torch.dtype, impl: str) -> str:
    if impl not in IMPLS:
        message = f"add_norm: impl is {impl!r}; allowed: {', '.join(IMPLS)}"
        raise ValueError(message)
    if impl == "auto":
        if x_TD.device.type == "cuda":
            return "triton" if _why_not_triton(x_TD, product, norm, dtype) is None else "reference"
        return "cpu" if _why_not_cpu(x_TD, product, norm, dtype) is None else "reference"
    reason = None
    if impl != "reference":
        reason = (_why_not_cpu if impl == "cpu" else _why_not_triton)(x_TD, product, norm, dtype)
    if reason is not None:
        message = f"add_norm: impl={impl!r} cannot run: {reason}"
        raise RuntimeError(message)
    return impl


def add_norm(
    x_TD: torch.Tensor, product: Product | None, norm: Norm | None, *, dtype: torch.dtype, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor | Levels | None]:
    """Adds a product to the residual stream and normalises it.

    Args:
        x_TD: (T, D), the stream, fp32 (other floating dtypes by the reference). Spent: the sum may be written into it.
        product: (T, D), what to add; None adds nothing.
        norm: of the LayerNorm; None leaves it out.
        dtype: of what the norm gives: a floating dtype, or int8 for `Levels`.
        impl: "auto", "reference", "cpu" or "triton"; a named one runs or raises.

    Returns:
        The stream (T, D), and the normalised rows: (T, D) of `dtype`, `Levels`, or None without a norm.

    Raises:
        ValueError: shapes or dtypes disagree, or `impl` is unknown.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        message = f"x is {x_TD.dtype} {tuple(x_TD.shape)}, expected floating point (T, D)"
        raise ValueError(message)
    T, D = x_TD.shape
    if product is not None:
        check_product(product, D)
        if product.values_NO.shape[0] != T:
            message = f"x has {T} rows, the product {product.values_NO.shape[0]}"
            raise ValueError(message)
    if norm is not None and not norm.weight_D.shape == norm.bias_D.shape == (D,):
        message = f"the norm has shapes {tuple(norm.weight_D.shape)} and {tuple(norm.bias_D.shape)}, expected ({D},)"
        raise ValueError(message)
    chosen = _choose(x_TD, product, norm, dtype, impl)
    if chosen == "cpu":
        weight_D, bias_D, eps = norm or (None, None, 0.0)
        tensors = [] if product is None else product.tensors()
        target = [] if norm is None else empty_target(T, D, dtype)
        _add_norm(x_TD, target, tensors, weight_D, bias_D, eps, cpu_level())
        return x_TD, rows_of(target) if target else None
    if chosen == "triton":
        from .gpu.add_norm import add_norm as launch

        assert norm is not None
        return launch(x_TD, None if product is None else product.values_NO, *norm, dtype)
    return add_norm_reference(x_TD, product, norm, dtype)
