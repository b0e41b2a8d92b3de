"""Nested embeddings: prefixes bit for bit, the formulas in fp64, the routes that must agree, and what is refused.

Shapes: B proteins, L residues of one, T tokens, W width of the nested row.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from protnest.engine import Embedder, Encoder, InputError
from protnest.engine.checkpoint import encoder_fingerprint
from protnest.engine.device import PRECISIONS
from protnest.engine.family import Family
from protnest.engine.packing import pack
from protnest.engine.pooling import POOLS
from protnest.kernels.nested_embed import nested_embed_reference

from support.families import WIDTHS, literal_rows, random_chain, tiny_family
from support.tiny import random_proteins

Floats = npt.NDArray[np.float32]

FAMILY = tiny_family()
CHAIN = random_chain(FAMILY)
NAIVE = random_chain(FAMILY, naive=True)
PROTEINS = [*random_proteins(20, seed=1, longest=20), *random_proteins(8, seed=2, longest=70), "M"]
"""Some longer than the shortest of the models' lengths, 20: these run as windows."""

CPU_PRECISIONS = ["fp32", "bf16"]


def _in(precision: str, encoders: Sequence[Encoder] = FAMILY) -> list[Encoder]:
    return [copy.deepcopy(encoder).to(PRECISIONS[precision]) for encoder in encoders]


def _rows(embedder: Embedder, sequences: Sequence[str] = PROTEINS) -> Floats:
    """All rows below each other, residues of pool=residue too."""
    out = embedder.embed(sequences)
    return out if isinstance(out, np.ndarray) else np.concatenate(out)


# Prefixes


@pytest.mark.parametrize("precision", CPU_PRECISIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_prefix_is_the_smaller_models_very_bits(pool: str, precision: str) -> None:
    """At every width, for proteins in one piece and in windows, in batches of several shapes."""
    encoders = _in(precision)
    for max_tokens in (64, 4096):
        whole = _rows(Embedder(encoders, chain=CHAIN, pool=pool, max_tokens=max_tokens))
        assert whole.shape[1] == WIDTHS[-1]
        for count in (1, 2):
            fewer = Embedder(encoders[:count], chain=CHAIN, pool=pool, max_tokens=max_tokens)
            assert fewer.dims == WIDTHS[:count]
            assert np.array_equal(_rows(fewer), whole[:, : WIDTHS[count - 1]])
    few = PROTEINS[-4:]
    whole = _rows(Embedder(encoders, chain=CHAIN, pool=pool), few)
    for dims in range(1, WIDTHS[-1] + 1):
        cut = _rows(Embedder(encoders, chain=CHAIN, pool=pool, dims=dims), few)
        assert np.array_equal(cut, whole[:, :dims]), dims


@pytest.mark.parametrize("pool", POOLS)
def test_prefix_is_what_the_first_model_gives_alone(pool: str) -> None:
    """Without any chain, for proteins that fit into all models."""
    short = [sequence for sequence in PROTEINS if len(sequence) <= 20]
    whole = _rows(Embedder(FAMILY, chain=CHAIN, pool=pool, max_tokens=64), short)
    assert np.array_equal(_rows(Embedder(FAMILY[0], pool=pool, max_tokens=64), short), whole[:, : WIDTHS[0]])


@pytest.mark.parametrize("pool", POOLS)
def test_one_model_at_a_time_gives_the_same_bits(pool: str) -> None:
    loaded: list[int] = []

    def load(place: int) -> Encoder:
        loaded.append(place)
        return FAMILY[place]

    family = Family(load, 3, resident=False)
    loaded.clear()
    reports: list[int] = []
    embedder = Embedder(family, chain=CHAIN, pool=pool, max_tokens=64)
    out = embedder.embed(PROTEINS, after_batch=reports.append)
    got = out if isinstance(out, np.ndarray) else np.concatenate(out)
    assert np.array_equal(got, _rows(Embedder(FAMILY, chain=CHAIN, pool=pool, max_tokens=64)))
    assert loaded == [0, 1, 2]
    assert len(family._held) == 1
    resident: list[int] = []
    Embedder(FAMILY, chain=CHAIN, pool=pool, max_tokens=64).embed(PROTEINS, after_batch=resident.append)
    assert reports == resident


def test_no_model_runs_beyond_the_one_that_is_needed() -> None:
    encoders = tiny_family()
    ran: list[int] = []
    for place, encoder in enumerate(encoders):
        encoder.layers[0].register_forward_pre_hook(lambda *_, place=place: ran.append(place))  # type: ignore[misc]
    for dims, needed, nested in (
        (16, 1, (16,)),
        (3, 1, (3,)),
        (17, 2, (16, 17)),
        (24, 2, (16, 24)),
        (25, 3, (16, 24, 25)),
    ):
        ran.clear()
        embedder = Embedder(encoders, chain=CHAIN, dims=dims)
        assert embedder.dims == nested
        assert len(embedder.members) == needed
        embedder.embed(["MKT"])
        assert ran == list(range(needed))


# The formulas


@pytest.mark.parametrize("naive", [False, True], ids=["nested", "naive"])
def test_folded_equals_stage_by_stage_in_fp64(naive: bool) -> None:
    encoders = [copy.deepcopy(encoder).double() for encoder in FAMILY]
    chain = random_chain(FAMILY, naive=naive, dtype=torch.float64)
    batch = pack(PROTEINS)
    wanted = literal_rows(FAMILY, chain, batch)
    row = encoders[0](batch).hidden_TD
    for stage, encoder in zip(chain.stages, encoders[1:], strict=True):
        fold = stage.fold(encoder.final_norm.weight, encoder.final_norm.bias)
        X = row.shape[1]
        row = nested_embed_reference(
            row,
            encoder.stream(batch),
            fold.projection_DN,
            fold.base_XN,
            fold.offset_N,
            eps=encoder.config.layer_norm_eps,
        )
        row = row[:, X:] if naive else row
    assert float((row - wanted).abs().max() / wanted.abs().max()) <= 1e-10


@pytest.mark.parametrize("chain", [CHAIN, NAIVE], ids=["nested", "naive"])
@pytest.mark.parametrize("pool", POOLS)
def test_every_route_follows_the_formulas(pool: str, chain: Any) -> None:
    """fp32 against fp64, of each protein's norm: 1e-5."""
    short = [sequence for sequence in PROTEINS if len(sequence) <= 20]
    out = Embedder(FAMILY, chain=chain, pool=pool, max_tokens=64).embed(short)
    for sequence, got in zip(short, out, strict=True):
        rows_TW = literal_rows(FAMILY, chain, pack([sequence]))
        residues_LW = rows_TW[1:-1]
        wanted = {
            "mean": residues_LW.mean(0),
            "max": residues_LW.amax(0),
            "bos": rows_TW[0],
            "residue": residues_LW,
        }[pool].numpy()
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_pooling_first_equals_projecting_first() -> None:
    """Also over windows, whose weights add up to one."""
    pooled = _rows(Embedder(FAMILY, chain=CHAIN, max_tokens=64))
    residues = Embedder(FAMILY, chain=CHAIN, pool="residue", max_tokens=64).embed(PROTEINS)
    for got, rows_LW in zip(pooled, residues, strict=True):
        wanted = rows_LW.mean(axis=0, dtype=np.float64)
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_low_precision_stays_near_fp32() -> None:
    exact = _rows(Embedder(FAMILY, chain=CHAIN))
    for pool in ("mean", "residue"):
        exact = _rows(Embedder(FAMILY, chain=CHAIN, pool=pool))
        rounded = _rows(Embedder(_in("bf16"), chain=CHAIN, pool=pool))
        # The added dimensions alone: the prefix is the first model's and says nothing of the chain.
        errors = np.linalg.norm(rounded - exact, axis=1) / np.linalg.norm(exact, axis=1)
        assert np.median(errors) <= 0.02
        assert not np.array_equal(rounded, exact)


def test_nothing_in_nothing_out() -> None:
    for pool in POOLS:
        out = Embedder(FAMILY, chain=CHAIN, pool=pool).embed([])
        assert out == [] if pool == "residue" else out.shape == (0, WIDTHS[-1])  # type: ignore[union-attr]


def test_the_shortest_length_cuts_windows() -> None:
    assert Embedder(FAMILY, chain=CHAIN).max_residues == 20
    assert Embedder(FAMILY[:1], chain=CHAIN).max_residues == 20
    assert Embedder(FAMILY[0]).max_residues == 30


def test_naive_rows_have_one_width() -> None:
    assert Embedder(FAMILY, chain=NAIVE).dims == (WIDTHS[-1],)
    assert Embedder(FAMILY[:2], chain=NAIVE).dims == (WIDTHS[1],)


# What is refused


def _other_checkpoint() -> Encoder:
    return tiny_family(seed=5)[1]


def _without_fingerprint() -> Encoder:
    encoder = copy.deepcopy(FAMILY[1])
    encoder.fingerprint = None
    return encoder


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (
            [FAMILY[1], FAMILY[0]],
            "model 1 of the chain is tiny16 (16), got its tiny24: the order must be tiny16 (16) -> ",
        ),
        ([FAMILY[0], FAMILY[2]], "model 2 of the chain is tiny24 (24), got its tiny40: the order must be"),
        ([FAMILY[1]], "model 1 of the chain is tiny16 (16), got its tiny24"),
        ([FAMILY[0], _other_checkpoint()], "another checkpoint of that width: its hash is"),
        ([FAMILY[0], _without_fingerprint()], "another checkpoint of that width: its hash is not known"),
        ([FAMILY[0], tiny_family((16, 32))[1]], "model 2 of the chain is tiny24 (24), got tiny32 of width 32"),
        ([*FAMILY, FAMILY[2]], "4 models for a chain of 3"),
        ([], "no model"),
    ],
    ids=["order", "one left out", "not the first", "checkpoint", "no hash", "width", "too many", "none"],
)
def test_other_models_than_the_chains(models: list[Encoder], problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        Embedder(models, chain=CHAIN)


def test_a_model_in_bf16_is_still_the_chains() -> None:
    """The hash is that of the fp32 weights, whatever they run in."""
    encoders = _in("bf16")
    assert encoder_fingerprint(encoders[1]) != encoders[1].fingerprint
    Embedder(encoders, chain=CHAIN)


def test_models_must_run_alike() -> None:
    with pytest.raises(
        InputError, match=r"models must run alike: tiny16 is torch.float32 on cpu, tiny24 torch.bfloat16"
    ):
        Embedder([FAMILY[0], _in("bf16")[1]], chain=CHAIN)


def test_several_models_without_a_chain() -> None:
    with pytest.raises(InputError, match="2 models and no chain: `protnest fit-chain` makes one row"):
        Embedder(FAMILY[:2])
    with pytest.raises(InputError, match="dims is 8, but without a chain the model's whole width is kept, 16"):
        Embedder(FAMILY[0], dims=8)


@pytest.mark.parametrize("dims", [0, -1, 41])
def test_dims_beyond_the_chain(dims: int) -> None:
    with pytest.raises(InputError, match=f"dims is {dims}; this chain gives 1 to 40, nested at 16, 24, 40"):
        Embedder(FAMILY, chain=CHAIN, dims=dims)


def test_dims_that_need_more_models() -> None:
    with pytest.raises(InputError, match="dims is 30, which takes 3 models of the chain; 2 are given"):
        Embedder(FAMILY[:2], chain=CHAIN, dims=30)
    with pytest.raises(InputError, match="dims is 16, but a naive chain has no prefixes"):
        Embedder(FAMILY, chain=NAIVE, dims=16)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("pool", POOLS)
def test_prefix_bits_and_agreement_on_a_gpu(pool: str, precision: str) -> None:
    encoders = [encoder.cuda() for encoder in _in(precision)]
    whole = _rows(Embedder(encoders, chain=CHAIN, pool=pool, max_tokens=256))
    for count in (1, 2):
        fewer = _rows(Embedder(encoders[:count], chain=CHAIN, pool=pool, max_tokens=256))
        assert np.array_equal(fewer, whole[:, : WIDTHS[count - 1]])
    wanted = _rows(Embedder(FAMILY, chain=CHAIN, pool=pool, max_tokens=256))
    errors = np.linalg.norm(whole - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(errors) <= {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.003}[precision]
