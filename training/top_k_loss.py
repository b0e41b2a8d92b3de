"""The distillation loss where of a teacher's row only the most likely tokens are known, and some exact numbers.

Of each row are known: the K largest logits t_k with their tokens, the log-sum-exp at temperature T, the largest logit
and the entropy at temperature 1. The other V - K tokens share what is left of the mass, all alike:

    p_k = exp(t_k / T - lse_T),   rest = 1 - sum p_k,   r = rest / (V - K) for each of the others
    eps = lambda (1 - exp(max / T - lse_T)),   b = (1 - eps) r + eps / V,   pbar = b, plus (1 - eps) (p_k - r) at the K
    KL = sum pbar log pbar - b sum_v s_v / T - sum_k (1 - eps) (p_k - r) s_k / T + lse(s / T)

and the rest as in `kernels.kd_loss`. Confidence and entropy weights are exact; the shape of the tail is lost. Where
K = V the loss is that of the whole logits. As in `linear_kd_loss` the student's logits never exist as a whole: rows are
worked through in chunks, and gradients are worked out on the way and handed over by the one backward.

Shapes: N rows, C rows of a chunk, K tokens kept of a row, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.kd_options import KDOptions
from ..kernels.kd_rows import loss_scales, weigh_rows
from ..kernels.linear import linear
from ..kernels.linear_kd_loss import Head

_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
_LEAST_CHUNK_ROWS = 16


@dataclass(frozen=True, eq=False)
class TopKRows:
    """What is known of a teacher's N rows.

    Attributes:
        logits_NK: fp32, the largest, untempered.
        tokens_NK: int64, whose they are.
        lse_N: fp32, log of the sum of exp(t / T) over the whole vocabulary.
        entropy_N: fp32, of softmax(t).
        max_N: fp32, the largest logit.
    """

    logits_NK: torch.Tensor
    tokens_NK: torch.Tensor
    lse_N: torch.Tensor
    entropy_N: torch.Tensor
    max_N: torch.Tensor

    def to(self, device: torch.device) -> TopKRows:
        """The same on `device`."""
        return TopKRows(*(tensor.to(device, non_blocking=True) for tensor in self.__dict__.values()))

    def __getitem__(self, own: slice) -> TopKRows:
        return TopKRows(*(tensor[own] for tensor in self.__dict__.values()))

    def targets(self, V: int, options: KDOptions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """b (N,), what the K have beyond it (N, K), and sum pbar log pbar (N,)."""
        T, K = options.temperature, self.logits_NK.shape[1]
        p_NK = (self.logits_NK / T - self.lse_N[:, None]).exp()
        rest_N = (1 - p_NK.sum(dim=1)).clamp(min=0)
        even_N = rest_N / (V - K) if K < V else torch.zeros_like(rest_N)
        eps_N = torch.zeros_like(rest_N)
        if options.smooth:
            eps_N = options.smoothing * (1 - (self.max_N / T - self.lse_N).exp())
        base_N = (1 - eps_N) * even_N + eps_N / V
        beyond_NK = (1 - eps_N)[:, None] * (p_NK - even_N[:, None])
        top_NK = base_N[:, None] + beyond_NK
        negentropy_N = (V - K) * torch.xlogy(base_N, base_N) + torch.xlogy(top_NK, top_NK).sum(dim=1)
        return base_N, beyond_NK, negentropy_N


def top_k_loss(
    student: Head,
    taught: TopKRows,
    labels_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    soft_N: torch.Tensor,
    options: KDOptions,
) -> torch.Tensor:
    """`linear_kd_loss` with a teacher of whom the most likely tokens are known; differentiable once.

    Args:
        student: its N rows; gradients go to hidden states, weight and bias.
        taught: the teacher's N rows, at the temperature of `options`.
        labels_N: int64, or `options.ignore_index`.
        cu_seqlens: int64 (B + 1,), the segments of the entropy weights.
        soft_N: bool, rows of the soft loss.
        options: of the loss.

    Returns:
        0-d fp32.

    Raises:
        ValueError: a loss is NaN or infinite.
    """
    loss: torch.Tensor = _TopKLoss.apply(
        student.hidden_ND, student.weight_VD, student.bias_V, taught, labels_N, cu_seqlens, soft_N, options
    )  # type: ignore[no-untyped-call]
    return loss


class _TopKLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        taught: TopKRows,
        labels_N: torch.Tensor,
        cu_seqlens: torch.Tensor,
        soft_N: torch.Tensor,
        options: KDOptions,
    ) -> torch.Tensor:
        hard_N = labels_N != options.ignore_index
        weight_N = weigh_rows(taught.entropy_N, soft_N, cu_seqlens, options)
        scales = loss_scales(weight_N, soft_N, hard_N, options)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        V, kind = weight_VD.shape[0], hidden_ND.device.type
        rows = max(_LEAST_CHUNK_ROWS, _CHUNK_BYTES.get(kind, _CHUNK_BYTES["cuda"]) // (4 * V))
        for begin in range(0, len(labels_N), rows):
            own = slice(begin, begin + rows)
            logits_CV = linear(hidden_ND[own], weight_VD, bias_V).float()
            total += _chunk(
                logits_CV, taught[own], labels_N[own], hard_N[own], weight_N[own] * scales[0], scales[1], options
            )
            rounded_CV = logits_CV.to(hidden_ND.dtype)
            grad_hidden_ND[own] = linear(rounded_CV, weight_VD.T)
            grad_weight_VD += (rounded_CV.T @ hidden_ND[own]).float()
            if grad_bias_V is not None:
                grad_bias_V += logits_CV.sum(dim=0)
        if kind == "cpu" and not bool(total.isfinite()):
            message = f"the distillation loss is {float(total)}, expected a finite number"
            raise ValueError(message)
        grads = (grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        ctx.dtypes = [tensor.dtype for tensor in (hidden_ND, weight_VD, bias_V) if tensor is not None]
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [(grad * grad_loss).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*grads, *[None] * (8 - len(grads)))


def _chunk(
    logits_CV: torch.Tensor,
    taught: TopKRows,
    labels_C: torch.Tensor,
    hard_C: torch.Tensor,
    soft_scale_C: torch.Tensor,
    hard_scale: torch.Tensor,
    options: KDOptions,
) -> torch.Tensor:
    """The share of the loss of some rows; the gradient of their logits takes the logits' place."""
    T, V = options.temperature, logits_CV.shape[1]
    base_C, beyond_CK, negentropy_C = taught.targets(V, options)
    at_label = labels_C.where(hard_C, 0)[:, None]
    lse_1_C, lse_T_C = logits_CV.logsumexp(dim=1), (logits_CV / T).logsumexp(dim=1)
    named = base_C * logits_CV.sum(dim=1) + (beyond_CK * logits_CV.gather(1, taught.tokens_NK)).sum(dim=1)
    kl_C = negentropy_C - named / T + lse_T_C
    hard_loss_C = (lse_1_C - logits_CV.gather(1, at_label)[:, 0]).where(hard_C, 0.0)
    counts_C = soft_scale_C > 0
    loss = T * (soft_scale_C * kl_C.where(counts_C, 0.0)).sum() + hard_scale * hard_loss_C.sum()

    hard_scale_C = hard_scale * hard_C
    soft_CV = (logits_CV / T).sub_(lse_T_C[:, None]).exp_().mul_(soft_scale_C[:, None])
    logits_CV.sub_(lse_1_C[:, None]).exp_().mul_(hard_scale_C[:, None]).add_(soft_CV)
    logits_CV.sub_((soft_scale_C * base_C)[:, None])
    logits_CV.scatter_add_(1, taught.tokens_NK, -soft_scale_C[:, None] * beyond_CK)
    logits_CV.scatter_add_(1, at_label, -hard_scale_C[:, None])
    return loss
