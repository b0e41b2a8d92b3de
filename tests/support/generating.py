"""A decoder of no size over few byte pairs, to generate with."""

from __future__ import annotations

from protnest.benchmarks.generate_problems import Problem
from protnest.engine.decoder_config import DecoderConfig

GENERATED = DecoderConfig(layers=2, width=32, heads=2, feedforward=64, vocabulary=700, places=64)


def tiny_generation(*, shape: str = "tiny", tokens: int = 10, seed: int = 0) -> Problem:
    return Problem(shape=shape, tokens=tokens, seed=seed, config=GENERATED)
