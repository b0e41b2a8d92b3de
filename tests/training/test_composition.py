"""Composition: what identical and shifted sets have, against scipy's entropy and a count letter by letter."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.training.composition import LETTERS, composition, composition_kl, letter_counts

from support.tiny import random_proteins

PROTEINS = random_proteins(60, seed=1)


def test_counts_are_pythons() -> None:
    sequences = [*PROTEINS, "XBZUO.-A", ""]
    assert letter_counts(sequences).tolist() == [[each.count(letter) for letter in LETTERS] for each in sequences]


def test_identical_sets() -> None:
    found = composition(PROTEINS, PROTEINS, samples=200)
    assert found.kl.value == 0.0
    assert found.generated == found.reference
    assert sum(found.generated.values()) == pytest.approx(1)
    assert (found.kl.n, found.other_residues, found.residues) == (60, 0, sum(map(len, PROTEINS)))
    # Both are drawn, each by itself.
    assert 0.001 < found.kl.high < 0.2  # type: ignore[operator]


def test_kl_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = letter_counts(["AACDW" * 20])[0], letter_counts(["ACCCY" * 7])[0]
    assert composition_kl(ours, theirs) == pytest.approx(stats.entropy(ours + 1, theirs + 1))
    assert composition_kl(ours, theirs) != pytest.approx(composition_kl(theirs, ours))


def test_generated_comes_first() -> None:
    found = composition(["AACDW" * 20], ["ACCCY" * 7], samples=3)
    ours, theirs = letter_counts(["AACDW" * 20])[0], letter_counts(["ACCCY" * 7])[0]
    assert found.kl.value == composition_kl(ours, theirs)
    assert (found.generated["A"], found.reference["A"]) == (0.4, 0.2)


def test_other_letters_are_counted_apart() -> None:
    plain, mixed = composition(["ACDEF"], PROTEINS, samples=3), composition(["XXACDEFBZ-", ""], PROTEINS, samples=3)
    assert plain.kl.value == mixed.kl.value
    assert (mixed.other_residues, mixed.residues) == (5, 5)


def test_chance_covers_sets_of_one_source() -> None:
    """And one of two sources goes beyond it."""
    beyond = 0
    for seed in range(20):
        one, other = random_proteins(80, seed=2 * seed + 10), random_proteins(40, seed=2 * seed + 11)
        found = composition(one, other, samples=2)
        beyond += found.kl.value > found.by_chance  # type: ignore[operator]
    assert beyond <= 5
    shifted = ["A" * 6 + each for each in random_proteins(40, seed=50)]
    found = composition(shifted, PROTEINS, samples=300)
    assert found.kl.value > 2 * found.by_chance  # type: ignore[operator]
    assert found.kl.low < found.kl.value < found.kl.high  # type: ignore[operator]


def test_seeded() -> None:
    found = [composition(PROTEINS[:30], PROTEINS[30:], samples=50, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert np.isfinite(found[0].by_chance)
