"""Clusters of planted families, by both back ends, held against real alignments."""

from __future__ import annotations

import importlib.util
import itertools
import random
import shutil
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.training import clusters as module
from protnest.training.clusters import cluster
from protnest.training.identity import identical_residues

from support.planted_families import planted_families
from support.tiny import LETTERS

needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="mmseqs (Debian's mmseqs2) is not on PATH")
# It takes seconds for whatever it is given; the test of splits, which is not slow, runs it once.
BACKENDS = ["kmers", pytest.param("mmseqs", marks=[needs_mmseqs, pytest.mark.slow])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_families_are_found(backend: module.Backend) -> None:
    """Members are some 70 % alike, families not at all; and what the clusters keep apart is below the threshold."""
    proteins, family_of = planted_families(12, 8, kept=0.85)
    order = random.Random(1).sample(range(len(proteins)), len(proteins))
    shuffled = [proteins[place] for place in order]
    found = cluster(shuffled, identity=0.5, backend=backend)
    assert (len(found), found.backend, found.identity) == (12, backend, 0.5)
    assert found.sizes.tolist() == [8] * 12
    labels = {}
    for place, label in zip(order, found.label_B.tolist(), strict=True):
        labels.setdefault(family_of[place], set()).add(label)
    assert all(len(each) == 1 for each in labels.values())
    assert found.label_B[0] == 0
    assert np.all(np.diff(np.unique(found.label_B, return_index=True)[1]) > 0)
    for one, other in itertools.combinations(range(0, len(shuffled), 3), 2):
        if found.label_B[one] != found.label_B[other]:
            a, b = shuffled[one], shuffled[other]
            assert identical_residues(a, b) < 0.5 * min(len(a), len(b))


def test_links_chain() -> None:
    """Single linkage: A and C are unlike, and belong together by way of B."""
    rng = np.random.default_rng(0)
    left, right, other = ("".join(rng.choice(LETTERS, size=100)) for _ in range(3))
    a, b, c = left + other[:40], left + right, other[40:80] + right
    assert identical_residues(a, c) < 0.5 * min(len(a), len(c))
    assert cluster([a, c, b], backend="kmers").label_B.tolist() == [0, 0, 0]
    assert cluster([a, c], backend="kmers").label_B.tolist() == [0, 1]


def test_the_threshold_decides() -> None:
    """Of 100 residues 70 are the same: linked at 0.7 or less, and at more not."""
    rng = np.random.default_rng(3)
    one = rng.choice(LETTERS, size=100)
    other = one.copy()
    # In one piece, so that the alignment cannot find others.
    other[70:] = np.roll(LETTERS, 1)[np.searchsorted(LETTERS, one[70:])]
    pair = ["".join(one), "".join(other)]
    same = identical_residues(*pair) / 100
    assert 0.7 <= same < 0.76
    assert len(cluster(pair, identity=0.69, backend="kmers")) == 1
    assert len(cluster(pair, identity=0.77, backend="kmers")) == 2


def test_fragments_belong_to_the_whole() -> None:
    rng = np.random.default_rng(5)
    whole = "".join(rng.choice(LETTERS, size=200))
    assert cluster([whole, whole[60:110], "".join(rng.choice(LETTERS, size=90))], backend="kmers").label_B.tolist() == [
        0,
        0,
        1,
    ]


def test_equal_sequences_share_a_cluster_whatever_they_are() -> None:
    """Also those too short for a single 4-mer, or without a standard residue."""
    found = cluster(["MKT", "XXXXXXXX", "MKT", "XXXXXXXX", "GSH"], backend="kmers")
    assert found.label_B.tolist() == [0, 1, 0, 1, 2]
    empty = cluster([], backend="kmers")
    assert (len(empty), empty.sizes.tolist()) == (0, [])


def test_order_does_not_matter() -> None:
    proteins, _ = planted_families(6, 5, kept=0.75, seed=2)
    order = random.Random(0).sample(range(30), 30)
    straight, turned = cluster(proteins, backend="kmers"), cluster([proteins[i] for i in order], backend="kmers")
    together = [[a == b for a in some] for some in (straight.label_B[order], turned.label_B) for b in some]
    assert together[:30] == together[30:]


@pytest.mark.slow
def test_twenty_thousand_in_a_minute() -> None:
    proteins, _ = planted_families(1000, 20, kept=0.85, residues=250)
    started = time.perf_counter()
    assert len(cluster(proteins, backend="kmers")) == 1000
    assert time.perf_counter() - started < 60


# Errors


def test_auto_takes_mmseqs_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cluster(["MKTAYIAK"]).backend == "kmers"
    with pytest.raises(InputError, match=r"mmseqs is not on PATH: install MMseqs2"):
        cluster(["MKTAYIAK", "GSHMLEEL"], backend="mmseqs")
    monkeypatch.setattr(shutil, "which", lambda name: f"/there/{name}")
    assert cluster(["MKTAYIAK"]).backend == "mmseqs"


def test_mmseqs_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mmseqs"
    program.write_text("#!/bin/sh\necho first >&2\necho 'no memory left' >&2\nexit 3\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(InputError, match="mmseqs failed with code 3: no memory left"):
        cluster(["MKTAYIAK", "GSHMLEEL"], backend="mmseqs")
    program.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(InputError, match="mmseqs failed with code 0: it says nothing"):
        cluster(["MKTAYIAK", "GSHMLEEL"], backend="mmseqs")


@pytest.mark.parametrize(
    ("identity", "backend", "problem"),
    [
        (0.3, "kmers", r"identity is 0.3; clusters by kmers take 0.5 to 1, lower ones need MMseqs2"),
        (1.1, "kmers", r"identity is 1.1; clusters by kmers take 0.5 to 1$"),
        (0.1, "kmers", r"identity is 0.1; clusters by kmers take 0.5 to 1$"),
        (0.1, "mmseqs", r"identity is 0.1; clusters by mmseqs take 0.2 to 1$"),
        (0.5, "blast", "clusters by 'blast'; allowed: auto, mmseqs, kmers"),
    ],
)
def test_clusters_that_cannot_be(identity: float, backend: module.Backend, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        cluster(["MKT"], identity=identity, backend=backend)


def test_without_an_aligner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs parasail: pip install"):
        cluster(["MKT"], backend="kmers")
