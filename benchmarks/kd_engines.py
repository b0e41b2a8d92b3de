"""Who computes the distillation loss: protnest's implementations, the published code, that compiled, Liger's kernel.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from protnest.benchmarks.kd_problems import BOTH, LOGITS, Data, Problem
from protnest.benchmarks.published_kd import published_kd_loss
from protnest.kernels import kd_loss, linear_kd_loss
from protnest.kernels.kd_options import KDOptions

Result = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
"""A loss, and its gradients where there are some."""

EAGER, COMPILED, LIGER = "eager", "compiled", "liger"
OURS = {"cpu": "cpu", "cuda": "triton"}
PEERS = (EAGER, COMPILED, "reference", "chunked", LIGER)
PUBLISHED = KDOptions()
KL_ONLY = KDOptions(alpha=0, uncertainty=False, smooth=False)
"""What Liger's kernel computes of the loss: neither labels nor weights nor smoothing."""

# Allowed error of the loss, of its size, and of a gradient, of its norm. 1e-10 inside logarithms moves the loss by up
# to 2e-4; a broken loss is off by far more than either.
_ALLOWED_LOSS, _ALLOWED_LOSS_INEXACT = 1e-5, 1e-3
_ALLOWED_GRADIENT = {"fp32": 5e-5, "fp16": 4e-3, "bf16": 2e-2}
_ALLOWED_GRADIENT_INEXACT = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Engine:
    """One implementation of the loss, with its options.

    Attributes:
        name: as rows have it.
        options: which part of the loss.
        loss: computes it, 0-d.
        exact: nothing is added inside its logarithms.
    """

    name: str
    options: KDOptions
    loss: Callable[[Data], torch.Tensor]
    exact: bool = True

    def run(self, data: Data, direction: str) -> Result:
        """The loss, and its gradients to `data.student` where the direction has them."""
        if direction != BOTH:
            with torch.no_grad():
                return self.loss(data), ()
        loss = self.loss(data)
        return loss.detach(), torch.autograd.grad(loss, data.student)

    def allowed(self, precision: str) -> tuple[float, float]:
        """Relative errors of loss and gradient that count as right."""
        gradient = _ALLOWED_GRADIENT[precision]
        if self.exact:
            return _ALLOWED_LOSS, gradient
        return _ALLOWED_LOSS_INEXACT, max(gradient, _ALLOWED_GRADIENT_INEXACT)


def protnest(impl: str, options: KDOptions) -> Engine:
    """Our own operations; `impl` as theirs."""

    def loss(data: Data) -> torch.Tensor:
        rest: dict[str, Any] = vars(options) | {"impl": impl}
        if len(data.student) == 1:
            return kd_loss(data.student[0], data.teacher[0], data.labels_N, data.cu_seqlens, **rest)
        (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias) = data.student, data.teacher
        rest |= {"student_bias": bias, "teacher_bias": teacher_bias}
        return linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, data.labels_N, data.cu_seqlens, **rest)

    return Engine(name=impl, options=options, loss=loss)


def _published(data: Data, options: KDOptions, compiled: bool) -> torch.Tensor:
    function = _compile() if compiled else _from_parts
    segments = data.cu_seqlens.numel() - 1
    loss: torch.Tensor = function(data.student, data.teacher, data.labels_N, data.segment_N, segments, options)
    return loss


def _from_parts(
    student: tuple[torch.Tensor, ...],
    teacher: tuple[torch.Tensor, ...],
    labels_N: torch.Tensor,
    segment_N: torch.Tensor,
    segments: int,
    options: KDOptions,
) -> torch.Tensor:
    student_NV, teacher_NV = (parts[0] if len(parts) == 1 else F.linear(*parts) for parts in (student, teacher))
    return published_kd_loss(student_NV, teacher_NV, labels_N, segment_N, segments, options)


@functools.cache
def _compile() -> Callable[..., Any]:
    # Shapes are constants of the compiled code, as for a trainer with fixed batches; a graph that breaks raises.
    return torch.compile(_from_parts, dynamic=False, fullgraph=True)


def _liger(data: Data, temperature: float) -> torch.Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    student_NV, teacher_NV = data.student[0].float(), data.teacher[0].float()
    log_student_NV = torch.log_softmax(student_NV / temperature, dim=-1)
    kl: torch.Tensor = LigerKLDIVLoss(reduction="batchmean")(
        log_student_NV, torch.softmax(teacher_NV / temperature, dim=-1)
    )
    return temperature**2 * kl


def build_duels(
    problem: Problem, device: torch.device, *, ours: str | None = None, peers: tuple[str, ...] = PEERS
) -> list[tuple[Engine, list[Engine]]]:
    """Ours and whom it meets, once for each part of the loss that is compared.

    Args:
        problem: what is measured.
        device: where.
        ours: implementation of ours; by default the device's fastest.
        peers: of `PEERS`; Liger's is left out where it cannot run: not installed, no CUDA, or the heads are fused in.

    Raises:
        ValueError: a peer is not known.
    """
    if unknown := [name for name in peers if name not in PEERS]:
        message = f"peers: no {', '.join(unknown)}; allowed are {', '.join(PEERS)}"
        raise ValueError(message)
    impl = ours or OURS[device.type]
    made: dict[str, Engine] = {name: protnest(name, PUBLISHED) for name in ("reference", "chunked")}
    for name, compiled in ((EAGER, False), (COMPILED, True)):
        loss = partial(_published, options=PUBLISHED, compiled=compiled)
        made[name] = Engine(name=name, options=PUBLISHED, loss=loss, exact=False)
    duels = [(protnest(impl, PUBLISHED), [made[name] for name in peers if name in made and name != impl])]
    if LIGER in peers and liger_runs(device) and problem.operation == LOGITS:
        loss = partial(_liger, temperature=KL_ONLY.temperature)
        duels.append((protnest(impl, KL_ONLY), [Engine(name=LIGER, options=KL_ONLY, loss=loss, exact=False)]))
    return duels


def liger_runs(device: torch.device) -> bool:
    """Liger-Kernel is installed, and there is a CUDA GPU for its Triton kernels."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
