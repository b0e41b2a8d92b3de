"""fair-esm's models and `.pt` files: parity, every spelling, what is refused, and that no file's code is run."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine import Encoder, InputError, from_fair_esm, load_model
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.config import EncoderConfig
from protnest.engine.fair_esm import read_fair_esm
from protnest.engine.packing import pack

from support.esm2_models import (
    ALPHABET,
    assert_same_encoder,
    fair_esm_content,
    fair_esm_outputs,
    hostile_encoder,
    hostile_esm2,
)

SIZES = (2, 32, 2)
PREFIX = "encoder.sentence_encoder."


@pytest.fixture
def model() -> Any:
    return hostile_esm2(*SIZES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "esm2_t2_tiny.pt"


def _load(path: Path) -> Encoder:
    return load_model(path, device="cpu", precision="fp32")


def _refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        _load(path)
    assert caught.value.file == str(path)
    return caught.value


# Files


def test_published_file(model: Any, path: Path) -> None:
    torch.save(fair_esm_content(model), path)
    encoder = _load(path)
    assert_same_encoder(encoder, from_fair_esm(model, ALPHABET))
    assert encoder.name == "esm2_t2_tiny"
    assert encoder.config == EncoderConfig(layers=2, width=32, heads=2, feedforward=128)
    batch = pack(["MKTAYIAKQR"])
    wanted = fair_esm_outputs(model, [batch.tokens_T])
    with torch.inference_mode():
        output = encoder(batch, layers=[0, 1, 2])
        for layer, hidden_TD in output.layers.items():
            torch.testing.assert_close(hidden_TD, wanted[f"layer {layer}"], rtol=0, atol=1e-4)
        torch.testing.assert_close(encoder.logits(output.hidden_TD), wanted["logits"], rtol=0, atol=1e-3)


def test_name_of_the_callers(model: Any, path: Path) -> None:
    torch.save(fair_esm_content(model), path)
    assert read_fair_esm(path, name="mine")[0].name == "mine"


def test_half_precision_file(model: Any, path: Path) -> None:
    torch.save(fair_esm_content(model.half()), path)
    for name, tensor in _load(path).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.half().float()), name


def test_file_with_contact_head(model: Any, path: Path) -> None:
    """The regression weights are published apart; a file may hold them joined in."""
    content = fair_esm_content(model)
    content["model"] |= {
        "contact_head.regression.weight": torch.zeros(1, 4),
        "contact_head.regression.bias": torch.ones(1),
    }
    torch.save(content, path)
    encoder, set_aside = read_fair_esm(path)
    assert_same_encoder(encoder, from_fair_esm(model, ALPHABET))
    assert set_aside == [
        "contact_head.regression.bias",
        "contact_head.regression.weight",
        "layers.0.self_attn.rot_emb.inv_freq",
        "layers.1.self_attn.rot_emb.inv_freq",
    ]


def test_file_without_head(model: Any, path: Path) -> None:
    content = fair_esm_content(model)
    content["model"] = {name: tensor for name, tensor in content["model"].items() if "lm_head" not in name}
    torch.save(content, path)
    encoder = _load(path)
    assert encoder.head is None
    assert encoder.fingerprint == from_fair_esm(model, ALPHABET).fingerprint


def test_file_of_a_model_without_token_dropout(model: Any, path: Path) -> None:
    torch.save(fair_esm_content(model, token_dropout=False), path)
    assert not _load(path).config.token_dropout


def test_fingerprint_is_that_of_the_folder(model: Any, path: Path) -> None:
    torch.save(fair_esm_content(model), path)
    encoder = _load(path)
    save_checkpoint(encoder, path.parent / "folder")
    assert_same_encoder(load_model(path.parent / "folder", device="cpu", precision="fp32"), encoder)


class _RunsCode:
    """What a malicious file holds: unpickling it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.made,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(model: Any, path: Path, zipped: bool) -> None:
    made = path.parent / "made"
    torch.save(fair_esm_content(model, extra=_RunsCode(made)), path, _use_new_zipfile_serialization=zipped)
    error = _refusal(path)
    assert not made.exists()
    assert error.problem.startswith("not a checkpoint that can be read safely (")
    # torch's own message says how to run the code after all. Nobody should be told so here.
    for advice in ("weights_only", "trust", "\x1b"):
        assert advice not in error.problem
    # The file would indeed have run it.
    torch.load(path, weights_only=False)
    assert made.is_dir()


def test_namespace_is_allowed_for_this_read_only(model: Any, path: Path) -> None:
    torch.save(fair_esm_content(model), path)
    _load(path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file(model: Any, path: Path, zipped: bool) -> None:
    torch.save(fair_esm_content(model), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    chance = random.Random(0)
    for size in (0, 1, 2, 3, 60, 2407, *(chance.randrange(len(whole)) for _ in range(40)), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert _refusal(path).problem.startswith("not a checkpoint that can be read safely ("), size


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"<html>404: not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
        b"\x80",
        b"\x80\x02",
        b"PK\x03\x04",
        b"\x1f\x8b\x08\x00",
    ],
)
def test_file_of_something_else(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    problem = _refusal(path).problem
    assert problem.startswith("not a checkpoint that can be read safely (")
    assert "weights_only" not in problem


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"a": 1}, id="a dictionary"),
        pytest.param([1, 2], id="a list"),
        pytest.param(torch.zeros(3), id="a tensor"),
        pytest.param(3, id="a number"),
        pytest.param({"cfg": None, "model": {}}, id="no settings"),
        pytest.param({"cfg": {"model": {"encoder_layers": 2}}, "model": {}}, id="settings in a dictionary"),
        pytest.param({"args": argparse.Namespace(arch="roberta_large"), "model": {}}, id="an ESM-1b file"),
    ],
)
def test_file_that_torch_reads_but_is_no_esm2(path: Path, content: object) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.save(content, path)
        assert _refusal(path).problem.startswith("not a fair-esm ESM-2 checkpoint")


@pytest.mark.parametrize("tensors", [None, [1], argparse.Namespace(a=1), {"layers.0.fc1.bias": 3}, {3: torch.zeros(1)}])
def test_file_whose_model_is_not_tensors_by_name(model: Any, path: Path, tensors: object) -> None:
    torch.save(fair_esm_content(model) | {"model": tensors}, path)
    _refusal(path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"encoder_layers": 0}, "layers must be a positive whole number, got 0"),
        ({"encoder_layers": "2"}, "layers must be a positive whole number, got '2'"),
        ({"encoder_embed_dim": "32"}, "width must be a positive whole number, got '32'"),
        ({"encoder_embed_dim": None}, "width must be a positive whole number, got None"),
        ({"encoder_attention_heads": 3}, "width 32 is not a multiple of 2 x 3 heads"),
        ({"encoder_layers": 3}, "missing encoder.layer.2.LayerNorm.bias"),
        ({"encoder_layers": 1}, "unexpected encoder.layer.1.LayerNorm.bias"),
        ({"encoder_embed_dim": 64}, "tensors do not fit the configuration: embeddings.word_embeddings.weight is"),
    ],
    ids=str,
)
def test_file_with_settings_that_do_not_fit(model: Any, path: Path, settings: dict[str, object], problem: str) -> None:
    torch.save(fair_esm_content(model, **settings), path)
    assert problem in _refusal(path).problem


@pytest.mark.parametrize("setting", ["encoder_layers", "encoder_embed_dim", "encoder_attention_heads", "token_dropout"])
def test_file_without_a_setting(model: Any, path: Path, setting: str) -> None:
    content = fair_esm_content(model)
    delattr(content["cfg"]["model"], setting)
    torch.save(content, path)
    problem = _refusal(path).problem
    assert problem.startswith("not a fair-esm ESM-2 checkpoint: it lacks ")
    assert setting in problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(
            lambda tensors: tensors.pop(f"{PREFIX}layers.1.fc2.weight"),
            "not the tensors of this ESM-2 encoder: missing encoder.layer.1.output.dense.weight",
            id="missing",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{PREFIX}layers.0.self_attn.bias_k": torch.zeros(1, 1, 32)}),
            "not the tensors of this ESM-2 encoder: unexpected layers.0.self_attn.bias_k",
            id="unexpected",
        ),
        pytest.param(
            lambda tensors: tensors.update({"encoder.lm_head.weight": tensors[f"{PREFIX}embed_tokens.weight"] + 1}),
            "lm_head.decoder.weight differs from the token embedding; ESM-2 ties the two",
            id="not tied",
        ),
        pytest.param(
            lambda tensors: tensors.update({"layers.0.fc1.bias": torch.zeros(128)}),
            "twice",
            id="with and without prefix",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{PREFIX}layers.0.fc1.bias": torch.full((128,), torch.nan)}),
            "weights are not finite in layers.0.fc1.bias",
            id="NaN",
        ),
    ],
)
def test_file_with_other_tensors(
    model: Any, path: Path, change: Callable[[dict[str, torch.Tensor]], object], problem: str
) -> None:
    content = fair_esm_content(model)
    change(content["model"])
    torch.save(content, path)
    assert problem in _refusal(path).problem


# Models in memory


def test_from_fair_esm(model: Any) -> None:
    encoder = from_fair_esm(model, ALPHABET, name="adopted")
    assert (encoder.name, encoder.dtype, encoder.training) == ("adopted", torch.float32, False)
    assert encoder.head is not None
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_from_fair_esm_in_fp64(model: Any) -> None:
    assert_same_encoder(from_fair_esm(model.double(), ALPHABET), hostile_encoder(*SIZES))


def test_from_fair_esm_with_another_alphabet(model: Any) -> None:
    other = type(ALPHABET).from_architecture("ESM-1")
    with pytest.raises(InputError, match=r"old model: its alphabet is .*'<null_0>'.*, ESM-2's is "):
        from_fair_esm(model, other, name="old model")


def test_from_fair_esm_of_another_model() -> None:
    with pytest.raises(InputError, match="my layer is no fair-esm ESM-2 model: 'Linear' object has no attribute"):
        from_fair_esm(torch.nn.Linear(2, 2), ALPHABET, name="my layer")
