"""Windows over long proteins: every residue covered, the documented triangle, weights that add up to one.

Truth is the contract written out once more in whole numbers. W residues in a window, L in a protein.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from protnest.engine import InputError
from protnest.engine.windows import LONG_POLICIES, Piece, check_policy, cut, residues_run, window_begins

SIZES = (1, 2, 3, 7, 20, 1022)
MOST = 1022
"""Residues in a window of every published ESM-2."""


def _literal_begins(residues: int, size: int) -> list[int]:
    """Half a window apart for as long as the window ends before the protein does, then one aligned to its end."""
    begins = []
    begin = 0
    while begin + size < residues:
        begins.append(begin)
        begin += size // 2 if size > 1 else 1
    return [*begins, residues - size]


def _literal_triangle(size: int) -> list[int]:
    return [p + 1 if p + 1 < size - p else size - p for p in range(size)]


def _check_windows(pieces: list[Piece], residues: int, size: int) -> None:
    """All that the module promises of a protein that is too long."""
    assert [piece.begin for piece in pieces] == _literal_begins(residues, size)
    assert pieces[0].begin == 0
    assert pieces[-1].end == residues
    assert all(piece.end - piece.begin == size and piece.tokens == size + 2 for piece in pieces)
    steps = [late.begin - early.begin for early, late in itertools.pairwise(pieces)]
    assert steps
    assert all(step == max(1, size // 2) for step in steps[:-1])
    assert 0 < steps[-1] <= max(1, size // 2)

    triangle = np.array(_literal_triangle(size), dtype=np.int64)
    total, covered = np.zeros(residues, dtype=np.int64), np.zeros(residues, dtype=np.int64)
    for piece in pieces:
        total[piece.begin : piece.end] += triangle
        covered[piece.begin : piece.end] += 1
    assert covered.min() >= 1

    shares = np.zeros(residues)
    for piece in pieces:
        assert piece.weights is not None
        assert piece.weights.dtype == np.float32
        assert piece.weights.shape == (size,)
        assert (piece.weights > 0).all()
        # A quotient of whole numbers, rounded to fp64 and then to fp32: exact to the bit.
        expected = (triangle / total[piece.begin : piece.end]).astype(np.float32)
        np.testing.assert_array_equal(piece.weights, expected)
        shares[piece.begin : piece.end] += piece.weights
    np.testing.assert_allclose(shares, 1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beyond", ["one", "a stride", "a stride and one", "as much again", "far"])
def test_windows_are_the_documented_ones(size: int, beyond: str) -> None:
    stride = max(1, size // 2)
    residues = {
        "one": size + 1,
        "a stride": size + stride,
        "a stride and one": size + stride + 1,
        "as much again": 2 * size,
        "far": 10 * size + 3,
    }[beyond]
    if residues == size:
        pytest.skip("a protein of one window is not cut")
    pieces = cut(4, residues, max_residues=size, long="window")
    assert {piece.row for piece in pieces} == {4}
    assert {piece.residues for piece in pieces} == {residues}
    _check_windows(pieces, residues, size)


def test_windows_over_the_longest_protein() -> None:
    _check_windows(cut(0, 100_000, max_residues=MOST, long="window"), 100_000, MOST)
    assert len(window_begins(100_000, MOST)) == 195


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 60), surplus=st.integers(1, 200))
@example(size=1, surplus=1)
@example(size=2, surplus=1)
@example(size=2, surplus=2)
@example(size=3, surplus=1)
@example(size=59, surplus=29)
@example(size=60, surplus=30)
def test_windows_of_any_size(size: int, surplus: int) -> None:
    residues = size + surplus
    pieces = cut(0, residues, max_residues=size, long="window")
    _check_windows(pieces, residues, size)
    assert residues_run(residues, max_residues=size, long="window") == sum(piece.end - piece.begin for piece in pieces)


def test_seven_residues_in_windows_of_four() -> None:
    """By hand: triangles 1 2 2 1 at 0, 2 and 3 add up to 1 2 3 4 4 3 1."""
    pieces = cut(0, 7, max_residues=4, long="window")
    assert [(piece.begin, piece.end) for piece in pieces] == [(0, 4), (2, 6), (3, 7)]
    by_hand = (
        (Fraction(1), Fraction(1), Fraction(2, 3), Fraction(1, 4)),
        (Fraction(1, 3), Fraction(1, 2), Fraction(1, 2), Fraction(1, 3)),
        (Fraction(1, 4), Fraction(1, 2), Fraction(2, 3), Fraction(1)),
    )
    for piece, shares in zip(pieces, by_hand, strict=True):
        assert piece.weights is not None
        np.testing.assert_array_equal(piece.weights, np.array([float(share) for share in shares], dtype=np.float32))


def test_published_windows_are_half_a_window_apart() -> None:
    assert window_begins(2500, MOST) == [0, 511, 1022, 1478]


@pytest.mark.parametrize("long", LONG_POLICIES)
@pytest.mark.parametrize("residues", [1, 19, 20])
def test_a_protein_that_fits_runs_whole(long: str, residues: int) -> None:
    (piece,) = cut(3, residues, max_residues=20, long=long)
    assert (piece.row, piece.residues, piece.begin, piece.end, piece.weights) == (3, residues, 0, residues, None)
    assert piece.tokens == residues + 2
    assert residues_run(residues, max_residues=20, long=long) == residues


@pytest.mark.parametrize(("long", "run"), [("full", 21), ("truncate", 20)])
def test_one_piece_of_a_long_protein(long: str, run: int) -> None:
    (piece,) = cut(3, 21, max_residues=20, long=long)
    # Of a truncated protein the mean is over the residues that run.
    assert (piece.row, piece.residues, piece.begin, piece.end, piece.weights) == (3, run, 0, run, None)
    assert residues_run(21, max_residues=20, long=long) == run


def test_error_policy_names_both_lengths() -> None:
    with pytest.raises(InputError, match=r"^21 residues, but the model was trained on at most 20$"):
        cut(0, 21, max_residues=20, long="error")


@pytest.mark.parametrize("long", ["", "Window", "windows", "none"])
def test_unknown_policy_is_refused(long: str) -> None:
    for call in (lambda: check_policy(long), lambda: cut(0, 5, max_residues=20, long=long)):
        with pytest.raises(ValueError, match=f"long is {long!r}; allowed: window, full, truncate, error") as caught:
            call()
        assert not isinstance(caught.value, InputError)
