"""Long proteins: overlapping windows, and how their residues are blended.

A protein of more residues than the model was trained on runs as windows of that length, each with its own `<cls>` and
`<eos>`, half a window apart, the last one aligned to the protein's end. A residue's embedding is the weighted mean of
what its windows say. The weight falls linearly from a window's middle to its ends, and the weights of a residue add up
to one:

    t(p) = min(p + 1, W - p)          p = 0 .. W - 1, the place in a window of W residues
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError

LONG_POLICIES = ("window", "full", "truncate", "error")


@dataclass(frozen=True, eq=False)
class Piece:
    """What of a protein runs in one go.

    Attributes:
        row: which of the caller's proteins it belongs to.
        residues: how many residues of that protein are run, over all its pieces.
        begin: first residue, from 0.
        end: one past the last residue.
        weights: float32 (end - begin,), the share of each residue's embedding that comes from here; None means all.
    """

    row: int
    residues: int
    begin: int
    end: int
    weights: npt.NDArray[np.float32] | None = None

    @property
    def tokens(self) -> int:
        """Residues plus `<cls>` and `<eos>`."""
        return self.end - self.begin + 2


def window_begins(residues: int, size: int) -> list[int]:
    """First residues of the windows over a protein of more than `size` residues."""
    return [*range(0, residues - size, max(1, size // 2)), residues - size]


def centred_window(residues: int, place: int, size: int) -> tuple[int, int]:
    """The window of at most `size` residues in whose middle a residue lies, as far as the protein's ends allow.

    Args:
        residues: of the protein.
        place: the residue's, from 0.
        size: most residues in the window.

    Returns:
        First residue of the window, from 0, and one past its last. At most `size` residues: the whole protein.
    """
    begin = max(0, min(place - size // 2, residues - size))
    return begin, min(residues, begin + size)


def _windows(row: int, residues: int, size: int) -> list[Piece]:
    begins = window_begins(residues, size)
    places = np.arange(size)
    triangle = np.minimum(places + 1, size - places).astype(np.float64)
    total = np.zeros(residues)
    for begin in begins:
        total[begin : begin + size] += triangle
    return [
        Piece(row, residues, begin, begin + size, (triangle / total[begin : begin + size]).astype(np.float32))
        for begin in begins
    ]


def cut(row: int, residues: int, *, max_residues: int, long: str) -> list[Piece]:
    """The pieces in which a protein runs.

    Args:
        row: the caller's number of the protein.
        residues: its length.
        max_residues: the length that the model was trained on.
        long: "window"; "full" runs it whole, as rotary positions allow; "truncate" keeps the first `max_residues`;
            "error" refuses.

    Raises:
        InputError: it is too long and `long` is "error".
        ValueError: `long` is unknown.
    """
    check_policy(long)
    if residues <= max_residues or long == "full":
        return [Piece(row, residues, 0, residues)]
    if long == "truncate":
        return [Piece(row, max_residues, 0, max_residues)]
    if long == "error":
        message = f"{residues} residues, but the model was trained on at most {max_residues}"
        raise InputError(message)
    return _windows(row, residues, max_residues)


def residues_run(residues: int, *, max_residues: int, long: str) -> int:
    """Residues that a protein costs to run, those in several windows counted as often; none where `long` refuses it.

    Raises:
        ValueError: `long` is unknown.
    """
    check_policy(long)
    if residues <= max_residues or long == "full":
        return residues
    windows = {"window": len(window_begins(residues, max_residues)), "truncate": 1, "error": 0}[long]
    return max_residues * windows


def check_policy(long: str) -> None:
    """Raises ValueError if `long` is not one of `LONG_POLICIES`."""
    if long not in LONG_POLICIES:
        message = f"long is {long!r}; allowed: {', '.join(LONG_POLICIES)}"
        raise ValueError(message)
