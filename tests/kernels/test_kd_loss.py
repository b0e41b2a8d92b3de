"""kd_loss: loss and gradient against fp64 gold by each implementation, broken twins, edges, in-place, errors.

Triton's implementation runs on a GPU, or in its interpreter:
    TRITON_INTERPRET=1 pytest -m gpu tests/kernels/test_kd_loss.py

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from protnest.kernels import kd_loss
from protnest.kernels.extension import load
from protnest.kernels.kd_rows import entropy_weights, segment_of_rows

from support.kd_cases import IGNORED, Case, find_failure, find_gold, make_case
from support.kd_mutants import CHUNKED_MUTANTS, CPP_MUTANTS, ROWS_MUTANTS, TRITON_MUTANTS
from support.source_mutants import load_cpp_mutant, load_mutant

module = sys.modules["protnest.kernels.kd_loss"]  # the file: the package's name is the function's

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or INTERPRETED),
        reason="triton: torch sees no CUDA GPU, and TRITON_INTERPRET=1 is not set",
    ),
]
triton = pytest.param("triton", marks=on_gpu)
cpu = pytest.param("cpu", marks=pytest.mark.skipif(load() is None, reason="the C++ extension is not built"))
each_impl = pytest.mark.parametrize("impl", ["reference", "chunked", cpu, triton])
each_fused_impl = pytest.mark.parametrize("impl", ["chunked", cpu, triton])

LENGTHS = (1, 0, 7, 30, 2, 12)
CASES: dict[str, Case] = {
    "ESM-2's vocabulary": make_case(LENGTHS, 33),
    "ProtGPT2's vocabulary": make_case((3, 4), 50257),
    "one token": make_case((4, 3), 1),
    "vocabulary of 128": make_case((20, 9), 128),
    "vocabulary of 129": make_case((8, 9), 129),
    "vocabulary of 2,048": make_case((6, 3), 2048),
    "vocabulary of 2,049": make_case((6, 3), 2049),
    "1,500 rows a segment": make_case((1500, 3), 5),
    "largest logits last": make_case((6, 3), 5000, rising=True),
    "temperature 1": make_case(LENGTHS, 33, temperature=1.0),
    "temperature 3.5": make_case(LENGTHS, 33, temperature=3.5),
    "temperature 0.5, wide": make_case((6, 3), 300, temperature=0.5),
    "temperature 3.5, wide": make_case((6, 3), 5000, temperature=3.5),
    "mostly soft": make_case(LENGTHS, 33, alpha=0.2),
    "soft loss alone": make_case(LENGTHS, 33, alpha=0.0),
    "hard loss alone": make_case(LENGTHS, 33, alpha=1.0),
    "not weighted": make_case(LENGTHS, 33, uncertainty=False),
    "not weighted, wide": make_case((6, 3), 300, uncertainty=False),
    "not smoothed": make_case(LENGTHS, 33, smooth=False),
    "not smoothed, wide": make_case((6, 3), 300, smooth=False),
    "neither": make_case(LENGTHS, 33, uncertainty=False, smooth=False),
    "smoothed by 0": make_case(LENGTHS, 33, smoothing=0.0),
    "smoothed by 1": make_case(LENGTHS, 33, smoothing=1.0),
    "divided by weights": make_case(LENGTHS, 33, weight_normalization="weight"),
    "divided by weights, wide": make_case((6, 3), 300, weight_normalization="weight"),
    "soft rows of their own": make_case(LENGTHS, 33, soft_rows=True),
    "soft rows of their own, wide": make_case((6, 9), 300, soft_rows=True),
    "no row ignored": make_case(LENGTHS, 33, ignored=0.0),
    "bf16": make_case(LENGTHS, 33, dtype=torch.bfloat16),
    "bf16, wide": make_case((6, 3), 2500, dtype=torch.bfloat16),
    "fp16": make_case(LENGTHS, 33, dtype=torch.float16),
    "fp16, wide": make_case((6, 3), 300, dtype=torch.float16),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN."""

    def poison(make: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def _device(impl: str) -> torch.device:
    return DEVICE if impl == "triton" else torch.device("cpu")


def _run(case: Case, impl: str, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, on the CPU."""
    device = _device(impl)
    student_NV = case.student_NV.detach().to(device).requires_grad_()
    options = case.options_of_call() | more
    if case.soft_rows is not None:
        options["soft_rows"] = case.soft_rows.to(device)
    rest = (tensor.to(device) for tensor in (case.teacher_NV, case.labels_N, case.cu_seqlens))
    loss = kd_loss(student_NV, *rest, impl=impl, **options)
    (gradient_NV,) = torch.autograd.grad(loss, student_NV)
    return loss.detach().cpu(), gradient_NV.cpu()


@each_case
@each_impl
def test_loss_and_gradient_are_within_bounds_of_gold(case: Case, impl: str) -> None:
    if impl == "reference" and case.student_NV.dtype != torch.float32:
        pytest.skip("the reference is the oracle in fp64; its 16-bit gradient is torch's own")
    loss, gradient_NV = _run(case, impl)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert (gradient_NV.shape, gradient_NV.dtype) == (case.student_NV.shape, case.student_NV.dtype)
    failure = find_failure(case, find_gold(case), loss, gradient_NV)
    assert failure is None, failure


@each_case
def test_chunked_is_exact_in_fp64(case: Case) -> None:
    exact = dataclasses.replace(case, student_NV=case.student_NV.double(), teacher_NV=case.teacher_NV.double())
    gold = find_gold(exact)
    loss, gradient_NV = _run(exact, "chunked")
    assert abs(float(loss) - gold.loss) <= 1e-12 * gold.loss_terms
    assert bool(((gradient_NV - gold.gradient_NV).abs() <= 1e-12 * gold.gradient_terms_NV + 1e-30).all())


MUTANT_CASES = [
    CASES[name]
    for name in (
        *("ESM-2's vocabulary", "vocabulary of 2,049", "temperature 3.5", "soft rows of their own", "not smoothed"),
        *("divided by weights", "mostly soft", "largest logits last", "1,500 rows a segment", "vocabulary of 129"),
    )
]


def _is_caught(impl: str) -> bool:
    for case in MUTANT_CASES:
        loss, gradient_NV = _run(case, impl)
        if find_failure(case, find_gold(case), loss, gradient_NV) is not None:
            return True
    return False


@pytest.mark.parametrize("name", CHUNKED_MUTANTS)
def test_chunked_mutants_are_caught(name: str, tmp_path: Path) -> None:
    mutant = load_mutant("kernels.kd_chunked", CHUNKED_MUTANTS[name], tmp_path)
    with mock.patch.object(module, "rows_module", return_value=mutant):
        assert _is_caught("chunked"), f"nothing notices: {name}"


@pytest.mark.parametrize("name", ROWS_MUTANTS)
def test_rows_mutants_are_caught(name: str, tmp_path: Path) -> None:
    mutant = load_mutant("kernels.kd_rows", ROWS_MUTANTS[name], tmp_path)
    broken = {part: getattr(mutant, part) for part in ("weigh_rows", "loss_scales", "sum_rows")}
    with mock.patch.multiple(module, **broken):
        assert _is_caught("chunked"), f"nothing notices: {name}"


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in TRITON_MUTANTS])
def test_triton_mutants_are_caught(name: str, tmp_path: Path) -> None:
    mutant = load_mutant("kernels.gpu.kd_loss", TRITON_MUTANTS[name], tmp_path)
    with mock.patch.object(module, "rows_module", return_value=mutant):
        assert _is_caught("triton"), f"nothing notices: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CPP_MUTANTS)
def test_cpp_mutants_are_caught(name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    rest = tmp_path_factory.getbasetemp()
    mutant = load_cpp_mutant("kd_loss", "kd_loss.cpp", CPP_MUTANTS[name], rest, tmp_path)
    with mock.patch("protnest.kernels.kd_cpu.load", return_value=mutant):
        assert _is_caught("cpu") or _is_blind_to_nan(), f"nothing notices: {name}"


def _is_blind_to_nan() -> bool:
    case = _plain_case()
    case.student_NV[3, 4] = torch.nan
    try:
        _run(case, "cpu")
    except ValueError:
        return False
    return True


def test_reference_is_differentiated_rightly() -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = torch.randn((2, 9, 7), generator=generator, dtype=torch.float64)
    labels_N = torch.tensor([3, IGNORED, 0, 6, 1, 2, IGNORED, 5, 4])
    cu_seqlens = torch.tensor([0, 4, 4, 9])
    for switches in itertools.product((True, False), repeat=2):
        uncertainty, smooth = switches

        def loss(student_NV: torch.Tensor, uncertainty: bool = uncertainty, smooth: bool = smooth) -> torch.Tensor:
            return kd_loss(
                *(student_NV, teacher_NV, labels_N, cu_seqlens),
                uncertainty=uncertainty,
                smooth=smooth,
                impl="reference",
            )

        assert torch.autograd.gradcheck(loss, (student_NV.requires_grad_(),))


def test_formula_by_hand() -> None:
    """Two rows and two tokens, worked out with nothing but the definitions."""
    import math

    student_NV, teacher_NV = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    labels_N, cu_seqlens = torch.tensor([0, 1]), torch.tensor([0, 2])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def divergence(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    # The second row has the larger entropy: weight 1; the first 0.5.
    first_p, first_q = sigmoid(2.0), sigmoid(1.0)
    first_eps, second_eps = 0.1 * (1 - first_p), 0.1 * (1 - 0.5)
    first_target = (1 - first_eps) * first_p + first_eps / 2
    second_target = (1 - second_eps) * 0.5 + second_eps / 2
    soft = (0.5 * divergence(first_target, first_q) + divergence(second_target, sigmoid(-0.5))) / 2
    hard = -(math.log(sigmoid(2.0)) + math.log(sigmoid(1.0))) / 2
    expected = 0.5 * hard + 0.5 * 2.0**2 * soft
    got = kd_loss(student_NV, teacher_NV, labels_N, cu_seqlens, impl="reference")
    assert float(got) == pytest.approx(expected, rel=1e-6)


def _plain_case(rows: int = 6, vocabulary: int = 9, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(1)
    student_NV, teacher_NV = torch.randn((2, rows, vocabulary), generator=generator)
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    return Case(student_NV, teacher_NV, labels_N, torch.tensor([0, rows]), None, options)


@each_impl
def test_equal_entropies_weigh_half(impl: str) -> None:
    """Rows with the same numbers in another order have the same entropy but for rounding."""
    generator = torch.Generator().manual_seed(2)
    row = 3 * torch.randn(400, generator=generator)
    teacher_NV = torch.stack([row[torch.randperm(400, generator=generator)] for _ in range(5)])
    case = dataclasses.replace(_plain_case(5, 400, alpha=0.0), teacher_NV=teacher_NV)
    weighted, gradient_NV = _run(case, impl)
    plain, plain_gradient_NV = _run(case, impl, uncertainty=False)
    assert float(weighted) == 0.5 * float(plain)
    assert torch.equal(gradient_NV, 0.5 * plain_gradient_NV)


@each_impl
def test_one_row_weighs_half(impl: str) -> None:
    case = _plain_case(1, alpha=0.0)
    assert float(_run(case, impl)[0]) == 0.5 * float(_run(case, impl, uncertainty=False)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_exactly_half_below_the_threshold(dtype: torch.dtype) -> None:
    # 64 eps of the largest entropy, and 1e-8, whichever is larger.
    threshold = max(64 * torch.finfo(dtype).eps * 2.0, 1e-8)
    entropy_N = torch.tensor([2.0, 2.0 + 0.9 * threshold, 2.0, 2.0 + 1.1 * threshold, 0.0, 5e-9], dtype=dtype)
    segment_N = segment_of_rows(torch.tensor([0, 2, 4, 4, 6]), 6)
    weights = entropy_weights(entropy_N, torch.ones(6, dtype=torch.bool), segment_N, 4)
    assert weights.tolist() == [0.5, 0.5, 0.5, 1.0, 0.5, 0.5]


@each_impl
@pytest.mark.parametrize("lengths", [(6,), (0, 6, 0), (2, 4)])
def test_nothing_that_counts_gives_zero_with_a_graph(impl: str, lengths: tuple[int, ...]) -> None:
    case = _plain_case()
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    case = dataclasses.replace(case, labels_N=torch.full((6,), IGNORED), cu_seqlens=cu_seqlens)
    loss, gradient_NV = _run(case, impl)
    assert float(loss) == 0
    assert torch.equal(gradient_NV, torch.zeros(6, 9))


@each_impl
@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0]])
def test_no_rows(impl: str, cu_seqlens: list[int]) -> None:
    case = dataclasses.replace(_plain_case(0), cu_seqlens=torch.tensor(cu_seqlens))
    loss, gradient_NV = _run(case, impl)
    assert float(loss) == 0
    assert gradient_NV.shape == (0, 9)


@each_impl
def test_segment_without_rows_that_count_changes_nothing(impl: str) -> None:
    case = _plain_case()
    more = dataclasses.replace(
        case,
        student_NV=torch.cat((case.student_NV, torch.full((3, 9), torch.nan))),
        teacher_NV=torch.cat((case.teacher_NV, torch.full((3, 9), torch.nan))),
        labels_N=torch.cat((case.labels_N, torch.full((3,), IGNORED))),
        cu_seqlens=torch.tensor([0, 6, 9]),
    )
    (loss, gradient_NV), (more_loss, more_gradient_NV) = _run(case, impl), _run(more, impl)
    assert float(loss) == float(more_loss)
    assert torch.equal(more_gradient_NV, torch.cat((gradient_NV, torch.zeros(3, 9))))


@each_fused_impl
def test_gradient_is_scaled_by_what_comes_in(impl: str) -> None:
    case, device = CASES["ESM-2's vocabulary"], _device(impl)
    student_NV = case.student_NV.detach().to(device).requires_grad_()
    rest = (tensor.to(device) for tensor in (case.teacher_NV, case.labels_N, case.cu_seqlens))
    (-8 * kd_loss(student_NV, *rest, impl=impl)).backward()
    assert student_NV.grad is not None
    # 1e-30: where numbers are too small to be normal, a power of two is not exact either.
    assert torch.allclose(student_NV.grad.cpu(), -8 * _run(case, impl)[1], rtol=0, atol=1e-30)


@each_fused_impl
def test_two_backwards_give_the_same(impl: str) -> None:
    case, device = CASES["ESM-2's vocabulary"], _device(impl)
    student_NV = case.student_NV.detach().to(device).requires_grad_()
    rest = (tensor.to(device) for tensor in (case.teacher_NV, case.labels_N, case.cu_seqlens))
    loss = kd_loss(student_NV, *rest, impl=impl)
    first, second = (torch.autograd.grad(loss, student_NV, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_impl
def test_teacher_gets_no_gradient(impl: str) -> None:
    case, device = _plain_case(), _device(impl)
    student_NV, teacher_NV = (
        table.detach().to(device).requires_grad_() for table in (case.student_NV, case.teacher_NV)
    )
    kd_loss(student_NV, teacher_NV, case.labels_N.to(device), case.cu_seqlens.to(device), impl=impl).backward()
    assert student_NV.grad is not None
    assert teacher_NV.grad is None


@each_fused_impl
def test_inplace_gradient_takes_the_logits_place(impl: str) -> None:
    case, device = _plain_case(), _device(impl)
    leaf = case.student_NV.detach().to(device).requires_grad_()
    logits_NV = leaf * 1
    rest = (tensor.to(device) for tensor in (case.teacher_NV, case.labels_N, case.cu_seqlens))
    loss = kd_loss(logits_NV, *rest, inplace=True, impl=impl)
    assert torch.equal(logits_NV, leaf)
    loss.backward(retain_graph=True)
    expected_loss, expected_NV = _run(case, impl)
    assert float(loss.detach()) == float(expected_loss)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.cpu(), expected_NV)
    assert torch.equal(logits_NV.detach().cpu(), expected_NV)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_impl
def test_rows_of_any_strides(impl: str) -> None:
    case = _plain_case()
    turned = dataclasses.replace(
        case, student_NV=case.student_NV.T.contiguous().T, teacher_NV=case.teacher_NV.T.contiguous().T
    )
    for got, expected in zip(_run(turned, impl), _run(case, impl), strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9)


@each_impl
def test_int32_labels_and_segments(impl: str) -> None:
    case = CASES["ESM-2's vocabulary"]
    short = dataclasses.replace(case, labels_N=case.labels_N.int(), cu_seqlens=case.cu_seqlens.int())
    for got, expected in zip(_run(short, impl), _run(case, impl), strict=True):
        assert torch.equal(got, expected)


@each_impl
def test_student_and_teacher_of_different_dtypes(impl: str) -> None:
    case = CASES["bf16"]
    mixed = dataclasses.replace(case, teacher_NV=case.teacher_NV.float())
    loss, gradient_NV = _run(mixed, impl)
    assert gradient_NV.dtype == torch.bfloat16
    assert find_failure(mixed, find_gold(mixed), loss, gradient_NV) is None


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(load() is None, reason="the C++ extension is not built")
def test_threads_change_no_bit(request: pytest.FixtureRequest) -> None:
    case = make_case((20, 31), 20000, ignored=0.1)
    alone = _run(case, "cpu")
    request.getfixturevalue("three_threads")
    for got, expected in zip(_run(case, "cpu"), alone, strict=True):
        assert torch.equal(got, expected)
    broken = case.teacher_NV.clone()
    used = (case.labels_N != IGNORED).nonzero()[:, 0]
    first, last = int(used[len(used) // 2]), int(used[-1])
    broken[first, 7] = broken[last, 9] = torch.inf
    with pytest.raises(ValueError, match=rf"teacher_logits\[{first}\] holds NaN"):
        _run(dataclasses.replace(case, teacher_NV=broken), "cpu")


@pytest.mark.skipif(INTERPRETED, reason="opcheck runs without Triton")
@pytest.mark.parametrize("impl", ["chunked", cpu])
@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck(impl: str, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck's tensors are not all real ones
    case = _plain_case()
    options = (2.0, 0.5, 0.1, True, True, "count", IGNORED, inplace, impl)
    student_NV = case.student_NV.detach().requires_grad_() * 1
    torch.library.opcheck(
        module._kd_loss_op, (student_NV, case.teacher_NV, case.labels_N, case.cu_seqlens, None, *options)
    )


def _changed(**changes: Any) -> dict[str, Any]:
    case = _plain_case()
    given: dict[str, Any] = {
        "student_logits": case.student_NV,
        "teacher_logits": case.teacher_NV,
        "labels": case.labels_N,
        "cu_seqlens": case.cu_seqlens,
    }
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    return given


def _with(place: int | tuple[int, int], value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "teacher with fewer rows": (
        {"teacher_logits": lambda t: t[1:]},
        r"student_logits has \(6, 9\), teacher_logits \(5, 9\)",
    ),
    "vocabularies differ": (
        {"teacher_logits": lambda t: t[:, 1:]},
        r"student_logits has \(6, 9\), teacher_logits \(6, 8\)",
    ),
    "three axes": (
        {"student_logits": lambda s: s[None], "teacher_logits": lambda t: t[None]},
        r"one shape \(rows, vocab",
    ),
    "no vocabulary": ({"student_logits": torch.zeros(6, 0), "teacher_logits": torch.zeros(6, 0)}, r"\(6, 0\)"),
    "whole numbers for logits": (
        {"student_logits": lambda s: s.long()},
        "student_logits has dtype torch.int64, expected",
    ),
    "complex teacher": ({"teacher_logits": lambda t: t.cfloat()}, "teacher_logits has dtype torch.complex64"),
    "labels too few": ({"labels": lambda labels: labels[1:]}, r"labels has shape \(5,\), expected \(6,\)"),
    "labels of floats": (
        {"labels": lambda labels: labels.float()},
        "labels has dtype torch.float32, expected torch.int32",
    ),
    "label below 0": ({"labels": _with(2, -1)}, r"labels\[2\] is -1, expected 0 to 8 or ignore_index \(-100\)"),
    "label too large": ({"labels": _with(4, 9)}, r"labels\[4\] is 9, expected 0 to 8"),
    "segments of floats": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens has dtype torch.float32"),
    "segments with two axes": ({"cu_seqlens": torch.tensor([[0, 6]])}, r"cu_seqlens has shape \(1, 2\)"),
    "no segments": ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, r"cu_seqlens has shape \(0,\)"),
    "segments not from 0": ({"cu_seqlens": torch.tensor([1, 6])}, "from 1 to 6, expected 0 to 6"),
    "segments not to N": ({"cu_seqlens": torch.tensor([0, 5])}, "from 0 to 5, expected 0 to 6"),
    "segments fall": ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "falls from 4 to 3 at index 2"),
    "soft rows too few": (
        {"soft_rows": torch.ones(5, dtype=torch.bool)},
        r"soft_rows has shape \(5,\), expected \(6,\)",
    ),
    "soft rows of numbers": ({"soft_rows": torch.ones(6)}, "soft_rows has dtype torch.float32, expected torch.bool"),
    "NaN in the student": (
        {"student_logits": _with((3, 4), torch.nan)},
        r"student_logits\[3\] holds NaN or an infinity",
    ),
    "infinity in the student": ({"student_logits": _with((5, 0), torch.inf)}, r"student_logits\[5\] holds NaN"),
    "minus infinity in the student": ({"student_logits": _with((5, 0), -torch.inf)}, r"student_logits\[5\] holds NaN"),
    "NaN in the teacher": ({"teacher_logits": _with((0, 8), torch.nan)}, r"teacher_logits\[0\] holds NaN"),
    "minus infinity in the teacher": ({"teacher_logits": _with((0, 8), -torch.inf)}, r"teacher_logits\[0\] holds NaN"),
    "temperature 0": ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
    "temperature NaN": ({"temperature": float("nan")}, "temperature is nan"),
    "alpha above 1": ({"alpha": 1.5}, "alpha is 1.5, expected 0 to 1"),
    "smoothing below 0": ({"smoothing": -0.1}, "smoothing is -0.1, expected 0 to 1"),
    "unknown normalisation": (
        {"weight_normalization": "mean"},
        "weight_normalization is 'mean'; allowed are 'count', 'w",
    ),
    "unknown implementation": ({"impl": "cuda"}, "impl is 'cuda'; allowed are 'auto', 'reference', 'chunked', 'cpu'"),
}


@pytest.mark.parametrize("impl", ["chunked", cpu])
@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input(changes: dict[str, Any], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=message):
        kd_loss(**({"impl": impl} | _changed(**changes)))


def test_device_of_labels() -> None:
    with pytest.raises(ValueError, match="labels is on meta, expected cpu as the student"):
        kd_loss(**_changed(labels=lambda labels: labels.to("meta")))


def test_inplace_needs_contiguous_rows() -> None:
    turned = _changed(student_logits=lambda s: s.T.contiguous().T)
    with pytest.raises(ValueError, match=r"student_logits has strides \(1, 6\)"):
        kd_loss(**turned, inplace=True)


def test_finite_logits_whose_sum_overflows_are_fine() -> None:
    case = _plain_case(2, 999)
    large = dataclasses.replace(case, student_NV=torch.full((2, 999), -1e36), teacher_NV=torch.full((2, 999), -1e36))
    large.student_NV[:, 0] = large.teacher_NV[:, 0] = 1e36
    for impl in ("chunked", *(["cpu"] if load() else [])):
        loss, gradient_NV = _run(large, impl, smooth=False, alpha=0.0)
        assert abs(float(loss)) < 1e-6
        assert bool((gradient_NV.abs() < 1e-6).all())


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="Triton can run here")
def test_triton_without_a_gpu_raises() -> None:
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here"):
        kd_loss(**_changed(), impl="triton")


def test_cpu_kernel_refuses_fp64() -> None:
    given = _changed(student_logits=lambda s: s.double())
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run here: fp64"):
        kd_loss(**given, impl="cpu")


def test_auto_says_what_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    module._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for _ in range(2):
            kd_loss(**_changed())
            kd_loss(**_changed(student_logits=lambda s: s.double()))
    assert [record.message for record in caplog.records] == [
        "kd_loss: auto runs cpu" if load() else f"kd_loss: auto runs chunked: {module.missing_reason()}",
        "kd_loss: auto runs chunked: fp64 is not for the C++ extension",
    ]


def test_without_the_extension_chunked_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._WHY_NOT, "cpu", lambda *tensors: "it is not built")
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run here: it is not built"):
        kd_loss(**_changed(), impl="cpu")
    assert module.choose_impl("kd_loss", "auto", torch.zeros(1)) == "chunked"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_unknown_label_on_a_gpu_gives_nan() -> None:
    given = {name: tensor.to(DEVICE) for name, tensor in _changed(labels=_with(2, 9)).items()}
    assert bool(torch.isnan(kd_loss(**given)))
