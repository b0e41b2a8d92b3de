"""bias_gelu: against erfc in fp64, from each kind of product into each dtype; in place; gradients, choices, errors.

Shapes: N rows, F columns.
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
from protnest.kernels.bias_gelu import Move, _bias_gelu, _bias_gelu_over, bias_gelu
from protnest.kernels.cpu_kernels import cpu_level, module
from protnest.kernels.product import Levels, Product, Scales

from support.row_cases import (
    CPU_LEVELS,
    GELU_ERRORS,
    KINDS,
    SHAPES,
    U32,
    Gold,
    each_cpu_impl,
    each_impl,
    each_shape,
    find_bias_gelu_failure,
    find_difference,
    find_failure,
    gelu_fp64,
    gold_of_gelu,
    guarded,
    hostile_rows,
    make_move,
    make_product,
    needs_extension,
    running,
)
from support.row_mutants import BIAS_GELU_MUTANTS, load_row_mutant

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_move = pytest.mark.parametrize("moves", [False, True], ids=["", "moved"])

SMALLEST = 2.0**-149


def _bytes(out: torch.Tensor | Levels) -> list[bytes]:
    parts = out if isinstance(out, Levels) else (out,)
    return [(part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy().tobytes() for part in parts]


def _gelu(x_NF: torch.Tensor, impl: str) -> torch.Tensor:
    with guarded() as guards, running(impl) as name:
        out_NF = bias_gelu(Product(guards.copy(x_NF)), dtype=torch.float32, impl=name)
    assert isinstance(out_NF, torch.Tensor)
    return out_NF


@each_impl
@each_move
@each_kind
@each_shape
def test_against_fp64(shape: tuple[int, int], kind: str, moves: bool, impl: str) -> None:
    assert find_bias_gelu_failure(impl, kind, shape, moves) is None


def find_gelu_failure(impl: str) -> str | None:
    """`GELU_ERRORS` u32 |x| over a dense range, and as many of the smallest numbers where |x| itself is among them."""
    dense = [torch.linspace(-10, 10, 200_001), torch.linspace(-40, 40, 20_001), torch.logspace(-45, 2, 20_001)]
    x_1F = torch.cat([*dense, -dense[-1]])[None]
    gold_1F = gelu_fp64(x_1F.double())
    errors = GELU_ERRORS[impl[:3]]
    return find_failure(_gelu(x_1F, impl), Gold(gold_1F, errors * (U32 * x_1F.double().abs() + SMALLEST)))


@each_impl
def test_gelu_over_a_dense_range(impl: str) -> None:
    assert find_gelu_failure(impl) is None


def find_tail_failure(impl: str) -> str | None:
    """The bound by |x| sees nothing below -6, where Phi is 1e-9; the series is good to two digits there."""
    x_1F = torch.linspace(-9, -3, 10_001)[None]
    gold_1F = gelu_fp64(x_1F.double())
    return find_failure(_gelu(x_1F, impl), Gold(gold_1F, 0.02 * gold_1F.abs()))


@each_cpu_impl
def test_the_tail_keeps_its_digits(impl: str) -> None:
    assert find_tail_failure(impl) is None


@each_impl
def test_gelu_at_edges(impl: str) -> None:
    edges = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 40.0, -40.0, 1e4, -1e4, 1e19, -1e19, 1e30, -1e30]
    out_F = _gelu(torch.tensor([edges]), impl)[0]
    assert out_F[0] == 0
    assert not out_F[0].signbit()
    assert out_F[1] == 0
    assert out_F[1].signbit()
    assert (out_F[2:6].double() - torch.tensor(edges[2:6]).double() / 2).abs().max() <= 4 * SMALLEST
    assert out_F[6::2].tolist() == torch.tensor(edges[6::2]).tolist()
    assert out_F[7] <= 0
    # Where Phi is below 2^-100 the C++ exponential stops falling.
    assert (out_F[7::2].abs() <= torch.tensor(edges[7::2]).abs() * 2.0**-100).all()


@each_impl
def test_nan_and_infinity_are_their_own(impl: str) -> None:
    """torch gives NaN or infinity for infinity, depending on how many numbers there are; C++ infinity."""
    x_NF = hostile_rows(7, 123)
    before_NF = _gelu(x_NF, impl)
    places = [(0, 0), (3, 17), (3, 122), (6, 64)]
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32).item()
    for place, value in zip(places, (torch.nan, torch.inf, -torch.inf, payload), strict=True):
        x_NF[place] = value
    after_NF = _gelu(x_NF, impl)
    assert after_NF[0, 0].isnan()
    assert not after_NF[3, 17].isfinite()
    assert after_NF[3, 122].isnan()
    assert after_NF[6, 64].isnan()
    for place in places:
        after_NF[place] = before_NF[place]
    assert torch.equal(after_NF, before_NF)


def _keeps_nan(impl: str, bits: int) -> bool:
    x_NF = torch.from_numpy(np.full((2, 19), bits, np.uint32).view(np.float32))
    with guarded() as guards, running(impl) as name:
        narrow_NF = bias_gelu(Product(guards.copy(x_NF)), dtype=torch.bfloat16, impl=name)
    assert isinstance(narrow_NF, torch.Tensor)
    return bool(_gelu(x_NF, impl).isnan().all() and narrow_NF.isnan().all())


@each_impl
@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF, 0x7F800001, 0xFFC00155, 0xFFFFFFFF])
def test_nan_of_any_bits(bits: int, impl: str) -> None:
    assert _keeps_nan(impl, bits)


@each_impl
@each_kind
def test_levels_of_rows_that_are_not_finite(kind: str, impl: str) -> None:
    with guarded() as guards, running(impl) as name:
        product = make_product(kind, 7, 123, guards)
        row_N = product.values_NO if product.scales is None else product.scales.shift_N[:, None]
        row_N[3, -1] = torch.nan
        levels = bias_gelu(product, dtype=torch.int8, impl=name)
    assert isinstance(levels, Levels)
    assert levels.scale_N.isnan().tolist() == [False, False, False, True, False, False, False]
    assert not levels.values_NI[3].any()


# Where results go


@each_cpu_impl
@pytest.mark.parametrize("kind", ["fp32", "fp32 with bias"])
def test_fp32_is_written_over_the_product(kind: str, impl: str) -> None:
    with guarded() as guards, running(impl) as name:
        product = make_product(kind, 7, 123, guards)
        version, gold = product.values_NO._version, gold_of_gelu(product, None, impl)
        out_NF = bias_gelu(product, dtype=torch.float32, impl=name)
        assert out_NF is product.values_NO
        assert product.values_NO._version > version
        assert find_failure(product.values_NO, gold) is None


@each_impl
@each_move
@each_dtype
@each_kind
def test_other_products_are_left_alone(kind: str, dtype: torch.dtype, moves: bool, impl: str) -> None:
    if dtype == torch.float32 and kind.startswith("fp32") and not moves and impl != "reference":
        pytest.skip("this product is spent")
    with guarded() as guards, running(impl) as name:
        product, move = make_product(kind, 7, 37, guards), make_move(37, guards) if moves else None
        tensors = [*product.tensors(), *(move or ())]
        copies = [tensor.clone() for tensor in tensors]
        bias_gelu(product, dtype=dtype, move=move, impl=name)
        for tensor, copy in zip(tensors, copies, strict=True):
            assert torch.equal(tensor, copy)


@each_impl
@each_dtype
def test_products_that_are_not_contiguous(dtype: torch.dtype, impl: str) -> None:
    wide_NF = hostile_rows(20, 90)
    for values_NF in (wide_NF[:, 7:37], wide_NF[:, ::3], wide_NF[:, :20].T):
        before_NF = values_NF.clone()
        with running(impl) as name:
            out = bias_gelu(Product(values_NF), dtype=dtype, impl=name)
            expected = bias_gelu(Product(before_NF.clone()), dtype=dtype, impl=name)
        assert torch.equal(values_NF, before_NF)
        if dtype == torch.int8 and isinstance(out, Levels) and isinstance(expected, Levels):
            # torch's GELU of numbers that lie apart may differ by an ulp, and so a level by one.
            assert (out.values_NI.int() - expected.values_NI.int()).abs().max() <= (impl == "reference")
        else:
            assert isinstance(out, torch.Tensor)
            assert isinstance(expected, torch.Tensor)
            bound_NF = (0.01 if dtype == torch.bfloat16 else 8 * U32) * before_NF.double().abs()
            assert find_failure(out, Gold(expected.double(), bound_NF * (impl == "reference"))) is None


@each_cpu_impl
@each_move
@each_dtype
@each_kind
def test_rows_are_their_own(kind: str, dtype: torch.dtype, moves: bool, impl: str) -> None:
    def run(rows: slice) -> list[bytes]:
        with guarded() as guards, running(impl) as name:
            product = make_product(kind, 30, 123, guards)
            scales = product.scales
            if scales is not None:
                scales = Scales(*scales[:2], scales.scale_N[rows], scales.shift_N[rows])
            product = Product(product.values_NO[rows], product.bias_O, scales)
            out = bias_gelu(product, dtype=dtype, move=make_move(123, guards) if moves else None, impl=name)
            parts = out if isinstance(out, Levels) else (out,)
            return [b"".join(_bytes(part[9 - rows.start : 12 - rows.start])) for part in parts]

    assert run(slice(0, 30)) == run(slice(9, 12)) == run(slice(5, 12))


def _counts_threads(impl: str, kind: str, dtype: torch.dtype) -> bool:
    outs = []
    for threads in (1, 2, 3):
        with (
            guarded() as guards,
            running(impl) as name,
            mock.patch.object(torch, "get_num_threads", return_value=threads),
        ):
            outs.append(_bytes(bias_gelu(make_product(kind, 301, 480, guards), dtype=dtype, impl=name)))
    return not outs[0] == outs[1] == outs[2]


@each_cpu_impl
@each_dtype
@each_kind
def test_threads_do_not_show(kind: str, dtype: torch.dtype, impl: str) -> None:
    assert not _counts_threads(impl, kind, dtype)


# Gradients


def test_gradients_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in [(3, 5), (5,)]]
    move = Move(torch.rand(5), torch.randn(5))
    check: Any = torch.autograd.gradcheck
    assert check(lambda values, bias: bias_gelu(Product(values, bias), dtype=torch.float64), tensors)
    assert check(lambda values: bias_gelu(Product(values), dtype=torch.float64, move=move), tensors[:1])


@pytest.mark.parametrize("asks", ["product", "bias", "times", "minus"])
def test_auto_gives_gradients_to_whoever_asks(asks: str) -> None:
    tensors = {"product": hostile_rows(7, 37)} | {name: torch.randn(37) for name in ("bias", "times", "minus")}
    tensors[asks].requires_grad_()
    product = Product(tensors["product"], tensors["bias"])
    move = Move(tensors["times"], tensors["minus"])
    out_NF = bias_gelu(product, dtype=torch.float32, move=move)
    assert isinstance(out_NF, torch.Tensor)
    (gradient,) = torch.autograd.grad(out_NF.sum(), tensors[asks])
    assert gradient.abs().sum() > 0
    assert torch.equal(tensors["product"].detach(), hostile_rows(7, 37))
    with pytest.raises(RuntimeError, match="bias_gelu: impl='cpu' cannot run: "):
        bias_gelu(product, dtype=torch.float32, move=move, impl="cpu")


@each_cpu_impl
@each_dtype
def test_without_gradients_parameters_may_ask_for_them(dtype: torch.dtype, impl: str) -> None:
    for no_gradients in (torch.no_grad, torch.inference_mode):
        outs = []
        for asks in (False, True):
            tensors = [hostile_rows(7, 37), *torch.ones(3, 37).unbind()]
            values_NF, *rest = (tensor.clone().requires_grad_(asks) for tensor in tensors)
            with running(impl) as name, no_gradients():
                product = Product(values_NF.clone(), rest[0])
                outs.append(_bytes(bias_gelu(product, dtype=dtype, move=Move(*rest[1:]), impl=name)))
        assert outs[0] == outs[1]


# The operators, and which implementation runs


@needs_extension
def test_operators() -> None:
    check: Any = torch.library.opcheck
    move = [torch.ones(37), torch.zeros(37)]
    for kind, given, dtype in (("bf16", [], torch.bfloat16), ("int32", move, torch.int8)):
        with guarded() as guards:
            tensors = [tensor.clone() for tensor in make_product(kind, 7, 37, guards).tensors()]
        check(_bias_gelu.definition, (tensors, given, dtype, cpu_level()))
    check(_bias_gelu_over.definition, (hostile_rows(7, 37), [torch.ones(37)], cpu_level()))


@needs_extension
@pytest.mark.parametrize(
    ("product", "taken", "reason"),
    [
        (Product(hostile_rows(7, 37)), torch.float32, None),
        (Product(hostile_rows(7, 37)), torch.bfloat16, None),
        (Product(hostile_rows(7, 37)), torch.int8, None),
        (Product(hostile_rows(7, 37).bfloat16()), torch.bfloat16, None),
        (Product(hostile_rows(7, 37)), torch.float16, "dtype is torch.float16, not fp32, bf16 or int8"),
        (Product(hostile_rows(7, 37).double()), torch.float32, "dtype is torch.float64, not fp32 or bf16"),
        (Product(hostile_rows(7, 37).half()), torch.float32, "dtype is torch.float16, not fp32 or bf16"),
        (
            Product(hostile_rows(7, 37).bfloat16(), torch.ones(37).bfloat16()),
            torch.bfloat16,
            "a bias is left to be added in bf16",
        ),
    ],
)
def test_what_auto_runs(
    product: Product, taken: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    true = module().bias_gelu
    monkeypatch.setattr(module(), "bias_gelu", lambda *given: calls.append(given) or true(*given))
    out = bias_gelu(Product(product.values_NO.clone(), product.bias_O), dtype=taken)
    assert (out.values_NI if isinstance(out, Levels) else out).dtype == taken
    assert len(calls) == (reason is None)
    if reason is not None:
        with pytest.raises(RuntimeError, match=f"bias_gelu: impl='cpu' cannot run: {reason}"):
            bias_gelu(product, dtype=taken, impl="cpu")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.kernels.extension._load_once", lambda: (None, "there is none"))
    got, expected = (bias_gelu(Product(hostile_rows(7, 37)), dtype=torch.int8, impl=i) for i in ("auto", "reference"))
    assert isinstance(got, Levels)
    assert isinstance(expected, Levels)
    assert find_difference(got, expected) is None
    with pytest.raises(RuntimeError, match="bias_gelu: impl='cpu' cannot run: there is none"):
        bias_gelu(Product(hostile_rows(7, 37)), dtype=torch.int8, impl="cpu")


@pytest.mark.parametrize(
    ("product", "moves", "taken", "named"),
    [
        (Product(torch.zeros(2, 3)), False, torch.float32, "it takes numbers with a bias, and gives their dtype"),
        (Product(torch.zeros(2, 3), torch.zeros(3)), True, torch.float32, "it takes numbers with a bias, and"),
        (Product(torch.zeros(2, 3), torch.zeros(3)), False, torch.bfloat16, "it takes numbers with a bias, and"),
        (
            Product(torch.zeros(2, 3).double(), torch.zeros(3).double()),
            False,
            torch.float64,
            "dtype is torch.float64, not fp32, bf16 or fp16",
        ),
        (
            Product(torch.zeros(2, 3), torch.zeros(3).requires_grad_()),
            False,
            torch.float32,
            "gradients are asked for",
        ),
        (Product(torch.zeros(2, 3), torch.zeros(3)), False, torch.float32, ""),
    ],
)
def test_what_triton_cannot_run(product: Product, moves: bool, taken: torch.dtype, named: str) -> None:
    move = Move(torch.ones(3), torch.zeros(3)) if moves else None
    with pytest.raises(RuntimeError, match=f"bias_gelu: impl='triton' cannot run: {named}"):
        bias_gelu(product, dtype=taken, move=move, impl="triton")


# Errors


def test_unknown_impl() -> None:
    with pytest.raises(ValueError, match="bias_gelu: impl is 'sdpa'; allowed: auto, reference, cpu, triton"):
        bias_gelu(Product(torch.zeros(2, 3)), dtype=torch.float32, impl="sdpa")


@each_impl
@pytest.mark.parametrize(
    ("product", "move", "named"),
    [
        (Product(torch.zeros(3)), None, "the product has shape (3,), expected (N, 3)"),
        (Product(torch.zeros(2, 3), torch.zeros(4)), None, "a product is floating, with a bias (O,) of its dtype"),
        (
            Product(torch.zeros(2, 3)),
            Move(torch.zeros(3), torch.zeros(4)),
            "move is [('torch.float32', (3,)), ('torch.float32', (4,))], expected fp32 (3,) twice",
        ),
        (Product(torch.zeros(2, 3)), Move(torch.zeros(1), torch.zeros(1)), "expected fp32 (3,) twice"),
        (Product(torch.zeros(2, 3)), Move(torch.zeros(3).int(), torch.zeros(3)), "move is [('torch.int32', (3,))"),
        (Product(torch.zeros(2, 3)), Move(torch.zeros(3), torch.zeros(3).double()), "expected fp32 (3,) twice"),
    ],
)
def test_shapes_that_disagree(product: Product, move: Move | None, named: str, impl: str) -> None:
    with running(impl) as name, pytest.raises(ValueError, match=re.escape(named)):
        bias_gelu(product, dtype=torch.float32, move=move, impl=name)


_FLOATS = np.zeros((2, 3), np.float32)
_COLUMN = np.zeros(3, np.float32)


@needs_extension
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": 3}, "size, the dtype or the layout"),
        ({"columns": 4}, "size, the dtype or the layout"),
        ({"product": (_FLOATS, None)}, "a product has six parts"),
        ({"times": None}, "times and minus come together"),
        ({"minus": None}, "times and minus come together"),
        ({"times": _COLUMN[:2]}, "size, the dtype or the layout"),
        ({"minus": np.zeros(3)}, "size, the dtype or the layout"),
        ({"target": (np.zeros((2, 3), np.int8), None, None)}, "levels come with arrays for scale and shift"),
        ({"target": (np.zeros((2, 3)), None, None)}, "a target is fp32, bf16 or int8"),
        ({"target": (_FLOATS[:1], None, None)}, "size, the dtype or the layout"),
        ({"level": "v5"}, "no level v5"),
    ],
)
def test_what_the_binding_refuses(change: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"rows": 2, "columns": 3, "product": (_FLOATS, *[None] * 5), "times": _COLUMN}
    given |= {"minus": _COLUMN, "target": (_FLOATS.copy(), None, None), "level": "portable", "threads": 1}
    module().bias_gelu(**given)
    with pytest.raises(ValueError, match=named):
        module().bias_gelu(**(given | change))


@needs_extension
def test_levels_of_rows_without_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="levels need at least one column"):
        bias_gelu(Product(torch.zeros(2, 0)), dtype=torch.int8, impl="cpu")


# The bound itself


@pytest.mark.parametrize("name", ["by tanh", "by a logistic", "bias left out", "bias twice", "minus added"])
def test_the_bound_kills_broken_gelus(name: str) -> None:
    with guarded() as guards:
        product, move = make_product("fp32 with bias", 7, 123, guards), make_move(123, guards)
    x_NF = product.numbers()
    gold = gold_of_gelu(product, move, "cpu")
    assert find_failure(F.gelu(x_NF) * move.times_F - move.minus_F, gold) is None
    assert product.bias_O is not None
    broken_NF = {
        "by tanh": F.gelu(x_NF, approximate="tanh"),
        "by a logistic": x_NF * torch.sigmoid(1.702 * x_NF),
        "bias left out": F.gelu(product.values_NO),
        "bias twice": F.gelu(x_NF + product.bias_O),
    }.get(name, F.gelu(x_NF))
    sign = 1 if name == "minus added" else -1
    assert find_failure(broken_NF * move.times_F + sign * move.minus_F, gold) is not None


def _is_caught() -> bool:
    impls = [f"cpu {level}" for level in CPU_LEVELS]
    finders = (find_gelu_failure, find_tail_failure)
    try:
        return (
            any(find(impl) is not None for find in finders for impl in impls)
            or any(not _keeps_nan(impl, 0x7FFFFFFF) for impl in impls)
            or any(
                find_bias_gelu_failure(impl, kind, shape, moves) is not None
                for impl in impls
                for shape in SHAPES
                for kind in KINDS
                for moves in (False, True)
            )
            or any(_counts_threads(impl, "fp32", torch.float32) for impl in impls)
        )
    except AssertionError:  # the guards'
        return True


@pytest.mark.slow
@pytest.mark.parametrize("name", BIAS_GELU_MUTANTS)
def test_cpp_mutants_are_caught(name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    mutant = load_row_mutant(*BIAS_GELU_MUTANTS[name], tmp_path_factory.getbasetemp(), tmp_path)
    assert not _is_caught()
    with mock.patch("protnest.kernels.cpu_kernels.load", return_value=mutant):
        assert _is_caught(), f"nothing notices: {name}"
