"""Embeddings of a chosen layer: fair-esm's `repr_layers`, in every way that an embedder runs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import Embedder, Encoder, InputError, embed_library, from_fair_esm, read_embeddings
from protnest.engine.chain import Chain
from protnest.engine.config import BUNDLED_FOLDER
from protnest.engine.embedder_plan import EmbedderPlan
from protnest.engine.encoder import Layer
from protnest.engine.exported_encoder import ExportedEncoder
from protnest.engine.formats import convert
from protnest.engine.graphs import GraphedEncoder
from protnest.engine.models import load_any_encoder
from protnest.engine.packing import pack
from protnest.engine.quantise import quantised

from support.esm2_models import ALPHABET, fair_esm_outputs, hostile_esm2
from support.tiny import random_proteins, save_tiny_model, write_fasta

DEEPEST = 4
SEQUENCES = ["MKTAYIAKQR", "G", "ACDEFGHIKLMNPQRSTVWYXX", "MKT"]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return hostile_esm2(DEEPEST, 32, 2)


@pytest.fixture(scope="module")
def encoder(theirs: Any) -> Encoder:
    return from_fair_esm(theirs, ALPHABET, name="small").eval()


@pytest.fixture(scope="module")
def wanted(theirs: Any) -> list[list[np.ndarray]]:
    """By layer, (L, D) of each sequence, residues only."""
    by_sequence = [fair_esm_outputs(theirs, [pack([sequence]).tokens_T]) for sequence in SEQUENCES]
    return [[output[f"layer {layer}"][1:-1].numpy() for output in by_sequence] for layer in range(DEEPEST + 1)]


def _close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("layer", range(DEEPEST + 1))
def test_each_layer_is_that_of_fair_esm(encoder: Encoder, wanted: list[list[np.ndarray]], layer: int) -> None:
    residues = Embedder(encoder, pool="residue", layer=layer).embed(SEQUENCES)
    for got, expected in zip(residues, wanted[layer], strict=True):
        _close(got, expected)
    means = Embedder(encoder, layer=layer).embed(SEQUENCES)
    largest = Embedder(encoder, pool="max", layer=layer).embed(SEQUENCES)
    for row, expected in enumerate(wanted[layer]):
        _close(means[row], expected.mean(axis=0))
        _close(largest[row], expected.max(axis=0))


@pytest.mark.parametrize("layer", range(DEEPEST + 1))
def test_negative_layers_count_from_the_end(encoder: Encoder, layer: int) -> None:
    from_start = Embedder(encoder, layer=layer)
    from_end = Embedder(encoder, layer=layer - DEEPEST - 1)
    assert from_end.layer == from_start.layer == (None if layer == DEEPEST else layer)
    assert np.array_equal(from_start.embed(SEQUENCES), from_end.embed(SEQUENCES))


def test_the_last_layer_has_the_bits_of_none_asked_for(encoder: Encoder) -> None:
    assert np.array_equal(Embedder(encoder, layer=DEEPEST).embed(SEQUENCES), Embedder(encoder).embed(SEQUENCES))


@pytest.mark.parametrize("layer", range(DEEPEST + 1))
def test_layers_above_do_not_run(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    ran = []
    run = Layer.forward

    def watched(self: Layer, *args: Any, **kwargs: Any) -> Any:
        ran.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Layer, "forward", watched)
    with torch.inference_mode():
        encoder.hidden(pack(SEQUENCES), layer)
    assert ran == list(encoder.layers[:layer])


def test_inner_layers_stay_as_they_were_kept_beside_a_whole_pass(encoder: Encoder) -> None:
    batch = pack(SEQUENCES)
    with torch.inference_mode():
        kept = encoder(batch, layers=range(DEEPEST + 1)).layers
        for layer, hidden_TD in kept.items():
            assert torch.equal(encoder.hidden(batch, layer), hidden_TD), layer


def test_windows_are_blended_in_an_inner_layer(encoder: Encoder) -> None:
    """Layer 0 does not see its neighbours: blended windows are the very residues of the whole protein."""
    sequence = "ACDEFGHIKLMNPQRSTVWY" * 70
    whole, windowed = (
        Embedder(encoder, pool="residue", layer=0, long=long).embed([sequence])[0] for long in ("full", "window")
    )
    _close(windowed, whole)
    inner = [Embedder(encoder, pool="residue", layer=2, long=long).embed([sequence])[0] for long in ("full", "window")]
    assert np.isfinite(inner[1]).all()
    assert inner[0].shape == inner[1].shape == (1400, 32)


def test_int8_and_bf16_layers_are_close(encoder: Encoder, wanted: list[list[np.ndarray]]) -> None:
    means = np.stack([residues.mean(axis=0) for residues in wanted[2]])
    for other in (quantised(copy.deepcopy(encoder)), copy.deepcopy(encoder).bfloat16()):
        got = Embedder(other, layer=2).embed(SEQUENCES)
        assert np.linalg.norm(got - means) < 0.05 * np.linalg.norm(means)


def test_graphed_encoders_pass_it_on(encoder: Encoder) -> None:
    with torch.inference_mode():
        assert torch.equal(GraphedEncoder(encoder).hidden(pack(SEQUENCES), 1), encoder.hidden(pack(SEQUENCES), 1))


@pytest.mark.parametrize("layer", [DEEPEST + 1, -DEEPEST - 2, 99])
def test_layers_that_do_not_exist(encoder: Encoder, layer: int) -> None:
    with pytest.raises(InputError, match=rf"layer is {layer}, but small has layers 0 .* to 4; .* -5 to -1"):
        Embedder(encoder, layer=layer)
    with pytest.raises(ValueError, match=f"layer {layer} does not exist: small has 0 to 4"):
        encoder.hidden(pack(["M"]), layer)
    with pytest.raises(ValueError, match="layer -1 does not exist"):
        encoder.hidden(pack(["M"]), -1)


def test_a_chain_has_its_last_layers() -> None:
    chain = Chain.load(BUNDLED_FOLDER / "nano.chain")
    models = [load_any_encoder(each.name, device="cpu", precision="fp32") for each in chain.models[:1]]
    with pytest.raises(InputError, match="layer is -1, but a chain is fitted on last layers"):
        Embedder(models, chain=chain, layer=-1)


def test_an_exported_file_has_its_last_layer(encoder: Encoder) -> None:
    class Runner:
        def run_tokens(self, tokens_BL: Any, outputs: Any) -> dict[str, Any]:
            raise NotImplementedError

    facts = {
        "models": [{"name": "small", "fingerprint": None, "config": dataclasses.asdict(encoder.config)}],
        "limits": {"max_tokens": 1024, "max_residues": 1022},
        "language_head": None,
        "outputs": {"residue": [32]},
        "widths": [32],
        "precision": "fp32",
    }
    exported = ExportedEncoder(
        Runner(), facts, path=Path("small.onnx"), device=torch.device("cpu"), runtime="onnxruntime"
    )
    with pytest.raises(InputError, match=r"small\.onnx: layer is 2, but an exported file gives the last one alone"):
        Embedder(exported, layer=2)


def test_store_says_which_layer(tmp_path: Path) -> None:
    """And says nothing of the last one, so that older stores match."""
    model = save_tiny_model(tmp_path / "tiny")
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(6))
    plan = EmbedderPlan(models=(str(model),), device="cpu", precision="fp32")
    embed_library(fasta, tmp_path / "last", plan)
    assert "layer" not in read_embeddings(tmp_path / "last").run["settings"]
    again = embed_library(fasta, tmp_path / "last", EmbedderPlan(**{**vars(plan), "layer": 2}))
    assert (again.embedded, again.resumed) == (0, 6)
    inner = EmbedderPlan(**{**vars(plan), "layer": -2})
    with pytest.raises(InputError, match="layer"):
        embed_library(fasta, tmp_path / "last", inner)

    embed_library(fasta, tmp_path / "inner", inner)
    stored = read_embeddings(tmp_path / "inner")
    assert (stored.run["settings"]["layer"], stored.run["settings"]["layers"]) == (1, 2)
    folder = convert(stored, tmp_path / "inner", "pt")
    content = torch.load(folder / "protein3.pt")
    assert list(content["mean_representations"]) == [1]
    assert np.array_equal(content["mean_representations"][1].numpy(), stored[3])
    assert not np.allclose(stored[3], read_embeddings(tmp_path / "last")[3])
