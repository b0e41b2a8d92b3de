"""cached_attention: every level against fp64 gold, what it writes and leaves, the same bits in any company, NaN, steps
beside causal attention of the whole, choices, errors, mutants.

The file is long because Python and the binding each refuse what they must, one line a refusal.

Shapes: B sequences, S slots, P places, L tokens of a sequence with the new one, H heads, K head width, C = 3 H K.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.kernels import cached_attention as module
from protnest.kernels import cpu_kernels
from protnest.kernels.cached_attention import KeyValueCache, cache_prompts, cached_attention
from protnest.kernels.cpu_kernels import LEVELS, array, cpu_level, product_arrays
from protnest.kernels.extension import load, missing_reason
from protnest.kernels.product import Product, Scales
from protnest.kernels.varlen_attention import varlen_attention
from torch._subclasses.fake_tensor import FakeTensorMode

from support.attention_cases import guarded, guarded_product
from support.cached_cases import HEADS, LENGTHS, OF_SLOTS, Case, find_failure, make_case
from support.cached_mutants import CPP_MUTANTS, PYTHON_MUTANTS
from support.poisoned import poisoned_memory
from support.source_mutants import compile_rest, load_cpp_mutant, load_mutant

_extension = load()
BEST = _extension.best_level() if _extension is not None else ""


def _level(level: str) -> Any:
    lacking = not BEST or LEVELS.index(level) > LEVELS.index(BEST)
    reason = f"{level}: {missing_reason() or f'this processor runs {BEST}'}"
    return pytest.param(level, marks=pytest.mark.skipif(lacking, reason=reason))


each_level = pytest.mark.parametrize("impl", [*map(_level, LEVELS)])
each_impl = pytest.mark.parametrize("impl", ["reference", "torch", *map(_level, LEVELS)])
needs_extension = pytest.mark.skipif(not BEST, reason=f"cpu: {missing_reason()}")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
each_stored = pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    with poisoned_memory():
        yield


def _run(
    impl: str, case: Case, cache: KeyValueCache | None = None, ops: ModuleType = module
) -> tuple[torch.Tensor, KeyValueCache]:
    """The result, and the cache after it."""
    cache = case.fresh() if cache is None else cache
    if impl in ("reference", "torch", "auto", "cpu"):
        return ops.cached_attention(case.qkv, cache, case.slots_B, case.lengths_B, impl=impl), cache
    out_BD: torch.Tensor = module._cached_attention(case.qkv.tensors(), *cache, case.slots_B, case.lengths_B, impl)
    return out_BD, cache


# Against gold

make_cached = functools.cache(make_case)
WIDTHS = {
    f"hostile, K = {K}, {name} in {stored}": functools.partial(make_cached, K, DTYPES[name], DTYPES[stored])
    for K in HEADS
    for name in DTYPES
    for stored in DTYPES
}
KINDS = {
    f"{kind}, K = {K}, in {stored}": functools.partial(make_cached, K, stored=DTYPES[stored], kind=kind)
    for kind, K in (("mild", 24), ("mild", 64), ("equal", 16), ("one takes all", 8), ("rising", 16))
    for stored in DTYPES
}
LEFT = {
    f"{left}, K = {K}, in {stored}": functools.partial(make_cached, K, stored=DTYPES[stored], left=left)
    for left in ("with bias", "integers")
    for K in (8, 40, 64)
    for stored in DTYPES
}
FEW = {
    "no sequence": functools.partial(make_cached, 16, lengths_B=(), slots_B=()),
    "one sequence": functools.partial(make_cached, 64, lengths_B=(77,), slots_B=(2,), slots=4),
    "one slot": functools.partial(make_cached, 16, lengths_B=(3,), slots_B=(0,), slots=1, places=4),
    "one place": functools.partial(make_cached, 16, lengths_B=(0, 0), slots_B=(1, 0), slots=2, places=1),
    "one head": functools.partial(make_cached, 16, lengths_B=(9, 3), slots_B=(1, 0), slots=2, heads=1),
    "long": functools.partial(make_cached, 128, lengths_B=(1023, 900), slots_B=(1, 0), slots=2, places=1024, heads=1),
}
CASES = WIDTHS | KINDS | LEFT | FEW


@each_impl
@pytest.mark.parametrize("name", CASES)
def test_within_bounds_of_gold(name: str, impl: str) -> None:
    case = CASES[name]()
    failure = find_failure(*_run(impl, case), case)
    assert failure is None, failure


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("left", ["numbers", "with bias"])
def test_exact_in_fp64(impl: str, left: str) -> None:
    case = make_case(24, torch.float64, torch.float64, left=left)
    failure = find_failure(*_run(impl, case), case)
    assert failure is None, failure


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("K", [1, 5, 20])
def test_any_head_width_in_torch(impl: str, K: int) -> None:
    case = make_case(2 * K, heads=2)
    halves = KeyValueCache(*(part[..., :K].contiguous() for part in case.cache))
    values_NO = case.qkv.values_NO.view(len(LENGTHS), 3, 2, 2 * K)[..., :K].flatten(1).contiguous()
    outputs = []
    for chosen in ("reference", impl):
        cache = KeyValueCache(*(part.clone() for part in halves))
        outputs.append(cached_attention(values_NO, cache, case.slots_B, case.lengths_B, impl=chosen))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def _check_writes(impl: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """`out` lies between NaN, which stays."""
    case = make_cached(24, dtype, stored)
    B, C = case.qkv.values_NO.shape
    around = torch.full((B + 64, C // 3), torch.nan, dtype=dtype)
    out_BD = around[32:-32]
    cache = case.fresh()
    given = (product_arrays(case.qkv), *map(array, (*cache, case.slots_B, case.lengths_B)), impl, 1, array(out_BD))
    cpu_kernels.module().cached_attention(*given)
    assert around[:32].isnan().all()
    assert around[-32:].isnan().all()
    assert torch.equal(out_BD, _run(impl, case)[0])


@each_level
@each_stored
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_writes_its_own_rows_only(impl: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    _check_writes(impl, dtype, stored)


# By hand


def _attend_to_scores(impl: str, stored: torch.dtype, scores_L: torch.Tensor, values_L: torch.Tensor) -> float:
    """What a token gets where key u has score u and value u; the last ones are its own."""
    L, K = len(scores_L), 16
    cache = KeyValueCache(*(torch.full((2, 1, L + 5, K), torch.nan, dtype=stored) for _ in range(2)))
    cache.keys_SHPK[1, 0, : L - 1] = 0
    cache.keys_SHPK[1, 0, : L - 1, 3] = scores_L[:-1].to(stored)
    cache.values_SHPK[1, 0, : L - 1] = values_L[:-1, None].to(stored)
    qkv_3K = torch.zeros(3, K)
    qkv_3K[0, 3], qkv_3K[1, 3], qkv_3K[2] = K**0.5, scores_L[-1], values_L[-1]
    slots_B, lengths_B = torch.tensor([1]), torch.tensor([L - 1])
    if impl in LEVELS:
        out_BD = module._cached_attention([qkv_3K.view(1, -1)], *cache, slots_B, lengths_B, impl)
    else:
        out_BD = cached_attention(qkv_3K.view(1, -1), cache, slots_B, lengths_B, impl=impl)
    assert float(out_BD.max() - out_BD.min()) <= 1e-6 * float(values_L.abs().max())
    return float(out_BD[0, 0])


def _check_by_hand(impl: str, stored: torch.dtype) -> None:
    near = functools.partial(pytest.approx, rel=1e-6, abs=1e-6)
    L = 140
    values_L = torch.arange(L).float() - 12
    two = torch.full((L,), -300.0)
    two[[3, 130]] = 0
    assert _attend_to_scores(impl, stored, two, values_L) == near((values_L[3] + values_L[130]).item() / 2)
    for place in (0, 15, 16, 125, L - 2, L - 1):
        one = torch.full((L,), -300.0)
        one[place] = 0
        assert _attend_to_scores(impl, stored, one, values_L) == near(values_L[place].item())
    # Nothing lifts the largest score to 0, and e^-16 is 1e-7.
    for length in (1, 5, 6, L):
        low = torch.full((length,), -1024.0)
        low[(length + 1) // 2 :] = -1040
        expected = values_L[: (length + 1) // 2].mean().item()
        assert _attend_to_scores(impl, stored, low, values_L[:length]) == near(expected)
    # Whole numbers, which bf16 stores, of mean 0.
    rising_L = torch.arange(3001).float() % 201 - 100
    rising_L[3000] = -float(rising_L[:3000].sum())
    rising_L[3000] = rising_L[3000].to(stored)
    expected = float(rising_L.double().mean())
    assert _attend_to_scores(impl, stored, torch.zeros(3001), rising_L) == pytest.approx(expected, abs=1e-3)


@each_impl
@each_stored
def test_scores_and_values_by_hand(impl: str, stored: torch.dtype) -> None:
    _check_by_hand(impl, stored)


# What products leave


@each_impl
@pytest.mark.parametrize("left", ["with bias", "integers"])
def test_a_product_is_what_its_numbers_are(impl: str, left: str) -> None:
    """Powers of two and whole numbers: nothing is rounded before the scale."""
    case = make_case(16, kind="mild")
    B, C = case.qkv.values_NO.shape
    whole_BC, bias_C = (case.qkv.values_NO * 8).round(), torch.arange(C) % 3 / 2
    product = Product(whole_BC / 8, bias_C)
    if left == "integers":
        scales = Scales(2.0 ** (torch.arange(C) % 4), torch.arange(C) % 5 / 1, torch.full((B,), 0.125), torch.ones(B))
        product = Product(whole_BC.int(), bias_C, scales)
    results = []
    for qkv in (guarded_product(product), Product(guarded(product.numbers()))):
        cache = case.fresh()
        new = dataclasses.replace(case, new=dataclasses.replace(case.new, qkv=qkv))
        results.append((_run(impl, new, cache)[0], *cache))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


# The same bits


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SAME = {
    "fp32": functools.partial(make_cached, 64),
    "bf16 in bf16": functools.partial(make_cached, 40, torch.bfloat16, torch.bfloat16),
    "wide, in bf16": functools.partial(make_cached, 192, stored=torch.bfloat16),
    "integers": functools.partial(make_cached, 8, left="integers"),
}


@pytest.mark.usefixtures("_threads")
@each_level
@pytest.mark.parametrize("name", SAME)
def test_company_slots_and_threads_change_no_bit(impl: str, name: str) -> None:
    case = SAME[name]()
    together_BD, _ = _run(impl, case)
    picks = [
        (2, [5, 3, 0, 2, 13], [16, 15, 1, 0, 5]),
        (3, [*range(13, -1, -1)], [*range(14)]),
        (1, [3], [3]),
        (4, [*range(14)], list(OF_SLOTS)),
    ]
    for threads, order, slots in picks:
        torch.set_num_threads(threads)
        assert torch.equal(_run(impl, case.pick(order, slots))[0], together_BD[order])


@pytest.mark.usefixtures("_threads")
@each_level
def test_many_threads_have_work(impl: str) -> None:
    """Enough of it that all of them run."""
    case = make_cached(128, lengths_B=(500, 30, 499, 511), slots_B=(3, 0, 2, 1), slots=4, places=512)
    torch.set_num_threads(1)
    alone_BD, _ = _run(impl, case)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        got_BD, cache = _run(impl, case)
        assert torch.equal(got_BD, alone_BD)
        assert find_failure(got_BD, cache, case) is None


# Numbers that are none

PAYLOAD = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)


def _broken(case: Case, part: str, value: float | str) -> Case:
    """Sequence 0, of slot 3, has `value` in one channel of head 1."""
    number = PAYLOAD[0] if value == "payload" else torch.tensor(float(value))
    qkv = case.qkv.values_NO.clone().view(len(LENGTHS), 3, case.new.heads, -1)
    cache = KeyValueCache(*(part_SHPK.clone() for part_SHPK in case.cache))
    if part.startswith("old"):
        stored = cache.keys_SHPK if part == "old key" else cache.values_SHPK
        stored[3, 1, 7, 5] = number.to(stored.dtype)
    else:
        qkv[0, ("query", "key", "value").index(part), 1, 5] = number.to(qkv.dtype)
    new = dataclasses.replace(case.new, qkv=Product(guarded(qkv.flatten(1))))
    return dataclasses.replace(case, new=new, cache=cache)


def _check_not_numbers(impl: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    case = make_cached(16, dtype, stored)
    clean_BHK = _run(impl, case)[0].view(len(LENGTHS), 3, 16)
    elsewhere = torch.ones(clean_BHK.shape, dtype=torch.bool)
    elsewhere[0, 1] = False
    parts = ("query", "key", "value", "old key", "old value")
    for part, value in itertools.product(parts, (torch.nan, "payload", torch.inf, -torch.inf)):
        broken = _broken(case, part, value)
        got_BD, cache = _run(impl, broken)
        assert torch.equal(got_BD.view(clean_BHK.shape)[elsewhere], clean_BHK[elsewhere])
        failure = find_failure(got_BD, cache, broken)
        assert failure is None, f"{part}, {value}: {failure}"


@pytest.mark.parametrize("impl", ["torch", *map(_level, LEVELS)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@each_stored
def test_not_a_number_stays_in_its_sequence_and_head(impl: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    _check_not_numbers(impl, dtype, stored)


# Steps and prompts


@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
def test_steps_are_causal_attention(impl: str) -> None:
    """Prompts of some lengths, then tokens one by one; sequences end, and a slot is used anew."""
    H, K, S = 3, 8, 4
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn((L, 3 * H * K), generator=generator) for L in (13, 9, 21, 6)]
    expected = []
    for qkv_LC in whole:
        q, k, v = qkv_LC.double().view(-1, 3, H, K).unbind(1)
        ends = torch.tensor([0, len(qkv_LC)], dtype=torch.int32)
        expected.append(varlen_attention(q, k, v, ends, [len(qkv_LC)], causal=True, impl="reference").flatten(1))
    cache = KeyValueCache.empty(S, H, 4, K)
    slot_of, done = {0: 2, 1: 0, 2: 3}, {0: 4, 1: 1, 2: 0}  # sequence 3 comes when sequence 1 has ended
    prompts = [done[b] for b in slot_of]
    packed = torch.cat([whole[b][: done[b]] for b in slot_of])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(prompts)], dtype=torch.int32)
    cache_prompts(packed, cache, torch.tensor([*slot_of.values()]), cu_seqlens, prompts)
    for _ in range(30):
        if not slot_of:
            break
        cache = cache.grown(max(done.values()) + 1)
        running = sorted(slot_of, key=lambda b: -slot_of[b])
        rows = torch.stack([whole[b][done[b]] for b in running])
        slots_B, lengths_B = (torch.tensor([numbers[b] for b in running]) for numbers in (slot_of, done))
        for b, got_D in zip(running, cached_attention(rows, cache, slots_B, lengths_B, impl=impl), strict=True):
            torch.testing.assert_close(got_D.double(), expected[b][done[b]], rtol=1e-5, atol=1e-5)
            done[b] += 1
            if done[b] == len(whole[b]):
                slot = slot_of.pop(b)
                if b == 1:
                    slot_of[3], done[3] = slot, 0
    assert done == {0: 13, 1: 9, 2: 21, 3: 6}


@each_stored
@pytest.mark.parametrize("left", ["numbers", "with bias"])
def test_prompts_reach_their_places_and_no_other(stored: torch.dtype, left: str) -> None:
    case = make_case(8, lengths_B=(0,) * 9, slots_B=range(9), slots=12, places=5, left=left)
    lengths_B, slots_B = [3, 0, 5, 1], torch.tensor([7, 2, 0, 11])
    cache = KeyValueCache.empty(12, 5, 5, 8, dtype=stored)
    ends = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    cache_prompts(case.qkv, cache, slots_B, ends, lengths_B)
    numbers = case.qkv.numbers().view(9, 3, 5, 8)
    for part, stored_SHPK in enumerate(cache, start=1):
        expected = torch.full((12, 5, 5, 8), torch.nan, dtype=stored)
        for slot, begin, length in zip(slots_B.tolist(), ends.tolist(), lengths_B, strict=False):
            expected[slot, :, :length] = numbers[begin : begin + length, part].transpose(0, 1).to(stored)
        assert torch.equal(stored_SHPK.nan_to_num(9), expected.nan_to_num(9))


def test_no_prompts() -> None:
    cache = KeyValueCache.empty(2, 1, 3, 8)
    cache_prompts(torch.zeros(0, 24), cache, torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), [])
    assert all(part.isnan().all() for part in cache)


def test_cache_shapes_and_growth() -> None:
    cache = KeyValueCache.empty(3, 2, 4, 8, dtype=torch.bfloat16)
    for part in cache:
        assert (part.shape, part.dtype, part.device.type) == ((3, 2, 4, 8), torch.bfloat16, "cpu")
        part.copy_(torch.randn(part.shape))
    assert cache.keys_SHPK.data_ptr() != cache.values_SHPK.data_ptr()
    assert cache.grown(4) is cache
    assert cache.grown(0) is cache
    for places, expected in ((5, 8), (8, 8), (9, 9), (100, 100)):
        larger = cache.grown(places)
        for new, old in zip(larger, cache, strict=True):
            assert (new.shape, new.dtype) == ((3, 2, expected, 8), torch.bfloat16)
            assert torch.equal(new[:, :, :4], old)
            assert new.data_ptr() != old.data_ptr()
    first = cache.first(2)
    for part, whole in zip(first, cache, strict=True):
        assert part.shape == (3, 2, 2, 8)
        assert part.data_ptr() == whole.data_ptr()
        assert torch.equal(part, whole[:, :, :2])


@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
def test_first_places_of_a_cache(impl: str) -> None:
    case = make_cached(16, lengths_B=(4, 1), slots_B=(1, 0), slots=2)
    cache = case.fresh()
    got_BD = cached_attention(case.qkv, cache.first(5), case.slots_B, case.lengths_B, impl=impl)
    assert find_failure(got_BD, cache, case) is None


# Mutants

MUTANT_CASES = (
    *("hostile, K = 8, fp32 in fp32", "hostile, K = 24, bf16 in bf16", "hostile, K = 40, fp32 in bf16"),
    *("hostile, K = 192, fp32 in fp32", "hostile, K = 192, fp32 in bf16", "hostile, K = 128, fp32 in fp32"),
    *("mild, K = 24, in fp32", "mild, K = 64, in bf16", "rising, K = 16, in fp32"),
    *("integers, K = 40, in fp32", "integers, K = 8, in bf16", "with bias, K = 64, in fp32"),
)


def _is_caught(impl: str) -> bool:
    """Whether a test of one level fails."""
    try:
        for dtype in DTYPES.values():
            _check_writes(impl, dtype, dtype)
            _check_by_hand(impl, dtype)
            _check_not_numbers(impl, dtype, dtype)
    except AssertionError:
        return True
    return any(find_failure(*_run(impl, CASES[name]()), CASES[name]()) is not None for name in MUTANT_CASES)


@pytest.fixture(scope="session")
def rest(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The extension's other files, compiled once."""
    if not BEST:
        pytest.skip(f"cpu: {missing_reason()}")
    return compile_rest("cached_attention", tmp_path_factory.mktemp("rest"))


def _levels_here() -> tuple[str, ...]:
    return LEVELS[: min(LEVELS.index(BEST), LEVELS.index("v4")) + 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CPP_MUTANTS)
def test_cpp_mutants_are_caught(name: str, rest: list[Path], tmp_path: Path) -> None:
    mutant = load_cpp_mutant(["cached_attention.cpp", "lanes.hpp"], CPP_MUTANTS[name], rest, tmp_path, "-O1")
    with mock.patch.object(cpu_kernels, "load", return_value=mutant):
        assert any(map(_is_caught, _levels_here())), f"nothing notices: {name}"


@pytest.mark.slow
def test_what_is_not_broken_is_not_caught(rest: list[Path], tmp_path: Path) -> None:
    same = load_cpp_mutant(["cached_attention.cpp", "lanes.hpp"], {}, rest, tmp_path, "-O1")
    with mock.patch.object(cpu_kernels, "load", return_value=same):
        assert not any(map(_is_caught, _levels_here()))


def _python_is_caught(impl: str, ops: ModuleType) -> bool:
    names = (
        "hostile, K = 24, fp32 in fp32",
        "mild, K = 24, in fp32",
        "with bias, K = 8, in fp32",
        "integers, K = 8, in fp32",
    )
    for name in names:
        case = CASES[name]()
        try:
            if find_failure(*_run(impl, case, ops=ops), case) is not None:
                return True
        except (RuntimeError, IndexError):  # what a mistake does to shapes may also stop torch
            return True
    return False


@pytest.mark.parametrize("name", PYTHON_MUTANTS)
def test_python_mutants_are_caught(name: str, tmp_path: Path) -> None:
    impl, old, new = PYTHON_MUTANTS[name]
    # An operation can be registered once.
    text = {
        old: new,
        "protnest::cached_attention": f"protnest_mutant::cached_attention_{list(PYTHON_MUTANTS).index(name)}",
    }
    assert _python_is_caught(impl, load_mutant("kernels.cached_attention", text, tmp_path))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_true_python_is_not_caught(impl: str) -> None:
    assert not _python_is_caught(impl, module)


# Which implementation runs


def _given(dtype: torch.dtype = torch.float32, K: int = 16, left: str = "numbers", **changes: Any) -> dict[str, Any]:
    case = make_case(K, dtype, lengths_B=(2, 0, 4), slots_B=(3, 0, 1), slots=4, places=5, heads=2, left=left)
    given = {"qkv": case.qkv.values_NO, "cache": case.fresh(), "slots_B": case.slots_B, "lengths_B": case.lengths_B}
    return given | ({} if left == "numbers" else {"qkv": case.qkv}) | changes


@pytest.fixture
def _fresh_level() -> Iterator[None]:
    """`cpu_level` of a new process, and the true one again afterwards."""
    cpu_level.cache_clear()
    yield
    cpu_level.cache_clear()


@needs_extension
@pytest.mark.usefixtures("_fresh_level")
@pytest.mark.parametrize("level", [*LEVELS[: LEVELS.index(BEST) + 1], ""] if BEST else [""])
def test_level_by_the_environment(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTNEST_CPU_LEVEL", level)
    case = make_cached(128)
    assert torch.equal(_run("cpu", case)[0], _run(level or BEST, case)[0])


def _other_cache(dtype: torch.dtype = torch.float32) -> KeyValueCache:
    return KeyValueCache(*(torch.zeros((4, 2, 5, 16), dtype=dtype) for _ in range(2)))


NOT_CPU: dict[str, tuple[Any, str]] = {
    "fp64": (lambda: _given(torch.float64), "dtype is torch.float64, not fp32 or bf16"),
    "a cache of fp16": (
        lambda: _given(cache=_other_cache(torch.float16)),
        "the cache is of torch.float16, not fp32 or",
    ),
    "a cache of fp64": (
        lambda: _given(cache=_other_cache(torch.float64)),
        "the cache is of torch.float64, not fp32 or",
    ),
    "narrow heads": (lambda: _given(K=20), "the head width is 20, no multiple of 8"),
    "bias in bf16": (lambda: _given(torch.bfloat16, left="with bias"), "a bias is left to be added in bf16"),
    "the first places": (lambda: _given(cache=_other_cache().grown(6).first(5)), "the cache is not contiguous"),
}


@needs_extension
@pytest.mark.parametrize(("make", "reason"), NOT_CPU.values(), ids=NOT_CPU)
def test_auto_runs_torch_and_says_why_once(make: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    outputs = [cached_attention(**make()) for _ in range(2)]
    assert torch.equal(outputs[0], cached_attention(**make(), impl="torch"))
    (message,) = caplog.messages
    assert message.startswith("cached_attention: auto runs torch: ")
    assert reason in message
    with pytest.raises(RuntimeError, match=rf"impl='cpu' cannot run here: .*{re.escape(reason)}"):
        cached_attention(**make(), impl="cpu")


@needs_extension
def test_auto_runs_the_extension_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    for _ in range(2):
        assert torch.equal(cached_attention(**_given()), cached_attention(**_given(), impl="cpu"))
    assert caplog.messages == ["cached_attention: auto runs cpu"]


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    monkeypatch.setattr(cpu_kernels, "missing_reason", lambda: "it is not built")
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    assert torch.equal(cached_attention(**_given()), cached_attention(**_given(), impl="torch"))
    assert caplog.messages == ["cached_attention: auto runs torch: it is not built"]
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run here: it is not built"):
        cached_attention(**_given(), impl="cpu")


@needs_extension
def test_inputs_of_other_layouts_and_left_alone() -> None:
    given = _given(left="integers")
    tensors = [*given["qkv"].tensors(), given["slots_B"], given["lengths_B"]]
    before = [tensor.clone() for tensor in tensors]
    expected = cached_attention(**given, impl="cpu")
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
    strided = [tensor.T.contiguous().T if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2] for tensor in tensors]
    turned = _given(qkv=Product.of(strided[:6]), slots_B=strided[6], lengths_B=strided[7])
    assert torch.equal(cached_attention(**turned, impl="cpu"), expected)


def test_on_a_gpu_nothing_waits_for_the_host() -> None:
    """Tensors of the device "meta" have no numbers: whoever asks for one fails."""
    numbers = torch.empty((3, 96), device="meta", dtype=torch.bfloat16)
    cache = KeyValueCache.empty(4, 2, 5, 16, dtype=torch.bfloat16, device="meta")
    slots_B = torch.empty(3, dtype=torch.int64, device="meta")
    for impl in ("auto", "torch"):
        out_BD = cached_attention(numbers, cache, slots_B, slots_B, impl=impl)
        assert (out_BD.shape, out_BD.dtype, out_BD.device.type) == ((3, 32), torch.bfloat16, "meta")
    cache_prompts(numbers, cache, slots_B[:2], torch.empty(3, dtype=torch.int32, device="meta"), [1, 2])
    with pytest.raises(RuntimeError, match="meta"):
        cached_attention(numbers, cache, slots_B, slots_B, impl="reference")


@needs_extension
def test_who_traces_meets_the_operator() -> None:
    """C++ cannot read tensors without numbers; the operator says what shape comes out."""
    given = _given(left="integers")
    with FakeTensorMode() as mode:
        fake: Any = mode.from_tensor
        qkv, cache = Product.of([*map(fake, given["qkv"].tensors())]), KeyValueCache(*map(fake, given["cache"]))
        out_BD = cached_attention(qkv, cache, fake(given["slots_B"]), fake(given["lengths_B"]), impl="cpu")
    assert (out_BD.shape, out_BD.dtype) == ((3, 32), torch.float32)


@needs_extension
@pytest.mark.parametrize("left", ["numbers", "with bias", "integers"])
def test_opcheck(left: str) -> None:
    given = _given(left=left)
    tensors = given["qkv"].tensors() if left != "numbers" else [given["qkv"]]
    # opcheck compares what it writes, and NaN is not equal to itself.
    cache = (part.nan_to_num() for part in given["cache"])
    arguments = (tensors, *cache, given["slots_B"], given["lengths_B"], BEST)
    torch.library.opcheck(module._cached_attention.definition, arguments)


# Errors


def _index(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rows of another width": ({"qkv": torch.zeros(3, 95)}, "the product has shape (3, 95), expected (N, 96)"),
    "an axis too many": ({"qkv": torch.zeros(1, 3, 96)}, "the product has shape (1, 3, 96), expected (N, 96)"),
    "rows of integers": ({"qkv": torch.zeros(3, 96, dtype=torch.int32)}, "got ['torch.int32'] of shapes [(3, 96)]"),
    "slots too few": ({"slots_B": _index(3, 0)}, "must be int64 (3,), got torch.int64 (2,), torch.int64 (3,)"),
    "lengths too many": (
        {"lengths_B": _index(2, 0, 4, 1)},
        "must be int64 (3,), got torch.int64 (3,), torch.int64 (4,)",
    ),
    "slots of 32 bits": (
        {"slots_B": _index(3, 0, 1).int()},
        "must be int64 (3,), got torch.int32 (3,), torch.int64 (3,)",
    ),
    "lengths of 32 bits": ({"lengths_B": _index(3, 0, 1).int()}, "got torch.int64 (3,), torch.int32 (3,)"),
    "slots with an axis": ({"slots_B": _index(3, 0, 1)[:, None]}, "must be int64 (3,), got torch.int64 (3, 1), "),
    "a slot that is not there": (
        {"slots_B": _index(3, 4, 1)},
        "sequence 1: place 0 of slot 4, but there are 5 places of 4",
    ),
    "a slot below 0": (
        {"slots_B": _index(3, 0, -1)},
        "sequence 2: place 4 of slot -1, but there are 5 places of 4 slots",
    ),
    "a full slot": ({"lengths_B": _index(5, 0, 4)}, "sequence 0: place 5 of slot 3, but there are 5 places of 4 slots"),
    "a length below 0": ({"lengths_B": _index(2, -1, 4)}, "sequence 1: place -1 of slot 0, but there are 5 places"),
    "a slot twice": ({"slots_B": _index(3, 1, 3)}, "sequences 0 and 2 share slot 3"),
    "values of other places": (
        {"cache": KeyValueCache(torch.zeros(4, 2, 5, 16), torch.zeros(4, 2, 6, 16))},
        "keys and values must share one shape (S, H, P, K) and a floating dtype, got (4, 2, 5, 16) of torch.float32 "
        "and (4, 2, 6, 16) of torch.float32",
    ),
    "values of another dtype": (
        {"cache": KeyValueCache(torch.zeros(4, 2, 5, 16), torch.zeros(4, 2, 5, 16).bfloat16())},
        "got (4, 2, 5, 16) of torch.float32 and (4, 2, 5, 16) of torch.bfloat16",
    ),
    "a cache of integers": (
        {"cache": _other_cache(torch.int32)},
        "and a floating dtype, got (4, 2, 5, 16) of torch.int32",
    ),
    "a cache without heads": (
        {"cache": KeyValueCache(torch.zeros(4, 5, 32), torch.zeros(4, 5, 32))},
        "must share one shape (S, H, P, K) and a floating dtype, got (4, 5, 32)",
    ),
    "impl": ({"impl": "triton"}, "impl is 'triton'; allowed: auto, reference, torch, cpu"),
    "a cache elsewhere": (
        {"cache": KeyValueCache(*(torch.zeros((4, 2, 5, 16), device="meta") for _ in range(2)))},
        "qkv, cache and slots must be on one device, got cpu, meta",
    ),
    "lengths elsewhere": ({"lengths_B": _index(2, 0, 4).to("meta")}, "lengths are on meta, slots on cpu"),
}
each_way = pytest.mark.parametrize("impl", ["reference", "torch", pytest.param("cpu", marks=needs_extension)])


@each_way
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], message: str, impl: str) -> None:
    given = _given(impl=impl) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        cached_attention(**given)


@each_way
def test_gradients_are_refused(impl: str) -> None:
    for given in (_given(qkv=torch.zeros(3, 96, requires_grad=True)), _given()):
        if not given["qkv"].requires_grad:
            given["cache"].values_SHPK.requires_grad_()
        with pytest.raises(RuntimeError, match=r"gradients are asked for, .*: run under torch\.inference_mode\(\)"):
            cached_attention(**given, impl=impl)
    with torch.no_grad():
        cached_attention(**_given(qkv=torch.zeros(3, 96, requires_grad=True)), impl=impl)


BAD_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "lengths add up to less": ({"lengths_B": [1, 1]}, "2 lengths adding up to 2, cu_seqlens of shape (3,) and slots"),
    "lengths too few": (
        {"lengths_B": [3]},
        "1 lengths adding up to 3, cu_seqlens of shape (3,) and slots torch.int64 (2,)",
    ),
    "slots too few": ({"slots_B": _index(1)}, "cu_seqlens of shape (3,) and slots torch.int64 (1,) do not describe 3"),
    "slots of 32 bits": ({"slots_B": _index(1, 0).int()}, "and slots torch.int32 (2,) do not describe 3 tokens"),
    "a slot twice": ({"slots_B": _index(1, 1)}, "sequences 0 and 1 share slot 1"),
    "a slot that is not there": (
        {"slots_B": _index(1, 4)},
        "sequence 1: place 1 of slot 4, but there are 5 places of 4",
    ),
    "too long": (
        {"cache": KeyValueCache.empty(4, 2, 1, 16)},
        "sequence 1: place 1 of slot 0, but there are 1 places of 4",
    ),
    "rows of another width": ({"qkv": torch.zeros(3, 95)}, "the product has shape (3, 95), expected (N, 96)"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "qkv": torch.zeros(3, 96),
        "cache": _other_cache(),
        "slots_B": _index(1, 0),
        "cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32),
        "lengths_B": [1, 2],
    }
    cache_prompts(**given)
    with pytest.raises(ValueError, match=re.escape(message)):
        cache_prompts(**given | changes)


def test_prompts_refuse_gradients() -> None:
    ends = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gradients are asked for"):
        cache_prompts(torch.zeros(3, 96, requires_grad=True), _other_cache(), _index(1), ends, [3])


def _arrays(**changes: Any) -> dict[str, Any]:
    """Arguments of the binding: three sequences, four slots of five places, two heads of 8."""
    given = {
        "qkv": (np.zeros((3, 48), np.float32), *[None] * 5),
        "keys": np.zeros((4, 2, 5, 8), np.float32),
        "values": np.zeros((4, 2, 5, 8), np.float32),
        "slots": np.array([3, 0, 1]),
        "lengths": np.array([2, 0, 4]),
        "level": "portable",
        "threads": 1,
        "out": np.full((3, 16), np.nan, np.float32),
    }
    return given | changes


def _floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


LAYOUT = "has not the size, the dtype or the layout"
NONE = (None,) * 5
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "keys of three axes": ({"keys": _floats(4, 2, 40)}, ValueError, "keys must have four dimensions"),
    "heads of 12": ({"keys": _floats(4, 2, 5, 12)}, ValueError, "as wide as a multiple of 8"),
    "heads of 0": ({"keys": _floats(4, 2, 5, 0)}, ValueError, "as wide as a multiple of 8"),
    "no heads": ({"keys": _floats(4, 0, 5, 8)}, ValueError, "heads must be some"),
    "keys in fp64": ({"keys": np.ones((4, 2, 5, 8))}, ValueError, LAYOUT),
    "keys by columns": ({"keys": np.asfortranarray(_floats(4, 2, 5, 8))}, ValueError, LAYOUT),
    "values too few": ({"values": _floats(3, 2, 5, 8)}, ValueError, LAYOUT),
    "values in bf16": ({"values": np.ones((4, 2, 5, 8), np.int16)}, ValueError, LAYOUT),
    "values by columns": ({"values": np.asfortranarray(_floats(4, 2, 5, 8))}, ValueError, LAYOUT),
    "qkv of fewer sequences": ({"qkv": (_floats(2, 48), *NONE)}, ValueError, LAYOUT),
    "qkv narrower": ({"qkv": (_floats(3, 47), *NONE)}, ValueError, LAYOUT),
    "qkv as a list": ({"qkv": ([1.0], *NONE)}, TypeError, "a product's values are an array"),
    "bias of bf16": (
        {"qkv": (np.zeros((3, 48), np.int16), _floats(48), *NONE[:4]), "out": np.zeros((3, 16), np.int16)},
        ValueError,
        "bf16 has its bias already",
    ),
    "integers alone": ({"qkv": (np.ones((3, 48), np.int32), *NONE)}, ValueError, "integers come with all five numbers"),
    "slots of 32 bits": ({"slots": np.array([3, 0, 1], np.int32)}, TypeError, "incompatible function arguments"),
    "lengths too few": ({"lengths": np.array([2, 0])}, ValueError, LAYOUT),
    "out too short": ({"out": _floats(2, 16)}, ValueError, LAYOUT),
    "out in bf16": ({"out": np.zeros((3, 16), np.int16)}, ValueError, LAYOUT),
    "out by columns": ({"out": np.asfortranarray(_floats(3, 16))}, ValueError, LAYOUT),
    "a slot that is not there": (
        {"slots": np.array([3, 4, 1])},
        ValueError,
        "sequence 1: place 0 of slot 4, but there",
    ),
    "a slot below 0": ({"slots": np.array([3, -1, 1])}, ValueError, "sequence 1: place 0 of slot -1, but there are 5"),
    "a full slot": (
        {"lengths": np.array([2, 0, 5])},
        ValueError,
        "sequence 2: place 5 of slot 1, but there are 5 places",
    ),
    "a length below 0": ({"lengths": np.array([-1, 0, 4])}, ValueError, "sequence 0: place -1 of slot 3"),
    "a slot twice": ({"slots": np.array([3, 1, 1])}, ValueError, "sequences 1 and 2 share slot 1"),
    "no such level": ({"level": "avx2"}, ValueError, "no level avx2; there are portable, v3, v4 and v4_bf16"),
}


@needs_extension
@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_binding_refuses(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    assert _extension is not None
    given = _arrays(**changes)
    with pytest.raises(kind, match=message):
        _extension.cached_attention(**given)


@needs_extension
@pytest.mark.parametrize("threads", [-1, 0, 1000])
def test_binding_takes_any_number_of_threads(threads: int) -> None:
    assert _extension is not None
    given = _arrays(threads=threads)
    given["qkv"][0][:, 32:] = 3
    _extension.cached_attention(**given)
    np.testing.assert_allclose(given["out"], 3 / np.array([[3], [1], [5]]).repeat(16, 1), rtol=1e-6)
