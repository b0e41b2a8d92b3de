"""A library of any size: variants of real proteins, 150 residues long in the mean, the same ones at each call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.engine.atomic import replacing
from protnest.engine.fasta import read_fasta

LENGTHS = (64, 226)
"""Proteins of so many residues are taken: 150.05 in the mean of 20,138 of Swiss-Prot."""
_MOST_MUTATIONS = 10


def write_variants(source: Path, path: Path, count: int, *, seed: int = 0) -> int:
    """Writes `count` variants of a FASTA file's proteins as FASTA, and gives the number of their residues.

    Each has one to ten substitutions. The first n of a larger library are the library of n.

    Raises:
        InputError: the file cannot be read.
        ValueError: no protein in it is as long as asked.
    """
    chosen = [
        record for record in read_fasta(source, invalid="skip") if LENGTHS[0] <= len(record.sequence) <= LENGTHS[1]
    ]
    if not chosen:
        message = f"{source} holds no protein of {LENGTHS[0]} to {LENGTHS[1]} residues"
        raise ValueError(message)
    random = np.random.default_rng(seed)
    # Whoever takes the first tenth and the last of a library finds the same proteins in both, if not the same variants.
    order = random.permutation(len(chosen))
    letters = np.frombuffer(AMINO_ACIDS.encode(), np.uint8)
    residues = 0
    with replacing(path) as temporary, temporary.open("w", encoding="ascii") as file:
        for number in range(count):
            record = chosen[order[number % len(order)]]
            sequence = np.frombuffer(record.sequence.encode(), np.uint8).copy()
            sites = random.integers(len(sequence), size=random.integers(1, _MOST_MUTATIONS + 1))
            sequence[sites] = random.choice(letters, size=len(sites))
            file.write(f">v{number} {record.id.encode('ascii', 'replace').decode()}\n{sequence.tobytes().decode()}\n")
            residues += len(sequence)
    return residues
