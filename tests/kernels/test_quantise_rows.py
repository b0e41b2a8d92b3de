"""quantise_rows: to the last bit against the formula in NumPy's fp32, at ties and edges, by each implementation.

Shapes: N rows, I numbers in one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.kernels.cpu_kernels import cpu_level, module
from protnest.kernels.product import Levels
from protnest.kernels.quantise_rows import _quantise_rows, quantise_rows

from support.row_cases import (
    CPU_LEVELS,
    SHAPES,
    U32,
    each_cpu_impl,
    each_impl,
    each_shape,
    find_difference,
    guarded,
    hostile_rows,
    needs_extension,
    running,
)
from support.row_mutants import LEVELS_MUTANTS, load_row_mutant

SMALLEST = 2.0**-100


def gold_levels(x_NI: torch.Tensor) -> Levels:
    """The formula of `quantise_rows` in NumPy's fp32, a row at a time; np.rint takes halves to even."""
    values, scales, shifts = [], [], []
    for x_I in x_NI.float().numpy():
        with np.errstate(all="ignore"):
            least, extent = x_I.min(), x_I.max() - x_I.min()
            scale, shift, steps_I = np.float32(0), least, np.full(x_I.shape, 128, np.float32)
            if not np.isfinite(extent):
                scale = shift = np.float32(np.nan)
            elif extent >= np.float32(SMALLEST):
                scale = extent / np.float32(255)
                shift = least + scale * np.float32(128)
                steps_I = np.rint((x_I - least) * (np.float32(255) / extent))
        assert scale.dtype == shift.dtype == steps_I.dtype == np.float32
        values.append((steps_I - 128).astype(np.int8))
        scales.append(scale)
        shifts.append(shift)
    values_NI = np.array(values, np.int8).reshape(x_NI.shape)
    parts = values_NI, np.array(scales, np.float32), np.array(shifts, np.float32)
    return Levels(*(torch.from_numpy(part) for part in parts))


def _levels(x_NI: torch.Tensor, impl: str) -> Levels:
    with guarded() as guards, running(impl) as name:
        return quantise_rows(guards.copy(x_NI), impl=name)


def find_failure(x_NI: torch.Tensor, impl: str) -> str | None:
    return find_difference(_levels(x_NI, impl), gold_levels(x_NI))


def _bytes(levels: Levels) -> list[bytes]:
    return [part.numpy().tobytes() for part in levels]


def _row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def _half_steps(factor: float, offset: float) -> torch.Tensor:
    """Numbers 0, 1/2, 1 to 255, the range at which a step is exactly 1."""
    return ((torch.arange(511) / 2 + offset) * factor)[None]


BELOW = float(np.nextafter(np.float32(SMALLEST), np.float32(0)))
LARGEST = float(np.finfo(np.float32).max)
EDGES = {
    "half steps": _half_steps(1.0, 0.0),
    "half steps, small": _half_steps(2.0**-60, 0.0),
    "half steps, large": _half_steps(2.0**60, -100.0),
    "half steps below 0": _half_steps(1.0, -255.0),
    "half steps backwards": _half_steps(-1.0, 0.0),
    "range just below 2^-100": _row(0.0, BELOW, 0.0),
    "range of 2^-100": _row(0.0, SMALLEST, SMALLEST / 2, SMALLEST / 255),
    "range just below 2^-100, below 0": _row(-BELOW, 0.0),
    "subnormal": _row(1e-45, 1e-40, 0.0),
    "range just below overflow": _row(-LARGEST / 2, LARGEST / 2, 0.0, 1e38, 1.0),
    "largest number": _row(0.0, LARGEST, LARGEST / 3),
    "range overflows": _row(-LARGEST, LARGEST, 0.0),
    "range overflows in wide rows": _row(*[0.0] * 20, -LARGEST, *[0.0] * 20, LARGEST),
    "NaN": _row(1.0, torch.nan, 2.0),
    "NaN first": _row(torch.nan, 1.0, 2.0),
    "NaN in a lane": _row(*[1.0] * 21, torch.nan, *[2.0] * 21),
    "NaN last": _row(*[1.0] * 16, 2.0, torch.nan),
    "NaN everywhere": torch.full((2, 33), torch.nan),
    "infinity": _row(1.0, torch.inf, 2.0),
    "infinity in a lane": _row(*[1.0] * 21, -torch.inf, *[2.0] * 21),
    "infinity everywhere": torch.full((1, 19), torch.inf),
    "both infinities": _row(-torch.inf, torch.inf),
    "one number": torch.tensor([[3.25], [0.0], [-1e-42], [LARGEST], [torch.nan], [torch.inf]]),
    "constants": torch.tensor([[0.7], [-1234.567], [1e-30], [LARGEST]]).expand(4, 37),
    "smallest number last": _row(*[1.0] * 16, 5.0, -2.0),
    "largest number last": _row(*[1.0] * 32, -2.0, 5.0),
}


@each_impl
@each_shape
def test_to_the_last_bit(shape: tuple[int, int], impl: str) -> None:
    assert find_failure(hostile_rows(*shape), impl) is None


@each_impl
def test_to_the_last_bit_over_many_numbers(impl: str) -> None:
    """An inverse that is rounded twice shows at one number in half a million."""
    x_NI = hostile_rows(600, 2560)
    assert find_failure(x_NI, impl) is None


@each_impl
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, impl: str) -> None:
    assert find_failure(EDGES[name], impl) is None


@each_impl
def test_what_edges_become(impl: str) -> None:
    """In numbers written by hand, since gold and product could share a mistake."""
    got = _levels(_half_steps(1.0, 0.0), impl)
    assert got.values_NI[0, :10].tolist() == [-128, -128, -127, -126, -126, -126, -125, -124, -124, -124]
    assert got.values_NI[0, -3:].tolist() == [126, 126, 127]
    assert (got.scale_N.item(), got.shift_N.item()) == (1.0, 128.0)
    for name in ("NaN", "infinity", "range overflows"):
        got = _levels(EDGES[name], impl)
        assert got.scale_N.isnan().all()
        assert got.shift_N.isnan().all()
        assert not got.values_NI.any()
    got = _levels(EDGES["constants"], impl)
    assert torch.equal(got.shift_N, EDGES["constants"][:, 0])
    assert not got.scale_N.any()
    assert not got.values_NI.any()


@each_impl
@each_shape
def test_levels_stand_for_the_numbers(shape: tuple[int, int], impl: str) -> None:
    """Half a step, and rounding: of scale 128 times, of the steps three times 255, of shift twice; u32 each."""
    x_NI = hostile_rows(*shape).double()
    levels = _levels(hostile_rows(*shape), impl)
    scale_N1, shift_N1 = levels.scale_N[:, None].double(), levels.shift_N[:, None].double()
    bound_NI = scale_N1 * (0.5 + 900 * U32) + 2 * U32 * shift_N1.abs()
    excess_NI = (x_NI - (scale_N1 * levels.values_NI + shift_N1)).abs() - bound_NI
    assert not (excess_NI > 0).any(), f"at {(excess_NI > 0).nonzero()[0].tolist()}"


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_become_fp32_first(dtype: torch.dtype, impl: str) -> None:
    x_NI = hostile_rows(7, 37).to(dtype)
    assert find_difference(_levels(x_NI, impl), gold_levels(x_NI.float())) is None


@each_impl
def test_rows_that_are_not_contiguous(impl: str) -> None:
    x_NI = hostile_rows(40, 30)
    with running(impl) as name:
        for view_NI in (x_NI[:, 3:20], x_NI.T, x_NI[::3, ::2]):
            assert find_difference(quantise_rows(view_NI, impl=name), gold_levels(view_NI)) is None


@each_impl
def test_leaves_its_rows_alone(impl: str) -> None:
    x_NI = hostile_rows(7, 37)
    copy_NI = x_NI.clone()
    with running(impl) as name:
        quantise_rows(x_NI, impl=name)
    assert torch.equal(x_NI, copy_NI)


@each_impl
def test_rows_are_their_own(impl: str) -> None:
    x_NI = hostile_rows(30, 123)
    before = _levels(x_NI, impl)
    x_NI[10:20:2], x_NI[11:20:2] = torch.nan, torch.inf
    after = _levels(x_NI, impl)
    kept = [*range(10), *range(20, 30)]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[kept], other[kept])
    assert after.scale_N[10:20].isnan().all()
    assert _bytes(_levels(x_NI[4:9], impl)) == [part[4:9].numpy().tobytes() for part in before]


@each_cpu_impl
def test_threads_do_not_show(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x_NI = hostile_rows(301, 480)
    with running(impl) as name:
        outs = []
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            outs.append(_bytes(quantise_rows(x_NI, impl=name)))
    assert outs[0] == outs[1] == outs[2]


@needs_extension
def test_operator() -> None:
    check: Any = torch.library.opcheck
    check(_quantise_rows.definition, (hostile_rows(7, 37), cpu_level()))


# Which implementation runs


@needs_extension
def test_auto_runs_the_extension_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    true = module().quantise_rows
    monkeypatch.setattr(module(), "quantise_rows", lambda *given: calls.append(given) or true(*given))
    x_NI = hostile_rows(7, 37)
    assert find_difference(quantise_rows(x_NI), gold_levels(x_NI)) is None
    assert len(calls) == 1
    quantise_rows(x_NI.requires_grad_())
    assert len(calls) == 2
    quantise_rows(x_NI, impl="reference")
    assert len(calls) == 2


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.kernels.extension._load_once", lambda: (None, "there is none"))
    x_NI = hostile_rows(7, 37)
    assert find_difference(quantise_rows(x_NI), gold_levels(x_NI)) is None
    with pytest.raises(RuntimeError, match="quantise_rows: impl='cpu' cannot run: there is none"):
        quantise_rows(x_NI, impl="cpu")


@needs_extension
def test_cpu_raises_on_other_devices() -> None:
    with pytest.raises(RuntimeError, match="quantise_rows: impl='cpu' cannot run: tensors are on meta"):
        quantise_rows(torch.zeros(2, 3, device="meta"), impl="cpu")


# Errors


def test_unknown_impl() -> None:
    with pytest.raises(ValueError, match="quantise_rows: impl is 'triton', allowed are 'auto', 'reference', 'cpu'"):
        quantise_rows(torch.zeros(2, 3), impl="triton")


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3), torch.zeros(1, 2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 0)],
    ids=["one axis", "three axes", "integers", "no column"],
)
def test_rows_of_the_wrong_kind(x: torch.Tensor) -> None:
    named = re.escape(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (N, I), I at least 1")
    with pytest.raises(ValueError, match=named):
        quantise_rows(x)


def _arrays(N: int, C: int) -> tuple[np.ndarray[Any, Any], ...]:
    return np.zeros((N, C), np.int8), np.zeros(N, np.float32), np.zeros(N, np.float32)


@needs_extension
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": np.zeros(6, np.float32)}, "x must have two dimensions"),
        ({"x": np.zeros((3, 2), np.float32).T}, "size, the dtype or the layout"),
        ({"target": _arrays(2, 3)[:2]}, "a target has three parts"),
        ({"target": _arrays(2, 4)}, "size, the dtype or the layout"),
        ({"target": (_arrays(2, 3)[0], *_arrays(3, 3)[1:])}, "size, the dtype or the layout"),
        ({"target": (*_arrays(2, 3)[:2], np.zeros(2))}, "size, the dtype or the layout"),
        ({"target": (np.zeros((2, 3), np.float32), None, None)}, "the target must be levels"),
        ({"target": (np.zeros((2, 3)), None, None)}, "a target is fp32, bf16 or int8"),
        ({"x": np.zeros((2, 0), np.float32), "target": _arrays(2, 0)}, "levels need at least one column"),
        ({"level": "v5"}, "no level v5"),
    ],
)
def test_what_the_binding_refuses(change: dict[str, Any], named: str) -> None:
    given = {"x": np.zeros((2, 3), np.float32), "target": _arrays(2, 3), "level": "portable", "threads": 1} | change
    with pytest.raises(ValueError, match=named):
        module().quantise_rows(**given)


@needs_extension
def test_the_binding_takes_fp32_alone() -> None:
    with pytest.raises(TypeError):
        module().quantise_rows(np.zeros((2, 3)), _arrays(2, 3), "portable", 1)


@needs_extension
def test_levels_of_processors_agree() -> None:
    x_NI = hostile_rows(300, 123)
    assert len({b"".join(_bytes(_levels(x_NI, f"cpu {level}"))) for level in CPU_LEVELS}) == 1


# Broken twins


def _is_caught() -> bool:
    rows = [*EDGES.values(), *(hostile_rows(*shape) for shape in SHAPES), hostile_rows(600, 2560)]
    try:
        return any(find_failure(x_NI, f"cpu {level}") is not None for x_NI in rows for level in CPU_LEVELS)
    except AssertionError:  # the guards'
        return True


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS_MUTANTS)
def test_cpp_mutants_are_caught(name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    mutant = load_row_mutant(*LEVELS_MUTANTS[name], tmp_path_factory.getbasetemp(), tmp_path)
    assert not _is_caught()
    with mock.patch("protnest.kernels.cpu_kernels.load", return_value=mutant):
        assert _is_caught(), f"nothing notices: {name}"
