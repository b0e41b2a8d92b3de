"""Questions to a head: every one answered once under its own number, whatever the batches, rounds and memory.

Shapes: R tokens asked about, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.engine import Encoder, InputError, from_fair_esm, queries
from protnest.engine.alphabet import MASK_ID, TOKEN_IDS
from protnest.engine.embedder import default_max_tokens
from protnest.engine.packing import ChosenRows, PackedBatch, pack_tokens
from protnest.engine.queries import Logits, Query, QueryRunner, token_ids
from protnest.engine.retry import DoesNotFit
from protnest.kernels import plan_batches

from support.esm2_models import ALPHABET
from support.score_reference import scoring_model
from support.tiny import random_proteins

PROTEINS = [*random_proteins(12, seed=3, longest=30), "M", *random_proteins(2, seed=4, longest=90), "MKTAYIAK"]


@functools.cache
def _encoder() -> Encoder:
    return from_fair_esm(scoring_model(2, 32, 2), ALPHABET)


def _queries() -> list[Query]:
    """Copies of several proteins, other tokens masked and asked about; tokens are shared."""
    rng = np.random.default_rng(5)
    asked = []
    for protein in PROTEINS:
        tokens = token_ids(protein)
        last = len(tokens) - 1
        asked += [Query(tokens, (place,), place) for place in rng.integers(1, last, size=3).tolist()]
        # <cls> and <eos>, in any order, twice, nothing, and others than the masked one.
        asked += [Query(tokens, (last, 0, 1, 0)), Query(tokens, ()), Query(tokens, (0, last), 1)]
        asked += [Query(tokens, tuple(range(last + 1)), last // 2), Query(tokens, (0,), 0)]
    return [asked[place] for place in rng.permutation(len(asked)).tolist()]


def _alone(query: Query) -> Logits:
    """All logits of the query's sequence as one batch, written out, then those asked for."""
    tokens = query.tokens.copy()
    if query.masked is not None:
        tokens[query.masked] = MASK_ID
    with torch.inference_mode():
        hidden_TD = _encoder()(pack_tokens(tokens, np.array([0, len(tokens)]))).hidden_TD
        logits: Logits = _encoder().logits(hidden_TD).numpy()
    return logits[list(query.places)]


def _answers(asked: Sequence[Query], runner: QueryRunner) -> list[Logits]:
    """What comes for each query; each must come once."""
    answers: dict[int, Logits] = {}

    def take(number: int, logits_RV: Logits) -> None:
        assert number not in answers
        answers[number] = logits_RV.copy()

    runner.run(iter(asked), take)
    assert sorted(answers) == list(range(len(asked)))
    return [answers[number] for number in range(len(asked))]


@functools.cache
def _expected() -> list[Logits]:
    return [_alone(query) for query in _queries()]


def _check(got: Sequence[Logits]) -> None:
    for number, (one, other) in enumerate(zip(got, _expected(), strict=True)):
        assert one.dtype == np.float32
        assert one.shape == other.shape
        error = float(np.abs(one - other).max(initial=0))
        assert error <= 1e-4, f"query {number}: {error}"


# Answers


@pytest.mark.parametrize("max_tokens", [1, 64, 10_000, None])
@pytest.mark.parametrize("rounds", [1, 2, 64])
def test_each_query_is_answered_once(max_tokens: int | None, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "_ROUND_BATCHES", rounds)
    _check(_answers(_queries(), QueryRunner(_encoder(), max_tokens=max_tokens)))


def test_a_runner_is_used_again() -> None:
    runner = QueryRunner(_encoder(), max_tokens=100)
    _check(_answers(_queries(), runner))
    _check(_answers(_queries(), runner))


def test_tokens_are_never_written_to() -> None:
    tokens = token_ids("MKTAYIAK")
    before = tokens.copy()
    tokens.setflags(write=False)
    for asked in (
        [Query(tokens, (2,), 2)],
        [Query(tokens, (place,), place) for place in range(1, 9)],
        [Query(tokens, (1,)), Query(tokens, (2,), 1)],
    ):
        _answers(asked, QueryRunner(_encoder()))
    np.testing.assert_array_equal(tokens, before)


def test_masked_tokens_are_masked_and_no_others() -> None:
    """What the encoder is given, token by token."""
    given: list[tuple[torch.Tensor, ...]] = []
    real = Encoder.row_logits

    def row_logits(self: Encoder, batch: PackedBatch, chosen: ChosenRows) -> torch.Tensor:
        given.append((batch.tokens_T, batch.cu_seqlens, chosen.index_R))
        assert sum(batch.lengths_B) == len(batch.tokens_T)
        assert len(chosen.counts_B) == len(batch.lengths_B)
        return real(self, batch, chosen)

    first, second = token_ids("MKT"), token_ids("MKT")
    with mock.patch.object(Encoder, "row_logits", row_logits):
        _answers([Query(first, (2,), 2), Query(second, (4, 1)), Query(first, (0,), 3)], QueryRunner(_encoder()))
    ((tokens_T, cu_seqlens, index_R),) = given
    M, K, T, cls, eos, mask = (TOKEN_IDS[name] for name in ("M", "K", "T", "<cls>", "<eos>", "<mask>"))
    assert tokens_T.tolist() == [cls, M, mask, T, eos, cls, M, K, T, eos, cls, M, K, mask, eos]
    assert cu_seqlens.tolist() == [0, 5, 10, 15]
    assert index_R.tolist() == [2, 9, 6, 10]


class _LateArrivals:
    """Results that are there when they are waited for, as a GPU's are."""

    def __init__(self) -> None:
        self._underway: list[tuple[torch.Tensor, Any]] = []

    def expect(self, tensor: torch.Tensor, use: Any) -> None:
        self._underway.append((tensor.clone(), use))

    def finish(self) -> None:
        for tensor, use in self._underway:
            use(tensor.numpy())
        self._underway.clear()


@pytest.mark.parametrize("rounds", [1, 64])
def test_answers_may_come_late(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "_ROUND_BATCHES", rounds)
    monkeypatch.setattr(queries, "Arrivals", _LateArrivals)
    _check(_answers(_queries(), QueryRunner(_encoder(), max_tokens=150)))


def test_no_queries() -> None:
    done: list[int] = []
    assert _answers([], QueryRunner(_encoder(), after_batch=done.append)) == []
    assert done == []


def test_gradients_are_not_asked_for() -> None:
    """Logits come as arrays whatever the weights want."""
    assert all(parameter.requires_grad for parameter in _encoder().parameters())
    _answers([Query(token_ids("MKT"), (1,))], QueryRunner(_encoder()))


# Batches and rounds


@contextmanager
def _batches() -> Iterator[list[list[int]]]:
    """Tokens of each sequence in each batch that is run."""
    seen: list[list[int]] = []
    real = Encoder.row_logits

    def row_logits(self: Encoder, batch: PackedBatch, chosen: ChosenRows) -> torch.Tensor:
        seen.append(list(batch.lengths_B))
        return real(self, batch, chosen)

    with mock.patch.object(Encoder, "row_logits", row_logits):
        yield seen


def test_batches_are_near_full() -> None:
    done: list[int] = []
    runner = QueryRunner(_encoder(), max_tokens=200, after_batch=done.append)
    asked = _queries()
    with _batches() as seen:
        _answers(asked, runner)
    assert max(sum(batch) for batch in seen) <= 200
    lengths = [len(query.tokens) for query in asked]
    # All in one round.
    assert len(seen) == len(plan_batches(lengths, 200)[1]) - 1
    assert sum(map(sum, seen)) == sum(lengths)
    assert done == [sum(batch) - 2 * len(batch) for batch in seen]


def test_a_sequence_beyond_the_budget_has_a_batch_of_its_own() -> None:
    asked = [Query(token_ids("MKT" * length), (1,)) for length in (1, 9, 1, 2, 9)]
    with _batches() as seen:
        _answers(asked, QueryRunner(_encoder(), max_tokens=15))
    # The others share theirs as far as fifteen tokens go.
    assert sorted(map(sorted, seen)) == [[5], [5, 8], [29], [29]]


def test_memory_does_not_grow_with_the_number_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a round is read before its first answer comes."""
    monkeypatch.setattr(queries, "_ROUND_BATCHES", 2)
    tokens = token_ids("MKTAYIAK")
    read, answered = 0, 0

    def told() -> Iterator[Query]:
        nonlocal read
        for place in range(100):
            read += 1
            assert read - answered <= 8
            yield Query(tokens, (1 + place % 8,), 1 + place % 8)

    def take(number: int, logits_RV: Logits) -> None:
        nonlocal answered
        answered += 1

    with _batches() as seen:
        # Four copies of ten tokens a batch, eight a round.
        QueryRunner(_encoder(), max_tokens=40).run(told(), take)
    assert (read, answered) == (100, 100)
    assert seen == [[10] * 4] * 25


def test_max_tokens_by_default() -> None:
    assert QueryRunner(_encoder()).max_tokens == default_max_tokens(torch.device("cpu")) == 4096


# Memory that ends


@contextmanager
def _memory_for(tokens: int) -> Iterator[list[int]]:
    """The model runs batches of so many tokens at most; gives the tokens of each run that was tried."""
    real, tried = Encoder._run, []

    def run(self: Encoder, batch: PackedBatch, *rest: Any) -> Any:
        tried.append(len(batch.tokens_T))
        if len(batch.tokens_T) > tokens:
            message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."
            raise torch.OutOfMemoryError(message)
        return real(self, batch, *rest)

    with mock.patch.object(Encoder, "_run", run):
        yield tried


@pytest.mark.parametrize("rounds", [1, 64])
def test_batches_that_do_not_fit_are_cut(
    rounds: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(queries, "_ROUND_BATCHES", rounds)
    done: list[int] = []
    runner = QueryRunner(_encoder(), max_tokens=400, after_batch=done.append)
    with caplog.at_level(logging.INFO, logger="protnest.engine.retry"), _memory_for(120) as tried:
        got = _answers(_queries(), runner)
    _check(got)
    assert max(tried) > 120
    # What does not fit is learnt once, and kept from round to round.
    assert sum(tokens > 200 for tokens in tried) <= 2
    assert 1 <= len(caplog.messages) <= 2
    # Each residue is counted once.
    assert sum(done) == sum(len(query.tokens) - 2 for query in _queries())


@pytest.mark.parametrize("rounds", [1, 2, 64])
@pytest.mark.parametrize("place", [0, 7, 40])
def test_what_does_not_fit_alone_is_named(rounds: int, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number among all queries, not in its round or batch."""
    monkeypatch.setattr(queries, "_ROUND_BATCHES", rounds)
    asked = [Query(token_ids("MKTAYIAK"), (1,), 1) for _ in range(41)]
    asked[place] = Query(token_ids("M" * 90), (1,))
    problem = r"a run of 90 residues does not fit into the memory of cpu, not even alone \(CUDA out of memory\)"
    with _memory_for(80), pytest.raises(DoesNotFit, match=f"^sequence {place}: {problem}") as caught:
        QueryRunner(_encoder(), max_tokens=50).run(asked, lambda number, logits_RV: None)
    assert caught.value.row == place
    assert re.match(problem, caught.value.reason)


def test_other_errors_are_not_caught() -> None:
    with (
        mock.patch.object(Encoder, "_run", side_effect=RuntimeError("CUDA error: an illegal address")),
        pytest.raises(RuntimeError, match="illegal address"),
    ):
        _answers(_queries(), QueryRunner(_encoder()))


# Refusals


def test_no_head() -> None:
    headless = Encoder(_encoder().config, head=False, name="headless")
    message = (
        "headless has no language-model head: its checkpoint holds the encoder alone, from which only a fitted ridge "
        "head reads scores"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        QueryRunner(headless)


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_no_room(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens must be positive, got {max_tokens}"):
        QueryRunner(_encoder(), max_tokens=max_tokens)


def test_token_ids() -> None:
    ids = token_ids("mKtX")
    assert ids.dtype == np.uint8
    assert ids.tolist() == [TOKEN_IDS[name] for name in ("<cls>", "M", "K", "T", "X", "<eos>")]
    assert token_ids("").tolist() == [TOKEN_IDS["<cls>"], TOKEN_IDS["<eos>"]]


@pytest.mark.parametrize("sequence", ["MJ", "M*", "Mé", "M K"])
def test_token_ids_of_no_residues(sequence: str) -> None:
    with pytest.raises(ValueError, match="is not in the alphabet"):
        token_ids(sequence)
