"""A teacher that is asked anew in every step: no gradient, the same packed batch as the student's."""

from __future__ import annotations

import torch

from ..engine.checkpoint import tensors_fingerprint
from ..engine.decoder import Decoder
from ..engine.encoder import Encoder
from ..engine.quantise import Int8Model, QuantisedEncoder
from ..kernels.linear_kd_loss import Head
from .row_task import RowBatch, language_model_head


class LiveTeacher:
    """An encoder or a decoder in memory (a `row_task.Teacher`).

    Args:
        model: any precision, on the device where the student trains.
    """

    def __init__(self, model: Encoder | Decoder) -> None:
        self.model = model.eval().requires_grad_(False)
        self.fingerprint = model_fingerprint(model)

    @torch.no_grad()
    def rows(self, batch: RowBatch) -> Head:
        """Its hidden states at the batch's rows, with its head's weight and bias."""
        # The student's autocast is not the teacher's, whose weights have their precision already.
        with torch.autocast(self.model.device.type, enabled=False):
            return language_model_head(self.model, batch)


def model_fingerprint(model: Encoder | Decoder) -> str:
    """Hash of architecture, weights and precision, the language-model head included."""
    quantised = "int8 " if isinstance(model, QuantisedEncoder | Int8Model) else ""
    return f"{quantised}{model.dtype} {tensors_fingerprint(model.config, model.state_dict())}".replace("torch.", "")
