"""Numbers of rows that products share: few of them, none too small, and little more than was asked for."""

from __future__ import annotations

import pytest
import torch
from protnest.kernels import product_shapes
from protnest.kernels.product_shapes import is_compiled, rows_to_multiply

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        *((0, 0), (1, 16), (16, 16), (17, 32), (250, 256), (257, 288), (1000, 1024), (1024, 1024), (1025, 1152)),
        *((3950, 4096), (4096, 4096), (4097, 4608), (65_536, 65_536), (65_537, 73_728)),
    ],
)
def test_rows_are_rounded_up(rows: int, wanted: int) -> None:
    assert rows_to_multiply(rows) == wanted


def test_few_numbers_of_rows_and_little_waste() -> None:
    numbers = [rows_to_multiply(rows) for rows in range(1, 8193)]
    assert numbers == sorted(numbers)
    assert all(number % 16 == 0 for number in numbers)
    assert len(set(numbers)) <= 56
    for rows, number in enumerate(numbers, start=1):
        assert rows <= number < rows + 16 or number <= rows * (1 + 1 / 8)
        assert rows_to_multiply(number) == number


@pytest.mark.parametrize("has_units", [True, False])
def test_only_bf16_on_a_cpu_with_units_for_it(has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_shapes, "multiplies_bf16", lambda device: has_units)
    assert is_compiled(torch.bfloat16, CPU) == has_units
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int8):
        assert not is_compiled(dtype, CPU)
    for device in ("cuda", "meta"):
        assert not is_compiled(torch.bfloat16, torch.device(device))
