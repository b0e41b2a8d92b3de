"""Bias and GELU in one pass.

    out = gelu(product), gelu(x) = x Phi(x)                        exact: by the error function, not by tanh
    out = gelu(product) * times - minus                            where the next product wants its inputs moved

Implementations:
    reference  torch's operations: differentiable, any device and dtype.
    cpu        csrc/row_passes.cpp: one pass over memory; also adds the bias that the product left, turns its integers
               into numbers, and rounds the outcome to int8 levels. fp32 results are written over the product's
               values. Off by 3 eps32 |x| at most; torch's own by as much.
    triton     kernels/gpu/gelu.py.

Shapes: N rows, F columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cpu_kernels import array, cpu_level, empty_target, module, product_arrays, rows_of, target_arrays, why_not_cpu
from .hardware import why_not_triton
from .operator import Operator
from .product import Levels, Product, check_product, wants_gradients
from .quantise_rows import quantise_rows_reference

IMPLS = ("auto", "reference", "cpu", "triton")


class Move(NamedTuple):
    """Where inputs are moved for int8: fp32 (F,) each."""

    times_F: torch.Tensor
    minus_F: torch.Tensor


def bias_gelu_reference(product: Product, move: Move | None, dtype: torch.dtype) -> torch.Tensor | Levels:
    """`bias_gelu` in torch's operations."""
    out_NF = F.gelu(product.numbers())
    if move is not None:
        out_NF = out_NF * move.times_F - move.minus_F
    return quantise_rows_reference(out_NF) if dtype == torch.int8 else out_NF.to(dtype)


def _bias_gelu_in_cpp(
    product: Sequence[torch.Tensor], move: Sequence[torch.Tensor], dtype: torch.dtype, level: str
) -> list[torch.Tensor]:
    N, columns = product[0].shape
    target = empty_target(N, columns, dtype)
    moved = [array(part) for part in move] or [None, None]
    arrays = product_arrays(Product.of(list(product)))
    module().bias_gelu(N, columns, arrays, *moved, target_arrays(target), level, torch.get_num_threads())
    return target


_bias_gelu = Operator("protnest::bias_gelu", _bias_gelu_in_cpp)


@_bias_gelu.register_fake
def _(
    product: Sequence[torch.Tensor], move: Sequence[torch.Tensor], dtype: torch.dtype, level: str
) -> list[torch.Tensor]:
    N = product[0].shape[0]
    scales = [product[0].new_empty(N, dtype=torch.float32) for _ in range(2)] if dtype == torch.int8 else []
    return [product[0].new_empty(product[0].shape, dtype=dtype), *scales]


def _bias_gelu_over_in_cpp(values_NF: torch.Tensor, rest: Sequence[torch.Tensor], level: str) -> None:
    """fp32 results over the values themselves: the largest table of a layer is not written to fresh memory."""
    arrays = product_arrays(Product.of([values_NF, *rest]))
    target = target_arrays([values_NF])
    module().bias_gelu(*values_NF.shape, arrays, None, None, target, level, torch.get_num_threads())


_bias_gelu_over = Operator("protnest::bias_gelu_over", _bias_gelu_over_in_cpp, mutates=("values_NF",))


@_bias_gelu_over.register_fake
def _(values_NF: torch.Tensor, rest: Sequence[torch.Tensor], level: str) -> None:
    return None


def _why_not_cpu(product: Product, move: Move | None, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"dtype is {dtype}, not fp32, bf16 or int8"
    if wants_gradients(*(move or ())):
        return "gradients are asked for"
    return why_not_cpu(product)


def _why_not_triton(product: Product, move: Move | None, dtype: torch.dtype) -> str | None:
    if product.scales is not None or move is not None or product.bias_O is None or dtype != product.dtype:
        return "it takes numbers with a bias, and gives their dtype"
    if product.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {product.dtype}, not fp32, bf16 or fp16"
    return "gradients are asked for" if product.requires_grad() else why_not_triton(product.values_NO.device)


def _choose(product: Product, move: Move | None, dtype: torch.dtype, impl: str) -> str:
    if impl not in IMPLS:
        message = f"bias_gelu: impl is {impl!r}; allowed: {', '.join(IMPLS)}"
        raise ValueError(message)
    if impl == "auto":
        if product.values_NO.device.type == "cuda":
            return "triton" if _why_not_triton(product, move, dtype) is None else "reference"
        return "cpu" if _why_not_cpu(product, move, dtype) is None else "reference"
    reason = None
    if impl == "cpu":
        reason = _why_not_cpu(product, move, dtype)
    elif impl == "triton":
        reason = _why_not_triton(product, move, dtype)
    if reason is not None:
        message = f"bias_gelu: impl={impl!r} cannot run: {reason}"
        raise RuntimeError(message)
    return impl


def bias_gelu(
    product: Product, *, dtype: torch.dtype, move: Move | None = None, impl: str = "auto"
) -> torch.Tensor | Levels:
    """GELU of a product, in what the next product takes.

    Args:
        product: (N, F). Spent: fp32 results may be written over its values.
        dtype: of the result: a floating dtype, or int8 for `Levels`.
        move: multiplies and shifts the results, in fp32.
        impl: "auto", "reference", "cpu" or "triton"; a named one runs or raises.

    Returns:
        (N, F) of `dtype`, or `Levels`.

    Raises:
        ValueError: shapes or dtypes disagree, or `impl` is unknown.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    columns = product.values_NO.shape[-1]
    check_product(product, columns)
    if move is not None and any(part.shape != (columns,) or part.dtype != torch.float32 for part in move):
        got = [(str(part.dtype), tuple(part.shape)) for part in move]
        message = f"move is {got}, expected fp32 ({columns},) twice"
        raise ValueError(message)
    chosen = _choose(product, move, dtype, impl)
    if chosen == "cpu":
        values_NF = product.values_NO
        if move is None and dtype == values_NF.dtype == torch.float32 and values_NF.is_contiguous():
            _bias_gelu_over(values_NF, product.tensors()[1:], cpu_level())
            return values_NF
        return rows_of(_bias_gelu(product.tensors(), move or (), dtype, cpu_level()))
    if chosen == "triton":
        from .gpu.gelu import bias_gelu as launch

        assert product.bias_O is not None
        return launch(product.values_NO, product.bias_O)
    return bias_gelu_reference(product, move, dtype)
