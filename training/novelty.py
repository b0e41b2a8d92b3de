"""How close each designed sequence is to what a model was trained on: identity to its nearest neighbour.

Where all pairs are few enough they are all aligned. Beyond, the sequences for training that share most distinct 5-mers
with a design are aligned to it: a neighbour of less than about 30 % identity may then be missed, so that what is close
to 30 % is a lower bound; a design that shares none counts as 0.

Shapes: G designs, M training sequences of a chunk, C candidates of a design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .composition import LETTERS
from .estimate import Estimate, mean, share
from .follower import NOBODY, Follower
from .identity import check_aligner, identity_to

Integers = npt.NDArray[np.int64]

NOVEL_BELOW = 0.7
"""A design less identical than this to its neighbour counts as novel."""

WORD = 5
CANDIDATES = 20
ALL_PAIRS_CELLS = 5_000_000_000
"""Up to so many pairs of residues every design is aligned to every training sequence: about 20 s of one core."""

_CHUNK = 2000
_NO_LETTER = 255
_CODE_OF = np.full(256, _NO_LETTER, dtype=np.uint8)
_CODE_OF[np.frombuffer(LETTERS.encode(), dtype=np.uint8)] = np.arange(len(LETTERS), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Novelty:
    """Nearest neighbours of G designs.

    Attributes:
        identity: mean identity to the nearest neighbour.
        novel: share of designs below `NOVEL_BELOW`.
        copies: designs that are a training sequence, letter by letter.
        train_sequences: how many they were held against.
        aligned: "all", or "most shared 5-mers".
        nearest: each design's identity, in their order.
    """

    identity: Estimate
    novel: Estimate
    copies: int
    train_sequences: int
    aligned: str
    nearest: tuple[float, ...]


def novelty(
    generated: Sequence[str],
    train: Sequence[str],
    *,
    samples: int = 1000,
    seed: int = 0,
    all_pairs_cells: int = ALL_PAIRS_CELLS,
    follower: Follower = NOBODY,
) -> Novelty:
    """Finds each design's nearest neighbour among the sequences for training.

    Args:
        generated: G designs.
        train: what the model was trained on.
        samples, seed: of the bootstrap over designs.
        all_pairs_cells: see `ALL_PAIRS_CELLS`.
        follower: is told how far the search is.

    Raises:
        InputError: parasail is not installed.
    """
    check_aligner()
    known = set(train)
    ours, theirs = sum(map(len, generated)), sum(map(len, train))
    every = ours * theirs <= all_pairs_cells
    follower.stage(f"neighbours of {len(generated):,} designs", ours if every else ours + theirs)
    candidates = [range(len(train))] * len(generated) if every else shared_words(generated, train, follower=follower)
    nearest = []
    for design, places in zip(generated, candidates, strict=True):
        copied = design in known
        nearest.append(1.0 if copied else max((identity_to(design, train[place]) for place in places), default=0.0))
        follower.advance(len(design))
    return Novelty(
        identity=mean(np.array(nearest), samples=samples, seed=seed),
        novel=share(sum(each < NOVEL_BELOW for each in nearest), len(nearest)),
        copies=sum(each in known for each in generated),
        train_sequences=len(train),
        aligned="all" if every else f"most shared {WORD}-mers",
        nearest=tuple(nearest),
    )


def words(sequence: str) -> Integers:
    """The distinct 5-mers of standard residues, as numbers to the base 20, in order."""
    codes = _CODE_OF[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]
    if len(codes) < WORD:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, WORD)
    windows = windows[(windows != _NO_LETTER).all(axis=1)]
    numbers: Integers = windows.astype(np.int64) @ len(LETTERS) ** np.arange(WORD, dtype=np.int64)
    return np.unique(numbers)


def shared_words(
    generated: Sequence[str], train: Sequence[str], *, most: int = CANDIDATES, follower: Follower = NOBODY
) -> list[list[int]]:
    """Of each design, the places in `train` of those that share most distinct 5-mers with it; of equals, the first.

    The designs' words are held; the sequences for training pass by, 2,000 at a time.
    """
    lists = [words(design) for design in generated]
    word_of = np.concatenate(lists)
    owner = np.repeat(np.arange(len(generated)), [len(each) for each in lists])
    order = np.argsort(word_of, kind="stable")
    word_of, owner = word_of[order], owner[order]
    best: list[list[tuple[int, int]]] = [[] for _ in generated]
    for begin in range(0, len(train), _CHUNK):
        passing = [words(each) for each in train[begin : begin + _CHUNK]]
        words_W = np.concatenate(passing)
        place_W = np.repeat(np.arange(len(passing)), [len(each) for each in passing])
        first_W = np.searchsorted(word_of, words_W, side="left")
        many_W = np.searchsorted(word_of, words_W, side="right") - first_W
        held = many_W > 0
        first_W, many_W, place_W = first_W[held], many_W[held], place_W[held]
        # Each word of a passing sequence meets as many designs as hold it: their places in `owner`, one after another.
        steps = np.arange(many_W.sum()) - np.repeat(np.cumsum(many_W) - many_W, many_W)
        designs = owner[np.repeat(first_W, many_W) + steps]
        pairs, counts = np.unique(designs * len(passing) + np.repeat(place_W, many_W), return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            design, place = divmod(pair, len(passing))
            best[design].append((-count, begin + place))
        for design, found in enumerate(best):
            best[design] = sorted(found)[:most]
        follower.advance(sum(map(len, train[begin : begin + _CHUNK])))
    return [[place for _, place in found] for found in best]
