"""Decoders' checkpoints in Hugging Face layout: which tensors a GPT-2 needs, strictly; how they are read and written.

GPT-2's layers keep their weights as (inputs, outputs), the other way round than `nn.Linear`. They stay so in memory,
and the embedding, which is the head's weight too, is brought into that order: on a CPU, products of 1 to 64 rows are so
1.1 to 1.5 times as fast. Tensors are copied one by one, see `StoredTensors`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from .atomic import write_atomically
from .checkpoint import StoredTensors, read_settings, shorten, tensors_fingerprint
from .decoder import Decoder
from .decoder_config import DecoderConfig, decoder_config_from_huggingface, decoder_config_to_huggingface
from .errors import InputError
from .quantise import Int8Model
from .vocabulary import Vocabulary, read_vocabulary

# Known, and computed: the causal mask, which older checkpoints hold.
_SET_ASIDE = re.compile(r"^h\.\d+\.attn\.(masked_)?bias$")
_TIED = "lm_head.weight"
_EMBEDDING = "wte.weight"
_OWN_EMBEDDING = "embed_tokens.weight"
_TRANSPOSED = ("qkv.weight", "out.weight", "fc1.weight", "fc2.weight")
_LAYER = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "feedforward_norm": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}


def decoder_names(config: DecoderConfig) -> dict[str, str]:
    """Each of the decoder's parameters with its tensor's name in Hugging Face layout, without `transformer.`."""

    def names() -> Iterator[tuple[str, str]]:
        yield _OWN_EMBEDDING, _EMBEDDING
        yield "embed_places.weight", "wpe.weight"
        for kind in ("weight", "bias"):
            for index in range(config.layers):
                for own, theirs in _LAYER.items():
                    yield f"layers.{index}.{own}.{kind}", f"h.{index}.{theirs}.{kind}"
            yield f"final_norm.{kind}", f"ln_f.{kind}"

    return dict(names())


def _turn(got: torch.Tensor) -> torch.Tensor:
    """The same fp32 matrix on the CPU, its columns one after another in memory."""
    return got.T.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format).T


def build_decoder(
    config: DecoderConfig, vocabulary: Vocabulary, tensors: Mapping[str, torch.Tensor], *, name: str, source: str
) -> tuple[Decoder, list[str]]:
    """An fp32 decoder on the CPU, filled from tensors in Hugging Face's names, of any floating dtype; strict both ways.

    Returns:
        The decoder, and the names of the tensors that were set aside.

    Raises:
        InputError: tensors are missing, unexpected, there twice, not finite, or of another shape or kind, or the head
            is not tied to the embedding.
    """
    kept: dict[str, str] = {}
    for original in tensors:
        short = original.removeprefix("transformer.")
        if short in kept:
            message = f"tensor {original!r} is there twice, under two spellings"
            raise InputError(message, file=source)
        kept[short] = original
    set_aside = sorted(name for name in kept if _SET_ASIDE.search(name))
    for each in set_aside:
        del kept[each]
    tied = kept.pop(_TIED, None)
    if tied is not None and not (_EMBEDDING in kept and torch.equal(tensors[tied], tensors[kept[_EMBEDDING]])):
        message = f"{_TIED} differs from the token embedding; ProtGPT2 and its students tie the two"
        raise InputError(message, file=source)
    names = decoder_names(config)
    problems = [f"missing {key}" for key in sorted(set(names.values()) - kept.keys())]
    problems += [f"unexpected {key}" for key in sorted(kept.keys() - set(names.values()))]
    if problems:
        message = f"not the tensors of this GPT-2 decoder: {shorten(problems)}"
        raise InputError(message, file=source)
    with torch.device("meta"):
        decoder = Decoder(config, vocabulary, name=name)
    state: dict[str, torch.Tensor] = {}
    for own, parameter in decoder.state_dict().items():
        got = tensors[kept[names[own]]].detach()
        turned = own.endswith(_TRANSPOSED)
        shape = tuple(parameter.shape)[:: -1 if turned else 1]
        if tuple(got.shape) != shape or not got.is_floating_point():
            problems.append(f"{names[own]} is {got.dtype} {tuple(got.shape)}, expected floating point {shape}")
            continue
        state[own] = _turn(got) if own == _OWN_EMBEDDING else got.to("cpu", torch.float32, copy=True)
        if turned:
            state[own] = state[own].T
    if problems:
        message = f"tensors do not fit the configuration: {shorten(problems)}"
        raise InputError(message, file=source)
    if broken := [own for own, tensor in state.items() if not torch.isfinite(tensor).all()]:
        message = f"weights are not finite in {shorten(broken)}"
        raise InputError(message, file=source)
    decoder.load_state_dict(state, strict=True, assign=True)
    decoder.fingerprint = tensors_fingerprint(config, state)
    return decoder.eval(), set_aside


def read_decoder(folder: Path, *, name: str | None = None) -> tuple[Decoder, list[str]]:
    """Reads a folder in Hugging Face layout: `config.json`, `model.safetensors` and the tokenizer's files.

    Returns:
        An fp32 decoder on the CPU, and the names of the tensors that were set aside.

    Raises:
        InputError: a file is missing or unreadable, tensors are not those of the configuration, or the tokenizer is
            another model's.
    """
    config = decoder_config_from_huggingface(read_settings(folder), file=str(folder / "config.json"))
    vocabulary = read_vocabulary(folder, config.vocabulary)
    tensors = StoredTensors(folder)
    return build_decoder(config, vocabulary, tensors, name=name or folder.name, source=tensors.source)


def save_decoder(decoder: Decoder, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a decoder with its vocabulary in Hugging Face layout; transformers reads it as it is.

    Args:
        decoder: any precision but int8, any device.
        folder: made if it is not there; files of the same names are replaced.
        dtype: how the tensors are stored.

    Raises:
        InputError: the decoder is int8, whose weights are folded and rounded: save the one that it was made of.
    """
    if isinstance(decoder, Int8Model):
        message = f"{decoder.name} runs in int8 and is not saved: its weights are rounded; save the fp32 model"
        raise InputError(message)
    folder.mkdir(parents=True, exist_ok=True)
    names = decoder_names(decoder.config)
    tensors = {}
    for own, tensor in decoder.state_dict().items():
        stored = tensor.detach().to("cpu", dtype)
        tensors[f"transformer.{names[own]}"] = (stored.T if own.endswith(_TRANSPOSED) else stored).contiguous().clone()
    vocabulary = decoder.vocabulary
    settings = decoder_config_to_huggingface(
        decoder.config, bos=vocabulary.start, eos=vocabulary.end, dtype=str(dtype).removeprefix("torch.")
    )
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    vocabulary.save(folder)
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
