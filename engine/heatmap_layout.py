"""Where everything in a picture of a landscape goes: which residue in which row and column, which marks, which ticks.

Shapes: L residues of the protein, A the 20 amino acids in the order of `ROWS`, C the columns of one block.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACIDS
from .landscape import Landscape
from .palette import CHEMISTRY

ROWS = "".join(acids for _, acids in CHEMISTRY)
"""Amino acids from top to bottom."""

GAP = -1
"""Stands in a column of no residue, between two stretches."""

_SHORTEST_LEFT_OUT = 10
_GAP_COLUMNS = 3
_TICKS_EVERY = 10
_ROOM_OF_A_TICK = 4
_COLUMNS = 100
_ASPECT = 20
"""Blocks are about 30 columns high: with this, pictures of long proteins are half as high again as they are wide."""
_MARKED_SHARE = 0.25
"""Boxes around more of the cells than this would mark nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One row of the picture: up to some hundred residues beside one another.

    Attributes:
        sites_C: int64 (C,), the residue in each column, from 0; `GAP` where there is none.
        scores_AC: float32 (20, C), what is coloured: 0 at the wild type's own, NaN in gaps and where nothing is known.
        shown_C: bool (C,), columns that hold a residue.
        dots: (row, column) of the wild type's own residues.
        boxes: (row, column) of the substitutions that the caller's table named, where that tells anything.
        letters: (column, letter) of the wild type.
        ticks: (column, number of the residue as the caller counts).
    """

    sites_C: npt.NDArray[np.int64]
    scores_AC: npt.NDArray[np.float32]
    shown_C: npt.NDArray[np.bool_]
    dots: tuple[tuple[int, int], ...]
    boxes: tuple[tuple[int, int], ...]
    letters: tuple[tuple[int, str], ...]
    ticks: tuple[tuple[int, int], ...]


def lay_out(landscape: Landscape) -> tuple[Block, ...]:
    """Blocks from top to bottom. Ten or more residues in a row of which nothing is known are left out."""
    stretches = find_stretches(landscape)
    columns: list[int] = []
    for start, stop in stretches:
        columns += [GAP] * _GAP_COLUMNS * bool(columns)
        columns += range(start, stop)
    width = choose_width(len(columns))
    rows = [_strip(columns[place : place + width]) for place in range(0, len(columns), width)]
    boxed = _marks_something(landscape)
    return tuple(_block(landscape, row, boxed) for row in rows if row)


def find_stretches(landscape: Landscape) -> list[tuple[int, int]]:
    """First residue, and the one after the last, from 0, of each stretch that is drawn; all if nothing is known."""
    known = np.flatnonzero(landscape.known_L)
    if not known.size:
        return [(0, landscape.length)]
    # One before the first and one after the last close the runs of unknown residues at both ends.
    edges = [-1, *known.tolist(), landscape.length]
    holes = [(left + 1, right) for left, right in itertools.pairwise(edges)]
    left_out = [hole for hole in holes if hole[1] - hole[0] >= _SHORTEST_LEFT_OUT]
    starts = [0, *(stop for _, stop in left_out)]
    stops = [*(start for start, _ in left_out), landscape.length]
    return [stretch for stretch in zip(starts, stops, strict=True) if stretch[0] < stretch[1]]


def choose_width(columns: int) -> int:
    """Columns of a block: about 100, and more for long proteins, whose picture would else be a ribbon. A multiple of
    ten that leaves no last block of a few residues."""
    wanted = max(_COLUMNS, math.sqrt(_ASPECT * columns))
    blocks = max(1, round(columns / wanted))
    return 10 * math.ceil(columns / blocks / 10)


def _strip(columns: list[int]) -> list[int]:
    """Without gaps at its ends."""
    filled = [place for place, site in enumerate(columns) if site != GAP]
    return columns[filled[0] : filled[-1] + 1] if filled else []


def _marks_something(landscape: Landscape) -> bool:
    known_LA = np.isfinite(landscape.substitutions_LA)
    named = int((landscape.given_LA & known_LA).sum())
    return 0 < named <= _MARKED_SHARE * int(known_LA.sum())


def _block(landscape: Landscape, columns: list[int], boxed: bool) -> Block:
    sites_C = np.array(columns, dtype=np.int64)
    shown_C = sites_C != GAP
    order_A = [AMINO_ACIDS.index(acid) for acid in ROWS]
    own_AC = landscape.own_LA[sites_C][:, order_A].T & shown_C
    scores_AC = np.where(shown_C, landscape.substitutions_LA[sites_C][:, order_A].T, np.float32(np.nan))
    given_AC = landscape.given_LA[sites_C][:, order_A].T & np.isfinite(scores_AC) & boxed
    return Block(
        sites_C=sites_C,
        scores_AC=np.where(own_AC, np.float32(0), scores_AC),
        shown_C=shown_C,
        dots=_places(own_AC),
        boxes=_places(given_AC),
        letters=tuple((place, landscape.wild_type[site]) for place, site in enumerate(columns) if site != GAP),
        ticks=_ticks(columns, landscape.first),
    )


def _places(marked_AC: npt.NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    return tuple((int(row), int(column)) for row, column in np.argwhere(marked_AC))


def _ticks(columns: list[int], first: int) -> tuple[tuple[int, int], ...]:
    """Every tenth residue, and the ends of stretches where there is room."""
    shown = [(place, site + first) for place, site in enumerate(columns) if site != GAP]
    ticks = [(place, number) for place, number in shown if number % _TICKS_EVERY == 0]
    taken = {place for place, _ in ticks}
    for place, number in shown:
        before = columns[place - 1] if place else GAP
        after = columns[place + 1] if place + 1 < len(columns) else GAP
        at_an_end = before == GAP or after == GAP
        if at_an_end and all(abs(place - other) >= _ROOM_OF_A_TICK for other in taken):
            ticks.append((place, number))
            taken.add(place)
    return tuple(sorted(ticks))
