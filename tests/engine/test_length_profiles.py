"""Ranges of lengths for an engine: they cover everything once, and are the cheapest there are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.engine.length_profiles import SWISS_PROT_RESIDUES, choose_profiles, find_profile

pytestmark = pytest.mark.export

UNEVEN = [5] * 40 + [6] * 30 + [9] * 3 + [20] * 9 + [21] * 2 + [50, 51, 90]


@pytest.mark.parametrize("lengths", [SWISS_PROT_RESIDUES, UNEVEN, [3000, 40, 1], range(1, 1500, 7)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_length_has_one_profile(lengths: list[int], count: int) -> None:
    profiles = choose_profiles(lengths, count=count, max_residues=1022, max_tokens=8192)
    assert len(profiles) == min(count, len({min(each, 1022) for each in lengths}))
    assert profiles[0].fewest_tokens == 3
    assert profiles[-1].most_tokens == 1024
    for one, other in itertools.pairwise(profiles):
        assert one.most_tokens + 1 == other.fewest_tokens
        assert one.best_tokens < other.best_tokens
        assert one.most_rows >= other.most_rows
    for profile in profiles:
        assert profile.fewest_tokens <= profile.best_tokens <= profile.most_tokens
        assert 1 <= profile.best_rows <= profile.most_rows == 8192 // profile.most_tokens
    for tokens in range(3, 1025):
        (place,) = (row for row, each in enumerate(profiles) if each.fewest_tokens <= tokens <= each.most_tokens)
        assert find_profile(profiles, tokens) == place
    assert find_profile(profiles, 1025) is find_profile(profiles, 2) is None


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_other_ranges_cost_less(count: int) -> None:
    """Against all partitions, where each protein is filled up to the longest of its range."""
    values = sorted(set(UNEVEN))

    def cost(ends: tuple[int, ...]) -> int:
        return sum(min(end for end in ends if end >= length) - length for length in UNEVEN)

    cheapest = min(cost((*inner, values[-1])) for inner in itertools.combinations(values[:-1], count - 1))
    profiles = choose_profiles(UNEVEN, count=count, max_residues=90)
    assert cost(tuple(each.most_tokens - 2 for each in profiles)) == cheapest


def test_what_a_profile_is_tuned_for() -> None:
    (short, long) = choose_profiles([5, 6, 6, 6, 7, 99, 100], count=2, max_residues=200, max_tokens=404)
    assert short.shapes == ((1, 3), (404 // 9, 8), (404 // 9, 9))
    assert long.shapes == ((1, 10), (2, 101), (2, 202))


def test_equal_lengths_make_one_profile() -> None:
    (profile,) = choose_profiles([100] * 7, count=4, max_residues=300, max_tokens=10)
    assert profile.shapes == ((1, 3), (1, 102), (1, 302))  # A row alone may be longer than a batch.


def test_order_and_number_of_proteins_do_not_matter() -> None:
    shuffled = np.random.default_rng(0).permutation(UNEVEN * 3).tolist()
    assert choose_profiles(shuffled, count=3, max_residues=90) == choose_profiles(UNEVEN, count=3, max_residues=90)


def test_refused() -> None:
    for lengths, options, said in (
        ([], {}, "lengths must be 1 or more, got none"),
        ([4, 0], {}, "lengths must be 1 or more, got 0"),
        ([4], {"count": 0}, "profiles must be 1 or more, got 0"),
        ([4], {"max_residues": 0}, "max_residues must be 1 or more, got 0"),
        ([4], {"max_tokens": -1}, "max_tokens must be 1 or more, got -1"),
    ):
        with pytest.raises(InputError, match=said):
            choose_profiles(lengths, **{"count": 1, "max_residues": 9, **options})


def test_profiles_are_values() -> None:
    (profile,) = choose_profiles([4], count=1, max_residues=9)
    assert replace(profile) == profile
