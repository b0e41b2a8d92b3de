"""Profiles made from members alone: they know their family, all its folds, and nobody else."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.benchmarks.family_profiles import family_profiles, recognised
from protnest.engine.errors import InputError
from protnest.training.hmm_hits import hit_rows

from support.planted_families import planted_families
from support.tiny import random_proteins

pytest.importorskip("pyhmmer")

MEMBERS, FAMILY_OF = planted_families(3, 16, kept=0.8, residues=100, seed=1)
KNOWN = [text for place, text in enumerate(MEMBERS) if place % 16 < 12]
HELD_OUT = [text for place, text in enumerate(MEMBERS) if place % 16 >= 12]


def _shuffled(sequences: list[str]) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.permutation(list(each)).tolist()) for each in sequences]


def test_every_fold_of_a_family_is_recognised_and_shuffled_ones_are_not() -> None:
    profiles = family_profiles(KNOWN)
    assert [each.name for each in profiles] in (
        [b"profile1", b"profile2", b"profile3"],
        ["profile1", "profile2", "profile3"],
    )
    assert recognised(profiles, HELD_OUT) == set(range(12))
    assert recognised(profiles, _shuffled(HELD_OUT)) == set()
    # One profile knows one fold: it takes all of them.
    assert [sorted(hit_rows(each, HELD_OUT)) for each in profiles] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert recognised(profiles[:2], [HELD_OUT[11], *HELD_OUT]) == set(range(1, 9))


def test_a_fold_that_was_not_among_the_members_is_not_recognised() -> None:
    profiles = family_profiles(KNOWN[:24])
    assert recognised(profiles, HELD_OUT) == set(range(8))


def test_searches_go_on_from_what_they_find() -> None:
    """A chain of ever more distant members: a search from its first one alone does not reach the end."""
    rng = np.random.default_rng(5)
    text = random_proteins(1, seed=9, longest=2)[0] + "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size=150))
    chain = []
    for _ in range(14):
        changes = rng.random(len(text)) < 0.16
        drawn = rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size=len(text))
        text = "".join(np.where(changes, drawn, list(text)).tolist())
        chain.append(text)
    once = family_profiles(chain, rounds=1)
    again = family_profiles(chain, rounds=5)
    assert len(hit_rows(again[0], chain)) > len(hit_rows(once[0], chain))


def test_few_members_make_no_profile() -> None:
    strangers = [each + each[::-1] for each in random_proteins(9, seed=3, longest=60)]
    assert len(family_profiles([*strangers, *KNOWN])) == 3
    assert len(family_profiles([*KNOWN[:12], *KNOWN[12:16]])) == 1
    assert len(family_profiles([*KNOWN[:12], *KNOWN[12:16]], least=4)) == 2
    with pytest.raises(InputError, match="no profile recognises 5 of 9 proteins: they are no family"):
        family_profiles(strangers)
    with pytest.raises(InputError, match="no profile recognises 5 of 4"):
        family_profiles(KNOWN[:4])
    with pytest.raises(InputError, match="no profile recognises 5 of 0"):
        family_profiles([])
