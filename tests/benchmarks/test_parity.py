"""parity: right answers pass, and every way in which an engine was seen to be wrong is caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from protnest.benchmarks.parity import ALLOWED, ParityError, check_parity, row_errors

B, D = 12, 64


def _expected() -> np.ndarray:
    generator = np.random.default_rng(0)
    # As pooled embeddings are: all share most of their direction.
    return (generator.normal(size=D) + 0.4 * generator.normal(size=(B, D))).astype(np.float32)


def _shared_scale(vectors: np.ndarray) -> np.ndarray:
    return vectors * np.float32(0.88)


def _two_swapped(vectors: np.ndarray) -> np.ndarray:
    return vectors[[1, 0, *range(2, B)]]


def _one_row_off(vectors: np.ndarray) -> np.ndarray:
    broken = vectors.copy()
    broken[7, 3] += 2
    return broken


def _one_not_a_number(vectors: np.ndarray) -> np.ndarray:
    broken = vectors.copy()
    broken[7, 3] = np.nan
    return broken


def _all_zero(vectors: np.ndarray) -> np.ndarray:
    return np.zeros_like(vectors)


def _rounded(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    def shift(vectors: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(1).normal(size=vectors.shape)
        return (vectors + vectors.std() * noise * 2.0**-bits).astype(np.float32)

    return shift


@pytest.mark.parametrize("precision", ALLOWED)
@pytest.mark.parametrize("broken", [_shared_scale, _two_swapped, _one_row_off, _one_not_a_number, _all_zero])
def test_catches_wrong_answers(broken: Callable[[np.ndarray], np.ndarray], precision: str) -> None:
    with pytest.raises(ParityError, match=f"engine {precision}: the embedding of protein .* nothing is timed"):
        check_parity("engine", precision, _expected(), broken(_expected()))


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 20), ("fp16", 10), ("bf16", 7), ("int8", 4)])
def test_allows_rounding(precision: str, bits: int) -> None:
    assert 0 < check_parity("engine", precision, _expected(), _rounded(bits)(_expected())) <= ALLOWED[precision]


def test_fp32_is_not_excused_for_the_errors_of_bf16() -> None:
    with pytest.raises(ParityError):
        check_parity("engine", "fp32", _expected(), _rounded(7)(_expected()))


def test_compares_the_first_rows_and_names_the_worst() -> None:
    expected = _expected()
    longer = np.concatenate([expected, np.zeros_like(expected)])
    assert check_parity("engine", "fp32", expected, longer) == 0
    with pytest.raises(ParityError, match="protein 7"):
        check_parity("engine", "fp32", expected, _one_row_off(expected))


@pytest.mark.parametrize("shape", [(B - 1, D), (B, D + 1)])
def test_wrong_shapes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ParityError, match=rf"shape \({shape[0]}, {shape[1]}\)"):
        check_parity("engine", "fp32", _expected(), np.ones(shape, dtype=np.float32))


def test_error_is_a_share_of_the_norm() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 10.0]])
    got = np.array([[3.0, 4.5], [1.0, 10.0]])
    np.testing.assert_allclose(row_errors(expected, got), [0.1, 0.1])
