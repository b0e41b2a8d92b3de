"""The distillation loss with both language-model heads fused in: logits never exist as a whole.

    loss = kd_loss(x_s W_s^T + b_s, x_t W_t^T + b_t, ...)        and its gradients to x_s, W_s and b_s

Rows are worked through in chunks. The weight of a row depends on the entropies of its whole segment, so a chunk's
gradient has to wait for them:

    segments that fit into a chunk together    one product with each head
    longer segments                            a first sweep over the teacher's logits for the entropies, then a second
                                               over teacher and student; the last chunk of the first is kept for it
    uncertainty=False                          one sweep, chunks of any rows
    weight_normalization="weight", or a GPU    two sweeps over all rows: the sum of all weights comes first; on a GPU,
                                               asking where segments end would make the host wait

On the CPU, rows that count in neither loss are left out before the products, where there are enough of them; elsewhere
they are multiplied too, so hidden states must be finite in all rows. Gradients are worked out in the forward
pass, as soon as a chunk's logits are there, and handed over by the first backward; a second one raises. Gradients of
weight and bias are summed in fp32 (fp64 for fp64). Logits have the hidden states' dtype, as a head of its own would
give them.

Memory beside inputs and gradients: two chunks of logits (64 MB together on a CPU, 1 GB on a GPU). Where V is small and
D large, `kd_loss` on whole logits is as good.

The file is long for its arguments: the operation, its fake, and the function each spell out eighteen of them.

Shapes: N rows, C rows of a chunk, D and E widths of student and teacher, V vocabulary, B segments, B1 = B + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import torch

from .kd_loss import choose_impl, kd_loss_reference, rows_module
from .kd_options import FLOATS, KDOptions, check_device, check_dtype, check_rows
from .kd_rows import RowResults, RowScalars, loss_scales, soft_and_hard_rows, sum_rows, weigh_rows, work_dtype
from .linear import linear, needs_widening

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_LEAST_CHUNK_ROWS = 16
# At 5 GB/s and 60 GFLOP/s, gathering a row's hidden states takes about as long as multiplying for so many logits.
_GATHERED_LOGITS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A language-model head and what goes into it.

    Attributes:
        hidden_ND: (N, D).
        weight_VD: (V, D), of the hidden states' dtype.
        bias_V: (V,) or None.
    """

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None

    def logits(self) -> torch.Tensor:
        """Logits of all rows, (N, V); differentiable."""
        return linear(self.hidden_ND, self.weight_VD, self.bias_V)

    def write_logits(self, own: slice, out_CV: torch.Tensor) -> torch.Tensor:
        """Logits of some rows, in a buffer of as many rows or more: (C, V)."""
        hidden_CD = self.hidden_ND[own]
        out_CV = out_CV[: len(hidden_CD)]
        if needs_widening(hidden_CD):
            return out_CV.copy_(linear(hidden_CD, self.weight_VD, self.bias_V))
        if self.bias_V is None:
            return torch.mm(hidden_CD, self.weight_VD.T, out=out_CV)
        return torch.addmm(self.bias_V, hidden_CD, self.weight_VD.T, out=out_CV)

    def check(self, whose: str) -> None:
        """Shapes, dtypes and devices agree.

        Raises:
            ValueError: they do not.
        """
        hidden, weight, bias = self.hidden_ND, self.weight_VD, self.bias_V
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] < 1:
            message = (
                f"{whose}_hidden has shape {tuple(hidden.shape)}, {whose}_weight {tuple(weight.shape)}, expected "
                "(rows, width) and (vocabulary, width)"
            )
            raise ValueError(message)
        check_dtype(f"{whose}_hidden", hidden, FLOATS)
        check_dtype(f"{whose}_weight", weight, (hidden.dtype,))
        if bias is not None:
            if bias.shape != weight.shape[:1]:
                message = f"{whose}_bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}"
                raise ValueError(message)
            check_dtype(f"{whose}_bias", bias, (hidden.dtype,))


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Where gradients are summed; None where nobody wants one."""

    hidden_ND: torch.Tensor | None
    weight_VD: torch.Tensor | None
    bias_V: torch.Tensor | None

    @classmethod
    def of_head(cls, head: Head, wanted: Sequence[bool]) -> _Gradients:
        (hidden, weight, bias), dtype = wanted, work_dtype(head.hidden_ND)
        return cls(
            torch.zeros_like(head.hidden_ND, memory_format=torch.contiguous_format) if hidden else None,
            torch.zeros_like(head.weight_VD, dtype=dtype, memory_format=torch.contiguous_format) if weight else None,
            torch.zeros_like(head.bias_V, dtype=dtype) if bias and head.bias_V is not None else None,
        )

    @property
    def wanted(self) -> bool:
        return any(gradient is not None for gradient in (self.hidden_ND, self.weight_VD, self.bias_V))

    def add(self, own: slice, logits_CV: torch.Tensor, head: Head) -> None:
        """Takes in the gradient of a chunk's logits."""
        if self.hidden_ND is not None:
            self.hidden_ND[own] = linear(logits_CV, head.weight_VD.T)
        if self.weight_VD is not None:
            _add_product(self.weight_VD, logits_CV, head.hidden_ND[own])
        if self.bias_V is not None:
            self.bias_V.add_(logits_CV.sum(dim=0, dtype=self.bias_V.dtype))


def _add_product(total_VD: torch.Tensor, logits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    if logits_CV.dtype == total_VD.dtype:
        total_VD.addmm_(logits_CV.T, hidden_CD)
    elif total_VD.device.type == "cuda":
        total_VD.add_(torch.mm(logits_CV.T, hidden_CD, out_dtype=total_VD.dtype))
    else:
        total_VD.addmm_(logits_CV.to(total_VD.dtype).T, hidden_CD.to(total_VD.dtype))


def _chunk_rows(head: Head, other: Head) -> int:
    row_bytes = head.weight_VD.shape[0] * (head.hidden_ND.element_size() + other.hidden_ND.element_size())
    budget = _CHUNK_BYTES.get(head.hidden_ND.device.type, _CHUNK_BYTES["cuda"])
    return max(_LEAST_CHUNK_ROWS, budget // row_bytes)


def _groups(cu_seqlens: torch.Tensor, rows: int, chunk: int, options: KDOptions) -> list[tuple[int, int]]:
    """Runs of rows whose weights depend on no other rows: of whole segments, as many as fit into a chunk."""
    if not options.uncertainty:
        return [(begin, min(begin + chunk, rows)) for begin in range(0, rows, chunk)]
    if cu_seqlens.device.type != "cpu" or options.weight_normalization == "weight":
        return [(0, rows)]
    groups: list[tuple[int, int]] = []
    begin = last = 0
    for end in cu_seqlens[1:].tolist():
        if end - begin > chunk and last > begin:
            groups.append((begin, last))
            begin = last
        last = end
    return [*groups, (begin, last)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
    """One call's rows, and what is found out about them."""

    student: Head
    teacher: Head
    labels_N: torch.Tensor
    soft_N: torch.Tensor
    hard_N: torch.Tensor
    cu_seqlens: torch.Tensor
    numbers_N: torch.Tensor | None
    options: KDOptions
    impl: str

    def work(self, gradients: _Gradients) -> torch.Tensor:
        """The loss, 0-d; fills the gradients."""
        N = self.labels_N.numel()
        dtype = work_dtype(self.student.hidden_ND, self.teacher.hidden_ND)
        results = RowResults.of_rows(N, dtype, self.labels_N.device)
        weight_N = RowScalars(*results.kept_SN).weight
        chunk = max(1, min(N, _chunk_rows(self.student, self.teacher)))
        # Taken once: what is given back and taken again chunk by chunk leaves holes in the heap.
        student_CV, teacher_CV = (
            head.hidden_ND.new_empty(chunk, head.weight_VD.shape[0]) for head in (self.student, self.teacher)
        )
        if not self.options.uncertainty:
            weight_N.copy_(self.soft_N)
        # Where the sum of weights is asked for there is one group, and so all weights are there before it is used.
        for begin, end in _groups(self.cu_seqlens, N, chunk, self.options):
            group = slice(begin, end)
            chunks = [slice(first, min(first + chunk, end)) for first in range(begin, end, chunk)]
            # The entropies of a single chunk come with its losses.
            swept = self.options.uncertainty and len(chunks) > 1
            if swept:
                for own in chunks:
                    self._entropies(own, results, teacher_CV)
                self._weigh(group, results)
            for own in reversed(chunks):
                if not (swept and own is chunks[-1]):
                    self.teacher.write_logits(own, teacher_CV)
                logits = self._losses(own, student_CV, teacher_CV, results, entropies_too=not swept)
                if not swept and self.options.uncertainty:
                    self._weigh(group, results)
                if gradients.wanted:
                    scales = loss_scales(weight_N, self.soft_N, self.hard_N, self.options)
                    self._gradients(own, *logits, results, scales, gradients)
        scales = loss_scales(weight_N, self.soft_N, self.hard_N, self.options)
        return sum_rows(results, scales, self.options.temperature)

    def _entropies(self, own: slice, results: RowResults, teacher_CV: torch.Tensor) -> None:
        """Fills the entropies of a chunk, and leaves its logits in the teacher's buffer."""
        logits_CV = self.teacher.write_logits(own, teacher_CV)
        rows_module(self.impl).entropies(logits_CV, self.soft_N[own], results.entropy_N[own], self._numbers(own))

    def _weigh(self, group: slice, results: RowResults) -> None:
        """Fills the weights of a group, whose entropies are there."""
        cu_seqlens = (self.cu_seqlens - group.start).clamp(0, group.stop - group.start)
        weights = weigh_rows(results.entropy_N[group], self.soft_N[group], cu_seqlens, self.options)
        RowScalars(*results.kept_SN).weight[group] = weights

    def _losses(
        self,
        own: slice,
        student_CV: torch.Tensor,
        teacher_CV: torch.Tensor,
        results: RowResults,
        *,
        entropies_too: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fills the results of a chunk whose teacher's logits are there; gives both models' logits."""
        student_CV, teacher_CV = self.student.write_logits(own, student_CV), teacher_CV[: own.stop - own.start]
        options = dataclasses.replace(self.options, uncertainty=self.options.uncertainty and entropies_too)
        chosen = (self.labels_N[own], self.soft_N[own], self.hard_N[own])
        found = results.of_block(own)
        rows_module(self.impl).losses(student_CV, teacher_CV, *chosen, options, found, self._numbers(own))
        return student_CV, teacher_CV

    def _gradients(
        self,
        own: slice,
        student_CV: torch.Tensor,
        teacher_CV: torch.Tensor,
        results: RowResults,
        scales: torch.Tensor,
        gradients: _Gradients,
    ) -> None:
        """Adds a chunk's gradients; that of the student's logits takes their place."""
        labels_C, hard_C, kept_SC = self.labels_N[own], self.hard_N[own], results.kept_SN[:, own]
        temperature = self.options.temperature
        rows_module(self.impl).gradient(
            student_CV, student_CV, teacher_CV, labels_C, hard_C, kept_SC, scales, temperature
        )
        gradients.add(own, student_CV, self.student)

    def _numbers(self, own: slice) -> torch.Tensor | None:
        return None if self.numbers_N is None else self.numbers_N[own]


def _leave_out_unused(batch: _Batch) -> tuple[_Batch, torch.Tensor | None]:
    """On the CPU, the batch of those rows that count, and their numbers; None where leaving out would not pay."""
    used_N = batch.soft_N | batch.hard_N
    if used_N.device.type != "cpu":
        return batch, None
    used = int(used_N.sum())
    if (used_N.numel() - used) * batch.student.weight_VD.shape[0] <= _GATHERED_LOGITS * used:
        return batch, None
    numbers = used_N.nonzero()[:, 0]
    before_N1 = torch.nn.functional.pad(used_N.cumsum(0), (1, 0))
    fewer = dataclasses.replace(
        batch,
        student=dataclasses.replace(batch.student, hidden_ND=batch.student.hidden_ND[numbers]),
        teacher=dataclasses.replace(batch.teacher, hidden_ND=batch.teacher.hidden_ND[numbers]),
        labels_N=batch.labels_N[numbers],
        soft_N=batch.soft_N[numbers],
        hard_N=batch.hard_N[numbers],
        cu_seqlens=before_N1[batch.cu_seqlens.long()],
        numbers_N=numbers,
    )
    return fewer, numbers


# Optional, as in `kd_loss`.
@torch.library.custom_op("protnest::linear_kd_loss", mutates_args=())
def _linear_kd_loss_op(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: Optional[torch.Tensor],  # noqa: UP045
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: Optional[torch.Tensor],  # noqa: UP045
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    soft_rows: Optional[torch.Tensor],  # noqa: UP045
    temperature: float,
    alpha: float,
    smoothing: float,
    uncertainty: bool,
    smooth: bool,
    weight_normalization: str,
    ignore_index: int,
    wanted: Sequence[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss (0-d) and its gradients to hidden states, weight and bias: empty where not `wanted`."""
    options = KDOptions(
        temperature=temperature,
        alpha=alpha,
        smoothing=smoothing,
        uncertainty=uncertainty,
        smooth=smooth,
        weight_normalization=weight_normalization,
        ignore_index=ignore_index,
    )
    soft_N, hard_N = soft_and_hard_rows(labels, soft_rows, ignore_index)
    whole = _Batch(
        student=Head(hidden_ND=student_hidden, weight_VD=student_weight, bias_V=student_bias),
        teacher=Head(hidden_ND=teacher_hidden, weight_VD=teacher_weight, bias_V=teacher_bias),
        labels_N=labels,
        soft_N=soft_N,
        hard_N=hard_N,
        cu_seqlens=cu_seqlens,
        numbers_N=None,
        options=options,
        impl=impl,
    )
    batch, numbers = _leave_out_unused(whole)
    gradients = _Gradients.of_head(batch.student, wanted)
    loss = batch.work(gradients)
    hidden_ND = gradients.hidden_ND
    if hidden_ND is not None and numbers is not None:
        hidden_ND = torch.zeros_like(student_hidden).index_copy_(0, numbers, hidden_ND)
    nothing = student_hidden.new_empty(0)
    return (
        loss,
        nothing if hidden_ND is None else hidden_ND,
        nothing.clone() if gradients.weight_VD is None else gradients.weight_VD.to(student_weight.dtype),
        nothing.clone() if gradients.bias_V is None else gradients.bias_V.to(student_weight.dtype),
    )


@_linear_kd_loss_op.register_fake
def _(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wanted = rest[-2]
    like = (student_hidden, student_weight, student_bias)
    gradients = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if want and tensor is not None
        else student_hidden.new_empty(0)
        for want, tensor in zip(wanted, like, strict=True)
    ]
    loss = student_hidden.new_empty((), dtype=work_dtype(student_hidden, teacher_hidden))
    return loss, gradients[0], gradients[1], gradients[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.wanted = inputs[16]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise torch makes up zeros as the gradients of these gradients, (V, D) of them.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = zip(ctx.wanted, ctx.saved_tensors, strict=True)
    return (*(_scale(gradient, grad_loss) if want else None for want, gradient in gradients), *[None] * 15)


def _scale(gradient: torch.Tensor, grad_loss: torch.Tensor) -> torch.Tensor:
    # In place it becomes the parameter's gradient without a copy, and torch refuses to unpack it for a second backward.
    # What traces the graph for a compiler, in tensors of a class of its own, cannot have it in place.
    return gradient.mul_(grad_loss) if type(gradient) is torch.Tensor else gradient * grad_loss


_linear_kd_loss_op.register_autograd(_backward, setup_context=_setup_context)


def linear_kd_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
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
    """`kd_loss` of hidden states and heads; differentiable once, to the student's hidden states, weight and bias.

    Args:
        student_hidden: (N, D), fp16, bf16, fp32 or fp64.
        student_weight: (V, D), of the same dtype.
        teacher_hidden: (N, E), any of these dtypes.
        teacher_weight: (V, E), of the teacher's hidden states' dtype.
        labels: see `kd_loss`, as all that follows but the biases.
        cu_seqlens: int64 or int32 (B + 1,).
        student_bias: (V,) of the student's dtype.
        teacher_bias: (V,) of the teacher's dtype.
        temperature: T of the soft loss.
        alpha: share of the hard loss.
        smoothing: lambda.
        uncertainty: weight rows by the teacher's entropy within their segment.
        smooth: smooth targets by the teacher's confidence.
        weight_normalization: "count" or "weight".
        soft_rows: bool (N,), the soft loss's rows; by default those with a label.
        ignore_index: label of rows without one.
        inplace: without effect: gradients take the place of logits here always.
        impl: "auto", "reference", "chunked", "cpu" or "triton"; a named one runs or raises.

    Returns:
        0-d, fp32 (fp64 where hidden states are).

    Raises:
        ValueError: as `kd_loss`; or widths, vocabularies or dtypes of hidden states, weights and biases disagree.
        RuntimeError: the named implementation cannot run here; or, from torch, backward is called a second time.
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
    student = Head(hidden_ND=student_hidden, weight_VD=student_weight, bias_V=student_bias)
    teacher = Head(hidden_ND=teacher_hidden, weight_VD=teacher_weight, bias_V=teacher_bias)
    _check(student, teacher)
    N, V, device = student_hidden.shape[0], student_weight.shape[0], student_hidden.device
    check_rows(N, V, device, labels, cu_seqlens, soft_rows, ignore_index)
    chosen = choose_impl("linear_kd_loss", impl, student_hidden, teacher_hidden)
    if chosen == "reference":
        logits = (student.logits(), teacher.logits().detach())
        return kd_loss_reference(*logits, labels, cu_seqlens, soft_rows, options=options)
    differentiated = (student_hidden, student_weight, student_bias)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in differentiated]
    outputs: tuple[torch.Tensor, ...] = _linear_kd_loss_op(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        labels,
        cu_seqlens,
        soft_rows,
        *dataclasses.astuple(options),
        wanted,
        chosen,
    )
    return outputs[0]


def _check(student: Head, teacher: Head) -> None:
    student.check("student")
    teacher.check("teacher")
    for name, got, expected in (
        ("rows", teacher.hidden_ND.shape[0], student.hidden_ND.shape[0]),
        ("vocabulary", teacher.weight_VD.shape[0], student.weight_VD.shape[0]),
    ):
        if got != expected:
            message = f"the teacher's {name} are {got}, expected {expected} as the student's"
            raise ValueError(message)
    device = student.hidden_ND.device
    others = {
        "student_weight": student.weight_VD,
        "student_bias": student.bias_V,
        "teacher_hidden": teacher.hidden_ND,
        "teacher_weight": teacher.weight_VD,
        "teacher_bias": teacher.bias_V,
    }
    check_device(**{name: (tensor, device) for name, tensor in others.items() if tensor is not None})
