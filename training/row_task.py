"""Learning to predict tokens, from labels alone or from a teacher too: what encoders and decoders have in common.

A row is a token that is predicted: a masked residue of an encoder, a next token of a decoder. The last product of the
language-model head is left to the loss, so that logits never exist as a whole (`linear_kd_loss`).

Shapes: N rows of a batch, B sequences, D width, V vocabulary.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..engine.decoder import Decoder
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.packing import ChosenRows, PackedBatch
from ..kernels import linear_kd_loss
from ..kernels.kd_options import KDOptions
from ..kernels.linear import linear
from ..kernels.linear_kd_loss import Head
from .corpus import Corpus
from .order import Index, Portion
from .top_k_loss import TopKRows, top_k_loss
from .trainer import Loss

IGNORED = -100
"""Label of a row that the hard loss leaves out."""

SMALL_VOCABULARY = 64
"""Up to so many tokens logits cost next to nothing: they are made in fp32 always, and a cache keeps all of them."""


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Sequences to run, and their rows.

    Attributes:
        packed: the sequences, as the models see them.
        chosen: the N tokens whose predictions are asked for, in the sequences' order.
        labels_N: int64, the token to predict, or `IGNORED`.
        keys: what a cache calls each sequence: its number, and which of its masks it wears (0 where there are none).
        soft: whether rows without a label learn from the teacher too.
    """

    packed: PackedBatch
    chosen: ChosenRows
    labels_N: torch.Tensor
    keys: tuple[tuple[int, int], ...]
    soft: bool = False

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """int64 (B + 1,): where each sequence's rows begin."""
        return F.pad(torch.tensor(self.chosen.counts_B, dtype=torch.int64).cumsum(0), (1, 0))

    @property
    def rows(self) -> int:
        """How many rows the loss is the mean of."""
        return len(self.labels_N) if self.soft else int((self.labels_N != IGNORED).sum())


class Teacher(Protocol):
    """What a student learns from beside the labels.

    Attributes:
        fingerprint: hash of its weights, architecture and precision, head included.
    """

    @property
    def fingerprint(self) -> str: ...

    def rows(self, batch: RowBatch) -> Head | TopKRows:
        """What it says at the batch's rows, on the device of its own model or of `packed`; no gradient."""
        ...


class RowTask(ABC):
    """A model that learns to predict tokens (a `trainer.Task`).

    Args:
        model: the student.
        corpus: sequences to train on, in the model's tokens.
        teacher: None for labels alone: plain cross-entropy.
        options: of the distillation loss; without a teacher they have no effect.

    Attributes:
        teacher_seconds: spent on the teacher's answers so far; on a GPU, on asking for them.
    """

    def __init__(
        self, model: Encoder | Decoder, corpus: Corpus, *, teacher: Teacher | None, options: KDOptions | None
    ) -> None:
        self.model, self.corpus, self.teacher = model, corpus, teacher
        self.options = options or KDOptions()
        self.teacher_seconds = 0.0

    @property
    @abstractmethod
    def lengths_B(self) -> Index:
        """int64 (B,), tokens that each sequence takes in a batch."""

    @abstractmethod
    def batch(self, numbers: Sequence[int], epoch: int) -> RowBatch:
        """Sequences as they are shown in an epoch, on the CPU; the same in whatever batch."""

    def describe(self, index: int) -> str:
        return self.corpus.describe(index)

    @property
    def masks(self) -> int:
        """How many ways there are to show a sequence; 0: another one in each epoch."""
        return 1

    def row_identity(self) -> dict[str, Any]:
        """All that decides which rows there are and what a teacher says of them."""
        return {"data": self.corpus.fingerprint}

    def identity(self) -> dict[str, Any]:
        return {
            "architecture": asdict(self.model.config),
            **self.row_identity(),
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
            **({} if self.teacher is None else asdict(self.options)),
        }

    def loss(self, portion: Portion) -> Loss:
        """Cross-entropy, or the distillation loss, of the rows of some sequences."""
        batch = self.batch(portion.index_B.tolist(), portion.epoch)
        started = time.perf_counter()
        taught = None if self.teacher is None else self.teacher.rows(batch)
        self.teacher_seconds += time.perf_counter() - started
        head = language_model_head(self.model, batch)
        return Loss(row_loss(head, taught, batch, self.options), batch.rows)


def language_model_head(model: Encoder | Decoder, batch: RowBatch) -> Head:
    """Runs a model over a batch: what the last product of its head multiplies at the batch's rows, and its weight.

    Small vocabularies in fp32 at least, large ones in the precision of matrix products: autocast's where it is on, else
    the weights'.

    Raises:
        InputError: an encoder without a language-model head.
    """
    if isinstance(model, Encoder):
        if model.head is None:
            message = f"{model.name} has no language-model head: its checkpoint holds the encoder alone"
            raise InputError(message)
        hidden_ND = model.head.features(model.row_hidden(batch.packed, batch.chosen))
        bias_V: torch.Tensor | None = model.head.bias
    else:
        hidden_ND, bias_V = model(batch.packed)[batch.chosen.index_R.to(model.device)], None
    weight_VD = model.embed_tokens.weight
    dtype = torch.promote_types(weight_VD.dtype, torch.float32)
    if weight_VD.shape[0] > SMALL_VOCABULARY:
        kind = model.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
    return Head(
        hidden_ND=hidden_ND.to(dtype),
        weight_VD=weight_VD.to(dtype),
        bias_V=None if bias_V is None else bias_V.to(dtype),
    )


def row_loss(student: Head, taught: Head | TopKRows | None, batch: RowBatch, options: KDOptions) -> torch.Tensor:
    """The loss of a batch's rows, 0-d.

    Args:
        student: of N rows.
        taught: what the teacher says of them: as a head, whole logits being a head whose weight is the identity; as the
            most likely tokens; or None: cross-entropy alone, options without effect.
        batch: their labels and segments.
        options: of the distillation loss.
    """
    device = student.hidden_ND.device
    # Products that autocast would round are made in the head's own dtype.
    with torch.autocast(device.type, enabled=False):
        labels_N, cu_seqlens = batch.labels_N.to(device), batch.cu_seqlens.to(device)
        if taught is None:
            return _cross_entropy(student, labels_N)
        soft_N = torch.ones_like(labels_N, dtype=torch.bool) if batch.soft else labels_N != options.ignore_index
        if isinstance(taught, TopKRows):
            return top_k_loss(student, taught.to(device), labels_N, cu_seqlens, soft_N, options)
        return linear_kd_loss(
            student.hidden_ND,
            student.weight_VD,
            taught.hidden_ND,
            taught.weight_VD,
            labels_N,
            cu_seqlens,
            student.bias_V,
            taught.bias_V,
            soft_rows=soft_N,
            **asdict(options),
        )


def _cross_entropy(student: Head, labels_N: torch.Tensor) -> torch.Tensor:
    V = student.weight_VD.shape[0]
    if V <= SMALL_VOCABULARY:
        logits_NV = linear(student.hidden_ND, student.weight_VD, student.bias_V)
        return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED)
    # The fused loss, with a teacher of width one whose loss counts no row.
    nothing = student.hidden_ND.new_zeros(1)
    return linear_kd_loss(
        student.hidden_ND,
        student.weight_VD,
        nothing.expand(len(labels_N), 1).contiguous(),
        nothing.expand(V, 1).contiguous(),
        labels_N,
        torch.tensor([0, len(labels_N)], device=labels_N.device),
        student.bias_V,
        alpha=1.0,
        uncertainty=False,
        smooth=False,
        soft_rows=torch.zeros_like(labels_N, dtype=torch.bool),
        ignore_index=IGNORED,
    )
