"""Identity: known pairs, and a textbook alignment with affine gaps and free ends."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.training.identity import identical_residues, identity_to, mutual_identity

from support.tiny import random_proteins

parasail = pytest.importorskip("parasail")

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGT"


def _best_score(one: str, other: str) -> float:
    """Gotoh's recursion, gaps at the ends free."""
    rows, columns = len(one) + 1, len(other) + 1
    best, across, down = (np.full((rows, columns), -1e9) for _ in range(3))
    best[0, :] = best[:, 0] = 0
    table = parasail.blosum62
    for i in range(1, rows):
        for j in range(1, columns):
            across[i, j] = max(across[i, j - 1] - 1, best[i, j - 1] - 11)
            down[i, j] = max(down[i - 1, j] - 1, best[i - 1, j] - 11)
            pair = table.matrix[table.mapper[ord(one[i - 1])], table.mapper[ord(other[j - 1])]]
            best[i, j] = max(best[i - 1, j - 1] + pair, across[i, j], down[i, j])
    return float(max(best[-1].max(), best[:, -1].max()))


def test_known_pairs() -> None:
    assert identity_to(PROTEIN, PROTEIN) == mutual_identity(PROTEIN, PROTEIN) == 1.0
    substituted = PROTEIN[:10] + "W" + PROTEIN[11:]
    assert identical_residues(PROTEIN, substituted) == len(PROTEIN) - 1
    inserted = PROTEIN[:20] + "GGG" + PROTEIN[20:]
    assert identical_residues(PROTEIN, inserted) == len(PROTEIN)
    assert identity_to("W" * 30, "P" * 30) == 0.0


def test_a_domain_in_a_longer_protein() -> None:
    longer = "GSGSGSGSPPPPG" + PROTEIN + "DDDDNDNDN" * 3
    assert identity_to(PROTEIN, longer) == 1.0
    assert identity_to(longer, PROTEIN) == pytest.approx(len(PROTEIN) / len(longer))
    assert mutual_identity(PROTEIN, longer) == mutual_identity(longer, PROTEIN) == identity_to(longer, PROTEIN)


def test_alignment_is_the_best_one() -> None:
    """By score: parasail with our penalties beside the recursion."""
    proteins = random_proteins(12, seed=3, longest=30)
    proteins += [each[5:] + "ACD" for each in proteins if len(each) > 15]
    for one in proteins[:6]:
        for other in proteins[6:]:
            wanted = parasail.sg_stats_striped_16(one, other, 11, 1, parasail.blosum62)
            assert wanted.score == _best_score(one, other)
            assert identical_residues(one, other) == wanted.matches


def test_unknown_letters_are_identical_to_nothing() -> None:
    hidden = PROTEIN[:10] + "XXBZUO.-" + PROTEIN[18:]
    for one, other in ((hidden, hidden), (hidden, PROTEIN), (PROTEIN, hidden)):
        assert identical_residues(one, other) == len(PROTEIN) - 8
    assert identical_residues("X" * 20, "X" * 20) == 0


def test_long_sequences_do_not_saturate() -> None:
    long = "".join(random_proteins(300, seed=5))
    assert len(long) > 6500
    assert identical_residues(long, long) == len(long)


def test_without_parasail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs parasail: pip install 'protnest\[eval\]'"):
        identical_residues(PROTEIN, PROTEIN)
