"""From hidden states of packed tokens to one vector a sequence. All sums are in fp32, over residues only.

Shapes: B sequences, T tokens of all of them (each `<cls>`, residues, `<eos>`), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .packing import PackedBatch
from .transfer import Arrivals, to_device
from .windows import Piece

Floats = npt.NDArray[np.float32]

POOLS = ("mean", "max", "bos", "residue")


def check_pool(pool: str) -> None:
    """Raises ValueError if `pool` is not one of `POOLS`."""
    if pool not in POOLS:
        message = f"pool is {pool!r}; allowed: {', '.join(POOLS)}"
        raise ValueError(message)


def _blank_specials(values_TD: torch.Tensor, cu_seqlens: torch.Tensor, value: float) -> None:
    values_TD[cu_seqlens[:-1].long()] = value
    values_TD[cu_seqlens[1:].long() - 1] = value


def pool_sum(hidden_TD: torch.Tensor, weights_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Weighted sum over each sequence's residues, fp32 (B, D).

    Args:
        hidden_TD: any floating dtype.
        weights_T: float32; 1 / L gives the mean. `<cls>` and `<eos>` are left out, whatever their weight or value.
        cu_seqlens: int32 (B + 1,).
    """
    weighted_TD = hidden_TD.float() * weights_T[:, None]
    _blank_specials(weighted_TD, cu_seqlens, 0.0)
    return torch.segment_reduce(weighted_TD, "sum", offsets=cu_seqlens.long(), axis=0)


def pool_max(hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Largest value of each channel over each sequence's residues, fp32 (B, D)."""
    residues_TD = hidden_TD.float().clone()
    _blank_specials(residues_TD, cu_seqlens, -torch.inf)
    return torch.segment_reduce(residues_TD, "max", offsets=cu_seqlens.long(), axis=0)


def pool_bos(hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Each sequence's `<cls>`, fp32 (B, D)."""
    return hidden_TD[cu_seqlens[:-1].long()].float()


def _mean_weights(pieces: Sequence[Piece]) -> Floats:
    edge = np.zeros(1, dtype=np.float32)
    parts: list[Floats] = []
    for piece in pieces:
        share = np.ones(piece.end - piece.begin, dtype=np.float32) if piece.weights is None else piece.weights
        parts += [edge, share / np.float32(piece.residues), edge]
    return np.concatenate(parts)


class PooledRows:
    """Gathers one vector a protein from batches that come in any order.

    Args:
        pool: "mean", "max" or "bos".
        proteins: B.
        width: D.
    """

    def __init__(self, pool: str, proteins: int, width: int) -> None:
        self._pool = pool
        self._rows_BD = np.zeros((proteins, width), dtype=np.float32)
        # The maximum of a protein in windows is that of its blended residues, so these are gathered first.
        self._windowed = ResidueRows(width)
        self._arrivals = Arrivals()

    def add(self, pieces: Sequence[Piece], packed: PackedBatch, hidden_TD: torch.Tensor) -> None:
        """Takes in a batch: its pieces, in packed order, and their hidden states.

        Where the device runs out of memory, nothing has been taken in.
        """
        cu_seqlens = to_device(packed.cu_seqlens, hidden_TD.device)
        if self._pool == "mean":
            weights_T = to_device(torch.from_numpy(_mean_weights(pieces)), hidden_TD.device)
            pooled = pool_sum(hidden_TD, weights_T, cu_seqlens)
        else:
            pooled = pool_max(hidden_TD, cu_seqlens) if self._pool == "max" else pool_bos(hidden_TD, cu_seqlens)
        if self._pool == "max" and any(piece.weights is not None for piece in pieces):
            self._windowed.add(pieces, packed, hidden_TD, only_windows=True)
        self._arrivals.expect(pooled, lambda rows_BD: self._place(pieces, rows_BD))

    def _place(self, pieces: Sequence[Piece], rows_BD: Floats) -> None:
        for piece, row_D in zip(pieces, rows_BD, strict=True):
            if self._pool == "mean":
                self._rows_BD[piece.row] += row_D
            elif piece.begin == 0 and (self._pool == "bos" or piece.weights is None):
                self._rows_BD[piece.row] = row_D

    def result(self) -> Floats:
        """float32 (B, D)."""
        self._arrivals.finish()
        self._windowed.finish()
        for row, blended_LD in self._windowed.rows.items():
            self._rows_BD[row] = blended_LD.max(axis=0)
        return self._rows_BD


class ResidueRows:
    """Gathers one vector a residue, blending windows, from batches that come in any order.

    Attributes:
        rows: float32 (L, D) of each protein seen so far, all of them after `finish`.
    """

    def __init__(self, width: int) -> None:
        self.rows: dict[int, Floats] = {}
        self._width = width
        self._arrivals = Arrivals()

    def add(
        self, pieces: Sequence[Piece], packed: PackedBatch, hidden_TD: torch.Tensor, *, only_windows: bool = False
    ) -> None:
        """Takes in a batch: its pieces, in packed order, and their hidden states.

        Where the device runs out of memory, nothing has been taken in.
        """
        self._arrivals.expect(
            hidden_TD.float(), lambda rows_TD: self._place(pieces, packed.lengths_B, rows_TD, only_windows)
        )

    def finish(self) -> None:
        """Waits for what has been taken in and is still on its way from the device."""
        self._arrivals.finish()

    def _place(self, pieces: Sequence[Piece], lengths_B: Sequence[int], rows_TD: Floats, only_windows: bool) -> None:
        first = 1
        for piece, tokens in zip(pieces, lengths_B, strict=True):
            piece_LD = rows_TD[first : first + tokens - 2]
            first += tokens
            if piece.weights is not None:
                blended_LD = self.rows.setdefault(piece.row, np.zeros((piece.residues, self._width), dtype=np.float32))
                blended_LD[piece.begin : piece.end] += piece_LD * piece.weights[:, None]
            elif not only_windows:
                self.rows[piece.row] = piece_LD.copy()

    def result(self) -> list[Floats]:
        """float32 (L, D) of each protein, in the order of the caller's numbers."""
        self.finish()
        return [self.rows[row] for row in sorted(self.rows)]
