"""What the distillation loss can be asked for, and the checks of what it is given.

Shapes: N rows, V vocabulary, B segments, B1 = B + 1.
"""

from __future__ import annotations

import dataclasses
import math

import torch

WEIGHT_NORMALIZATIONS = ("count", "weight")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDOptions:
    """Switches of the distillation loss, in the order in which its operations take them; `kd_loss` has its formula.

    Attributes:
        temperature: T > 0 of the soft loss.
        alpha: share of the hard loss, 0 to 1.
        smoothing: lambda, 0 to 1: the most that the uniform distribution can get of a target.
        uncertainty: weight rows by the teacher's entropy, else all alike.
        smooth: smooth targets by the teacher's confidence, else leave them.
        weight_normalization: "count" divides the soft loss by its rows, "weight" by the sum of their weights.
        ignore_index: label of rows that have none.

    Raises:
        ValueError: a number outside its range, or a word that is not allowed.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    smoothing: float = 0.1
    uncertainty: bool = True
    smooth: bool = True
    weight_normalization: str = "count"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            message = f"temperature is {self.temperature}, expected a positive number"
            raise ValueError(message)
        for name in ("alpha", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                message = f"{name} is {getattr(self, name)}, expected 0 to 1"
                raise ValueError(message)
        if self.weight_normalization not in WEIGHT_NORMALIZATIONS:
            allowed = ", ".join(map(repr, WEIGHT_NORMALIZATIONS))
            message = f"weight_normalization is {self.weight_normalization!r}; allowed are {allowed}"
            raise ValueError(message)


def check_logits(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> None:
    """Two tables of one shape, of floats, on one device.

    Raises:
        ValueError: they are not; with what was given and what was expected.
    """
    if student_NV.dim() != 2 or student_NV.shape != teacher_NV.shape or student_NV.shape[1] < 1:
        message = (
            f"logits must share one shape (rows, vocabulary): student_logits has {tuple(student_NV.shape)}, "
            f"teacher_logits {tuple(teacher_NV.shape)}"
        )
        raise ValueError(message)
    for name, logits_NV in (("student_logits", student_NV), ("teacher_logits", teacher_NV)):
        check_dtype(name, logits_NV, FLOATS)
    check_device(teacher_logits=(teacher_NV, student_NV.device))


def check_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """The tensor's dtype is one of those.

    Raises:
        ValueError: it is not.
    """
    if tensor.dtype not in allowed:
        message = f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, allowed))}"
        raise ValueError(message)


def check_device(**tensors: tuple[torch.Tensor, torch.device]) -> None:
    """Each tensor is where it is expected.

    Raises:
        ValueError: one is elsewhere.
    """
    for name, (tensor, device) in tensors.items():
        if tensor.device != device:
            message = f"{name} is on {tensor.device}, expected {device} as the student"
            raise ValueError(message)


def check_rows(
    rows: int,
    vocabulary: int,
    device: torch.device,
    labels_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    soft_rows: torch.Tensor | None,
    ignore_index: int,
) -> None:
    """Labels, segments and the choice of rows fit N rows of V logits.

    Shapes, dtypes and devices are looked at always; values on the CPU only: on a GPU the host would wait.

    Raises:
        ValueError: they do not; with what was given and what was expected.
    """
    if labels_N.shape != (rows,):
        message = f"labels has shape {tuple(labels_N.shape)}, expected ({rows},): one a row of logits"
        raise ValueError(message)
    check_dtype("labels", labels_N, _INTEGERS)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        message = f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (segments + 1,)"
        raise ValueError(message)
    check_dtype("cu_seqlens", cu_seqlens, _INTEGERS)
    check_device(labels=(labels_N, device), cu_seqlens=(cu_seqlens, device))
    if soft_rows is not None:
        if soft_rows.shape != (rows,):
            message = f"soft_rows has shape {tuple(soft_rows.shape)}, expected ({rows},): one a row of logits"
            raise ValueError(message)
        check_dtype("soft_rows", soft_rows, (torch.bool,))
        check_device(soft_rows=(soft_rows, device))
    if device.type == "cpu":
        _check_segments(rows, cu_seqlens)
        _check_labels(vocabulary, labels_N, ignore_index)


def _check_segments(rows: int, cu_seqlens: torch.Tensor) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != rows:
        message = f"cu_seqlens runs from {first} to {last}, expected 0 to {rows}, the number of rows"
        raise ValueError(message)
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if falls.numel():
        place = int(falls[0]) + 1
        message = (
            f"cu_seqlens falls from {int(cu_seqlens[place - 1])} to {int(cu_seqlens[place])} at index {place}, "
            "expected it never to fall"
        )
        raise ValueError(message)


def _check_labels(vocabulary: int, labels_N: torch.Tensor, ignore_index: int) -> None:
    outside_N = ((labels_N < 0) | (labels_N >= vocabulary)) & (labels_N != ignore_index)
    if bool(outside_N.any()):
        row = int(outside_N.nonzero()[0])
        message = (
            f"labels[{row}] is {int(labels_N[row])}, expected 0 to {vocabulary - 1} or ignore_index ({ignore_index})"
        )
        raise ValueError(message)
