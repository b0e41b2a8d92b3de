"""Triton kernels of the distillation loss; `protnest.kernels.kd_loss` has the formulas, `kd_chunked` the arguments.

    wide    a program a row, tile after tile: the teacher's statistics online, then teacher (from the second-level cache
            by then) and student together, online too. Bytes to move: forward 2 V in, gradient 2 V in and V out.
    narrow  a few rows a program, each whole in registers, where V <= 128: every logit is read once.

At T = 2 one exponential serves both temperatures. Everything is added up in fp32; sums along a row stay in as many
lanes as the tile has until the end of the row. Nothing waits for the host.

The file is long because six kernels of one operation share its layout of results and its launches.

Shapes: N rows, V vocabulary, B segments, S numbers kept a row.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from ..kd_options import KDOptions
from ..kd_rows import RowResults
from .launch import Launch

NARROW_VOCABULARY = 128
_NARROW_TILE = 1024
_WIDE_BLOCK, _WIDE_WARPS = 2048, 8
_NARROW_WARPS = 4
_SEGMENT_BLOCK, _SEGMENT_WARPS = 1024, 4
# Rows of the table of results, in the order of RowScalars and RowResults.
_STUDENT_MAX, _STUDENT_TOTAL, _STUDENT_TOTAL_1, _TEACHER_MAX, _TEACHER_TOTAL, _EPS, _WEIGHT = map(
    tl.constexpr, range(7)
)
_SOFT_LOSS, _HARD_LOSS, _ENTROPY = map(tl.constexpr, range(7, 10))


@triton.jit
def _exp_1(exps, shifted, SQUARE: tl.constexpr):
    """exp(z - max) from exp((z - max) / T): at T = 2 the square."""
    if SQUARE:
        return exps * exps
    else:
        return tl.exp(shifted)


@triton.jit
def _log_target(target, shifted, log_total, inverse_T, SMOOTH: tl.constexpr):
    """log pbar; where nothing is smoothed from the logit itself, so that p = 0 is no trouble."""
    if SMOOTH:
        return tl.log(tl.maximum(target, 1e-37))
    else:
        return shifted * inverse_T - log_total


@triton.jit
def _wide_fwd_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    soft_ptr,
    hard_ptr,
    results_ptr,
    student_stride,
    teacher_stride,
    results_stride,
    V,
    temperature,
    smoothing,
    SQUARE: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    STUDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    is_soft = tl.load(soft_ptr + row) != 0
    is_hard = tl.load(hard_ptr + row) != 0
    if not (is_soft | is_hard):
        return
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    results_ptr += row
    inverse_T = 1.0 / temperature
    columns = tl.arange(0, BLOCK)

    # The teacher: max, sums of exp((t - max) / T), of e1 = exp(t - max) and of e1 (t - max).
    t_max = -float("inf")
    t_total = tl.zeros([BLOCK], tl.float32)
    t_total_1 = tl.zeros([BLOCK], tl.float32)
    t_product = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        inside = begin + columns < V
        t = tl.load(teacher_ptr + begin + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(t_max, tl.max(t, axis=0))
        # The first tile has nothing to rescale, and -inf - (-inf) is no number.
        fall = tl.where(begin == 0, 0.0, t_max - new_max)
        shifted = tl.where(inside, t - new_max, 0.0)
        exps = tl.where(inside, tl.exp(shifted * inverse_T), 0.0)
        t_total = t_total * tl.exp(fall * inverse_T) + exps
        if ENTROPY:
            exps_1 = _exp_1(exps, shifted, SQUARE)
            exps_1 = tl.where(inside, exps_1, 0.0)
            rescale = tl.exp(fall)
            t_product = (t_product + fall * t_total_1) * rescale + exps_1 * shifted
            t_total_1 = t_total_1 * rescale + exps_1
        t_max = new_max
    total = tl.sum(t_total, axis=0)
    if ENTROPY:
        total_1 = tl.sum(t_total_1, axis=0)
        entropy = tl.log(total_1) - tl.sum(t_product, axis=0) / total_1
        tl.store(results_ptr + _ENTROPY * results_stride, entropy)
    if not STUDENT:
        return

    # Both: the student's sums online, and sum pbar (log pbar - (s - max) / T), corrected as the maximum grows.
    eps = 0.0
    if SMOOTH:
        eps = smoothing * (1.0 - 1.0 / total)
    scale = (1.0 - eps) / total
    floor = eps / V
    log_total = tl.log(total)
    s_max = -float("inf")
    s_total = tl.zeros([BLOCK], tl.float32)
    s_total_1 = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        inside = begin + columns < V
        s = tl.load(student_ptr + begin + columns, mask=inside, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher_ptr + begin + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(s_max, tl.max(s, axis=0))
        fall = tl.where(begin == 0, 0.0, s_max - new_max)
        s_shifted = tl.where(inside, s - new_max, 0.0)
        exps = tl.where(inside, tl.exp(s_shifted * inverse_T), 0.0)
        exps_1 = tl.where(inside, _exp_1(exps, s_shifted, SQUARE), 0.0)
        s_total = s_total * tl.exp(fall * inverse_T) + exps
        s_total_1 = s_total_1 * tl.exp(fall) + exps_1
        t_shifted = tl.where(inside, t - t_max, 0.0)
        target = tl.where(inside, tl.exp(t_shifted * inverse_T) * scale + floor, 0.0)
        log_target = _log_target(target, t_shifted, log_total, inverse_T, SMOOTH)
        cross += target * (log_target - s_shifted * inverse_T) - mass * (fall * inverse_T)
        mass += target
        s_max = new_max
    total_s = tl.sum(s_total, axis=0)
    total_s_1 = tl.sum(s_total_1, axis=0)
    soft_loss = tl.sum(cross, axis=0) + tl.log(total_s)
    label = tl.load(labels_ptr + row, mask=is_hard, other=0).to(tl.int64)
    # A label outside the vocabulary must not read elsewhere: it gives NaN.
    known = (label >= 0) & (label < V)
    own = tl.load(student_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    hard_loss = tl.where(is_hard, tl.log(total_s_1) - (own - s_max), 0.0)
    tl.store(results_ptr + _STUDENT_MAX * results_stride, s_max)
    tl.store(results_ptr + _STUDENT_TOTAL * results_stride, total_s)
    tl.store(results_ptr + _STUDENT_TOTAL_1 * results_stride, total_s_1)
    tl.store(results_ptr + _TEACHER_MAX * results_stride, t_max)
    tl.store(results_ptr + _TEACHER_TOTAL * results_stride, total)
    tl.store(results_ptr + _EPS * results_stride, eps)
    tl.store(results_ptr + _SOFT_LOSS * results_stride, soft_loss)
    tl.store(results_ptr + _HARD_LOSS * results_stride, hard_loss)


@triton.jit
def _wide_bwd_kernel(
    out_ptr,
    student_ptr,
    teacher_ptr,
    labels_ptr,
    hard_ptr,
    kept_ptr,
    scales_ptr,
    out_stride,
    student_stride,
    teacher_stride,
    kept_stride,
    V,
    temperature,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kept_ptr += row
    out_ptr += row * out_stride
    weight = tl.load(kept_ptr + _WEIGHT * kept_stride)
    is_hard = tl.load(hard_ptr + row) != 0
    columns = tl.arange(0, BLOCK)
    if not ((weight != 0) | is_hard):
        for begin in range(0, V, BLOCK):
            zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
            tl.store(out_ptr + begin + columns, zeros, mask=begin + columns < V)
        return
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    soft = weight * tl.load(scales_ptr)
    hard = tl.where(is_hard, tl.load(scales_ptr + 1), 0.0)
    label = tl.load(labels_ptr + row, mask=is_hard, other=-1).to(tl.int64)
    s_max = tl.load(kept_ptr + _STUDENT_MAX * kept_stride)
    t_max = tl.load(kept_ptr + _TEACHER_MAX * kept_stride)
    eps = tl.load(kept_ptr + _EPS * kept_stride)
    student_scale = soft / tl.load(kept_ptr + _STUDENT_TOTAL * kept_stride)
    student_scale_1 = hard / tl.load(kept_ptr + _STUDENT_TOTAL_1 * kept_stride)
    teacher_scale = soft * (1.0 - eps) / tl.load(kept_ptr + _TEACHER_TOTAL * kept_stride)
    floor = soft * eps / V
    inverse_T = 1.0 / temperature
    for begin in range(0, V, BLOCK):
        inside = begin + columns < V
        # Read before anything is written: out may be the student.
        s_shifted = tl.load(student_ptr + begin + columns, mask=inside, other=0.0).to(tl.float32) - s_max
        t_shifted = tl.load(teacher_ptr + begin + columns, mask=inside, other=0.0).to(tl.float32) - t_max
        exps = tl.exp(s_shifted * inverse_T)
        exps_1 = _exp_1(exps, s_shifted, SQUARE)
        target = tl.exp(t_shifted * inverse_T) * teacher_scale + floor
        gradient = exps * student_scale + exps_1 * student_scale_1 - target
        gradient -= tl.where(begin + columns == label, hard, 0.0)
        tl.store(out_ptr + begin + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _narrow_fwd_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    soft_ptr,
    hard_ptr,
    results_ptr,
    student_stride,
    teacher_stride,
    results_stride,
    N,
    V,
    temperature,
    smoothing,
    SQUARE: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    STUDENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    there = rows < N
    is_soft = tl.load(soft_ptr + rows, mask=there, other=0) != 0
    is_hard = tl.load(hard_ptr + rows, mask=there, other=0) != 0
    used = is_soft | is_hard
    inside = used[:, None] & (columns < V)
    results_ptr += rows
    inverse_T = 1.0 / temperature

    # Rows that do not count are read as zeros: finite throughout, and not stored.
    t = tl.load(teacher_ptr + rows[:, None] * teacher_stride + columns, mask=inside, other=0.0).to(tl.float32)
    t_max = tl.max(tl.where(columns < V, t, -float("inf")), axis=1)
    t_shifted = tl.where(columns < V, t - t_max[:, None], 0.0)
    t_exps = tl.where(columns < V, tl.exp(t_shifted * inverse_T), 0.0)
    total = tl.sum(t_exps, axis=1)
    if ENTROPY:
        exps_1 = tl.where(columns < V, _exp_1(t_exps, t_shifted, SQUARE), 0.0)
        total_1 = tl.sum(exps_1, axis=1)
        entropy = tl.log(total_1) - tl.sum(exps_1 * t_shifted, axis=1) / total_1
        tl.store(results_ptr + _ENTROPY * results_stride, entropy, mask=used)
    if not STUDENT:
        return

    s = tl.load(student_ptr + rows[:, None] * student_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s_max = tl.max(tl.where(columns < V, s, -float("inf")), axis=1)
    s_shifted = tl.where(columns < V, s - s_max[:, None], 0.0)
    s_exps = tl.where(columns < V, tl.exp(s_shifted * inverse_T), 0.0)
    total_s = tl.sum(s_exps, axis=1)
    total_s_1 = tl.sum(tl.where(columns < V, _exp_1(s_exps, s_shifted, SQUARE), 0.0), axis=1)
    eps = tl.zeros([ROWS], tl.float32)
    if SMOOTH:
        eps = smoothing * (1.0 - 1.0 / total)
    target = t_exps * ((1.0 - eps) / total)[:, None] + (eps / V)[:, None]
    log_target = _log_target(target, t_shifted, tl.log(total)[:, None], inverse_T, SMOOTH)
    cross = tl.where(columns < V, target * (log_target - s_shifted * inverse_T), 0.0)
    soft_loss = tl.sum(cross, axis=1) + tl.log(total_s)
    label = tl.load(labels_ptr + rows, mask=is_hard, other=0).to(tl.int64)
    own = tl.sum(tl.where(columns == label[:, None], s_shifted, 0.0), axis=1)
    known = (label >= 0) & (label < V)
    hard_loss = tl.where(is_hard, tl.where(known, tl.log(total_s_1) - own, float("nan")), 0.0)
    tl.store(results_ptr + _STUDENT_MAX * results_stride, s_max, mask=used)
    tl.store(results_ptr + _STUDENT_TOTAL * results_stride, total_s, mask=used)
    tl.store(results_ptr + _STUDENT_TOTAL_1 * results_stride, total_s_1, mask=used)
    tl.store(results_ptr + _TEACHER_MAX * results_stride, t_max, mask=used)
    tl.store(results_ptr + _TEACHER_TOTAL * results_stride, total, mask=used)
    tl.store(results_ptr + _EPS * results_stride, eps, mask=used)
    tl.store(results_ptr + _SOFT_LOSS * results_stride, soft_loss, mask=used)
    tl.store(results_ptr + _HARD_LOSS * results_stride, hard_loss, mask=used)


@triton.jit
def _narrow_bwd_kernel(
    out_ptr,
    student_ptr,
    teacher_ptr,
    labels_ptr,
    hard_ptr,
    kept_ptr,
    scales_ptr,
    out_stride,
    student_stride,
    teacher_stride,
    kept_stride,
    N,
    V,
    temperature,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    there = rows < N
    kept_ptr += rows
    weight = tl.load(kept_ptr + _WEIGHT * kept_stride, mask=there, other=0.0)
    is_hard = tl.load(hard_ptr + rows, mask=there, other=0) != 0
    used = (weight != 0) | is_hard
    inside = used[:, None] & (columns < V)
    soft = weight * tl.load(scales_ptr)
    hard = tl.where(is_hard, tl.load(scales_ptr + 1), 0.0)
    label = tl.load(labels_ptr + rows, mask=is_hard, other=-1).to(tl.int64)
    s_max = tl.load(kept_ptr + _STUDENT_MAX * kept_stride, mask=used, other=0.0)
    t_max = tl.load(kept_ptr + _TEACHER_MAX * kept_stride, mask=used, other=0.0)
    eps = tl.load(kept_ptr + _EPS * kept_stride, mask=used, other=0.0)
    student_scale = soft / tl.load(kept_ptr + _STUDENT_TOTAL * kept_stride, mask=used, other=1.0)
    student_scale_1 = hard / tl.load(kept_ptr + _STUDENT_TOTAL_1 * kept_stride, mask=used, other=1.0)
    teacher_scale = soft * (1.0 - eps) / tl.load(kept_ptr + _TEACHER_TOTAL * kept_stride, mask=used, other=1.0)
    inverse_T = 1.0 / temperature
    s = tl.load(student_ptr + rows[:, None] * student_stride + columns, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(teacher_ptr + rows[:, None] * teacher_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s_shifted = s - s_max[:, None]
    exps = tl.exp(s_shifted * inverse_T)
    exps_1 = _exp_1(exps, s_shifted, SQUARE)
    target = tl.exp((t - t_max[:, None]) * inverse_T) * teacher_scale[:, None] + (soft * eps / V)[:, None]
    gradient = exps * student_scale[:, None] + exps_1 * student_scale_1[:, None] - target
    gradient -= tl.where(columns == label[:, None], hard[:, None], 0.0)
    gradient = tl.where(used[:, None], gradient, 0.0)
    places = out_ptr + rows[:, None] * out_stride + columns
    tl.store(places, gradient.to(out_ptr.dtype.element_ty), mask=there[:, None] & (columns < V))


@triton.jit
def _segments_kernel(
    results_ptr,
    soft_ptr,
    hard_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    results_stride,
    UNCERTAINTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights of a segment's rows, and its five sums: w KL, w, soft rows, cross-entropy, hard rows."""
    segment = tl.program_id(0)
    first = tl.load(cu_seqlens_ptr + segment).to(tl.int64)
    last = tl.load(cu_seqlens_ptr + segment + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.full([BLOCK], -float("inf"), tl.float32)
    if UNCERTAINTY:
        for begin in range(first, last, BLOCK):
            rows = begin + lanes
            soft = tl.load(soft_ptr + rows, mask=rows < last, other=0) != 0
            entropy = tl.load(results_ptr + _ENTROPY * results_stride + rows, mask=soft, other=0.0)
            least = tl.minimum(least, tl.where(soft, entropy, float("inf")))
            most = tl.maximum(most, tl.where(soft, entropy, -float("inf")))
    low = tl.min(least, axis=0)
    high = tl.max(most, axis=0)
    span = high - low
    # 64 times the spacing of fp32 at 1, or 1e-8.
    spread = span >= tl.maximum(1e-8, 64 * 1.1920928955078125e-07 * high)
    inverse_span = tl.where(spread, 1.0 / tl.where(spread, span, 1.0), 0.0)
    low = tl.where(spread, low, 0.0)
    soft_sum = tl.zeros([BLOCK], tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    soft_rows = tl.zeros([BLOCK], tl.float32)
    hard_sum = tl.zeros([BLOCK], tl.float32)
    hard_rows = tl.zeros([BLOCK], tl.float32)
    for begin in range(first, last, BLOCK):
        rows = begin + lanes
        soft = tl.load(soft_ptr + rows, mask=rows < last, other=0) != 0
        hard = tl.load(hard_ptr + rows, mask=rows < last, other=0) != 0
        weight = tl.where(soft, 1.0, 0.0)
        if UNCERTAINTY:
            entropy = tl.load(results_ptr + _ENTROPY * results_stride + rows, mask=soft, other=0.0)
            weight = tl.where(soft, 0.5 + 0.5 * (entropy - low) * inverse_span, 0.0)
        tl.store(results_ptr + _WEIGHT * results_stride + rows, weight, mask=rows < last)
        soft_sum += weight * tl.load(results_ptr + _SOFT_LOSS * results_stride + rows, mask=soft, other=0.0)
        hard_sum += tl.load(results_ptr + _HARD_LOSS * results_stride + rows, mask=hard, other=0.0)
        weight_sum += weight
        soft_rows += tl.where(soft, 1.0, 0.0)
        hard_rows += tl.where(hard, 1.0, 0.0)
    sums_ptr += segment * 5
    tl.store(sums_ptr, tl.sum(soft_sum, axis=0))
    tl.store(sums_ptr + 1, tl.sum(weight_sum, axis=0))
    tl.store(sums_ptr + 2, tl.sum(soft_rows, axis=0))
    tl.store(sums_ptr + 3, tl.sum(hard_sum, axis=0))
    tl.store(sums_ptr + 4, tl.sum(hard_rows, axis=0))


@triton.jit
def _total_kernel(sums_ptr, loss_ptr, scales_ptr, B, temperature, alpha, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """The loss and the gradient's two scales, from the segments' sums; one program."""
    lanes = tl.arange(0, BLOCK)
    soft_sum = tl.zeros([BLOCK], tl.float32)
    divisor = tl.zeros([BLOCK], tl.float32)
    hard_sum = tl.zeros([BLOCK], tl.float32)
    hard_rows = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, B, BLOCK):
        there = begin + lanes < B
        own = sums_ptr + (begin + lanes) * 5
        soft_sum += tl.load(own, mask=there, other=0.0)
        divisor += tl.load(own + (1 if BY_WEIGHT else 2), mask=there, other=0.0)
        hard_sum += tl.load(own + 3, mask=there, other=0.0)
        hard_rows += tl.load(own + 4, mask=there, other=0.0)
    soft_total = tl.maximum(tl.sum(divisor, axis=0), 0.5 if BY_WEIGHT else 1.0)
    soft_scale = (1.0 - alpha) * temperature / soft_total
    hard_scale = alpha / tl.maximum(tl.sum(hard_rows, axis=0), 1.0)
    loss = temperature * soft_scale * tl.sum(soft_sum, axis=0) + hard_scale * tl.sum(hard_sum, axis=0)
    tl.store(loss_ptr, loss)
    tl.store(scales_ptr, soft_scale)
    tl.store(scales_ptr + 1, hard_scale)


def _is_narrow(vocabulary: int) -> bool:
    return vocabulary <= NARROW_VOCABULARY


def _narrow_tile(vocabulary: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(vocabulary))
    return {"ROWS": _NARROW_TILE // block, "BLOCK": block}


def _powers(temperature: float) -> dict[str, bool]:
    return {"SQUARE": temperature == 2.0}


def _plain(table_NV: torch.Tensor) -> torch.Tensor:
    return table_NV if table_NV.stride(1) == 1 else table_NV.contiguous()


def _launch_forward(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    soft_N: torch.Tensor,
    hard_N: torch.Tensor,
    table_SN: torch.Tensor,
    temperature: float,
    smoothing: float,
    switches: dict[str, bool],
) -> None:
    N, V = teacher_NV.shape
    if N == 0:
        return
    student_NV, teacher_NV = _plain(student_NV), _plain(teacher_NV)
    tensors = (student_NV, teacher_NV, labels_N, soft_N, hard_N, table_SN)
    strides = (student_NV.stride(0), teacher_NV.stride(0), table_SN.stride(0))
    constants: dict[str, Any] = {**_powers(temperature), **switches}
    if _is_narrow(V):
        tile = _narrow_tile(V)
        _narrow_fwd_kernel[(triton.cdiv(N, tile["ROWS"]),)](
            *tensors, *strides, N, V, temperature, smoothing, **constants, **tile, num_warps=_NARROW_WARPS
        )
    else:
        _wide_fwd_kernel[(N,)](
            *tensors, *strides, V, temperature, smoothing, **constants, BLOCK=_WIDE_BLOCK, num_warps=_WIDE_WARPS
        )


def losses(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    soft_N: torch.Tensor,
    hard_N: torch.Tensor,
    options: KDOptions,
    results: RowResults,
    row_numbers: torch.Tensor | None = None,
) -> None:
    """See `kd_chunked.losses`; nothing is checked, since that would make the host wait."""
    switches = {"SMOOTH": options.smooth, "ENTROPY": options.uncertainty, "STUDENT": True}
    table_SN = _table(results)
    _launch_forward(
        student_NV, teacher_NV, labels_N, soft_N, hard_N, table_SN, options.temperature, options.smoothing, switches
    )


def _table(results: RowResults) -> torch.Tensor:
    """The whole table that the results are views of: S and the three losses, N each."""
    kept_SN, rows = results.kept_SN, results.kept_SN.shape[0] + 3
    return kept_SN.as_strided((rows, kept_SN.shape[1]), kept_SN.stride(), kept_SN.storage_offset())


def entropies(
    teacher_NV: torch.Tensor, used_N: torch.Tensor, entropy_N: torch.Tensor, row_numbers: torch.Tensor | None = None
) -> None:
    """See `kd_chunked.entropies`."""
    table_SN = entropy_N.new_empty((10, len(entropy_N)))
    # At T = 2 one exponential is enough.
    switches = {"SMOOTH": False, "ENTROPY": True, "STUDENT": False}
    none_N = torch.zeros_like(used_N)
    _launch_forward(teacher_NV, teacher_NV, none_N, used_N, none_N, table_SN, 2.0, 0.0, switches)
    torch.where(used_N, table_SN[9], entropy_N, out=entropy_N)


def weigh_and_sum(
    results: RowResults, soft_N: torch.Tensor, hard_N: torch.Tensor, cu_seqlens: torch.Tensor, options: KDOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills the weights; gives the loss (0-d) and the gradient's two scales (2,)."""
    table_SN, B = _table(results), cu_seqlens.numel() - 1
    sums_B5 = table_SN.new_empty((B, 5))
    loss, scales = table_SN.new_empty(()), table_SN.new_empty(2)
    if B:
        _segments_kernel[(B,)](
            table_SN,
            soft_N,
            hard_N,
            cu_seqlens,
            sums_B5,
            table_SN.stride(0),
            UNCERTAINTY=options.uncertainty,
            BLOCK=_SEGMENT_BLOCK,
            num_warps=_SEGMENT_WARPS,
        )
    _total_kernel[(1,)](
        sums_B5,
        loss,
        scales,
        B,
        options.temperature,
        options.alpha,
        BY_WEIGHT=options.weight_normalization == "weight",
        BLOCK=_SEGMENT_BLOCK,
        num_warps=_SEGMENT_WARPS,
    )
    return loss, scales


def gradient(
    out_NV: torch.Tensor,
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    hard_N: torch.Tensor,
    kept_SN: torch.Tensor,
    scales: torch.Tensor,
    temperature: float,
) -> None:
    """See `kd_chunked.gradient`; rows of `out_NV` must be contiguous."""
    N, V = student_NV.shape
    if N == 0:
        return
    assert out_NV.stride(1) == 1
    student_NV, teacher_NV = _plain(student_NV), _plain(teacher_NV)
    tensors = (out_NV, student_NV, teacher_NV, labels_N, hard_N, kept_SN, scales)
    strides = (out_NV.stride(0), student_NV.stride(0), teacher_NV.stride(0), kept_SN.stride(0))
    powers = _powers(temperature)
    if _is_narrow(V):
        tile = _narrow_tile(V)
        _narrow_bwd_kernel[(triton.cdiv(N, tile["ROWS"]),)](
            *tensors, *strides, N, V, temperature, **powers, **tile, num_warps=_NARROW_WARPS
        )
    else:
        _wide_bwd_kernel[(N,)](*tensors, *strides, V, temperature, **powers, BLOCK=_WIDE_BLOCK, num_warps=_WIDE_WARPS)


def launches() -> list[Launch]:
    """Every configuration: kernels, switches, temperatures and logits' types, for ahead-of-time compilation."""
    found: list[Launch] = []
    numbers = {"temperature": "fp32", "smoothing": "fp32", "alpha": "fp32", "V": "i32", "N": "i32", "B": "i32"}
    table = {"results_ptr": "*fp32", "kept_ptr": "*fp32", "scales_ptr": "*fp32", "sums_ptr": "*fp32"}
    flags = {"labels_ptr": "*i64", "soft_ptr": "*i1", "hard_ptr": "*i1", "cu_seqlens_ptr": "*i64", "loss_ptr": "*fp32"}

    def add(name: str, kernel: Any, warps: int, constants: dict[str, Any], logits: str = "fp32") -> None:
        types = {key: f"*{logits}" for key in ("student_ptr", "teacher_ptr", "out_ptr")} | table | flags | numbers
        signature = {key: "constexpr" if key in constants else types.get(key, "i64") for key in kernel.arg_names}
        found.append(Launch(name=name, kernel=kernel, signature=signature, constexprs=constants, num_warps=warps))

    temperatures = {"T=2": _powers(2.0), "any T": _powers(3.0)}
    tiles = {
        "wide": (_wide_fwd_kernel, _wide_bwd_kernel, {"BLOCK": _WIDE_BLOCK}, _WIDE_WARPS),
        "V=33": (_narrow_fwd_kernel, _narrow_bwd_kernel, _narrow_tile(33), _NARROW_WARPS),
        "V=128": (_narrow_fwd_kernel, _narrow_bwd_kernel, _narrow_tile(128), _NARROW_WARPS),
    }
    everything = {"SMOOTH": True, "ENTROPY": True, "STUDENT": True}
    # Switched off, a part leaves code out: that is compiled for one type and temperature.
    parts = {
        "not smoothed": {"SMOOTH": False},
        "not weighted": {"ENTROPY": False},
        "neither": {"SMOOTH": False, "ENTROPY": False},
        "entropies": {"SMOOTH": False, "STUDENT": False},
    }
    for tile, (forward, backward, constants, warps) in tiles.items():
        for logits, (words, powers) in itertools.product(("fp32", "fp16", "bf16"), temperatures.items()):
            add(f"{tile} forward {logits} {words}", forward, warps, powers | everything | constants, logits)
            add(f"{tile} backward {logits} {words}", backward, warps, powers | constants, logits)
        for part, switches in parts.items():
            chosen = temperatures["T=2"] | everything | switches | constants
            add(f"{tile} forward bf16 {part}", forward, warps, chosen, "bf16")
    block = {"BLOCK": _SEGMENT_BLOCK}
    for switch in (True, False):
        add(f"segments, uncertainty={switch}", _segments_kernel, _SEGMENT_WARPS, {"UNCERTAINTY": switch} | block)
        add(f"total, by_weight={switch}", _total_kernel, _SEGMENT_WARPS, {"BY_WEIGHT": switch} | block)
    return found
