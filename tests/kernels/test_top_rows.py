"""top_rows: both twins against a full sort in fp64, over shapes that leave tiles, heaps and blocks half filled."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.kernels.extension import load
from protnest.kernels.top_rows import top_rows

IMPLS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(load() is None, reason="no C++ extension"))]


def _cut(rows: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    return [(begin, rows[begin : begin + size]) for begin in range(0, len(rows), size)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("N", "K", "Q", "k", "size"),
    [(1, 1, 1, 1, 9), (127, 24, 3, 5, 50), (3000, 7, 600, 33, 1100), (500, 130, 2, 500, 64)],
)
def test_the_largest_products(impl: str, N: int, K: int, Q: int, k: int, size: int) -> None:
    rng = np.random.default_rng(N)
    rows, queries = (rng.standard_normal((count, K)).astype(np.float32) for count in (N, Q))
    numbers, scores = top_rows(_cut(rows, size), queries, k, impl=impl)
    products = queries.astype(np.float64) @ rows.astype(np.float64).T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
    assert np.array_equal(np.sort(numbers, axis=1), np.sort(expected, axis=1))
    np.testing.assert_allclose(scores, np.take_along_axis(products, numbers, axis=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_only_get_better(impl: str) -> None:
    """Each new row is the best so far, and all are negative: a threshold of zero or one kept too long would show."""
    rows = np.linspace(-9, -1, 2500, dtype=np.float32)[:, None]
    numbers, scores = top_rows(_cut(rows, 700), np.ones((1, 1), np.float32), 4, impl=impl)
    assert sorted(numbers[0].tolist()) == [2496, 2497, 2498, 2499]
    assert scores.max() == -1


@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_rows_than_wanted(impl: str) -> None:
    numbers, scores = top_rows([(5, np.ones((2, 3), np.float32))], np.ones((1, 3), np.float32), 4, impl=impl)
    assert sorted(numbers[0].tolist()) == [-1, -1, 5, 6]
    assert sorted(scores[0].tolist()) == [-np.inf, -np.inf, 3, 3]


def test_of_equal_rows_the_first_stay() -> None:
    numbers, _ = top_rows(_cut(np.ones((900, 2), np.float32), 200), np.ones((1, 2), np.float32), 3)
    assert sorted(numbers[0].tolist()) == [0, 1, 2]


def test_what_is_refused() -> None:
    rows = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="k must be positive, got 0"):
        top_rows([(0, rows)], rows, 0)
    with pytest.raises(ValueError, match=r"rows are float64 \(2, 3\), want float32 \(any, 3\)"):
        top_rows([(0, rows.astype(np.float64))], rows, 1)
    with pytest.raises(ValueError, match=r"rows are float32 \(2, 2\), want float32 \(any, 3\)"):
        top_rows([(0, rows[:, :2])], rows, 1)
    with pytest.raises(ValueError, match="impl is 'best'"):
        top_rows([(0, rows)], rows, 1, impl="best")
