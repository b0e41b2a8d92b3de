"""The proteins that are embedded: a seeded sample of a FASTA file, or made-up ones whose lengths are like UniProt's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from protnest.engine import read_fasta
from protnest.engine.alphabet import AMINO_ACIDS

MAX_RESIDUES = 1022
"""Longer proteins are cut to this for every engine: what ESM-2 was trained on, and where fair-esm's script cuts."""

# Percent of each of AMINO_ACIDS in 20,000 random proteins of UniProt, and a log-normal law of their lengths: quartiles
# of 188, 330 and 580 residues, where those proteins have 189, 345 and 583.
_COMPOSITION = (
    *(7.48, 1.61, 5.39, 6.84, 3.92, 6.55, 2.27, 5.82, 6.05, 9.57),
    *(2.34, 4.33, 4.94, 4.02, 5.36, 7.45, 5.42, 6.53, 1.10, 2.99),
)
_MEDIAN_RESIDUES, _SIGMA, _FEWEST_RESIDUES = 330, 0.835, 30


@dataclass(frozen=True, kw_only=True)
class Proteins:
    """What all engines are given.

    Attributes:
        source: where they come from.
        sequences: of at most `MAX_RESIDUES` residues each, in random order, so that any first part is like the whole.
        truncated: how many had to be cut.
    """

    source: str
    sequences: list[str]
    truncated: int = 0

    @property
    def residues(self) -> int:
        """Residues of all sequences."""
        return sum(map(len, self.sequences))


def sample_fasta(path: Path, *, count: int, seed: int) -> Proteins:
    """A random sample of a FASTA file without replacement; letters outside the alphabet become X.

    Raises:
        ValueError: the file holds fewer than `count` proteins.
        InputError: the file cannot be read.
    """
    everything = [record.sequence for record in read_fasta(path, invalid="mask")]
    if len(everything) < count:
        message = f"{path} holds {len(everything)} proteins, {count} were asked for"
        raise ValueError(message)
    chosen = np.random.default_rng(seed).choice(len(everything), size=count, replace=False)
    sequences = [everything[index] for index in chosen.tolist()]
    return Proteins(
        source=path.name,
        sequences=[sequence[:MAX_RESIDUES] for sequence in sequences],
        truncated=sum(len(sequence) > MAX_RESIDUES for sequence in sequences),
    )


MIXES = ("uniprot", "uniform", "antibody")
"""Mixes of lengths: as in UniProt; 256 residues each; 120 residues, give or take 5, as antibodies' variable domains."""
UNIFORM_RESIDUES, UNIFORM_BATCH = 256, 8
_ANTIBODY_RESIDUES, _ANTIBODY_SIGMA = 120, 5


def make_up(*, count: int, seed: int, longest: int = MAX_RESIDUES) -> Proteins:
    """Random proteins with UniProt's composition and spread of lengths, cut to between 30 and `longest` residues."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(np.log(_MEDIAN_RESIDUES), _SIGMA, size=count)).astype(np.int64)
    lengths = lengths.clip(min(_FEWEST_RESIDUES, longest), longest)
    return _of_lengths(lengths, generator, f"made up, seed {seed}")


def make_up_mix(mix: str, *, count: int, seed: int) -> Proteins:
    """Random proteins of one of `MIXES`.

    Raises:
        ValueError: there is no such mix.
    """
    generator = np.random.default_rng(seed)
    source = f"made up {mix}, seed {seed}"
    if mix == "uniprot":
        return make_up(count=count, seed=seed)
    if mix == "uniform":
        return _of_lengths(np.full(count, UNIFORM_RESIDUES), generator, source)
    if mix == "antibody":
        lengths = generator.normal(_ANTIBODY_RESIDUES, _ANTIBODY_SIGMA, size=count).round().astype(np.int64)
        return _of_lengths(lengths.clip(min=_FEWEST_RESIDUES), generator, source)
    message = f"mix is {mix!r}, expected one of {', '.join(MIXES)}"
    raise ValueError(message)


def _of_lengths(lengths: npt.NDArray[np.int64], generator: np.random.Generator, source: str) -> Proteins:
    shares = np.array(_COMPOSITION) / sum(_COMPOSITION)
    letters = generator.choice(np.frombuffer(AMINO_ACIDS.encode("ascii"), dtype=np.uint8), lengths.sum(), p=shares)
    text, ends = letters.tobytes().decode("ascii"), np.cumsum(lengths).tolist()
    sequences = [text[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
    return Proteins(source=source, sequences=sequences)


def first_tokens(sequences: Sequence[str], tokens: int) -> list[str]:
    """The first sequences that together have at least `tokens` tokens, `<cls>` and `<eos>` counted; or all of them."""
    total, taken = 0, 0
    for sequence in sequences:
        if total >= tokens:
            break
        total, taken = total + len(sequence) + 2, taken + 1
    return list(sequences[:taken])
