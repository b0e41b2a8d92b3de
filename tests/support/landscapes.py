"""Landscapes of made-up scores, for tests of what is drawn of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.engine.landscape import Landscape


def make_landscape(wild_type: str = "MKTAYIAK", *, seed: int = 0, **changes: Any) -> Landscape:
    """Random scores with 0 at the wild type's own residues; `changes` replace fields."""
    rng = np.random.default_rng(seed)
    scores_LA = rng.normal(-1, 2, size=(len(wild_type), len(AMINO_ACIDS))).astype(np.float32)
    for site, letter in enumerate(wild_type):
        if letter in AMINO_ACIDS:
            scores_LA[site, AMINO_ACIDS.index(letter)] = 0
    fields: dict[str, Any] = {
        "target": "made-up",
        "wild_type": wild_type,
        "scores_LA": scores_LA,
        "entropy_L": rng.uniform(0, 3, size=len(wild_type)).astype(np.float32),
        "given_LA": np.zeros(scores_LA.shape, dtype=bool),
        "method": "masked-marginal",
        "model": "tiny",
    }
    return Landscape(**{**fields, **changes})


def long_wild_type(length: int) -> str:
    """All 20 amino acids in turn, in an order that is none of alphabet or chemistry."""
    return ("MKTAYIAKQRWDNHESLVCFGP" * (length // 22 + 1))[:length]
