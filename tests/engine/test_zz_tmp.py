"""On a GPU: the encoder against fp64 on the CPU, varlen attention against SDPA, a protein alone against in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from protnest.benchmarks.gpu_suite import SMALL_SHAPES, mixed_batch, parity_rows, split_batch
from protnest.benchmarks.parity import row_errors
from protnest.benchmarks.peers import random_encoder
from protnest.engine import Embedder, Encoder, load_model
from protnest.engine import encoder as encoder_file
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.config import EncoderConfig
from protnest.engine.device import PRECISIONS
from protnest.engine.packing import PackedBatch

from support.tiny import random_proteins

DEVICE = torch.device("cpu")
SHAPE = EncoderConfig(layers=3, width=120, heads=5, feedforward=480, max_residues=60)

# How far two right answers in one precision may lie apart, of a token's norm: each is within about half of it of fp64.
APART = {"fp32": 5e-6, "fp16": 5e-3, "bf16": 4e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not True, reason="torch sees no CUDA GPU"),
]
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


def _encoder(precision: str, config: EncoderConfig = SHAPE) -> Encoder:
    return random_encoder(config, seed=3).to(DEVICE, PRECISIONS[precision])


@torch.inference_mode()
def _hidden(encoder: Encoder, batch: PackedBatch) -> np.ndarray:
    return encoder(batch).hidden_TD.double().cpu().numpy()


@each_precision
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_agrees_with_fp64_on_the_cpu(shape: str, precision: str) -> None:
    """Every token, masked ones and those of sequences that run alone included, in hidden states and logits."""
    wrong = [row for row in parity_rows(shape, SMALL_SHAPES[shape], [precision], DEVICE) if not row["ok"]]
    assert not wrong


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_varlen_equals_sdpa(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, batch = _encoder(precision), mixed_batch(seed=4)
    attention, ran = encoder_file.varlen_attention, []

    def with_impl(impl: str) -> np.ndarray:
        def attend(*given: object) -> torch.Tensor:
            ran.append(impl)
            return attention(*given, impl=impl)  # type: ignore[arg-type]

        monkeypatch.setattr(encoder_file, "varlen_attention", attend)
        return _hidden(encoder, batch)

    errors = row_errors(with_impl("sdpa"), with_impl("reference"))
    assert ran == ["sdpa"] * SHAPE.layers + ["reference"] * SHAPE.layers
    assert errors.max() <= APART[precision], f"token {errors.argmax()} is {errors.max():.2e} apart"


@each_precision
def test_same_answer_alone_or_in_a_batch(precision: str) -> None:
    encoder, batch = _encoder(precision), mixed_batch(seed=5)
    alone_TD = np.concatenate([_hidden(encoder, single) for single in split_batch(batch)])
    errors = row_errors(alone_TD, _hidden(encoder, batch))
    assert errors.max() <= APART[precision], f"token {errors.argmax()} is {errors.max():.2e} apart"


def _rows(vectors: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    return vectors if isinstance(vectors, np.ndarray) else np.concatenate(vectors)


@pytest.mark.parametrize("pool", ["mean", "max", "bos", "residue"])
def test_embedder_equals_the_cpu(pool: str) -> None:
    """In the order given, windows of long proteins included, whatever the batches."""
    proteins = random_proteins(12, seed=6, longest=58) + random_proteins(3, seed=7, longest=250)
    right = _rows(Embedder(random_encoder(SHAPE, seed=3), pool=pool).embed(proteins))
    encoder = _encoder("fp32")
    for max_tokens in (1, 100, None):
        got = _rows(Embedder(encoder, pool=pool, max_tokens=max_tokens).embed(proteins))
        assert got.dtype == np.float32
        assert row_errors(right, got).max() <= 1e-5


def test_auto_takes_the_gpu_and_bf16(tmp_path: Path) -> None:
    save_checkpoint(random_encoder(SHAPE, seed=3), tmp_path)
    encoder = load_model(tmp_path)
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    assert encoder.device.type == "cpu"
    assert encoder.dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    # `encode` comes back on the CPU, in fp32.
    (hidden_LD,) = encoder.encode(["MKTAYIAKQR"])
    assert (hidden_LD.shape, hidden_LD.dtype) == ((10, SHAPE.width), np.float32)
