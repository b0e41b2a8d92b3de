"""The distillation loss from a teacher's most likely tokens, beside the same loss of logits rebuilt in fp64.

Shapes: N rows, K tokens kept, V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from protnest.kernels.kd_loss import kd_loss_reference
from protnest.kernels.kd_options import KDOptions
from protnest.kernels.linear_kd_loss import Head
from protnest.training import top_k_loss as module
from protnest.training.top_k_loss import TopKRows, top_k_loss

N, V, D = 50, 97, 16

OPTIONS = [
    KDOptions(),
    KDOptions(uncertainty=False),
    KDOptions(smooth=False),
    KDOptions(weight_normalization="weight", temperature=1.3, alpha=0.2, smoothing=0.4),
    KDOptions(alpha=1.0),
    KDOptions(alpha=0.0, uncertainty=False, smooth=False, temperature=4.0),
]


def _known(teacher_NV: torch.Tensor, K: int, T: float) -> TopKRows:
    logits_NK, tokens_NK = teacher_NV.topk(K)
    p_NV = teacher_NV.softmax(-1)
    return TopKRows(
        logits_NK=logits_NK,
        tokens_NK=tokens_NK,
        lse_N=(teacher_NV / T).logsumexp(-1),
        entropy_N=-torch.xlogy(p_NV, p_NV).sum(-1),
        max_N=teacher_NV.amax(-1),
    )


def _problem(*, bias: bool = True, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    labels_N = torch.randint(V, (N,), generator=generator)
    labels_N[::5] = -100
    soft_N = torch.ones(N, dtype=torch.bool)
    soft_N[3] = soft_N[17] = False
    return {
        "student": [normal(N, D), normal(V, D), normal(V) if bias else None],
        # Rows from nearly even to nearly certain.
        "teacher": normal(N, V) * torch.linspace(0.01, 8, N)[:, None],
        "labels": labels_N,
        "cu_seqlens": torch.tensor([0, 10, 10, 37, 50]),
        "soft": soft_N,
    }


def _ours(problem: dict[str, Any], known: TopKRows, options: KDOptions) -> list[torch.Tensor]:
    inputs = [None if each is None else each.clone().requires_grad_() for each in problem["student"]]
    hidden, weight, bias = inputs
    assert hidden is not None
    assert weight is not None
    head = Head(hidden_ND=hidden, weight_VD=weight, bias_V=bias)
    loss = top_k_loss(head, known, problem["labels"], problem["cu_seqlens"], problem["soft"], options)
    return [loss, *torch.autograd.grad(loss * 3, [each for each in inputs if each is not None])]


def _reference(problem: dict[str, Any], K: int, options: KDOptions) -> list[torch.Tensor]:
    """fp64, the other V - K tokens alike; entropies, which weigh rows, are those of the whole row."""
    T = options.temperature
    inputs = [None if each is None else each.double().requires_grad_() for each in problem["student"]]
    hidden, weight, bias = inputs
    assert hidden is not None
    assert weight is not None
    s_NV = hidden @ weight.T + (0 if bias is None else bias)
    t_NV = problem["teacher"].double()
    p_NV = (t_NV / T).softmax(-1)
    top_NK = t_NV.topk(K).indices
    rest_N1 = 1 - p_NV.gather(1, top_NK).sum(1, keepdim=True)
    built_NV = (rest_N1 / max(1, V - K)).expand(N, V).scatter(1, top_NK, p_NV.gather(1, top_NK))
    eps_N1 = options.smoothing * (1 - p_NV.amax(1, keepdim=True)) if options.smooth else 0.0
    target_NV = (1 - eps_N1) * built_NV + eps_N1 / V
    kl_N = (torch.xlogy(target_NV, target_NV) - target_NV * (s_NV / T).log_softmax(-1)).sum(-1)
    one_NV = t_NV.softmax(-1)
    entropy_N = -torch.xlogy(one_NV, one_NV).sum(-1)
    soft, weights = problem["soft"], torch.zeros(N, dtype=torch.float64)
    for begin, end in zip(problem["cu_seqlens"][:-1].tolist(), problem["cu_seqlens"][1:].tolist(), strict=True):
        own = [row for row in range(begin, end) if soft[row]]
        if own:
            u = entropy_N[own]
            weights[own] = 0.5 + 0.5 * (u - u.min()) / (u.max() - u.min()) if options.uncertainty else 1.0
    total = weights.sum() if options.weight_normalization == "weight" else soft.sum()
    counted = problem["labels"] != -100
    hard = torch.nn.functional.cross_entropy(s_NV[counted], problem["labels"][counted])
    loss = options.alpha * hard + (1 - options.alpha) * T**2 * (weights * kl_N).sum() / total
    return [loss, *torch.autograd.grad(loss * 3, [each for each in inputs if each is not None])]


def _assert_close(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for got, wanted in zip(ours, expected, strict=True):
        scale = float(wanted.detach().abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-6 * max(1e-3, scale))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("K", [1, 10, V])
def test_it_is_the_loss_of_the_rebuilt_rows(options: KDOptions, K: int) -> None:
    problem = _problem()
    known = _known(problem["teacher"], K, options.temperature)
    _assert_close(_ours(problem, known, options), _reference(problem, K, options))


@pytest.mark.parametrize("options", OPTIONS)
def test_all_tokens_kept_are_the_whole_loss(options: KDOptions) -> None:
    problem = _problem(bias=False)
    known = _known(problem["teacher"], V, options.temperature)
    hidden, weight, _ = problem["student"]
    whole = kd_loss_reference(
        hidden.double() @ weight.double().T,
        problem["teacher"].double(),
        problem["labels"],
        problem["cu_seqlens"],
        problem["soft"],
        options=options,
    )
    assert _ours(problem, known, options)[0].item() == pytest.approx(whole.item(), rel=1e-5)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem()
    known = _known(problem["teacher"], 10, 2.0)
    whole = _ours(problem, known, KDOptions())
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(module, "_LEAST_CHUNK_ROWS", 7)
    _assert_close(_ours(problem, known, KDOptions()), [each.double() for each in whole])


def test_the_kept_mass_may_round_above_one() -> None:
    """A row that is certain: what is left must not become negative, or its logarithm is none."""
    problem = _problem()
    problem["teacher"][:, 0] = 200.0
    known = _known(problem["teacher"], 10, 2.0)
    known.lse_N.sub_(1e-6)
    assert all(each.isfinite().all() for each in _ours(problem, known, KDOptions()))


def test_sixteen_bits_are_rounded_and_no_more() -> None:
    problem = _problem()
    known = _known(problem["teacher"], 10, 2.0)
    expected = _ours(problem, known, KDOptions())
    problem["student"] = [each.bfloat16() for each in problem["student"]]
    got = _ours(problem, known, KDOptions())
    assert [each.dtype for each in got] == [torch.float32, *[torch.bfloat16] * 3]
    for ours, wanted in zip(got, expected, strict=True):
        assert float((ours.float() - wanted).norm()) < 0.03 * float(wanted.norm())


def test_a_loss_that_is_no_number_is_refused() -> None:
    problem = _problem()
    problem["student"][0][4] = math.nan
    with pytest.raises(ValueError, match="the distillation loss is nan, expected a finite number"):
        _ours(problem, _known(problem["teacher"], 10, 2.0), KDOptions())
