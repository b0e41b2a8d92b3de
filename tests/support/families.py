"""Families of tiny encoders of growing width, chains that nobody fitted, and what a chain says written out in fp64.

Shapes: T tokens, D width of a model, X width of the row so far, N dimensions that a stage adds.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from protnest.engine import Encoder
from protnest.engine.chain import Chain, ChainModel, Stage
from protnest.engine.checkpoint import encoder_fingerprint
from protnest.engine.config import EncoderConfig
from protnest.engine.packing import PackedBatch

WIDTHS = (16, 24, 40)
MAX_RESIDUES = (30, 20, 25)
"""The smallest is not the first model's."""


def tiny_family(widths: Sequence[int] = WIDTHS, *, seed: int = 0) -> list[Encoder]:
    """Random encoders, norms and biases included: with ones and zeros, leaving them out would not show."""
    encoders = []
    for place, width in enumerate(widths):
        torch.manual_seed(100 * seed + place)
        config = EncoderConfig(
            layers=1 + place, width=width, heads=2, feedforward=2 * width, max_residues=MAX_RESIDUES[place % 3]
        )
        encoder = Encoder(config, name=f"tiny{width}").eval().requires_grad_(False)
        for name, parameter in encoder.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.1, std=0.3)
        encoder.fingerprint = encoder_fingerprint(encoder)
        encoders.append(encoder)
    return encoders


def models_of(encoders: Sequence[Encoder]) -> tuple[ChainModel, ...]:
    """How a chain names them."""
    return tuple(
        ChainModel(
            name=encoder.name,
            width=encoder.dim,
            max_residues=encoder.config.max_residues,
            fingerprint=encoder.fingerprint,
        )
        for encoder in encoders
    )


def random_chain(
    encoders: Sequence[Encoder], *, naive: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Chain:
    """A chain for these encoders whose stages are random: nothing in it is zero, small or symmetric."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    stages = []
    for small, large in itertools.pairwise(encoders):
        X, D = small.dim, large.dim
        rows, columns = (D, X + D) if naive else (D - X, D)
        components = torch.linalg.qr(normal(columns, rows))[0].T
        stages.append(
            Stage(
                weight_XD=None if naive else (normal(X, D) / X**0.5).to(dtype),
                bias_D=None if naive else normal(D).to(dtype),
                mean=normal(X + D if naive else D).to(dtype),
                components=components.to(dtype).contiguous(),
            )
        )
    return Chain(
        models=models_of(encoders), stages=tuple(stages), regressor="naive" if naive else "linear", data={"made": "up"}
    )


def literal_rows(encoders: Sequence[Encoder], chain: Chain, batch: PackedBatch) -> torch.Tensor:
    """The chain stage by stage, as it is written in the paper: fp64 (T, W), every model in fp64 too."""
    hidden = [copy.deepcopy(encoder).double()(batch).hidden_TD for encoder in encoders]
    row = hidden[0]
    for stage, y in zip(chain.stages, hidden[1:], strict=False):
        mean, components = stage.mean.double(), stage.components.double()
        if stage.weight_XD is None or stage.bias_D is None:
            row = (torch.cat((row, y), dim=-1) - mean) @ components.T
        else:
            predicted = row @ stage.weight_XD.double() + stage.bias_D.double()
            row = torch.cat((row, (y - predicted - mean) @ components.T), dim=-1)
    return row
