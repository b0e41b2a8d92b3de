"""`linear` against fp64, on every route; and that the routes are taken where they should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from protnest.kernels import hardware
from protnest.kernels.linear import linear, linear_reference, needs_widening

LINEAR = "protnest.kernels.linear"
SHAPES = [(1, 8, 8), (7, 123, 33), (300, 320, 960), (64, 480, 1920), (0, 16, 16)]
ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
"""Half the distance between neighbouring values, relative to the value."""


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of scales 1e-3 to 10, a mean that is not zero, and a constant row."""
    N, I, O = shape  # noqa: E741
    generator = torch.Generator().manual_seed(N + I)
    scales = torch.logspace(-3, 1, max(N, 1), dtype=torch.float64)[:N, None]
    x = (torch.randn(N, I, generator=generator, dtype=torch.float64) + 0.3) * scales
    if N > 2:
        x[1] = 0.7
    weight = torch.randn(O, I, generator=generator, dtype=torch.float64) + 0.1
    bias = torch.randn(O, generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def assert_close(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Within rounding of the result plus fp32 summation: |out - gold| <= ulp |gold| + 8 eps32 sum |terms|."""
    gold = x.double() @ weight.double().T + bias.double()
    terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    summing = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    bound = ULP[x.dtype] * gold.abs() * 1.01 + 8 * summing * terms
    worse = (out.double() - gold).abs() > bound
    assert out.dtype == x.dtype
    assert not worse.any(), f"at {worse.nonzero()[0].tolist()}"


@pytest.fixture(params=["units", "no units"])
def bf16_units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(f"{LINEAR}.multiplies_bf16", lambda device: request.param == "units")
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_matches_fp64(shape: tuple[int, int, int], dtype: torch.dtype, bf16_units: str) -> None:
    x, weight, bias = _inputs(shape, dtype)
    assert_close(linear(x, weight, bias), x, weight, bias)
    assert_close(linear_reference(x, weight, bias), x, weight, bias)
    assert_close(linear(x, weight), x, weight, torch.zeros_like(bias))
    assert_close(linear_reference(x, weight), x, weight, torch.zeros_like(bias))


Broken = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
MUTANTS: dict[str, Broken] = {
    "bias left out": lambda x, w, b: F.linear(x.float(), w.float()).to(x.dtype),
    "only the first bias": lambda x, w, b: F.linear(x.float(), w.float(), b[:1].float().expand_as(b)).to(x.dtype),
    "rounded before the bias": lambda x, w, b: F.linear(x.float(), w.float()).to(x.dtype) + b,
    "summed in bf16 halves": lambda x, w, b: (
        F.linear(x[:, ::2], w[:, ::2].contiguous()) + F.linear(x[:, 1::2], w[:, 1::2].contiguous()) + b
    ),
    "weight rounded to fp16": lambda x, w, b: F.linear(x.float(), w.half().float() * 1.001, b.float()).to(x.dtype),
    "last column left out": lambda x, w, b: F.linear(x[:, :-1].float(), w[:, :-1].float(), b.float()).to(x.dtype),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    x, weight, bias = _inputs((64, 123, 33), torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_close(MUTANTS[name](x, weight, bias), x, weight, bias)


def test_only_bf16_on_a_cpu_without_units_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LINEAR}.multiplies_bf16", lambda device: False)
    assert needs_widening(torch.zeros(1, dtype=torch.bfloat16))
    assert not needs_widening(torch.zeros(1))
    assert not needs_widening(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(f"{LINEAR}.multiplies_bf16", lambda device: True)
    assert not needs_widening(torch.zeros(1, dtype=torch.bfloat16))


def test_gradients(bf16_units: str) -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in _inputs((5, 7, 3), torch.float64))
    assert torch.autograd.gradcheck(linear, (x, weight, bias))
    assert torch.autograd.gradcheck(linear_reference, (x, weight, bias))
    narrow = [tensor.requires_grad_() for tensor in _inputs((5, 16, 8), torch.bfloat16)]
    linear(*narrow).float().sum().backward()  # type: ignore[no-untyped-call]
    for tensor in narrow:
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.bfloat16
        assert torch.isfinite(tensor.grad).all()


def test_autocast_is_left_to_torch(bf16_units: str) -> None:
    x, weight, bias = _inputs((5, 16, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
        assert linear(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), the weight \(4, 5\)"):
        linear(torch.zeros(2, 3), torch.zeros(4, 5))
    monkeypatch.setattr(f"{LINEAR}.multiplies_bf16", lambda device: False)
    with pytest.raises(ValueError, match=r"x is torch.bfloat16, the weight torch.float32"):
        linear(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("machine", "capabilities", "avx512", "amx", "expected"),
    [
        ("x86_64", {}, False, False, False),
        ("x86_64", {}, True, False, True),
        ("x86_64", {}, False, True, True),
        ("aarch64", {"arm_bf16": True}, False, False, True),
        ("arm64", {}, True, True, False),
    ],
)
def test_bf16_units_are_found(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    capabilities: dict[str, bool],
    avx512: bool,
    amx: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert hardware.multiplies_bf16.__wrapped__(torch.device("cpu")) is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_units_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.multiplies_bf16.__wrapped__(torch.device("cuda", 0)) is expected
