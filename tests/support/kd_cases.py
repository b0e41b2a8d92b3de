"""Hostile batches for the distillation loss, and the bounds that its results must keep, from fp64 gold.

Shapes: N rows, V vocabulary, B segments.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from protnest.kernels import kd_loss

EPS32 = torch.finfo(torch.float32).eps
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Case:
    """What `kd_loss` is given, and with which options."""

    student_NV: torch.Tensor
    teacher_NV: torch.Tensor
    labels_N: torch.Tensor
    cu_seqlens: torch.Tensor
    soft_rows: torch.Tensor | None
    options: dict[str, Any]

    def options_of_call(self) -> dict[str, Any]:
        """Keyword arguments of `kd_loss`."""
        return {**self.options, "soft_rows": self.soft_rows}


def make_case(lengths: tuple[int, ...], vocabulary: int, **given: Any) -> Case:
    """The first of seeds 0, 1, ... with which the entropies of every segment span at least half a nat.

    Closer ones are no test of accuracy: weights divide by their range. Segments with one row have none, and a
    vocabulary of one token has no entropy.

    Args:
        lengths: rows of each segment.
        vocabulary: V.
        given: see `_draw_case`; what is left are options of `kd_loss`.
    """
    for seed in range(1000):
        case = _draw_case(lengths, vocabulary, seed=seed, **given)
        if vocabulary == 1 or all(span >= 0.5 for span in _entropy_ranges(case)):
            return case
    message = f"no seed gives segments {lengths} entropies that differ"
    raise AssertionError(message)


def _entropy_ranges(case: Case) -> list[float]:
    soft_N = case.labels_N != IGNORED if case.soft_rows is None else case.soft_rows
    logp_NV = torch.log_softmax(case.teacher_NV.double(), -1)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    ranges = []
    for begin, end in itertools.pairwise(case.cu_seqlens.tolist()):
        own = entropy_N[begin:end][soft_N[begin:end]]
        if len(own) > 1:
            ranges.append(float(own.max() - own.min()))
    return ranges


def _draw_case(
    lengths: tuple[int, ...],
    vocabulary: int,
    *,
    seed: int,
    ignored: float = 0.3,
    soft_rows: bool = False,
    rising: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    """Logits whose rows differ in scale from 0.3 to 8 and in offset from -40 to 40, so that entropies range widely.

    Every fifth row's teacher is sure (confidence near 1), one row's logits are all alike. Logits lie between rows of
    NaN, and rows that count in neither loss are NaN: who reads beside the rows meets it. With `rising` the largest
    logits come last, so that what is worked out on the way has to be corrected.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale = 10 ** (1.4 * torch.rand((rows, 1), generator=generator, dtype=torch.float64) - 0.5)
    teacher = normal(rows, vocabulary) * scale + 20 * normal(rows, 1)
    student = teacher * 0.5 + normal(rows, vocabulary) + 20 * normal(rows, 1)
    teacher[::5, 0] = teacher[::5].amax(dim=-1) + 12
    teacher[rows // 2], student[rows // 3] = 3.25, -7.5
    if rising:
        ramp = torch.linspace(0, 9, vocabulary, dtype=torch.float64)
        teacher, student = teacher + ramp, student + ramp
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[0], labels[-1] = 0, vocabulary - 1
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    soft = torch.rand(rows, generator=generator) < 0.6 if soft_rows else None
    used = labels != IGNORED
    used = used if soft is None else used | soft
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    tables = []
    for values in (student, teacher):
        around = torch.full((rows + 2, vocabulary + 3), torch.nan, dtype=dtype)
        around[1:-1, 1:-2] = values.to(dtype)
        around[1:-1][~used] = torch.nan
        tables.append(around[1:-1, 1:-2])
    return Case(tables[0], tables[1], labels, cu_seqlens, soft, options)


def widen(case: Case) -> Case:
    """The same numbers in fp64."""
    return dataclasses.replace(case, student_NV=case.student_NV.double(), teacher_NV=case.teacher_NV.double())


@dataclasses.dataclass(frozen=True)
class Gold:
    """What is right, in fp64, and the sizes that errors are measured against.

    Attributes:
        loss: the loss.
        gradient_NV: its gradient.
        loss_terms: alpha times hard, and (1 - alpha) T^2 times soft cross-entropy and entropy of the targets.
        gradient_terms_NV: for each element the sum of the sizes of softmax, one-hot, q and pbar with their factors.
    """

    loss: float
    gradient_NV: torch.Tensor
    loss_terms: float
    gradient_terms_NV: torch.Tensor


def find_gold(case: Case) -> Gold:
    """Loss and gradient by the reference in fp64; sizes of terms from the formulas."""
    exact = widen(case)
    student_NV = exact.student_NV.clone().requires_grad_()
    loss = kd_loss(
        student_NV, exact.teacher_NV, case.labels_N, case.cu_seqlens, impl="reference", **case.options_of_call()
    )
    (gradient_NV,) = torch.autograd.grad(loss, student_NV)
    loss_terms, gradient_terms_NV = _sizes(exact)
    return Gold(float(loss.detach()), gradient_NV, loss_terms, gradient_terms_NV.detach())


def _sizes(case: Case) -> tuple[float, torch.Tensor]:
    options = {"temperature": 2.0, "alpha": 0.5, "smoothing": 0.1, "smooth": True} | case.options
    T, alpha = options["temperature"], options["alpha"]
    hard_N = case.labels_N != IGNORED
    soft_N = hard_N if case.soft_rows is None else case.soft_rows
    terms_NV = torch.zeros_like(case.student_NV)
    s, t = case.student_NV[soft_N], case.teacher_NV[soft_N]
    p = torch.softmax(t / T, -1)
    eps = options["smoothing"] * (1 - p.amax(-1, keepdim=True)) if options["smooth"] else 0.0
    target, q = (1 - eps) * p + eps / p.shape[-1], torch.softmax(s / T, -1)
    rows = max(1, int(soft_N.sum()))
    soft_cross = -(target * torch.log_softmax(s / T, -1)).sum() - torch.xlogy(target, target).sum()
    # Weights lie between 0.5 and 1; divided by their sum instead of their number, between 1 / n and 2 / n.
    terms_NV[soft_N] = (1 - alpha) * T * (q + target) / rows * (0.5 if options.get("uncertainty", True) else 1.0)
    hard_rows = max(1, int(hard_N.sum()))
    one = torch.softmax(case.student_NV[hard_N], -1)
    labels = case.labels_N[hard_N]
    hard_cross = -torch.log_softmax(case.student_NV[hard_N], -1)[torch.arange(len(labels)), labels].sum()
    one[torch.arange(len(labels)), labels] += 1
    terms_NV[hard_N] += alpha * one / hard_rows
    loss_terms = alpha * hard_cross / hard_rows + (1 - alpha) * T**2 * soft_cross / rows
    return float(loss_terms.detach()), terms_NV


def find_failure(case: Case, gold: Gold, loss: torch.Tensor, gradient_NV: torch.Tensor) -> str | None:
    """What is wrong with a loss and its gradient, or None.

    The loss may be off by 2e-6 of its terms; a row of the gradient by 5e-6 of the norm of its terms in fp32; an element
    in 16 bits by one unit in the last place and 8 eps32 of its terms.
    """
    if not abs(float(loss) - gold.loss) <= 2e-6 * gold.loss_terms:
        return f"loss is {float(loss)!r}, gold {gold.loss!r}, allowed error {2e-6 * gold.loss_terms:.3g}"
    got_NV = gradient_NV.detach().double()
    if gradient_NV.dtype in (torch.float16, torch.bfloat16):
        finfo = torch.finfo(gradient_NV.dtype)
        exponent_NV = torch.frexp(gold.gradient_NV)[1] - 1
        ulp_NV = torch.full_like(gold.gradient_NV, finfo.eps).ldexp(exponent_NV)
        ulp_NV = ulp_NV.clamp(min=finfo.smallest_normal * finfo.eps)
        excess_NV = (got_NV - gold.gradient_NV).abs() - ulp_NV - 8 * EPS32 * gold.gradient_terms_NV
    else:
        error_N = (got_NV - gold.gradient_NV).norm(dim=-1)
        excess_NV = (error_N - 5e-6 * gold.gradient_terms_NV.norm(dim=-1))[:, None]
    excess_NV = excess_NV.nan_to_num(nan=torch.inf)
    if excess_NV.numel() and float(excess_NV.max()) > 0:
        row, column = divmod(int(excess_NV.argmax()), excess_NV.shape[1])
        return (
            f"gradient row {row}, element {column}: {got_NV[row, column]}, gold {gold.gradient_NV[row, column]}, "
            f"beyond the bound by {float(excess_NV.max()):.3g}"
        )
    return None
