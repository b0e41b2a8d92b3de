"""Exported files of real models, and of published shapes, beside the packed pass, on real proteins.

Fp32 is held to 1e-5: of a protein, the largest difference over the largest magnitude. Fp16 to a cosine of 0.9999,
of each residue's row and of each protein's. The bundled chain in fp16 is in `test_export_bundled.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from protnest.engine import Chain, Embedder, Encoder, load_model
from protnest.engine.config import PUBLISHED
from protnest.engine.exported_encoder import ExportedEncoder
from protnest.engine.models import load_encoder
from protnest.engine.onnx_attention import with_fused_attention
from protnest.engine.onnx_export import MOST_INLINE_BYTES, export_onnx
from protnest.engine.onnx_model import OnnxModel
from protnest.engine.packing import ChosenRows, pack

from support.exported import relative_error
from support.shared_data import REAL_8M_MLM, UNIPROT_500, shared_path, shared_sequences

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MOST, LEAST_COSINE = 1e-5, 0.9999


def _mixed() -> list[str]:
    """From one residue to 1,022, in an order of no meaning: some share runs, some do not."""
    sequences = shared_sequences(UNIPROT_500)
    longest = next(each for each in sequences if len(each) >= 1022)[:1022]
    return [sequences[0][:1], sequences[1][:2], longest, sequences[2][:150], sequences[3][:145], sequences[4][:37]]


def _load(path: Path) -> ExportedEncoder:
    loaded = load_model(path, device="cpu")
    assert isinstance(loaded, ExportedEncoder)
    return loaded


def _check(path: Path, encoder: Encoder, proteins: list[str]) -> None:
    """Residues and logits, in runs of like lengths and as one padded batch, and the mean."""
    loaded, model, packed = _load(path), OnnxModel(path), pack(proteins)
    every = ChosenRows(torch.arange(len(packed.tokens_T)), packed.lengths_B)
    with torch.inference_mode():
        logits = encoder.logits(encoder(packed).hidden_TD).split(packed.lengths_B)
        found = loaded.row_logits(packed, every).split(packed.lengths_B)
    padded = model.run(proteins)
    for row, expected_LD in enumerate(encoder.encode(proteins)):
        assert relative_error(padded["residue"][row], expected_LD) <= MOST
        assert relative_error(padded["logits"][row], logits[row][1:-1]) <= MOST
        assert relative_error(found[row], logits[row]) <= MOST
    means_BD = Embedder(encoder).embed(proteins)
    for one, other in zip(Embedder(loaded).embed(proteins), means_BD, strict=True):
        assert relative_error(one, other) <= MOST


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano-xs", "nano-s", "nano-m", REAL_8M_MLM])
def test_models_in_fp32(name: str, tmp_path: Path) -> None:
    where = shared_path(name) if "/" in name else name
    encoder = load_encoder(where, device="cpu", precision="fp32")
    export_onnx([encoder], tmp_path / "m.onnx")
    assert with_fused_attention(tmp_path / "m.onnx") is not None
    _check(tmp_path / "m.onnx", encoder, _mixed())


@pytest.mark.slow
def test_the_bundled_chain_in_fp32(tmp_path: Path) -> None:
    chain, proteins = Chain.load("nano"), _mixed()
    family = [load_encoder(model.name, device="cpu", precision="fp32") for model in chain.models]
    export_onnx(family, tmp_path / "m.onnx", chain=chain, outputs=["nested"])
    expected_BW = Embedder(family, chain=chain).embed(proteins)
    for found, expected in zip(Embedder(_load(tmp_path / "m.onnx")).embed(proteins), expected_BW, strict=True):
        assert relative_error(found, expected) <= MOST


@pytest.mark.slow
def test_the_real_model_in_fp16(tmp_path: Path) -> None:
    encoder = load_encoder(shared_path(REAL_8M_MLM), device="cpu", precision="fp32")
    export_onnx([encoder], tmp_path / "m.onnx", outputs=["residue"], precision="fp16")
    assert with_fused_attention(tmp_path / "m.onnx") is None
    loaded, proteins = _load(tmp_path / "m.onnx"), _mixed()
    assert loaded.precision == "fp16"
    for found_LD, expected_LD in zip(loaded.encode(proteins), encoder.encode(proteins), strict=True):
        assert _cosine(found_LD, expected_LD) >= LEAST_COSINE


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["esm2_t30_150M_UR50D", "esm2_t33_650M_UR50D"])
def test_published_shapes_with_random_weights(shape: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(PUBLISHED[shape], name=shape).eval().requires_grad_(False)
    export_onnx([encoder], tmp_path / "m.onnx", outputs=["residue"])
    is_large = sum(4 * tensor.numel() for tensor in encoder.parameters()) > MOST_INLINE_BYTES
    assert is_large == (shape == "esm2_t33_650M_UR50D")
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "m.onnx"] == [".data"] * is_large
    # Short ones: it is the weights' place and the depth that are tried here.
    proteins = [protein[:48] for protein in _mixed()]
    for found_LD, expected_LD in zip(
        _load(tmp_path / "m.onnx").encode(proteins), encoder.encode(proteins), strict=True
    ):
        assert relative_error(found_LD, expected_LD) <= MOST


def _cosine(found: object, expected: object) -> float:
    one, other = (torch.from_numpy(np.asarray(each)) for each in (found, expected))
    return float(torch.cosine_similarity(one, other, dim=-1).min())
