"""The bundled family as one graph, traced once: engines of TensorRT-RTX, and rows by ONNX Runtime, are made of it.

Tracing takes three quarters of a minute; `test_export_parity.py` has the other precision, and each model alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from protnest.engine import Chain, Embedder, load_model
from protnest.engine.length_profiles import choose_profiles
from protnest.engine.models import load_encoder
from protnest.engine.onnx_export import export_onnx
from protnest.engine.tensorrt_export import EngineNetwork

from support.shared_data import UNIPROT_500, shared_sequences

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled chain's nested row, in fp16: all engines take that, Turing's no other."""
    chain = Chain.load("nano")
    family = [load_encoder(each.name, device="cpu", precision="fp32") for each in chain.models]
    path = tmp_path_factory.mktemp("nano") / "nano.onnx"
    export_onnx(family, path, chain=chain, precision="fp16")
    return path


@pytest.mark.parametrize("gpus", [("sm86", "sm89", "sm120"), ("sm75",)], ids="-".join)
def test_engines_are_built(graph: Path, gpus: tuple[str, ...]) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'protnest[export]'")
    network = EngineNetwork(trt, graph)
    assert network.inputs == {"tokens": ("INT64", (-1, -1))}
    assert network.outputs == {"nested": ("FLOAT", (-1, Chain.load("nano").models[-1].width))}
    engine = bytes(network.build(gpus, choose_profiles([300], count=1, max_residues=1022)))
    assert len(engine) > 0.9 * graph.stat().st_size
    assert b"nested" in engine
    assert not network.logger.errors


def test_rows_are_the_embedders(graph: Path) -> None:
    pytest.importorskip("onnxruntime")
    chain, sequences = Chain.load("nano"), shared_sequences(UNIPROT_500)
    longest = next(each for each in sequences if len(each) >= 1022)[:1022]
    proteins = [sequences[0][:1], longest, sequences[1][:2], sequences[2][:37]]
    family = [load_encoder(model.name, device="cpu", precision="fp32") for model in chain.models]
    found, expected = (
        torch.as_tensor(embedder.embed(proteins))
        for embedder in (Embedder(load_model(graph, device="cpu")), Embedder(family, chain=chain))
    )
    assert torch.cosine_similarity(found, expected, dim=-1).min() >= 0.9999
