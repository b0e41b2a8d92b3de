"""row_attention: both implementations against fp64 gold, whatever rows are chosen; gradients, errors, mutants.

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
from protnest.kernels import row_attention as module
from protnest.kernels.linear import needs_widening
from protnest.kernels.product import Product, Scales
from protnest.kernels.rotary_attention import RotaryTable
from protnest.kernels.row_attention import row_attention

from support.attention_cases import Case, find_failure, guarded, guarded_product, make_case
from support.poisoned import poisoned_memory
from support.row_attention_mutants import MUTANTS, REFERENCE_MUTANTS
from support.source_mutants import load_mutant

each_impl = pytest.mark.parametrize("impl", ["reference", "torch"])


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    with poisoned_memory():
        yield


# Which rows

CHOICES = ("one each", "few", "all", "none", "twice", "ends", "one sequence")


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
            rows = [*rows[:3], *rows[:2]]
        elif choice == "ends":
            rows = [length - 1, 0] if length else []
        elif choice == "one sequence" and b != last:
            rows = []
        index += [begin + row for row in rows]
        counts.append(len(rows))
        begin += length
    return guarded(torch.tensor(index, dtype=torch.int64)), tuple(counts)


def _run(case: Case, index_R: torch.Tensor, counts_B: tuple[int, ...], impl: str, ops: Any = module) -> torch.Tensor:
    arguments = (case.qkv, case.table, case.cu_seqlens, case.lengths_B, case.heads, index_R, counts_B)
    out_RD: torch.Tensor = ops.row_attention(*arguments, impl=impl)
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


@pytest.mark.parametrize("lengths_B", [RAGGED, UNIFORM])
def test_auto_is_torch(lengths_B: tuple[int, ...]) -> None:
    case, rows = make_cached(lengths_B, 20), _choose(lengths_B, "few")
    assert torch.equal(_run(case, *rows, "auto"), _run(case, *rows, "torch"))
    arguments = (case.table, case.cu_seqlens, case.lengths_B, case.heads, *rows)
    assert torch.equal(row_attention(case.qkv.values_NO, *arguments), _run(case, *rows, "torch"))


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


# What products leave


@each_impl
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
    assert torch.equal(got_RD, expected_RD)


# Numbers that are none


@each_impl
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


@each_impl
def test_inputs_are_left_alone(impl: str) -> None:
    case, (index_R, counts_B) = make_case(RAGGED, 8, left="integers"), _choose(RAGGED, "few")
    tensors = [*case.qkv.tensors(), *case.table, case.cu_seqlens, index_R]
    before = [tensor.clone() for tensor in tensors]
    _run(case, index_R, counts_B, impl)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


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


def _check_all(ops: ModuleType, impl: str) -> None:
    for name in MUTANT_GIVEN:
        for lengths_B in MUTANT_COMPANIES:
            for choice in CHOICES:
                _check(GIVEN[name](lengths_B), *_choose(lengths_B, choice), impl, ops)


@each_impl
def test_what_is_not_broken_is_not_caught(impl: str, tmp_path: Path) -> None:
    _check_all(load_mutant("kernels.row_attention", {}, tmp_path), impl)


@pytest.mark.parametrize(
    ("name", "impl"), [*((name, "torch") for name in MUTANTS), *((name, "reference") for name in REFERENCE_MUTANTS)]
)
def test_mutants_are_caught(name: str, impl: str, tmp_path: Path) -> None:
    old, new = (MUTANTS | REFERENCE_MUTANTS)[name]
    mutant = load_mutant("kernels.row_attention", {old: new}, tmp_path)
    # What a mistake does to shapes may also stop torch.
    with pytest.raises((AssertionError, RuntimeError)):
        _check_all(mutant, impl)


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
    "impl": ({"impl": "cpu"}, "impl is 'cpu'; allowed: auto, reference, torch"),
}


@each_impl
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        row_attention(**_given(**({"impl": impl} | changes)))


def test_the_input_that_errors_are_made_of_is_good() -> None:
    assert row_attention(**_given()).shape == (3, 32)
