"""Adapters by peft in encoders and decoders: nothing at first, trained, kept, merged, and quantised after that.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from protnest.engine import InputError, load_model
from protnest.engine.decoder import Decoder, pack_ids
from protnest.engine.encoder import Encoder, Linear
from protnest.engine.packing import pack
from protnest.training.lora import Adapters, check_peft, load_adapters

from support.learning import save_toy, toy_decoder, toy_encoder

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
pytestmark = needs_peft


def _hidden(model: Encoder | Decoder) -> torch.Tensor:
    if isinstance(model, Encoder):
        return model(pack(["MKTAYIAK", "GSHM", "W"])).hidden_TD
    hidden_TD: torch.Tensor = model(pack_ids([np.array([0, 5, 6, 7, 2]), np.array([0, 9, 2])]))
    return hidden_TD


def _toy(kind: str) -> Encoder | Decoder:
    return toy_encoder(1) if kind == "encoder" else toy_decoder(1)


def _set(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@torch.no_grad()
def test_adapters_change_nothing_until_they_are_trained(kind: str) -> None:
    model = _toy(kind)
    before = _hidden(model)
    adapters = Adapters(model, rank=3, alpha=6.0)
    assert torch.equal(_hidden(model), before)
    names = [name for name, each in model.named_parameters() if each.requires_grad]
    # Two tensors on each of four products of two layers.
    assert len(names) == 16
    assert all("lora_" in name for name in names)
    assert {tuple(each.shape) for name, each in model.named_parameters() if "qkv.lora_" in name} == {(3, 16), (48, 3)}
    adapters.merge()
    assert torch.equal(_hidden(model), before)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_adapted_products_are_the_formula(kind: str) -> None:
    """W + (alpha / rank) B A in place of W: forward, gradients of both, and what merging leaves."""
    model, plain = _toy(kind), _toy(kind)
    adapters = Adapters(model, rank=2, alpha=5.0)
    _set(model)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            base = name.removesuffix(".weight")
            if f"{base}.lora_A.default.weight" in tensors:
                weight += 2.5 * tensors[f"{base}.lora_B.default.weight"] @ tensors[f"{base}.lora_A.default.weight"]
        wanted = _hidden(plain)
    found = _hidden(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, _hidden(_toy(kind)), atol=1e-2)
    found.pow(2).sum().backward()  # type: ignore[no-untyped-call]
    assert all(each.grad is not None and bool(each.grad.any()) for each in model.parameters() if each.requires_grad)
    assert all(each.grad is None for each in model.parameters() if not each.requires_grad)
    merged = adapters.merge()
    assert merged is model
    assert all(type(layer.qkv) is Linear and type(layer.fc2) is Linear for layer in model.layers)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(_hidden(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@torch.no_grad()
def test_kept_and_put_in_again(kind: str, tmp_path: Path) -> None:
    model = _toy(kind)
    adapters = Adapters(model, rank=2, alpha=4.0)
    _set(model)
    adapters.save(tmp_path)
    again = _toy(kind)
    load_adapters(again, tmp_path)
    assert torch.equal(_hidden(again), _hidden(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@torch.no_grad()
def test_merged_models_run_in_every_precision(precision: str, tmp_path: Path) -> None:
    model = toy_encoder(2)
    adapters = Adapters(model, rank=2, alpha=4.0)
    _set(model)
    adapted = _hidden(model)
    adapters.merge()
    assert isinstance(model, Encoder)
    loaded = load_model(save_toy(tmp_path / "merged", model), precision=precision)
    difference = (_hidden(loaded).float() - adapted).norm() / adapted.norm()
    assert difference < {"fp32": 1e-5, "bf16": 0.05, "int8": 0.1}[precision]


def test_seeds_decide_the_first_weights() -> None:
    models = [toy_encoder(), toy_encoder(), toy_encoder()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        Adapters(model, rank=2, alpha=4.0, seed=seed)
    first, again, other = (dict(model.named_parameters())["layers.0.qkv.lora_A.default.weight"] for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (2, 0.0), (2, float("nan"))])
def test_adapters_that_cannot_be(rank: int, alpha: float) -> None:
    with pytest.raises(InputError, match="adapters have a rank of at least 1 and a positive alpha, got"):
        Adapters(toy_encoder(), rank=rank, alpha=alpha)


def test_merged_weights_that_are_not_finite() -> None:
    model = toy_encoder()
    adapters = Adapters(model, rank=2, alpha=4.0)
    with torch.no_grad():
        dict(model.named_parameters())["layers.1.out.lora_B.default.weight"].fill_(float("nan"))
    with pytest.raises(InputError, match="toy0 with its adapters: NaNs detected"):
        adapters.merge()


def test_adapters_of_another_model(tmp_path: Path) -> None:
    Adapters(toy_encoder(), rank=2, alpha=4.0).save(tmp_path)
    with pytest.raises(InputError, match="holds no readable adapters"):
        load_adapters(toy_encoder(), tmp_path / "none")
    wide = toy_encoder(config=type(toy_encoder().config)(layers=1, width=24, heads=2, feedforward=32))
    with pytest.raises(InputError, match=r"adapters of another model than toy0: .* more do not fit"):
        load_adapters(wide, tmp_path)
    assert not any("lora_" in name for name, _ in wide.named_parameters())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no readable adapters"):
        load_adapters(toy_encoder(), tmp_path)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"adapters need peft: pip install 'protnest\[train\]'"):
        check_peft()
