"""Masking: how often, what, and never the special tokens. T tokens, R rows asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from protnest.engine.alphabet import AMINO_ACIDS, BOS_ID, EOS_ID, MASK_ID, TOKEN_IDS
from protnest.training.masking import ASKED, mask_tokens

Tokens = npt.NDArray[np.uint8]

STANDARD = [TOKEN_IDS[letter] for letter in AMINO_ACIDS]
X = TOKEN_IDS["X"]


def _sequences(count: int, residues: int, *, token: int | None = None, seed: int = 0) -> Tokens:
    """Random standard residues, or one token throughout, in sequences with `<cls>` and `<eos>`."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice(np.array(STANDARD, dtype=np.uint8), size=(count, residues + 2))
    if token is not None:
        tokens[:] = token
    tokens[:, 0], tokens[:, -1] = BOS_ID, EOS_ID
    return tokens.reshape(-1).astype(np.uint8)


def _assert_share(hits: int, of: int, chance: float) -> None:
    """Within 4.5 standard deviations of a binomial: one in 150,000 by chance, and the seeds are fixed."""
    allowed = 4.5 * (of * chance * (1 - chance)) ** 0.5
    assert abs(hits - of * chance) < allowed, f"{hits} of {of}: expected {of * chance:.0f} +- {allowed:.0f}"


def test_shares_are_those_of_esm2() -> None:
    """Over X, which is never drawn as a swap, every fate shows."""
    tokens_T = _sequences(1000, 400, token=X)
    shown_T, rows = mask_tokens(tokens_T, np.random.default_rng(1))
    assert ASKED == 0.15
    _assert_share(rows.size, 400_000, 0.15)
    _assert_share(int((shown_T[rows] == MASK_ID).sum()), rows.size, 0.8)
    _assert_share(int((shown_T[rows] == X).sum()), rows.size, 0.1)
    swapped = shown_T[rows][(shown_T[rows] != MASK_ID) & (shown_T[rows] != X)]
    _assert_share(swapped.size, rows.size, 0.1)
    # Swaps are drawn evenly from the 20 standard amino acids.
    assert set(swapped.tolist()) == set(STANDARD)
    for token in STANDARD:
        _assert_share(int((swapped == token).sum()), swapped.size, 1 / 20)


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_more_or_less_may_be_asked_for(share: float) -> None:
    tokens_T = _sequences(500, 400, token=X)
    shown_T, rows = mask_tokens(tokens_T, np.random.default_rng(1), share=share)
    _assert_share(rows.size, 200_000, share)
    _assert_share(int((shown_T[rows] == MASK_ID).sum()), rows.size, 0.8)


def test_asked_rows_lie_anywhere() -> None:
    tokens_T = _sequences(2000, 50)
    _, rows = mask_tokens(tokens_T, np.random.default_rng(2))
    by_place = np.bincount(rows % 52, minlength=52)
    assert by_place[[0, 51]].tolist() == [0, 0]
    for count in by_place[1:-1].tolist():
        _assert_share(count, 2000, 0.15)


@pytest.mark.parametrize("swaps", [True, False])
def test_only_asked_residues_change(swaps: bool) -> None:
    tokens_T = _sequences(200, 30)
    before_T = tokens_T.copy()
    shown_T, rows = mask_tokens(tokens_T, np.random.default_rng(3), swaps=swaps)
    np.testing.assert_array_equal(tokens_T, before_T)
    assert shown_T.dtype == np.uint8
    assert rows.dtype == np.int64
    assert shown_T.shape == tokens_T.shape
    assert (np.diff(rows) > 0).all(), "rows are ascending, none twice"
    others = np.setdiff1d(np.arange(tokens_T.size), rows)
    np.testing.assert_array_equal(shown_T[others], tokens_T[others])
    assert not np.isin(tokens_T[rows], (BOS_ID, EOS_ID)).any()


def test_without_swaps_every_asked_row_is_masked() -> None:
    tokens_T = _sequences(1000, 100)
    shown_T, rows = mask_tokens(tokens_T, np.random.default_rng(4), swaps=False)
    _assert_share(rows.size, 100_000, 0.15)
    assert (shown_T[rows] == MASK_ID).all()


@pytest.mark.parametrize("swaps", [True, False])
def test_one_residue_is_always_asked_for(swaps: bool) -> None:
    for seed in range(50):
        for residues in (1, 2, 5):
            tokens_T = _sequences(1, residues, seed=seed)
            shown_T, rows = mask_tokens(tokens_T, np.random.default_rng(seed), swaps=swaps)
            assert rows.size >= 1
            assert rows.dtype == np.int64
            assert rows.min() >= 1
            assert rows.max() <= residues
            assert swaps or (shown_T[rows] == MASK_ID).all()


@pytest.mark.parametrize("tokens", [[], [BOS_ID, EOS_ID], [BOS_ID, EOS_ID, BOS_ID, EOS_ID]])
def test_nothing_to_ask_for(tokens: list[int]) -> None:
    shown_T, rows = mask_tokens(np.array(tokens, dtype=np.uint8), np.random.default_rng(0))
    assert shown_T.tolist() == tokens
    assert rows.shape == (0,)


def test_the_generator_decides_everything() -> None:
    tokens_T = _sequences(10, 100)
    first, again, other = (mask_tokens(tokens_T, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])
    rng = np.random.default_rng(0)
    assert not np.array_equal(mask_tokens(tokens_T, rng)[1], mask_tokens(tokens_T, rng)[1])
