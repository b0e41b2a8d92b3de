"""A chain at work on batches: hidden states of its models in, nested rows gathered for each protein.

Pooled rows (mean, bos) take each model's normalised hidden states, pool them, and are projected once per protein:
the projection is affine and the pooling's weights add up to one, so the two commute. The maximum does not commute, and
residues are not pooled: their rows are projected token by token, in a buffer that holds the whole row.

What leaves a model is the same for every chain that begins with the same models, and stages are projected one by one
with shapes that do not depend on later ones: so the first dimensions have the very bits that the smaller models give.

Shapes: B proteins, T tokens of a batch, D width of a model, X of the row so far, W of the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..kernels import nested_embed
from .chain import Chain, Fold
from .exported_encoder import ExportedEncoder
from .family import Member
from .graphs import Runner
from .packing import PackedBatch
from .pooling import Floats, PooledRows, ResidueRows
from .windows import Piece


class Gathering(Protocol):
    """Takes batches model by model, and gives all rows in the end."""

    def take(self, level: int, number: int, pieces: Sequence[Piece], packed: PackedBatch, encoder: Runner) -> None:
        """Runs batch `number` through the model at `level`. Levels of one batch come in order.

        Where the device runs out of memory, nothing is kept of the attempt.
        """

    def divide(self, number: int, first: int, second: int, tokens: int) -> None:
        """Batch `number` goes on as two: `first` has its first `tokens` tokens, `second` the others."""

    def result(self) -> Floats | list[Floats]:
        """float32 (B, W), or of each protein (L, W)."""


class PlainRows:
    """One model, no chain; of `layer`, where it is not the last one."""

    def __init__(self, pool: str, proteins: int, width: int, *, layer: int | None = None) -> None:
        self._layer = layer
        self._rows = ResidueRows(width) if pool == "residue" else PooledRows(pool, proteins, width)

    def take(self, level: int, number: int, pieces: Sequence[Piece], packed: PackedBatch, encoder: Runner) -> None:
        if self._layer is None:
            hidden_TD = encoder(packed).hidden_TD
        else:
            assert not isinstance(encoder, ExportedEncoder)
            hidden_TD = encoder.hidden(packed, self._layer)
        self._rows.add(pieces, packed, hidden_TD)

    def divide(self, number: int, first: int, second: int, tokens: int) -> None:
        """Nothing is kept of a batch."""

    def result(self) -> Floats | list[Floats]:
        return self._rows.result()


class PooledRuns:
    """An exported file that pools by itself.

    Args:
        output: "mean" or "nested".
        proteins: B.
        width: of the row, whose first dimensions are kept.
    """

    def __init__(self, output: str, proteins: int, width: int) -> None:
        self._output = output
        self._rows_BW = np.zeros((proteins, width), dtype=np.float32)

    def take(self, level: int, number: int, pieces: Sequence[Piece], packed: PackedBatch, encoder: Runner) -> None:
        assert isinstance(encoder, ExportedEncoder)
        rows_BW = encoder.pooled(packed, self._output).numpy()
        self._rows_BW[[piece.row for piece in pieces]] = rows_BW[:, : self._rows_BW.shape[1]]

    def divide(self, number: int, first: int, second: int, tokens: int) -> None:
        """Nothing is kept of a batch."""

    def result(self) -> Floats:
        return self._rows_BW


class Nesting:
    """The stages of a chain, folded with its models' final LayerNorms.

    Args:
        chain: what was fitted.
        members: an initial run of its models.

    Raises:
        InputError: the models are not an initial run of the chain's.
    """

    def __init__(self, chain: Chain, members: Sequence[Member]) -> None:
        chain.check_models(members)
        self.chain = chain
        self.members = tuple(members)
        self.widths = chain.widths[: len(members)]
        self.folds = tuple(
            stage.fold(*member.norm)
            for stage, member in zip(chain.stages, members[1:], strict=False)
            if member.norm is not None
        )

    def append(
        self,
        row_TW: torch.Tensor,
        level: int,
        hidden_TD: torch.Tensor,
        fold: Fold,
        *,
        eps: float | None,
    ) -> None:
        """Brings rows from `level - 1` to `level`, in place: more columns, or in a naive chain all of them anew."""
        X = self.widths[level - 1]
        matrices = (fold.projection_DN, fold.base_XN, fold.offset_N)
        if not self.chain.is_naive:
            nested_embed(row_TW[:, :X], hidden_TD, *matrices, eps=eps, out=row_TW)
            return
        appended_TZ = nested_embed(row_TW[:, :X], hidden_TD, *matrices, eps=eps)
        row_TW[:, : self.widths[level]] = appended_TZ[:, X:]

    def buffer_width(self, device: torch.device) -> int:
        """Columns of a row's buffer. On a CPU those of the whole chain, also where fewer models run: then no matrix
        product's strides depend on how many do, and no library's choice of kernel can touch a prefix's bits."""
        return self.chain.widths[-1] if device.type == "cpu" else self.widths[-1]


class PooledNesting:
    """Mean or bos: pooled per model, projected once per protein, on the CPU in fp32."""

    def __init__(self, nesting: Nesting, pool: str, proteins: int, width: int) -> None:
        self._nesting = nesting
        self._width = width
        self._levels = [PooledRows(pool, proteins, width) for width in nesting.widths]

    def take(self, level: int, number: int, pieces: Sequence[Piece], packed: PackedBatch, encoder: Runner) -> None:
        if level == 0:
            hidden_TD = encoder(packed).hidden_TD
        else:
            stream_TD = encoder.stream(packed)
            hidden_TD = F.layer_norm(stream_TD, stream_TD.shape[-1:], eps=encoder.config.layer_norm_eps)
        self._levels[level].add(pieces, packed, hidden_TD)

    def divide(self, number: int, first: int, second: int, tokens: int) -> None:
        """Nothing is kept of a batch but rows of its proteins."""

    def result(self) -> Floats:
        nesting, cpu = self._nesting, torch.device("cpu")
        pooled = [torch.from_numpy(rows.result()) for rows in self._levels]
        row_BW = torch.zeros((pooled[0].shape[0], nesting.buffer_width(cpu)))
        row_BW[:, : nesting.widths[0]] = pooled[0]
        for level, fold in enumerate(nesting.folds, start=1):
            nesting.append(row_BW, level, pooled[level], fold.to(cpu, torch.float32), eps=None)
        out: Floats = row_BW[:, : self._width].contiguous().numpy()
        return out


class ResidueNesting:
    """Residue or max: each token's row, level by level.

    A batch's rows wait on the CPU between levels where only one model is in memory, else they stay where they are.
    """

    def __init__(self, nesting: Nesting, pool: str, proteins: int, width: int, *, resident: bool) -> None:
        self._nesting = nesting
        self._width = width
        self._resident = resident
        self._rows = ResidueRows(width) if pool == "residue" else PooledRows(pool, proteins, width)
        self._waiting: dict[int, torch.Tensor] = {}
        device = nesting.members[0].device
        # On a CPU fp32 products are the fastest whatever the model's precision; a GPU multiplies in the model's.
        dtype = torch.float32 if device.type == "cpu" else nesting.members[0].dtype
        self._folds = [fold.to(device, dtype) for fold in nesting.folds]
        self._device = device

    def take(self, level: int, number: int, pieces: Sequence[Piece], packed: PackedBatch, encoder: Runner) -> None:
        nesting = self._nesting
        if level == 0:
            hidden_TD = encoder(packed).hidden_TD
            row_TW = hidden_TD.new_empty((len(hidden_TD), nesting.buffer_width(self._device)), dtype=torch.float32)
            row_TW[:, : nesting.widths[0]] = hidden_TD
        else:
            row_TW = self._waiting[number].to(self._device)
            if self._resident and nesting.chain.is_naive:
                # A naive stage writes over what it read; should memory end later on, it must be there to be read again.
                row_TW = row_TW.clone()
            eps = encoder.config.layer_norm_eps
            nesting.append(row_TW, level, encoder.stream(packed), self._folds[level - 1], eps=eps)
        if level + 1 < len(nesting.widths):
            self._waiting[number] = row_TW if self._resident else row_TW.cpu()
        else:
            self._rows.add(pieces, packed, row_TW[:, : self._width])
            self._waiting.pop(number, None)

    def divide(self, number: int, first: int, second: int, tokens: int) -> None:
        if number in self._waiting:
            row_TW = self._waiting.pop(number)
            self._waiting[first], self._waiting[second] = row_TW[:tokens], row_TW[tokens:]

    def result(self) -> Floats | list[Floats]:
        return self._rows.result()
