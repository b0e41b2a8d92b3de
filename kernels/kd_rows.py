"""What implementations of the distillation loss share: what is found out about a row, its weight, the sum of rows.

An implementation (`kd_chunked`, `kd_cpu`, `gpu.kd_loss`) has three functions of blocks of rows, `losses`, `entropies`
and `gradient`, with the arguments of those in `kd_chunked`.

Shapes: N rows, V vocabulary, B segments, S numbers kept a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kd_options import KDOptions

_LEAST_RANGE, _LEAST_RANGE_EPS = 1e-8, 64


class RowScalars(NamedTuple):
    """All that the gradient of a row needs beside its logits; each (N,).

    Attributes:
        student_max: largest logit.
        student_total: sum of exp((z - max) / T).
        student_total_1: the same at T = 1.
        teacher_max: largest logit.
        teacher_total: sum of exp((z - max) / T).
        eps: share of the target that smoothing gives to the uniform distribution.
        weight: of the row in the soft loss; 0 for a row that is not in it.
    """

    student_max: torch.Tensor
    student_total: torch.Tensor
    student_total_1: torch.Tensor
    teacher_max: torch.Tensor
    teacher_total: torch.Tensor
    eps: torch.Tensor
    weight: torch.Tensor


class RowResults(NamedTuple):
    """What is found out about rows; those that count in neither loss stay zero.

    Attributes:
        kept_SN: the fields of `RowScalars`, one below the other.
        soft_loss_N: KL(pbar, q).
        hard_loss_N: cross-entropy with the label.
        entropy_N: of softmax(t); filled where weights depend on it.
    """

    kept_SN: torch.Tensor
    soft_loss_N: torch.Tensor
    hard_loss_N: torch.Tensor
    entropy_N: torch.Tensor

    @classmethod
    def of_rows(cls, rows: int, dtype: torch.dtype, device: torch.device) -> RowResults:
        """Zeros for N rows."""
        kept = len(RowScalars._fields)
        table = torch.zeros(kept + 3, rows, dtype=dtype, device=device)
        return cls(table[:kept], *table[kept:])

    def of_block(self, own: slice) -> RowResults:
        """Views of some of the rows."""
        return RowResults(self.kept_SN[:, own], *(values_N[own] for values_N in self[1:]))


def work_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 where a tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def soft_and_hard_rows(
    labels_N: torch.Tensor, soft_rows: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows the soft loss counts, and which the hard one: two bool (N,)."""
    hard_N = labels_N != ignore_index
    return (hard_N if soft_rows is None else soft_rows), hard_N


def segment_of_rows(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """The segment of each row: int64 (N,)."""
    lengths_B = cu_seqlens.diff().long()
    segments_B = torch.arange(lengths_B.numel(), device=cu_seqlens.device)
    return segments_B.repeat_interleave(lengths_B, output_size=rows)


def entropy_weights(
    entropy_N: torch.Tensor, soft_N: torch.Tensor, segment_N: torch.Tensor, segments: int
) -> torch.Tensor:
    """Weights 0.5 to 1, by where a row's entropy lies between the least and the largest of its segment.

    Args:
        entropy_N: (N,), read for rows of the soft loss only.
        soft_N: bool (N,), rows of the soft loss; others get weight 0.
        segment_N: int64 (N,), see `segment_of_rows`.
        segments: B.

    Returns:
        (N,). A range below max(1e-8, 64 eps max entropy) is rounding, and gives 0.5.
    """
    inf_B = entropy_N.new_full((segments,), torch.inf)
    least_B = inf_B.scatter_reduce(0, segment_N, entropy_N.where(soft_N, torch.inf), "amin")
    most_B = (-inf_B).scatter_reduce(0, segment_N, entropy_N.where(soft_N, -torch.inf), "amax")
    range_B = most_B - least_B
    threshold_B = (_LEAST_RANGE_EPS * torch.finfo(entropy_N.dtype).eps * most_B).clamp(min=_LEAST_RANGE)
    shares_N = ((entropy_N - least_B[segment_N]) / range_B[segment_N]).where((range_B >= threshold_B)[segment_N], 0.0)
    return (0.5 + 0.5 * shares_N).where(soft_N, 0.0)


def weigh_rows(
    entropy_N: torch.Tensor, soft_N: torch.Tensor, cu_seqlens: torch.Tensor, options: KDOptions
) -> torch.Tensor:
    """The weight of each row in the soft loss, 0 for those that are not in it: (N,) of the entropies' dtype."""
    if not options.uncertainty:
        return soft_N.to(entropy_N.dtype)
    segments = cu_seqlens.numel() - 1
    return entropy_weights(entropy_N, soft_N, segment_of_rows(cu_seqlens, soft_N.numel()), segments)


def loss_scales(weight_N: torch.Tensor, soft_N: torch.Tensor, hard_N: torch.Tensor, options: KDOptions) -> torch.Tensor:
    """What weights and hard rows are multiplied by in the gradient: (1 - alpha) T / n and alpha / n_hard, (2,)."""
    dtype = weight_N.dtype
    if options.weight_normalization == "weight":
        # Any row weighs at least 0.5: the floor matters only where there is none.
        soft_total = weight_N.sum().clamp(min=0.5)
    else:
        soft_total = soft_N.sum().clamp(min=1).to(dtype)
    hard_total = hard_N.sum().clamp(min=1).to(dtype)
    return torch.stack(((1 - options.alpha) * options.temperature / soft_total, options.alpha / hard_total))


def sum_rows(results: RowResults, scales: torch.Tensor, temperature: float) -> torch.Tensor:
    """The loss, 0-d, of rows whose weights are set, with `loss_scales`."""
    weight_N = RowScalars(*results.kept_SN).weight
    return temperature * scales[0] * (weight_N * results.soft_loss_N).sum() + scales[1] * results.hard_loss_N.sum()


class NotFiniteLogitsError(ValueError):
    """A row of logits holds NaN or an infinity.

    Args:
        message: which row.
        logits: whose: "student_logits" or "teacher_logits".
    """

    def __init__(self, message: str, logits: str) -> None:
        super().__init__(message)
        self.logits = logits


def not_finite(name: str, place: int, row_numbers: torch.Tensor | None) -> NotFiniteLogitsError:
    """The error that says which row of which logits holds NaN or an infinity.

    Args:
        name: of the logits.
        place: of the row among those that were looked at.
        row_numbers: what the caller calls these rows, (N,); None where they are all there are.
    """
    row = place if row_numbers is None else int(row_numbers[place])
    return NotFiniteLogitsError(f"{name}[{row}] holds NaN or an infinity, expected finite numbers", name)
