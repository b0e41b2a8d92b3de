"""A training step as published: transformers' models on padded batches, the distillation loss operation by operation.

Wijaya 2026: eight sequences, padded; the teacher runs on the same padded batch; the loss makes its tables for every
place, padding included. Spared here: padding to a fixed length (the batch's longest is enough), the teacher's own
cross-entropy, and an optimiser in a loop over parameters (ours and theirs is torch's fused AdamW).

Shapes: B sequences, L places of the longest one, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from protnest.benchmarks.published_kd import published_kd_loss
from protnest.engine.alphabet import PAD_ID
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.decoder import Decoder
from protnest.engine.decoder_checkpoint import save_decoder
from protnest.engine.encoder import Encoder
from protnest.training.row_task import IGNORED, RowBatch, RowTask
from protnest.training.trainer import TrainerConfig


class PublishedTrainer:
    """Takes the same steps as `Trainer` on a task, as published.

    Args:
        task: whose batches; its model's weights are copied.
        teacher: whose weights are copied too.
        config: of the optimiser; precision fp32.
        groups: numbers of the sequences of each batch, in turns.
    """

    def __init__(
        self, task: RowTask, teacher: Encoder | Decoder, config: TrainerConfig, groups: Sequence[Sequence[int]]
    ) -> None:
        self._task, self._config, self._groups = task, config, groups
        self.student = _adopt(task.model).train()
        self._teacher = _adopt(teacher).eval().requires_grad_(False)
        self._is_causal = isinstance(teacher, Decoder)
        decayed = [parameter for parameter in self.student.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in self.student.parameters() if parameter.dim() < 2]
        self._optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )
        self.step = 0

    def take_step(self) -> float:
        """One step; gives its loss."""
        batch = self._task.batch(self._groups[self.step % len(self._groups)], 0)
        for group in self._optimiser.param_groups:
            group["lr"] = self._config.learning_rate_at(self.step)
        loss = self.loss(batch)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._config.clip)
        self._optimiser.step()
        self.step += 1
        return loss.item()

    def loss(self, batch: RowBatch) -> torch.Tensor:
        """The loss of a batch, padded, 0-d."""
        tokens_BL, mask_BL, labels_BL = _pad(batch)
        given = {"input_ids": tokens_BL, "attention_mask": mask_BL}
        with torch.no_grad():
            teacher_BLV = self._teacher(**given).logits
        student_BLV = self.student(**given).logits
        if self._is_causal:
            # Each place predicts the next one: copies without the last place.
            student_BLV, teacher_BLV = student_BLV[:, :-1].contiguous(), teacher_BLV[:, :-1].contiguous()
            labels_BL = labels_BL[:, :-1].contiguous()
        B, L, V = student_BLV.shape
        return published_kd_loss(
            student_BLV.view(-1, V),
            teacher_BLV.view(-1, V),
            labels_BL.reshape(-1),
            torch.arange(B).repeat_interleave(L),
            B,
            self._task.options,
        )


def _pad(batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and labels of a batch's sequences: (B, L) each."""
    packed = batch.packed
    labels_T = torch.full((len(packed.tokens_T),), IGNORED)
    labels_T[batch.chosen.index_R] = batch.labels_N
    shape = (len(packed.lengths_B), max(packed.lengths_B))
    tokens_BL, labels_BL = torch.full(shape, PAD_ID), torch.full(shape, IGNORED)
    mask_BL = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate(packed.lengths_B):
        begin = int(packed.cu_seqlens[row])
        tokens_BL[row, :length] = packed.tokens_T[begin : begin + length]
        labels_BL[row, :length] = labels_T[begin : begin + length]
        mask_BL[row, :length] = 1
    return tokens_BL, mask_BL, labels_BL


def _adopt(model: Encoder | Decoder) -> Any:
    """transformers' model with the same weights."""
    from transformers import EsmForMaskedLM, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, Encoder):
            save_checkpoint(model, Path(folder))
            return EsmForMaskedLM.from_pretrained(folder)
        save_decoder(model, Path(folder))
        return GPT2LMHeadModel.from_pretrained(folder)
