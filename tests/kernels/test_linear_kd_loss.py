"""linear_kd_loss: against kd_loss on whole logits in fp64, however rows are cut; memory, opcheck, errors.

Triton's implementation runs on a GPU, or in its interpreter: TRITON_INTERPRET=1 pytest -m gpu

Shapes: N rows, D and E widths of student and teacher, V vocabulary.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from protnest.benchmarks.memory import PeakMemory
from protnest.kernels import kd_loss, linear_kd_loss
from protnest.kernels.extension import load

module = sys.modules["protnest.kernels.linear_kd_loss"]  # the file: the package's name is the function's

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
triton = pytest.param(
    "triton",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not (torch.cuda.is_available() or INTERPRETED),
            reason="triton: torch sees no CUDA GPU, and TRITON_INTERPRET=1 is not set",
        ),
    ],
)
cpu = pytest.param("cpu", marks=pytest.mark.skipif(load() is None, reason="the C++ extension is not built"))
each_impl = pytest.mark.parametrize("impl", ["reference", "chunked", cpu, triton])

Given = dict[str, torch.Tensor]
_HEADS = ("student_hidden", "student_weight", "student_bias")
# Gradients to these are asked for; of D = 24 and E = 31 neither is a round number.
_D, _E = 24, 31


def _make(rows: int = 60, vocabulary: int = 33, *, ignored: float = 0.3, seed: int = 0) -> Given:
    """Heads whose logits have a size of some 3, in fp64; segments of 1, 0, 7, 30 rows and what is left."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.1 * scale

    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels_N[torch.rand(rows, generator=generator) < ignored] = -100
    return {
        "student_hidden": normal(rows, _D),
        "student_weight": normal(vocabulary, _D, scale=2 * _D**-0.5),
        "student_bias": normal(vocabulary),
        "teacher_hidden": normal(rows, _E) * (1 + torch.arange(rows)[:, None] % 5),
        "teacher_weight": normal(vocabulary, _E, scale=_E**-0.5),
        "teacher_bias": normal(vocabulary),
        "labels": labels_N,
        "cu_seqlens": torch.tensor([0, 1, 1, 8, 38, rows]),
    }


def _cast(given: Given, dtype: torch.dtype) -> Given:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def _run(given: Given, impl: str, **options: Any) -> tuple[torch.Tensor, ...]:
    """Loss, and gradients of three times the loss to hidden states, weight and bias; on the CPU, in fp64."""
    device = DEVICE if impl == "triton" else torch.device("cpu")
    given = {name: tensor.detach().to(device) for name, tensor in given.items()}
    for name in _HEADS:
        given[name].requires_grad_()
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    loss = linear_kd_loss(**given, impl=impl, **options)
    gradients = torch.autograd.grad(3 * loss, [given[name] for name in _HEADS])
    for name, gradient in zip(_HEADS, gradients, strict=True):
        assert (gradient.shape, gradient.dtype) == (given[name].shape, given[name].dtype)
    return tuple(tensor.detach().to("cpu", torch.float64) for tensor in (loss, *gradients))


def _gold(given: Given, **options: Any) -> tuple[torch.Tensor, ...]:
    """The same from `kd_loss`'s reference on whole logits in fp64, with torch's own products."""
    given = {name: tensor.detach().clone() for name, tensor in _cast(given, torch.float64).items()}
    for name in _HEADS:
        given[name].requires_grad_()
    student_NV = given["student_hidden"] @ given["student_weight"].T + given["student_bias"]
    teacher_NV = given["teacher_hidden"] @ given["teacher_weight"].T + given["teacher_bias"]
    loss = kd_loss(student_NV, teacher_NV, given["labels"], given["cu_seqlens"], impl="reference", **options)
    return tuple(tensor.detach() for tensor in (loss, *torch.autograd.grad(3 * loss, [given[name] for name in _HEADS])))


def _assert_close(got: tuple[torch.Tensor, ...], gold: tuple[torch.Tensor, ...], allowed: float) -> None:
    for name, mine, right in zip(("loss", *_HEADS), got, gold, strict=True):
        error = float((mine - right).norm() / right.norm())
        assert error <= allowed, f"{name} is off by {error:.3g} of its norm, allowed {allowed:.3g}"


def _chunks_of(rows: int) -> Any:
    """Chunks of so many rows, on every device."""
    return mock.patch.multiple(module, _CHUNK_BYTES={"cpu": 1, "cuda": 1}, _LEAST_CHUNK_ROWS=rows)


OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 3.5": {"temperature": 3.5},
    "not weighted": {"uncertainty": False},
    "not smoothed": {"smooth": False},
    "neither": {"uncertainty": False, "smooth": False},
    "divided by weights": {"weight_normalization": "weight"},
    "divided by weights that are all 1": {"weight_normalization": "weight", "uncertainty": False},
    "soft loss alone": {"alpha": 0.0},
    "hard loss alone": {"alpha": 1.0},
    "soft rows of their own": {"soft_rows": torch.arange(60) % 3 == 1},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@each_option
@each_impl
@pytest.mark.parametrize("rows", [7, 30, 1000], ids="chunks of {} rows".format)
def test_loss_and_gradients_equal_whole_logits(options: dict[str, Any], impl: str, rows: int) -> None:
    given = _make()
    with _chunks_of(rows):
        got = _run(_cast(given, torch.float32), impl, **options)
    # fp32 inputs are rounded before anything begins: gold sees the same ones.
    _assert_close(got, _gold(_cast(given, torch.float32), **options), 3e-6)


@each_option
@pytest.mark.parametrize("rows", [1, 7, 1000], ids="chunks of {} rows".format)
def test_exact_in_fp64(options: dict[str, Any], rows: int) -> None:
    given = _make(ignored=0.1)
    with _chunks_of(rows):
        _assert_close(_run(given, "chunked", **options), _gold(given, **options), 1e-12)


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(impl: str, dtype: torch.dtype) -> None:
    """Logits and gradients are rounded to 16 bits, sums are not."""
    if impl == "triton" and INTERPRETED:
        pytest.skip("the interpreter is no test of 16-bit products")
    given = _cast(_make(), dtype)
    with _chunks_of(7):
        _assert_close(_run(given, impl), _gold(given), 6 * torch.finfo(dtype).eps)


@each_impl
def test_without_biases(impl: str) -> None:
    given = _make()
    biases = {name: torch.zeros_like(given[name]) for name in ("student_bias", "teacher_bias")}
    loss, hidden, weight, _ = _gold(given | biases)
    device = DEVICE if impl == "triton" else torch.device("cpu")
    bare = {name: tensor.to(device) for name, tensor in _cast(given, torch.float32).items() if name not in biases}
    for name in _HEADS[:2]:
        bare[name].requires_grad_()
    got = linear_kd_loss(**bare, impl=impl)
    (3 * got).backward()
    gradients = [bare[name].grad for name in _HEADS[:2]]
    assert float(got.detach()) == pytest.approx(float(loss), rel=1e-6)
    for gradient, right in zip(gradients, (hidden, weight), strict=True):
        assert gradient is not None
        assert float((gradient.cpu() - right).norm() / right.norm()) < 1e-6


def test_only_what_is_asked_for_is_worked_out() -> None:
    given = _cast(_make(), torch.float32)
    given["student_hidden"].requires_grad_()
    loss = linear_kd_loss(**given)
    (gradient,) = torch.autograd.grad(loss, given["student_hidden"])
    assert torch.allclose(3 * gradient.double(), _gold(given)[1], atol=1e-6)
    with torch.no_grad():
        assert not linear_kd_loss(**given).requires_grad


@each_impl
def test_nothing_that_counts_gives_zero_with_a_graph(impl: str) -> None:
    given = _cast(_make(), torch.float32)
    given["labels"] = torch.full((60,), -100)
    for tensor in _run(given, impl):
        assert not tensor.any()


@each_impl
def test_no_rows(impl: str) -> None:
    given = _cast(_make(), torch.float32)
    for name in ("student_hidden", "teacher_hidden", "labels"):
        given[name] = given[name][:0]
    given["cu_seqlens"] = torch.tensor([0, 0])
    for tensor in _run(given, impl):
        assert not tensor.any()


@pytest.mark.parametrize("impl", ["chunked", cpu])
def test_second_backward_raises(impl: str) -> None:
    given = _cast(_make(), torch.float32)
    given["student_hidden"].requires_grad_()
    loss = linear_kd_loss(**given, impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", ["chunked", cpu])
def test_one_product_with_the_teacher_where_segments_fit(impl: str) -> None:
    """Chunks of 38 rows hold the first four segments together, and the fifth: no product is done twice."""
    given = _cast(_make(ignored=0.0), torch.float32)
    heads: list[tuple[int, int]] = []
    write = module.Head.write_logits

    def count(head: Any, own: slice, out_CV: torch.Tensor) -> torch.Tensor:
        heads.append((head.weight_VD.shape[1], own.stop - own.start))
        result: torch.Tensor = write(head, own, out_CV)
        return result

    with mock.patch.object(module.Head, "write_logits", count):
        with _chunks_of(38):
            _run(given, impl)
        assert sorted(heads) == [(_D, 22), (_D, 38), (_E, 22), (_E, 38)]
        heads.clear()
        # A segment of 30 rows takes two sweeps in chunks of 20; the last chunk of the first is kept.
        with _chunks_of(20):
            _run(given, impl)
        assert sum(rows for width, rows in heads if width == _D) == 60
        assert sum(rows for width, rows in heads if width == _E) == 60 + 20 + 20
        heads.clear()
        with _chunks_of(20):
            _run(given, impl, uncertainty=False)
        assert sum(rows for width, rows in heads if width == _E) == 60


@pytest.mark.parametrize(("ignored", "left_out"), [(0.8, True), (0.1, False)])
def test_rows_that_do_not_count_are_left_out_where_that_pays(ignored: float, left_out: bool) -> None:
    given = _cast(_make(ignored=ignored), torch.float32)
    gold = _gold(given)
    unused = given["labels"] == -100
    if left_out:
        for name in ("student_hidden", "teacher_hidden"):
            given[name][unused] = torch.nan
    multiplied: list[int] = []
    write = module.Head.write_logits

    def count(head: Any, own: slice, out_CV: torch.Tensor) -> torch.Tensor:
        multiplied.append(own.stop - own.start)
        result: torch.Tensor = write(head, own, out_CV)
        return result

    with mock.patch.object(module.Head, "write_logits", count):
        got = _run(given, "chunked")
    assert sum(multiplied) == 2 * (int((~unused).sum()) if left_out else 60)
    _assert_close(got, gold, 3e-6)
    assert not got[1][unused].any()


@pytest.mark.parametrize("impl", ["chunked", cpu])
def test_logits_never_exist_whole(impl: str) -> None:
    """2,048 rows of 8,192 logits are 67 MB in fp32 for each model; chunks of 64 rows 2 MB."""
    generator = torch.Generator().manual_seed(0)
    given = {
        "student_hidden": torch.randn(2048, 16, generator=generator),
        "student_weight": torch.randn(8192, 16, generator=generator),
        "teacher_hidden": torch.randn(2048, 16, generator=generator),
        "teacher_weight": torch.randn(8192, 16, generator=generator),
        "labels": torch.randint(0, 8192, (2048,), generator=generator),
        "cu_seqlens": torch.tensor([0, 2048]),
    }
    for name in _HEADS[:2]:
        given[name].requires_grad_()
    with _chunks_of(64):
        linear_kd_loss(**given, impl=impl).backward()
        peak = PeakMemory(torch.device("cpu"))
        linear_kd_loss(**given, impl=impl).backward()
        grown = peak.growth_bytes()
    if grown is None:
        pytest.skip("this system does not tell peak memory")
    assert grown < 2 * 2048 * 8192 * 4 / 5


@pytest.mark.skipif(INTERPRETED, reason="opcheck runs without Triton")
@pytest.mark.parametrize("impl", ["chunked", cpu])
def test_opcheck(impl: str) -> None:
    given = _cast(_make(), torch.float32)
    for name in _HEADS:
        given[name].requires_grad_()
    order = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
    options = (2.0, 0.5, 0.1, True, True, "count", -100, [True, True, True], impl)
    tensors = [given[name] for name in (*order, "labels", "cu_seqlens")]
    torch.library.opcheck(module._linear_kd_loss_op, (*tensors, None, *options))


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[1:]


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, 1:]


def _nan_at_9(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[9] = torch.nan
    return tensor


ERRORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "student's widths": ("student_weight", _narrow, r"student_hidden has shape \(60, 24\), student_weight \(33, 23\)"),
    "teacher's widths": ("teacher_hidden", _narrow, r"teacher_hidden has shape \(60, 30\), teacher_weight \(33, 31\)"),
    "rows": ("teacher_hidden", _cut, "the teacher's rows are 59, expected 60"),
    "vocabularies": ("teacher_weight", _cut, r"teacher_bias has shape \(33,\), expected \(32,\)"),
    "bias": ("student_bias", _cut, r"student_bias has shape \(32,\), expected \(33,\)"),
    "dtype of the weight": ("student_weight", torch.Tensor.double, "student_weight has dtype torch.float64, expected"),
    "dtype of the bias": ("teacher_bias", torch.Tensor.half, "teacher_bias has dtype torch.float16, expected"),
    "dtype of hidden states": ("student_hidden", torch.Tensor.int, "student_hidden has dtype torch.int32, expected"),
    "device": ("teacher_weight", lambda weight: weight.to("meta"), "teacher_weight is on meta, expected cpu"),
    "labels": ("labels", _cut, r"labels has shape \(59,\), expected \(60,\)"),
    "segments": ("cu_seqlens", lambda cu: cu + 1, "cu_seqlens runs from 1 to 61, expected 0 to 60"),
    "NaN in the student": ("student_hidden", _nan_at_9, r"student_logits\[9\] holds NaN"),
    "NaN in the teacher": ("teacher_hidden", _nan_at_9, r"teacher_logits\[9\] holds NaN"),
}


@pytest.mark.parametrize("impl", ["chunked", cpu])
@pytest.mark.parametrize(("name", "change", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input(name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, impl: str) -> None:
    given = _cast(_make(), torch.float32)
    given["labels"][9] = 4
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(**given, impl=impl)


def test_vocabularies_differ() -> None:
    given = {name: tensor for name, tensor in _make().items() if not name.endswith("bias")}
    given["teacher_weight"] = given["teacher_weight"][1:]
    with pytest.raises(ValueError, match="the teacher's vocabulary are 32, expected 33"):
        linear_kd_loss(**given)
