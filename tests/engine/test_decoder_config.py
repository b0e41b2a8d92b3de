"""Decoders' sizes and switches: what a config.json has to say, and what it must not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from protnest.engine.decoder_config import (
    DECODER_SHAPES,
    DecoderConfig,
    decoder_config_from_huggingface,
    decoder_config_to_huggingface,
)
from protnest.engine.errors import InputError
from transformers import GPT2Config

SIZES: dict[str, Any] = {"layers": 2, "width": 48, "heads": 3, "feedforward": 100, "vocabulary": 70, "places": 30}
CONFIG = DecoderConfig(**SIZES, layer_norm_eps=1e-6)
STATED = decoder_config_to_huggingface(CONFIG, bos=3, eos=4, dtype="float16")


def test_round_trip() -> None:
    assert decoder_config_from_huggingface(STATED) == CONFIG
    assert CONFIG.head_width == 16
    assert STATED["torch_dtype"] == "float16"
    assert (STATED["bos_token_id"], STATED["eos_token_id"]) == (3, 4)


def test_transformers_understands_it_alike() -> None:
    theirs = GPT2Config(**STATED)
    assert (theirs.n_layer, theirs.n_embd, theirs.n_head, theirs.n_inner) == (2, 48, 3, 100)
    assert (theirs.vocab_size, theirs.n_positions, theirs.layer_norm_epsilon) == (70, 30, 1e-6)
    assert (theirs.attn_pdrop, theirs.embd_pdrop, theirs.resid_pdrop) == (0.0, 0.0, 0.0)
    assert decoder_config_from_huggingface(theirs.to_dict()) == CONFIG


def test_defaults_are_gpt2s() -> None:
    """ProtGPT2's own config.json leaves the inner width empty."""
    short = {key: STATED[key] for key in ("model_type", "n_layer", "n_head", "n_embd", "vocab_size", "n_positions")}
    wanted = dataclasses.replace(CONFIG, feedforward=4 * 48, layer_norm_eps=1e-5)
    assert decoder_config_from_huggingface(short) == wanted
    assert decoder_config_from_huggingface(short | {"n_inner": None}) == wanted
    assert GPT2Config(**short).layer_norm_epsilon == 1e-5


def _parameters(config: DecoderConfig) -> int:
    D, F = config.width, config.feedforward
    layer = 4 * D + (3 * D * D + 3 * D) + (D * D + D) + (D * F + F) + (F * D + D)
    return (config.vocabulary + config.places) * D + config.layers * layer + 2 * D


@pytest.mark.parametrize(
    ("name", "millions"), [("protgpt2", 774), ("medium", 204), ("small", 82), ("tiny", 39), ("micro", 16)]
)
def test_published_shapes_have_their_published_sizes(name: str, millions: int) -> None:
    assert round(_parameters(DECODER_SHAPES[name]) / 1e6) == millions


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("model_type", "esm", "'gpt2'"),
        ("model_type", None, "'gpt2'"),
        ("activation_function", "gelu", "'gelu_new'"),
        ("scale_attn_weights", False, "True"),
        ("scale_attn_by_inverse_layer_idx", True, "False"),
        ("reorder_and_upcast_attn", True, "False"),
        ("tie_word_embeddings", False, "True"),
        ("add_cross_attention", True, "False"),
    ],
)
def test_another_architecture(key: str, value: object, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        decoder_config_from_huggingface(STATED | {key: value}, file="here/config.json")
    assert caught.value.file == "here/config.json"
    assert caught.value.problem == f"{key} is {value!r}; a GPT-2 decoder has {allowed}"


def test_missing_keys() -> None:
    stated = {key: value for key, value in STATED.items() if key not in ("n_head", "n_positions")} | {"n_layer": None}
    with pytest.raises(InputError) as caught:
        decoder_config_from_huggingface(stated, file="config.json")
    assert caught.value.problem == "missing in the configuration: n_layer, n_head, n_positions"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n_layer": 0}, "layers must be a positive whole number, got 0"),
        ({"n_embd": -48}, "width must be a positive whole number, got -48"),
        ({"n_head": 2.0}, "heads must be a positive whole number, got 2.0"),
        ({"n_inner": "100"}, "feedforward must be a positive whole number, got '100'"),
        ({"vocab_size": 0}, "vocabulary must be a positive whole number, got 0"),
        ({"n_positions": []}, r"places must be a positive whole number, got \[\]"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_eps must be a positive number, got 0.0"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_eps must be a positive number, got inf"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_eps must be a positive number, got nan"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_eps must be a positive number, got '1e-5'"),
        ({"n_head": 5}, "width 48 is not a multiple of 5 heads"),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        decoder_config_from_huggingface(STATED | changes, file="config.json")


@pytest.mark.parametrize("width", ["48", [48], {}], ids=str)
def test_width_that_is_no_number(width: object) -> None:
    """The inner width, where it is left out, is made of it."""
    stated = STATED | {"n_embd": width, "n_inner": None}
    with pytest.raises(InputError):
        decoder_config_from_huggingface(stated, file="config.json")


def test_built_in_code() -> None:
    with pytest.raises(ValueError, match="heads must be a positive whole number"):
        DecoderConfig(**SIZES | {"heads": 0})
    assert DecoderConfig(**{key: size for key, size in SIZES.items() if key != "places"}).places == 1024
