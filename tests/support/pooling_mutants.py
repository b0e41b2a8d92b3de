"""Broken twins of the pooling: each context manager breaks `protnest.engine.pooling` (or the windows) in one way.

Every one must fail the very checks that the product passes. Shapes: B sequences, T tokens, L residues, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from protnest.engine import pooling, windows
from protnest.engine.packing import PackedBatch
from protnest.engine.pooling import PooledRows, ResidueRows, pool_bos, pool_max
from protnest.engine.windows import Piece

Floats = npt.NDArray[np.float32]
Mutant = Callable[[], AbstractContextManager[object]]
Add = Callable[[PooledRows, Sequence[Piece], PackedBatch, torch.Tensor], None]

_true_mean_weights = pooling._mean_weights
_true_windows = windows._windows
_true_add = PooledRows.add
_true_residue_add = ResidueRows.add


def _in_pooling(name: str, broken: object) -> Mutant:
    return lambda: mock.patch.object(pooling, name, broken)


def _in_windows(broken: Callable[[int, int, int], list[Piece]]) -> Mutant:
    return lambda: mock.patch.object(windows, "_windows", broken)


def _adding(pool: str, broken: Add) -> Mutant:
    """Replaces `PooledRows.add` for one pool, and leaves the others as they are."""

    def add(rows: PooledRows, pieces: Sequence[Piece], packed: PackedBatch, hidden_TD: torch.Tensor) -> None:
        (broken if rows._pool == pool else _true_add)(rows, pieces, packed, hidden_TD)

    return lambda: mock.patch.object(PooledRows, "add", add)


@contextmanager
def _specials_count() -> Iterator[None]:
    """<cls> and <eos> count as residues do."""
    with (
        mock.patch.object(pooling, "_mean_weights", _with_specials),
        mock.patch.object(pooling, "pool_sum", _plain_sum),
    ):
        yield


def _plain_sum(hidden_TD: torch.Tensor, weights_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    weighted_TD = hidden_TD.float() * weights_T[:, None]
    return torch.segment_reduce(weighted_TD, "sum", offsets=cu_seqlens.long(), axis=0)


def _with_specials(pieces: Sequence[Piece]) -> Floats:
    parts = []
    for piece in pieces:
        inner = _true_mean_weights([piece])[1:-1] * np.float32(piece.residues / (piece.residues + 2))
        parts.append(np.pad(inner, 1, constant_values=1 / (piece.residues + 2)))
    return np.concatenate(parts)


def _over_tokens(pieces: Sequence[Piece]) -> Floats:
    return np.concatenate([_true_mean_weights([p]) * np.float32(p.residues / (p.residues + 2)) for p in pieces])


def _over_the_piece(pieces: Sequence[Piece]) -> Floats:
    return np.concatenate([_true_mean_weights([p]) * np.float32(p.residues / (p.end - p.begin)) for p in pieces])


def _blending_left_out(pieces: Sequence[Piece]) -> Floats:
    return _true_mean_weights([dataclasses.replace(piece, weights=None) for piece in pieces])


def _sum_in_bf16(hidden_TD: torch.Tensor, weights_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    weighted_TD = (hidden_TD.bfloat16() * weights_T.bfloat16()[:, None]).float()
    return torch.segment_reduce(weighted_TD, "sum", offsets=cu_seqlens.long(), axis=0)


def _max_with_specials(hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return torch.segment_reduce(hidden_TD.float(), "max", offsets=cu_seqlens.long(), axis=0)


def _max_from_zero(hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Zero in place of minus infinity: seen only where all residues are below zero."""
    return pool_max(hidden_TD, cu_seqlens).clamp(min=0)


def _bos_is_first_residue(hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return hidden_TD[cu_seqlens[:-1].long() + 1].float()


def _max_without_blending(
    rows: PooledRows, pieces: Sequence[Piece], packed: PackedBatch, hidden_TD: torch.Tensor
) -> None:
    for piece, row_D in zip(pieces, pool_max(hidden_TD, packed.cu_seqlens).numpy(), strict=True):
        # Nothing has come for this protein yet while its row is all zeros.
        before_D = rows._rows_BD[piece.row]
        rows._rows_BD[piece.row] = np.maximum(before_D, row_D) if before_D.any() else row_D


def _last_window_of(wins: Callable[[Piece], bool]) -> Add:
    def add(rows: PooledRows, pieces: Sequence[Piece], packed: PackedBatch, hidden_TD: torch.Tensor) -> None:
        for piece, row_D in zip(pieces, pool_bos(hidden_TD, packed.cu_seqlens).numpy(), strict=True):
            if wins(piece):
                rows._rows_BD[piece.row] = row_D

    return add


def _mean_overwrites(rows: PooledRows, pieces: Sequence[Piece], packed: PackedBatch, hidden_TD: torch.Tensor) -> None:
    for piece in pieces:
        rows._rows_BD[piece.row] = 0
    _true_add(rows, pieces, packed, hidden_TD)


def _not_normalised(row: int, residues: int, size: int) -> list[Piece]:
    """The triangle's own height, whatever the other windows say."""
    places = np.arange(size)
    triangle = np.minimum(places + 1, size - places) / ((size + 1) // 2)
    return [
        dataclasses.replace(piece, weights=triangle.astype(np.float32)) for piece in _true_windows(row, residues, size)
    ]


def _flat(row: int, residues: int, size: int) -> list[Piece]:
    """Windows count alike wherever they overlap: sums are one, but there is no triangle."""
    pieces = _true_windows(row, residues, size)
    covered = np.zeros(residues)
    for piece in pieces:
        covered[piece.begin : piece.end] += 1
    return [
        dataclasses.replace(piece, weights=(1 / covered[piece.begin : piece.end]).astype(np.float32))
        for piece in pieces
    ]


def _residues_from_bos(
    rows: ResidueRows,
    pieces: Sequence[Piece],
    packed: PackedBatch,
    hidden_TD: torch.Tensor,
    *,
    only_windows: bool = False,
) -> None:
    _true_residue_add(rows, pieces, packed, hidden_TD.roll(1, 0), only_windows=only_windows)


MUTANTS: dict[str, Mutant] = {
    "mean counts cls and eos": _specials_count,
    "mean divides by tokens": _in_pooling("_mean_weights", _over_tokens),
    "mean divides by the window's residues": _in_pooling("_mean_weights", _over_the_piece),
    "mean counts overlaps twice": _in_pooling("_mean_weights", _blending_left_out),
    "mean in bf16": _in_pooling("pool_sum", _sum_in_bf16),
    "mean of the last batch alone": _adding("mean", _mean_overwrites),
    "window weights not normalised": _in_windows(_not_normalised),
    "window weights flat": _in_windows(_flat),
    "max counts cls and eos": _in_pooling("pool_max", _max_with_specials),
    "max begins at zero": _in_pooling("pool_max", _max_from_zero),
    "max over windows without blending": _adding("max", _max_without_blending),
    "bos is the first residue": _in_pooling("pool_bos", _bos_is_first_residue),
    "bos of the last window": _adding("bos", _last_window_of(lambda piece: piece.weights is None or piece.begin > 0)),
    "bos of the window that came last": _adding("bos", _last_window_of(lambda piece: True)),
    "residues begin at cls": lambda: mock.patch.object(ResidueRows, "add", _residues_from_bos),
}
"""Name of the mistake -> what makes it, for as long as it is open."""
