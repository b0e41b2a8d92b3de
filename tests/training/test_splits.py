"""Shares by whole clusters: nothing alike across them, nested subsets, and errors."""

from __future__ import annotations

import itertools
import random
import shutil

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.training.clusters import Backend
from protnest.training.identity import identical_residues
from protnest.training.splits import SUBSETS, Split, split

from support.planted_families import planted_families
from support.tiny import random_proteins

needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="mmseqs (Debian's mmseqs2) is not on PATH")
BACKENDS = ["kmers", pytest.param("mmseqs", marks=needs_mmseqs)]


def _shares(found: Split) -> list[list[int]]:
    return [found.train.tolist(), found.validation.tolist(), found.test.tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pair_across_shares_is_alike(backend: Backend) -> None:
    """Families of a few: at random nearly all proteins for testing would have a relative among those for training."""
    proteins, _ = planted_families(25, 4, kept=0.8, residues=100, seed=1)
    found = split(proteins, validation=0.2, test=0.2, identity=0.5, backend=backend)
    shares = _shares(found)
    assert sorted(itertools.chain(*shares)) == list(range(100))
    assert [len(share) for share in shares] == [60, 20, 20]
    worst = 0.0
    for one, other in itertools.combinations(shares, 2):
        for a, b in itertools.product(one, other):
            shorter = min(len(proteins[a]), len(proteins[b]))
            worst = max(worst, identical_residues(proteins[a], proteins[b]) / shorter)
    assert worst < 0.5
    within = [identical_residues(proteins[4 * k], proteins[4 * k + 1]) / 90 for k in range(25)]
    assert min(within) > 0.5


def test_equal_sequences_go_together() -> None:
    proteins = random_proteins(40, longest=60, seed=3)
    doubled = proteins + proteins[::-1]
    found = split(doubled, backend="kmers")
    for share in _shares(found):
        assert {place if place < 40 else 79 - place for place in share if place >= 40} == {
            place for place in share if place < 40
        }


def test_shares_follow_from_seed_and_sequences() -> None:
    proteins = random_proteins(60, longest=60, seed=3)
    order = random.Random(0).sample(range(60), 60)

    def names(texts: list[str], seed: int) -> list[list[str]]:
        return [[texts[place] for place in share] for share in _shares(split(texts, seed=seed, backend="kmers"))]

    straight, turned = names(proteins, 0), names([proteins[place] for place in order], 0)
    assert straight[0] == turned[0]
    assert [sorted(share) for share in straight] == [sorted(share) for share in turned]
    assert [sorted(share) for share in names(proteins, 1)] != [sorted(share) for share in straight]
    assert straight[0] != sorted(straight[0], key=proteins.index)


def test_large_clusters_train() -> None:
    """A family of half the proteins fits into no tenth of them."""
    large, _ = planted_families(1, 30, kept=0.85)
    small = random_proteins(40, longest=60, seed=4)[:30]
    found = split(large + small, backend="kmers")
    assert set(range(30)) <= set(found.train.tolist())
    assert len(found.validation) == len(found.test) == 6
    facts = found.facts()
    assert (facts["largest_cluster"], facts["train"], facts["clusters_by"]) == (30, 48, "kmers")


def test_subsets_are_nested() -> None:
    found = split(random_proteins(80, longest=60, seed=5), backend="kmers")
    assert found.subset(10).tolist() == found.subset(20)[:10].tolist()
    assert np.array_equal(found.subset(len(found.train)), found.train)
    assert SUBSETS == (50, 100, 200, 500, 1000)
    for n in (0, len(found.train) + 1):
        with pytest.raises(InputError, match=rf"{n} proteins to train on: the training share has 64; .* 50"):
            found.subset(n)
    few = split(random_proteins(10, longest=60, seed=5), backend="kmers")
    with pytest.raises(InputError, match=r"the training share has 8; take 1 to that$"):
        few.subset(50)


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ({"validation": 0.0}, "the validation share is 0.0, expected more than 0 and less than 1"),
        ({"test": 1.0}, "the test share is 1.0, expected more than 0"),
        ({"validation": float("nan")}, "the validation share is nan"),
        (
            {"validation": 0.5, "test": 0.5},
            "shares of 0.5 for validation and 0.5 for testing leave nothing",
        ),
    ],
)
def test_shares_that_cannot_be(shares: dict[str, float], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        split(random_proteins(20, longest=60), backend="kmers", **shares)


def test_too_few_clusters() -> None:
    one, _ = planted_families(2, 10, kept=0.9)
    with pytest.raises(InputError, match=r"2 clusters at an identity of 0.5 are too few for three shares: at least 3"):
        split(one, backend="kmers")
    four, _ = planted_families(4, 10, kept=0.9)
    with pytest.raises(InputError, match=r"no cluster is left for the test share: 4 clusters .* hold 10 to 10 of 40"):
        split(four, backend="kmers")
    with pytest.raises(InputError, match="no cluster is left for the train share"):
        split(random_proteins(3, longest=60, seed=8), validation=0.1, test=0.8, backend="kmers")
