"""What the distillation loss is measured on: sizes, segments and made-up tensors, the same for every engine.

Shapes: N rows, V vocabulary, B segments, D and E widths of student and teacher.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from protnest.engine.device import PRECISIONS
from protnest.kernels.kd_rows import segment_of_rows

LOGITS, HEADS = "kd_loss", "linear_kd_loss"
OPERATIONS = (LOGITS, HEADS)
FORWARD, BOTH = "forward", "forward+backward"
SEGMENTS = ("long", "proteins")
LONG_ROWS = 1024
"""Rows of a long segment: a whole context of ProtGPT2, and many times what `linear_kd_loss` takes as a chunk."""

_PROTEIN_ROWS = (50, 250)
# ESM-2's alphabet between its 8M and 150M models; any other: the published Tiny student and its teacher.
_WIDTHS = {33: (320, 640)}
_OTHER_WIDTHS = (512, 1280)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One loss to measure.

    Attributes:
        operation: "kd_loss" on given logits, or "linear_kd_loss" on hidden states and heads.
        vocabulary: V.
        rows: N, all of which count.
        segments: "long" ones of 1,024 rows, or "proteins" of 50 to 250; the last one is cut.
        precision: of logits, or of hidden states and heads: "fp32", "bf16" or "fp16".
        seed: of lengths and numbers.

    Raises:
        ValueError: a word that is not allowed, or no rows.
    """

    operation: str
    vocabulary: int
    rows: int
    segments: str
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("operation", OPERATIONS), ("segments", SEGMENTS), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in allowed:
                message = f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}"
                raise ValueError(message)
        for name in ("rows", "vocabulary"):
            if getattr(self, name) < 1:
                message = f"{name} must be positive, got {getattr(self, name)}"
                raise ValueError(message)

    @property
    def name(self) -> str:
        return f"{self.operation} V={self.vocabulary:,} N={self.rows:,} {self.segments} {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def widths(self) -> tuple[int, int]:
        """D and E."""
        return _WIDTHS.get(self.vocabulary, _OTHER_WIDTHS)

    def lengths(self) -> list[int]:
        """Rows of each segment."""
        if self.segments == "long":
            lengths = [LONG_ROWS] * (self.rows // LONG_ROWS + 1)
        else:
            generator = np.random.default_rng(self.seed)
            low, high = _PROTEIN_ROWS
            lengths = generator.integers(low, high + 1, size=self.rows // low + 1).tolist()
        ends = [min(end, self.rows) for end in itertools.accumulate(lengths)]
        return [end - begin for begin, end in itertools.pairwise([0, *ends]) if end > begin]

    def moved_bytes(self, direction: str) -> int:
        """Bytes of logits that `kd_loss` must move: the forward pass reads both tables, the backward pass both again,
        and writes one."""
        tables = 2 if direction == FORWARD else 5
        return tables * self.rows * self.vocabulary * self.dtype.itemsize

    def product_flops(self, direction: str) -> int:
        """Floating-point operations of the heads' matrix products: logits of both models, and the gradients of the
        student's hidden states and weight. Whatever is done twice counts once."""
        student, teacher = self.widths
        return 2 * self.rows * self.vocabulary * (teacher + (1 if direction == FORWARD else 3) * student)

    def product_shapes(self) -> list[tuple[int, int]]:
        """Inputs and outputs of these products."""
        student, teacher = self.widths
        return [(student, self.vocabulary), (teacher, self.vocabulary), (self.vocabulary, student)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A problem's tensors.

    Attributes:
        student: logits (N, V); or hidden states (N, D), weight (V, D) and bias (V,). They want gradients.
        teacher: the same of the teacher; they want none.
        labels_N: int64 (N,), all valid.
        cu_seqlens: int64 (B + 1,).
        segment_N: int64 (N,), the segment of each row.
    """

    student: tuple[torch.Tensor, ...]
    teacher: tuple[torch.Tensor, ...]
    labels_N: torch.Tensor
    cu_seqlens: torch.Tensor
    segment_N: torch.Tensor

    @classmethod
    def of_problem(cls, problem: Problem, device: torch.device) -> Data:
        """Made up with the problem's seed: row by row logits differ in spread, so that entropies differ by nats."""
        generator = torch.Generator(device).manual_seed(problem.seed)
        N, V = problem.rows, problem.vocabulary
        D, E = problem.widths

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        spread_N1 = torch.rand(N, 1, generator=generator, device=device) * 3 + 0.5
        teacher: tuple[torch.Tensor, ...]
        student: tuple[torch.Tensor, ...]
        if problem.operation == LOGITS:
            teacher = (normal(N, V).mul_(spread_N1),)
            student = (normal(N, V).add_(teacher[0], alpha=0.5),)
        else:
            # Weights that keep the variance: logits of hidden states with spread 1 have spread 1.
            teacher = (normal(N, E).mul_(spread_N1), normal(V, E).div_(E**0.5), normal(V).mul_(0.1))
            student = (normal(N, D), normal(V, D).div_(D**0.5), normal(V).mul_(0.1))
        lengths = torch.tensor([0, *problem.lengths()], device=device)
        cu_seqlens = lengths.cumsum(0)
        return cls(
            student=tuple(tensor.to(problem.dtype).requires_grad_() for tensor in student),
            teacher=tuple(tensor.to(problem.dtype) for tensor in teacher),
            labels_N=torch.randint(0, V, (N,), generator=generator, device=device),
            cu_seqlens=cu_seqlens,
            segment_N=segment_of_rows(cu_seqlens, N),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Data:
        """The same numbers elsewhere and in another dtype."""
        return Data(
            student=tuple(tensor.detach().to(device, dtype).requires_grad_() for tensor in self.student),
            teacher=tuple(tensor.to(device, dtype) for tensor in self.teacher),
            labels_N=self.labels_N.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            segment_N=self.segment_N.to(device),
        )

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that the loss gives."""
        return sum(tensor.nbytes for tensor in self.student)
