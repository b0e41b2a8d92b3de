"""Identity of two proteins by a real alignment: parasail, BLOSUM62, gaps 11 to open and 1 to extend, free at the ends.

Of one protein to another it is the share of the one's residues that stand opposite the same amino acid in the best
alignment. Free ends mean that a domain finds itself in a longer protein. X and all letters beside the 20 are identical
to nothing. Two unrelated proteins are some 5 to 15 % identical in this sense.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import Any

from ..engine.alphabet import AMINO_ACIDS
from ..engine.errors import InputError

GAP_OPEN, GAP_EXTEND = 11, 1

_OTHER = re.compile(f"[^{AMINO_ACIDS}]")


def check_aligner() -> None:
    """What can be known before anything is computed.

    Raises:
        InputError: parasail is not installed.
    """
    if importlib.util.find_spec("parasail") is None:
        message = "aligning sequences needs parasail: pip install 'protnest[eval]'"
        raise InputError(message)


@functools.cache
def _matrix() -> Any:
    """BLOSUM62 in which `*`, the other side's X, costs what X does: as both are unlike, they never count as equal."""
    from parasail import blosum62

    matrix = blosum62.copy()
    unknown, star = (blosum62.mapper[ord(letter)] for letter in "X*")
    for place in range(matrix.size):
        cost = int(blosum62.matrix[unknown, place if place != star else unknown])
        matrix.set_value(star, place, cost)
        matrix.set_value(place, star, cost)
    return matrix


def identical_residues(one: str, other: str) -> int:
    """How many residues of two proteins, upper case, stand opposite the same amino acid.

    Raises:
        InputError: parasail is not installed.
    """
    check_aligner()
    import parasail

    # In one X and in the other *, so that two unknown residues are not taken for equal ones.
    pair = _OTHER.sub("X", one), _OTHER.sub("*", other)
    result = parasail.sg_stats_striped_16(*pair, GAP_OPEN, GAP_EXTEND, _matrix())
    if result.saturated:
        result = parasail.sg_stats_striped_32(*pair, GAP_OPEN, GAP_EXTEND, _matrix())
    return int(result.matches)


def identity_to(one: str, other: str) -> float:
    """Share of the first one's residues that are identical: 1 where it is found whole in the other."""
    return identical_residues(one, other) / len(one)


def mutual_identity(one: str, other: str) -> float:
    """The smaller of the two shares: 1 for the same sequence alone."""
    return identical_residues(one, other) / max(len(one), len(other))
