"""esm-cpp: the worker's answers are ours, its errors arrive, its process ends; and what happens without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from protnest.benchmarks import esm_cpp
from protnest.benchmarks.esm_cpp import EsmCpp, find_python, save_for_esm_cpp, version
from protnest.benchmarks.parity import check_parity
from protnest.benchmarks.peers import ESM_CPP, MeanLogits, Protnest, build_lineup, random_encoder
from protnest.engine import Encoder
from protnest.engine.config import EncoderConfig
from safetensors.torch import load_file

from support.tiny import random_proteins

CONFIG = EncoderConfig(layers=2, width=64, heads=4, feedforward=256)
CPU = torch.device("cpu")
PYTHON = find_python()
needs_esm_cpp = pytest.mark.skipif(
    PYTHON is None, reason="esm-cpp is in no environment of its own: python -m venv out/esm-cpp, pip install esm-cpp"
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder(CONFIG, seed=0)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def engine(request: pytest.FixtureRequest, encoder: Encoder) -> Iterator[EsmCpp]:
    assert PYTHON is not None
    engine = EsmCpp(encoder, precision=request.param, python=PYTHON, threads=1)
    yield engine
    engine.close()


@needs_esm_cpp
def test_it_says_what_ours_says_alone_and_in_batches(engine: EsmCpp, encoder: Encoder) -> None:
    proteins = [*random_proteins(9, seed=1), "M", "MKXBUZO"]
    ours = Protnest(encoder, precision="fp32", device=CPU).embed(proteins, 64)
    logits = MeanLogits(encoder).embed(proteins, 64)
    for budget, kind, expected in ((1, "embeddings", ours), (64, "logits", logits), (10_000, "logits", logits)):
        answer = engine.answer(proteins, budget, watch=True)
        assert (answer.kind, answer.vectors_BD.dtype) == (kind, np.float32)
        assert answer.seconds > 0
        assert answer.growth_bytes is None or answer.growth_bytes >= 0
        check_parity(engine.name, engine.precision, expected, answer.vectors_BD)


@needs_esm_cpp
def test_int8_is_not_fp32(encoder: Encoder) -> None:
    assert PYTHON is not None
    engines = [EsmCpp(encoder, precision=precision, python=PYTHON, threads=1) for precision in ("fp32", "int8")]
    fp32, int8 = (engine.embed(["MKTAYIAKQR"], 1) for engine in engines)
    for engine in engines:
        engine.close()
    assert np.linalg.norm(fp32 - int8) > 1e-3 * np.linalg.norm(fp32)


@needs_esm_cpp
def test_errors_of_the_worker_arrive_and_it_goes_on(engine: EsmCpp) -> None:
    with pytest.raises(RuntimeError, match=f"esm-cpp {engine.precision}: "):
        engine.embed([7], 1)  # type: ignore[list-item]
    assert engine.embed(["MKT"], 1).shape == (1, CONFIG.width)


@needs_esm_cpp
def test_close_ends_the_process_and_removes_the_weights(encoder: Encoder) -> None:
    assert PYTHON is not None
    engine = EsmCpp(encoder, precision="fp32", python=PYTHON, threads=1)
    folder = Path(engine._folder.name)
    assert (folder / "model.safetensors").is_file()
    engine.close()
    assert engine._process.poll() is not None
    assert not folder.exists()
    with pytest.raises((RuntimeError, ValueError)):
        engine.embed(["MKT"], 1)


@needs_esm_cpp
def test_a_dead_worker_is_named(encoder: Encoder) -> None:
    assert PYTHON is not None
    engine = EsmCpp(encoder, precision="fp32", python=PYTHON, threads=1)
    engine._process.kill()
    engine._process.wait()
    with pytest.raises(RuntimeError, match="esm-cpp fp32: its process died"):
        engine.embed(["MKT"], 1)
    engine.close()


@needs_esm_cpp
def test_the_lineup_has_it_with_the_weights_of_the_others() -> None:
    lineup = build_lineup(CONFIG, seed=0, precisions=["fp32"], device=CPU, peers=[ESM_CPP], esm_cpp_python=PYTHON)
    try:
        assert [(peer.name, peer.precision) for peer in lineup.peers] == [(ESM_CPP, "fp32"), (ESM_CPP, "int8")]
        proteins = random_proteins(3, seed=2)
        check_parity("esm-cpp", "fp32", lineup.reference.embed(proteins, 1), lineup.peers[0].embed(proteins, 1))
        assert lineup.logits_reference is not None
        expected = lineup.logits_reference.embed(proteins, 64)
        check_parity("esm-cpp", "fp32", expected, lineup.peers[0].embed(proteins, 64))
    finally:
        lineup.close()


def test_a_python_without_it_is_refused(encoder: Encoder) -> None:
    # This environment has numpy 2, so it cannot have esm-cpp.
    assert version(Path(sys.executable)) is None
    with pytest.raises(ValueError, match="cannot import esm_cpp; make it with `python -m venv`"):
        find_python(Path(sys.executable))
    with pytest.raises(RuntimeError, match="esm-cpp fp32: ModuleNotFoundError"):
        EsmCpp(encoder, precision="fp32", python=Path(sys.executable), threads=1)


def test_the_environment_variable_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(esm_cpp, "ROOT", tmp_path)
    monkeypatch.delenv(esm_cpp.VARIABLE, raising=False)
    assert find_python() is None
    monkeypatch.setattr(esm_cpp, "version", lambda python: "0.2.1" if python.name == "mine" else None)
    monkeypatch.setenv(esm_cpp.VARIABLE, os.fspath(tmp_path / "mine"))
    assert find_python() == tmp_path / "mine"
    monkeypatch.setenv(esm_cpp.VARIABLE, os.fspath(tmp_path / "other"))
    with pytest.raises(ValueError, match="other cannot import esm_cpp"):
        find_python()


def test_bf16_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="precision is 'bf16'; esm-cpp has fp32, int8"):
        EsmCpp(encoder, precision="bf16", python=Path(sys.executable), threads=1)


def test_the_file_has_what_its_loader_wants(encoder: Encoder, tmp_path: Path) -> None:
    tensors = load_file(save_for_esm_cpp(encoder, tmp_path))
    for layer in range(CONFIG.layers):
        frequencies = tensors[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"]
        assert frequencies.shape == (CONFIG.head_width // 2,)
        assert frequencies[0] == 1
    assert {name.rsplit(".", 1)[1] for name in tensors} == {"weight", "bias", "inv_freq"}


def test_ours_in_int8_leaves_what_was_given(encoder: Encoder) -> None:
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    engine = Protnest(encoder, precision="int8", device=CPU)
    assert engine.precision == engine.encoder.precision == "int8"
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
