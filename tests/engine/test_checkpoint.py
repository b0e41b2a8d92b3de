"""Checkpoints in Hugging Face layout: round trips, every spelling that is read, everything that is refused, and how.

Also models of transformers in memory, and fingerprints. A test per way in which a folder can be wrong makes this file
long.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine import Encoder, InputError, from_fair_esm, from_transformers, load_model
from protnest.engine.checkpoint import encoder_fingerprint, read_checkpoint, save_checkpoint
from protnest.engine.config import EncoderConfig, config_to_huggingface
from protnest.engine.packing import pack
from safetensors.torch import load_file, save_file

from support.esm2_models import ALPHABET, assert_same_encoder, hostile_encoder, hostile_esm2
from support.shared_data import REAL_8M, shared_path

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]

SIZES = (2, 32, 2)
EMBEDDING = "esm.embeddings.word_embeddings.weight"
QUERY = "esm.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def encoder() -> Encoder:
    return hostile_encoder(*SIZES)


@pytest.fixture
def folder(tmp_path: Path, encoder: Encoder) -> Path:
    save_checkpoint(encoder, tmp_path / "model")
    return tmp_path / "model"


def _without_head(encoder: Encoder) -> Encoder:
    headless = Encoder(encoder.config, head=False)
    headless.load_state_dict({name: x for name, x in encoder.state_dict().items() if not name.startswith("head.")})
    headless.fingerprint = encoder_fingerprint(headless)
    return headless.eval()


def _tensors(folder: Path) -> Tensors:
    tensors: Tensors = load_file(folder / "model.safetensors")
    return tensors


def _rewrite(folder: Path, change: Change) -> None:
    tensors = _tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _configure(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _load(folder: Path) -> Encoder:
    return load_model(folder, device="cpu", precision="fp32")


def _refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        _load(folder)
    return caught.value


# Round trips


def test_round_trip_in_fp32_keeps_every_bit(folder: Path, encoder: Encoder) -> None:
    loaded = _load(folder)
    assert_same_encoder(loaded, encoder)
    assert loaded.name == "model"
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip_in_half_rounds_once(folder: Path, encoder: Encoder, dtype: torch.dtype) -> None:
    save_checkpoint(encoder, folder, dtype=dtype)
    assert {tensor.dtype for tensor in _tensors(folder).values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    loaded = _load(folder)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name].to(dtype).float()), name
    save_checkpoint(loaded, folder / "again", dtype=dtype)
    assert_same_encoder(_load(folder / "again"), loaded)


def test_round_trip_without_head(tmp_path: Path, encoder: Encoder) -> None:
    headless = _without_head(encoder)
    save_checkpoint(headless, tmp_path)
    assert not any("lm_head" in name for name in _tensors(tmp_path))
    loaded = _load(tmp_path)
    assert loaded.head is None
    assert_same_encoder(loaded, headless)


def test_round_trip_of_every_setting(tmp_path: Path) -> None:
    config = EncoderConfig(
        layers=1, width=24, heads=3, feedforward=40, max_residues=60, token_dropout=False, layer_norm_eps=1e-6
    )
    save_checkpoint(Encoder(config), tmp_path)
    assert _load(tmp_path).config == config


def test_encoder_in_another_precision_is_saved(tmp_path: Path, encoder: Encoder) -> None:
    save_checkpoint(encoder.to(torch.bfloat16), tmp_path)
    for name, tensor in _load(tmp_path).state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name].float()), name


def test_writes_over_an_older_checkpoint(folder: Path) -> None:
    other = hostile_encoder(1, 16, 2, seed=3)
    save_checkpoint(other, folder)
    assert_same_encoder(_load(folder), other)


def test_transformers_reads_what_is_saved(folder: Path, encoder: Encoder) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.EsmForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    # What it makes up by itself: the rotary frequencies, and a contact head that nobody asked for.
    assert all(key.endswith("inv_freq") or "contact_head" in key for key in info["missing_keys"])
    tokens_L = pack(["MKTAYIAKQR"]).tokens_T.long()
    with torch.inference_mode():
        logits_LV = theirs.eval()(tokens_L[None]).logits[0]
        ours_LV = encoder.logits(encoder(pack(["MKTAYIAKQR"])).hidden_TD)
    torch.testing.assert_close(ours_LV, logits_LV, rtol=0, atol=1e-5 * float(logits_LV.abs().max()))


# Spellings


def _spell_layer_norms(tensors: Tensors) -> None:
    """TensorFlow's names, which transformers 5 writes for tensors under a name that ends in LayerNorm."""
    for name in list(tensors):
        if "LayerNorm" in name or "layer_norm" in name:
            spelt = re.sub(r"\.weight$", ".gamma", re.sub(r"\.bias$", ".beta", name))
            tensors[spelt] = tensors.pop(name)


def _drop_prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("esm.")] = tensors.pop(name)


def _tie(tensors: Tensors) -> None:
    tensors["lm_head.decoder.weight"] = tensors[EMBEDDING].clone()


SET_ASIDE = {
    "classifier.dense.weight": torch.zeros(3, 3),
    "classifier.out_proj.bias": torch.zeros(2),
    "contact_head.regression.bias": torch.zeros(1),
    "esm.contact_head.regression.weight": torch.zeros(1, 4),
    "esm.embeddings.position_embeddings.weight": torch.zeros(8, 32),
    "esm.embeddings.position_ids": torch.arange(8),
    "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq": torch.zeros(8),
    "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq": torch.zeros(8),
    "esm.pooler.dense.weight": torch.zeros(4, 4),
    "rotary_embeddings.inv_freq": torch.zeros(8),
}


def _add_set_aside(tensors: Tensors) -> None:
    tensors.update(SET_ASIDE)


@pytest.mark.parametrize("change", [_spell_layer_norms, _drop_prefix, _tie, _add_set_aside])
def test_spellings(folder: Path, encoder: Encoder, change: Change) -> None:
    _rewrite(folder, change)
    assert_same_encoder(_load(folder), encoder)


def test_what_is_set_aside_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _rewrite(folder, _add_set_aside)
    _, set_aside = read_checkpoint(folder)
    assert set_aside == sorted(SET_ASIDE)
    caplog.set_level(logging.INFO, logger="protnest.engine.models")
    _load(folder)
    assert caplog.messages == [f"model: set aside, no part of the model: {', '.join(sorted(SET_ASIDE))}"]


def test_nothing_set_aside_is_not_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_checkpoint(folder)[1] == []
    caplog.set_level(logging.INFO, logger="protnest.engine.models")
    _load(folder)
    assert caplog.messages == []


def test_real_checkpoint_sets_its_classifier_aside() -> None:
    encoder, set_aside = read_checkpoint(shared_path(REAL_8M))
    assert encoder.head is None
    assert encoder.config == EncoderConfig(layers=6, width=320, heads=20, feedforward=1280)
    assert set_aside
    assert all(name.startswith(("classifier.", "esm.contact_head.")) for name in set_aside)


def test_config_without_architectures(folder: Path, encoder: Encoder) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for key in ("architectures", "hidden_act", "torch_dtype", "is_folding_model", "emb_layer_norm_before"):
        del settings[key]
    path.write_text(json.dumps(settings))
    assert_same_encoder(_load(folder), encoder)


@pytest.mark.parametrize("architectures", [["EsmModel"], ["EsmForSequenceClassification"], [], None])
def test_config_of_another_class_of_transformers(folder: Path, encoder: Encoder, architectures: object) -> None:
    _configure(folder, architectures=architectures, _name_or_path="somewhere", transformers_version="4.29.2")
    assert_same_encoder(_load(folder), encoder)


# Shards


def _shard(folder: Path, **changes: object) -> None:
    """Cuts `model.safetensors` in two with an index, whose keys `changes` replaces."""
    tensors = _tensors(folder)
    shards: dict[str, Tensors] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    weight_map = {}
    for place, (name, tensor) in enumerate(sorted(tensors.items())):
        shard = sorted(shards)[place % 2]
        shards[shard][name] = tensor
        weight_map[name] = shard
    for shard, content in shards.items():
        save_file(content, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards(folder: Path, encoder: Encoder) -> None:
    _shard(folder)
    assert_same_encoder(_load(folder), encoder)


def test_whole_file_comes_before_shards(folder: Path, encoder: Encoder) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    _shard(folder)
    (folder / "model.safetensors").write_bytes(whole)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    assert_same_encoder(_load(folder), encoder)


def test_shard_missing(folder: Path) -> None:
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = _refusal(folder)
    assert error.file == str(folder / "model.safetensors.index.json")
    assert error.problem == "the shards it lists are not all there: missing ['model-00002-of-00002.safetensors']"


def test_shard_unreadable(folder: Path) -> None:
    _shard(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    error = _refusal(folder)
    assert error.file == str(shard)
    assert error.problem.startswith("not a readable safetensors file (")


def test_shards_lack_a_tensor(folder: Path) -> None:
    _shard(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = sorted(tensors)[3]
    del tensors[name]
    save_file(tensors, shard)
    error = _refusal(folder)
    assert error.file == str(folder)
    assert f"missing {name.removeprefix('esm.')}" in error.problem


@pytest.mark.parametrize(
    "weight_map",
    [
        pytest.param({}, id="empty"),
        pytest.param(["model-00001-of-00002.safetensors"], id="a list"),
        pytest.param(None, id="null"),
        pytest.param({"lm_head.bias": 1}, id="a number for a file"),
    ],
)
def test_index_that_lists_no_shards(folder: Path, weight_map: object) -> None:
    _shard(folder, weight_map=weight_map)
    assert _refusal(folder).file == str(folder / "model.safetensors.index.json")


def test_index_that_is_no_json(folder: Path) -> None:
    _shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    error = _refusal(folder)
    assert error.file == str(folder / "model.safetensors.index.json")
    assert error.problem.startswith("not readable as JSON (")


# Tensors that are not the encoder's


def _replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors[name]).clone()})


def _set(name: str, value: float) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[5] = value

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(
            lambda tensors: tensors.pop(QUERY),
            "not the tensors of this ESM-2 encoder: missing encoder.layer.0.attention.self.query.weight",
            id="missing",
        ),
        pytest.param(
            lambda tensors: tensors.pop(EMBEDDING),
            "not the tensors of this ESM-2 encoder: missing embeddings.word_embeddings.weight",
            id="embedding missing",
        ),
        pytest.param(
            lambda tensors: tensors.pop("lm_head.layer_norm.bias"),
            "not the tensors of this ESM-2 encoder: missing lm_head.layer_norm.bias",
            id="head not whole",
        ),
        pytest.param(
            lambda tensors: tensors.update({"esm.encoder.layer.2.LayerNorm.weight": torch.ones(32)}),
            "not the tensors of this ESM-2 encoder: unexpected encoder.layer.2.LayerNorm.weight",
            id="a layer too many",
        ),
        pytest.param(
            lambda tensors: tensors.update({"esm.embeddings.layer_norm.weight": torch.ones(32)}),
            "not the tensors of this ESM-2 encoder: unexpected embeddings.layer_norm.weight",
            id="norm before",
        ),
        pytest.param(
            _replace(QUERY, lambda tensor: tensor[:, :31]),
            "tensors do not fit the configuration: encoder.layer.0.attention.self.query.weight is torch.float32 "
            "(32, 31), expected floating point (32, 32)",
            id="shape",
        ),
        pytest.param(
            _replace("lm_head.bias", lambda tensor: tensor[:31]),
            "tensors do not fit the configuration: lm_head.bias is torch.float32 (31,), expected floating point (33,)",
            id="vocabulary",
        ),
        pytest.param(
            _replace("esm.encoder.layer.1.output.dense.bias", lambda tensor: tensor[None]),
            "tensors do not fit the configuration: encoder.layer.1.output.dense.bias is torch.float32 (1, 32), "
            "expected floating point (32,)",
            id="an axis too many",
        ),
        pytest.param(
            _replace(QUERY, lambda tensor: tensor.to(torch.int8)),
            "tensors do not fit the configuration: encoder.layer.0.attention.self.query.weight is torch.int8 (32, 32), "
            "expected floating point (32, 32)",
            id="integers",
        ),
        pytest.param(_set(QUERY, torch.nan), "weights are not finite in layers.0.qkv.weight", id="NaN"),
        pytest.param(_set("lm_head.bias", torch.inf), "weights are not finite in head.bias", id="infinite"),
        pytest.param(
            _replace(EMBEDDING, lambda tensor: tensor.double() * 1e300),
            "weights are not finite in embed_tokens.weight",
            id="beyond fp32",
        ),
        pytest.param(
            lambda tensors: tensors.update({QUERY.removeprefix("esm."): tensors[QUERY].clone()}),
            "is there twice, under two spellings",
            id="two spellings of a prefix",
        ),
        pytest.param(
            lambda tensors: tensors.update({"lm_head.layer_norm.gamma": torch.ones(32)}),
            "is there twice, under two spellings",
            id="two spellings of a norm",
        ),
        pytest.param(
            lambda tensors: tensors.update({"lm_head.decoder.weight": tensors[EMBEDDING] + 1e-3}),
            "lm_head.decoder.weight differs from the token embedding; ESM-2 ties the two",
            id="decoder not tied",
        ),
        pytest.param(
            lambda tensors: tensors.update({"lm_head.decoder.weight": tensors[EMBEDDING][:3].clone()}),
            "lm_head.decoder.weight differs from the token embedding; ESM-2 ties the two",
            id="decoder of another shape",
        ),
    ],
)
def test_tensors_refused(folder: Path, change: Change, problem: str) -> None:
    _rewrite(folder, change)
    error = _refusal(folder)
    assert error.file == str(folder / "model.safetensors")
    assert error.problem.endswith(problem) if problem.startswith("is there") else error.problem == problem


def test_finds_every_problem_and_shortens_the_list(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if "layer.1." in name:
                del tensors[name]
        tensors["extra"] = torch.zeros(1)

    _rewrite(folder, change)
    problem = _refusal(folder).problem
    assert problem.count("missing encoder.layer.1.") == 8
    assert problem.endswith(" and 9 more")


def test_decoder_alone_is_no_head(folder: Path, encoder: Encoder) -> None:
    def change(tensors: Tensors) -> None:
        _tie(tensors)
        for name in ("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias"):
            del tensors[f"lm_head.{name}"]

    _rewrite(folder, change)
    assert_same_encoder(_load(folder), _without_head(encoder))


@pytest.mark.parametrize("content", [b"", b"{}", b"not safetensors at all", b"\x00" * 64])
def test_weights_unreadable(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    error = _refusal(folder)
    assert error.file == str(folder / "model.safetensors")
    assert error.problem.startswith("not a readable safetensors file (")


def test_weights_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = _refusal(folder)
    assert error.file == str(folder)
    assert error.problem == "holds neither model.safetensors nor model.safetensors.index.json"


# Configurations that are not ESM-2's


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; an ESM-2 encoder has 'esm'"),
        ({"model_type": None}, "model_type is None; an ESM-2 encoder has 'esm'"),
        ({"vocab_size": 34}, "vocab_size is 34; an ESM-2 encoder has 33"),
        (
            {"position_embedding_type": "absolute"},
            "position_embedding_type is 'absolute'; an ESM-2 encoder has 'rotary'",
        ),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; an ESM-2 encoder has 'gelu'"),
        ({"emb_layer_norm_before": True}, "emb_layer_norm_before is True; an ESM-2 encoder has False"),
        ({"is_folding_model": True}, "is_folding_model is True; an ESM-2 encoder has False"),
        ({"add_cross_attention": True}, "add_cross_attention is True; an ESM-2 encoder has False"),
        ({"is_decoder": True}, "is_decoder is True; an ESM-2 encoder has False"),
        ({"rope_theta": 500000.0}, "rope_theta is 500000.0; an ESM-2 encoder has 10000.0"),
        ({"mask_token_id": 31}, "mask_token_id is 31; an ESM-2 encoder has 32"),
        ({"hidden_size": None}, "missing in the configuration: hidden_size"),
        ({"num_hidden_layers": "2"}, "layers must be a positive whole number, got '2'"),
        ({"num_hidden_layers": 0}, "layers must be a positive whole number, got 0"),
        ({"hidden_size": 32.0}, "width must be a positive whole number, got 32.0"),
        ({"intermediate_size": -64}, "feedforward must be a positive whole number, got -64"),
        ({"num_attention_heads": 3}, "width 32 is not a multiple of 2 x 3 heads"),
        ({"max_position_embeddings": 4}, "max_residues must be a positive whole number, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refused(folder: Path, settings: dict[str, object], problem: str) -> None:
    _configure(folder, **settings)
    error = _refusal(folder)
    assert error.file == str(folder / "config.json")
    assert error.problem == problem


@pytest.mark.parametrize("value", ["1026", [1026], {}])
def test_config_with_positions_that_are_no_number(folder: Path, value: object) -> None:
    _configure(folder, max_position_embeddings=value)
    assert _refusal(folder).file == str(folder / "config.json")


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_norm_eps": "1e-5"},
        {"layer_norm_eps": -1e-5},
        {"layer_norm_eps": 0},
        {"token_dropout": "false"},
        {"token_dropout": 1},
    ],
    ids=str,
)
def test_config_with_values_of_another_kind(folder: Path, settings: dict[str, object]) -> None:
    _configure(folder, **settings)
    error = _refusal(folder)
    assert error.file == str(folder / "config.json")


def test_config_misspelt_key_gets_a_hint(folder: Path) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["hidden_sizes"] = settings.pop("hidden_size")
    settings["num_heads"] = settings.pop("num_attention_heads")
    path.write_text(json.dumps(settings))
    error = _refusal(folder)
    assert error.file == str(path)
    assert "missing in the configuration: hidden_size (did 'hidden_sizes' mean this?)" in error.problem
    assert "num_attention_heads" in error.problem


def test_config_missing_key_gets_no_hint_at_a_key_that_is_right(folder: Path) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["hidden_size"]
    path.write_text(json.dumps(settings))
    assert _refusal(folder).problem == "missing in the configuration: hidden_size"


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "token_dropout",
        "max_position_embeddings",
        "model_type",
        "vocab_size",
        "position_embedding_type",
        # transformers takes 1e-12 where it is not said, which no ESM-2 was trained with.
        "layer_norm_eps",
    ],
)
def test_config_missing_key(folder: Path, key: str) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    del settings[key]
    path.write_text(json.dumps(settings))
    error = _refusal(folder)
    assert error.file == str(path)
    assert key in error.problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not readable as JSON ("),
        (b"{'hidden_size': 32}", "not readable as JSON ("),
        (b"\xff\xfe{}", "not readable as JSON ("),
        (b"[]", "holds no JSON object"),
        (b"33", "holds no JSON object"),
    ],
)
def test_config_that_is_no_json_object(folder: Path, content: bytes, problem: str) -> None:
    (folder / "config.json").write_bytes(content)
    error = _refusal(folder)
    assert error.file == str(folder / "config.json")
    assert error.problem.startswith(problem)


def test_config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    error = _refusal(folder)
    assert error.file == str(folder / "config.json")
    assert error.problem == "no such file; a checkpoint folder holds it beside model.safetensors"


def test_config_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert _refusal(folder).problem.startswith("not readable as JSON (")


# transformers models in memory


def _transformers_model(kind: str, **settings: object) -> Any:
    transformers = pytest.importorskip("transformers")
    config = EncoderConfig(layers=2, width=32, heads=2, feedforward=64)
    stated = config_to_huggingface(config, dtype="float32") | settings
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.EsmConfig(**stated))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "has_head"),
    [
        ("EsmModel", False),
        ("EsmForMaskedLM", True),
        ("EsmForSequenceClassification", False),
        ("EsmForTokenClassification", False),
    ],
)
def test_from_transformers(kind: str, has_head: bool) -> None:
    theirs = _transformers_model(kind)
    ours = from_transformers(theirs, name="adopted")
    assert (ours.head is not None, ours.name, ours.dtype, ours.training) == (has_head, "adopted", torch.float32, False)
    batch = pack(["MKTAYIAKQR"])
    tokens_L = batch.tokens_T.long()
    with torch.inference_mode():
        output = theirs(tokens_L[None], output_hidden_states=True)
        hidden_TD = ours(batch).hidden_TD
        torch.testing.assert_close(hidden_TD, output.hidden_states[-1][0], rtol=0, atol=1e-5)
        if has_head:
            torch.testing.assert_close(ours.logits(hidden_TD), output.logits[0], rtol=0, atol=1e-4)


def test_from_transformers_in_half() -> None:
    theirs = _transformers_model("EsmForMaskedLM")
    exact = from_transformers(theirs).state_dict()
    ours = from_transformers(theirs.half())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, exact[name].half().float()), name


def test_from_transformers_copies() -> None:
    theirs = _transformers_model("EsmForMaskedLM")
    ours = from_transformers(theirs)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", ["EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification"])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_transformers_saves(kind: str, sharded: bool, tmp_path: Path) -> None:
    theirs = _transformers_model(kind)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    assert_same_encoder(_load(tmp_path), from_transformers(theirs))


def test_from_transformers_of_another_architecture() -> None:
    theirs = _transformers_model("EsmModel", position_embedding_type="absolute")
    with pytest.raises(InputError, match="position_embedding_type is 'absolute'; an ESM-2 encoder has 'rotary'"):
        from_transformers(theirs)


def test_from_transformers_of_no_transformers_model() -> None:
    with pytest.raises(InputError, match="my layer is no transformers model: it has no config"):
        from_transformers(torch.nn.Linear(2, 2), name="my layer")


# Fingerprints


def test_fingerprint_does_not_depend_on_path_head_or_format(tmp_path: Path, encoder: Encoder) -> None:
    save_checkpoint(encoder, tmp_path / "one")
    save_checkpoint(_without_head(encoder), tmp_path / "two")
    adopted = from_transformers(_adoptable(encoder, tmp_path / "one"), name="adopted")
    prints = {
        _load(tmp_path / "one").fingerprint,
        _load(tmp_path / "two").fingerprint,
        adopted.fingerprint,
        encoder.fingerprint,
        from_fair_esm(hostile_esm2(*SIZES), ALPHABET, name="by another name").fingerprint,
    }
    assert len(prints) == 1
    assert re.fullmatch("[0-9a-f]{32}", prints.pop() or "")


def _adoptable(encoder: Encoder, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.EsmModel.from_pretrained(folder, add_pooling_layer=False)


def test_fingerprint_does_not_depend_on_precision(folder: Path) -> None:
    prints = {load_model(folder, device="cpu", precision=precision).fingerprint for precision in ("fp32", "bf16")}
    assert len(prints) == 1


def test_fingerprint_is_that_of_every_release() -> None:
    """Stores and chains on users' disks hold fingerprints: another number here would orphan them."""
    fixed = Encoder(EncoderConfig(layers=1, width=8, heads=2, feedforward=16))
    with torch.no_grad():
        for place, parameter in enumerate(fixed.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 64 + place)
    assert encoder_fingerprint(fixed) == "da83958b331c98e0437b0eaf852c7fea"


@pytest.mark.parametrize(
    ("name", "matters"),
    [("embed_tokens.weight", True), ("layers.1.fc2.bias", True), ("final_norm.weight", True), ("head.bias", False)],
)
def test_fingerprint_sees_one_weight_of_the_encoder(encoder: Encoder, name: str, matters: bool) -> None:
    with torch.no_grad():
        weight = dict(encoder.named_parameters())[name].view(-1)
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(torch.inf))
    assert (encoder_fingerprint(encoder) != encoder.fingerprint) == matters


@pytest.mark.parametrize(
    "change", [{"token_dropout": False}, {"layer_norm_eps": 1e-6}, {"max_residues": 60}, {"heads": 4}]
)
def test_fingerprint_sees_the_architecture(encoder: Encoder, change: dict[str, Any]) -> None:
    encoder.config = dataclasses.replace(encoder.config, **change)
    assert encoder_fingerprint(encoder) != encoder.fingerprint
