"""Knowledge distillation with complementary regularisers, without a single (N, V) temporary.

With student logits s, teacher logits t and temperature T, for each row

    p = softmax(t / T),  eps = lambda (1 - max p),  pbar = (1 - eps) p + eps / V,  q = softmax(s / T)
    KL = sum pbar log(pbar / q)
    w = 0.5 + 0.5 (H - min H) / (max H - min H),  H the entropy of softmax(t), extremes over the row's segment
    loss = alpha mean(CE(softmax(s), label)) + (1 - alpha) T^2 sum(w KL) / n
    dloss / ds = (1 - alpha) T w (q - pbar) / n + alpha (softmax(s) - onehot) / n_hard

n is the number of rows in the soft loss, or the sum of their weights. Definitions: Wijaya 2026, "complementary
regularisers", as its code has them, except that nothing is added inside logarithms (0 log 0 = 0): 1e-10 there moves the
loss by 4e-6 to 2e-4. Nothing flows back to the teacher.

A segment whose entropies differ by less than rounding gets w = 0.5. A segment of one row, too. A segment, or a batch,
none of whose rows count adds 0, and the loss still carries a graph. Rows that count in neither loss are not read.

Implementations:
    reference  the formulas above, one by one, differentiated by torch: the oracle. Some 20 (N, V) temporaries.
    chunked    torch on blocks of rows of bounded size; any device, fp64 too.
    cpu        the C++ extension, vectorised, each row in the second-level cache; fp32, and 16-bit logits widened.
    triton     one program a row, or a few rows a program where V <= 128. CUDA, compute capability >= 8.0.

The last three keep seven numbers a row for the gradient, which is worked out anew from the logits.

Shapes: N rows, V vocabulary, B segments, B1 = B + 1, S numbers kept a row.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import logging
from types import ModuleType
from typing import Any, Optional

import torch
import torch.nn.functional as F

from .extension import missing_reason
from .hardware import why_not_triton
from .kd_options import KDOptions, check_logits, check_rows
from .kd_rows import (
    RowResults,
    RowScalars,
    loss_scales,
    soft_and_hard_rows,
    sum_rows,
    weigh_rows,
    work_dtype,
)

_logger = logging.getLogger(__name__)

IMPLS = ("auto", "reference", "chunked", "cpu", "triton")


def kd_loss_reference(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    soft_rows: torch.Tensor | None = None,
    *,
    options: KDOptions | None = None,
) -> torch.Tensor:
    """`kd_loss` written out; in fp64 for fp64 logits, else in fp32; differentiated by torch."""
    options = options or KDOptions()
    dtype, T = work_dtype(student_logits, teacher_logits), options.temperature
    soft_N, hard_N = soft_and_hard_rows(labels, soft_rows, options.ignore_index)
    # Widened once, so that the gradient is rounded once.
    student_logits = student_logits.to(dtype)
    s, t = student_logits[soft_N], teacher_logits[soft_N].detach().to(dtype)
    p = torch.softmax(t / T, dim=-1)
    eps = options.smoothing * (1 - p.amax(dim=-1, keepdim=True)) if options.smooth else 0.0
    target = (1 - eps) * p + eps / t.shape[-1]
    kl = (torch.xlogy(target, target) - target * torch.log_softmax(s / T, dim=-1)).sum(dim=-1)
    weight = _reference_weights(t, soft_N, cu_seqlens) if options.uncertainty else torch.ones_like(kl)
    total = weight.sum() if options.weight_normalization == "weight" else soft_N.sum()
    soft = (weight * kl).sum() / total.clamp(min=1 if options.weight_normalization == "count" else 0.5)
    hard = F.cross_entropy(student_logits[hard_N], labels[hard_N].long(), reduction="sum") / hard_N.sum().clamp(min=1)
    return options.alpha * hard + (1 - options.alpha) * T**2 * soft


def _reference_weights(t: torch.Tensor, soft_N: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(t, dim=-1)
    entropy = -torch.xlogy(p, p).sum(dim=-1)
    weights = [entropy[:0]]
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        first = int(soft_N[:begin].sum())
        own = entropy[first : first + int(soft_N[begin:end].sum())]
        if own.numel():
            span = own.max() - own.min()
            threshold = max(1e-8, 64 * torch.finfo(own.dtype).eps * float(own.max()))
            share = (own - own.min()) / span if float(span) >= threshold else torch.zeros_like(own)
            weights.append(0.5 + 0.5 * share)
    return torch.cat(weights)


_ROWS = {"chunked": "kd_chunked", "cpu": "kd_cpu", "triton": "gpu.kd_loss"}


def rows_module(impl: str) -> ModuleType:
    """The implementation's `losses`, `entropies` and `gradient` of blocks of rows."""
    return importlib.import_module(f".{_ROWS[impl]}", __package__)


# Torch reads the operations' schemas from their annotations; torch 2.11 knows Optional and no `| None` there.
@torch.library.custom_op("protnest::kd_loss", mutates_args=())
def _kd_loss_op(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    soft_rows: Optional[torch.Tensor],  # noqa: UP045
    temperature: float,
    alpha: float,
    smoothing: float,
    uncertainty: bool,
    smooth: bool,
    weight_normalization: str,
    ignore_index: int,
    inplace: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss (0-d), the numbers kept (S, N) and the two scales (2,)."""
    options = KDOptions(
        temperature=temperature,
        alpha=alpha,
        smoothing=smoothing,
        uncertainty=uncertainty,
        smooth=smooth,
        weight_normalization=weight_normalization,
        ignore_index=ignore_index,
    )
    results = RowResults.of_rows(student_NV.shape[0], work_dtype(student_NV, teacher_NV), student_NV.device)
    soft_N, hard_N = soft_and_hard_rows(labels_N, soft_rows, ignore_index)
    rows = rows_module(impl)
    rows.losses(student_NV, teacher_NV, labels_N, soft_N, hard_N, options, results)
    if impl == "triton":
        loss, scales = rows.weigh_and_sum(results, soft_N, hard_N, cu_seqlens, options)
    else:
        weight_N = RowScalars(*results.kept_SN).weight
        weight_N.copy_(weigh_rows(results.entropy_N, soft_N, cu_seqlens, options))
        scales = loss_scales(weight_N, soft_N, hard_N, options)
        loss = sum_rows(results, scales, temperature)
    return loss, results.kept_SN.clone(), scales


@_kd_loss_op.register_fake
def _(student_NV: torch.Tensor, teacher_NV: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like, dtype = student_NV, work_dtype(student_NV, teacher_NV)
    kept = like.new_empty((len(RowScalars._fields), like.shape[0]), dtype=dtype)
    return like.new_empty((), dtype=dtype), kept, like.new_empty((2,), dtype=dtype)


@torch.library.custom_op("protnest::kd_loss_gradient", mutates_args=("out_NV",))
def _gradient_op(
    out_NV: torch.Tensor,
    grad_loss: torch.Tensor,
    student_NV: Optional[torch.Tensor],  # noqa: UP045
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    kept_SN: torch.Tensor,
    scales: torch.Tensor,
    temperature: float,
    ignore_index: int,
    impl: str,
) -> None:
    """Writes dloss / ds times `grad_loss` into `out_NV`: the student's logits, where `student_NV` is None."""
    given_NV = out_NV if student_NV is None else student_NV
    hard_N = labels_N != ignore_index
    rows_module(impl).gradient(out_NV, given_NV, teacher_NV, labels_N, hard_N, kept_SN, scales * grad_loss, temperature)


@_gradient_op.register_fake
def _(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    student_NV, teacher_NV, labels_N = inputs[:3]
    ctx.temperature, ctx.ignore_index, ctx.inplace, ctx.impl = inputs[5], *inputs[11:14]
    ctx.save_for_backward(student_NV, teacher_NV, labels_N, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # Once the logits are overwritten, torch refuses to unpack them again: a second backward raises.
    student_NV, teacher_NV, labels_N, kept_SN, scales = ctx.saved_tensors
    out_NV = student_NV.detach() if ctx.inplace else torch.empty_like(student_NV, memory_format=torch.contiguous_format)
    given_NV = None if ctx.inplace else student_NV
    rest = (teacher_NV, labels_N, kept_SN, scales, ctx.temperature, ctx.ignore_index, ctx.impl)
    _gradient_op(out_NV, grad_loss, given_NV, *rest)
    return (out_NV, *[None] * 13)


_kd_loss_op.register_autograd(_backward, setup_context=_setup_context)


def _why_not_triton(*tensors: torch.Tensor) -> str | None:
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "fp64 is not for Triton"
    return why_not_triton(tensors[0].device)


def _why_not_cpu(*tensors: torch.Tensor) -> str | None:
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "fp64 is not for the C++ extension"
    if tensors[0].device.type != "cpu":
        return f"tensors are on {tensors[0].device.type}"
    return missing_reason()


_WHY_NOT = {"triton": _why_not_triton, "cpu": _why_not_cpu}


def choose_impl(operation: str, impl: str, *tensors: torch.Tensor) -> str:
    """`impl`, or what "auto" stands for on these tensors, which is logged once.

    Raises:
        ValueError: `impl` is none of `IMPLS`.
        RuntimeError: the named one cannot run.
    """
    if impl not in IMPLS:
        message = f"{operation}: impl is {impl!r}; allowed are {', '.join(map(repr, IMPLS))}"
        raise ValueError(message)
    if impl != "auto":
        reason = _WHY_NOT[impl](*tensors) if impl in _WHY_NOT else None
        if reason is not None:
            message = f"{operation}: impl={impl!r} cannot run here: {reason}"
            raise RuntimeError(message)
        return impl
    fastest = "triton" if tensors[0].device.type == "cuda" else "cpu"
    reason = _WHY_NOT[fastest](*tensors)
    choice = fastest if reason is None else "chunked"
    _log_choice(operation, choice, reason)
    return choice


@functools.cache
def _log_choice(operation: str, choice: str, reason: str | None) -> None:
    _logger.info("%s: auto runs %s%s", operation, choice, f": {reason}" if reason else "")


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    temperature: float = 2.0,
    alpha: float = 0.5,
    smoothing: float = 0.1,
    uncertainty: bool = True,
    smooth: bool = True,
    weight_normalization: str = "count",
    soft_rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Distillation loss of packed rows, which are aligned already: row i predicts `labels[i]`.

    Args:
        student_logits: (N, V), fp16, bf16, fp32 or fp64; the gradient goes there, in this dtype.
        teacher_logits: (N, V), any of these dtypes.
        labels: int64 or int32 (N,), 0 to V - 1 or `ignore_index`.
        cu_seqlens: int64 or int32 (B + 1,), from 0 to N, never falling: the segments.
        temperature: T of the soft loss.
        alpha: share of the hard loss.
        smoothing: lambda, the most that the uniform distribution can get of a target.
        uncertainty: weight rows by the teacher's entropy within their segment.
        smooth: smooth targets by the teacher's confidence.
        weight_normalization: "count" divides the soft loss by its rows, as published; "weight" by the sum of weights.
        soft_rows: bool (N,), the soft loss's rows; by default those with a label.
        ignore_index: label of rows without one.
        inplace: lets the gradient overwrite `student_logits`: saves (N, V), and the logits are lost after backward.
        impl: "auto", "reference", "chunked", "cpu" or "triton"; a named one runs or raises.

    Returns:
        0-d, fp32 (fp64 where logits are).

    Raises:
        ValueError: shapes, dtypes, devices or options are wrong; on the CPU also: labels out of range, `cu_seqlens`
            falling or not from 0 to N, NaN or infinite logits in rows that count.
        RuntimeError: the named implementation cannot run here.
    """
    options = KDOptions(
        temperature=temperature,
        alpha=alpha,
        smoothing=smoothing,
        uncertainty=uncertainty,
        smooth=smooth,
        weight_normalization=weight_normalization,
        ignore_index=ignore_index,
    )
    check_logits(student_logits, teacher_logits)
    N, V = student_logits.shape
    check_rows(N, V, student_logits.device, labels, cu_seqlens, soft_rows, ignore_index)
    chosen = choose_impl("kd_loss", impl, student_logits, teacher_logits)
    if chosen == "reference":
        return kd_loss_reference(student_logits, teacher_logits, labels, cu_seqlens, soft_rows, options=options)
    if inplace and student_logits.stride(1) != 1:
        message = (
            f"inplace needs logits whose rows are contiguous, student_logits has strides {student_logits.stride()}"
        )
        raise ValueError(message)
    outputs: tuple[torch.Tensor, ...] = _kd_loss_op(
        student_logits,
        teacher_logits.detach(),
        labels,
        cu_seqlens,
        soft_rows,
        *dataclasses.astuple(options),
        inplace,
        chosen,
    )
    return outputs[0]
