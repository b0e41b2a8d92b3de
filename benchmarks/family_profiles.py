"""Profiles of a family that has no alignment: HMMER's iterated search among members alone, until few are left over.

Proteins that are called one family, lysozymes for one, may have several folds, which one profile does not hold. So the
first member begins a search (jackhmmer: Johnson, Eddy & Portugaly, BMC Bioinformatics 11:431, 2010) whose hits make the
next round's profile; what that recognises is covered; the first member that is not covered begins the next search. Only
members are searched, so no search can drift to strangers.

Shapes: B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protnest.engine.errors import InputError
from protnest.training.hmm_hits import EVALUE, SEARCHED, check_pyhmmer, hit_rows

ROUNDS = 4
LEAST_MEMBERS = 5
"""A profile of fewer is dropped: it would say that a design is like one protein, not like a family."""


def family_profiles(members: Sequence[str], *, least: int = LEAST_MEMBERS, rounds: int = ROUNDS) -> list[Any]:
    """Profiles that together recognise a family: `pyhmmer.plan7.HMM`, in the order in which they were found.

    Args:
        members: B proteins; earlier ones begin searches first.
        least: members that a profile has to recognise.
        rounds: of a search, at most.

    Raises:
        InputError: pyhmmer is not installed, or no profile recognises so many.
    """
    check_pyhmmer()
    from pyhmmer.easel import Alphabet, DigitalSequenceBlock, TextSequence

    amino = Alphabet.amino()
    block = DigitalSequenceBlock(
        amino,
        [TextSequence(name=str(row).encode(), sequence=text).digitize(amino) for row, text in enumerate(members)],
    )
    profiles, left = list[Any](), dict.fromkeys(range(len(members)))
    while len(left) >= least:
        row = next(iter(left))
        del left[row]
        profile = _searched(block, row, least=least, rounds=rounds)
        if profile is None:
            continue
        profile.name = f"profile{len(profiles) + 1}".encode()
        profiles.append(profile)
        for covered in hit_rows(profile, members):
            left.pop(covered, None)
    if not profiles:
        message = f"no profile recognises {least} of {len(members)} proteins: they are no family, or too few of one"
        raise InputError(message)
    return profiles


def _searched(block: Any, row: int, *, least: int, rounds: int) -> Any | None:
    """The profile that a search from one member ends with; None where it finds too few."""
    from pyhmmer.plan7 import Pipeline

    pipeline = Pipeline(block.alphabet, Z=SEARCHED, E=EVALUE, incE=EVALUE, incdomE=EVALUE)
    search = pipeline.iterate_seq(block[row], block)
    profile = None
    for _ in range(rounds):
        found = next(search)
        if len(found.hits.included) < least:
            return None
        profile = found.hmm
        if found.converged:
            break
    return profile


def recognised(profiles: Sequence[Any], sequences: Sequence[str]) -> set[int]:
    """Which sequences any of the profiles recognises, by their places."""
    return set[int]().union(*(hit_rows(profile, sequences) for profile in profiles))
