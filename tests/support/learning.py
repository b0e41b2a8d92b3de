"""Toys to train: a linear task, tiny encoders and decoders, and corpora of made-up proteins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from protnest.engine.alphabet import BOS_ID, EOS_ID, RESIDUE_TABLE
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.config import EncoderConfig
from protnest.engine.decoder import Decoder
from protnest.engine.decoder_checkpoint import save_decoder
from protnest.engine.decoder_config import DecoderConfig
from protnest.engine.encoder import Encoder
from protnest.engine.vocabulary import ResidueVocabulary
from protnest.kernels import tokenise
from protnest.training.corpus import Corpus, is_held_out
from protnest.training.order import Portion
from protnest.training.trainer import Loss

from support.tiny import random_proteins, write_fasta

CPU = torch.device("cpu")
TOY = EncoderConfig(layers=2, width=16, heads=2, feedforward=32, max_residues=20)
TOY_DECODER = DecoderConfig(layers=2, width=16, heads=2, feedforward=32, vocabulary=33, places=24)


class LinearTask:
    """Learns the sum of four numbers; sequence i takes `lengths[i]` tokens and has as many rows."""

    def __init__(self, sequences: int = 24, *, dropout: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(4, 1))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.lengths_B = np.random.default_rng(seed).integers(1, 9, size=sequences)
        self.inputs = [torch.randn(length, 4, generator=generator) for length in self.lengths_B.tolist()]
        self.seen: list[Portion] = []

    def loss(self, portion: Portion) -> Loss:
        self.seen.append(portion)
        rows = torch.cat([self.inputs[index] for index in portion.index_B.tolist()])
        errors = self.model(rows)[:, 0] - rows.sum(dim=1)
        return Loss((errors**2).mean(), len(rows))

    def identity(self) -> dict[str, Any]:
        return {"task": "sums"}

    def describe(self, index: int) -> str:
        return f"row{index}"


def corpus_of(sequences: list[str]) -> Corpus:
    ids = tuple(f"protein{number}" for number in range(len(sequences)))
    return Corpus(*tokenise([each.encode() for each in sequences], RESIDUE_TABLE, bos=BOS_ID, eos=EOS_ID), ids)


def toy_encoder(seed: int = 0, config: EncoderConfig = TOY, *, head: bool = True) -> Encoder:
    """With weights large enough for opinions that differ from row to row."""
    torch.manual_seed(seed)
    encoder = Encoder(config, name=f"toy{seed}", head=head)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return encoder


def toy_decoder(seed: int = 0, config: DecoderConfig = TOY_DECODER, vocabulary: Any = None) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(config, vocabulary or ResidueVocabulary(), name=f"toy{seed}")
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return decoder


def save_toy(folder: Path, model: Encoder | Decoder) -> Path:
    (save_checkpoint if isinstance(model, Encoder) else save_decoder)(model, folder)  # type: ignore[operator]
    return folder


def proteins_to_train(count: int = 16, held_out: int = 3, *, longest: int = 40) -> list[str]:
    """Some to train on, some of them longer than the toys' context, and some that are held out."""
    pool = random_proteins(400, seed=4, longest=longest)
    return [s for s in pool if not is_held_out(s)][:count] + [s for s in pool if is_held_out(s)][:held_out]


def fasta_to_train(path: Path, **counts: Any) -> Path:
    return write_fasta(path, proteins_to_train(**counts))
