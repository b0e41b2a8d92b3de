"""Nearest neighbours: copies, mutants and strangers; candidates against a literal count of shared words."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.training import novelty as module
from protnest.training.identity import identity_to
from protnest.training.novelty import novelty, shared_words, words

from support.predictors import Followed
from support.tiny import LETTERS, random_proteins

pytest.importorskip("parasail")

TRAIN = random_proteins(40, seed=1, longest=200)


def _mutated(sequence: str, share: float, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "".join(str(rng.choice(LETTERS)) if rng.random() < share else letter for letter in sequence)


def test_copies_are_found() -> None:
    found = novelty(TRAIN[:5], TRAIN, samples=10)
    assert found.nearest == (1.0,) * 5
    assert (found.copies, found.train_sequences, found.aligned) == (5, 40, "all")
    assert found.identity.value == 1.0
    assert found.novel.value == 0.0


def test_nearest_is_the_largest_identity() -> None:
    designs = [_mutated(TRAIN[3], 0.1), _mutated(TRAIN[7], 0.6), *random_proteins(3, seed=9, longest=90), TRAIN[0]]
    seen = Followed()
    found = novelty(designs, TRAIN, samples=50, follower=seen)
    assert list(found.nearest) == [max(identity_to(design, each) for each in TRAIN) for design in designs]
    assert (found.copies, found.identity.n) == (1, 6)
    assert found.identity.value == pytest.approx(np.mean(found.nearest))
    assert found.novel.value == np.mean([each < 0.7 for each in found.nearest])
    assert 0 < found.novel.value < 1
    assert seen.told == [[len(design) for design in designs]]
    assert seen.stages == [("neighbours of 6 designs", sum(map(len, designs)))]


def test_words_are_the_distinct_standard_ones() -> None:
    rng = np.random.default_rng(0)
    for text in ("ACDEFACDEFACDEF", "ACDE", "", "ACDXEFGHIKL", "".join(rng.choice(LETTERS, size=300))):
        literal = {text[i : i + 5] for i in range(len(text) - 4) if set(text[i : i + 5]) <= set(LETTERS)}
        numbers = words(text)
        assert len(numbers) == len(set(numbers.tolist())) == len(literal)
    assert words("ACDEF").tolist() != words("FEDCA").tolist()


@pytest.mark.parametrize("chunk", [7, 2000])
def test_candidates_are_the_literal_ones(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    # Of four letters, so that words are shared by chance.
    rng = np.random.default_rng(2)
    pool = ["".join(rng.choice(list("ACDE"), size=rng.integers(3, 60))) for _ in range(50)]
    designs, train = [*pool[:10], "ACD"], pool[10:]

    def five(text: str) -> set[str]:
        return {text[i : i + 5] for i in range(len(text) - 4)}

    for most in (3, 100):
        wanted = []
        for design in designs:
            shared = [(-len(five(design) & five(each)), place) for place, each in enumerate(train)]
            wanted.append([place for count, place in sorted(shared) if count][:most])
        assert shared_words(designs, train, most=most) == wanted
    assert wanted[-1] == []


def test_candidates_find_the_neighbour() -> None:
    """Of designs with four residues in ten replaced, among 2,000 strangers."""
    rng = np.random.default_rng(4)
    train = ["".join(rng.choice(LETTERS, size=200)) for _ in range(2000)]
    designs = [_mutated(each, 0.4, seed=row) for row, each in enumerate(train[:20])]
    seen = Followed()
    found = novelty([*designs, "W" * 40], train, samples=5, all_pairs_cells=0, follower=seen)
    # The words of the sequences for training come first, and count.
    assert seen.told == [[200 * 2000, *[200] * 20, 40]]
    assert sum(seen.told[0]) == seen.stages[0][1]
    assert found.aligned == "most shared 5-mers"
    for row, nearest in enumerate(found.nearest[:-1]):
        assert nearest == identity_to(designs[row], train[row])
    assert found.nearest[-1] == 0.0
    assert found.copies == 0


def test_a_copy_without_words_is_a_copy() -> None:
    assert novelty(["ACD"], ["ACD", *TRAIN], samples=2, all_pairs_cells=0).nearest == (1.0,)
