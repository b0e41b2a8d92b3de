"""Ranges of lengths that an engine is built for, chosen from the lengths of the proteins that it is to run.

An engine is tuned for each of its optimisation profiles by itself, and takes as many rows as fit that profile's longest
one; so proteins that share a range with longer ones pay for these. The ranges are those that cost the fewest places if
every protein were filled up to the end of its range: an exact partition in one dimension, by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError

SWISS_PROT_RESIDUES = (
    *(62, 94, 118, 142, 165, 188, 210, 232, 256, 281),
    *(307, 333, 363, 394, 431, 473, 525, 596, 699, 875),
)
"""Lengths that stand for Swiss-Prot's where none are given: its 2.5th, 7.5th, ... 97.5th percentiles, measured on
60,000 sequences of release 2014_01, redundancy-reduced, of up to 1,022 residues."""
DEFAULT_COUNT = 3
DEFAULT_MOST_TOKENS = 8192
FEWEST_TOKENS = 3
"""`<cls>`, one residue, `<eos>`."""
_EDGES = 2


@dataclass(frozen=True, kw_only=True)
class LengthProfile:
    """Shapes of one optimisation profile: rows from one to `most_rows`, of `fewest_tokens` to `most_tokens` tokens.

    Attributes:
        fewest_tokens: of the shortest row, `<cls>` and `<eos>` counted.
        best_tokens: what it is tuned for.
        most_tokens: of the longest row.
        best_rows: what it is tuned for.
        most_rows: in one batch.
    """

    fewest_tokens: int
    best_tokens: int
    most_tokens: int
    best_rows: int
    most_rows: int

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Smallest, best and largest (batch, length), as TensorRT takes them."""
        return (1, self.fewest_tokens), (self.best_rows, self.best_tokens), (self.most_rows, self.most_tokens)


def choose_profiles(
    lengths: Sequence[int], *, count: int, max_residues: int, max_tokens: int = DEFAULT_MOST_TOKENS
) -> tuple[LengthProfile, ...]:
    """Ranges that follow each other without gap or overlap, from one residue to `max_residues`.

    Args:
        lengths: residues of proteins like those that will run; longer ones than `max_residues` count as that long.
        count: most profiles; there are fewer where there are fewer different lengths.
        max_residues: the longest protein.
        max_tokens: of one batch, padding included; a row alone may have more.

    Returns:
        Shortest first. The last one reaches `max_residues`, whatever the lengths are.

    Raises:
        InputError: there are no lengths, one is below 1, or `count`, `max_residues` or `max_tokens` is.
    """
    for name, value in (("profiles", count), ("max_residues", max_residues), ("max_tokens", max_tokens)):
        if value < 1:
            message = f"{name} must be 1 or more, got {value}"
            raise InputError(message)
    residues = np.minimum(np.asarray(lengths, dtype=np.int64), max_residues)
    if not residues.size or residues.min() < 1:
        message = f"lengths must be 1 or more, got {'none' if not residues.size else residues.min()}"
        raise InputError(message)
    values, counts = np.unique(residues, return_counts=True)
    ends = _partition(values, counts, min(count, values.size))
    profiles: list[LengthProfile] = []
    begin = 0
    for end in ends:
        middle = _median(values[begin:end], counts[begin:end]) + _EDGES
        longest = (max_residues if end == values.size else int(values[end - 1])) + _EDGES
        rows = max(1, max_tokens // longest)
        profiles.append(
            LengthProfile(
                fewest_tokens=profiles[-1].most_tokens + 1 if profiles else FEWEST_TOKENS,
                best_tokens=middle,
                most_tokens=longest,
                best_rows=rows,
                most_rows=rows,
            )
        )
        begin = end
    return tuple(profiles)


def find_profile(profiles: Sequence[LengthProfile], tokens: int) -> int | None:
    """Which of the profiles takes rows of so many tokens; None where none does."""
    for place, profile in enumerate(profiles):
        if profile.fewest_tokens <= tokens <= profile.most_tokens:
            return place
    return None


def _partition(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], groups: int) -> list[int]:
    """Ends (exclusive) of the groups of sorted values whose sum of distances to each group's last value is least."""
    total = np.concatenate(([0], np.cumsum(counts)))
    # A group costs its number times its last value, less its sum; the sums add up to the same wherever groups begin.
    best = np.full(values.size + 1, np.inf)
    best[0] = 0.0
    choices = []
    for _ in range(groups):
        found, choice = np.full(values.size + 1, np.inf), np.zeros(values.size + 1, dtype=np.int64)
        for end in range(1, values.size + 1):
            costs = best[:end] + values[end - 1] * (total[end] - total[:end])
            choice[end] = int(costs.argmin())
            found[end] = costs[choice[end]]
        best = found
        choices.append(choice)
    ends = [int(values.size)]
    for choice in choices[:0:-1]:
        ends.append(int(choice[ends[-1]]))
    return ends[::-1]


def _median(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> int:
    below = np.cumsum(counts)
    return int(values[np.searchsorted(below, (below[-1] + 1) // 2)])
