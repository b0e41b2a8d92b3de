"""The distillation loss in torch, a block of rows at a time, in buffers of bounded size. `kd_loss` has the formulas.

With y = (z - max z) / T and e = exp(y) of the student (s) and the teacher (t), all follows from sums along a row:

    H = log sum e1 - sum e1 x / sum e1            x = T y, e1 = exp(x); at T = 2, e1 = e^2, which saves an exponential
    eps = lambda (1 - 1 / sum e_t),  pbar = (1 - eps) e_t / sum e_t + eps / V
    KL = sum pbar (log pbar - y_s) + log sum e_s
    dloss / ds = a (e_s / sum e_s - pbar) + b (e1_s / sum e1_s - onehot)

Maxima are subtracted before anything is rounded, so logits far from zero cost no accuracy. Sums run in the dtype of the
work (fp32; fp64 for fp64 logits), pairwise as torch sums.

Shapes: N rows, C rows of a block, V vocabulary, S numbers kept a row; a trailing 1 is an axis kept for broadcasting.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .kd_options import KDOptions
from .kd_rows import RowResults, RowScalars, not_finite

# Elements of one of a block's six buffers.
_BLOCK_ELEMENTS = 1 << 16


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
    """Fills `results` for the rows that `soft_N` or `hard_N` names, but for their weights, and entropies only if asked.

    Args:
        student_NV: (N, V), any floating dtype.
        teacher_NV: (N, V), any floating dtype.
        labels_N: integers (N,), read where `hard_N` is set.
        soft_N: bool (N,).
        hard_N: bool (N,).
        options: temperature, smoothing, switches.
        results: of N rows; its dtype is that of the work.
        row_numbers: integers (N,), what messages call the rows; by default 0 to N - 1.

    Raises:
        ValueError: a row that counts holds NaN or an infinity (on the CPU).
    """
    block = RowBlock(student_NV.shape[1], options.temperature, results.kept_SN)
    for own in block.of_rows(soft_N | hard_N):
        found = results.of_block(own)
        kept = RowScalars(*found.kept_SN)
        block.student.load("student_logits", (own.start, row_numbers), student_NV[own], options.temperature)
        block.teacher.load("teacher_logits", (own.start, row_numbers), teacher_NV[own], options.temperature)
        if options.smooth:
            kept.eps.copy_(options.smoothing * (1 - 1 / block.teacher.total_C1[:, 0]))
        if options.uncertainty:
            found.entropy_N.copy_(block.entropy())
        found.soft_loss_N.copy_(block.soft_loss(kept.eps, smooth=options.smooth))
        hard_loss_C, total_1_C = block.hard_loss(labels_N[own], hard_N[own])
        found.hard_loss_N.copy_(hard_loss_C)
        kept.student_total_1.copy_(total_1_C)
        for side, most, total in (
            (block.student, kept.student_max, kept.student_total),
            (block.teacher, kept.teacher_max, kept.teacher_total),
        ):
            most.copy_(side.max_C1[:, 0])
            total.copy_(side.total_C1[:, 0])


def entropies(
    teacher_NV: torch.Tensor, used_N: torch.Tensor, entropy_N: torch.Tensor, row_numbers: torch.Tensor | None = None
) -> None:
    """Fills `entropy_N` with the entropy of softmax(t) of the rows that `used_N` names; arguments as in `losses`."""
    block = RowBlock(teacher_NV.shape[1], 1.0, entropy_N)
    for own in block.of_rows(used_N):
        block.teacher.load("teacher_logits", (own.start, row_numbers), teacher_NV[own], 1.0)
        entropy_N[own] = block.entropy()


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
    """Writes the gradient of each row, zeros where it does not count.

    Args:
        out_NV: (N, V), any floating dtype; may be `student_NV`.
        student_NV: as `losses` had it.
        teacher_NV: as `losses` had it.
        labels_N: integers (N,), read where `hard_N` is set.
        hard_N: bool (N,).
        kept_SN: as `losses` filled it, with weights.
        scales: (2,), see `kd_rows.loss_scales`, times the gradient of the loss.
        temperature: T.
    """
    kept = RowScalars(*kept_SN)
    block = RowBlock(student_NV.shape[1], temperature, kept_SN)
    used_N = (kept.weight != 0) | hard_N
    out_NV.masked_fill_(~used_N[:, None], 0)
    for own in block.of_rows(used_N):
        of_block = RowScalars(*kept_SN[:, own])
        block.student.reload(student_NV[own], of_block.student_max, of_block.student_total, temperature)
        block.teacher.reload(teacher_NV[own], of_block.teacher_max, of_block.teacher_total, temperature)
        out_NV[own] = block.gradient(labels_N[own], of_block, of_block.weight * scales[0], hard_N[own] * scales[1])


class Side:
    """One model's logits of a block: `shifted_CV` holds y, `exps_CV` e; the others are (C, 1)."""

    shifted_CV: torch.Tensor
    exps_CV: torch.Tensor
    max_C1: torch.Tensor
    total_C1: torch.Tensor

    def __init__(self, rows: int, vocabulary: int, like: torch.Tensor) -> None:
        self._buffers = like.new_empty(2, rows, vocabulary)

    def load(
        self, name: str, first: tuple[int, torch.Tensor | None], logits_CV: torch.Tensor, temperature: float
    ) -> None:
        """Takes logits in; on the CPU it looks for NaN and infinities and names the row.

        Args:
            name: of the logits, for messages.
            first: the first row's place, and what messages call all rows, see `losses`.
            logits_CV: (C, V), any floating dtype.
            temperature: T.

        Raises:
            ValueError: there are some.
        """
        self.max_C1 = logits_CV.amax(dim=-1, keepdim=True)
        self._shift(logits_CV, temperature)
        self.total_C1 = self.exps_CV.sum(dim=-1, keepdim=True)
        if logits_CV.device.type == "cpu" and not bool(torch.isfinite(self.shifted_CV.sum())):
            # Finite logits have finite sums, except where the sum overflows: a closer look clears those.
            broken_C = ~torch.isfinite(logits_CV).all(dim=-1)
            if bool(broken_C.any()):
                place = first[0] + int(broken_C.nonzero()[0])
                raise not_finite(name, place, first[1])

    def reload(self, logits_CV: torch.Tensor, max_C: torch.Tensor, total_C: torch.Tensor, temperature: float) -> None:
        """Takes logits in whose maxima and sums are known."""
        self.max_C1, self.total_C1 = max_C[:, None], total_C[:, None]
        self._shift(logits_CV, temperature)

    def _shift(self, logits_CV: torch.Tensor, temperature: float) -> None:
        self.shifted_CV, self.exps_CV = self._buffers[:, : len(logits_CV)].unbind()
        torch.sub(logits_CV, self.max_C1.to(self.shifted_CV.dtype), out=self.shifted_CV)
        if temperature != 1:
            self.shifted_CV.mul_(1 / temperature)
        torch.exp(self.shifted_CV, out=self.exps_CV)


class RowBlock:
    """Works out one block of rows after another in the same buffers, which have the dtype and device of `like`."""

    def __init__(self, vocabulary: int, temperature: float, like: torch.Tensor) -> None:
        self._rows = max(1, _BLOCK_ELEMENTS // vocabulary)
        self.student, self.teacher = (Side(self._rows, vocabulary, like) for _ in range(2))
        self._buffers = like.new_empty(2, self._rows, vocabulary)
        self._temperature = temperature

    def of_rows(self, used_N: torch.Tensor) -> list[slice]:
        """Runs of used rows, cut to the block's size. On a GPU all rows, since asking would make the host wait."""
        edges = [0, used_N.numel()]
        if used_N.device.type == "cpu":
            edges = F.pad(used_N.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
        return [
            slice(begin, min(begin + self._rows, last))
            for first, last in zip(edges[::2], edges[1::2], strict=True)
            for begin in range(first, last, self._rows)
        ]

    def _exps_1(self, side: Side) -> torch.Tensor:
        """exp(z - max z): at T = 2 the square of what is there."""
        out_CV = self._buffers[0, : len(side.exps_CV)]
        if self._temperature == 1:
            return side.exps_CV
        if self._temperature == 2:
            return torch.mul(side.exps_CV, side.exps_CV, out=out_CV)
        return torch.mul(side.shifted_CV, self._temperature, out=out_CV).exp_()

    def entropy(self) -> torch.Tensor:
        """The teacher's entropy at T = 1, (C,)."""
        exps_CV = self._exps_1(self.teacher)
        total_C = exps_CV.sum(dim=-1)
        product_CV = torch.mul(exps_CV, self.teacher.shifted_CV, out=self._buffers[1, : len(exps_CV)])
        return total_C.log() - product_CV.sum(dim=-1) * self._temperature / total_C

    def soft_loss(self, eps_C: torch.Tensor, *, smooth: bool) -> torch.Tensor:
        """KL(pbar, softmax(s / T)) of each row, (C,)."""
        student, teacher = self.student, self.teacher
        rows, vocabulary = teacher.exps_CV.shape
        first_CV, second_CV = self._buffers[:, :rows].unbind()
        if not smooth:
            torch.sub(teacher.shifted_CV, student.shifted_CV, out=first_CV).mul_(teacher.exps_CV)
            cross_C = first_CV.sum(dim=-1) / teacher.total_C1[:, 0]
            return cross_C - teacher.total_C1[:, 0].log() + student.total_C1[:, 0].log()
        torch.mul(teacher.exps_CV, (1 - eps_C[:, None]) / teacher.total_C1, out=first_CV)
        # The floor keeps 0 log 0 from being NaN where eps is 0; it adds less than 1e-30.
        first_CV.add_((eps_C[:, None] / vocabulary).clamp(min=torch.finfo(first_CV.dtype).tiny))
        torch.log(first_CV, out=second_CV).sub_(student.shifted_CV).mul_(first_CV)
        return second_CV.sum(dim=-1) + student.total_C1[:, 0].log()

    def hard_loss(self, labels_C: torch.Tensor, hard_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each row with its label (0 without one), and the sum of exp(s - max s); both (C,)."""
        total_C = self._exps_1(self.student).sum(dim=-1)
        place_C1 = labels_C.where(hard_C, 0).long()[:, None]
        own_C = self.student.shifted_CV.gather(1, place_C1)[:, 0] * self._temperature
        return (total_C.log() - own_C).where(hard_C, 0.0), total_C

    def gradient(
        self, labels_C: torch.Tensor, kept: RowScalars, soft_C: torch.Tensor, hard_C: torch.Tensor
    ) -> torch.Tensor:
        """a (q - pbar) + b (softmax(s) - onehot) with a = `soft_C`, b = `hard_C`: (C, V), valid until the next call."""
        student, teacher = self.student, self.teacher
        rows, vocabulary = student.exps_CV.shape
        result_CV = torch.addcmul(
            (-soft_C * kept.eps / vocabulary)[:, None],
            self._exps_1(student),
            (hard_C / kept.student_total_1)[:, None],
            out=self._buffers[0, :rows],
        )
        result_CV.addcmul_(student.exps_CV, soft_C[:, None] / student.total_C1)
        result_CV.addcmul_(teacher.exps_CV, (soft_C * (1 - kept.eps))[:, None] / teacher.total_C1, value=-1)
        labelled_C = hard_C != 0
        place_C1 = labels_C.where(labelled_C, 0).long()[:, None]
        return result_CV.scatter_add_(1, place_C1, -hard_C[:, None])
