"""add_norm: stream and rows against fp64, in each dtype and from each kind of product; gradients, choices, errors.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from protnest.kernels.add_norm import Norm, _add_norm, add_norm, add_norm_reference
from protnest.kernels.cpu_kernels import cpu_level, empty_target, module
from protnest.kernels.product import Levels, Product, Scales

from support.row_cases import (
    CPU_LEVELS,
    KINDS,
    SHAPES,
    Gold,
    each_cpu_impl,
    each_impl,
    each_shape,
    find_add_norm_failure,
    find_failure,
    gold_of_norm,
    gold_of_sum,
    guarded,
    hostile_rows,
    make_norm,
    make_product,
    needs_extension,
    running,
)
from support.row_mutants import ADD_NORM_MUTANTS, load_row_mutant

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_kind = pytest.mark.parametrize("kind", ["", *KINDS], ids=["no product", *KINDS])


def _plain_norm(D: int) -> Norm:
    generator = torch.Generator().manual_seed(D)
    return Norm(torch.randn(D, generator=generator) + 0.5, torch.randn(D, generator=generator), 1e-5)


def _bytes(out: torch.Tensor | Levels | None) -> list[bytes]:
    assert out is not None
    parts = out if isinstance(out, Levels) else (out,)
    return [(part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy().tobytes() for part in parts]


@each_impl
@each_kind
@each_shape
def test_against_fp64(shape: tuple[int, int], kind: str, impl: str) -> None:
    assert find_add_norm_failure(impl, kind, hostile_rows(*shape)) is None


@each_impl
@pytest.mark.parametrize("mean", [1e3, -1e3, 3e4])
@pytest.mark.parametrize("D", [1, 3, 17, 123, 480])
def test_spread_far_from_zero(D: int, mean: float, impl: str) -> None:
    """A variance that is found by subtraction has nothing left here."""
    x_TD = mean + torch.randn(40, D, generator=torch.Generator().manual_seed(D))
    assert find_add_norm_failure(impl, "", x_TD) is None


@each_impl
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_eps(eps: float, impl: str) -> None:
    norm = _plain_norm(123)._replace(eps=eps)
    assert find_add_norm_failure(impl, "fp32", hostile_rows(7, 123), norm) is None


@each_impl
@each_dtype
def test_norms_of_other_dtypes(dtype: torch.dtype, impl: str) -> None:
    norm = _plain_norm(37)
    narrow = Norm(norm.weight_D.bfloat16(), norm.bias_D.bfloat16(), norm.eps)
    widened = Norm(narrow.weight_D.float(), narrow.bias_D.float(), norm.eps)
    with running(impl) as name:
        outs = [add_norm(hostile_rows(7, 37), None, each, dtype=dtype, impl=name)[1] for each in (narrow, widened)]
    assert _bytes(outs[0]) == _bytes(outs[1])


@each_impl
@each_kind
def test_without_a_norm(kind: str, impl: str) -> None:
    with guarded() as guards, running(impl) as name:
        product = make_product(kind, 7, 123, guards) if kind else None
        x_TD = hostile_rows(7, 123)
        stream_TD, out = add_norm(guards.copy(x_TD), product, None, dtype=torch.float32, impl=name)
        assert out is None
        assert find_failure(stream_TD, gold_of_sum(x_TD, product)) is None


@each_cpu_impl
@each_dtype
def test_the_stream_is_updated_in_place(dtype: torch.dtype, impl: str) -> None:
    with guarded() as guards, running(impl) as name:
        x_TD, product = guards.copy(hostile_rows(7, 37)), make_product("fp32", 7, 37, guards)
        version, values_TD = x_TD._version, product.values_NO.clone()
        stream_TD, _ = add_norm(x_TD, product, make_norm(37, guards), dtype=dtype, impl=name)
        assert stream_TD is x_TD
        assert x_TD._version > version
        assert torch.equal(x_TD, hostile_rows(7, 37) + values_TD)
        assert torch.equal(product.values_NO, values_TD)


def test_the_reference_leaves_the_stream_alone() -> None:
    x_TD = hostile_rows(7, 37)
    with guarded() as guards:
        add_norm(x_TD, make_product("fp32", 7, 37, guards), None, dtype=torch.float32, impl="reference")
    assert torch.equal(x_TD, hostile_rows(7, 37))


@each_impl
def test_products_that_are_not_contiguous(impl: str) -> None:
    wide_TD = hostile_rows(20, 90, seed=1)
    norm = _plain_norm(30)
    for values_TD in (wide_TD[:, 7:37], wide_TD[:20, ::3], wide_TD.T[:20:1, :20][:, :1].expand(20, 30)):
        x_TD = hostile_rows(20, 30)
        with running(impl) as name:
            stream_TD, out_TD = add_norm(x_TD.clone(), Product(values_TD), norm, dtype=torch.float32, impl=name)
        assert isinstance(out_TD, torch.Tensor)
        assert find_failure(stream_TD, gold_of_sum(x_TD, Product(values_TD))) is None
        assert find_failure(out_TD, gold_of_norm(stream_TD, norm)) is None


@each_impl
@each_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_their_own(bad: float, kind: str, impl: str) -> None:
    x_TD = hostile_rows(7, 123)
    x_TD[3, 100], x_TD[6, 122] = bad, bad
    assert find_add_norm_failure(impl, kind, x_TD) is None
    with guarded() as guards, running(impl) as name:
        product = make_product(kind, 7, 123, guards) if kind else None
        _, levels = add_norm(x_TD, product, _plain_norm(123), dtype=torch.int8, impl=name)
    assert isinstance(levels, Levels)
    assert levels.scale_N.isnan().tolist() == [False, False, False, True, False, False, True]


@each_cpu_impl
@each_dtype
@each_kind
def test_rows_are_their_own(kind: str, dtype: torch.dtype, impl: str) -> None:
    norm = _plain_norm(123)

    def run(rows: slice, poison: slice | None) -> list[bytes]:
        with guarded() as guards, running(impl) as name:
            x_TD = hostile_rows(30, 123)
            if poison is not None:
                x_TD[poison] = torch.nan
            product = make_product(kind, 30, 123, guards) if kind else None
            if product is not None:
                scales = product.scales
                if scales is not None:
                    scales = Scales(*scales[:2], scales.scale_N[rows], scales.shift_N[rows])
                product = Product(product.values_NO[rows], product.bias_O, scales)
            stream_TD, out = add_norm(x_TD[rows], product, norm, dtype=dtype, impl=name)
            kept = [stream_TD, *(out if isinstance(out, Levels) else [out])]
            return [b"".join(_bytes(part[9 - rows.start : 12 - rows.start])) for part in kept if part is not None]

    alone = run(slice(9, 12), None)
    assert run(slice(0, 30), None) == alone
    assert run(slice(0, 30), slice(0, 9)) == alone
    assert run(slice(0, 30), slice(12, 30)) == alone


@each_cpu_impl
@each_dtype
@each_kind
def test_threads_do_not_show(kind: str, dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = _plain_norm(480)
    outs = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with guarded() as guards, running(impl) as name:
            product = make_product(kind, 301, 480, guards) if kind else None
            stream_TD, out = add_norm(hostile_rows(301, 480), product, norm, dtype=dtype, impl=name)
        outs.append(_bytes(stream_TD) + _bytes(out))
    assert outs[0] == outs[1] == outs[2]


# Gradients


def test_gradients_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (3, 5), (5,), (5,), (5,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    check: Any = torch.autograd.gradcheck

    def run(x: torch.Tensor, values: torch.Tensor, left: torch.Tensor, *norm: torch.Tensor) -> Any:
        return add_norm(x, Product(values, left), Norm(norm[0], norm[1], 1e-5), dtype=torch.float64)

    assert check(run, tensors)
    assert check(lambda x, values: add_norm(x, Product(values), None, dtype=torch.float64)[0], tensors[:2])


@pytest.mark.parametrize("asks", ["x", "product", "bias", "weight", "norm's bias"])
def test_auto_gives_gradients_to_whoever_asks(asks: str) -> None:
    names = ["x", "product", "bias", "weight", "norm's bias"]
    tensors = [hostile_rows(7, 37), hostile_rows(7, 37, seed=1), *torch.randn(3, 37).unbind()]
    asking = tensors[names.index(asks)].requires_grad_()
    x_TD, values_TD, left_D, weight_D, bias_D = tensors
    product, norm = Product(values_TD, left_D), Norm(weight_D, bias_D, 1e-5)
    before_TD = x_TD.detach().clone()
    stream_TD, out_TD = add_norm(x_TD, product, norm, dtype=torch.float32)
    assert torch.equal(x_TD.detach(), before_TD)
    assert isinstance(out_TD, torch.Tensor)
    (gradient,) = torch.autograd.grad(out_TD.sum() + stream_TD.sum(), asking)
    assert gradient.abs().sum() > 0
    with running("cpu") as name, pytest.raises(RuntimeError, match="add_norm: impl='cpu' cannot run: "):
        add_norm(x_TD, product, norm, dtype=torch.float32, impl=name)


@each_cpu_impl
def test_without_gradients_parameters_may_ask_for_them(impl: str) -> None:
    weight_D, bias_D = (torch.randn(37).requires_grad_() for _ in range(2))
    x_TD, values_TD = (hostile_rows(7, 37, seed=seed).requires_grad_() for seed in (0, 1))
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with running(impl) as name, no_gradients():
            copy_TD = x_TD.clone()
            norm = Norm(weight_D, bias_D, 1e-5)
            stream_TD, out_TD = add_norm(copy_TD, Product(values_TD), norm, dtype=torch.float32, impl=name)
            assert isinstance(out_TD, torch.Tensor)
            assert find_failure(stream_TD, gold_of_sum(x_TD, Product(values_TD))) is None
            assert find_failure(out_TD, gold_of_norm(stream_TD, norm)) is None


# The operator, and which implementation runs


@needs_extension
@pytest.mark.parametrize("kind", ["", "fp32 with bias", "int32"])
def test_operator(kind: str) -> None:
    check: Any = torch.library.opcheck
    with guarded() as guards:
        tensors = make_product(kind, 7, 37, guards).tensors() if kind else []
    tensors = [tensor.clone() for tensor in tensors]
    weight_D, bias_D, eps = _plain_norm(37)
    target = empty_target(7, 37, torch.int8 if kind == "int32" else torch.bfloat16)
    check(_add_norm.definition, (hostile_rows(7, 37), target, tensors, weight_D, bias_D, eps, cpu_level()))
    if not kind:
        check(_add_norm.definition, (hostile_rows(7, 37), [], tensors, None, None, 0.0, cpu_level()))


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    true = module().add_norm
    monkeypatch.setattr(module(), "add_norm", lambda *given: calls.append(given) or true(*given))
    return calls


@needs_extension
@pytest.mark.parametrize(
    ("dtype", "taken", "calls"),
    [
        (torch.float32, torch.float32, 1),
        (torch.float32, torch.bfloat16, 1),
        (torch.float32, torch.int8, 1),
        (torch.float32, torch.float16, 0),
        (torch.float32, torch.float64, 0),
        (torch.float64, torch.float64, 0),
        (torch.bfloat16, torch.bfloat16, 0),
    ],
)
def test_what_auto_runs(dtype: torch.dtype, taken: torch.dtype, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = _count_calls(monkeypatch)
    x_TD = hostile_rows(7, 37).to(dtype)
    stream_TD, out = add_norm(x_TD.clone(), Product(x_TD), _plain_norm(37), dtype=taken)
    assert len(counted) == calls
    assert stream_TD.dtype == dtype
    assert out is not None
    assert (out.values_NI if isinstance(out, Levels) else out).dtype == taken


@needs_extension
def test_auto_runs_the_reference_where_cpu_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = _count_calls(monkeypatch)
    norm = _plain_norm(37)
    apart_TD = hostile_rows(7, 74)[:, ::2]
    narrow = Product(hostile_rows(7, 37).bfloat16(), torch.zeros(37, dtype=torch.bfloat16))
    cases = [(apart_TD, None, "contiguous: False"), (hostile_rows(7, 37), narrow, "a bias is left to be added in bf16")]
    cases.append((hostile_rows(7, 37), Product(hostile_rows(7, 37).half()), "dtype is torch.float16"))
    for x_TD, product, reason in cases:
        add_norm(x_TD, product, norm, dtype=torch.float32)
        with pytest.raises(RuntimeError, match=f"add_norm: impl='cpu' cannot run: .*{reason}"):
            add_norm(x_TD, product, norm, dtype=torch.float32, impl="cpu")
    assert not counted


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.kernels.extension._load_once", lambda: (None, "there is none"))
    x_TD, norm = hostile_rows(7, 37), _plain_norm(37)
    got, expected = add_norm(x_TD, None, norm, dtype=torch.int8), add_norm_reference(x_TD, None, norm, torch.int8)
    assert _bytes(got[1]) == _bytes(expected[1])
    with pytest.raises(RuntimeError, match="add_norm: impl='cpu' cannot run: there is none"):
        add_norm(x_TD, None, norm, dtype=torch.float32, impl="cpu")


# Errors


@pytest.mark.parametrize(
    ("dtype", "taken", "has_norm", "named"),
    [
        (torch.float64, torch.float32, True, "x is torch.float64, contiguous: True; it takes contiguous fp32"),
        (torch.float32, torch.float16, True, "dtype is torch.float16, not fp32, bf16 or int8"),
    ],
)
def test_what_cpu_cannot_run(dtype: torch.dtype, taken: torch.dtype, has_norm: bool, named: str) -> None:
    norm = _plain_norm(37) if has_norm else None
    with pytest.raises(RuntimeError, match=re.escape(f"add_norm: impl='cpu' cannot run: {named}")):
        add_norm(hostile_rows(7, 37).to(dtype), None, norm, dtype=taken, impl="cpu")


@pytest.mark.parametrize(
    ("product", "has_norm", "taken", "named"),
    [
        (None, False, torch.float32, "it takes fp32 x with a norm, and gives fp32, bf16 or fp16"),
        (None, True, torch.int8, "it takes fp32 x with a norm, and gives fp32, bf16 or fp16"),
        (Product(torch.zeros(7, 37), torch.zeros(37)), True, torch.float32, "the product is not plain numbers"),
        (Product(torch.zeros(7, 37).requires_grad_()), True, torch.float32, "gradients are asked for"),
        (Product(torch.zeros(7, 37)), True, torch.float32, ""),
    ],
)
def test_what_triton_cannot_run(product: Product | None, has_norm: bool, taken: torch.dtype, named: str) -> None:
    norm = _plain_norm(37) if has_norm else None
    with pytest.raises(RuntimeError, match=re.escape(f"add_norm: impl='triton' cannot run: {named}")):
        add_norm(torch.zeros(7, 37), product, norm, dtype=taken, impl="triton")


def test_unknown_impl() -> None:
    with pytest.raises(ValueError, match="add_norm: impl is 'sdpa'; allowed: auto, reference, cpu, triton"):
        add_norm(torch.zeros(2, 3), None, None, dtype=torch.float32, impl="sdpa")


@each_impl
@pytest.mark.parametrize(
    ("x", "product", "norm", "named"),
    [
        (torch.zeros(3), None, None, "x is torch.float32 (3,), expected floating point (T, D)"),
        (torch.zeros(2, 3).int(), None, None, "x is torch.int32 (2, 3), expected floating point (T, D)"),
        (torch.zeros(2, 3), Product(torch.zeros(3, 3)), None, "x has 2 rows, the product 3"),
        (torch.zeros(2, 3), Product(torch.zeros(2, 4)), None, "the product has shape (2, 4), expected (N, 3)"),
        (torch.zeros(2, 3), None, Norm(torch.zeros(3), torch.zeros(4), 0.1), "the norm has shapes (3,) and (4,)"),
        (torch.zeros(2, 3), None, Norm(torch.zeros(1), torch.zeros(1), 0.1), "(1,) and (1,), expected (3,)"),
    ],
)
def test_shapes_that_disagree(
    x: torch.Tensor, product: Product | None, norm: Norm | None, named: str, impl: str
) -> None:
    with running(impl) as name, pytest.raises(ValueError, match=re.escape(named)):
        add_norm(x, product, norm, dtype=torch.float32, impl=name)


_FLOATS = np.zeros((2, 3), np.float32)
_COLUMN = np.zeros(3, np.float32)
_PLAIN = (_FLOATS, *[None] * 5)
_INTEGERS = (np.zeros((2, 3), np.int32), _COLUMN, _COLUMN, _COLUMN, _COLUMN[:2], _COLUMN[:2])
WRONG = "size, the dtype or the layout"


@needs_extension
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": np.zeros(6, np.float32)}, "x must have two dimensions"),
        ({"x": np.zeros((3, 2), np.float32).T}, WRONG),
        ({"product": _PLAIN[:5]}, "a product has six parts"),
        ({"product": (np.zeros((2, 3)), *_PLAIN[1:])}, "a product holds fp32, bf16 or int32"),
        ({"product": (np.zeros((2, 3), np.int8), *_PLAIN[1:])}, "a product holds fp32, bf16 or int32"),
        ({"product": (np.zeros((2, 4), np.float32), *_PLAIN[1:])}, WRONG),
        ({"product": (_FLOATS.T.copy().T, *_PLAIN[1:])}, WRONG),
        ({"product": (_FLOATS, _COLUMN[:2], *_PLAIN[2:])}, WRONG),
        ({"product": (_FLOATS, None, _COLUMN, *_PLAIN[3:])}, "integers come with all five numbers"),
        ({"product": (_FLOATS, *_INTEGERS[1:])}, "integers come with all five numbers"),
        ({"product": (*_INTEGERS[:5], None)}, "integers come with all five numbers"),
        ({"product": (_INTEGERS[0], None, *_INTEGERS[2:])}, "integers come with all five numbers"),
        ({"product": (*_INTEGERS[:5], _COLUMN)}, WRONG),
        ({"product": (*_INTEGERS[:2], np.zeros(3), *_INTEGERS[3:])}, WRONG),
        ({"weight": None}, "weight, bias and target come together"),
        ({"bias": None}, "weight, bias and target come together"),
        ({"target": None}, "weight, bias and target come together"),
        ({"weight": _COLUMN[:2]}, WRONG),
        ({"bias": np.zeros(3)}, WRONG),
        ({"target": (np.zeros((2, 3), np.int8), None, None)}, "levels come with arrays"),
        ({"target": (_FLOATS,)}, "a target has three parts"),
        ({"level": "v5"}, "no level v5"),
    ],
)
def test_what_the_binding_refuses(change: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"x": _FLOATS.copy(), "product": _PLAIN, "weight": _COLUMN, "bias": _COLUMN, "eps": 0.1}
    given |= {"target": (_FLOATS.copy(), None, None), "level": "portable", "threads": 1}
    module().add_norm(**given)
    module().add_norm(**(given | {"product": _INTEGERS}))
    with pytest.raises(ValueError, match=named):
        module().add_norm(**(given | change))


@each_impl
def test_levels_of_rows_without_columns_are_refused(impl: str) -> None:
    with running(impl) as name, pytest.raises((ValueError, IndexError, RuntimeError)):
        add_norm(torch.zeros(2, 0), None, Norm(torch.zeros(0), torch.zeros(0), 0.1), dtype=torch.int8, impl=name)


# The bound itself


@pytest.mark.parametrize(
    "name", ["mean over padded width", "variance over padded width", "not centred", "eps left out", "weight left out"]
)
def test_the_bound_kills_broken_norms(name: str) -> None:
    x_TD = hostile_rows(7, 123)
    norm = _plain_norm(123)
    gold = gold_of_norm(x_TD, norm)
    assert find_failure(F.layer_norm(x_TD, (123,), *norm), gold) is None
    padded_TD = F.pad(x_TD, (0, 5))
    mean_T1, variance_T1 = x_TD.mean(1, keepdim=True), x_TD.var(1, keepdim=True, unbiased=False)
    weight_D, eps = norm.weight_D, norm.eps
    match name:
        case "mean over padded width":
            mean_T1 = padded_TD.mean(1, keepdim=True)
        case "variance over padded width":
            variance_T1 = variance_T1 * 123 / 128
        case "not centred":
            mean_T1 = mean_T1 * 0
        case "eps left out":
            eps = 0.0
        case _:
            weight_D = torch.ones(123)
    broken_TD = (x_TD - mean_T1) * (variance_T1 + eps).rsqrt() * weight_D + norm.bias_D
    assert find_failure(broken_TD, gold) is not None


def test_the_search_for_failures_can_fail() -> None:
    gold = Gold(torch.tensor([[1.0, torch.nan, torch.inf]]).double(), torch.full((1, 3), 0.5).double())
    assert find_failure(torch.tensor([[1.5, torch.nan, torch.inf]]), gold) is None
    for broken in ([1.6, torch.nan, torch.inf], [torch.nan, torch.nan, torch.inf], [1.0, 2.0, torch.inf]):
        assert find_failure(torch.tensor([broken]), gold) is not None
    assert find_failure(torch.tensor([[1.0, torch.nan, 3.0]]), gold) is not None


def _is_caught() -> bool:
    kinds = ["", *KINDS]
    try:
        return any(
            find_add_norm_failure(f"cpu {level}", kind, hostile_rows(*shape)) is not None
            for level in CPU_LEVELS
            for shape in SHAPES
            for kind in kinds
        )
    except AssertionError:  # the guards'
        return True


@pytest.mark.slow
@pytest.mark.parametrize("name", ADD_NORM_MUTANTS)
def test_cpp_mutants_are_caught(name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    mutant = load_row_mutant(*ADD_NORM_MUTANTS[name], tmp_path_factory.getbasetemp(), tmp_path)
    assert not _is_caught()
    with mock.patch("protnest.kernels.cpu_kernels.load", return_value=mutant):
        assert _is_caught(), f"nothing notices: {name}"
