"""Batches that do not fit: a model that runs out of memory beyond some tokens gives the same rows, and one line a size.

Shapes: B proteins, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.engine import Embedder, Encoder, InputError
from protnest.engine.family import Family
from protnest.engine.packing import PackedBatch
from protnest.engine.pooling import POOLS
from protnest.engine.retry import MemoryBudget, Work, half
from protnest.engine.windows import Piece

from support.families import WIDTHS, random_chain, tiny_family
from support.tiny import random_proteins

FAMILY = tiny_family()
PROTEINS = [*random_proteins(30, seed=1, longest=20), *random_proteins(3, seed=2, longest=120)]
TOLERANCE = 1e-5


@contextmanager
def _memory_for(*limits: int) -> Iterator[list[tuple[int, int]]]:
    """The models run batches of so many tokens at most; gives (width, tokens) of each run that was tried."""
    real, tried = Encoder._run, []
    most = dict(zip(WIDTHS, limits, strict=False))

    def run(self: Encoder, batch: PackedBatch, layers: tuple[int, ...]) -> object:
        tokens = len(batch.tokens_T)
        tried.append((self.config.width, tokens))
        if tokens > most[self.config.width]:
            message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."
            raise torch.OutOfMemoryError(message)
        return real(self, batch, layers)

    with mock.patch.object(Encoder, "_run", run):
        yield tried


def _same(got: object, right: object) -> None:
    for one, other in zip(got, right, strict=True):  # type: ignore[call-overload]
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pool", POOLS)
def test_the_result_is_the_same(pool: str) -> None:
    embedder = Embedder(FAMILY[0], pool=pool, max_tokens=400)
    right = embedder.embed(PROTEINS)
    done: list[int] = []
    with _memory_for(90) as tried:
        _same(Embedder(FAMILY[0], pool=pool, max_tokens=400).embed(PROTEINS, after_batch=done.append), right)
    assert any(tokens > 90 for _, tokens in tried)
    # Each residue is counted once, those in two windows twice, as without cutting.
    whole: list[int] = []
    embedder.embed(PROTEINS, after_batch=whole.append)
    assert sum(done) == sum(whole)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("naive", [False, True], ids=["nested", "naive"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_chain_goes_on_with_the_parts(pool: str, naive: bool, resident: bool) -> None:
    """The second model fits less than the first one, and the third more: what waits between is cut, too."""
    chain = random_chain(FAMILY, naive=naive)

    def embedder() -> Embedder:
        family = Family(lambda place: FAMILY[place], 3, resident=resident)
        return Embedder(family, chain=chain, pool=pool, max_tokens=300)

    right = embedder().embed(PROTEINS)
    with _memory_for(200, 60, 130):
        _same(embedder().embed(PROTEINS), right)


@pytest.mark.parametrize("naive", [False, True], ids=["nested", "naive"])
@pytest.mark.parametrize("pool", ["max", "residue"])
def test_memory_that_ends_while_pooling(pool: str, naive: bool) -> None:
    """After the last stage has been appended: the stage runs again, on what it was given before."""
    chain = random_chain(FAMILY, naive=naive)
    right = Embedder(FAMILY, chain=chain, pool=pool, max_tokens=300).embed(PROTEINS)
    from protnest.engine import nesting

    holder = nesting.ResidueRows if pool == "residue" else nesting.PooledRows
    real = holder.add

    def add(self: object, pieces: object, packed: PackedBatch, hidden_TD: torch.Tensor, **given: bool) -> None:
        if len(hidden_TD) > 100:
            message = "CUDA out of memory. Tried"
            raise torch.OutOfMemoryError(message)
        real(self, pieces, packed, hidden_TD, **given)  # type: ignore[arg-type]

    with mock.patch.object(holder, "add", add):
        _same(Embedder(FAMILY, chain=chain, pool=pool, max_tokens=300).embed(PROTEINS), right)


def test_each_size_is_logged_once_and_tried_once(caplog: pytest.LogCaptureFixture) -> None:
    proteins = random_proteins(1, seed=5, longest=1) * 2000
    with caplog.at_level(logging.INFO, logger="protnest.engine.retry"), _memory_for(200) as tried:
        Embedder(FAMILY[0], max_tokens=600).embed(proteins)
    assert [tokens for _, tokens in tried if tokens > 200] == [600, 300]
    assert caplog.messages == [
        "a batch of 300 tokens does not fit into the memory of cpu, one of 150 does: larger ones are cut in two; "
        "max_tokens=150 saves the attempt"
    ]


def test_a_protein_that_does_not_fit_alone_is_named() -> None:
    long = "M" * 90
    problem = (
        r"^sequence 1: a run of 90 residues does not fit into the memory of cpu, not even alone \(CUDA out of memory\)"
        "; windows, a lower precision or a smaller model need less$"
    )
    with _memory_for(80), pytest.raises(InputError, match=problem):
        Embedder(FAMILY[0], long="full", max_tokens=300).embed(["MKT", long, "MKTA"])


def test_other_errors_are_not_caught() -> None:
    with (
        mock.patch.object(Encoder, "_run", side_effect=RuntimeError("CUDA error: an illegal address")),
        pytest.raises(RuntimeError, match="illegal address"),
    ):
        Embedder(FAMILY[0]).embed(["MKT", "MKV"])


def test_a_model_that_does_not_fit_is_no_batch_that_does_not() -> None:
    """It is let go of after it has been looked at, and cannot be loaded again."""
    loads: list[int] = []

    def load(place: int) -> Encoder:
        loads.append(place)
        if len(loads) > 3 and place == 1:
            message = "CUDA out of memory. Tried"
            raise torch.OutOfMemoryError(message)
        return FAMILY[place]

    embedder = Embedder(Family(load, 3, resident=False), chain=random_chain(FAMILY))
    assert embedder.embed([]).shape == (0, WIDTHS[-1])
    assert loads == [0, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        embedder.embed(["MKT", "MKTA"])
    assert loads == [0, 1, 2, 0, 1]


# Parts


def _pieces(*tokens: int) -> list[Piece]:
    return [Piece(row, each - 2, 0, each - 2) for row, each in enumerate(tokens)]


@pytest.mark.parametrize(
    ("tokens", "count"),
    [((3, 3), 1), ((9, 3), 1), ((3, 9), 1), ((3, 3, 9), 2), ((9, 3, 3), 1), ((3, 3, 3, 3), 2), ((3, 3, 3, 99), 3)],
)
def test_halves_hold_something_and_are_even(tokens: tuple[int, ...], count: int) -> None:
    assert half(_pieces(*tokens)) == count


def test_sizes_close_to_one_that_failed_are_not_tried() -> None:
    sizes: list[int] = []
    freed: list[bool] = []
    budget = MemoryBudget(torch.device("cpu"), after_failure=lambda: freed.append(True))

    def run(work: Work) -> None:
        sizes.append(work.tokens)
        if work.tokens > 60:
            raise torch.OutOfMemoryError
        work.levels.clear()

    def cut(work: Work) -> tuple[Work, Work]:
        place = half(work.pieces)
        return Work(8, work.pieces[:place], [*work.levels]), Work(9, work.pieces[place:], [*work.levels])

    for tokens in ([10] * 10, [10] * 9 + [5], [10] * 8 + [5], [10] * 6):
        budget.run(Work(0, _pieces(*tokens), [0]), run, cut)
    # 100 fails; 95 is close to it; 85 is tried, and fails; 60 is below.
    assert sizes == [100, 50, 50, 50, 45, 85, 40, 45, 60]
    assert len(freed) == 2
    # Another model may fit more.
    budget.run(Work(0, _pieces(*[10] * 10), [1]), run, cut)
    assert sizes[9] == 100
