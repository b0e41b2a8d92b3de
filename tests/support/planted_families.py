"""Families of proteins at a known identity: an ancestor's copies with some residues drawn anew."""

from __future__ import annotations

import numpy as np

from support.tiny import LETTERS


def planted_families(
    families: int, members: int, *, kept: float, residues: int = 120, seed: int = 0
) -> tuple[list[str], list[int]]:
    """Proteins, family after family, and the family of each.

    Args:
        families, members: how many, and of how many each.
        kept: chance of each residue to be its ancestor's; two members then share about its square.
        residues: of an ancestor; members lack up to a tenth at either end.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    proteins, family_of = [], []
    for family in range(families):
        ancestor = rng.choice(LETTERS, size=residues)
        for _ in range(members):
            copy = np.where(rng.random(residues) < kept, ancestor, rng.choice(LETTERS, size=residues))
            begin, end = rng.integers(0, max(1, residues // 20), size=2)
            proteins.append("".join(copy[begin : residues - end]))
            family_of.append(family)
    return proteins, family_of
