"""Training an ESM-2 encoder from sequences alone, as a masked language model: `Trainer` on a `MaskedTask`.

A run is a function of its configuration, so that a killed run goes on from its last checkpoint to the same weights as
an uninterrupted one: bit for bit on one CPU with fixed threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.device import precision_name, resolve_device, resolve_precision
from ..engine.errors import InputError
from .corpus import read_corpus
from .masked_task import MaskedTask
from .perplexity import held_out_perplexity, unigram_perplexity
from .students import ENCODER_PRESETS, build_student, save_student
from .trainer import Trainer, TrainerConfig
from .training_folder import TrainingFolder


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides the weights.

    Attributes:
        preset: architecture, by its name in `ENCODER_PRESETS`.
        steps: optimiser steps, each of one packed batch.
        batch_tokens: most tokens in a batch.
        learning_rate: its peak, reached after `warmup_steps`, then falling linearly to zero.
        weight_decay: on matrices alone, not on biases or norms.
        seed: of weights, order, crops and masks.
        precision: of the matrix products: "fp32" or "bf16"; weights and optimiser stay fp32.

    Raises:
        InputError: there is no such preset, or a value is outside its range.
    """

    preset: str
    steps: int
    batch_tokens: int = 4096
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.preset not in ENCODER_PRESETS:
            message = f"preset is {self.preset!r}; allowed: {', '.join(ENCODER_PRESETS)}"
            raise InputError(message)
        self.trainer()

    def trainer(self) -> TrainerConfig:
        """How the trainer is set."""
        settings = asdict(self)
        del settings["preset"]
        return TrainerConfig(**settings)


def _rounded(value: float) -> float | None:
    """Three decimals; None for what JSON cannot hold."""
    return round(value, 3) if math.isfinite(value) else None


def pretrain(
    fasta: Path,
    out: Path,
    config: PretrainConfig,
    *,
    device: str = "auto",
    overwrite: bool = False,
    save_every_s: float = 120.0,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Trains a preset on a FASTA file and writes `out` in Hugging Face layout; goes on where a killed run stopped.

    `out` gets `model.safetensors` (fp16), `config.json`, `vocab.txt`, `training.json` (recipe, data, perplexities), and
    what `TrainingFolder` keeps. A finished run of the same settings is not repeated.

    Returns:
        What `training.json` holds.

    Raises:
        InputError: the FASTA is invalid or too small, `out` holds a run of other settings and `overwrite` is not set,
            the loss diverged, or the disk is full.
    """
    train, held_out = read_corpus(fasta)
    resolved = resolve_device(device)
    resolve_precision(config.precision, resolved)
    encoder = build_student(config.preset, seed=config.seed)
    task = MaskedTask(encoder, train, seed=config.seed)  # type: ignore[arg-type]  # a preset of encoders
    trainer = Trainer(task, config.trainer(), device=resolved)
    with TrainingFolder(out, {"preset": config.preset, **trainer.identity()}, overwrite=overwrite) as folder:
        if folder.report is not None:
            return folder.report
        seconds = folder.train(
            trainer, save_every_s=save_every_s, after_step=lambda report: after_step(report.step, report.loss)
        )
        encoder = task.model.eval()
        report = {
            **asdict(config),
            "precision": precision_name(resolve_precision(config.precision, resolved)),
            "device": resolved.type,
            "torch": torch.__version__,
            "data": {"file": fasta.name, "train_sequences": len(train), "held_out_sequences": len(held_out)},
            "seconds": round(seconds, 1),
            "held_out_perplexity": _rounded(held_out_perplexity(encoder, held_out, sequences=1000)),
            "unigram_perplexity": round(unigram_perplexity(train, held_out), 3),
        }
        save_student(encoder, out)
        folder.finish(report)
        return report
