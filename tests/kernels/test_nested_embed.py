"""nested_embed: every element against NumPy's fp64, the prefix bit for bit, gradients, choice of implementation.

Shapes: T rows, X width of the row so far, D the new model's width, N dimensions it adds, W of the buffer.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from protnest.kernels import nested_embed
from protnest.kernels.nested_embed import _choose, _explained, nested_embed_reference

from support.nested_mutants import NESTED_MUTANTS, Arguments

EPS = 1e-5
SHAPES = [(7, 32, 48, 16), (1, 1, 2, 1), (70, 30, 123, 93), (33, 128, 192, 64), (130, 192, 320, 128), (0, 4, 6, 2)]
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.param(
    "triton",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not (torch.cuda.is_available() or _INTERPRETED), reason="triton: no CUDA GPU, and TRITON_INTERPRET is not 1"
        ),
    ],
)
each_impl = pytest.mark.parametrize("impl", ["reference", "gemm", on_triton])
each_cpu_impl = pytest.mark.parametrize("impl", ["reference", "gemm"])


def _hostile(T: int, X: int, D: int, N: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Arguments:
    """Row, hidden, P, G, c. Hidden rows differ in scale from 1e-3 to 10 and in mean to a hundred deviations; one is
    constant. Everything has a mean, and around every tensor lie NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        around = torch.full((shape[0] + 2, *(size + 2 for size in shape[1:])), torch.nan, dtype=dtype)
        inner = around[(slice(1, -1),) * len(shape)]
        inner.copy_(0.3 + torch.randn(shape, generator=generator))
        return inner

    x, h, p, g, c = normal(T, X), normal(T, D), normal(D, N), normal(X, N), normal(N)
    h *= 10 ** (4 * torch.rand((T, 1), generator=generator) - 3).to(dtype)
    h += (h - h.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt() * 10 ** (
        3 * torch.rand((T, 1), generator=generator) - 1
    ).to(dtype)
    h[T // 2 :][:1] = 0.7
    return x, h, p / D**0.5, g / X**0.5, c


def _run(impl: str, given: Arguments, eps: float | None = EPS) -> torch.Tensor:
    """Through a buffer wider than the row; what lies beyond it must stay as it is."""
    device = "cuda" if impl == "triton" and not _INTERPRETED else "cpu"
    x, h, p, g, c = (each.to(device) for each in given)
    T, X = x.shape
    width = X + c.shape[0]
    buffer = torch.full((T, width + 3), torch.nan, dtype=x.dtype, device=device)
    buffer[:, :X] = x
    out = nested_embed(buffer[:, :X], h, p, g, c, eps=eps, out=buffer, impl=impl)
    assert out.shape == (T, width)
    assert T == 0 or out.data_ptr() == buffer.data_ptr()
    assert buffer[:, width:].isnan().all()
    alone = nested_embed(x, h, p, g, c, eps=eps, impl=impl)
    assert alone.is_contiguous()
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)
    return out.cpu()


def _failure(got: torch.Tensor, given: Arguments, eps: float | None = EPS) -> str | None:
    """The worst element, if one lies further from gold than rounding explains; the prefix must be bit-equal.

    Bound: 4 eps of the row's dtype times the sum of the terms' sizes, where n counts as |h| + |mean| over the
    deviation, since that is what its rounding is relative to; plus two roundings of the operands where weights are
    narrower. The product is at 1.5 of these 4 when written.
    """
    x, h, p, g, c = (each.double().numpy() for each in given)
    if got.dtype != given[0].dtype or got.shape != (x.shape[0], x.shape[1] + c.shape[0]):
        return f"{got.dtype} {tuple(got.shape)}"
    if not torch.equal(got[:, : x.shape[1]], given[0]):
        return "the row so far has other bits"
    n, size = h, np.abs(h)
    if eps is not None:
        mean = h.mean(-1, keepdims=True)
        deviation = np.sqrt(h.var(-1, keepdims=True) + eps)
        n, size = (h - mean) / deviation, (np.abs(h) + np.abs(mean)) / deviation
    gold = n @ p + x @ g + c
    unit = torch.finfo(got.dtype).eps
    bound = 4 * unit * (size @ np.abs(p) + np.abs(x) @ np.abs(g) + np.abs(c))
    if given[2].dtype.itemsize < got.dtype.itemsize:
        bound += 0.5 * torch.finfo(given[2].dtype).eps * (np.abs(n) @ np.abs(p) + np.abs(x) @ np.abs(g))
    added = got[:, x.shape[1] :].double().numpy()
    excess = np.nan_to_num(np.abs(added - gold) - bound, nan=np.inf)
    if excess.size and excess.max() > 0:
        place = np.unravel_index(int(excess.argmax()), gold.shape)
        return f"{place}: got {added[place]:.9g}, gold {gold[place]:.9g}, bound {bound[place]:.3g}"
    return None


@each_impl
@pytest.mark.parametrize("eps", [EPS, None], ids=["normalises", "normalised"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nested_embed(impl: str, shape: tuple[int, int, int, int], eps: float | None) -> None:
    given = _hostile(*shape)
    assert _failure(_run(impl, given, eps), given, eps) is None


@each_cpu_impl
def test_fp64(impl: str) -> None:
    given = _hostile(9, 20, 37, 17, torch.float64)
    assert _failure(_run(impl, given), given) is None


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_and_hidden_states(impl: str, dtype: torch.dtype) -> None:
    x, h, p, g, c = _hostile(40, 30, 70, 40)
    for hidden in (h, h.to(dtype)):
        given = (x, hidden, p.to(dtype), g.to(dtype), c)
        assert _failure(_run(impl, given), given) is None


@pytest.mark.parametrize("mistake", NESTED_MUTANTS)
def test_the_check_sees_mistakes(mistake: str) -> None:
    """Each broken twin must fail on one of the shapes on which the product passes."""
    failures = []
    for shape in SHAPES[2:5]:
        given = _hostile(*shape)
        failures.append(_failure(NESTED_MUTANTS[mistake](given, EPS), given))
    assert any(failures)


@each_cpu_impl
def test_hidden_states_of_any_stride(impl: str) -> None:
    x, h, p, g, c = _hostile(9, 8, 12, 4)
    strided = (x.T.contiguous().T, h.T.contiguous().T, p.T.contiguous().T, g.T.contiguous().T, c)
    assert _failure(nested_embed(*strided, eps=EPS, impl=impl), strided) is None


@pytest.mark.parametrize("eps", [EPS, None], ids=["normalises", "normalised"])
@each_cpu_impl
def test_gradients(impl: str, eps: float | None) -> None:
    given = tuple(each.clone().requires_grad_() for each in _hostile(5, 3, 7, 4, torch.float64, seed=3))
    # A constant row has an infinite second derivative but for eps: left to the forward tests.
    h = given[1].detach().clone()
    h[5 // 2] = torch.arange(7.0)
    given = (given[0], h.requires_grad_(), *given[2:])

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return nested_embed(*tensors, eps=eps, impl=impl)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@each_impl
def test_gradients_are_those_of_the_formula_in_fp32(impl: str) -> None:
    """Each alone, with the weights' own dtypes."""
    device = "cuda" if impl == "triton" and not _INTERPRETED else "cpu"
    given = [each.to(device).requires_grad_() for each in _hostile(20, 10, 16, 8)]
    weight_TW = torch.randn((20, 18), generator=torch.Generator().manual_seed(1)).to(device)
    wanted = torch.autograd.grad((nested_embed_reference(*given, eps=EPS) * weight_TW).sum(), given)  # type: ignore[arg-type]
    got = torch.autograd.grad((nested_embed(*given, eps=EPS, impl=impl) * weight_TW).sum(), given)  # type: ignore[arg-type]
    for name, one, other in zip(("row", "hidden", "projection", "base", "offset"), got, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=name)


@each_impl
def test_opcheck(impl: str) -> None:
    device = "cuda" if impl == "triton" and not _INTERPRETED else "cpu"
    x, h, p, g, c = (each.to(device) for each in _hostile(6, 5, 8, 3))
    operations = torch.ops.protnest
    # Triton's interpreter cannot run on the compiler's stand-ins for tensors.
    utils = (
        ("test_schema", "test_faketensor")
        if _INTERPRETED
        else ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    )
    grad = tuple(each.clone().requires_grad_() for each in (x, h, p, g, c))
    torch.library.opcheck(operations.nested_embed.default, (*grad, EPS, impl), test_utils=utils)
    row = torch.cat((x, torch.zeros((6, 4), device=device)), dim=-1)
    torch.library.opcheck(operations.nested_embed_into.default, (row, 5, h, p, g, c, None, impl), test_utils=utils)


# Which implementation runs


def test_auto_runs_gemm_on_a_cpu() -> None:
    given = _hostile(9, 8, 12, 4)
    assert torch.equal(nested_embed(*given, eps=EPS), nested_embed(*given, eps=EPS, impl="gemm"))


@pytest.mark.parametrize(
    ("triton", "capability", "weight", "chosen", "reason"),
    [
        (True, (8, 0), torch.bfloat16, "triton", ""),
        (True, (12, 0), torch.float32, "triton", ""),
        (True, (7, 5), torch.float32, "gemm", ": the GPU's compute capability is below 8.0"),
        (True, (9, 0), torch.float64, "gemm", ": the row is torch.float32, the weights torch.float64"),
        (False, (9, 0), torch.float32, "gemm", ": triton is not installed"),
    ],
)
def test_auto_on_a_gpu_says_why_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    triton: bool,
    capability: tuple[int, int],
    weight: torch.dtype,
    chosen: str,
    reason: str,
) -> None:
    from types import SimpleNamespace

    row: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _explained.clear()
    with caplog.at_level(logging.INFO, logger="protnest.kernels.nested_embed"):
        assert [_choose(row, weight, "auto") for _ in range(2)] == [chosen, chosen]
    (message,) = caplog.messages
    assert message.startswith(f"nested_embed runs {chosen}{reason}")
    _explained.clear()


@pytest.mark.skipif(_INTERPRETED, reason="the interpreter runs on a CPU")
def test_a_named_implementation_runs_or_raises() -> None:
    given = _hostile(3, 2, 4, 2)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: tensors are on cpu"):
        nested_embed(*given, eps=EPS, impl="triton")
    with pytest.raises(ValueError, match="impl is 'cuda'; allowed: auto, reference, gemm, triton"):
        nested_embed(*given, eps=EPS, impl="cuda")


# Errors


@pytest.mark.parametrize("place", range(5))
def test_shapes_that_disagree_are_shown(place: int) -> None:
    given = list(_hostile(3, 2, 5, 4))
    given[place] = given[place][..., :-1] if place != 1 else given[place][:-1]
    shown = re.escape(str(tuple(given[place].shape)))
    with pytest.raises(ValueError, match=rf"row \(T, X\), hidden \(T, D\).*{shown}"):
        nested_embed(*given, eps=EPS)


@pytest.mark.parametrize(
    ("place", "dtype", "problem"),
    [
        (0, torch.bfloat16, "the row is torch.bfloat16 and the offset torch.float32; allowed: torch.float32"),
        (4, torch.float16, "the row is torch.float32 and the offset torch.float16"),
        (2, torch.bfloat16, "projection is torch.bfloat16, base torch.float32: they must share one"),
        (1, torch.int64, "hidden is torch.int64, expected a floating dtype"),
    ],
)
def test_dtypes_that_cannot_be(place: int, dtype: torch.dtype, problem: str) -> None:
    given = list(_hostile(3, 2, 5, 4))
    given[place] = given[place].to(dtype)
    with pytest.raises(ValueError, match=problem):
        nested_embed(*given, eps=EPS)


def test_a_row_outside_of_out_is_refused() -> None:
    x, *rest = _hostile(3, 2, 5, 4)
    with pytest.raises(ValueError, match="the row must be the first columns of out"):
        nested_embed(x, *rest, eps=EPS, out=torch.zeros(3, 6))
    buffer = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="the row must be the first columns of out"):
        nested_embed(buffer[:, 1:3], *rest, eps=EPS, out=buffer)
    with pytest.raises(ValueError, match=r"out is torch.float32 \(3, 5\), expected torch.float32 \(3, 6 or more\)"):
        nested_embed(buffer[:, :2], *rest, eps=EPS, out=buffer[:, :5])
