"""Pooling: elementwise against fp64, hostile values, windows scattered over shuffled batches; and broken twins die.

Shapes: B proteins, T tokens, L residues, D width. W residues in a window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch
from protnest.engine.packing import PackedBatch, pack_tokens
from protnest.engine.pooling import POOLS, PooledRows, ResidueRows, check_pool, pool_bos, pool_max, pool_sum
from protnest.engine.windows import Piece, cut

from support.pooling_mutants import MUTANTS

Floats = npt.NDArray[np.float32]
Gold = npt.NDArray[np.float64]

EPS32 = float(np.finfo(np.float32).eps)

LENGTHS = (1, 2, 3, 40, 1, 2000, 17)
WIDTHS = (1, 5, 123)
WINDOW = 8
PROTEINS = (1, 8, 9, 12, 13, 16, 3, 33, 50, 8)
"""Residues of the proteins that are gathered: one window or fewer, one more, a stride more, and several."""


def _hostile(tokens: int, width: int, seed: int) -> Floats:
    """Rows of sizes 1e-3 to 10, a mean far from zero, a constant row, a channel below zero throughout."""
    rng = np.random.default_rng((seed, tokens, width))
    values = rng.standard_normal((tokens, width)) * 10.0 ** rng.uniform(-3, 1, (tokens, 1)) + 3.0
    values[tokens // 2] = 0.7
    values[:, 0] = -np.abs(values[:, 0]) - 1
    # The special tokens are larger than any residue, so that none of them goes unnoticed.
    values[[0, -1]] = 40 + rng.standard_normal((2, width))
    return values.astype(np.float32)


def _assert_close(got: Floats, gold: Gold, sizes: Gold, terms: int) -> None:
    """|got - gold| <= half an ulp of the result + k eps32 sum |terms|, element by element.

    A running sum of n terms is off by up to n / 2 eps, and with rounding at random by about sqrt(n) / 2 eps (Higham and
    Mary, SIAM J. Sci. Comput. 41:A2815, 2019): k is four times that, and 4 more for the weights.
    """
    assert got.dtype == np.float32
    assert got.shape == gold.shape
    bound = 0.5 * EPS32 * np.abs(gold) + (4 + 2 * terms**0.5) * EPS32 * sizes
    wrong = ~(np.abs(got - gold) <= bound)
    if wrong.any():
        place = tuple(int(axis) for axis in np.argwhere(wrong)[0])
        at = f"{int(wrong.sum())} of {wrong.size}, first at {place}"
        message = f"{at}: got {got[place]!r}, gold {gold[place]!r}, bound {np.broadcast_to(bound, gold.shape)[place]!r}"
        raise AssertionError(message)


# The three sums over a packed batch


@dataclass(frozen=True)
class _Packed:
    hidden_TD: Floats
    cu_seqlens: torch.Tensor
    weights_T: Floats

    def residues(self) -> list[Floats]:
        return [self.hidden_TD[begin + 1 : end - 1] for begin, end in itertools.pairwise(self.cu_seqlens.tolist())]


def _packed(width: int, lengths: Sequence[int] = LENGTHS) -> _Packed:
    hidden = [_hostile(length + 2, width, seed) for seed, length in enumerate(lengths)]
    weights = [np.pad(np.full(length, 1 / length, dtype=np.float32), 1) for length in lengths]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(length + 2 for length in lengths)], dtype=torch.int32)
    return _Packed(np.concatenate(hidden), cu_seqlens, np.concatenate(weights))


@pytest.mark.parametrize("width", WIDTHS)
def test_pool_sum_is_the_mean_of_residues(width: int) -> None:
    batch = _packed(width)
    got = pool_sum(torch.from_numpy(batch.hidden_TD), torch.from_numpy(batch.weights_T), batch.cu_seqlens)
    gold = np.stack([residues.astype(np.float64).mean(axis=0) for residues in batch.residues()])
    sizes = np.stack([np.abs(residues.astype(np.float64)).mean(axis=0) for residues in batch.residues()])
    _assert_close(got.numpy(), gold, sizes, max(LENGTHS))


@pytest.mark.parametrize("width", WIDTHS)
def test_pool_sum_takes_any_weights(width: int) -> None:
    batch = _packed(width)
    weights_T = np.random.default_rng(width).uniform(-1, 1, batch.weights_T.size).astype(np.float32)
    got = pool_sum(torch.from_numpy(batch.hidden_TD), torch.from_numpy(weights_T), batch.cu_seqlens)
    terms_TD = batch.hidden_TD.astype(np.float64) * weights_T.astype(np.float64)[:, None]
    begins = batch.cu_seqlens[:-1].numpy()
    terms_TD[begins] = terms_TD[batch.cu_seqlens[1:].numpy() - 1] = 0.0  # <cls> and <eos> never count
    gold, sizes = np.add.reduceat(terms_TD, begins), np.add.reduceat(np.abs(terms_TD), begins)
    _assert_close(got.numpy(), gold, sizes, max(LENGTHS) + 2)


@pytest.mark.parametrize("width", WIDTHS)
def test_pool_max_and_pool_bos_are_exact(width: int) -> None:
    batch = _packed(width)
    hidden_TD = torch.from_numpy(batch.hidden_TD)
    largest = np.stack([residues.max(axis=0) for residues in batch.residues()])
    np.testing.assert_array_equal(pool_max(hidden_TD, batch.cu_seqlens).numpy(), largest)
    first = batch.hidden_TD[batch.cu_seqlens[:-1].numpy()]
    np.testing.assert_array_equal(pool_bos(hidden_TD, batch.cu_seqlens).numpy(), first)
    # The caller's tensor is still what it was: the maximum hides special tokens in a copy.
    np.testing.assert_array_equal(hidden_TD.numpy(), batch.hidden_TD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    """A bf16 sum of 2,000 terms near 3 would be off by whole units; the bound is fp32's."""
    batch = _packed(5)
    hidden_TD = torch.from_numpy(batch.hidden_TD).to(dtype)
    rounded = _Packed(hidden_TD.float().numpy(), batch.cu_seqlens, batch.weights_T)
    got = pool_sum(hidden_TD, torch.from_numpy(batch.weights_T), batch.cu_seqlens)
    gold = np.stack([residues.astype(np.float64).mean(axis=0) for residues in rounded.residues()])
    sizes = np.stack([np.abs(residues.astype(np.float64)).mean(axis=0) for residues in rounded.residues()])
    _assert_close(got.numpy(), gold, sizes, max(LENGTHS))
    largest = np.stack([residues.max(axis=0) for residues in rounded.residues()])
    for pooled, expected in (
        (pool_max(hidden_TD, batch.cu_seqlens), largest),
        (pool_bos(hidden_TD, batch.cu_seqlens), rounded.hidden_TD[batch.cu_seqlens[:-1].numpy()]),
    ):
        assert pooled.dtype == torch.float32
        np.testing.assert_array_equal(pooled.numpy(), expected)


def test_no_sequences() -> None:
    hidden_TD, cu_seqlens = torch.zeros(0, 3), torch.zeros(1, dtype=torch.int32)
    assert pool_sum(hidden_TD, torch.zeros(0), cu_seqlens).shape == (0, 3)
    assert pool_max(hidden_TD, cu_seqlens).shape == (0, 3)
    assert pool_bos(hidden_TD, cu_seqlens).shape == (0, 3)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_broken_residues_are_not_hidden(poison: float) -> None:
    """One residue's NaN or infinity stays visible in its own row and channel, and nowhere else."""
    batch = _packed(3, lengths=(4, 5))
    hidden_TD = torch.from_numpy(batch.hidden_TD.copy())
    hidden_TD[2, 1] = poison
    for clean, dirty in (
        (pool_max(torch.from_numpy(batch.hidden_TD), batch.cu_seqlens), pool_max(hidden_TD, batch.cu_seqlens)),
        (
            pool_sum(torch.from_numpy(batch.hidden_TD), torch.from_numpy(batch.weights_T), batch.cu_seqlens),
            pool_sum(hidden_TD, torch.from_numpy(batch.weights_T), batch.cu_seqlens),
        ),
    ):
        touched = torch.zeros(2, 3, dtype=torch.bool)
        touched[0, 1] = True
        assert torch.equal(dirty[~touched], clean[~touched])
    assert not pool_sum(hidden_TD, torch.from_numpy(batch.weights_T), batch.cu_seqlens)[0, 1].isfinite()
    largest = pool_max(hidden_TD, batch.cu_seqlens)[0, 1].item()
    if poison == -np.inf:
        assert largest == batch.hidden_TD[[1, 3, 4], 1].max()
    else:
        np.testing.assert_equal(largest, poison)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_max_and_residues_do_not_see_poisoned_specials(poison: float) -> None:
    batch = _packed(3)
    hidden_TD = torch.from_numpy(_poisoned(batch.hidden_TD, batch.cu_seqlens, poison))
    largest = np.stack([residues.max(axis=0) for residues in batch.residues()])
    np.testing.assert_array_equal(pool_max(hidden_TD, batch.cu_seqlens).numpy(), largest)
    gathered = ResidueRows(3)
    pieces = [Piece(row, length, 0, length) for row, length in enumerate(LENGTHS)]
    gathered.add(pieces, _batch(pieces), hidden_TD)
    for got, expected in zip(gathered.result(), batch.residues(), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_mean_does_not_see_poisoned_specials(poison: float) -> None:
    batch = _packed(3)
    weights_T = torch.from_numpy(batch.weights_T)
    clean = pool_sum(torch.from_numpy(batch.hidden_TD), weights_T, batch.cu_seqlens)
    hidden_TD = torch.from_numpy(_poisoned(batch.hidden_TD, batch.cu_seqlens, poison))
    assert torch.equal(pool_sum(hidden_TD, weights_T, batch.cu_seqlens), clean)


def _poisoned(hidden_TD: Floats, cu_seqlens: torch.Tensor, poison: float) -> Floats:
    dirty: Floats = hidden_TD.copy()
    dirty[cu_seqlens[:-1].numpy()] = poison
    dirty[cu_seqlens[1:].numpy() - 1] = poison
    return dirty


# Proteins in windows, gathered from batches in any order


@dataclass(frozen=True)
class _Library:
    """Proteins cut into pieces, and what a model would have said of each piece."""

    lengths: Sequence[int] = PROTEINS
    width: int = 5
    hidden: dict[tuple[int, int], Floats] = field(default_factory=dict)

    def pieces(self) -> list[Piece]:
        return [
            piece
            for row, residues in enumerate(self.lengths)
            for piece in cut(row, residues, max_residues=WINDOW, long="window")
        ]

    def of(self, piece: Piece) -> Floats:
        key = (piece.row, piece.begin)
        if key not in self.hidden:
            self.hidden[key] = _hostile(piece.tokens, self.width, seed=1000 * piece.row + piece.begin)
        return self.hidden[key]

    def batches(self, seed: int) -> Iterator[tuple[list[Piece], PackedBatch, torch.Tensor]]:
        """Pieces in a random order, one to five a batch, so that most proteins lie in several."""
        rng = np.random.default_rng(seed)
        pieces = self.pieces()
        left = [pieces[index] for index in rng.permutation(len(pieces)).tolist()]
        while left:
            size = int(rng.integers(1, 6))
            batch, left = left[:size], left[size:]
            yield batch, _batch(batch), torch.from_numpy(np.concatenate([self.of(piece) for piece in batch]))

    def _literal_windows(self, row: int) -> list[tuple[int, int]]:
        residues = self.lengths[row]
        if residues <= WINDOW:
            return [(0, residues)]
        begins = []
        begin = 0
        while begin + WINDOW < residues:
            begins.append(begin)
            begin += WINDOW // 2
        return [(begin, begin + WINDOW) for begin in (*begins, residues - WINDOW)]

    def blended(self, row: int, *, absolute: bool = False) -> Gold:
        """The documented blending in fp64, residue by residue."""
        above, below = np.zeros((self.lengths[row], self.width)), np.zeros(self.lengths[row])
        for begin, end in self._literal_windows(row):
            hidden = self.hidden[row, begin].astype(np.float64)[1:-1]
            for place in range(end - begin):
                weight = min(place + 1, (end - begin) - place)
                above[begin + place] += weight * (np.abs(hidden[place]) if absolute else hidden[place])
                below[begin + place] += weight
        return above / below[:, None]


def _batch(pieces: Sequence[Piece]) -> PackedBatch:
    cu_seqlens = np.cumsum([0, *(piece.tokens for piece in pieces)])
    return pack_tokens(np.zeros(int(cu_seqlens[-1]), dtype=np.uint8), cu_seqlens)


def _gather(library: _Library, pool: str, seed: int) -> list[Floats]:
    residues, pooled = ResidueRows(library.width), PooledRows(pool, len(library.lengths), library.width)
    gathered = residues if pool == "residue" else pooled
    for pieces, packed, hidden_TD in library.batches(seed):
        gathered.add(pieces, packed, hidden_TD)
    return list(gathered.result())


def _check_mean(library: _Library, seed: int) -> None:
    for row, got_D in enumerate(_gather(library, "mean", seed)):
        gold, sizes = library.blended(row).mean(axis=0), library.blended(row, absolute=True).mean(axis=0)
        _assert_close(got_D, gold, sizes, library.lengths[row])


def _check_max(library: _Library, seed: int) -> None:
    for row, got_D in enumerate(_gather(library, "max", seed)):
        blended_LD, sizes = library.blended(row), library.blended(row, absolute=True)
        _assert_close(got_D, blended_LD.max(axis=0), sizes.max(axis=0), 3)


def _check_bos(library: _Library, seed: int) -> None:
    for row, got_D in enumerate(_gather(library, "bos", seed)):
        np.testing.assert_array_equal(got_D, library.hidden[row, 0][0])


def _check_residues(library: _Library, seed: int) -> None:
    rows = _gather(library, "residue", seed)
    assert [len(row_LD) for row_LD in rows] == list(library.lengths)
    for row, got_LD in enumerate(rows):
        _assert_close(got_LD, library.blended(row), library.blended(row, absolute=True), 3)


CHECKS: dict[str, Callable[[_Library, int], None]] = {
    "mean": _check_mean,
    "max": _check_max,
    "bos": _check_bos,
    "residue": _check_residues,
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("seed", range(4))
def test_rows_gathered_from_shuffled_batches(pool: str, seed: int) -> None:
    CHECKS[pool](_Library(), seed)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("width", [1, 123])
def test_rows_of_other_widths(pool: str, width: int) -> None:
    CHECKS[pool](_Library(lengths=(1, 9, 40, 8), width=width), 0)


@pytest.mark.parametrize("name", MUTANTS)
def test_checks_kill_mutant(name: str) -> None:
    """The same checks, the same proteins, one order of batches: at least one of them must see the mistake."""
    killed = []
    with MUTANTS[name]():
        for pool, check in CHECKS.items():
            try:
                check(_Library(), 0)
            except AssertionError:
                killed.append(pool)
    assert killed, f"survived every check: {name}"
    asked = name.split()[0]
    assert asked not in CHECKS or asked in killed, f"{name}: seen only by {killed}"


@pytest.mark.parametrize("pool", ["mean", "max", "bos"])
def test_low_precision_hidden_states_give_fp32_rows(pool: str) -> None:
    library = _Library(lengths=(3, 20))
    gathered = PooledRows(pool, 2, library.width)
    for pieces, packed, hidden_TD in library.batches(0):
        rounded_TD = hidden_TD.bfloat16().float().numpy()
        for piece, (begin, end) in zip(pieces, itertools.pairwise(packed.cu_seqlens.tolist()), strict=True):
            library.hidden[piece.row, piece.begin] = rounded_TD[begin:end]
        gathered.add(pieces, packed, hidden_TD.bfloat16())
    rows_BD = gathered.result()
    assert rows_BD.dtype == np.float32
    for row in range(2):
        blended_LD, sizes = library.blended(row), library.blended(row, absolute=True)
        if pool == "mean":
            _assert_close(rows_BD[row], blended_LD.mean(axis=0), sizes.mean(axis=0), 20)
        elif pool == "max":
            _assert_close(rows_BD[row], blended_LD.max(axis=0), sizes.max(axis=0), 3)
        else:
            np.testing.assert_array_equal(rows_BD[row], library.hidden[row, 0][0])


def test_rows_that_never_came_are_zero_or_absent() -> None:
    assert not PooledRows("mean", 2, 3).result().any()
    assert PooledRows("max", 0, 3).result().shape == (0, 3)
    assert ResidueRows(3).result() == []


def test_residues_are_the_caller_s_to_change() -> None:
    """Rows must not be views of a batch's hidden states: these may be used again."""
    pieces = [Piece(0, 2, 0, 2)]
    hidden_TD = torch.ones(4, 3)
    gathered = ResidueRows(3)
    gathered.add(pieces, _batch(pieces), hidden_TD)
    hidden_TD.zero_()
    np.testing.assert_array_equal(gathered.result()[0], np.ones((2, 3)))


def test_unknown_pool_is_refused() -> None:
    for pool in POOLS:
        check_pool(pool)
    with pytest.raises(ValueError, match="pool is 'sum'; allowed: mean, max, bos, residue"):
        check_pool("sum")
