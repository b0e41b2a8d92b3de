"""A tiny encoder on disk, and FASTA files, for tests that need a whole run but no good model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.config import EncoderConfig
from protnest.engine.encoder import Encoder

TINY = EncoderConfig(layers=2, width=32, heads=2, feedforward=64, max_residues=60)
LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def save_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """A random encoder of `TINY` sizes in Hugging Face layout."""
    torch.manual_seed(seed)
    encoder = Encoder(TINY)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(encoder, folder)
    return folder


def random_proteins(count: int, *, seed: int = 0, longest: int = 50) -> list[str]:
    """Random sequences of 1 to `longest` residues."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(LETTERS, size=rng.integers(1, longest + 1))) for _ in range(count)]


def write_fasta(path: Path, sequences: Sequence[str], *, prefix: str = "protein") -> Path:
    """Writes sequences under the ids `protein0`, `protein1`, ..."""
    path.write_text("".join(f">{prefix}{row} number {row}\n{text}\n" for row, text in enumerate(sequences)))
    return path
