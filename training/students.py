"""Models to train: presets, fresh weights, and layers copied from a teacher."""

from __future__ import annotations

import dataclasses
import difflib
import math
from pathlib import Path

import torch

from ..engine.checkpoint import read_settings, save_checkpoint
from ..engine.config import BUNDLED, EncoderConfig
from ..engine.decoder import Decoder
from ..engine.decoder_checkpoint import save_decoder
from ..engine.decoder_config import BUNDLED_DECODERS, DECODER_SHAPES, DecoderConfig, residue_decoder
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.models import load_checkpoint
from ..engine.vocabulary import ResidueVocabulary, Vocabulary, read_vocabulary
from .streams import Stream, torch_seed

ENCODER_PRESETS: dict[str, EncoderConfig] = {
    "nano-2xs": EncoderConfig(layers=4, width=64, heads=2, feedforward=256),
    **BUNDLED,
}
"""Encoders of 0.2, 1.2, 3.6 and 4.8 million parameters; the last three are 19.4 MB together in fp16."""

_OVER_RESIDUES: dict[str, DecoderConfig] = {
    "nano-gpt-xs": residue_decoder(layers=3, heads=3, width=96),
    "nano-gpt-s": residue_decoder(layers=4, heads=4, width=128),
    **BUNDLED_DECODERS,
}

DECODER_PRESETS: dict[str, DecoderConfig] = {
    **_OVER_RESIDUES,
    **{name: shape for name, shape in DECODER_SHAPES.items() if name != "protgpt2"},
}
"""Decoders over residues of 0.4, 0.9 and 2.4 million parameters, and the published students (Wijaya 2026)."""

PRESETS = (*ENCODER_PRESETS, *DECODER_PRESETS)
RESIDUES = "residues"
_INITIAL_STD = 0.02


def build_student(
    student: str, *, vocabulary: Vocabulary | str | Path | None = None, seed: int = 0
) -> Encoder | Decoder:
    """A model to train, in fp32 on the CPU.

    Args:
        student: a preset, which gets fresh weights; or a folder in Hugging Face layout, which is trained on.
        vocabulary: of a decoder preset: a teacher's; "residues"; or a decoder's folder. The nanos' is "residues" where
            nothing is said.
        seed: of fresh weights.

    Raises:
        InputError: there is neither such a preset nor such a folder, or a decoder preset has no vocabulary.
    """
    if student in ENCODER_PRESETS:
        encoder = Encoder(ENCODER_PRESETS[student], name=student)
        initialise(encoder, seed)
        return encoder
    if student in DECODER_PRESETS:
        found = _vocabulary(student, vocabulary)
        decoder = Decoder(dataclasses.replace(DECODER_PRESETS[student], vocabulary=found.size), found, name=student)
        initialise(decoder, seed)
        return decoder
    if not Path(student).expanduser().is_dir():
        close = difflib.get_close_matches(student, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        message = f"no student {student!r}: {hint}it is neither a preset ({', '.join(PRESETS)}) nor a folder here"
        raise InputError(message)
    model = load_checkpoint(Path(student), device="cpu", precision="fp32").requires_grad_(True)
    for parameter in model.parameters():
        # A decoder is loaded with its matrices lying the other way round, which sharding refuses.
        parameter.data = parameter.data.contiguous()
    return model


def _vocabulary(student: str, vocabulary: Vocabulary | str | Path | None) -> Vocabulary:
    if vocabulary is None:
        if student not in _OVER_RESIDUES:
            message = (
                f"{student} has no vocabulary of its own: give a teacher, {RESIDUES!r}, or the folder of a decoder "
                "whose tokens it shares"
            )
            raise InputError(message)
        return ResidueVocabulary()
    if isinstance(vocabulary, str | Path):
        if str(vocabulary) == RESIDUES:
            return ResidueVocabulary()
        folder = Path(vocabulary).expanduser()
        if not folder.is_dir():
            message = f"vocabulary is {str(vocabulary)!r}, expected {RESIDUES!r} or a decoder's folder"
            raise InputError(message)
        size = read_settings(folder).get("vocab_size")
        if not isinstance(size, int):
            message = f"vocab_size is {size!r}, expected a whole number"
            raise InputError(message, file=folder / "config.json")
        return read_vocabulary(folder, size)
    return vocabulary


def initialise(model: Encoder | Decoder, seed: int) -> None:
    """Fresh weights, in which branches into the residual stream are shrunk by sqrt(2 x layers).

    An encoder's matrices are normal with variance 1 / fan-in, a decoder's with a deviation of 0.02, as GPT-2's. Biases
    are 0, norms 1.
    """
    generator = torch.Generator().manual_seed(torch_seed(seed, Stream.WEIGHTS))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = parameter.shape[1] ** -0.5 if isinstance(model, Encoder) else _INITIAL_STD
            if name.endswith((".out.weight", ".fc2.weight")):
                std /= math.sqrt(2 * model.config.layers)
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.zeros_(parameter)


def copied_layers(student: int, teacher: int) -> list[int]:
    """Which of the teacher's layers each of the student's begins as: evenly spaced, first and last among them."""
    if student == 1:
        return [teacher - 1]
    return [round(layer * (teacher - 1) / (student - 1)) for layer in range(student)]


@torch.no_grad()
def copy_layers(student: Encoder | Decoder, teacher: Encoder | Decoder) -> list[int]:
    """Lets a student begin as every n-th layer of its teacher, with the teacher's embeddings, norms and head.

    Returns:
        The teacher's layers that were taken.

    Raises:
        InputError: the teacher has fewer layers, or the two differ in kind, width, heads, or the like.
    """
    if type(student) is not type(teacher):
        message = f"{student.name} and {teacher.name} are not of one kind: no layers to copy"
        raise InputError(message)
    ours, theirs = dataclasses.asdict(student.config), dataclasses.asdict(teacher.config)
    free = {"layers", "max_residues", "places"}
    if differs := [f"{key} {ours[key]}, teacher's {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
        differs = [each for each in differs if each.split()[0] not in free]
    if differs:
        message = f"layers cannot be copied from {teacher.name} to {student.name}: {'; '.join(differs)}"
        raise InputError(message)
    if ours["layers"] > theirs["layers"] or ours.get("places", 0) > theirs.get("places", 0):
        message = (
            f"layers cannot be copied from {teacher.name} ({theirs['layers']} layers) to {student.name} "
            f"({ours['layers']} layers), which is the larger one"
        )
        raise InputError(message)
    taken = copied_layers(ours["layers"], theirs["layers"])
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        first, *rest = name.split(".")
        if first == "layers":
            name = ".".join(("layers", str(taken[int(rest[0])]), *rest[1:]))
        # Fewer places are the first ones.
        tensor.copy_(source[name][: tensor.shape[0]])
    return taken


def save_student(student: Encoder | Decoder, folder: Path) -> None:
    """Writes a trained model in Hugging Face layout, in fp16.

    Raises:
        InputError: the disk is full, or the like.
    """
    try:
        if isinstance(student, Encoder):
            save_checkpoint(student, folder, dtype=torch.float16)
        else:
            save_decoder(student, folder, dtype=torch.float16)
    except (OSError, RuntimeError) as error:
        message = f"the model cannot be written ({error}); the last checkpoint of the training is kept"
        raise InputError(message, file=folder) from error
