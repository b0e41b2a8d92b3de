"""The Triton twin of add_norm: every element against NumPy's fp64, hostile rows, NaN around and in all memory.

Shapes: T rows, D width.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from support.encoder_kernel_mutants import ADD_NORM_MUTANTS
from support.poisoned import DEVICE, for_mutants, guarded, half_ulp, on_triton, poisoned_memory
from support.source_mutants import load_mutant

pytest.importorskip("triton")
from protnest.kernels.gpu import add_norm as module

pytestmark = on_triton
EPS = 1e-5
SHAPES = [(1, 1), (5, 123), (33, 320), (6, 480), (3, 1280), (2, 5120)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Given = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]


def _hostile(T: int, D: int, dtype: torch.dtype, *, seed: int = 0) -> Given:
    """x, delta, weight, bias. Rows differ in scale, 1e-3 to 10, and in mean, to a hundred deviations; one is flat."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 + torch.randn(shape, generator=generator)

    x, delta, weight, bias = normal(T, D), normal(T, D), normal(D), normal(D)
    scale = 10 ** (4 * torch.rand((T, 1), generator=generator) - 3)
    x, delta = x * scale, delta * scale
    x += scale * 10 ** (3 * torch.rand((T, 1), generator=generator) - 1)
    x[T // 2], delta[T // 2] = 0.7, 0.1
    return guarded(x), guarded(delta.to(dtype)), guarded(weight.to(dtype)), guarded(bias.to(dtype))


def _failure(given: Given, dtype: torch.dtype, *, twin: ModuleType = module) -> str | None:
    """The worst element, if one lies further from gold than rounding explains.

    Bound of the sum: half an ulp. Of the norm: half an ulp of its dtype, and 4 eps of fp32 times the sizes of its
    terms, a centred value counting as (|x| + |delta| + |mean|) over the deviation. The product is at 1.3 of these 4.
    """
    with poisoned_memory():
        got_sum, got = twin.add_norm(*given, EPS, dtype)
    assert got.dtype == dtype
    x, delta, weight, bias = (None if each is None else each.double().cpu().numpy() for each in given)
    assert x is not None
    assert weight is not None
    assert bias is not None
    if delta is None:
        assert got_sum is given[0]
        delta = np.zeros_like(x)
    total = x + delta
    mean = total.mean(-1, keepdims=True)
    deviation = np.sqrt(total.var(-1, keepdims=True) + EPS)
    gold = (total - mean) / deviation * weight + bias
    unit = torch.finfo(torch.float32).eps
    sizes = (np.abs(x) + np.abs(delta) + np.abs(mean)) / deviation * np.abs(weight) + np.abs(bias)
    bound = half_ulp(dtype) * np.abs(gold) + 4 * unit * sizes + torch.finfo(dtype).tiny
    return _worst("sum", got_sum, total, unit / 2 * np.abs(total)) or _worst("norm", got, gold, bound)


def _worst(name: str, got: torch.Tensor, gold: Any, bound: Any) -> str | None:
    found = got.double().cpu().numpy()
    if found.shape != gold.shape:
        return f"{name} is {found.shape}"
    excess = np.nan_to_num(np.abs(found - gold) - bound, nan=np.inf)
    if excess.size and excess.max() > 0:
        place = np.unravel_index(int(excess.argmax()), gold.shape)
        return f"{name} {place}: got {found[place]:.9g}, gold {gold[place]:.9g}, bound {bound[place]:.3g}"
    return None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape: tuple[int, int]) -> None:
    assert _failure(_hostile(*shape, torch.float32), torch.float32) is None


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_narrow(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert _failure(_hostile(*shape, dtype), dtype) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_added(dtype: torch.dtype) -> None:
    x, _, weight, bias = _hostile(7, 192, dtype)
    assert _failure((x, None, weight, bias), dtype) is None


def test_wide_parameters_with_a_narrow_result() -> None:
    assert _failure(_hostile(5, 123, torch.float32), torch.bfloat16) is None


def test_no_rows() -> None:
    x, delta, weight, bias = _hostile(1, 8, torch.float32)
    assert delta is not None
    total, normed = module.add_norm(x[:0], delta[:0], weight, bias, EPS, torch.bfloat16)
    assert (total.shape, normed.shape, normed.dtype) == ((0, 8), (0, 8), torch.bfloat16)


def test_a_row_does_not_depend_on_others() -> None:
    x, delta, weight, bias = _hostile(9, 120, torch.float32)
    assert delta is not None
    together = module.add_norm(x, delta, weight, bias, EPS, torch.float32)
    x[:4], x[5:] = torch.nan, torch.inf
    alone = module.add_norm(x, delta, weight, bias, EPS, torch.float32)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[4], other[4])
        assert not other[:4].isfinite().any()


@for_mutants
@pytest.mark.parametrize("name", ADD_NORM_MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    mutant = load_mutant("kernels.gpu.add_norm", ADD_NORM_MUTANTS[name], tmp_path)
    cases = [(_hostile(T, D, dtype), dtype) for T, D in SHAPES[1:4] for dtype in (torch.float32, torch.bfloat16)]
    assert any(_failure(given, dtype, twin=mutant) for given, dtype in cases), f"nothing notices: {name}"


@pytest.mark.parametrize(
    ("place", "broken", "problem"),
    [
        (
            0,
            lambda x: x.double(),
            "x is torch.float64 (3, 8), expected contiguous torch.float32 (T, D), D from 1 to 8192",
        ),
        (0, lambda x: x.T, "x is torch.float32 (8, 3), expected contiguous"),
        (1, lambda x: x[:2], "delta is torch.float32 (2, 8), expected contiguous (3, 8) in one of torch.float32"),
        (2, lambda x: x[:7], "weight is torch.float32 (7,), expected contiguous (8,)"),
        (3, lambda x: x.long(), "bias is torch.int64 (8,), expected contiguous (8,)"),
    ],
)
def test_what_it_cannot_take_is_shown(place: int, broken: Any, problem: str) -> None:
    given: list[Any] = [torch.zeros(3, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE)]
    given += [torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE)]
    given[place] = broken(given[place])
    with pytest.raises(ValueError, match=re.escape(problem)):
        module.add_norm(*given, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; allowed: torch\.float32"):
        module.add_norm(torch.zeros(3, 8), None, torch.zeros(8), torch.zeros(8), EPS, torch.int8)
