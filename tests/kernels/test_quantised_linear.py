"""int8 products: exact integers in every implementation, rounding as documented, results within their bounds.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from protnest.kernels import quantised_linear as _operation  # noqa: F401
from protnest.kernels.product import Product, Scales
from protnest.kernels.quantise_rows import quantise_rows

from support.int8_mutants import KERNEL_MUTANTS
from support.source_mutants import load_mutant

TRUE = sys.modules["protnest.kernels.quantised_linear"]
IMPLS = ("int8", "fp32", "reference")
SHAPES = [(1, 1, 1), (1, 64, 16), (7, 321, 33), (3, 1025, 5), (64, 320, 960), (33, 1280, 320), (5, 5120, 3)]
EXTREMES = [(127, 127), (127, -127), (-128, 127), (-128, -127)]


def _hostile(rows: int, inputs: int) -> torch.Tensor:
    """Rows of scales 1e-3 to 10 with a mean that is not zero, an all-positive, an all-negative and a constant row."""
    generator = torch.Generator().manual_seed(rows + inputs)
    x_NI = (torch.randn(rows, inputs, generator=generator) + 0.3) * torch.logspace(-3, 1, rows)[:, None]
    if rows > 4:
        x_NI[1], x_NI[2], x_NI[3] = x_NI[1].abs() + 5.0, -x_NI[2].abs() - 0.1, 0.7
    return x_NI


def _integers(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    q_NI = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
    return q_NI, torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)


def _weight(ops: ModuleType, values_OI: torch.Tensor) -> Any:
    ones_O = torch.ones(values_OI.shape[0])
    return ops.QuantisedWeight(values_OI, ones_O, values_OI.sum(dim=1).float())


def _impls() -> list[str]:
    return [impl for impl in IMPLS if impl != "int8" or TRUE.why_not_int8() is None]


def check_weight(ops: ModuleType) -> None:
    weight_OI = _hostile(40, 123)
    weight_OI[5] = 0.0
    weight = ops.quantise_weight(weight_OI)
    scale_O1 = weight.scale_O.double()[:, None]
    assert weight.values_OI.dtype == torch.int8
    assert ((scale_O1 * weight.values_OI - weight_OI.double()).abs() <= 0.5 * scale_O1 * (1 + 1e-6)).all()
    torch.testing.assert_close(weight.scale_O, weight_OI.abs().amax(1) / 127, rtol=1e-6, atol=0)
    gold_O = (weight.values_OI.double() * scale_O1).sum(1)
    assert ((weight.sum_O.double() - gold_O).abs() <= 2.0**-24 * gold_O.abs()).all()
    assert weight.scale_O[5] == 0


def check_product(ops: ModuleType) -> None:
    for rows, inputs, outputs in SHAPES:
        cases = [_integers(rows, inputs, outputs)]
        cases += [
            (torch.full((rows, inputs), q, dtype=torch.int8), torch.full((outputs, inputs), w, dtype=torch.int8))
            for q, w in EXTREMES
        ]
        # Odd sums beyond 2^24, which fp32 would round.
        cases.append((cases[0][0] % 28 + 100, cases[0][1] % 28 + 100))
        for q_NI, values_OI in cases:
            gold_NO = q_NI.numpy().astype(np.int64) @ values_OI.numpy().astype(np.int64).T
            for impl in _impls():
                acc_NO = ops.quantised_linear(q_NI, _weight(ops, values_OI), impl=impl)
                assert acc_NO.dtype == torch.int32
                np.testing.assert_array_equal(acc_NO.numpy(), gold_NO, err_msg=f"{impl} {rows, inputs, outputs}")


def check_result(ops: ModuleType) -> None:
    """y within fp32 rounding of what its quantised operands stand for, in fp64."""
    x_NI, weight = _hostile(40, 1280), ops.quantise_weight(_hostile(33, 1280))
    bias_O = torch.linspace(-2, 3, 33)
    q_NI, scale_N, shift_N = quantise_rows(x_NI)
    acc_NO = ops.quantised_linear(q_NI, weight, impl="fp32")
    y_NO = Product(acc_NO, bias_O, Scales(weight.scale_O, weight.sum_O, scale_N, shift_N)).numbers()
    wide_OI = weight.values_OI.double() * weight.scale_O.double()[:, None]
    product_NO = scale_N.double()[:, None] * (q_NI.double() @ wide_OI.T)
    shifted_NO = shift_N.double()[:, None] * wide_OI.sum(1)
    gold_NO = product_NO + shifted_NO + bias_O.double()
    bound_NO = 4 * 2.0**-24 * (product_NO.abs() + shifted_NO.abs() + bias_O.double().abs())
    assert y_NO.dtype == torch.float32
    assert ((y_NO.double() - gold_NO).abs() <= bound_NO).all()


CHECKS = (check_weight, check_product, check_result)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks(check: object) -> None:
    assert callable(check)
    check(TRUE)


@pytest.mark.parametrize("name", KERNEL_MUTANTS)
def test_mutants_are_killed(name: str, tmp_path: Path) -> None:
    old, new = KERNEL_MUTANTS[name]
    mutant = load_mutant("kernels.quantised_linear", {old: new}, tmp_path)
    for check in CHECKS:
        try:
            check(mutant)
        except AssertionError:
            return
    pytest.fail(f"{name}: every check passes")


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_a_row_does_not_depend_on_its_neighbours(impl: str) -> None:
    if impl == "int8" and (reason := TRUE.why_not_int8()) is not None:
        pytest.skip(reason)
    x_NI, weight = _hostile(200, 320), TRUE.quantise_weight(_hostile(64, 320))

    def run(rows: torch.Tensor) -> torch.Tensor:
        q_NI, scale_N, shift_N = quantise_rows(rows)
        acc_NO = TRUE.quantised_linear(q_NI, weight, impl=impl)
        return Product(acc_NO, torch.ones(64), Scales(weight.scale_O, weight.sum_O, scale_N, shift_N)).numbers()

    whole = run(x_NI)
    for count in (1, 3, 17, 64):
        assert torch.equal(run(x_NI[:count]), whole[:count])
    assert torch.equal(run(x_NI[150:151]), whole[150:151])


@pytest.mark.parametrize("impl", ["auto", "fp32", "reference"])
@pytest.mark.parametrize(("rows", "outputs"), [(0, 5), (4, 0), (0, 0)])
def test_nothing(impl: str, rows: int, outputs: int) -> None:
    q_NI, scale_N, shift_N = quantise_rows(torch.empty(rows, 8))
    weight = _weight(TRUE, torch.zeros(outputs, 8, dtype=torch.int8))
    acc_NO = TRUE.quantised_linear(q_NI, weight, impl=impl)
    assert acc_NO.shape == (rows, outputs)
    assert acc_NO.dtype == torch.int32
    scales = Scales(weight.scale_O, weight.sum_O, scale_N, shift_N)
    assert Product(acc_NO, torch.zeros(outputs), scales).numbers().shape == (rows, outputs)


def test_strided_rows_and_other_dtypes() -> None:
    x_NI = _hostile(9, 64)
    for got, expected in zip(quantise_rows(x_NI.t().contiguous().t()), quantise_rows(x_NI), strict=True):
        assert torch.equal(got, expected)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = x_NI.to(dtype)
        for got, expected in zip(quantise_rows(rounded), quantise_rows(rounded.float()), strict=True):
            assert torch.equal(got, expected)
    q_NI, values_OI = _integers(9, 64, 8)
    strided = q_NI.t().contiguous().t()
    weight = _weight(TRUE, values_OI)
    assert torch.equal(TRUE.quantised_linear(strided, weight), TRUE.quantised_linear(q_NI, weight))


def test_threads_at_once() -> None:
    q_NI, values_OI = _integers(64, 320, 96)
    weight = _weight(TRUE, values_OI)
    expected = TRUE.quantised_linear(q_NI, weight, impl="reference")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: TRUE.quantised_linear(q_NI, weight), range(32)))
    assert all(torch.equal(result, expected) for result in results)


def test_auto_says_once_what_it_takes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    q_NI, values_OI = _integers(2, 8, 3)
    weight = _weight(TRUE, values_OI)
    TRUE._choose_auto.cache_clear()
    with caplog.at_level(logging.INFO, logger=TRUE.__name__):
        TRUE.quantised_linear(q_NI, weight)
        TRUE.quantised_linear(q_NI, weight)
    assert len([record for record in caplog.records if "quantised_linear runs" in record.message]) == 1
    TRUE._choose_auto.cache_clear()
    caplog.clear()
    monkeypatch.setattr(TRUE, "why_not_int8", lambda: "the moon is full")
    with caplog.at_level(logging.INFO, logger=TRUE.__name__):
        TRUE.quantised_linear(q_NI, weight)
    assert [record.message for record in caplog.records] == ["quantised_linear runs fp32: the moon is full"]
    with pytest.raises(RuntimeError, match="impl='int8' cannot run here: the moon is full"):
        TRUE.quantised_linear(q_NI, weight, impl="int8")
    TRUE._choose_auto.cache_clear()


def test_a_cpu_without_vnni_is_found_out_and_still_exact() -> None:
    """oneDNN held to AVX2 saturates; the product of extremes tells, and auto is exact by another way."""
    if TRUE.why_not_int8() is not None:
        pytest.skip("this CPU has no exact int8 products to take away")
    script = (
        "import torch; from protnest.kernels.quantised_linear import *; print(why_not_int8());"
        "q = torch.full((5, 1280), 127, dtype=torch.int8);"
        "w = quantise_weight(torch.full((3, 1280), -127.0));"
        "print((quantised_linear(q, w) == -127 * 127 * 1280).all().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["the CPU has no VNNI: its int8 products saturate", "True"]


def test_why_not_int8_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = TRUE.why_not_int8.__wrapped__
    monkeypatch.setattr(TRUE.platform, "machine", lambda: "aarch64")
    assert "on aarch64 are not known to be fast" in ask()
    monkeypatch.undo()
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    if TRUE.platform.machine().lower() in ("x86_64", "amd64"):
        assert "without oneDNN" in ask()
    monkeypatch.delattr(torch, "_int_mm")
    assert "lacks torch._int_mm" in ask()


def _q(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def test_errors() -> None:
    weight = _weight(TRUE, _q(3, 8))
    with pytest.raises(ValueError, match="impl is 'cuda'; allowed: auto, int8, fp32, reference"):
        TRUE.quantised_linear(_q(2, 8), weight, impl="cuda")
    with pytest.raises(ValueError, match=r"q is torch.uint8, the weight torch.int8: both must be int8"):
        TRUE.quantised_linear(_q(2, 8).to(torch.uint8), weight)
    with pytest.raises(ValueError, match=r"q has shape \(2, 7\), the weight \(3, 8\)"):
        TRUE.quantised_linear(_q(2, 7), weight)
    with pytest.raises(ValueError, match="q is on meta"):
        TRUE.quantised_linear(_q(2, 8).to("meta"), weight)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(3,\)"):
        TRUE.quantise_weight(torch.ones(3))
    with pytest.raises(ValueError, match="weight row 1 is not finite"):
        TRUE.quantise_weight(torch.tensor([[1.0], [torch.nan]]))
