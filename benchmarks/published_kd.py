"""The distillation loss as it was published, in torch, operation by operation: what `kd_loss` is measured against.

Wijaya 2026, "complementary regularisers": the default of `protnest.kernels.kd_loss`, but with 1e-10 inside logarithms
and each step on the whole table. Spared are two copies of the tables, which the published code makes to shift labels by
one, and padding: rows are packed here, for which the extremes of entropy are taken by segment instead of by batch row.

Shapes: N rows, V vocabulary, B segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from protnest.kernels.kd_options import KDOptions

_INSIDE_LOGARITHMS = 1e-10
_LEAST_RANGE = 1e-8


def published_kd_loss(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    segment_N: torch.Tensor,
    segments: int,
    options: KDOptions,
) -> torch.Tensor:
    """The loss, 0-d fp32, differentiable by torch to the student's logits.

    Args:
        student_NV: logits (N, V); 16-bit ones are widened first, as autocast does before a softmax.
        teacher_NV: logits (N, V).
        labels_N: int64 (N,), `options.ignore_index` where there is none.
        segment_N: int64 (N,), the segment of each row.
        segments: B.
        options: all but `weight_normalization`, which is always "count".
    """
    student_NV, teacher_NV = student_NV.float(), teacher_NV.float()
    T, V = options.temperature, student_NV.shape[-1]
    mask_N = (labels_N != options.ignore_index).float()
    target_NV = torch.softmax(teacher_NV / T, dim=-1)
    if options.smooth:
        eps_N1 = options.smoothing * (1 - target_NV.max(dim=-1, keepdim=True).values)
        uniform_NV = torch.ones_like(target_NV) / V
        target_NV = (1 - eps_N1) * target_NV + eps_N1 * uniform_NV
    log_student_NV = torch.log_softmax(student_NV / T, dim=-1)
    kl_N = (target_NV * (torch.log(target_NV + _INSIDE_LOGARITHMS) - log_student_NV)).sum(dim=-1)
    if options.uncertainty:
        kl_N = kl_N * _weights(teacher_NV, mask_N, segment_N, segments)
    soft = (kl_N * mask_N).sum() / mask_N.sum().clamp(min=1)
    hard = F.cross_entropy(student_NV, labels_N, ignore_index=options.ignore_index)
    return options.alpha * hard + (1 - options.alpha) * T**2 * soft


def _weights(teacher_NV: torch.Tensor, mask_N: torch.Tensor, segment_N: torch.Tensor, segments: int) -> torch.Tensor:
    p_NV = torch.softmax(teacher_NV, dim=-1)
    entropy_N = -(p_NV * torch.log(p_NV + _INSIDE_LOGARITHMS)).sum(dim=-1)
    inf_B = entropy_N.new_full((segments,), torch.inf)
    least_B = inf_B.scatter_reduce(0, segment_N, entropy_N.masked_fill(mask_N == 0, torch.inf), "amin")
    most_B = (-inf_B).scatter_reduce(0, segment_N, entropy_N.masked_fill(mask_N == 0, -torch.inf), "amax")
    range_B = most_B - least_B
    range_B = torch.where(range_B < _LEAST_RANGE, torch.ones_like(range_B), range_B)
    return (0.5 + 0.5 * (entropy_N - least_B[segment_N]) / range_B[segment_N]) * mask_N
