"""One stage of a nested embedding: the row so far, and beside it what a larger model adds.

    n   = (h - mean(h)) / sqrt(var(h) + eps)          per row, var over D without Bessel's correction
    out = [x | n P + x G + c]

x is the accumulated row, h the new model's hidden state before its final LayerNorm, whose affine part is folded into
P and c. Statistics, products and sums are in the row's dtype, fp32 or fp64. The Triton kernel rounds the operands of
the products to the dtype of P and G, where that is bf16 or fp16; sums stay fp32.

Implementations:
    reference  written out, one term after another, with a concatenation. fp64 gives the gold of the tests.
    gemm       two matrix products into a slice of the output, no intermediate row. Best on CPUs, and the way for fp64
               on a GPU. It holds one (T, D) temporary, the normalised states.
    triton     one launch: statistics, normalisation, both products and the offset; reads h twice, the second time out
               of the cache where D is small. CUDA, compute capability >= 8.0.

Shapes: T rows (tokens or proteins), X width of the row so far, D the new model's width, N dimensions it adds, W the
width of the buffer that rows live in.
"""

from __future__ import annotations

import logging
from typing import Any, Optional

import torch
import torch.nn.functional as F

from .hardware import why_not_triton

_logger = logging.getLogger(__name__)
_explained: set[str] = set()

_IMPLEMENTATIONS = ("reference", "gemm", "triton")
_ROW_DTYPES = (torch.float32, torch.float64)
_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def nested_embed_reference(
    nested_TX: torch.Tensor,
    hidden_TD: torch.Tensor,
    projection_DN: torch.Tensor,
    base_XN: torch.Tensor,
    offset_N: torch.Tensor,
    *,
    eps: float | None,
) -> torch.Tensor:
    """`nested_embed` written out, in the dtype of `nested_TX`; differentiable."""
    dtype = nested_TX.dtype
    normalised_TD = hidden_TD.to(dtype)
    if eps is not None:
        centred_TD = normalised_TD - normalised_TD.mean(dim=-1, keepdim=True)
        normalised_TD = centred_TD / (centred_TD.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    of_the_new_TN = normalised_TD @ projection_DN.to(dtype)
    of_the_row_TN = nested_TX @ base_XN.to(dtype)
    return torch.cat((nested_TX, of_the_new_TN + of_the_row_TN + offset_N.to(dtype)), dim=-1)


def _normalised(hidden_TD: torch.Tensor, dtype: torch.dtype, eps: float | None) -> torch.Tensor:
    wide_TD = hidden_TD.to(dtype)
    return wide_TD if eps is None else F.layer_norm(wide_TD, wide_TD.shape[-1:], None, None, eps)


def _write(
    row_TW: torch.Tensor,
    base_width: int,
    hidden_TD: torch.Tensor,
    projection_DN: torch.Tensor,
    base_XN: torch.Tensor,
    offset_N: torch.Tensor,
    eps: float | None,
    impl: str,
) -> None:
    """Writes columns `base_width` to `base_width + N` of the row, reading those before them."""
    nested_TX = row_TW[:, :base_width]
    added_TN = row_TW[:, base_width : base_width + offset_N.shape[0]]
    if impl == "triton":
        from .gpu.nested_embed import launch

        launch(row_TW, base_width, hidden_TD, projection_DN, base_XN, offset_N, eps)
    elif impl == "gemm":
        dtype = row_TW.dtype
        normalised_TD = _normalised(hidden_TD, dtype, eps)
        torch.addmm(offset_N.to(dtype), normalised_TD, projection_DN.to(dtype), out=added_TN)
        added_TN.addmm_(nested_TX, base_XN.to(dtype))
    else:
        out_TW = nested_embed_reference(nested_TX, hidden_TD, projection_DN, base_XN, offset_N, eps=eps)
        added_TN.copy_(out_TW[:, base_width:])


@torch.library.custom_op("protnest::nested_embed_into", mutates_args={"row_TW"})
def _nested_embed_into(
    row_TW: torch.Tensor,
    base_width: int,
    hidden_TD: torch.Tensor,
    projection_DN: torch.Tensor,
    base_XN: torch.Tensor,
    offset_N: torch.Tensor,
    eps: Optional[float],  # noqa: UP045  torch's schemas are read from these annotations, and torch 2.11 knows no `|`
    impl: str,
) -> None:
    _write(row_TW, base_width, hidden_TD, projection_DN, base_XN, offset_N, eps, impl)


@torch.library.custom_op("protnest::nested_embed", mutates_args=())
def _nested_embed(
    nested_TX: torch.Tensor,
    hidden_TD: torch.Tensor,
    projection_DN: torch.Tensor,
    base_XN: torch.Tensor,
    offset_N: torch.Tensor,
    eps: Optional[float],  # noqa: UP045
    impl: str,
) -> torch.Tensor:
    T, X = nested_TX.shape
    out_TW = nested_TX.new_empty((T, X + offset_N.shape[0]))
    out_TW[:, :X] = nested_TX
    _write(out_TW, X, hidden_TD, projection_DN, base_XN, offset_N, eps, impl)
    return out_TW


@_nested_embed_into.register_fake
def _(*_: Any) -> None:
    return None


@_nested_embed.register_fake
def _(nested_TX: torch.Tensor, hidden_TD: torch.Tensor, projection_DN: torch.Tensor, *_: Any) -> torch.Tensor:
    T, X = nested_TX.shape
    return nested_TX.new_empty((T, X + projection_DN.shape[1]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient_TW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Written in operations that have gradients themselves, so that second derivatives exist too."""
    nested_TX, hidden_TD, projection_DN, base_XN, offset_N = ctx.saved_tensors
    dtype, X = nested_TX.dtype, nested_TX.shape[1]
    added_TN = gradient_TW[:, X:]
    normalised_TD = _normalised(hidden_TD, dtype, ctx.eps)
    to_hidden_TD = added_TN @ projection_DN.to(dtype).T
    if ctx.eps is not None:
        deviation_T1 = (hidden_TD.to(dtype).var(dim=-1, keepdim=True, correction=0) + ctx.eps).sqrt()
        along_T1 = (to_hidden_TD * normalised_TD).mean(dim=-1, keepdim=True)
        to_hidden_TD = to_hidden_TD - to_hidden_TD.mean(dim=-1, keepdim=True) - normalised_TD * along_T1
        to_hidden_TD = to_hidden_TD / deviation_T1
    return (
        gradient_TW[:, :X] + added_TN @ base_XN.to(dtype).T,
        to_hidden_TD.to(hidden_TD.dtype),
        (normalised_TD.T @ added_TN).to(projection_DN.dtype),
        (nested_TX.T @ added_TN).to(base_XN.dtype),
        added_TN.sum(dim=0).to(offset_N.dtype),
        None,
        None,
    )


_nested_embed.register_autograd(_backward, setup_context=_keep_for_backward)


def _why_not_triton(nested_TX: torch.Tensor, weight_dtype: torch.dtype) -> str | None:
    if nested_TX.dtype != torch.float32 or weight_dtype == torch.float64:
        return f"the row is {nested_TX.dtype}, the weights {weight_dtype}; it takes fp32 rows and no fp64"
    return why_not_triton(nested_TX.device)


def _choose(nested_TX: torch.Tensor, weight_dtype: torch.dtype, impl: str) -> str:
    if impl == "auto":
        if nested_TX.device.type != "cuda":
            return "gemm"
        reason = _why_not_triton(nested_TX, weight_dtype)
        choice = "triton" if reason is None else "gemm"
        if choice not in _explained:
            _explained.add(choice)
            _logger.info("nested_embed runs %s%s", choice, f": {reason}" if reason else "")
        return choice
    if impl not in _IMPLEMENTATIONS:
        message = f"impl is {impl!r}; allowed: auto, {', '.join(_IMPLEMENTATIONS)}"
        raise ValueError(message)
    if impl == "triton" and (reason := _why_not_triton(nested_TX, weight_dtype)) is not None:
        message = f"impl='triton' cannot run here: {reason}"
        raise RuntimeError(message)
    return impl


def _check(
    nested_TX: torch.Tensor,
    hidden_TD: torch.Tensor,
    projection_DN: torch.Tensor,
    base_XN: torch.Tensor,
    offset_N: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    shapes = [tuple(each.shape) for each in (nested_TX, hidden_TD, projection_DN, base_XN, offset_N)]
    if [len(shape) for shape in shapes] != [2, 2, 2, 2, 1] or not (
        shapes[0][0] == shapes[1][0]
        and shapes[1][1] == shapes[2][0]
        and shapes[0][1] == shapes[3][0]
        and shapes[2][1] == shapes[3][1] == shapes[4][0]
    ):
        named = ", ".join(map(str, shapes))
        message = f"expected row (T, X), hidden (T, D), projection (D, N), base (X, N), offset (N,); got {named}"
        raise ValueError(message)
    if nested_TX.dtype not in _ROW_DTYPES or offset_N.dtype not in _ROW_DTYPES:
        message = f"the row is {nested_TX.dtype} and the offset {offset_N.dtype}; allowed: torch.float32, torch.float64"
        raise ValueError(message)
    if projection_DN.dtype != base_XN.dtype or projection_DN.dtype not in _WEIGHT_DTYPES:
        message = f"projection is {projection_DN.dtype}, base {base_XN.dtype}: they must share one floating dtype"
        raise ValueError(message)
    if not hidden_TD.is_floating_point():
        message = f"hidden is {hidden_TD.dtype}, expected a floating dtype"
        raise ValueError(message)
    if out is not None:
        _check_buffer(nested_TX, out, nested_TX.shape[1] + offset_N.shape[0])


def _check_buffer(nested_TX: torch.Tensor, out: torch.Tensor, width: int) -> None:
    if out.dim() != 2 or out.shape[0] != nested_TX.shape[0] or out.shape[1] < width or out.dtype != nested_TX.dtype:
        message = (
            f"out is {out.dtype} {tuple(out.shape)}, expected {nested_TX.dtype} ({nested_TX.shape[0]}, {width} or more)"
        )
        raise ValueError(message)
    same_place = out.data_ptr() == nested_TX.data_ptr() and out.stride() == nested_TX.stride()
    if out.stride(1) != 1 or (out.numel() and not same_place):
        message = "the row must be the first columns of out, whose columns lie side by side in memory"
        raise ValueError(message)


def nested_embed(
    nested_TX: torch.Tensor,
    hidden_TD: torch.Tensor,
    projection_DN: torch.Tensor,
    base_XN: torch.Tensor,
    offset_N: torch.Tensor,
    *,
    eps: float | None,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Appends to each row what a larger model adds: `[x | n P + x G + c]`; differentiable without `out`.

    Args:
        nested_TX: the row so far, (T, X), fp32 or fp64.
        hidden_TD: the new model's hidden state (T, D), any floating dtype: before its final LayerNorm, or, with
            `eps=None`, normalised already.
        projection_DN: P, (D, N), with the LayerNorm's weight folded in; any floating dtype.
        base_XN: G, (X, N), of the dtype of P.
        offset_N: c, (N,), with the LayerNorm's bias folded in; fp32 or fp64.
        eps: of the LayerNorm; None does not normalise.
        out: a buffer (T, X + N or more) whose first X columns are `nested_TX` itself; the next N are written. Not
            differentiable.
        impl: "auto", "reference", "gemm" or "triton"; a named one runs or raises.

    Returns:
        (T, X + N) of the row's dtype: a new tensor, or those columns of `out`. The first X are the row's very bits.

    Raises:
        ValueError: shapes or dtypes disagree, the row does not lie in `out`, or `impl` is unknown.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    _check(nested_TX, hidden_TD, projection_DN, base_XN, offset_N, out)
    chosen = _choose(nested_TX, projection_DN.dtype, impl)
    if out is None:
        appended: torch.Tensor = _nested_embed(nested_TX, hidden_TD, projection_DN, base_XN, offset_N, eps, chosen)
        return appended
    X = nested_TX.shape[1]
    _nested_embed_into(out, X, hidden_TD, projection_DN, base_XN, offset_N, eps, chosen)
    return out[:, : X + offset_N.shape[0]]
