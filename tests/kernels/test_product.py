"""Products between layers: the numbers they stand for, their parts, what disagrees; how they travel to C++.

Shapes: N rows, O outputs.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from protnest.kernels import cpu_kernels
from protnest.kernels.cpu_kernels import (
    LEVELS,
    array,
    cpu_level,
    empty_target,
    module,
    product_arrays,
    rows_of,
    target_arrays,
    why_not_cpu,
)
from protnest.kernels.linear import leaves_bias
from protnest.kernels.product import Levels, Product, Scales, check_product

from support.row_cases import KINDS, each_shape, find_failure, gold_of_product, guarded, make_product, needs_extension

each_kind = pytest.mark.parametrize("kind", KINDS)


def _integers(N: int = 2, O: int = 3) -> Product:  # noqa: E741
    scales = Scales(torch.ones(O), torch.ones(O), torch.ones(N), torch.ones(N))
    return Product(torch.zeros(N, O, dtype=torch.int32), torch.zeros(O), scales)


# What a product stands for


@each_kind
@each_shape
def test_numbers_against_fp64(shape: tuple[int, int], kind: str) -> None:
    with guarded() as guards:
        product = make_product(kind, *shape, guards)
        numbers_NO = product.numbers()
        assert numbers_NO.dtype == product.dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)
        assert find_failure(numbers_NO, gold_of_product(product)) is None


def test_numbers_of_integers_by_hand() -> None:
    scales = Scales(
        steps_O=torch.tensor([2.0, 3.0]),
        sums_O=torch.tensor([100.0, 1000.0]),
        scale_N=torch.tensor([1.0, 10.0, 0.0]),
        shift_N=torch.tensor([0.0, 1.0, 2.0]),
    )
    values_NO = torch.tensor([[1, 2], [3, -4], [5, 6]], dtype=torch.int32)
    got_NO = Product(values_NO, torch.tensor([0.5, 0.25]), scales).numbers()
    assert got_NO.tolist() == [[2.5, 6.25], [160.5, 880.25], [200.5, 2000.25]]


@pytest.mark.parametrize("name", ["sums left out", "scale and shift exchanged", "steps left out", "bias scaled"])
def test_the_bound_kills_broken_numbers(name: str) -> None:
    with guarded() as guards:
        product = make_product("int32", 7, 123, guards)
    assert product.scales is not None
    assert product.bias_O is not None
    steps_O, sums_O, scale_N, shift_N = product.scales
    if name == "sums left out":
        sums_O = sums_O * 0
    elif name == "scale and shift exchanged":
        scale_N, shift_N = shift_N, scale_N
    elif name == "steps left out":
        steps_O = torch.ones(123)
    bias_NO = product.bias_O * (scale_N[:, None] if name == "bias scaled" else 1)
    broken_NO = scale_N[:, None] * (steps_O * product.values_NO) + (shift_N[:, None] * sums_O + bias_NO)
    assert find_failure(broken_NO, gold_of_product(product)) is not None


@each_kind
def test_tensors_and_back(kind: str) -> None:
    with guarded() as guards:
        product = make_product(kind, 7, 37, guards)
    tensors = product.tensors()
    assert len(tensors) == {"fp32": 1, "fp32 with bias": 2, "bf16": 1, "int32": 6}[kind]
    assert tensors[0] is product.values_NO
    again = Product.of(tensors)
    assert (again.scales is None) == (product.scales is None)
    for one, other in zip(again.tensors(), tensors, strict=True):
        assert one is other
    if again.scales is not None and product.scales is not None:
        assert all(one is other for one, other in zip(again.scales, product.scales, strict=True))


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(3, 5), (5,), (5,), (5,), (3,), (3,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    check: Any = torch.autograd.gradcheck
    assert check(lambda values, bias: Product(values, bias).numbers(), tensors[:2])
    sums_NO = torch.arange(15, dtype=torch.int32).view(3, 5)
    assert check(lambda bias, *scales: Product(sums_NO, bias, Scales(*scales)).numbers(), tensors[1:])


@pytest.mark.parametrize("place", range(1, 6))
def test_who_asks_for_gradients(place: int) -> None:
    tensors = _integers().tensors()
    assert not Product.of(tensors).requires_grad()
    tensors[place].requires_grad_()
    assert Product.of(tensors).requires_grad()
    with torch.no_grad():
        assert not Product.of(tensors).requires_grad()


# What disagrees


@each_kind
@each_shape
def test_right_products_pass(shape: tuple[int, int], kind: str) -> None:
    with guarded() as guards:
        check_product(make_product(kind, *shape, guards), shape[1])


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 3), (3, 2)])
def test_values_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"the product has shape {shape}, expected (N, 3)")):
        check_product(Product(torch.zeros(shape)), 3)


def _changed(**parts: torch.Tensor | None) -> Product:
    product = _integers()
    assert product.scales is not None
    scales = product.scales._replace(**{name: part for name, part in parts.items() if name in Scales._fields})
    return product._replace(scales=scales, **{name: part for name, part in parts.items() if name not in Scales._fields})


@pytest.mark.parametrize(
    ("product", "named"),
    [
        (Product(torch.zeros(2, 3), torch.zeros(4)), "['torch.float32', 'torch.float32'] of shapes [(2, 3), (4,)]"),
        (Product(torch.zeros(2, 3), torch.zeros(1, 3)), "of shapes [(2, 3), (1, 3)]"),
        (Product(torch.zeros(2, 3), torch.zeros(3).bfloat16()), "['torch.float32', 'torch.bfloat16']"),
        (Product(torch.zeros(2, 3).bfloat16(), torch.zeros(3)), "['torch.bfloat16', 'torch.float32']"),
        (Product(torch.zeros(2, 3).int()), "['torch.int32']"),
        (_changed(values_NO=torch.zeros(2, 3)), "['torch.float32', "),
        (_changed(values_NO=torch.zeros(2, 3).long()), "['torch.int64', "),
        (_changed(bias_O=None), "int32 with fp32 bias, steps and sums (O,)"),
        (_changed(bias_O=torch.zeros(3).double()), "'torch.float64'"),
        (_changed(steps_O=torch.zeros(3).double()), "'torch.float64'"),
        (_changed(shift_N=torch.zeros(2).bfloat16()), "'torch.bfloat16'"),
        (_changed(bias_O=torch.zeros(2)), "of shapes [(2, 3), (2,), (3,), (3,), (2,), (2,)]"),
        (_changed(steps_O=torch.zeros(2)), "of shapes [(2, 3), (3,), (2,), (3,), (2,), (2,)]"),
        (_changed(sums_O=torch.zeros(2)), "of shapes [(2, 3), (3,), (3,), (2,), (2,), (2,)]"),
        (_changed(scale_N=torch.zeros(3)), "of shapes [(2, 3), (3,), (3,), (3,), (3,), (2,)]"),
        (_changed(shift_N=torch.zeros(3)), "of shapes [(2, 3), (3,), (3,), (3,), (2,), (3,)]"),
    ],
)
def test_parts_that_disagree(product: Product, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        check_product(product, 3)


# How they travel to C++


def test_arrays() -> None:
    with guarded() as guards:
        product = make_product("int32", 7, 37, guards)
        parts = product_arrays(product)
        assert len(parts) == 6
        for part, tensor in zip(parts, product.tensors(), strict=True):
            assert part.ctypes.data == tensor.data_ptr()
    assert product_arrays(Product(torch.ones(2, 3)))[1:] == (None,) * 5
    assert product_arrays(Product(torch.ones(2, 3), torch.ones(3)))[2:] == (None,) * 4
    narrow = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    assert array(narrow).dtype == np.int16
    assert array(narrow).tolist() == [[0x3F80, 0xC000 - 0x10000]]
    apart = torch.arange(12.0).view(3, 4).T.requires_grad_()
    assert array(apart).flags.c_contiguous
    assert array(apart).tolist() == apart.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(7, 37), (0, 5), (3, 1)])
def test_targets(shape: tuple[int, int], dtype: torch.dtype) -> None:
    target = empty_target(*shape, dtype)
    assert [part.dtype for part in target] == [dtype, *[torch.float32] * (2 if dtype == torch.int8 else 0)]
    assert [tuple(part.shape) for part in target] == [shape, *[shape[:1]] * (len(target) - 1)]
    arrays = target_arrays(target)
    assert len(arrays) == 3
    assert [part is None for part in arrays[1:]] == [dtype != torch.int8] * 2
    rows = rows_of(target)
    assert isinstance(rows, Levels) == (dtype == torch.int8)
    assert (rows.values_NI if isinstance(rows, Levels) else rows) is target[0]


@needs_extension
@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (Product(torch.zeros(2, 3)), None),
        (Product(torch.zeros(2, 3), torch.zeros(3)), None),
        (Product(torch.zeros(2, 3).bfloat16()), None),
        (_integers(), None),
        (Product(torch.zeros(2, 3, device="meta")), "tensors are on meta"),
        (Product(torch.zeros(2, 3).half()), "dtype is torch.float16, not fp32 or bf16"),
        (Product(torch.zeros(2, 3).double()), "dtype is torch.float64, not fp32 or bf16"),
        (Product(torch.zeros(2, 3).bfloat16(), torch.zeros(3).bfloat16()), "a bias is left to be added in bf16"),
        (Product(torch.zeros(2, 3).requires_grad_()), "gradients are asked for"),
        (Product(torch.zeros(2, 3), torch.zeros(3).requires_grad_()), "gradients are asked for"),
        (_changed(scale_N=torch.zeros(2).requires_grad_()), "gradients are asked for"),
    ],
)
def test_why_not_cpu(product: Product, reason: str | None) -> None:
    assert why_not_cpu(product) == reason
    with torch.no_grad():
        assert why_not_cpu(product) == (None if reason == "gradients are asked for" else reason)


def test_why_not_cpu_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.kernels.extension._load_once", lambda: (None, "there is none"))
    assert why_not_cpu(Product(torch.zeros(2, 3))) == "there is none"
    assert not leaves_bias(torch.zeros(2, 3), torch.zeros(4, 3))


@needs_extension
def test_who_leaves_the_bias() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    assert leaves_bias(x, weight)
    assert not leaves_bias(x.bfloat16(), weight.bfloat16())
    assert not leaves_bias(x.double(), weight.double())
    assert not leaves_bias(x.to("meta"), weight.to("meta"))
    for asking in ((x.clone().requires_grad_(), weight), (x, weight.clone().requires_grad_())):
        assert not leaves_bias(*asking)
        with torch.no_grad():
            assert leaves_bias(*asking)


# Levels of processors


@pytest.fixture
def _fresh_level() -> Any:
    cpu_level.cache_clear()
    yield
    cpu_level.cache_clear()


@needs_extension
@pytest.mark.usefixtures("_fresh_level")
def test_the_best_level_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    best = module().best_level()
    usual = min(best, "v4", key=LEVELS.index)
    for wanted, expected in (("", usual), ("portable", "portable"), (best, best)):
        monkeypatch.setenv("PROTNEST_CPU_LEVEL", wanted)
        cpu_level.cache_clear()
        assert cpu_level() == expected
    monkeypatch.delenv("PROTNEST_CPU_LEVEL")
    cpu_level.cache_clear()
    assert cpu_level() == usual


@needs_extension
@pytest.mark.usefixtures("_fresh_level")
@pytest.mark.parametrize("best", LEVELS)
def test_pairs_of_bf16_run_on_request_alone(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "module", lambda: SimpleNamespace(best_level=lambda: best))
    monkeypatch.delenv("PROTNEST_CPU_LEVEL", raising=False)
    assert cpu_level() == ("v4" if best == "v4_bf16" else best)
    monkeypatch.setenv("PROTNEST_CPU_LEVEL", best)
    cpu_level.cache_clear()
    assert cpu_level() == best


@needs_extension
@pytest.mark.usefixtures("_fresh_level")
@pytest.mark.parametrize(
    ("best", "wanted", "allowed"),
    [
        ("v4", "v5", "portable, v3, v4"),
        ("v4", "v4_bf16", "portable, v3, v4"),
        ("portable", "v3", "portable"),
        ("v4_bf16", "V3", "portable, v3, v4, v4_bf16"),
    ],
)
def test_levels_that_are_not_there(monkeypatch: pytest.MonkeyPatch, best: str, wanted: str, allowed: str) -> None:
    class Processor:
        @staticmethod
        def best_level() -> str:
            return best

    monkeypatch.setattr(cpu_kernels, "module", lambda: Processor)
    monkeypatch.setenv("PROTNEST_CPU_LEVEL", wanted)
    with pytest.raises(
        ValueError, match=re.escape(f"PROTNEST_CPU_LEVEL={wanted}: this processor runs {allowed}") + "$"
    ):
        cpu_level()


@needs_extension
def test_the_binding_refuses_levels_that_are_not_there() -> None:
    target = (np.zeros((1, 1), np.int8), np.zeros(1, np.float32), np.zeros(1, np.float32))
    missing = LEVELS[LEVELS.index(module().best_level()) + 1 :]
    for level in missing:
        with pytest.raises(ValueError, match=f"this processor lacks level {level}"):
            module().quantise_rows(np.zeros((1, 1), np.float32), target, level, 1)
