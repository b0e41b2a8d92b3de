"""A made-up protein, some of whose residues have variants, and a tiny model of it that fair-esm's code can run, too."""

from __future__ import annotations

from protnest.benchmarks.score_engines import Problem, all_singles, random_scorer
from protnest.engine.config import EncoderConfig

SCORER = EncoderConfig(layers=2, width=32, heads=2, feedforward=128)
WILD_TYPE = "MKTAYIAKQRQISFVKSHFSRQ"
TOUCHED = tuple(range(2, 20))
"""Residues with variants, from 0: 18 of 22."""


def tiny_problem() -> Problem:
    variants = [variant for variant in all_singles(WILD_TYPE) if variant.sites[0] in TOUCHED]
    encoder = random_scorer(SCORER, seed=0)
    return Problem(model="tiny", encoder=encoder, protein="made up", wild_type=WILD_TYPE, variants=variants)
