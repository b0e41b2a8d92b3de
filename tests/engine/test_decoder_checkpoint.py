"""Decoders' checkpoints: round trips through transformers, strict both ways, and which kind of model a folder holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.decoder import Decoder, pack_ids
from protnest.engine.decoder_checkpoint import decoder_names, read_decoder, save_decoder
from protnest.engine.decoder_config import DecoderConfig
from protnest.engine.encoder import Encoder
from protnest.engine.errors import InputError
from protnest.engine.models import load_decoder, load_encoder, load_model
from protnest.engine.quantise_decoder import quantised_decoder
from protnest.engine.vocabulary import BytePairVocabulary, ResidueVocabulary
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, GPT2Model

from support.esm2_models import hostile_encoder
from support.gpt2_models import byte_pairs, example_proteins, gpt2_logits, hostile_gpt2, load_pair, save_residue_gpt2

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]

PROTEINS = [protein[:length] for protein, length in zip(example_proteins(), (5, 61, 120), strict=False)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A decoder over byte pairs, as this package saves it."""
    _, decoder = load_pair(tmp_path / "theirs")
    save_decoder(decoder, tmp_path / "model")
    return tmp_path / "model"


def _tensors(folder: Path) -> Tensors:
    tensors: Tensors = load_file(folder / "model.safetensors")
    return tensors


def _rewrite(folder: Path, change: Change) -> None:
    tensors = _tensors(folder)
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _configure(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_decoder(folder)
    return caught.value


def _assert_same(got: Decoder, wanted: Decoder) -> None:
    assert got.config == wanted.config
    state, expected = got.state_dict(), wanted.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert got.fingerprint is not None
    assert got.fingerprint == wanted.fingerprint
    assert got.vocabulary.tokens == wanted.vocabulary.tokens


# Round trips


@pytest.mark.parametrize("residues", [False, True], ids=["pairs", "residues"])
def test_through_transformers_and_back(tmp_path: Path, residues: bool) -> None:
    theirs, ours = load_pair(tmp_path / "theirs", residues=residues, n_inner=100)
    save_decoder(ours, tmp_path / "ours")
    again, info = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    ids = [ours.vocabulary.encode(protein)[:90] for protein in PROTEINS]
    wanted_TV = gpt2_logits(theirs, ids)
    # Their attention is not the eager one any more.
    scale = float(wanted_TV.abs().max())
    torch.testing.assert_close(gpt2_logits(again.eval(), ids), wanted_TV, rtol=0, atol=3e-6 * scale)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    found, set_aside = read_decoder(tmp_path / "ours")
    _assert_same(found, ours)
    assert (found.name, set_aside, found.training) == ("ours", [], False)
    assert isinstance(found.vocabulary, ResidueVocabulary if residues else BytePairVocabulary)
    torch.testing.assert_close(found.logits(found(pack_ids(ids))), wanted_TV, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip_in_half_rounds_once(folder: Path, dtype: torch.dtype) -> None:
    decoder, _ = read_decoder(folder)
    save_decoder(decoder, folder, dtype=dtype)
    assert {tensor.dtype for tensor in _tensors(folder).values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    rounded, _ = read_decoder(folder)
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[name].to(dtype).float()), name
    assert rounded.fingerprint != decoder.fingerprint
    save_decoder(rounded.to(dtype), folder / "again", dtype=dtype)
    _assert_same(read_decoder(folder / "again")[0], read_decoder(folder)[0])


def test_what_config_states(folder: Path) -> None:
    stated = json.loads((folder / "config.json").read_text())
    end = byte_pairs().token_to_id("<|endoftext|>")
    assert (stated["bos_token_id"], stated["eos_token_id"], stated["vocab_size"]) == (end, end, 400)


def test_int8_is_not_saved(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs in int8 and is not saved"):
        save_decoder(quantised_decoder(read_decoder(folder)[0]), tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_fingerprints_tell_models_apart(folder: Path) -> None:
    before = read_decoder(folder)[0].fingerprint
    for name in ("transformer.h.1.mlp.c_fc.bias", "transformer.wpe.weight"):
        _rewrite(folder, _nudge(name))
        after = read_decoder(folder)[0].fingerprint
        assert after != before
        before = after
    _configure(folder, layer_norm_epsilon=1e-6)
    assert read_decoder(folder)[0].fingerprint != before


def _nudge(name: str) -> Change:
    return lambda tensors: tensors[name].view(-1)[0].add_(1)


# Spellings


def _without_prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def _tied(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


def _masks(tensors: Tensors) -> None:
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 96, 96).tril().bool()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


@pytest.mark.parametrize("change", [_without_prefix, _tied, _masks])
def test_spellings(folder: Path, change: Change) -> None:
    wanted, _ = read_decoder(folder)
    _rewrite(folder, change)
    _assert_same(read_decoder(folder)[0], wanted)


def test_masks_are_set_aside_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    masks = ["h.0.attn.bias", "h.0.attn.masked_bias", "h.1.attn.bias", "h.1.attn.masked_bias"]
    _rewrite(folder, _masks)
    assert read_decoder(folder)[1] == masks
    caplog.set_level(logging.INFO, logger="protnest.engine.models")
    load_model(folder, device="cpu", precision="fp32")
    assert caplog.messages == [f"model: set aside, no part of the model: {', '.join(masks)}"]


def test_a_base_model_of_transformers(tmp_path: Path) -> None:
    """`GPT2Model` saves without the prefix and without a head."""
    theirs = save_residue_gpt2(tmp_path)
    wanted, _ = read_decoder(tmp_path)
    base: Any = theirs.transformer
    assert isinstance(base, GPT2Model)
    base.save_pretrained(tmp_path)
    _assert_same(read_decoder(tmp_path)[0], wanted)


def test_shards(tmp_path: Path) -> None:
    """As transformers cuts them, and as a tensor is missing of them."""
    theirs = save_residue_gpt2(tmp_path / "whole")
    wanted, _ = read_decoder(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "cut", max_shard_size="40KB")
    (tmp_path / "cut" / "vocab.txt").write_bytes((tmp_path / "whole" / "vocab.txt").read_bytes())
    shards = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(shards) > 2
    _assert_same(read_decoder(tmp_path / "cut")[0], wanted)
    shards[1].unlink()
    error = _refusal(tmp_path / "cut")
    assert error.problem == f"the shards it lists are not all there: missing ['{shards[1].name}']"


# Tensors that are not the decoder's


def _drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def _put(name: str, make: Callable[[Tensors], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors)})


def _set_first(name: str, value: float) -> Change:
    return lambda tensors: tensors[name].view(-1)[0].fill_(value)


H1 = "transformer.h.1"
WRONG: dict[str, tuple[Change, str]] = {
    "a layer's bias missing": (_drop(f"{H1}.attn.c_attn.bias"), "missing h.1.attn.c_attn.bias"),
    "embedding missing": (_drop("transformer.wte.weight"), "missing wte.weight"),
    "positions missing": (_drop("transformer.wpe.weight"), "missing wpe.weight"),
    "final norm missing": (_drop("transformer.ln_f.weight"), "missing ln_f.weight"),
    "a third layer": (_put("transformer.h.2.ln_1.bias", lambda _: torch.ones(48)), "unexpected h.2.ln_1.bias"),
    "another head": (_put("score.weight", lambda _: torch.ones(2, 48)), "unexpected score.weight"),
    "a bias of the head": (_put("lm_head.bias", lambda _: torch.ones(400)), "unexpected lm_head.bias"),
    "masks of another kind": (_put(f"{H1}.crossattention.bias", lambda _: torch.ones(1)), "unexpected h.1.cross"),
    "a weight of nn.Linear": (
        _put(f"{H1}.mlp.c_fc.weight", lambda tensors: tensors[f"{H1}.mlp.c_fc.weight"].T),
        r"h\.1\.mlp\.c_fc\.weight is torch\.float32 \(192, 48\), expected floating point \(48, 192\)",
    ),
    "fewer tokens": (
        _put("transformer.wte.weight", lambda tensors: tensors["transformer.wte.weight"][:-1]),
        r"wte\.weight is torch\.float32 \(399, 48\), expected floating point \(400, 48\)",
    ),
    "fewer places": (
        _put("transformer.wpe.weight", lambda tensors: tensors["transformer.wpe.weight"][:-1]),
        r"wpe\.weight is torch\.float32 \(95, 48\), expected floating point \(96, 48\)",
    ),
    "whole numbers": (
        _put(f"{H1}.ln_2.weight", lambda _: torch.ones(48, dtype=torch.int64)),
        r"h\.1\.ln_2\.weight is torch\.int64 \(48,\), expected floating point \(48,\)",
    ),
    "NaN": (_set_first(f"{H1}.attn.c_proj.weight", torch.nan), "weights are not finite in layers.1.out.weight"),
    "infinity": (_set_first("transformer.wpe.weight", torch.inf), "weights are not finite in embed_places.weight"),
    "an untied head": (
        _put("lm_head.weight", lambda tensors: tensors["transformer.wte.weight"] + 1e-3),
        "lm_head.weight differs from the token embedding; ProtGPT2 and its students tie the two",
    ),
    "a head of another shape": (_put("lm_head.weight", lambda _: torch.ones(3, 48)), "lm_head.weight differs"),
    "a tensor twice": (
        _put("wpe.weight", lambda tensors: tensors["transformer.wpe.weight"] + 1),
        "tensor 'transformer.wpe.weight' is there twice, under two spellings|tensor 'wpe.weight' is there twice",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors(folder: Path, kind: str) -> None:
    change, problem = WRONG[kind]
    _rewrite(folder, change)
    with pytest.raises(InputError, match=problem) as caught:
        read_decoder(folder)
    assert caught.value.file == str(folder / "model.safetensors")


def test_all_problems_are_named(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["transformer.ln_f.bias"]
        tensors["other"] = torch.ones(1)

    _rewrite(folder, change)
    assert _refusal(folder).problem == "not the tensors of this GPT-2 decoder: missing ln_f.bias; unexpected other"


def _config(vocabulary: int) -> DecoderConfig:
    return DecoderConfig(layers=3, width=48, heads=3, feedforward=192, vocabulary=vocabulary, places=96)


def test_names_are_transformers() -> None:
    """Every tensor of theirs is one parameter of ours, whatever the depth."""
    theirs = {name.removeprefix("transformer.") for name in hostile_gpt2(30, layers=3).state_dict()}
    config = _config(30)
    assert set(decoder_names(config).values()) == theirs - {"lm_head.weight"}
    with torch.device("meta"):
        assert decoder_names(config).keys() == Decoder(config, ResidueVocabulary()).state_dict().keys()


def test_wrong_architecture(folder: Path) -> None:
    _configure(folder, scale_attn_by_inverse_layer_idx=True)
    error = _refusal(folder)
    assert error.file == str(folder / "config.json")
    assert error.problem == "scale_attn_by_inverse_layer_idx is True; a GPT-2 decoder has False"


def test_wrong_tokenizer(folder: Path) -> None:
    byte_pairs(380).save(str(folder / "tokenizer.json"))
    assert _refusal(folder).problem.startswith("the tokenizer has 380 tokens, the model 400")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error = _refusal(folder)
    assert error.file == str(folder / name if name == "config.json" else folder)


# Which kind of model it is


def test_a_decoder_is_recognised(folder: Path) -> None:
    for load in (load_model, load_decoder):
        found = load(folder, device="cpu", precision="fp32")
        assert isinstance(found, Decoder)
        _assert_same(found, read_decoder(folder)[0])
        assert (found.name, found.training) == ("model", False)
        assert not any(parameter.requires_grad for parameter in found.parameters())
    assert load_model(folder, device="cpu", precision="bf16").dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"model is a decoder, which .*; this takes an encoder$"):
        load_encoder(folder, device="cpu", precision="fp32")


def test_an_encoder_is_recognised(tmp_path: Path) -> None:
    save_checkpoint(hostile_encoder(1, 16, 2), tmp_path / "esm")
    for load in (load_model, load_encoder):
        assert isinstance(load(tmp_path / "esm", device="cpu", precision="fp32"), Encoder)
    with pytest.raises(InputError, match=r"esm is an encoder, which cannot generate; .* such as nano-gpt$"):
        load_decoder(tmp_path / "esm", device="cpu", precision="fp32")


def test_a_random_decoder_is_ready_to_be_trained() -> None:
    """One that nobody read: small tokens and places, and logits close to a uniform guess."""
    torch.manual_seed(0)
    decoder = Decoder(_config(33), ResidueVocabulary())
    assert decoder.fingerprint is None
    assert 0.015 < float(decoder.embed_tokens.weight.detach().std()) < 0.025
    ids = decoder.vocabulary.encode(PROTEINS[0])
    nll = -decoder.log_likelihoods(pack_ids([ids]))[0].mean()
    assert abs(nll - np.log(33)) < 0.5
