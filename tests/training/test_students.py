"""Students: presets, vocabularies, fresh weights, copied layers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine import InputError
from protnest.engine.config import EncoderConfig
from protnest.engine.decoder import Decoder
from protnest.engine.decoder_config import DecoderConfig
from protnest.engine.encoder import Encoder
from protnest.engine.models import load_model
from protnest.engine.vocabulary import ResidueVocabulary
from protnest.training.students import (
    DECODER_PRESETS,
    ENCODER_PRESETS,
    build_student,
    copied_layers,
    copy_layers,
    initialise,
    save_student,
)

from support.gpt2_models import save_gpt2
from support.learning import TOY, TOY_DECODER, save_toy, toy_decoder, toy_encoder


def _bytes_in_fp16(preset: str) -> int:
    with torch.device("meta"):
        model = (
            Encoder(ENCODER_PRESETS[preset])
            if preset in ENCODER_PRESETS
            else Decoder(DECODER_PRESETS[preset], ResidueVocabulary())
        )
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def test_the_nanos_are_as_small_as_promised() -> None:
    encoders = ("nano-xs", "nano-s", "nano-m")
    assert sum(map(_bytes_in_fp16, encoders)) <= 20e6
    widths = [ENCODER_PRESETS[name].width for name in encoders]
    assert widths == sorted(set(widths))
    assert _bytes_in_fp16("nano-gpt") <= 5e6


def test_the_published_students_are_the_published_ones() -> None:
    sizes = {name: _bytes_in_fp16(name) // 2 for name in ("micro", "tiny", "small", "medium")}
    assert sizes["tiny"] == 38_866_432
    assert sizes["small"] == 81_912_576
    assert sizes["medium"] == 203_668_480
    assert 16.2e6 < sizes["micro"] < 16.4e6


def test_presets_and_folders(tmp_path: Path) -> None:
    encoder = build_student("nano-xs")
    assert isinstance(encoder, Encoder)
    assert encoder.config == ENCODER_PRESETS["nano-xs"]
    gpt = build_student("nano-gpt")
    assert isinstance(gpt, Decoder)
    assert isinstance(gpt.vocabulary, ResidueVocabulary)
    micro = build_student("micro", vocabulary="residues")
    assert isinstance(micro, Decoder)
    assert (micro.config.vocabulary, micro.config.width, len(micro.embed_tokens.weight)) == (33, 256, 33)
    save_gpt2(tmp_path / "pairs")
    pairs = build_student("micro", vocabulary=tmp_path / "pairs")
    assert pairs.config.vocabulary == 400  # type: ignore[union-attr]
    from_teacher = build_student("nano-gpt", vocabulary=pairs.vocabulary)  # type: ignore[union-attr]
    assert from_teacher.config.vocabulary == 400  # type: ignore[union-attr]
    again = build_student(str(save_toy(tmp_path / "toy", toy_encoder())))
    assert again.config == TOY
    decoder = build_student(str(save_toy(tmp_path / "toy decoder", toy_decoder())))
    for model in (encoder, gpt, micro, again, decoder):
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("student", "vocabulary", "problem"),
    [
        ("nano-xl", None, "no student 'nano-xl': did you mean 'nano-"),
        (
            "/absent",
            None,
            "it is neither a preset (nano-2xs, nano-xs, nano-s, nano-m, nano-gpt-xs, nano-gpt-s, nano-gpt, medium",
        ),
        ("micro", None, "micro has no vocabulary of its own: give a teacher, 'residues', or the folder"),
        ("micro", "letters", "vocabulary is 'letters', expected 'residues' or a decoder's folder"),
    ],
)
def test_what_there_is_not_is_refused(student: str, vocabulary: str | None, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        build_student(student, vocabulary=vocabulary)


def test_a_folder_without_a_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": "many"}))
    with pytest.raises(InputError, match=r"config.json: vocab_size is 'many', expected a whole number"):
        build_student("micro", vocabulary=tmp_path)


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    for model in (toy_encoder(), toy_decoder()):
        folder = tmp_path / type(model).__name__
        save_student(model, folder)
        loaded = load_model(folder, device="cpu", precision="fp32").state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded[name], tensor.half().float()), name


def test_a_full_disk_is_told_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("protnest.engine.checkpoint.save_file", full)
    with pytest.raises(
        InputError, match=r"the model cannot be written \(.*No space left on device: '.*model.safetensors'\)"
    ):
        save_student(toy_encoder(), tmp_path)


# Fresh weights


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_fresh_weights_have_the_documented_spread(kind: str) -> None:
    model: Encoder | Decoder
    if kind == "encoder":
        model = Encoder(EncoderConfig(layers=8, width=64, heads=4, feedforward=256))
    else:
        config = DecoderConfig(layers=8, width=64, heads=4, feedforward=256, vocabulary=33)
        model = Decoder(config, ResidueVocabulary())
    initialise(model, 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            is_norm_weight = "norm" in name and name.endswith("weight")
            assert (parameter == (1.0 if is_norm_weight else 0.0)).all(), name
            continue
        expected = parameter.shape[1] ** -0.5 if kind == "encoder" else 0.02
        expected /= 4 if name.endswith(("out.weight", "fc2.weight")) else 1
        draws, off = parameter.detach(), 5 * parameter.numel() ** -0.5
        assert float(draws.std()) == pytest.approx(expected, rel=off / math.sqrt(2)), name
        assert abs(float(draws.mean())) < off * expected, name


def test_fresh_weights_come_from_the_seed_alone() -> None:
    first, other = (build_student("nano-xs", seed=seed).state_dict() for seed in (0, 1))
    torch.manual_seed(123)
    again = build_student("nano-xs", seed=0).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name])


# Copied layers


@pytest.mark.parametrize(
    ("student", "teacher", "taken"),
    [(1, 5, [4]), (2, 5, [0, 4]), (3, 5, [0, 2, 4]), (4, 36, [0, 12, 23, 35]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_layers_are_evenly_spaced(student: int, teacher: int, taken: list[int]) -> None:
    assert copied_layers(student, teacher) == taken


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_student_begins_as_its_teacher_s_layers(kind: str) -> None:
    teacher: Encoder | Decoder
    student: Encoder | Decoder
    if kind == "encoder":
        teacher, student = toy_encoder(1, replace(TOY, layers=5)), toy_encoder(0, replace(TOY, layers=3))
    else:
        teacher, student = (
            toy_decoder(1, replace(TOY_DECODER, layers=5)),
            toy_decoder(0, replace(TOY_DECODER, layers=3, places=10)),
        )
    assert copy_layers(student, teacher) == [0, 2, 4]
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        for ours, theirs in (("layers.1.", "layers.2."), ("layers.2.", "layers.4.")):
            if name.startswith(ours):
                name = name.replace(ours, theirs)
                break
        assert torch.equal(tensor, source[name][: len(tensor)]), name
    # A copy, not a view.
    with torch.no_grad():
        student.embed_tokens.weight.zero_()
    assert teacher.embed_tokens.weight.abs().sum() > 0


def test_as_many_layers_are_the_teacher_itself() -> None:
    teacher, student = toy_encoder(1), toy_encoder(0)
    copy_layers(student, teacher)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, teacher.state_dict()[name])


@pytest.mark.parametrize(
    ("student", "problem"),
    [
        (lambda: toy_encoder(0, replace(TOY, width=32)), "width 32, teacher's 16"),
        (lambda: toy_encoder(0, replace(TOY, heads=4)), "heads 4, teacher's 2"),
        (
            lambda: toy_encoder(0, replace(TOY, layers=3)),
            "from toy1 (2 layers) to toy0 (3 layers), which",
        ),
        (lambda: toy_decoder(0), "toy0 and toy1 are not of one kind"),
    ],
)
def test_layers_that_do_not_fit_are_refused(student: Any, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        copy_layers(student(), toy_encoder(1))
    with pytest.raises(InputError, match="which is the larger one"):
        copy_layers(toy_decoder(0, replace(TOY_DECODER, places=99)), toy_decoder(1))
