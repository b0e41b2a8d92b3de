"""Packed batches: the tokens of many sequences back to back, without padding.

Shapes: B sequences, T tokens of all of them, R chosen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ..kernels import tokenise
from .alphabet import BOS_ID, EOS_ID, RESIDUE_TABLE
from .transfer import to_device


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """What an encoder runs in one go.

    Attributes:
        tokens_T: int32, ids of all tokens; each sequence is `<cls>`, its residues, `<eos>`.
        cu_seqlens: int32 (B + 1,), where each sequence begins; the last entry is T.
        lengths_B: tokens of each sequence, on the host, so that nothing waits for a GPU to learn them.
        index_B: int64 (B,), which of the caller's sequences each one is.
    """

    tokens_T: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths_B: tuple[int, ...]
    index_B: npt.NDArray[np.int64]

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on `device`; nothing waits for the copies."""
        if self.tokens_T.device == device:
            return self
        return PackedBatch(
            tokens_T=to_device(self.tokens_T, device),
            cu_seqlens=to_device(self.cu_seqlens, device),
            lengths_B=self.lengths_B,
            index_B=self.index_B,
        )

    def filled(self, tokens: int) -> PackedBatch:
        """The same batch with sequences of one token each, and of nobody, until there are `tokens`.

        `index_B` knows nothing of them: whoever calls for them leaves out the rows beyond those of `self`.
        """
        T = len(self.tokens_T)
        if tokens == T:
            return self
        ends = torch.arange(T + 1, tokens + 1, dtype=self.cu_seqlens.dtype, device=self.cu_seqlens.device)
        return PackedBatch(
            tokens_T=F.pad(self.tokens_T, (0, tokens - T)),
            cu_seqlens=torch.cat([self.cu_seqlens, ends]),
            lengths_B=self.lengths_B + (1,) * (tokens - T),
            index_B=self.index_B,
        )


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """Some tokens of a packed batch.

    Attributes:
        index_R: int64, places of R tokens in the batch; those of a sequence stand together, in the sequences' order.
        counts_B: how many belong to each sequence, on the host.
    """

    index_R: torch.Tensor
    counts_B: tuple[int, ...]

    def to(self, device: torch.device) -> ChosenRows:
        """The same tokens, named on `device`; nothing waits for the copy."""
        return ChosenRows(to_device(self.index_R, device), self.counts_B)


def refuse_one_string(sequences: Sequence[str]) -> None:
    """Raises TypeError for a plain string, which would be taken for a list of one-letter proteins."""
    if isinstance(sequences, str):
        message = "sequences is one string; pass a list of sequences, also for a single one"
        raise TypeError(message)


def pack(sequences: Sequence[str], index_B: npt.NDArray[np.int64] | None = None) -> PackedBatch:
    """Packs sequences of residues into one batch on the CPU, each with its own `<cls>` and `<eos>`.

    Args:
        sequences: B strings of letters of the alphabet.
        index_B: int64 (B,), the caller's numbers of them; 0 to B - 1 by default.

    Raises:
        TypeError: `sequences` is a plain string.
        ValueError: a letter is outside the alphabet.
    """
    refuse_one_string(sequences)
    tokens, cu_seqlens = tokenise(
        [sequence.encode("ascii", "replace") for sequence in sequences], RESIDUE_TABLE, bos=BOS_ID, eos=EOS_ID
    )
    return pack_tokens(tokens, cu_seqlens, index_B)


def pack_tokens(
    tokens_T: npt.NDArray[np.uint8],
    cu_seqlens: npt.NDArray[np.int64],
    index_B: npt.NDArray[np.int64] | None = None,
) -> PackedBatch:
    """Makes a batch of token ids uint8 (T,) that lie back to back, cut at `cu_seqlens` int64 (B + 1,)."""
    lengths = np.diff(cu_seqlens)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens_T.astype(np.int32)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        lengths_B=tuple(lengths.tolist()),
        index_B=np.arange(lengths.size, dtype=np.int64) if index_B is None else index_B,
    )
