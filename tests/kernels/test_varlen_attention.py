"""varlen_attention: every element against softmax in NumPy's fp64, gradients, the choice of implementation, errors.

Shapes: T tokens, B sequences, L tokens of one, H heads, K head width.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import logging
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from protnest.kernels import varlen_attention as module  # the file: the package exports no function of this name
from protnest.kernels.varlen_attention import varlen_attention, varlen_attention_reference

from support.mutants import ATTENTION_MUTANTS, CAUSAL_ATTENTION_MUTANTS

Attended = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

HEAD_WIDTHS = [16, 20, 24, 32, 64, 128]
on_gpu = pytest.param(
    "varlen",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen: torch sees no CUDA GPU")],
)
each_impl = pytest.mark.parametrize("impl", ["reference", "sdpa", on_gpu])
each_cpu_impl = pytest.mark.parametrize("impl", ["reference", "sdpa"])
each_direction = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])


def _cu_seqlens(lengths_B: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths_B)], dtype=torch.int32)


def _hostile(T: int, H: int, K: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Attended:
    """q, k and v cut from one buffer, as the encoder cuts them; NaN all around in memory.

    Their means are not zero, and rows differ in scale from 0.1 to 4, so that some rows attend to one token alone and
    others to all.
    """
    generator = torch.Generator().manual_seed(seed)
    around = torch.full((T + 2, 3 * H + 2, K), torch.nan, dtype=dtype)
    scales = 10 ** (1.6 * torch.rand((T, 3 * H, 1), generator=generator) - 1)
    values = (torch.randn((T, 3 * H, K), generator=generator) + 0.3) * scales
    values[T // 2 :][:1] = 0.7
    around[1:-1, 1:-1] = values.to(dtype)
    q_THK, k_THK, v_THK = around[1:-1, 1:-1].chunk(3, dim=1)
    return q_THK, k_THK, v_THK


def _run(impl: str, qkv: Attended, lengths_B: Sequence[int], causal: bool = False) -> torch.Tensor:
    device = "cuda" if impl == "varlen" else "cpu"
    q_THK, k_THK, v_THK = (x.to(device) for x in qkv)
    cu_seqlens = _cu_seqlens(lengths_B).to(device)
    return varlen_attention(q_THK, k_THK, v_THK, cu_seqlens, lengths_B, causal=causal, impl=impl).cpu()


def _failure(got: torch.Tensor, qkv: Attended, lengths_B: Sequence[int], causal: bool = False) -> str | None:
    """The worst element, if one lies further from gold than `4 eps (1 + S) sum_u p_u |v_u|`.

    S is the largest `scale * sum |q||k|` of the row: a score is off by eps S and moves its weight by as much, and the
    weighted sum is off by eps of its terms. The product is at 1.5 of these 4 when written.
    """
    q, k, v = (x.double().numpy().transpose(1, 0, 2) for x in qkv)
    assert (got.shape, got.dtype) == (qkv[0].shape, qkv[0].dtype)
    eps = torch.finfo(got.dtype).eps
    for begin, end in itertools.pairwise(_cu_seqlens(lengths_B).tolist()):
        own = np.s_[:, begin:end]
        scores_HLL = q[own] @ k[own].transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        sizes_HL = (np.abs(q[own]) @ np.abs(k[own]).transpose(0, 2, 1) / np.sqrt(q.shape[-1])).max(-1, initial=0)
        if causal:
            scores_HLL[:, ~np.tri(end - begin, dtype=bool)] = -np.inf
        weights_HLL = np.exp(scores_HLL - scores_HLL.max(-1, keepdims=True, initial=-np.inf))
        weights_HLL /= weights_HLL.sum(-1, keepdims=True)
        gold = (weights_HLL @ v[own]).transpose(1, 0, 2)
        bound = (4 * eps * (1 + sizes_HL[..., None]) * (weights_HLL @ np.abs(v[own]))).transpose(1, 0, 2)
        excess = np.nan_to_num(np.abs(got[begin:end].double().numpy() - gold) - bound, nan=np.inf)
        if excess.size and excess.max() > 0:
            worst = np.unravel_index(int(excess.argmax()), gold.shape)
            place = (begin + int(worst[0]), *worst[1:])
            return f"{place}: got {got[place]:.9g}, gold {gold[worst]:.9g}, bound {bound[worst]:.3g}"
    return None


@each_impl
@each_direction
@pytest.mark.parametrize("K", HEAD_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_varlen_attention(impl: str, K: int, dtype: torch.dtype, causal: bool) -> None:
    if impl == "varlen" and (dtype.itemsize != 2 or K % 8):
        pytest.skip("varlen takes fp16 and bf16 in head widths that are multiples of 8")
    lengths_B = [1, 2, 130, 1, 37]
    qkv = _hostile(sum(lengths_B), 3, K, dtype)
    assert _failure(_run(impl, qkv, lengths_B, causal), qkv, lengths_B, causal) is None


@pytest.mark.parametrize("multiplies_bf16", [True, False])
@each_direction
@pytest.mark.parametrize("K", HEAD_WIDTHS)
def test_bf16_with_and_without_units(
    monkeypatch: pytest.MonkeyPatch, K: int, multiplies_bf16: bool, causal: bool
) -> None:
    monkeypatch.setattr("protnest.kernels.linear.multiplies_bf16", lambda device: multiplies_bf16)
    lengths_B = [1, 2, 130, 37]
    qkv = _hostile(sum(lengths_B), 3, K, torch.bfloat16)
    assert _failure(_run("sdpa", qkv, lengths_B, causal), qkv, lengths_B, causal) is None


@each_cpu_impl
@each_direction
@pytest.mark.parametrize(
    "lengths_B",
    [
        pytest.param([], id="no sequence"),
        pytest.param([1], id="one token"),
        pytest.param([1] * 9, id="one token each"),
        pytest.param([700], id="one long"),
        pytest.param([3, 0, 2], id="an empty one between"),
        pytest.param([0], id="an empty one"),
    ],
)
def test_lengths(impl: str, lengths_B: list[int], causal: bool) -> None:
    qkv = _hostile(sum(lengths_B), 2, 16)
    assert _failure(_run(impl, qkv, lengths_B, causal), qkv, lengths_B, causal) is None


@pytest.mark.parametrize("name", ATTENTION_MUTANTS)
def test_bound_kills_mutant(name: str) -> None:
    lengths_B = [12, 1, 30, 5]
    qkv = _hostile(sum(lengths_B), 3, 24)
    cu_seqlens = _cu_seqlens(lengths_B)
    assert _failure(varlen_attention_reference(*qkv, cu_seqlens, lengths_B), qkv, lengths_B) is None
    assert _failure(ATTENTION_MUTANTS[name](*qkv, cu_seqlens, lengths_B), qkv, lengths_B) is not None


@pytest.mark.parametrize("name", CAUSAL_ATTENTION_MUTANTS)
def test_causal_bound_kills_mutant(name: str) -> None:
    lengths_B = [12, 1, 30, 1, 5]
    qkv = _hostile(sum(lengths_B), 3, 24)
    cu_seqlens = _cu_seqlens(lengths_B)
    assert _failure(varlen_attention_reference(*qkv, cu_seqlens, lengths_B, True), qkv, lengths_B, True) is None
    assert _failure(CAUSAL_ATTENTION_MUTANTS[name](*qkv, cu_seqlens, lengths_B), qkv, lengths_B, True) is not None


@each_cpu_impl
def test_what_comes_later_changes_no_bit(impl: str) -> None:
    lengths_B = [20, 30]
    qkv = _hostile(50, 2, 16)
    before = _run(impl, qkv, lengths_B, True)
    changed = tuple(x.clone() for x in qkv)
    for x in changed:
        x[31:] = 3 - x[31:]
    after = _run(impl, (changed[0], changed[1], changed[2]), lengths_B, True)
    assert torch.equal(after[:31], before[:31])
    assert (after[31:] != before[31:]).any(-1).all()


@each_cpu_impl
@each_direction
def test_neighbours_do_not_leak(impl: str, causal: bool) -> None:
    lengths_B = [20, 30, 10]
    qkv = _hostile(60, 2, 16)
    before = _run(impl, qkv, lengths_B, causal)
    poisoned = tuple(x.clone() for x in qkv)
    for x in poisoned:
        x[20:50] = torch.nan
    after = _run(impl, (poisoned[0], poisoned[1], poisoned[2]), lengths_B, causal)
    assert torch.equal(after[:20], before[:20])
    assert torch.equal(after[50:], before[50:])
    assert after[20:50].isnan().all()


@each_cpu_impl
def test_leaves_its_inputs_alone(impl: str) -> None:
    qkv = _hostile(9, 2, 16)
    copies = [x.clone() for x in qkv]
    _run(impl, qkv, [4, 5])
    for x, copy in zip(qkv, copies, strict=True):
        assert torch.equal(x, copy)


@each_cpu_impl
@each_direction
@pytest.mark.parametrize("lengths_B", [[1, 3, 2], [4], [1]])
def test_gradients(impl: str, lengths_B: list[int], causal: bool) -> None:
    qkv = [x.clone().requires_grad_() for x in _hostile(sum(lengths_B), 2, 4, torch.float64)]
    cu_seqlens = _cu_seqlens(lengths_B)
    check: Any = torch.autograd.gradcheck
    assert check(lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, lengths_B, causal=causal, impl=impl), qkv)


@each_direction
@pytest.mark.parametrize("K", HEAD_WIDTHS)
def test_fp32_gradients_of_sdpa(K: int, causal: bool) -> None:
    lengths_B = [1, 30, 17]

    def gradients(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        qkv = [x.to(dtype).clone().requires_grad_() for x in _hostile(48, 3, K)]
        upstream_THK = _hostile(48, 3, K, seed=1)[0].to(dtype)
        cu_seqlens = _cu_seqlens(lengths_B)
        out_THK = varlen_attention(qkv[0], qkv[1], qkv[2], cu_seqlens, lengths_B, causal=causal, impl=impl)
        torch.autograd.backward(out_THK, upstream_THK)
        return [x.grad for x in qkv if x.grad is not None]

    q_THK, k_THK, _ = _hostile(48, 3, K)
    size = float((q_THK.abs().sum(-1).max() * k_THK.abs().max()) / K**0.5)
    golds = gradients("reference", torch.float64)
    assert len(golds) == 3
    for got, gold in zip(gradients("sdpa", torch.float32), golds, strict=True):
        # Each weight is off by eps S as in the forward pass; gradients sum as many such terms as there are rows.
        bound = 4 * torch.finfo(torch.float32).eps * (1 + size) * float(gold.abs().max())
        error = float((got.double() - gold).abs().max())
        assert error <= bound, f"{error:.3g} > {bound:.3g}"


# Which implementation runs


def test_auto_runs_sdpa_on_a_cpu_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_explained", set())
    caplog.set_level(logging.INFO, logger="protnest.kernels.varlen_attention")
    qkv = _hostile(6, 2, 16)
    cu_seqlens = _cu_seqlens([2, 4])
    outputs = [varlen_attention(*qkv, cu_seqlens, [2, 4]) for _ in range(3)]
    assert torch.equal(outputs[0], _run("sdpa", qkv, [2, 4]))
    assert caplog.messages == ["varlen_attention runs sdpa: tensors are on cpu"]


@each_direction
def test_auto_runs_varlen_where_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, causal: bool
) -> None:
    """The launch itself needs a GPU; a stand-in for torch's function shows what it would be given."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)
    calls: list[inspect.BoundArguments] = []

    def stand_in(*given: Any, **named: Any) -> torch.Tensor:
        calls.append(signature.bind(*given, **named))
        return torch.zeros_like(given[0])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(module, "why_not_varlen", lambda q_THK: None)
    monkeypatch.setattr(module, "_explained", set())
    caplog.set_level(logging.INFO, logger="protnest.kernels.varlen_attention")
    q_THK, k_THK, v_THK = _hostile(6, 2, 16)
    cu_seqlens = _cu_seqlens([2, 4])
    varlen_attention(q_THK, k_THK, v_THK, cu_seqlens, [2, 4], causal=causal)
    (call,) = calls
    *tensors, longest_q, longest_k = call.args
    assert call.kwargs == ({"window_size": (-1, 0)} if causal else {})
    for got, given in zip(tensors, (q_THK, k_THK, v_THK, cu_seqlens, cu_seqlens), strict=True):
        assert got is given
    assert (longest_q, longest_k) == (4, 4)
    assert caplog.messages == ["varlen_attention runs varlen"]


def test_named_varlen_raises_on_a_cpu_with_the_reason() -> None:
    qkv = _hostile(6, 2, 16)
    with pytest.raises(RuntimeError, match="impl='varlen' cannot run here: tensors are on cpu"):
        varlen_attention(*qkv, _cu_seqlens([2, 4]), [2, 4], impl="varlen")


@pytest.mark.parametrize(
    ("dtype", "has_torch", "capability", "reason"),
    [
        (torch.float32, True, (9, 0), "dtype is torch.float32, not fp16 or bf16"),
        (torch.float64, True, (9, 0), "dtype is torch.float64, not fp16 or bf16"),
        (torch.bfloat16, False, (9, 0), f"torch {torch.__version__} lacks torch.nn.attention.varlen"),
        (torch.float16, True, (7, 5), "the GPU's compute capability is below 8.0"),
        (torch.bfloat16, True, (8, 0), None),
        (torch.float16, True, (12, 0), None),
    ],
)
def test_reasons_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    has_torch: bool,
    capability: tuple[int, int],
    reason: str | None,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_torch else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q_THK: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(6, 2, 16))
    assert module.why_not_varlen(q_THK) == reason
    monkeypatch.setattr(module, "_explained", set())
    assert module._choose(q_THK, "auto") == ("sdpa" if reason else "varlen")


# Errors


def test_unknown_impl() -> None:
    qkv = _hostile(6, 2, 16)
    with pytest.raises(ValueError, match="impl is 'triton'; allowed: auto, reference, sdpa, varlen"):
        varlen_attention(*qkv, _cu_seqlens([2, 4]), [2, 4], impl="triton")


@each_cpu_impl
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(6, 2, 16), (6, 2, 8), (6, 2, 16)], id="head width"),
        pytest.param([(6, 2, 16), (5, 2, 16), (5, 2, 16)], id="tokens"),
        pytest.param([(6, 4, 16), (6, 2, 16), (6, 2, 16)], id="heads"),
        pytest.param([(6, 32)] * 3, id="no axis of heads"),
        pytest.param([(1, 6, 2, 16)] * 3, id="an axis too many"),
    ],
)
def test_shapes_that_disagree(impl: str, shapes: list[tuple[int, ...]]) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    named = re.escape(f"q, k and v must share one shape (T, H, K), got {shapes[0]}, {shapes[1]}, {shapes[2]}")
    with pytest.raises(ValueError, match=named):
        varlen_attention(q, k, v, _cu_seqlens([2, 4]), [2, 4], impl=impl)


@each_cpu_impl
@pytest.mark.parametrize(
    ("cut_B", "lengths_B", "named"),
    [
        ([2, 4], [2, 3], "2 lengths adding up to 5 and cu_seqlens of shape (3,) do not describe 6 tokens"),
        ([2, 4], [6], "1 lengths adding up to 6 and cu_seqlens of shape (3,) do not describe 6 tokens"),
        ([6], [2, 4], "2 lengths adding up to 6 and cu_seqlens of shape (2,) do not describe 6 tokens"),
        ([], [], "0 lengths adding up to 0 and cu_seqlens of shape (1,) do not describe 6 tokens"),
    ],
)
def test_lengths_that_do_not_describe_the_tokens(impl: str, cut_B: list[int], lengths_B: list[int], named: str) -> None:
    qkv = _hostile(6, 2, 16)
    with pytest.raises(ValueError, match=re.escape(named)):
        varlen_attention(*qkv, _cu_seqlens(cut_B), lengths_B, impl=impl)
