"""rotary_attention: every level against fp64 gold, the same bits in any company, NaN, what products leave, errors,
mutants.

The kernel for GPUs has its tests elsewhere. "v4 in pairs" is level v4 multiplying pairs of bf16 as v4_bf16 does. The
file is long because Python and the binding each refuse what they must, one line a refusal.

Shapes: T tokens, L of one sequence, H heads, K head width, J = K / 2, C = 3 H K.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.kernels import cpu_kernels
from protnest.kernels import rotary_attention as module
from protnest.kernels.cpu_kernels import LEVELS, cpu_level, product_arrays
from protnest.kernels.extension import load, missing_reason
from protnest.kernels.hardware import multiplies_bf16
from protnest.kernels.product import Product, Scales
from protnest.kernels.rotary_attention import RotaryTable, rotary_attention

from support.attention_cases import HEADS, Case, find_failure, guarded, guarded_product, make_case
from support.attention_mutants import CPP_MUTANTS, PYTHON_MUTANTS
from support.poisoned import poisoned_memory
from support.source_mutants import load_cpp_mutant

_extension = load()
BEST = _extension.best_level() if _extension is not None else ""
USUAL = min(BEST, "v4", key=LEVELS.index) if BEST else ""


def _level(impl: str) -> Any:
    level = impl.partition(" ")[0]
    lacking = not BEST or LEVELS.index(level) > LEVELS.index(BEST)
    reason = f"{impl}: {missing_reason() or f'this processor runs {BEST}'}"
    return pytest.param(impl, marks=pytest.mark.skipif(lacking, reason=reason))


LEVEL_IMPLS = ("portable", "v3", "v4", "v4 in pairs", "v4_bf16")
each_level = pytest.mark.parametrize("impl", [*map(_level, LEVEL_IMPLS)])
each_impl = pytest.mark.parametrize("impl", ["reference", "torch", *map(_level, LEVEL_IMPLS)])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
needs_extension = pytest.mark.skipif(not BEST, reason=f"cpu: {missing_reason()}")

# Around blocks of 8, 16 and 32 queries, groups of 6 keys and tiles of 126.
LENGTHS: dict[int, tuple[int, ...]] = {
    8: (1, 0, 2, 15, 17, 33, 127, 0, 253),
    10: (31, 1, 126, 7),
    16: (16, 32, 125, 0, 400),
    20: (2, 33, 252, 17),
    24: (127, 0, 0, 31, 15, 3),
    32: (253, 1, 16, 5),
    64: (126, 33, 4),
    128: (127, 2, 32),
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    with poisoned_memory():
        yield


def _run(impl: str, case: Case) -> torch.Tensor:
    if impl in module.IMPLS:
        return rotary_attention(case.qkv, case.table, case.cu_seqlens, case.lengths_B, case.heads, impl=impl)
    level, longest = impl.partition(" ")[0], max(case.lengths_B, default=0)
    pairs = impl in ("v4 in pairs", "v4_bf16")
    arguments = (case.qkv.tensors(), *case.table, case.cu_seqlens, case.heads, longest, level, pairs)
    out_TD: torch.Tensor = module._rotary_attention(*arguments)
    return out_TD


# Against gold

make_cached = functools.cache(make_case)
KINDS = {
    f"{kind}, K = {K}, {name}": functools.partial(make_cached, LENGTHS[20], K, dtype, kind=kind)
    for kind, K in (("mild", 20), ("mild", 64), ("equal", 20), ("one takes all", 8), ("rising", 16))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
LEFT = {
    f"{left}, K = {K}": functools.partial(make_cached, LENGTHS[K], K, left=left)
    for left, widths in (("integers", (8, 10, 20, 32, 128)), ("with bias", (8, 10, 64)))
    for K in widths
}
WIDTHS = {
    f"hostile, K = {K}, {name}": functools.partial(make_cached, LENGTHS[K], K, dtype)
    for K in HEADS
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
FEW = {
    "one head": functools.partial(make_cached, (40, 3), 16, heads=1),
    "no sequence": functools.partial(make_cached, (), 16),
    "an empty sequence": functools.partial(make_cached, (0,), 16),
    "empty sequences at both ends": functools.partial(make_cached, (0, 5, 0), 16),
}
CASES = WIDTHS | KINDS | LEFT | FEW


@each_impl
@pytest.mark.parametrize("name", CASES)
def test_within_bounds_of_gold(name: str, impl: str) -> None:
    case = CASES[name]()
    if case.qkv.dtype == torch.bfloat16 and (impl == "reference" or (impl == "torch" and name in KINDS)):
        pytest.skip("torch rounds each step to bf16, which scores in thousands do not survive")
    failure = find_failure(_run(impl, case), case, impl)
    assert failure is None, failure


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("left", ["numbers", "with bias"])
def test_exact_in_fp64(impl: str, left: str) -> None:
    case = make_case((1, 30, 0, 7), 10, torch.float64, left=left)
    got_TD, gold = _run(impl, case), case.gold
    error = np.abs(got_TD.numpy().reshape(gold.out.shape) - gold.out)
    assert (error <= 1e-13 * (1 + gold.score_size) * gold.mean_size).all()


@each_level
@each_dtype
def test_writes_its_own_rows_only(impl: str, dtype: torch.dtype) -> None:
    _check_writes(impl, dtype)


def _check_writes(impl: str, dtype: torch.dtype) -> None:
    """`out` lies between NaN, which stays."""
    case = make_cached((3, 18, 33, 5), 10, dtype)
    T, C = case.qkv.values_NO.shape
    around = torch.full((T + 64, C // 3), torch.nan, dtype=dtype)
    out_TD = around[32:-32]
    tables = [*(part_PJ.numpy() for part_PJ in case.table), case.cu_seqlens.numpy()]
    level, pairs = impl.partition(" ")[0], impl in ("v4 in pairs", "v4_bf16")
    given = (product_arrays(case.qkv), *tables, case.heads, level, pairs, 1, cpu_kernels.array(out_TD))
    cpu_kernels.module().rotary_attention(*given)
    assert around[:32].isnan().all()
    assert around[-32:].isnan().all()
    assert torch.equal(out_TD, _run(impl, case))


# By hand


def _attend_to_scores(impl: str, dtype: torch.dtype, scores_L: torch.Tensor, values_L: torch.Tensor) -> float:
    """What every token gets where key u has score u and value u; places do not turn."""
    L, K = len(scores_L), 8
    qkv = torch.zeros(L, 3, K)
    qkv[:, 0, 0], qkv[:, 1, 0], qkv[:, 2] = K**0.5, scores_L, values_L[:, None]
    table = RotaryTable(torch.ones(L, K // 2), torch.zeros(L, K // 2))
    out_TD = _run(impl, Case(Product(guarded(qkv.view(L, -1).to(dtype))), table, (L,), 1)).float()
    # Vectors are full or not, and divide by their own totals.
    assert float(out_TD.max() - out_TD.min()) <= 1e-6 * float(values_L.abs().max())
    return float(out_TD[0, 0])


def _check_by_hand(impl: str, dtype: torch.dtype) -> None:
    near = functools.partial(pytest.approx, rel=1e-6 if dtype == torch.float32 else 2**-8, abs=1e-6)
    L = 140
    values_L = torch.arange(L).float() - 12
    two = torch.full((L,), -300.0)
    two[[3, 130]] = 0
    assert _attend_to_scores(impl, dtype, two, values_L) == near((values_L[3] + values_L[130]).item() / 2)
    for place in (0, 125, 126, L - 1):
        one = torch.full((L,), -300.0)
        one[place] = 0
        assert _attend_to_scores(impl, dtype, one, values_L) == near(values_L[place].item())
    # Nothing lifts the largest score to 0, and e^-16 is 1e-7.
    for length in (5, 6, L):
        low = torch.full((length,), -1024.0)
        low[length // 2 :] = -1040
        assert _attend_to_scores(impl, dtype, low, values_L[:length]) == near(values_L[: length // 2].mean().item())


@each_level
@each_dtype
def test_scores_and_values_by_hand(impl: str, dtype: torch.dtype) -> None:
    _check_by_hand(impl, dtype)


def _check_long(impl: str) -> None:
    """No tile counts for less than another: values that rise along the sequence have mean 0."""
    L = 3000
    dtype = torch.bfloat16 if impl.startswith("v") else torch.float32
    rising_L = torch.linspace(-1, 1, L)
    assert abs(_attend_to_scores(impl, dtype, torch.zeros(L), rising_L)) <= 1e-5


@each_level
def test_long_sequences_do_not_fade(impl: str) -> None:
    _check_long(impl)


# What products leave


def test_numbers_by_hand() -> None:
    steps_O, sums_O = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 2.0, 3.0])
    scales = Scales(steps_O, sums_O, scale_N=torch.tensor([2.0, 0.5]), shift_N=torch.tensor([10.0, -1.0]))
    values_NO, bias_O = torch.tensor([[1, -2, 3], [4, 0, -6]], dtype=torch.int32), torch.tensor([0.25, 0.0, -4.0])
    assert Product(values_NO, bias_O, scales).numbers().tolist() == [[12.25, 12.0, 29.0], [1.25, -2.0, -8.5]]
    assert Product(values_NO.float(), bias_O).numbers().tolist() == [[1.25, -2.0, -1.0], [4.25, 0.0, -10.0]]


@each_impl
@pytest.mark.parametrize("left", ["with bias", "integers"])
def test_a_product_is_what_its_numbers_are(impl: str, left: str) -> None:
    """Powers of two and whole numbers: nothing is rounded on the way to the turn."""
    case = make_case((40, 3), 8, heads=2, kind="mild")
    T, C = case.qkv.values_NO.shape
    whole_TC, bias_C = (case.qkv.values_NO * 8).round(), torch.arange(C) % 3 / 2
    product = Product(whole_TC / 8, bias_C)
    if left == "integers":
        scales = Scales(2.0 ** (torch.arange(C) % 4), torch.arange(C) % 5 / 1, torch.full((T,), 0.125), torch.ones(T))
        product = Product(whole_TC.int(), bias_C, scales)
    parts = (case.table, case.lengths_B, 2)
    got_TD = _run(impl, Case(guarded_product(product), *parts))
    expected_TD = _run(impl, Case(Product(guarded(product.numbers())), *parts))
    if left == "integers" and impl in ("v3", "v4", "v4 in pairs", "v4_bf16"):
        torch.testing.assert_close(got_TD, expected_TD, rtol=1e-4, atol=2e-4)  # a shorter polynomial
    else:
        assert torch.equal(got_TD, expected_TD)


@each_level
def test_rows_without_levels_stay_in_their_sequence(impl: str) -> None:
    """A row that was not finite has scale and shift NaN."""
    case = make_cached((21, 131, 10), 8, left="integers")
    assert case.qkv.scales is not None
    scale_N, shift_N = (part.clone() for part in case.qkv.scales[2:])
    scale_N[50] = shift_N[50] = torch.nan
    scales = case.qkv.scales._replace(scale_N=scale_N, shift_N=shift_N)
    broken = Case(case.qkv._replace(scales=scales), case.table, case.lengths_B, case.heads)
    clean_TD, got_TD = _run(impl, case), _run(impl, broken)
    assert torch.equal(got_TD[:21], clean_TD[:21])
    assert torch.equal(got_TD[-10:], clean_TD[-10:])
    assert got_TD[21:-10].isnan().all()


# The same bits


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SAME = {
    "fp32": functools.partial(make_cached, (5, 33, 0, 140, 1, 17), 8),
    "bf16": functools.partial(make_cached, (5, 33, 0, 140, 1, 17), 20, torch.bfloat16),
    "with bias": functools.partial(make_cached, (5, 33, 0, 140, 1, 17), 10, left="with bias"),
    "integers": functools.partial(make_cached, (5, 33, 0, 140, 1, 17), 8, left="integers"),
}


@pytest.mark.usefixtures("_threads")
@each_level
@pytest.mark.parametrize("name", SAME)
def test_company_and_threads_change_no_bit(impl: str, name: str) -> None:
    case = SAME[name]()
    together = torch.split(_run(impl, case), list(case.lengths_B))
    for threads, order in ((2, [3, 0, 5, 2, 4, 1]), (3, [3, 3, 1]), (1, [1, 4])):
        torch.set_num_threads(threads)
        picked = case.pick(order)
        for b, got_LD in zip(order, torch.split(_run(impl, picked), list(picked.lengths_B)), strict=True):
            assert torch.equal(got_LD, together[b])
    for b in range(len(case.lengths_B)):
        assert torch.equal(_run(impl, case.pick([b])), together[b])


# Numbers that are none

PAYLOAD = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)


@functools.cache
def _broken(dtype: torch.dtype, part: int, token: int, value: float | str) -> Case:
    """Sequence 1 has `value` in one channel of head 2's query (part 0), key (1) or value (2)."""
    case = make_cached((21, 131, 10), 16, dtype)
    qkv = case.qkv.values_NO.clone().view(-1, 3, case.heads, 16)
    qkv[21 + token, part, 2, 5] = PAYLOAD[0].to(dtype) if value == "payload" else float(value)
    return Case(Product(guarded(qkv.view(162, -1))), case.table, case.lengths_B, case.heads)


def _torch_gives_zeros(impl: str, dtype: torch.dtype) -> bool:
    """Whether torch's own attention may answer an infinite score with zeros: in bf16, on a CPU with units for it."""
    return impl == "torch" and dtype == torch.bfloat16 and multiplies_bf16(torch.device("cpu"))


def _check_not_numbers(impl: str, dtype: torch.dtype) -> None:
    clean = _run(impl, make_cached((21, 131, 10), 16, dtype)).view(162, -1, 16)
    elsewhere = torch.ones(clean.shape, dtype=torch.bool)
    elsewhere[21:-10, 2] = False
    # 130, the last, has no neighbour in its pair.
    for part, token, value in itertools.product(range(3), (50, 130), (torch.nan, "payload", torch.inf, -torch.inf)):
        case = _broken(dtype, part, token, value)
        got = _run(impl, case).view(clean.shape)
        assert torch.equal(got[elsewhere], clean[elsewhere])
        if _torch_gives_zeros(impl, dtype) and part < 2 and value in (torch.inf, -torch.inf):
            continue
        gold = torch.tensor(case.gold.out)
        assert torch.equal(got.isnan(), gold.isnan()), f"{part=}, {token=}, {value=}"
        assert torch.equal(got.isfinite(), gold.isfinite()), f"{part=}, {token=}, {value=}"


@pytest.mark.parametrize("impl", ["torch", *map(_level, LEVEL_IMPLS)])
@each_dtype
def test_not_a_number_stays_in_its_sequence_and_head(impl: str, dtype: torch.dtype) -> None:
    _check_not_numbers(impl, dtype)


# Mutants

MUTANT_CASES = (
    *("hostile, K = 8, fp32", "hostile, K = 10, bf16", "hostile, K = 24, fp32", "hostile, K = 32, bf16"),
    *("mild, K = 20, fp32", "mild, K = 64, bf16", "rising, K = 16, fp32"),
    *("integers, K = 10", "integers, K = 32", "with bias, K = 10"),
)


def _is_caught(impl: str) -> bool:
    """Whether a test of one level fails."""
    try:
        for dtype in (torch.float32, torch.bfloat16):
            _check_writes(impl, dtype)
            _check_by_hand(impl, dtype)
            _check_not_numbers(impl, dtype)
        _check_long(impl)
    except AssertionError:
        return True
    return any(find_failure(_run(impl, CASES[name]()), CASES[name](), impl) is not None for name in MUTANT_CASES)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", PYTHON_MUTANTS)
def test_python_mutants_are_caught(name: str, impl: str) -> None:
    where, broken = PYTHON_MUTANTS[name]
    cases = [CASES[name]() for name in ("mild, K = 20, fp32", "integers, K = 10", "with bias, K = 10")]
    assert all(find_failure(_run(impl, case), case, impl) is None for case in cases)
    with mock.patch(f"protnest.kernels.rotary_attention.{where}", broken):
        assert any(find_failure(_run(impl, case), case, impl) is not None for case in cases)


def _levels_here() -> list[str]:
    return [impl for impl in LEVEL_IMPLS if LEVELS.index(impl.partition(" ")[0]) <= LEVELS.index(BEST)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CPP_MUTANTS)
def test_cpp_mutants_are_caught(name: str, attention_rest: list[Path], tmp_path: Path) -> None:
    mutant = load_cpp_mutant(["rotary_attention.cpp", "lanes.hpp"], CPP_MUTANTS[name], attention_rest, tmp_path, "-O1")
    with mock.patch.object(cpu_kernels, "load", return_value=mutant):
        assert any(map(_is_caught, _levels_here())), f"nothing notices: {name}"


@pytest.mark.slow
def test_what_is_not_broken_is_not_caught(attention_rest: list[Path], tmp_path: Path) -> None:
    same = load_cpp_mutant(["rotary_attention.cpp", "lanes.hpp"], {}, attention_rest, tmp_path, "-O1")
    with mock.patch.object(cpu_kernels, "load", return_value=same):
        assert not any(map(_is_caught, _levels_here()))


# Which implementation runs


@pytest.fixture
def _fresh_level() -> Iterator[None]:
    """`cpu_level` of a new process, and the true one again afterwards."""
    cpu_level.cache_clear()
    yield
    cpu_level.cache_clear()


def _given(dtype: torch.dtype = torch.float32, K: int = 16, left: str = "numbers") -> dict[str, Any]:
    case = make_case((2, 4), K, dtype, heads=2, left=left)
    return {
        "qkv": case.qkv.values_NO if left == "numbers" else case.qkv,
        "table": case.table,
        "cu_seqlens": case.cu_seqlens,
        "lengths_B": case.lengths_B,
        "heads": 2,
    }


@needs_extension
@pytest.mark.usefixtures("_fresh_level")
@pytest.mark.parametrize("level", [*LEVELS[: LEVELS.index(BEST) + 1], ""] if BEST else [""])
def test_level_by_the_environment(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTNEST_CPU_LEVEL", level)
    assert cpu_level() == (level or USUAL)
    case = make_cached(LENGTHS[24], 24, torch.bfloat16)
    assert torch.equal(_run("cpu", case), _run(level or USUAL, case))


@needs_extension
@pytest.mark.usefixtures("_fresh_level")
@pytest.mark.parametrize(("best", "level"), [(BEST, "avx512"), ("v3", "v4"), ("v4", "v4_bf16")])
def test_level_that_is_not_there(best: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "load", lambda: SimpleNamespace(best_level=lambda: best))
    monkeypatch.setenv("PROTNEST_CPU_LEVEL", level)
    allowed = ", ".join(LEVELS[: LEVELS.index(best) + 1])
    with pytest.raises(ValueError, match=f"PROTNEST_CPU_LEVEL={level}: this processor runs {allowed}$"):
        rotary_attention(**_given(), impl="cpu")


def _wants_gradients(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"qkv": given["qkv"].requires_grad_()}


def _bias_wants_gradients(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"qkv": given["qkv"]._replace(bias_O=given["qkv"].bias_O.requires_grad_())}


NOT_CPU: dict[str, tuple[Any, str]] = {
    "gradients": (lambda: _wants_gradients(_given()), "gradients are asked for"),
    "gradients of the bias": (lambda: _bias_wants_gradients(_given(left="with bias")), "gradients are asked for"),
    "gradients of the bias of integers": (
        lambda: _bias_wants_gradients(_given(left="integers")),
        "gradients are asked for",
    ),
    "fp64": (lambda: _given(torch.float64), "dtype is torch.float64, not fp32 or bf16"),
    "narrow heads": (lambda: _given(K=6), "the head width is 6, not at least 8"),
    "bias in bf16": (lambda: _given(torch.bfloat16, left="with bias"), "a bias is left to be added in bf16"),
}


@needs_extension
@pytest.mark.parametrize(("make", "reason"), NOT_CPU.values(), ids=NOT_CPU)
def test_auto_runs_torch_and_says_why_once(make: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    given = make()
    outputs = [rotary_attention(**given) for _ in range(2)]
    assert torch.equal(outputs[0], rotary_attention(**given, impl="torch"))
    assert caplog.messages == [f"rotary_attention: auto runs torch: {reason}"]
    with pytest.raises(RuntimeError, match=re.escape(f"impl='cpu' cannot run here: {reason}")):
        rotary_attention(**given, impl="cpu")


@needs_extension
def test_auto_runs_the_extension_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    outputs = [rotary_attention(**_given()) for _ in range(2)]
    with torch.no_grad():
        outputs.append(rotary_attention(**_wants_gradients(_given())))
    for got in outputs:
        assert torch.equal(got, rotary_attention(**_given(), impl="cpu"))
    assert caplog.messages == ["rotary_attention: auto runs cpu"]


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    monkeypatch.setattr(cpu_kernels, "missing_reason", lambda: "it is not built")
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    assert torch.equal(rotary_attention(**_given()), rotary_attention(**_given(), impl="torch"))
    assert caplog.messages == ["rotary_attention: auto runs torch: it is not built"]
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run here: it is not built"):
        rotary_attention(**_given(), impl="cpu")


@needs_extension
def test_inputs_of_other_layouts_and_left_alone() -> None:
    given = _given(left="integers")
    tensors = [*given["qkv"].tensors(), *given["table"], given["cu_seqlens"]]
    before = [tensor.clone() for tensor in tensors]
    expected = rotary_attention(**given, impl="cpu")
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())
    strided = [tensor.T.contiguous().T if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2] for tensor in tensors]
    turned = given | {"qkv": Product.of(strided[:6])}
    assert torch.equal(rotary_attention(**turned, impl="cpu"), expected)


@pytest.mark.parametrize("left", ["numbers", "with bias"])
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_gradients(impl: str, left: str) -> None:
    case = make_case((1, 3, 2), 4, torch.float64, heads=2, kind="mild", left=left)

    def attend(*parts: torch.Tensor) -> torch.Tensor:
        arguments = (case.table, case.cu_seqlens, case.lengths_B, case.heads)
        return rotary_attention(Product.of(list(parts)), *arguments, impl=impl)

    check: Any = torch.autograd.gradcheck
    assert check(attend, [part.requires_grad_() for part in case.qkv.tensors()])


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_gradients_reach_the_bias_of_integers(impl: str) -> None:
    given = _given(left="integers")
    numbers_TC, bias_C = given["qkv"].numbers().requires_grad_(), given["qkv"].bias_O.requires_grad_()
    for qkv in (numbers_TC, given["qkv"]):
        attended_TD: Any = rotary_attention(**given | {"qkv": qkv}, impl=impl)
        attended_TD.square().sum().backward()
    torch.testing.assert_close(bias_C.grad, numbers_TC.grad.sum(0), rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize(
    ("left", "dtype"),
    [
        ("numbers", torch.float32),
        ("numbers", torch.bfloat16),
        ("with bias", torch.float32),
        ("integers", torch.float32),
    ],
)
def test_opcheck(left: str, dtype: torch.dtype) -> None:
    case = make_case((2, 4), 8, dtype, heads=2, left=left)
    arguments = (case.qkv.tensors(), *case.table, case.cu_seqlens, case.heads, 4, BEST, BEST == "v4_bf16")
    torch.library.opcheck(module._rotary_attention.definition, arguments)


# Errors


def _table(places: int, J: int, sines: int | None = None) -> RotaryTable:
    return RotaryTable(torch.ones(places, J), torch.ones(places if sines is None else sines, J))


def _integers(T: int = 6, C: int = 96, dtype: torch.dtype = torch.float32) -> Product:
    """Of six tokens and two heads of 16, but for the scales, which are of T and C."""
    scales = Scales(*(torch.ones(n, dtype=dtype) for n in (C, C, T, T)))
    return Product(torch.zeros(6, 96, dtype=torch.int32), torch.ones(96), scales)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an axis too many": (
        {"qkv": torch.zeros(1, 6, 96)},
        "qkv has shape (1, 6, 96), expected (T, 3 x 2 heads x an even",
    ),
    "width of an odd head": ({"qkv": torch.zeros(6, 90)}, "qkv has shape (6, 90), expected (T, 3 x 2 heads x"),
    "no heads": ({"heads": 0}, "qkv has shape (6, 96), expected (T, 3 x 0 heads x"),
    "lengths add up to less": ({"lengths_B": [2, 3]}, "2 lengths adding up to 5 and cu_seqlens of shape (3,) do not"),
    "lengths too few": (
        {"lengths_B": [6]},
        "1 lengths adding up to 6 and cu_seqlens of shape (3,) do not describe 6 tok",
    ),
    "table too short": (
        {"table": _table(3, 8)},
        "the rotary tables have shapes (3, 8) and (3, 8), expected (4 or more, 8)",
    ),
    "table of another width": ({"table": _table(6, 4)}, "the rotary tables have shapes (6, 4) and (6, 4), expected (4"),
    "sines too few": ({"table": _table(6, 8, 5)}, "the rotary tables have shapes (6, 8) and (5, 8), expected (4 or"),
    "bias of other columns": (
        {"qkv": Product(torch.zeros(6, 96), torch.ones(95))},
        "got ['torch.float32', 'torch.float32'] of shapes [(6, 96), (95,)]",
    ),
    "bias of another dtype": (
        {"qkv": Product(torch.zeros(6, 96), torch.ones(96).double())},
        "a product is floating, with a bias (O,) of its dtype or none, or int32 with fp32 bias, steps and sums (O,) "
        "and scale and shift (N,); got ['torch.float32', 'torch.float64'] of shapes [(6, 96), (96,)]",
    ),
    "integers alone": (
        {"qkv": torch.zeros(6, 96, dtype=torch.int32)},
        "got ['torch.int32'] of shapes [(6, 96)]",
    ),
    "integers without bias": (
        {"qkv": _integers()._replace(bias_O=None)},
        "of shapes [(6, 96), (96,), (96,), (6,), (6,)]",
    ),
    "integers with a bias of bf16": (
        {"qkv": _integers()._replace(bias_O=torch.ones(96, dtype=torch.bfloat16))},
        "got ['torch.int32', 'torch.bfloat16', ",
    ),
    "integers of 64 bits": (
        {"qkv": _integers()._replace(values_NO=torch.zeros(6, 96, dtype=torch.int64))},
        "got ['torch.int64', ",
    ),
    "scales of numbers": ({"qkv": _integers()._replace(values_NO=torch.zeros(6, 96))}, "got ['torch.float32', "),
    "scales of other tokens": ({"qkv": _integers(5)}, "of shapes [(6, 96), (96,), (96,), (96,), (5,), (5,)]"),
    "scales of other columns": ({"qkv": _integers(6, 95)}, "of shapes [(6, 96), (96,), (95,), (95,), (6,), (6,)]"),
    "scales of fp64": (
        {"qkv": _integers(dtype=torch.float64)},
        "got ['torch.int32', 'torch.float32', 'torch.float64', ",
    ),
    "scales with axes": (
        {"qkv": Product.of([part[None] if part.dim() == 1 else part for part in _integers().tensors()])},
        "of shapes [(6, 96), (1, 96), (1, 96), (1, 96), (1, 6), (1, 6)]",
    ),
    "impl": ({"impl": "sdpa"}, "impl is 'sdpa'; allowed: auto, reference, torch, cpu, triton"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rotary_attention(**(_given() | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _given(left="with bias"), "qkv is not plain numbers"),
        (lambda: _given(left="integers"), "qkv is not plain numbers"),
        (lambda: _given(torch.float64), "dtype is torch.float64, not fp32, bf16 or fp16"),
        (lambda: _wants_gradients(_given()), "gradients are asked for"),
        (_given, ""),
    ],
)
def test_triton_cannot_run(make: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_not_triton", lambda device: f"nothing runs on {device}")
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot run here: {reason or 'nothing runs on cpu'}"):
        rotary_attention(**make(), impl="triton")


def _six(values: Any, *rest: Any) -> tuple[Any, ...]:
    """A product for the binding."""
    return (values, *rest, *(None,) * (5 - len(rest)))


def _arrays(**changes: Any) -> dict[str, Any]:
    """Arguments of the binding: six tokens, two heads of 8."""
    given = {
        "qkv": _six(np.zeros((6, 48), np.float32)),
        "cos": np.ones((4, 4), np.float32),
        "sin": np.zeros((4, 4), np.float32),
        "cu_seqlens": np.array([0, 2, 6], np.int32),
        "heads": 2,
        "level": "portable",
        "pairs": False,
        "threads": 1,
        "out": np.full((6, 16), np.nan, np.float32),
    }
    return given | changes


def _floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def _sums(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.int32)


LAYOUT = "has not the size, the dtype or the layout"
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no heads": ({"heads": 0}, ValueError, "width must be heads times an even head width of at least 8"),
    "no width": ({"out": _floats(6, 0), "qkv": _six(_floats(6, 0)), "cos": _floats(4, 0)}, ValueError, "at least 8"),
    "heads of 4": ({"heads": 4}, ValueError, "at least 8"),
    "odd heads": ({"out": _floats(6, 18), "qkv": _six(_floats(6, 54))}, ValueError, "an even head width"),
    "qkv as a list": ({"qkv": ([1.0], *[None] * 5)}, TypeError, "a product's values are an array"),
    "bias as a list": (
        {"qkv": (_floats(6, 48), [1.0] * 48, *[None] * 4)},
        TypeError,
        "numbers come as an array or as None",
    ),
    "bias of bf16": (
        {"qkv": (np.zeros((6, 48), np.int16), _floats(48), *[None] * 4), "out": np.zeros((6, 16), np.int16)},
        ValueError,
        "bf16 has its bias already",
    ),
    "qkv of five parts": ({"qkv": _six(_floats(6, 48))[:5]}, ValueError, "a product has six parts"),
    "qkv in fp64": ({"qkv": _six(np.zeros((6, 48)))}, ValueError, "a product holds fp32, bf16 or int32"),
    "qkv of fewer tokens": ({"qkv": _six(_floats(5, 48))}, ValueError, LAYOUT),
    "qkv narrower": ({"qkv": _six(_floats(6, 47))}, ValueError, LAYOUT),
    "qkv by columns": ({"qkv": _six(np.asfortranarray(_floats(6, 48)))}, ValueError, LAYOUT),
    "bias too short": ({"qkv": _six(_floats(6, 48), _floats(47))}, ValueError, LAYOUT),
    "bias of fp64": ({"qkv": _six(_floats(6, 48), np.ones(48))}, ValueError, LAYOUT),
    "bias of every other number": ({"qkv": _six(_floats(6, 48), _floats(96)[::2])}, ValueError, LAYOUT),
    "scales of numbers": (
        {"qkv": (_floats(6, 48), None, None, None, _floats(6), None)},
        ValueError,
        "others with bias alone",
    ),
    "integers alone": ({"qkv": _six(_sums(6, 48))}, ValueError, "integers come with all five numbers"),
    "integers without shift": (
        {"qkv": _six(_sums(6, 48), *[_floats(48)] * 3, _floats(6))},
        ValueError,
        "integers come with all five numbers",
    ),
    "steps too short": (
        {"qkv": (_sums(6, 48), _floats(48), _floats(47), _floats(48), _floats(6), _floats(6))},
        ValueError,
        LAYOUT,
    ),
    "sums too short": (
        {"qkv": (_sums(6, 48), _floats(48), _floats(48), _floats(47), _floats(6), _floats(6))},
        ValueError,
        LAYOUT,
    ),
    "scale too short": ({"qkv": (_sums(6, 48), *[_floats(48)] * 3, _floats(5), _floats(6))}, ValueError, LAYOUT),
    "shift too short": ({"qkv": (_sums(6, 48), *[_floats(48)] * 3, _floats(6), _floats(5))}, ValueError, LAYOUT),
    "bf16 for integers": (
        {"qkv": (_sums(6, 48), *[_floats(48)] * 3, *[_floats(6)] * 2), "out": np.zeros((6, 16), np.int16)},
        ValueError,
        LAYOUT,
    ),
    "out of three axes": ({"out": _floats(6, 2, 8)}, ValueError, "out must have two dimensions"),
    "out in bf16": ({"out": np.zeros((6, 16), np.int16)}, ValueError, LAYOUT),
    "out by columns": ({"out": np.asfortranarray(_floats(6, 16))}, ValueError, LAYOUT),
    "out too short": ({"out": _floats(5, 16)}, ValueError, LAYOUT),
    "cosines in fp64": ({"cos": np.ones((4, 4))}, TypeError, "incompatible function arguments"),
    "cosines narrower": ({"cos": _floats(4, 3)}, ValueError, LAYOUT),
    "sines too few": ({"sin": _floats(3, 4)}, ValueError, LAYOUT),
    "sines by columns": ({"sin": np.asfortranarray(_floats(4, 4))}, ValueError, LAYOUT),
    "ends of 64 bits": ({"cu_seqlens": np.array([0, 2, 6])}, ValueError, LAYOUT),
    "no ends": ({"cu_seqlens": np.zeros(0, np.int32)}, ValueError, "cu_seqlens ends elsewhere"),
    "not from 0": ({"cu_seqlens": np.array([1, 2, 6], np.int32)}, ValueError, "cu_seqlens ends elsewhere"),
    "not to T": ({"cu_seqlens": np.array([0, 2, 5], np.int32)}, ValueError, "cu_seqlens ends elsewhere"),
    "ends fall": ({"cu_seqlens": np.array([0, 4, 3, 6], np.int32)}, ValueError, "cu_seqlens falls"),
    "ends below 0": ({"cu_seqlens": np.array([0, -2, 2, 6], np.int32)}, ValueError, "cu_seqlens falls"),
    "longer than the tables": ({"cu_seqlens": np.array([0, 1, 6], np.int32)}, ValueError, "longer than the tables"),
    "no such level": ({"level": "avx2"}, ValueError, "no level avx2; there are portable, v3, v4 and v4_bf16"),
}


@needs_extension
@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_binding_refuses(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    assert _extension is not None
    given = _arrays(**changes)
    with pytest.raises(kind, match=message):
        _extension.rotary_attention(**given)


@pytest.mark.skipif(BEST in ("", LEVELS[-1]), reason="no level is lacking here")
def test_binding_refuses_a_level_that_is_lacking() -> None:
    assert _extension is not None
    with pytest.raises(ValueError, match="this processor lacks level v4_bf16"):
        _extension.rotary_attention(**_arrays(level="v4_bf16"))


@needs_extension
@pytest.mark.parametrize("threads", [-1, 0, 1000])
def test_binding_takes_any_number_of_threads(threads: int) -> None:
    assert _extension is not None
    given = _arrays(threads=threads)
    given["qkv"][0][:, 32:] = 3
    _extension.rotary_attention(**given)
    np.testing.assert_allclose(given["out"], 3, rtol=1e-6)
