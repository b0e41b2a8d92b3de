"""Numbers a token, perplexities and divergences: known answers of toys, literal formulas, refusals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from protnest.engine import InputError
from protnest.training.composition import letter_counts
from protnest.training.perplexity import letter_perplexity, residue_perplexity, token_perplexity
from protnest.training.prediction import Predictions
from protnest.training.teacher_divergence import divergence
from protnest.training.token_scores import score_tokens

from support.predictors import LETTERS, NextLetter, uniform

V = len(LETTERS)
SKEWED = [0.5, 0.25, *[0.25 / (V - 2)] * (V - 2)]
SEQUENCES = ["ACDA", "AA", "CWYAACD", "M"]


def test_a_uniform_model_has_the_vocabularys_perplexity() -> None:
    scores = score_tokens(uniform(), SEQUENCES).model
    tokens, residues = 14 + 4, 14
    assert (len(scores.nll_N), scores.residues_N.sum(), scores.sequences) == (tokens, residues, 4)
    by_token = token_perplexity(scores)
    assert by_token.value == pytest.approx(V, rel=1e-6)
    assert by_token.low == pytest.approx(V, rel=1e-6)
    assert by_token.high == pytest.approx(V, rel=1e-6)
    assert by_token.n == 4
    # The ends cost as much as residues do, and are none.
    assert residue_perplexity(scores).value == pytest.approx(V ** (tokens / residues), rel=1e-6)


def test_scores_are_the_formulas() -> None:
    scores = score_tokens(NextLetter(SKEWED), SEQUENCES).model
    letters = [letter for sequence in SEQUENCES for letter in (*sequence, LETTERS[-1])]
    wanted = [-math.log(SKEWED[LETTERS.index(letter)]) for letter in letters]
    np.testing.assert_allclose(scores.nll_N, wanted, rtol=1e-6)
    np.testing.assert_allclose(scores.confidence_N, 0.5, rtol=1e-6)
    assert scores.correct_N.tolist() == [letter == "A" for letter in letters]
    assert scores.sequence_N.tolist() == [0] * 5 + [1] * 3 + [2] * 8 + [3] * 2
    assert token_perplexity(scores).value == pytest.approx(math.exp(np.mean(wanted)))
    assert residue_perplexity(scores).value == pytest.approx(math.exp(np.sum(wanted) / 14))


def test_sequences_without_a_token_are_not_counted() -> None:
    class Choosy(NextLetter):
        def predictions(self, sequences: Sequence[str], *, context: int | None = None) -> Iterator[Predictions]:
            for chunk in super().predictions(sequences, context=context):
                yield dataclasses.replace(chunk, sequence_N=chunk.sequence_N * 3 + 1)

    scores = score_tokens(Choosy(SKEWED), SEQUENCES).model
    assert scores.sequences == 4
    assert scores.tokens_B.tolist() == [5, 3, 8, 2]
    assert scores.residues_B.tolist() == [4, 2, 7, 1]


def test_a_broken_model() -> None:
    with pytest.raises(InputError, match="toy gives probabilities that are no numbers"):
        score_tokens(NextLetter([math.nan] * V), SEQUENCES)


def test_an_impossible_letter_makes_perplexity_undefined() -> None:
    scores = score_tokens(NextLetter([0.0, *[1 / (V - 1)] * (V - 1)]), SEQUENCES).model
    assert token_perplexity(scores).value is None


def test_nothing_to_judge_by() -> None:
    with pytest.raises(InputError, match="nothing to judge by: 0 sequences"):
        score_tokens(uniform(), [])


# Teachers


def test_divergence_of_a_toy() -> None:
    teacher, student = NextLetter(SKEWED, name="teacher"), uniform()
    scored = score_tokens(student, SEQUENCES, teacher=teacher)
    wanted = sum(p * math.log(p * V) for p in SKEWED)
    assert scored.divergence_N is not None
    assert scored.teacher is not None
    np.testing.assert_allclose(scored.divergence_N, wanted, rtol=1e-5)
    assert len(scored.divergence_N) == 18
    # Not the other way round, which is another number.
    assert abs(wanted - sum(math.log(1 / V / p) / V for p in SKEWED)) > 0.1
    np.testing.assert_allclose(scored.teacher.confidence_N, 0.5, rtol=1e-6)
    np.testing.assert_allclose(scored.model.confidence_N, 1 / V, rtol=1e-6)


def test_a_model_is_its_own_teacher() -> None:
    scored = score_tokens(NextLetter(SKEWED), SEQUENCES, teacher=NextLetter(SKEWED))
    assert scored.divergence_N is not None
    assert (scored.divergence_N == 0).all()


def test_divergence_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn((50, 33), generator=generator) * 3 for _ in range(2))
    wanted = stats.entropy(one.double().softmax(-1), other.double().softmax(-1), axis=1)
    np.testing.assert_allclose(divergence(one.log_softmax(-1), other.log_softmax(-1)), wanted, rtol=1e-4)


def test_divergence_where_something_is_impossible() -> None:
    teacher = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).log()
    student = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).log()
    found = divergence(teacher, student)
    assert found[0] == pytest.approx(math.log(2))
    assert found[1] == math.inf


def test_both_see_what_the_shorter_sighted_sees() -> None:
    model, teacher = NextLetter(SKEWED, context=3), NextLetter(SKEWED, context=5)
    for one, other in ((model, teacher), (teacher, model)):
        assert len(score_tokens(one, SEQUENCES, teacher=other).model.nll_N) == 3 + 2 + 3 + 1 + 4
    assert model.seen == teacher.seen == [3, 3]
    score_tokens(teacher, SEQUENCES)
    assert teacher.seen[-1] == 5


def test_other_vocabularies_and_tasks_are_refused() -> None:
    fewer = NextLetter([1 / (V - 1)] * (V - 1), name="small", vocabulary=LETTERS[1:])
    with pytest.raises(InputError, match="small knows 20 tokens, toy 21: a teacher must have the model's own"):
        score_tokens(uniform(), ["CD"], teacher=fewer)
    turned = uniform(name="turned", vocabulary=LETTERS[::-1])
    with pytest.raises(InputError, match="turned and toy have 21 tokens each, but not the same"):
        score_tokens(uniform(), SEQUENCES, teacher=turned)
    with pytest.raises(InputError, match="toy is asked for masked residues, toy for next tokens"):
        score_tokens(uniform(), SEQUENCES, teacher=uniform(task="masked residues"))


@pytest.mark.parametrize("changes", [{"skips": True}, {"backwards": True}, {"chunk": 6}])
def test_a_teacher_that_was_asked_something_else(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="asked for other tokens"):
        score_tokens(uniform(), SEQUENCES, teacher=uniform(**changes))


# Frequencies alone


def test_letter_perplexity() -> None:
    counts = letter_counts(["AACD", "A"])
    found = letter_perplexity(counts, np.eye(20, dtype=np.int64)[0] * 20)
    shares = {"A": 21 / 40, "C": 1 / 40, "D": 1 / 40}
    assert found.value == pytest.approx(math.exp(-np.mean([math.log(shares[letter]) for letter in "AACDA"])))
    assert found.n == 2
    even = letter_counts(["ACDEFGHIKLMNPQRSTVWY"] * 3)
    assert letter_perplexity(even).value == pytest.approx(20)
    # Letters beside the 20 are not asked about.
    assert letter_perplexity(letter_counts(["AAXX"]), counts[0]).value == pytest.approx(24 / 3)
