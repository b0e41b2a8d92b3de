"""row_attention: every implementation and level against fp64 gold, whatever rows are chosen; the bits of
rotary_attention, gradients, errors, mutants.

"v4 in pairs" is level v4 multiplying pairs of bf16 as v4_bf16 does. The file is long because Python and the binding
each refuse what they must, one line a refusal.

Shapes: T tokens, R rows, B sequences, L of one sequence, H heads, K head width, C = 3 H K.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from protnest.kernels import cpu_kernels, rotary_attention
from protnest.kernels import row_attention as module
from protnest.kernels.cpu_kernels import LEVELS, cpu_level
from protnest.kernels.extension import load, missing_reason
from protnest.kernels.linear import needs_widening
from protnest.kernels.product import Product, Scales
from protnest.kernels.rotary_attention import RotaryTable
from protnest.kernels.row_attention import row_attention

from support.attention_cases import Case, find_failure, guarded, guarded_product, make_case
from support.poisoned import poisoned_memory
from support.row_attention_mutants import CPP_MUTANTS, CPU_MUTANTS, MUTANTS, REFERENCE_MUTANTS
from support.source_mutants import load_cpp_mutant, load_mutant

_extension = load()
BEST = _extension.best_level() if _extension is not None else ""
USUAL = min(BEST, "v4", key=LEVELS.index) if BEST else ""
needs_extension = pytest.mark.skipif(not BEST, reason=f"cpu: {missing_reason()}")
LEVEL_IMPLS = ("portable", "v3", "v4", "v4 in pairs", "v4_bf16")


def _level(impl: str) -> Any:
    lacking = not BEST or LEVELS.index(impl.partition(" ")[0]) > LEVELS.index(BEST)
    reason = f"{impl}: {missing_reason() or f'this processor runs {BEST}'}"
    return pytest.param(impl, marks=pytest.mark.skipif(lacking, reason=reason))


each_level = pytest.mark.parametrize("impl", [*map(_level, LEVEL_IMPLS)])
each_impl = pytest.mark.parametrize("impl", ["reference", "torch"])
each_name = pytest.mark.parametrize("impl", ["reference", "torch", pytest.param("cpu", marks=needs_extension)])
each_impl_or_level = pytest.mark.parametrize("impl", ["reference", "torch", *map(_level, LEVEL_IMPLS)])


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    with poisoned_memory():
        yield


# Which rows

CHOICES = ("one each", "few", "all", "none", "twice", "ends", "one sequence", "more than tokens")
"""C++ takes no more rows of a sequence than it has tokens."""


def _choose(lengths_B: tuple[int, ...], choice: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Rows of each sequence, in any order within it, and how many they are."""
    rng = random.Random(f"{lengths_B} {choice}")
    index, counts, begin = list[int](), list[int](), 0
    last = max((b for b, length in enumerate(lengths_B) if length), default=0)
    for b, length in enumerate(lengths_B):
        rows = rng.sample(range(length), length)
        if choice == "one each":
            rows = rows[:1]
        elif choice == "few":
            rows = rows[: rng.randrange(4)]
        elif choice == "none":
            rows = []
        elif choice == "twice":
            rows = [*rows[:2], *rows[:2], *rows[2:3]][:length]
        elif choice == "more than tokens":
            rows = [*rows, *rows[:2]]
        elif choice == "ends":
            rows = [length - 1, 0][:length]
        elif choice == "one sequence" and b != last:
            rows = []
        index += [begin + row for row in rows]
        counts.append(len(rows))
        begin += length
    return guarded(torch.tensor(index, dtype=torch.int64)), tuple(counts)


def _run(case: Case, index_R: torch.Tensor, counts_B: tuple[int, ...], impl: str, ops: Any = module) -> torch.Tensor:
    if impl in ops.IMPLS:
        arguments = (case.qkv, case.table, case.cu_seqlens, case.lengths_B, case.heads, index_R, counts_B)
        out_RD: torch.Tensor = ops.row_attention(*arguments, impl=impl)
    else:
        given = (case.qkv.tensors(), *case.table, case.cu_seqlens, case.heads, index_R, list(counts_B))
        out_RD = ops._row_attention(*given, impl.partition(" ")[0], impl in ("v4 in pairs", "v4_bf16"))
    return out_RD


def _check(case: Case, index_R: torch.Tensor, counts_B: tuple[int, ...], impl: str, ops: Any = module) -> None:
    """Each chosen row within the bounds that rotary_attention's rows have."""
    got_RD = _run(case, index_R, counts_B, impl, ops)
    T, C = case.qkv.values_NO.shape
    assert (got_RD.shape, got_RD.dtype) == ((len(index_R), C // 3), case.qkv.dtype)
    # A row that is there twice is looked at twice.
    for rows in (slice(None), slice(None, None, -1)):
        chosen = index_R.tolist()[rows]
        got_TD = torch.tensor(case.gold.out.reshape(T, C // 3)).to(case.qkv.dtype)
        for row, out_D in zip(chosen, got_RD.flip(0) if rows.step else got_RD, strict=True):
            got_TD[row] = out_D
        # Widened to fp32, only the result is rounded, as the portable kernel does it.
        widened = impl == "torch" and needs_widening(case.qkv.values_NO)
        failure = find_failure(got_TD, case, "portable" if widened else impl)
        assert failure is None, failure


# Against gold

make_cached = functools.cache(make_case)
RAGGED, UNIFORM = (1, 0, 2, 17, 40, 0, 33), (24, 24, 24, 24)
COMPANIES = {
    "ragged": RAGGED,
    "uniform": UNIFORM,
    "one": (40,),
    "no sequence": (),
    "empty sequences": (0, 0),
    "empty at both ends": (0, 5, 0),
    "pairs": (5, 3, 3, 5),
    "one token each": (1, 1, 1),
}
GIVEN = {
    f"{kind}, K = {K}, {name}": functools.partial(make_cached, K=K, dtype=dtype, kind=kind)
    for kind, K in (("hostile", 8), ("hostile", 10), ("hostile", 64), ("mild", 20), ("one takes all", 8))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
} | {
    f"{left}, K = {K}": functools.partial(make_cached, K=K, left=left)
    for left in ("integers", "with bias")
    for K in (8, 20)
}


# The reference rounds each step to bf16, which scores in thousands do not survive; so do bf16 units.
RUN = [
    (name, impl)
    for name in GIVEN
    for impl in ("reference", "torch")
    if "bf16" not in name or (impl == "torch" and ("hostile" in name or needs_widening(torch.ones(1).bfloat16())))
]


@pytest.mark.parametrize("company", COMPANIES)
@pytest.mark.parametrize(("name", "impl"), RUN)
def test_within_bounds_of_gold(name: str, impl: str, company: str) -> None:
    case = GIVEN[name](COMPANIES[company])
    for choice in CHOICES:
        _check(case, *_choose(case.lengths_B, choice), impl)


@each_level
@pytest.mark.parametrize("company", ["ragged", "uniform"])
@pytest.mark.parametrize("name", GIVEN)
def test_levels_within_bounds_of_gold(name: str, company: str, impl: str) -> None:
    case = GIVEN[name](COMPANIES[company])
    for choice in CHOICES:
        _check(case, *_choose(case.lengths_B, choice), impl)


@each_impl
@pytest.mark.parametrize("left", ["numbers", "with bias"])
@pytest.mark.parametrize("lengths_B", [(1, 30, 0, 7), (12, 12)])
def test_exact_in_fp64(lengths_B: tuple[int, ...], left: str, impl: str) -> None:
    case = make_cached(lengths_B, 10, torch.float64, left=left)
    for choice in CHOICES:
        index_R, counts_B = _choose(lengths_B, choice)
        gold = case.gold
        bound = (1e-13 * (1 + gold.score_size) * gold.mean_size)[index_R]
        got_RD = _run(case, index_R, counts_B, impl)
        assert (np.abs(got_RD.numpy().reshape(bound.shape) - gold.out[index_R]) <= bound).all()


@pytest.mark.parametrize(
    ("lengths_B", "counts_B", "calls"),
    [
        ((6, 6, 6), (2, 2, 2), 1),
        ((6, 6, 6), (0, 0, 0), 1),
        ((6,), (3,), 1),
        # Their sums divide by the number of sequences, too: taken for uniform, they would mix.
        ((6, 6, 6), (1, 2, 3), 3),
        ((6, 6), (4, 0), 1),
        ((5, 7), (2, 2), 2),
        ((0, 12), (0, 2), 1),
        ((), (), 0),
    ],
)
def test_one_call_where_all_are_alike(lengths_B: tuple[int, ...], counts_B: tuple[int, ...], calls: int) -> None:
    case = make_cached(lengths_B, 8)
    index_R = torch.tensor(
        [begin + row for begin, count in zip(case.cu_seqlens.tolist(), counts_B, strict=False) for row in range(count)],
        dtype=torch.int64,
    )
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attend:
        _check(case, index_R, counts_B, "torch")
    assert attend.call_count == calls


# The same bits


def _attend_all(case: Case, impl: str) -> torch.Tensor:
    """rotary_attention at a level."""
    level, pairs = impl.partition(" ")[0], impl in ("v4 in pairs", "v4_bf16")
    given = (case.qkv.tensors(), *case.table, case.cu_seqlens, case.heads, max(case.lengths_B, default=0))
    out_TD: torch.Tensor = rotary_attention._rotary_attention(*given, level, pairs)
    return out_TD


# More than one block of 32 queries and one tile of 128 keys.
LONG = (130, 3, 0, 70)


@each_level
@pytest.mark.parametrize("name", GIVEN)
def test_bits_of_rotary_attention(name: str, impl: str) -> None:
    for lengths_B in (*COMPANIES.values(), LONG):
        case = GIVEN[name](lengths_B)
        all_TD = _attend_all(case, impl)
        for choice in CHOICES:
            index_R, counts_B = _choose(lengths_B, choice)
            assert torch.equal(_run(case, index_R, counts_B, impl), all_TD[index_R]), (lengths_B, choice)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@each_level
@pytest.mark.parametrize("name", ["hostile, K = 8, fp32", "hostile, K = 10, bf16", "integers, K = 20"])
def test_company_and_threads_change_no_bit(name: str, impl: str) -> None:
    case = GIVEN[name](LONG)
    for choice in CHOICES:
        index_R, counts_B = _choose(LONG, choice)
        torch.set_num_threads(1)
        together = _run(case, index_R, counts_B, impl).split(list(counts_B))
        begins_R = case.cu_seqlens[:-1].long().repeat_interleave(torch.tensor(counts_B))
        places = (index_R - begins_R).split(list(counts_B))
        for threads, order in ((2, [0, 1, 2, 3]), (5, [3, 0, 0, 2]), (1, [1]), (1, [0])):
            torch.set_num_threads(threads)
            picked = case.pick(order)
            begins = picked.cu_seqlens.tolist()
            index_R = torch.cat([places[b] + begin for b, begin in zip(order, begins, strict=False)])
            counts = tuple(counts_B[b] for b in order)
            got_RD = _run(picked, index_R, counts, impl)
            assert torch.equal(got_RD, torch.cat([together[b] for b in order])), (choice, threads)


@needs_extension
@pytest.mark.parametrize("level", [*LEVELS[: LEVELS.index(BEST) + 1], ""] if BEST else [""])
def test_level_by_the_environment(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, rows = make_cached(LONG, 20, torch.bfloat16), _choose(LONG, "few")
    monkeypatch.setenv("PROTNEST_CPU_LEVEL", level)
    cpu_level.cache_clear()
    try:
        got_RD = _run(case, *rows, "cpu")
    finally:
        cpu_level.cache_clear()
    assert torch.equal(got_RD, _run(case, *rows, level or USUAL))


# What products leave


@each_impl_or_level
@pytest.mark.parametrize("lengths_B", [(40, 3), (20, 20)])
@pytest.mark.parametrize("left", ["with bias", "integers"])
def test_a_product_is_what_its_numbers_are(left: str, lengths_B: tuple[int, ...], impl: str) -> None:
    """Powers of two and whole numbers: nothing is rounded on the way to the turn."""
    case = make_case(lengths_B, 8, heads=2, kind="mild")
    T, C = case.qkv.values_NO.shape
    whole_TC, bias_C = (case.qkv.values_NO * 8).round(), torch.arange(C) % 3 / 2
    product = Product(whole_TC / 8, bias_C)
    if left == "integers":
        scales = Scales(2.0 ** (torch.arange(C) % 4), torch.arange(C) % 5 / 1, torch.full((T,), 0.125), torch.ones(T))
        product = Product(whole_TC.int(), bias_C, scales)
    rows = _choose(lengths_B, "twice")
    got_RD = _run(dataclasses.replace(case, qkv=guarded_product(product)), *rows, impl)
    expected_RD = _run(dataclasses.replace(case, qkv=Product(guarded(product.numbers()))), *rows, impl)
    assert got_RD.dtype == torch.float32
    if left == "integers" and impl.startswith("v"):
        torch.testing.assert_close(got_RD, expected_RD, rtol=1e-4, atol=2e-4)  # a shorter polynomial
    else:
        assert torch.equal(got_RD, expected_RD)


# Numbers that are none


@each_impl_or_level
@pytest.mark.parametrize("lengths_B", [(21, 40, 10), (24, 24, 24)])
@pytest.mark.parametrize("part", range(3))
def test_not_a_number_stays_in_its_sequence_and_head(part: int, lengths_B: tuple[int, ...], impl: str) -> None:
    """NaN in head 2 of a query, key or value of sequence 1."""
    case = make_cached(lengths_B, 16)
    T, token = sum(lengths_B), lengths_B[0] + 5
    qkv = case.qkv.values_NO.clone().view(T, 3, case.heads, 16)
    qkv[token, part, 2, 5] = torch.nan
    broken = dataclasses.replace(case, qkv=Product(guarded(qkv.view(T, -1))))
    index_R, counts_B = _choose(lengths_B, "all")
    clean, got = (_run(each, index_R, counts_B, impl).view(T, -1, 16) for each in (case, broken))
    inside_R = (index_R >= lengths_B[0]) & (index_R < lengths_B[0] + lengths_B[1])
    hit_R = index_R == token if part == 0 else inside_R
    assert got[hit_R, 2].isnan().any(-1).all()
    others = torch.ones(got.shape[:2], dtype=torch.bool)
    others[hit_R, 2] = False
    assert torch.equal(got[others], clean[others])
    # Where that query is not asked about, it is not there.
    elsewhere_R, elsewhere_B = _choose(lengths_B, "none")
    assert _run(broken, elsewhere_R, elsewhere_B, impl).shape == (0, 16 * case.heads)


@each_name
def test_inputs_are_left_alone(impl: str) -> None:
    case, (index_R, counts_B) = make_case(RAGGED, 8, left="integers"), _choose(RAGGED, "few")
    tensors = [*case.qkv.tensors(), *case.table, case.cu_seqlens, index_R]
    before = [tensor.clone() for tensor in tensors]
    _run(case, index_R, counts_B, impl)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


@needs_extension
def test_inputs_of_other_layouts() -> None:
    case, (index_R, counts_B) = make_case(RAGGED, 8, left="integers"), _choose(RAGGED, "few")
    parts = [
        part.T.contiguous().T if part.dim() == 2 else part.repeat_interleave(2)[::2] for part in case.qkv.tensors()
    ]
    turned = dataclasses.replace(case, qkv=Product.of(parts))
    got_RD = _run(turned, index_R.repeat_interleave(2)[::2], counts_B, "cpu")
    assert torch.equal(got_RD, _run(case, index_R, counts_B, "cpu"))


# Which implementation runs

NOT_CPU: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "gradients": ({"K": 16}, "values_NO", "gradients are asked for"),
    "gradients of the bias": ({"K": 16, "left": "with bias"}, "bias_O", "gradients are asked for"),
    "gradients of the bias of integers": ({"K": 16, "left": "integers"}, "bias_O", "gradients are asked for"),
    "fp64": ({"K": 16, "dtype": torch.float64}, None, "dtype is torch.float64, not fp32 or bf16"),
    "narrow heads": ({"K": 6}, None, "the head width is 6, not at least 8"),
    "bias in bf16": (
        {"K": 16, "dtype": torch.bfloat16, "left": "with bias"},
        None,
        "a bias is left to be added in bf16",
    ),
}


@needs_extension
@pytest.mark.parametrize(("given", "wanted", "reason"), NOT_CPU.values(), ids=NOT_CPU)
def test_auto_is_torch_where_cpp_cannot_run(given: dict[str, Any], wanted: str | None, reason: str) -> None:
    case, rows = make_case((2, 4), **given, heads=2), _choose((2, 4), "ends")
    if wanted is not None:
        getattr(case.qkv, wanted).requires_grad_()
    got_RD = _run(case, *rows, "auto")
    assert torch.equal(got_RD, _run(case, *rows, "torch"))
    assert got_RD.requires_grad == (wanted is not None)
    with pytest.raises(RuntimeError, match=re.escape(f"impl='cpu' cannot run here: {reason}")):
        _run(case, *rows, "cpu")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths_B", [RAGGED, UNIFORM])
def test_auto_is_cpp_where_it_can_run(lengths_B: tuple[int, ...], dtype: torch.dtype) -> None:
    case, rows = make_case(lengths_B, 20, dtype), _choose(lengths_B, "few")
    expected_RD = _run(case, *rows, "cpu")
    assert torch.equal(expected_RD, _run(case, *rows, USUAL))
    case.qkv.values_NO.requires_grad_()
    with mock.patch.object(module, "_attend", side_effect=AssertionError), torch.no_grad():
        arguments = (case.table, case.cu_seqlens, case.lengths_B, case.heads, *rows)
        for got_RD in (_run(case, *rows, "auto"), row_attention(case.qkv.values_NO, *arguments)):
            assert torch.equal(got_RD, expected_RD)


@pytest.mark.parametrize("lengths_B", [RAGGED, UNIFORM])
def test_without_the_extension(lengths_B: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    monkeypatch.setattr(cpu_kernels, "missing_reason", lambda: "it is not built")
    case, rows = make_cached(lengths_B, 20), _choose(lengths_B, "few")
    assert torch.equal(_run(case, *rows, "auto"), _run(case, *rows, "torch"))
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run here: it is not built"):
        _run(case, *rows, "cpu")


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
    case, (index_R, counts_B) = make_case((2, 4), 8, dtype, heads=2, left=left), _choose((2, 4), "one each")
    given = (case.qkv.tensors(), *case.table, case.cu_seqlens, case.heads, index_R, list(counts_B))
    torch.library.opcheck(module._row_attention.definition, (*given, BEST, BEST == "v4_bf16"))


# Gradients


@each_impl
@pytest.mark.parametrize("left", ["numbers", "with bias"])
@pytest.mark.parametrize(("lengths_B", "choice"), [((1, 3, 0, 2), "twice"), ((3, 3), "ends"), ((3, 2), "one sequence")])
def test_gradients(lengths_B: tuple[int, ...], choice: str, left: str, impl: str) -> None:
    case = make_case(lengths_B, 4, torch.float64, heads=2, kind="mild", left=left)
    rows = _choose(lengths_B, choice)

    def attend(*parts: torch.Tensor) -> torch.Tensor:
        return _run(dataclasses.replace(case, qkv=Product.of(list(parts))), *rows, impl)

    check: Any = torch.autograd.gradcheck
    assert check(attend, [part.requires_grad_() for part in case.qkv.tensors()])


def test_gradients_reach_the_bias_of_integers() -> None:
    case, rows = make_case((2, 4), 16, heads=2, left="integers"), _choose((2, 4), "ends")
    assert case.qkv.bias_O is not None
    numbers_TC, bias_C = case.qkv.numbers().requires_grad_(), case.qkv.bias_O.requires_grad_()
    for qkv in (Product(numbers_TC), case.qkv):
        total: Any = _run(dataclasses.replace(case, qkv=qkv), *rows, "auto").square().sum()
        total.backward()
    assert numbers_TC.grad is not None
    torch.testing.assert_close(bias_C.grad, numbers_TC.grad.sum(0), rtol=1e-4, atol=1e-4)


# Mutants

MUTANT_COMPANIES = (RAGGED, UNIFORM, (5, 7, 5, 7), (6, 6))
MUTANT_GIVEN = ("mild, K = 20, fp32", "with bias, K = 20", "integers, K = 8")
# An operator has one owner.
OF_ITS_OWN = {"protnest::row_attention": "protnest::row_attention_mutant"}


def _check_all(ops: ModuleType, impl: str) -> None:
    for name in MUTANT_GIVEN:
        for lengths_B in MUTANT_COMPANIES:
            for choice in CHOICES:
                _check(GIVEN[name](lengths_B), *_choose(lengths_B, choice), impl, ops)


@each_impl_or_level
def test_what_is_not_broken_is_not_caught(impl: str, tmp_path: Path) -> None:
    _check_all(load_mutant("kernels.row_attention", OF_ITS_OWN, tmp_path), impl)


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *((name, "torch") for name in MUTANTS),
        *((name, "reference") for name in REFERENCE_MUTANTS),
        *(pytest.param(name, BEST, marks=needs_extension) for name in CPU_MUTANTS),
    ],
)
def test_mutants_are_caught(name: str, impl: str, tmp_path: Path) -> None:
    old, new = (MUTANTS | REFERENCE_MUTANTS | CPU_MUTANTS)[name]
    mutant = load_mutant("kernels.row_attention", {old: new} | OF_ITS_OWN, tmp_path)
    # What a mistake does to shapes may also stop torch, or the binding.
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        _check_all(mutant, impl)


# Queries are listed by the same lines at every level; one of them compiles faster.
PORTABLE_ALONE = {"#if defined(PROTNEST_X86_LEVELS)": "#if 0"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CPP_MUTANTS)
def test_cpp_mutants_are_caught(name: str, attention_rest: list[Path], tmp_path: Path) -> None:
    changes = PORTABLE_ALONE | CPP_MUTANTS[name]
    mutant = load_cpp_mutant(["rotary_attention.cpp"], changes, attention_rest, tmp_path, "-O0")
    with mock.patch.object(cpu_kernels, "load", return_value=mutant), pytest.raises(AssertionError, match="portable, "):
        _check_all(module, "portable")


@pytest.mark.slow
def test_cpp_that_is_not_broken_is_not_caught(attention_rest: list[Path], tmp_path: Path) -> None:
    same = load_cpp_mutant(["rotary_attention.cpp"], PORTABLE_ALONE, attention_rest, tmp_path, "-O0")
    with mock.patch.object(cpu_kernels, "load", return_value=same):
        _check_all(module, "portable")


# Errors


def _given(**changes: Any) -> dict[str, Any]:
    case = make_case((2, 0, 4), 16, heads=2)
    given = {
        "qkv": case.qkv.values_NO,
        "table": case.table,
        "cu_seqlens": case.cu_seqlens,
        "lengths_B": case.lengths_B,
        "heads": 2,
        "index_R": torch.tensor([1, 5, 2]),
        "counts_B": (1, 0, 2),
    }
    return given | changes


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "qkv": ({"qkv": torch.zeros(6, 90)}, "qkv has shape (6, 90), expected (T, 3 x 2 heads x an even head width)"),
    "lengths": ({"lengths_B": (2, 0, 3)}, "3 lengths adding up to 5 and cu_seqlens of shape (4,) do not describe 6"),
    "table": (
        {"table": RotaryTable(torch.ones(3, 8), torch.ones(3, 8))},
        "the rotary tables have shapes (3, 8) and (3, 8), expected (4 or more, 8)",
    ),
    "bias": (
        {"qkv": Product(torch.zeros(6, 96), torch.ones(95))},
        "got ['torch.float32', 'torch.float32'] of shapes [(6, 96), (95,)]",
    ),
    "rows with an axis too many": (
        {"index_R": torch.tensor([[1, 5, 2]])},
        "torch.int64 rows (1, 3) and 3 counts for 3 sequences",
    ),
    "rows of 32 bits": (
        {"index_R": torch.tensor([1, 5, 2], dtype=torch.int32)},
        "torch.int32 rows (3,) and 3 counts for 3 sequences",
    ),
    "rows as a mask": (
        {"index_R": torch.tensor([True, False, True])},
        "torch.bool rows (3,) and 3 counts for 3 sequences",
    ),
    "counts too few": ({"counts_B": (1, 2)}, "torch.int64 rows (3,) and 2 counts for 3 sequences"),
    "counts too many": ({"counts_B": (1, 0, 2, 0)}, "torch.int64 rows (3,) and 4 counts for 3 sequences"),
    "rows of a sequence without tokens": ({"counts_B": (1, 1, 1)}, "torch.int64 rows (3,) and 3 counts for 3"),
    "fewer than no rows": ({"counts_B": (4, 0, -1)}, "torch.int64 rows (3,) and 3 counts for 3 sequences"),
    "counts of fewer rows": ({"counts_B": (1, 0, 1)}, "counts add up to 2, but there are 3 rows"),
    "counts of more rows": ({"counts_B": (2, 0, 2)}, "counts add up to 4, but there are 3 rows"),
    "impl": ({"impl": "sdpa"}, "impl is 'sdpa'; allowed: auto, reference, torch, cpu"),
}


@each_name
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        row_attention(**_given(**({"impl": impl} | changes)))


@each_name
def test_the_input_that_errors_are_made_of_is_good(impl: str) -> None:
    assert row_attention(**_given(), impl=impl).shape == (3, 32)


OUTSIDE = "a row lies outside of its sequence"
FALLS = "cu_rows falls, or rises beyond the rows"
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "after its sequence": ({"index_R": torch.tensor([2, 5, 2])}, OUTSIDE),
    "before its sequence": ({"index_R": torch.tensor([1, 5, 1])}, OUTSIDE),
    "after the batch": ({"index_R": torch.tensor([1, 6, 2])}, OUTSIDE),
    "before the batch": ({"index_R": torch.tensor([-1, 5, 2])}, OUTSIDE),
}


@needs_extension
@pytest.mark.parametrize("impl", ["cpu", "auto"])
@pytest.mark.parametrize(("changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_cpp_refuses_rows(changes: dict[str, Any], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_attention(**_given(**changes), impl=impl)


def _arrays(**changes: Any) -> dict[str, Any]:
    """Arguments of the binding: six tokens in sequences of 2, 0 and 4, two heads of 8; values are their tokens."""
    qkv = np.zeros((6, 48), np.float32)
    qkv[:, 32:] = np.arange(6)[:, None]
    given = {
        "qkv": (qkv, *[None] * 5),
        "cos": np.ones((4, 4), np.float32),
        "sin": np.zeros((4, 4), np.float32),
        "cu_seqlens": np.array([0, 2, 2, 6], np.int32),
        "heads": 2,
        "level": "portable",
        "pairs": False,
        "threads": 1,
        "out": np.full((3, 16), np.nan, np.float32),
        "rows": np.array([1, 5, 2]),
        "cu_rows": np.array([0, 1, 1, 3]),
    }
    return given | changes


TOGETHER, DESCRIBES = "rows and cu_rows go together", "cu_rows does not describe the rows of these sequences"
LAYOUT = "has not the size, the dtype or the layout"
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows alone": ({"cu_rows": None}, ValueError, TOGETHER),
    "cu_rows alone": ({"rows": None, "out": np.zeros((6, 16), np.float32)}, ValueError, TOGETHER),
    "neither, and out of other tokens": ({"rows": None, "cu_rows": None}, ValueError, LAYOUT),
    "out of all tokens": ({"out": np.zeros((6, 16), np.float32)}, ValueError, LAYOUT),
    "out of fewer rows": ({"out": np.zeros((2, 16), np.float32)}, ValueError, LAYOUT),
    "qkv of more tokens": ({"qkv": (np.zeros((7, 48), np.float32), *[None] * 5)}, ValueError, LAYOUT),
    "ends fall": ({"cu_seqlens": np.array([0, 4, 2, 6], np.int32)}, ValueError, "cu_seqlens falls"),
    "rows in floats": ({"rows": np.array([1.0, 5.0, 2.0])}, TypeError, "incompatible function arguments"),
    "cu_rows in floats": ({"cu_rows": np.array([0.0, 1, 1, 3])}, TypeError, "incompatible function arguments"),
    "cu_rows too short": ({"cu_rows": np.array([0, 1, 3])}, ValueError, DESCRIBES),
    "cu_rows too long": ({"cu_rows": np.array([0, 1, 1, 3, 3])}, ValueError, DESCRIBES),
    "no cu_rows": ({"cu_rows": np.zeros(0, np.int64)}, ValueError, DESCRIBES),
    "cu_rows not from 0": ({"cu_rows": np.array([1, 1, 1, 3])}, ValueError, DESCRIBES),
    "cu_rows to fewer": ({"cu_rows": np.array([0, 1, 1, 2])}, ValueError, DESCRIBES),
    "cu_rows to more": ({"cu_rows": np.array([0, 1, 1, 4])}, ValueError, DESCRIBES),
    "cu_rows fall": ({"cu_rows": np.array([0, 1, 0, 3])}, ValueError, FALLS),
    "cu_rows fall below 0": ({"cu_rows": np.array([0, -1, -1, 3])}, ValueError, FALLS),
    # Read before what falls after it was seen, the numbers behind the rows would be taken for rows.
    "cu_rows beyond the rows": (
        {
            "cu_seqlens": np.array([0, 4, 4, 6], np.int32),
            "rows": np.array([1, 2, 3]),
            "cu_rows": np.array([0, 4, 4, 3]),
        },
        ValueError,
        FALLS,
    ),
    "rows of no tokens": ({"cu_rows": np.array([0, 1, 2, 3])}, ValueError, "a row lies outside of its sequence"),
    "a row of the next sequence": ({"rows": np.array([2, 5, 2])}, ValueError, OUTSIDE),
    "a row of the one before": ({"rows": np.array([1, 5, 1])}, ValueError, OUTSIDE),
    "a row after all": ({"rows": np.array([1, 5, 6])}, ValueError, OUTSIDE),
    "a row before all": ({"rows": np.array([-1, 5, 2])}, ValueError, OUTSIDE),
}


@needs_extension
@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_binding_refuses(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    assert _extension is not None
    given = _arrays(**changes)
    before = given["out"].copy()
    with pytest.raises(kind, match=message):
        _extension.rotary_attention(**given)
    np.testing.assert_array_equal(given["out"], before)


@needs_extension
@pytest.mark.parametrize("threads", [-1, 0, 1, 2, 1000])
@pytest.mark.parametrize(
    ("rows", "cu_rows", "means"),
    [
        ([1, 5, 2], [0, 1, 1, 3], [0.5, 3.5, 3.5]),
        ([0, 0], [0, 2, 2, 2], [0.5, 0.5]),  # as many as tokens
        ([5, 4, 3, 2], [0, 0, 0, 4], [3.5] * 4),
        ([], [0, 0, 0, 0], []),
    ],
)
def test_binding_writes_each_row(rows: list[int], cu_rows: list[int], means: list[float], threads: int) -> None:
    """Scores are all 0: a row is the mean of its sequence's tokens. `out` lies between NaN, which stays."""
    assert _extension is not None
    around = np.full((len(rows) + 8, 16), np.nan, np.float32)
    parts = {"rows": np.array(rows, np.int64), "cu_rows": np.array(cu_rows), "out": around[4:-4]}
    _extension.rotary_attention(**_arrays(**parts, threads=threads))
    expected = np.repeat(np.array(means, np.float32)[:, None], 16, axis=1)
    np.testing.assert_allclose(around[4:-4], expected.reshape(-1, 16), rtol=1e-6)
    assert np.isnan(around[:4]).all()
    assert np.isnan(around[-4:]).all()
