"""The Triton twin of bias_gelu: every element against the standard library's fp64, NaN around and in all memory.

Shapes: N rows, F width.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from support.encoder_kernel_mutants import GELU_MUTANTS
from support.poisoned import DEVICE, for_mutants, guarded, half_ulp, on_triton, poisoned_memory
from support.source_mutants import load_mutant

pytest.importorskip("triton")
from protnest.kernels.gpu import gelu as module

pytestmark = on_triton
SHAPES = [(1, 1), (5, 123), (9, 1280), (3, 513)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _hostile(N: int, F: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x and bias: from 1e-3 to 10 a row, one row of large values, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + torch.randn((N, F), generator=generator)
    x *= 10 ** (4 * torch.rand((N, 1), generator=generator) - 3)
    x[N // 2] *= 100
    x[N // 3] = 0
    return guarded(x.to(dtype)), guarded((0.3 + torch.randn(F, generator=generator)).to(dtype), pages=600)


def _failure(x: torch.Tensor, bias: torch.Tensor, *, twin: ModuleType = module) -> str | None:
    """The worst element, if it lies further from gold than half an ulp and 2 eps of fp32 times |x| + |bias|.

    The product is at 0.7 of these 2; near zero of the function they are most of the bound, as in torch's own.
    """
    with poisoned_memory():
        got = twin.bias_gelu(x, bias)
    assert got.dtype == x.dtype
    wide_x, wide_bias = x.double().cpu().numpy(), bias.double().cpu().numpy()
    z = wide_x + wide_bias
    # By erfc, so that gold has all its digits where 1 + erf has lost them.
    gold = 0.5 * z * np.vectorize(math.erfc, otypes=[float])(-z / math.sqrt(2))
    narrow = torch.finfo(x.dtype)
    bound = half_ulp(x.dtype) * np.abs(gold) + narrow.tiny * narrow.eps
    bound += 2 * torch.finfo(torch.float32).eps * (np.abs(wide_x) + np.abs(wide_bias))
    found = got.double().cpu().numpy()
    excess = np.nan_to_num(np.abs(found - gold) - bound, nan=np.inf)
    if found.shape != gold.shape or excess.max() > 0:
        place = np.unravel_index(int(excess.argmax()), gold.shape)
        return f"{place}: got {found[place]:.9g}, gold {gold[place]:.9g}, bound {bound[place]:.3g}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_gelu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert _failure(*_hostile(*shape, dtype)) is None


def test_bias_of_another_dtype() -> None:
    x, _ = _hostile(5, 123, torch.bfloat16)
    _, bias = _hostile(5, 123, torch.float32)
    assert _failure(x, bias) is None


def test_extremes() -> None:
    """Far out it is x or zero, and no number stays none."""
    x = torch.tensor([[-torch.inf, -1e30, -50.0, 0.0, 50.0, 1e30, torch.inf, torch.nan]], device=DEVICE)
    got = module.bias_gelu(x, torch.zeros(8, device=DEVICE)).cpu()
    assert got[0, 1:6].tolist() == [0.0, 0.0, 0.0, 50.0, float(torch.tensor(1e30))]
    assert got[0, 6] == torch.inf
    assert got[0, 7].isnan()


def test_nothing_in_nothing_out() -> None:
    for shape in ((0, 8), (3, 0)):
        assert module.bias_gelu(torch.zeros(shape), torch.zeros(shape[1])).shape == shape


@for_mutants
@pytest.mark.parametrize("name", GELU_MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    mutant = load_mutant("kernels.gpu.gelu", GELU_MUTANTS[name], tmp_path)
    cases = [_hostile(*shape, dtype) for shape in SHAPES[1:] for dtype in (torch.float32, torch.bfloat16)]
    assert any(_failure(*given, twin=mutant) for given in cases), f"nothing notices: {name}"


@pytest.mark.parametrize(
    ("x", "bias", "problem"),
    [
        (torch.zeros(3), torch.zeros(3), "expected x (N, F) and bias (F,), got (3,) and (3,)"),
        (torch.zeros(3, 4), torch.zeros(3), "expected x (N, F) and bias (F,), got (3, 4) and (3,)"),
        (
            torch.zeros(3, 4).double(),
            torch.zeros(4),
            "x is torch.float64, expected it contiguous in one of torch.float32",
        ),
        (torch.zeros(4, 3).T, torch.zeros(4), "x is torch.float32, expected it contiguous"),
        (torch.zeros(3, 4), torch.zeros(4).int(), "bias is torch.int32, expected it contiguous"),
    ],
)
def test_what_it_cannot_take_is_shown(x: Any, bias: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        module.bias_gelu(x, bias)
