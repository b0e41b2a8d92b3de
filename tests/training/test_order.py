"""Which sequences come when: every epoch all of them, in batches within the budget, resumed anywhere.

Shapes: B sequences.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protnest.training.order import BatchOrder, Position

Lengths = npt.NDArray[np.int64]


def _batches(lengths_B: Lengths, max_tokens: int, *, seed: int, epoch: int) -> list[Lengths]:
    return BatchOrder(lengths_B, max_tokens, seed=seed).batches(epoch)


def _flat(batches: list[Lengths]) -> list[int]:
    return [int(index) for batch in batches for index in batch]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=60),
    max_tokens=st.integers(1, 150),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_an_epoch_holds_each_sequence_once_within_the_budget(
    lengths: list[int], max_tokens: int, seed: int, epoch: int
) -> None:
    lengths_B = np.array(lengths, dtype=np.int64)
    batches = _batches(lengths_B, max_tokens, seed=seed, epoch=epoch)
    assert sorted(_flat(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert batch.dtype == np.int64
        assert batch.size
        assert batch.size == 1 or lengths_B[batch].sum() <= max_tokens
    # No batch ends before it is full: the next one's first sequence would not have fitted.
    for batch, following in itertools.pairwise(batches):
        assert lengths_B[batch].sum() + lengths_B[following[0]] > max_tokens
    again = _batches(lengths_B, max_tokens, seed=seed, epoch=epoch)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]


def test_a_sequence_beyond_the_budget_is_alone() -> None:
    lengths_B = np.array([5, 500, 5, 5, 700, 5])
    for epoch in range(10):
        batches = [batch.tolist() for batch in _batches(lengths_B, 20, seed=0, epoch=epoch)]
        assert [1] in batches
        assert [4] in batches


def test_epochs_and_seeds_shuffle_anew() -> None:
    lengths_B = np.full(200, 10)
    orders = {tuple(_flat(_batches(lengths_B, 64, seed=seed, epoch=epoch))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    for order in orders:
        # Not the file's order: a corpus sorted by length or family would come in blocks.
        assert abs(float(np.corrcoef(order, np.arange(200))[0, 1])) < 0.3


@pytest.mark.parametrize("passed", [0, 1, 6, 7, 8, 13, 14, 30])
def test_batches_resume_at_any_position(passed: int) -> None:
    lengths_B = np.random.default_rng(0).integers(3, 60, size=20)
    order = BatchOrder(lengths_B, 100, seed=1)
    expected = [(batch.tolist(), epoch) for epoch in range(8) for batch in order.batches(epoch)]
    whole = list(itertools.islice(order.walk(Position()), 40))
    assert [(batch.tolist(), epoch) for batch, epoch, _ in whole] == expected[:40]
    position = whole[passed - 1][2] if passed else Position()
    resumed = itertools.islice(BatchOrder(lengths_B, 100, seed=1).walk(position), 40 - passed)
    assert [(batch.tolist(), epoch) for batch, epoch, _ in resumed] == expected[passed:40]


@pytest.mark.parametrize("batches_a_step", [1, 3])
def test_steps_and_epochs_of_each_other(batches_a_step: int) -> None:
    order = BatchOrder(np.random.default_rng(0).integers(3, 60, size=20), 100, seed=1)
    batches = [len(order.batches(epoch)) for epoch in range(6)]
    for epochs in (1, 2, 5):
        steps = order.steps_of(epochs, batches_a_step=batches_a_step)
        assert (steps - 1) * batches_a_step < sum(batches[:epochs]) <= steps * batches_a_step
    for steps in (1, 5, 9):
        used = order.used(steps, batches_a_step=batches_a_step)
        shown = itertools.islice(order.walk(Position()), steps * batches_a_step)
        expected = [(number, epoch) for batch, epoch, _ in shown for number in batch.tolist()]
        assert [(number, epoch) for epoch, numbers in enumerate(used) for number in numbers.tolist()] == expected
