"""Results on their way from a GPU, with a stand-in for it: used in order, two underway at most, none lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from protnest.engine import Embedder, transfer
from protnest.engine.pooling import POOLS
from protnest.engine.transfer import Arrivals, to_device

from support.families import random_chain, tiny_family
from support.tiny import random_proteins

CPU = torch.device("cpu")


class _Copy:
    """A copy whose values are there only when it has been waited for."""

    waited = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self._source = tensor.clone()

    def wait(self) -> npt.NDArray[Any]:
        type(self).waited += 1
        return self._source.numpy()


@pytest.fixture
def slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results take their time, as those of a GPU do."""
    monkeypatch.setattr(transfer, "_is_worth_it", lambda tensor: True)
    monkeypatch.setattr(transfer, "_begin_copy", _Copy)
    monkeypatch.setattr(_Copy, "waited", 0)


def test_on_a_cpu_nothing_is_copied_and_nothing_waits() -> None:
    tensor, seen = torch.arange(5), []
    assert to_device(tensor, CPU) is tensor
    Arrivals().expect(tensor, seen.append)
    assert np.shares_memory(seen[0], tensor.numpy())


@pytest.mark.usefixtures("slow_device")
def test_results_are_used_in_order_and_two_are_underway() -> None:
    arrivals, seen = Arrivals(), []
    tensor = torch.zeros(1)
    for number in range(5):
        tensor.fill_(number)
        arrivals.expect(tensor, lambda array: seen.append(float(array[0])))
        # What is overwritten afterwards has been copied.
        assert seen == [float(each) for each in range(number - 1)]
    arrivals.finish()
    assert seen == [0, 1, 2, 3, 4]
    arrivals.finish()
    assert len(seen) == 5


@pytest.mark.usefixtures("slow_device")
def test_large_results_are_waited_for_in_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_is_worth_it", lambda tensor: tensor.numel() < 3)
    arrivals, seen = Arrivals(), []
    for size in (1, 2, 3, 1):
        arrivals.expect(torch.zeros(size), lambda array: seen.append(array.size))
    assert seen == [1, 2, 3]
    arrivals.finish()
    assert seen == [1, 2, 3, 1]


@pytest.mark.usefixtures("slow_device")
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_embeddings_are_the_same_bits(pool: str, chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and several batches of a protein included."""
    family = tiny_family()
    chain = random_chain(family) if chained else None
    embedder = Embedder(family if chained else family[0], chain=chain, pool=pool, max_tokens=60)
    proteins = [*random_proteins(20, seed=1, longest=20), *random_proteins(5, seed=2, longest=150)]
    slow = embedder.embed(proteins)
    assert _Copy.waited > 10
    monkeypatch.undo()
    for one, other in zip(embedder.embed(proteins), slow, strict=True):
        np.testing.assert_array_equal(one, other)
