"""next_token: probabilities against a literal reference and transformers', choices of every level for numbers swept
over all boundaries, ties, samples that mislead, NaN, the same bits in any company, errors, mutants.

The file is long because Python and the binding each refuse what they must, one line a refusal.

Shapes: B sequences, S slots, T tokens that a sequence holds, V vocabulary, K tokens that stay.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.kernels import cpu_kernels
from protnest.kernels import next_token as module
from protnest.kernels.cpu_kernels import LEVELS, array, cpu_level, product_arrays
from protnest.kernels.extension import load, missing_reason
from protnest.kernels.next_token import NEVER, Filters, Limits, choose, next_probabilities, next_token
from protnest.kernels.product import Product

from support.attention_cases import guarded_product
from support.next_cases import MOST_ERROR, Case, Choose, find_failure, make_case
from support.next_mutants import CPP_MUTANTS, PYTHON_MUTANTS
from support.poisoned import poisoned_memory
from support.source_mutants import compile_rest, load_cpp_mutant, load_mutant

_extension = load()
BEST = _extension.best_level() if _extension is not None else ""
USUAL = min(BEST, "v4", key=LEVELS.index) if BEST else ""


def _level(level: str) -> Any:
    lacking = not BEST or LEVELS.index(level) > LEVELS.index(BEST)
    reason = f"{level}: {missing_reason() or f'this processor runs {BEST}'}"
    return pytest.param(level, marks=pytest.mark.skipif(lacking, reason=reason))


each_level = pytest.mark.parametrize("impl", [*map(_level, LEVELS)])
each_impl = pytest.mark.parametrize("impl", ["torch", *map(_level, LEVELS)])
each_way = pytest.mark.parametrize("impl", ["torch", _level("portable")])
needs_extension = pytest.mark.skipif(not BEST, reason=f"cpu: {missing_reason()}")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN, and the largest integers."""
    with poisoned_memory():
        yield


def _chooser(impl: str, ops: ModuleType = module) -> Choose:
    """`next_token` of an implementation, or of C++ at one level."""
    if impl not in LEVELS:

        def choose_by_name(logits: Any, seen_SV: Any, slots_B: Any, limits: Limits, *rest: Any) -> Any:
            # Limits of a broken twin are broken, too.
            return ops.next_token(logits, seen_SV, slots_B, ops.Limits(*limits), *rest, impl=impl)

        return choose_by_name

    def choose_at_level(*given: Any) -> Any:
        with mock.patch.object(ops, "cpu_level", return_value=impl):
            return ops.next_token(*given, impl="cpu")

    return choose_at_level


# Probabilities


def _logits(B: int, V: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((B, V), generator=generator) * 3 + 0.5


def _dense(ids_BK: torch.Tensor, p_BK: torch.Tensor, V: int) -> torch.Tensor:
    return torch.zeros((len(ids_BK), V), dtype=torch.float64).scatter_(1, ids_BK, p_BK)


def _mask(ids_BT: torch.Tensor, V: int) -> torch.Tensor:
    return torch.zeros((len(ids_BT), V), dtype=torch.bool).scatter_(1, ids_BT, True)


def _literal(logits_V: torch.Tensor, seen: list[int], forbidden: list[int], filters: Filters) -> list[float]:
    """One sequence, in plain Python, term by term."""
    scores = [float(value) for value in logits_V]
    for token in set(seen):
        value = scores[token]
        scores[token] = value * filters.repetition_penalty if value < 0 else value / filters.repetition_penalty
    for token in forbidden:
        scores[token] = -math.inf
    scores = [value / filters.temperature for value in scores]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    kept = order[: filters.top_k]
    most = max(scores[token] for token in kept)
    weight = {token: math.exp(scores[token] - most) for token in kept}
    total = sum(weight.values())
    if filters.top_p is not None:
        held, few = 0.0, []
        for token in kept:
            if held >= filters.top_p:
                break
            few.append(token)
            held += weight[token] / total
        weight = {token: weight[token] for token in few}
        total = sum(weight.values())
    return [weight.get(token, 0.0) / total for token in range(len(scores))]


CHOICES = [
    Filters(*each) for each in itertools.product((0.5, 1.0, 1.7), (None, 1, 5), (None, 0.3, 0.9), (1.0, 1.2, 0.8))
]
each_choice = pytest.mark.parametrize("filters", CHOICES, ids=lambda filters: "-".join(map(str, filters)))


@each_choice
def test_probabilities(filters: Filters) -> None:
    logits_BV = _logits(3, 40)
    seen_BT = torch.tensor([[1, 2, 2, 1], [5, 39, 0, 7], [3, 3, 3, 3]])
    forbidden_BV = torch.zeros((3, 40), dtype=torch.bool)
    forbidden_BV[1, [4, 8, 15]] = True
    before = logits_BV.clone()
    ids_BK, p_BK = next_probabilities(logits_BV, _mask(seen_BT, 40), forbidden_BV, filters)
    assert torch.equal(logits_BV, before)
    assert (ids_BK.dtype, p_BK.dtype) == (torch.int64, torch.float64)
    assert bool((ids_BK.diff(dim=1) > 0).all())
    np.testing.assert_allclose(p_BK.sum(dim=1), 1, rtol=0, atol=1e-12)
    got = _dense(ids_BK, p_BK, 40)
    case = make_case(40, filters, sizes="free", B=3)
    limits = Limits(torch.ones(40, dtype=torch.int32), 0, torch.ones(3, dtype=torch.int64), torch.ones(3) > 0)
    case = dataclasses.replace(
        case, logits=Product(logits_BV), seen_SV=_mask(seen_BT, 40), slots_B=torch.arange(3), limits=limits
    )
    for row, forbidden in enumerate(([], [4, 8, 15], [])):
        expected = _literal(logits_BV[row], seen_BT[row].tolist(), forbidden, filters)
        np.testing.assert_allclose(got[row].numpy(), expected, rtol=0, atol=1e-6)
        if not forbidden:  # by this gold all implementations are judged below
            np.testing.assert_allclose(case.gold[0][row], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("filters", CHOICES[::4], ids=lambda filters: "-".join(map(str, filters)))
def test_probabilities_are_those_of_transformers(filters: Filters) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits_BV, seen_BT = _logits(2, 300, seed=1), torch.tensor([[1, 2, 9], [5, 299, 0]])
    steps: list[Any] = [process.RepetitionPenaltyLogitsProcessor(filters.repetition_penalty)]
    steps.append(process.TemperatureLogitsWarper(filters.temperature))
    if filters.top_k is not None:
        steps.append(process.TopKLogitsWarper(filters.top_k))
    if filters.top_p is not None:
        steps.append(process.TopPLogitsWarper(filters.top_p))
    scores = logits_BV.clone()
    for step in steps:
        scores = step(seen_BT, scores)
    nothing_BV = torch.zeros((2, 300), dtype=torch.bool)
    got = _dense(*next_probabilities(logits_BV, _mask(seen_BT, 300), nothing_BV, filters), 300)
    np.testing.assert_allclose(got.numpy(), scores.softmax(dim=1).double().numpy(), rtol=0, atol=1e-5)


def test_limits_forbid() -> None:
    sizes_V = torch.tensor([0, 1, 2, NEVER, NEVER, 3], dtype=torch.int32)
    rooms = {2**40: "...#..", 3: "...#..", 2: "...#.#", 1: "..##.#", 0: "####.#", -7: "####.#"}
    for may_end in (True, False):
        room_B = torch.tensor([*rooms])
        got_BV = Limits(sizes_V, 4, room_B, torch.full((len(rooms),), may_end)).forbidden()
        expected = [[sign == "#" for sign in signs] for signs in rooms.values()]
        for row in expected:
            row[4] = not may_end
        expected[-1][5] = expected[-2][5] = True
        assert got_BV.tolist() == expected


def test_choices_follow_the_numbers() -> None:
    ids = torch.tensor([[2, 5, 7, 9]]).expand(5, 4)
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64).expand(5, 4)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.999999], dtype=torch.float64)
    assert choose(ids, p, uniform).tolist() == [2, 2, 7, 7, 9]


def test_a_share_of_nothing_is_never_chosen() -> None:
    p = torch.tensor([[0.5, 0.5 - 1e-17, 0.0]], dtype=torch.float64)
    last = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose(torch.tensor([[1, 2, 3]]), p, last).tolist() == [2]


# Choices


make_cached = functools.cache(make_case)
PLAIN, NUCLEUS = Filters(), Filters(1.3, None, 0.6, 0.8)
FEW, BOTH = Filters(0.7, 5, None, 1.2), Filters(0.9, 950, 0.9, 1.5)
SIZES = {
    f"{V} tokens, {sizes}, {'-'.join(map(str, filters))}": functools.partial(make_cached, V, filters, sizes=sizes)
    for V in (1, 5, 16, 33, 123)
    for sizes in ("pieces", "letters", "free")
    for filters in (PLAIN, NUCLEUS, FEW, BOTH)
}
KINDS = {
    f"{kind}, {'-'.join(map(str, filters))}": functools.partial(make_cached, 123, filters, kind=kind)
    for kind in ("sorted", "spikes", "large", "flat", "minus infinity", "few left")
    for filters in (PLAIN, NUCLEUS, FEW, BOTH)
}
LEFT = {
    f"{left}, {V} tokens": functools.partial(make_cached, V, BOTH, left=left)
    for left in ("with bias", "integers")
    for V in (33, 123)
}
EDGES = {
    "top_k 1": functools.partial(make_cached, 123, Filters(top_k=1)),
    "top_k but one": functools.partial(make_cached, 123, Filters(top_k=122), sizes="free"),
    "top_k of all": functools.partial(make_cached, 123, Filters(top_k=123), sizes="free"),
    "top_p of next to nothing": functools.partial(make_cached, 123, Filters(top_p=1e-12)),
    "top_p of nearly all": functools.partial(make_cached, 123, Filters(top_p=1 - 1e-4)),
    "top_p of all": functools.partial(make_cached, 123, Filters(top_p=1.0)),
    "cold": functools.partial(make_cached, 123, Filters(temperature=1e-310)),
    "hot": functools.partial(make_cached, 123, Filters(temperature=1e300)),
    "large penalty": functools.partial(make_cached, 123, Filters(repetition_penalty=50.0)),
    "few are allowed": functools.partial(make_cached, 1234, Filters(top_k=20), sizes="barely"),
}
WIDE = {
    f"50,257 tokens, {kind}, top_k {k}": functools.partial(make_cached, 50257, Filters(0.9, k, p, 1.2), kind=kind, B=3)
    for kind, k, p in (
        *(("random", 950, None), ("random", 40, 0.95), ("sorted", 950, None), ("spikes", 950, None)),
        *(("sampled spikes", 950, None), ("sampled spikes", 1500, None), ("few left", 950, None)),
    )
} | {
    "50,257 tokens, all stay": functools.partial(make_cached, 50257, Filters(1.5, None, None, 1.2), B=2),
    "50,257 tokens, few are allowed": functools.partial(
        make_cached, 50257, Filters(1.0, 950, None, 1.2), sizes="barely", B=3
    ),
    "50,257 tokens of integers": functools.partial(make_cached, 50257, Filters(0.8, 950, 0.9), left="integers", B=3),
    "4,096 tokens": functools.partial(make_cached, 4096, Filters(0.8, 200), B=3),
    "4,095 tokens": functools.partial(make_cached, 4095, Filters(0.8, 200), B=3),
}
TIES = {
    f"{kind}, {V} tokens, {'-'.join(map(str, filters))}": functools.partial(make_cached, V, filters, kind=kind, B=2)
    for kind in ("equal", "ties")
    for V, filters in (
        *((33, Filters(top_k=5)), (123, Filters(top_k=50)), (123, Filters(top_p=0.3)), (123, Filters(0.5, 40, 0.7))),
        (50257, Filters(1.0, 950, None, 1.2)),
    )
}


@each_impl
@pytest.mark.parametrize("name", SIZES | KINDS | LEFT | EDGES)
def test_choices(name: str, impl: str) -> None:
    """Each token is chosen by the numbers of its own share, up to 1e-5."""
    failure = find_failure(_chooser(impl), (SIZES | KINDS | LEFT | EDGES)[name]())
    assert failure is None, failure


@each_impl
@pytest.mark.parametrize("name", WIDE)
def test_choices_of_many_tokens(name: str, impl: str) -> None:
    failure = find_failure(_chooser(impl), WIDE[name](), most=30)
    assert failure is None, failure


@each_level
@pytest.mark.parametrize("name", TIES)
def test_of_equals_the_first_stay(name: str, impl: str) -> None:
    failure = find_failure(_chooser(impl), TIES[name](), most=60)
    assert failure is None, failure


def _by_hand(logits: list[float], filters: Filters, uniform: list[float], impl: str) -> list[int]:
    """What numbers choose of tokens none of which is forbidden or seen."""
    B, V = len(uniform), len(logits)
    limits = Limits(torch.zeros(V, dtype=torch.int32), 0, torch.ones(B, dtype=torch.int64), torch.ones(B) > 0)
    seen_1V, slots_B = torch.zeros((1, V), dtype=torch.bool), torch.zeros(B, dtype=torch.int64)
    uniform_B = torch.tensor(uniform, dtype=torch.float64)
    logits_BV = torch.tensor([logits] * B)
    chosen_B, _ = _chooser(impl)(Product(logits_BV), seen_1V, slots_B, limits, uniform_B, filters)
    return list(chosen_B.tolist())


def _check_by_hand(impl: str) -> None:
    below = float(np.nextafter(0.25, 0))
    assert _by_hand([3.0] * 4, Filters(), [0, below, 0.25, 0.5, 0.75, float(np.nextafter(1, 0))], impl) == [
        *(0, 0, 1, 2, 3, 3)
    ]
    if impl in LEVELS:
        # Shares of a quarter: two make up a half, and a third one any more than that.
        assert set(_by_hand([1.0] * 4, Filters(top_p=0.5), [0, 0.49, 0.51, 0.99], impl)) == {0, 1}
        assert set(_by_hand([1.0] * 4, Filters(top_p=0.51), [0, 0.49, 0.99], impl)) == {0, 1, 2}
        assert set(_by_hand([0.0, 1, 2, 1, 1, 2, 1], Filters(top_k=4), [0, 0.2, 0.5, 0.7, 0.99], impl)) == {1, 2, 3, 5}
    assert _by_hand([-1.0, 5.0, 2.0], Filters(top_k=1), [0, 0.99], impl) == [1, 1]


@each_impl
def test_boundaries_by_hand(impl: str) -> None:
    _check_by_hand(impl)


def test_choices_have_the_distribution() -> None:
    case = make_cached(33, Filters(top_k=6), sizes="free")
    count = 20_000
    uniform_N = torch.from_numpy(np.random.default_rng(0).random(count))
    chosen_N, _ = case.pick([1] * count).run(next_token, uniform_N)
    got_V = np.bincount(chosen_N.numpy(), minlength=33) / count
    assert np.abs(got_V - case.gold[0][1]).max() < 4 * math.sqrt(0.25 / count)


# Numbers that are none

PAYLOAD = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)[0]


def _check_not_numbers(impl: str, V: int = 33) -> None:
    case = make_cached(V, BOTH)
    B = len(case.slots_B)
    uniform_B = torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    clean = case.run(_chooser(impl), uniform_B)
    others = torch.arange(B) != 2
    for value, place in itertools.product((torch.tensor(torch.nan), PAYLOAD, torch.tensor(torch.inf)), (0, 7, V - 1)):
        logits_BV = case.logits.values_NO.clone()
        logits_BV[2, place] = value
        broken = dataclasses.replace(case, logits=guarded_product(Product(logits_BV)))
        chosen_B, log_p_B = broken.run(_chooser(impl), uniform_B)
        assert log_p_B[2].isnan(), f"{value} at {place}: {log_p_B[2]}"
        assert 0 <= chosen_B[2] < V
        assert torch.equal(chosen_B[others], clean[0][others])
        assert torch.equal(log_p_B[others], clean[1][others])
    # Nothing at all, and nothing that is allowed.
    for kept in (torch.zeros(V, dtype=torch.bool), case.limits.sizes_V == NEVER):
        logits_BV = case.logits.values_NO.clone()
        logits_BV[2, ~kept] = -torch.inf  # sequence 2 may not end
        chosen_B, log_p_B = dataclasses.replace(case, logits=Product(logits_BV)).run(_chooser(impl), uniform_B)
        assert log_p_B.isnan().tolist() == (~others).tolist()
        assert 0 <= chosen_B[2] < V
        assert torch.equal(chosen_B[others], clean[0][others])


@each_impl
@pytest.mark.parametrize("V", [33, 123])
def test_not_a_number_stays_in_its_sequence(impl: str, V: int) -> None:
    _check_not_numbers(impl, V)


# The same bits


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@each_level
@pytest.mark.parametrize("left", ["numbers", "with bias", "integers"])
def test_company_slots_and_threads_change_no_bit(impl: str, left: str) -> None:
    """Of so many tokens that all threads have work."""
    case = make_cached(20011, Filters(0.9, 300, 0.9, 1.2), left=left, B=12)
    uniform_B = torch.linspace(0.01, 0.99, 12, dtype=torch.float64)
    chosen_B, log_p_B = case.run(_chooser(impl), uniform_B)
    assert len(set(chosen_B.tolist())) > 3
    for threads, order, slots in (
        *((2, [5, 3, 0, 2], [11, 0, 1, 7]), (3, [*range(11, -1, -1)], [*range(12)])),
        *((1, [3], [14]), (4, [*range(12)], None), (7, [0, 0, 0, 4], [2, 2, 2, 9])),
    ):
        torch.set_num_threads(threads)
        got = case.pick(order, slots).run(_chooser(impl), uniform_B[order])
        assert torch.equal(got[0], chosen_B[order])
        assert torch.equal(got[1], log_p_B[order])


@each_impl
def test_no_sequence(impl: str) -> None:
    case = make_cached(33, BOTH).pick(torch.zeros(0, dtype=torch.int64))
    chosen_B, log_p_B = case.run(_chooser(impl), torch.zeros(0, dtype=torch.float64))
    assert chosen_B.shape == log_p_B.shape == (0,)


def _tensors(case: Case) -> list[torch.Tensor]:
    limits = case.limits
    parts = [case.seen_SV, case.slots_B, limits.sizes_V, limits.room_B, limits.may_end_B]
    return [*case.logits.tensors(), *parts]


@each_way
@pytest.mark.parametrize("left", ["numbers", "with bias", "integers"])
def test_inputs_are_left_alone(impl: str, left: str) -> None:
    case = make_cached(123, BOTH, left=left)
    uniform_B = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    before = [part.clone() for part in (*_tensors(case), uniform_B)]
    next_token(
        case.logits,
        case.seen_SV,
        case.slots_B,
        case.limits,
        uniform_B,
        case.filters,
        impl=impl.replace("portable", "cpu"),
    )
    for part, copy in zip((*_tensors(case), uniform_B), before, strict=True):
        assert torch.equal(part, copy)


@needs_extension
def test_inputs_of_other_layouts() -> None:
    case = make_cached(123, BOTH, left="integers")
    uniform_B = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    expected = case.run(_chooser("cpu"), uniform_B)
    strided = [part.T.contiguous().T if part.dim() == 2 else part.repeat_interleave(2)[::2] for part in _tensors(case)]
    seen_SV, slots_B, sizes_V, room_B, may_end_B = strided[6:]
    limits = Limits(sizes_V, case.limits.end, room_B, may_end_B)
    turned = dataclasses.replace(case, logits=Product.of(strided[:6]), seen_SV=seen_SV, slots_B=slots_B, limits=limits)
    got = turned.run(_chooser("cpu"), uniform_B)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@each_level
def test_writes_its_own_rows_only(impl: str) -> None:
    case = make_cached(33, BOTH)
    around_chosen, around_log_p = torch.full((70,), -5), torch.full((70,), torch.nan, dtype=torch.float64)
    given = _arguments(case, impl, array(around_chosen[32:38]), array(around_log_p[32:38]))
    cpu_kernels.module().next_token(*given)
    assert bool((around_chosen[:32] == -5).all())
    assert bool((around_chosen[38:] == -5).all())
    assert around_log_p[:32].isnan().all()
    assert around_log_p[38:].isnan().all()
    chosen_B, log_p_B = case.run(_chooser(impl), torch.full((6,), 0.5, dtype=torch.float64))
    assert torch.equal(around_chosen[32:38], chosen_B)
    assert torch.equal(around_log_p[32:38], log_p_B)


def _arguments(case: Case, level: str, chosen: Any, log_p: Any) -> tuple[Any, ...]:
    """Of the binding, for numbers of a half."""
    limits, filters = case.limits, case.filters
    V = case.logits.values_NO.shape[1]
    return (
        *(product_arrays(case.logits), array(case.seen_SV), array(case.slots_B), array(limits.sizes_V)),
        *(array(limits.room_B), array(limits.may_end_B), np.full(len(case.slots_B), 0.5), limits.end),
        *(filters.repetition_penalty, filters.temperature, min(filters.top_k or V, V), filters.top_p or 1.0),
        *(level, 1, chosen, log_p),
    )


# Mutants

MUTANT_CASES = {
    name: case
    for name, case in (SIZES | KINDS | LEFT | EDGES).items()
    if name.startswith(("33 tokens", "123 tokens, pieces", "large", "few left", "integers", "few are", "cold"))
} | {name: WIDE[name] for name in ("50,257 tokens, spikes, top_k 950", "50,257 tokens, random, top_k 950")}
CPP_CASES = MUTANT_CASES | {name: case for name, case in TIES.items() if "50257" not in name}


def _is_caught(choose: Choose, impl: str, cases: dict[str, Any], patched: bool = False) -> bool:
    for make in cases.values():
        if find_failure(choose, make(), most=30) is not None:
            return True
    try:
        if impl in LEVELS or patched:
            _check_by_hand(impl)
            _check_not_numbers(impl)
    except AssertionError:
        return True
    return False


@pytest.fixture(scope="session")
def rest(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The extension's other files, compiled once."""
    if not BEST:
        pytest.skip(f"cpu: {missing_reason()}")
    return compile_rest("next_token", tmp_path_factory.mktemp("rest"))


def _levels_here() -> tuple[str, ...]:
    return LEVELS[: min(LEVELS.index(BEST), LEVELS.index("v4")) + 1]


def _any_level_is_caught(changes: dict[str, str], rest: list[Path], folder: Path) -> bool:
    mutant = load_cpp_mutant(["next_token.cpp", "lanes.hpp"], changes, rest, folder, "-O1")
    with mock.patch.object(cpu_kernels, "load", return_value=mutant):
        return any(_is_caught(_chooser(level), level, CPP_CASES) for level in _levels_here())


@pytest.mark.slow
@pytest.mark.parametrize("name", CPP_MUTANTS)
def test_cpp_mutants_are_caught(name: str, rest: list[Path], tmp_path: Path) -> None:
    assert _any_level_is_caught(CPP_MUTANTS[name], rest, tmp_path), f"nothing notices: {name}"


@pytest.mark.slow
def test_what_is_not_broken_is_not_caught(rest: list[Path], tmp_path: Path) -> None:
    assert not _any_level_is_caught({}, rest, tmp_path)


@pytest.mark.parametrize("name", PYTHON_MUTANTS)
def test_python_mutants_are_caught(name: str, tmp_path: Path) -> None:
    mutant = load_mutant("kernels.next_token", dict([PYTHON_MUTANTS[name]]), tmp_path)
    with mock.patch.multiple(module, next_token=mutant.next_token, Limits=mutant.Limits):
        assert _is_caught(_chooser("torch"), "torch", MUTANT_CASES, patched=True)


def test_true_python_is_not_caught() -> None:
    assert not _is_caught(_chooser("torch"), "torch", MUTANT_CASES, patched=True)


# Which implementation runs


def _given(left: str = "numbers", **changes: Any) -> dict[str, Any]:
    """Three sequences of five slots, 40 tokens."""
    case = make_case(40, Filters(0.9, 7, 0.9, 1.2), left=left, sizes="free", B=3)
    given = {
        "logits": case.logits.values_NO if left == "numbers" else case.logits,
        "seen_SV": case.seen_SV[:5],
        "slots_B": torch.tensor([4, 0, 2]),
        "limits": case.limits,
        "uniform_B": torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
        "filters": case.filters,
    }
    return given | changes


def _equal(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.allclose(one[1], other[1], rtol=0, atol=MOST_ERROR)


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
    case, uniform_B = make_cached(123, BOTH), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    got, expected = (case.run(_chooser(impl), uniform_B) for impl in ("cpu", level or USUAL))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@needs_extension
def test_auto_runs_the_extension_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    for left in ("numbers", "with bias", "integers"):
        assert _equal(next_token(**_given(left)), next_token(**_given(left), impl="torch"))
    assert caplog.messages == ["next_token: auto runs cpu"]


@needs_extension
def test_auto_runs_torch_and_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    asked = _given()["logits"].requires_grad_()
    for _ in range(2):
        chosen_B, _ = next_token(**_given(logits=asked))
        assert torch.equal(chosen_B, next_token(**_given())[0])
    assert caplog.messages[0] == "next_token: auto runs torch: gradients are asked for"
    assert len(caplog.messages) == 2
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run here: gradients are asked for"):
        next_token(**_given(logits=asked), impl="cpu")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    monkeypatch.setattr(cpu_kernels, "missing_reason", lambda: "it is not built")
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger=module.__name__)
    assert _equal(next_token(**_given()), next_token(**_given(), impl="torch"))
    assert caplog.messages == ["next_token: auto runs torch: it is not built"]
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run here: it is not built"):
        next_token(**_given(), impl="cpu")


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_on_a_gpu_nothing_waits_for_the_host(impl: str) -> None:
    """Tensors of the device "meta" have no numbers: whoever asks for one fails."""
    given = _given()
    limits = Limits(*(part.to("meta") if isinstance(part, torch.Tensor) else part for part in given["limits"]))
    tensors = {name: given[name].to("meta") for name in ("logits", "seen_SV", "slots_B", "uniform_B")}
    chosen_B, log_p_B = next_token(**given | tensors | {"limits": limits}, impl=impl)
    assert (chosen_B.shape, chosen_B.dtype, chosen_B.device.type) == ((3,), torch.int64, "meta")
    assert (log_p_B.shape, log_p_B.dtype, log_p_B.device.type) == ((3,), torch.float64, "meta")


# Errors


def _limits(**changes: Any) -> Limits:
    limits: Limits = _given()["limits"]
    return limits._replace(**changes)


def _index(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "impl": ({"impl": "triton"}, "impl is 'triton'; allowed: auto, torch, cpu"),
    "logits of bf16": (
        {"logits": torch.zeros(3, 40).bfloat16()},
        "logits are torch.bfloat16 (3, 40), expected fp32 (B, V)",
    ),
    "logits of fp64": ({"logits": torch.zeros(3, 40).double()}, "logits are torch.float64 (3, 40), expected fp32"),
    "logits of integers": ({"logits": torch.zeros(3, 40).int()}, "logits are torch.int32 (3, 40), expected fp32"),
    "logits of one axis": ({"logits": torch.zeros(40)}, "logits are torch.float32 (40,), expected fp32 (B, V)"),
    "a bias too short": (
        {"logits": Product(torch.zeros(3, 40), torch.zeros(39))},
        "got ['torch.float32', 'torch.float32'] of shapes [(3, 40), (39,)]",
    ),
    "seen narrower": (
        {"seen_SV": torch.zeros((5, 39), dtype=torch.bool)},
        "seen is torch.bool (5, 39) on cpu, expected torch.bool (5, 40) on cpu, where the logits are",
    ),
    "seen of bytes": (
        {"seen_SV": torch.zeros((5, 40), dtype=torch.uint8)},
        "seen is torch.uint8 (5, 40) on cpu, expected torch.bool (5, 40)",
    ),
    "seen of one axis": ({"seen_SV": torch.zeros(40, dtype=torch.bool)}, "seen is torch.bool (40,) on cpu, expected"),
    "seen without axes": ({"seen_SV": torch.tensor(True)}, "seen is torch.bool () on cpu, expected torch.bool (40,)"),
    "slots too few": ({"slots_B": _index(4, 0)}, "slots is torch.int64 (2,) on cpu, expected torch.int64 (3,)"),
    "slots of 32 bits": ({"slots_B": _index(4, 0, 2).int()}, "slots is torch.int32 (3,) on cpu, expected torch.int64"),
    "a slot that is not there": ({"slots_B": _index(4, 0, 5)}, "sequence 2: slot 5, but there are 5"),
    "a slot below 0": ({"slots_B": _index(4, -1, 2)}, "sequence 1: slot -1, but there are 5"),
    "sizes too many": (
        {"limits": _limits(sizes_V=torch.zeros(41, dtype=torch.int32))},
        "sizes is torch.int32 (41,) on cpu, expected torch.int32 (40,)",
    ),
    "sizes of 64 bits": (
        {"limits": _limits(sizes_V=torch.zeros(40, dtype=torch.int64))},
        "sizes is torch.int64 (40,) on cpu, expected torch.int32 (40,)",
    ),
    "rooms of 32 bits": (
        {"limits": _limits(room_B=torch.ones(3, dtype=torch.int32))},
        "room is torch.int32 (3,) on cpu, expected torch.int64 (3,)",
    ),
    "rooms too few": ({"limits": _limits(room_B=_index(1, 2))}, "room is torch.int64 (2,) on cpu, expected"),
    "ends of integers": (
        {"limits": _limits(may_end_B=_index(1, 1, 0))},
        "may_end is torch.int64 (3,) on cpu, expected",
    ),
    "ends too many": (
        {"limits": _limits(may_end_B=torch.ones(4) > 0)},
        "may_end is torch.bool (4,) on cpu, expected torch.bool (3,)",
    ),
    "an end beyond": ({"limits": _limits(end=40)}, "end is 40, but there are 40 tokens"),
    "an end below 0": ({"limits": _limits(end=-1)}, "end is -1, but there are 40 tokens"),
    "numbers of fp32": ({"uniform_B": torch.zeros(3)}, "uniform is torch.float32 (3,) on cpu, expected torch.float64"),
    "numbers too few": (
        {"uniform_B": torch.zeros(2, dtype=torch.float64)},
        "uniform is torch.float64 (2,) on cpu, expected torch.float64 (3,)",
    ),
    "numbers elsewhere": (
        {"uniform_B": torch.zeros(3, dtype=torch.float64, device="meta")},
        "uniform is torch.float64 (3,) on meta, expected torch.float64 (3,) on cpu, where the logits are",
    ),
    "temperature 0": ({"filters": Filters(temperature=0.0)}, "filters are Filters(temperature=0.0, top_k=None"),
    "temperature infinite": (
        {"filters": Filters(temperature=math.inf)},
        "expected a temperature and a penalty above 0",
    ),
    "temperature NaN": ({"filters": Filters(temperature=math.nan)}, "expected a temperature and a penalty above 0"),
    "top_k 0": ({"filters": Filters(top_k=0)}, "top_k of at least 1"),
    "top_p 0": ({"filters": Filters(top_p=0.0)}, "top_p above 0 and at most 1"),
    "top_p beyond 1": ({"filters": Filters(top_p=1.1)}, "top_p above 0 and at most 1"),
    "penalty 0": ({"filters": Filters(repetition_penalty=0.0)}, "expected a temperature and a penalty above 0"),
}


@pytest.mark.parametrize("impl", ["torch", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        next_token(**_given(impl=impl) | changes)


def _arrays(**changes: Any) -> dict[str, Any]:
    """Arguments of the binding: three sequences, five slots, eight tokens, the last one the end."""
    given = {
        "logits": (np.zeros((3, 8), np.float32), *NONE),
        "seen": np.zeros((5, 8), np.bool_),
        "slots": np.array([4, 0, 2]),
        "sizes": np.zeros(8, np.int32),
        "room": np.array([1, 1, 1]),
        "may_end": np.ones(3, np.bool_),
        "uniform": np.array([0.0, 0.5, 0.9]),
        "end": 7,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 8,
        "top_p": 1.0,
        "level": "portable",
        "threads": 1,
        "chosen": np.full(3, -1),
        "log_p": np.full(3, np.nan),
    }
    return given | changes


NONE = (None,) * 5
LAYOUT = "has not the size, the dtype or the layout"
ABOVE = "temperature, top_p and repetition_penalty must be above 0"
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "logits of fewer sequences": ({"logits": (np.zeros((2, 8), np.float32), *NONE)}, ValueError, LAYOUT),
    "logits narrower": ({"logits": (np.zeros((3, 7), np.float32), *NONE)}, ValueError, LAYOUT),
    "logits by columns": (
        {"logits": (np.asfortranarray(np.zeros((3, 8), np.float32)), *NONE)},
        ValueError,
        LAYOUT,
    ),
    "logits of fp64": ({"logits": (np.zeros((3, 8)), *NONE)}, ValueError, "a product holds fp32, bf16 or int32"),
    "logits as a list": ({"logits": ([0.0], *NONE)}, TypeError, "a product's values are an array"),
    "integers alone": ({"logits": (np.ones((3, 8), np.int32), *NONE)}, ValueError, "integers come with all five"),
    "a bias too short": (
        {"logits": (np.zeros((3, 8), np.float32), np.zeros(7, np.float32), *NONE[1:])},
        ValueError,
        LAYOUT,
    ),
    "seen narrower": ({"seen": np.zeros((5, 7), np.bool_)}, ValueError, LAYOUT),
    "seen of one axis": ({"seen": np.zeros(40, np.bool_)}, ValueError, LAYOUT),
    "seen of 32 bits": ({"seen": np.zeros((5, 8), np.int32)}, ValueError, LAYOUT),
    "seen by columns": ({"seen": np.asfortranarray(np.zeros((5, 8), np.bool_))}, ValueError, LAYOUT),
    "slots of 32 bits": ({"slots": np.array([4, 0, 2], np.int32)}, TypeError, "incompatible function arguments"),
    "slots too few": ({"slots": np.array([4, 0])}, ValueError, LAYOUT),
    "a slot that is not there": ({"slots": np.array([4, 0, 5])}, ValueError, "sequence 2: slot 5, but there are 5"),
    "a slot below 0": ({"slots": np.array([4, -1, 2])}, ValueError, "sequence 1: slot -1, but there are 5"),
    "sizes too few": ({"sizes": np.zeros(7, np.int32), "end": 6, "top_k": 7}, ValueError, LAYOUT),
    "sizes of 64 bits": ({"sizes": np.zeros(8, np.int64)}, ValueError, LAYOUT),
    "room too short": ({"room": np.array([1, 1])}, ValueError, LAYOUT),
    "room of 32 bits": ({"room": np.ones(3, np.int32)}, TypeError, "incompatible function arguments"),
    "may_end too long": ({"may_end": np.ones(4, np.bool_)}, ValueError, LAYOUT),
    "uniform too short": ({"uniform": np.zeros(2)}, ValueError, LAYOUT),
    "uniform of fp32": ({"uniform": np.zeros(3, np.float32)}, ValueError, LAYOUT),
    "chosen of 32 bits": ({"chosen": np.zeros(3, np.int32)}, ValueError, LAYOUT),
    "chosen too short": ({"chosen": np.zeros(2, np.int64)}, ValueError, LAYOUT),
    "log_p too long": ({"log_p": np.zeros(4)}, ValueError, LAYOUT),
    "an end beyond": ({"end": 8}, ValueError, "the end is no token"),
    "an end below 0": ({"end": -1}, ValueError, "the end is no token"),
    "top_k 0": ({"top_k": 0}, ValueError, "top_k must be from 1 to all tokens"),
    "top_k beyond all": ({"top_k": 9}, ValueError, "top_k must be from 1 to all tokens"),
    "temperature 0": ({"temperature": 0.0}, ValueError, ABOVE),
    "temperature NaN": ({"temperature": math.nan}, ValueError, ABOVE),
    "top_p 0": ({"top_p": 0.0}, ValueError, ABOVE),
    "penalty below 0": ({"repetition_penalty": -1.0}, ValueError, ABOVE),
    "no such level": ({"level": "avx2"}, ValueError, "no level avx2; there are portable, v3, v4 and v4_bf16"),
}


@needs_extension
@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_binding_refuses(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    assert _extension is not None
    with pytest.raises(kind, match=message):
        _extension.next_token(**_arrays(**changes))


@needs_extension
@pytest.mark.parametrize("threads", [-1, 0, 1000])
def test_binding_takes_any_number_of_threads(threads: int) -> None:
    assert _extension is not None
    given = _arrays(threads=threads)
    _extension.next_token(**given)
    assert given["chosen"].tolist() == [0, 4, 7]
    np.testing.assert_allclose(given["log_p"], -math.log(8), rtol=1e-6)
