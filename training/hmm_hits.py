"""How many designed sequences a family's profile recognises: HMMER's search, through pyhmmer.

E-values are as if 10,000 sequences were searched, however many there are, so that a design's verdict does not depend on
its company. A longer sequence has more places for a chance hit: shuffled copies of the designs say how many there are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from xopen import xopen

from ..engine.alphabet import AMINO_ACIDS
from ..engine.errors import InputError
from .estimate import Estimate, share
from .follower import NOBODY, Follower

SEARCHED = 10_000
EVALUE = 1e-5
ALIGNMENTS = {".a2m": "a2m", ".afa": "afa", ".fasta": "afa", ".fa": "afa", ".sto": "stockholm", ".stk": "stockholm"}
"""Endings of alignment files, plain or .gz, and pyhmmer's names of their formats."""

_KNOWN = frozenset(AMINO_ACIDS + "BZUOX")
_BUILD_SEED = 42
# Residues that are searched between two words to whoever follows: a second or so of one core.
_BLOCK_RESIDUES = 100_000


@dataclass(frozen=True, kw_only=True)
class HmmHits:
    """Designs held against a profile.

    Attributes:
        profile: its name.
        columns: how many match states it has.
        evalue: a hit is below it.
        hits: share of designs that are one.
        reference: the same of the reference set, None without one: what a perfect model would reach.
        shuffled: the same of the designs with their residues in random order: what composition and length reach.
    """

    profile: str
    columns: int
    evalue: float
    hits: Estimate
    reference: Estimate | None
    shuffled: Estimate


def check_pyhmmer() -> None:
    """What can be known before anything is computed.

    Raises:
        InputError: pyhmmer is not installed.
    """
    if importlib.util.find_spec("pyhmmer") is None:
        message = "profiles of families need pyhmmer: pip install 'protnest[eval]'"
        raise InputError(message)


def read_profile(path: Path) -> Any:
    """Reads the one protein profile of a HMMER file: a `pyhmmer.plan7.HMM`.

    Raises:
        InputError: pyhmmer is not installed, or the file is missing, no profile, of nucleotides, or holds several.
    """
    check_pyhmmer()
    from pyhmmer.plan7 import HMMFile

    _check_there(path, "profile")
    try:
        with xopen(path, "rb", threads=0) as stream, HMMFile(stream) as file:
            profiles = list(file)
    except (ValueError, EOFError, OSError, UnicodeDecodeError) as error:
        message = f"is no HMMER profile: {error}"
        raise InputError(message, file=path) from error
    if len(profiles) != 1:
        message = f"holds {len(profiles)} profiles, expected one family's"
        raise InputError(message, file=path)
    if not profiles[0].alphabet.is_amino():
        message = f"is a profile of {profiles[0].alphabet.type}, expected amino acids"
        raise InputError(message, file=path)
    return profiles[0]


def build_profile(path: Path) -> Any:
    """Builds a profile from a family's alignment, as HMMER's `hmmbuild` does by default: a `pyhmmer.plan7.HMM`.

    Raises:
        InputError: pyhmmer is not installed, or the file is missing, of an unknown ending, no alignment, holds fewer
            than two sequences, or gives no profile.
    """
    check_pyhmmer()
    from pyhmmer.easel import Alphabet, MSAFile
    from pyhmmer.plan7 import Background, Builder

    _check_there(path, "alignment")
    stem = path.with_suffix("") if path.suffix == ".gz" else path
    kind: Any = ALIGNMENTS.get(stem.suffix.lower())
    if kind is None:
        message = f"ends in {stem.suffix!r}; alignments end in {', '.join(ALIGNMENTS)}, or these with .gz"
        raise InputError(message, file=path)
    amino: Any = Alphabet.amino()
    try:
        with xopen(path, "rb", threads=0) as stream:
            alignment = MSAFile(stream, format=kind, digital=True, alphabet=amino).read()
    except (ValueError, EOFError, OSError, UnicodeDecodeError) as error:
        message = f"is no alignment in the format {kind}: {error}"
        raise InputError(message, file=path) from error
    count = 0 if alignment is None else len(alignment.sequences)
    if alignment is None or count < 2:
        message = f"holds {count} sequences: a family's profile needs at least two, aligned"
        raise InputError(message, file=path)
    _name(alignment, stem.stem)
    try:
        return Builder(amino, seed=_BUILD_SEED).build_msa(alignment, Background(amino))[0]
    except (ValueError, RuntimeError) as error:
        message = f"gives no profile: {error}"
        raise InputError(message, file=path) from error


def _name(alignment: Any, name: str) -> None:
    """Names are text in newer releases of pyhmmer, bytes in older ones."""
    try:
        alignment.name = name
    except TypeError:
        alignment.name = name.encode()


def _check_there(path: Path, what: str) -> None:
    if not path.is_file():
        message = f"there is no {what} file"
        raise InputError(message, file=path)


def hmm_hits(
    profile: Any,
    generated: Sequence[str],
    *,
    reference: Sequence[str] | None = None,
    evalue: float = EVALUE,
    seed: int = 0,
    follower: Follower = NOBODY,
) -> HmmHits:
    """Searches designs, a reference and shuffled designs with a profile.

    Args:
        profile: of `read_profile` or `build_profile`.
        generated: designs.
        reference: natural members of the family, perhaps.
        evalue: a hit is below it.
        seed: of the shuffling.
        follower: is told how far the search is.
    """
    follower.stage(f"searching {len(generated):,} designs", sum(map(len, (*generated, *generated, *(reference or ())))))
    rng = np.random.default_rng(seed)
    shuffled = ["".join(rng.permutation(list(each)).tolist()) for each in generated]
    name = profile.name
    return HmmHits(
        profile=name.decode() if isinstance(name, bytes) else str(name),
        columns=int(profile.M),
        evalue=evalue,
        hits=_share(profile, generated, evalue, follower),
        reference=None if reference is None else _share(profile, reference, evalue, follower),
        shuffled=_share(profile, shuffled, evalue, follower),
    )


def _share(profile: Any, sequences: Sequence[str], evalue: float, follower: Follower) -> Estimate:
    return share(len(hit_rows(profile, sequences, evalue=evalue, follower=follower)), len(sequences))


def hit_rows(
    profile: Any, sequences: Sequence[str], *, evalue: float = EVALUE, follower: Follower = NOBODY
) -> set[int]:
    """Which sequences a profile recognises, by their places; searched in blocks, on which no verdict depends."""
    from pyhmmer.easel import DigitalSequenceBlock, TextSequence
    from pyhmmer.plan7 import Pipeline

    alphabet = profile.alphabet
    hits, block, residues = set[int](), list[Any](), 0
    for row, sequence in enumerate(sequences):
        block.append(TextSequence(name=str(row).encode(), sequence=_searchable(sequence)).digitize(alphabet))
        residues += len(sequence)
        if residues < _BLOCK_RESIDUES and row < len(sequences) - 1:
            continue
        pipeline = Pipeline(alphabet, Z=SEARCHED, E=evalue)
        found = pipeline.search_hmm(profile, DigitalSequenceBlock(alphabet, block))
        hits |= {int(hit.name) for hit in found if hit.evalue < evalue}
        follower.advance(residues)
        block, residues = [], 0
    return hits


def _searchable(sequence: str) -> str:
    """With X for gaps, which a sequence to be searched must not hold."""
    return "".join(letter if letter in _KNOWN else "X" for letter in sequence)
