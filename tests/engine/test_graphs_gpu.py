"""Captured passes beside eager ones, on a GPU: other lengths, other tokens, other counts in the same graph.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from protnest.benchmarks.gpu_suite import mixed_batch
from protnest.benchmarks.parity import row_errors
from protnest.benchmarks.peers import random_encoder
from protnest.engine import Embedder, transfer
from protnest.engine.config import EncoderConfig
from protnest.engine.device import PRECISIONS
from protnest.engine.graphs import GraphedEncoder, bucket_of
from protnest.engine.packing import PackedBatch

from support.tiny import random_proteins

DEVICE = torch.device("cuda")
SHAPE = EncoderConfig(layers=3, width=120, heads=5, feedforward=480, max_residues=60)
APART = {"fp32": 5e-6, "fp16": 5e-3, "bf16": 4e-2}
"""As in `test_encoder_gpu`."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]


def _batches() -> list[PackedBatch]:
    """One bucket, in which lengths, their number and masks differ."""
    lengths = [(100, 90, 20), (30,) * 6, (120, 1, 1, 2), (7, 33, 61, 100)]
    batches = [mixed_batch(seed=seed, lengths=each) for seed, each in enumerate(lengths)]
    assert len({bucket_of(batch.lengths_B) for batch in batches}) == 1
    return batches


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@torch.inference_mode()
def test_replays_equal_eager_runs(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = random_encoder(SHAPE, seed=3).to(DEVICE, PRECISIONS[precision])
    runner = GraphedEncoder(encoder)
    with caplog.at_level(logging.WARNING, logger="protnest.engine.graphs"):
        for batch in [*_batches(), *_batches()]:
            for got, right in (
                (runner(batch).hidden_TD, encoder(batch).hidden_TD),
                (runner.stream(batch), encoder.stream(batch)),
            ):
                errors = row_errors(right.double().cpu().numpy(), got.double().cpu().numpy())
                assert errors.max() <= APART[precision], f"token {errors.argmax()} is {errors.max():.2e} apart"
    # An attention that runs sequence by sequence cannot be captured; then that is what the log says.
    if runner._graphs:
        assert (len(runner._graphs), caplog.messages) == (1, [])
    else:
        assert "runs without CUDA graphs" in caplog.messages[0]


@pytest.mark.parametrize("pool", ["mean", "max", "bos", "residue"])
def test_embeddings_with_and_without(pool: str) -> None:
    encoder = random_encoder(SHAPE, seed=3).to(DEVICE, torch.bfloat16)
    proteins = [*random_proteins(200, seed=6, longest=58), *random_proteins(5, seed=7, longest=250)]
    right = Embedder(encoder, pool=pool, max_tokens=400, cuda_graphs=False).embed(proteins)
    got = Embedder(encoder, pool=pool, max_tokens=400).embed(proteins)
    for one, other in zip(got, right, strict=True):
        assert row_errors(np.atleast_2d(other), np.atleast_2d(one)).max() <= APART["bf16"]


def test_results_are_fetched_without_waiting() -> None:
    """Pinned copies hold what was asked for, whatever becomes of the tensor afterwards."""
    arrivals, seen = transfer.Arrivals(), []
    tensor = torch.zeros(1 << 20, device=DEVICE)
    for number in range(6):
        tensor.fill_(number)
        arrivals.expect(tensor, lambda array: seen.append((array.min(), array.max())))
    arrivals.finish()
    assert seen == [(number, number) for number in range(6)]
    source = torch.arange(1 << 20)
    assert torch.equal(transfer.to_device(source, DEVICE).cpu(), source)


def test_a_gpu_that_is_too_small_cuts_batches(caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the memory that torch may take, below what one batch of all proteins needs."""
    config = EncoderConfig(layers=2, width=512, heads=8, feedforward=2048)
    encoder = random_encoder(config, seed=3).to(DEVICE, torch.bfloat16)
    proteins = random_proteins(3000, seed=6, longest=250)
    tokens = sum(len(each) + 2 for each in proteins)
    right = Embedder(encoder, cuda_graphs=False, max_tokens=8192).embed(proteins)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    # The feed-forward layer alone takes 4 KB a token, twice.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 4096 * tokens) / total)
    try:
        with caplog.at_level(logging.WARNING, logger="protnest.engine.retry"):
            got = Embedder(encoder, cuda_graphs=False, max_tokens=tokens).embed(proteins)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "does not fit into the memory of cuda:0" in caplog.messages[0]
    assert row_errors(np.asarray(right), np.asarray(got)).max() <= APART["bf16"]
