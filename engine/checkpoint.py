"""Checkpoints in Hugging Face layout: which tensors an encoder needs, strictly, and how they are read and written.

Every source (a folder, a fair-esm file, a model in memory) is brought to the same canonical names first: those of
transformers' ESM without the leading `esm.`. One function then fills an `Encoder` from them, strict both ways.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .alphabet import TOKENS
from .atomic import write_atomically
from .config import EncoderConfig, config_from_huggingface, config_to_huggingface
from .encoder import Encoder
from .errors import InputError
from .json_object import read_object
from .quantise import QuantisedEncoder

Tensors = Mapping[str, torch.Tensor]

# Known, and no part of the encoder: positions are rotary and computed; the rest are other people's heads.
SET_ASIDE = re.compile(
    r"(^|\.)inv_freq$|(^|\.)position_ids$|(^|\.)position_embeddings\.weight$|^contact_head\.|^pooler\.|^classifier\."
)
_HASHED_ROWS = 1024
_BESIDE_WEIGHTS = "a checkpoint folder holds it beside model.safetensors"
_TIED = "lm_head.decoder.weight"
_EMBEDDING = "embeddings.word_embeddings.weight"


def _linear(own: str, *canonical: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for kind in ("weight", "bias"):
        yield f"{own}.{kind}", tuple(f"{name}.{kind}" for name in canonical)


def encoder_names(config: EncoderConfig) -> dict[str, tuple[str, ...]]:
    """Each of the encoder's parameters with the canonical tensors that it is made of, joined along the first axis."""
    names: dict[str, tuple[str, ...]] = {"embed_tokens.weight": (_EMBEDDING,)}
    for index in range(config.layers):
        own, canonical = f"layers.{index}", f"encoder.layer.{index}"
        attention = f"{canonical}.attention"
        names |= _linear(f"{own}.attention_norm", f"{attention}.LayerNorm")
        names |= _linear(f"{own}.qkv", *(f"{attention}.self.{part}" for part in ("query", "key", "value")))
        names |= _linear(f"{own}.out", f"{attention}.output.dense")
        names |= _linear(f"{own}.feedforward_norm", f"{canonical}.LayerNorm")
        names |= _linear(f"{own}.fc1", f"{canonical}.intermediate.dense")
        names |= _linear(f"{own}.fc2", f"{canonical}.output.dense")
    names |= _linear("final_norm", "encoder.emb_layer_norm_after")
    return names


def head_names() -> dict[str, tuple[str, ...]]:
    """The language-model head's parameters, each with its canonical tensor."""
    names: dict[str, tuple[str, ...]] = {"head.bias": ("lm_head.bias",)}
    names |= _linear("head.dense", "lm_head.dense")
    names |= _linear("head.norm", "lm_head.layer_norm")
    return names


def canonical_tensors(tensors: Tensors, *, source: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Brings Hugging Face names to canonical ones.

    Returns:
        The tensors by canonical name, and the names that were set aside.

    Raises:
        InputError: two tensors stand for the same one, or the decoder is not tied to the embedding.
    """
    kept: dict[str, torch.Tensor] = {}
    set_aside: list[str] = []
    for original, tensor in tensors.items():
        name = original.removeprefix("esm.")
        # transformers 5 writes LayerNorm tensors under TensorFlow's names.
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        if SET_ASIDE.search(name):
            set_aside.append(original)
        elif name in kept:
            message = f"tensor {original!r} is there twice, under two spellings"
            raise InputError(message, file=source)
        else:
            kept[name] = tensor
    decoder = kept.pop(_TIED, None)
    if decoder is not None and not (_EMBEDDING in kept and torch.equal(decoder, kept[_EMBEDDING])):
        message = f"{_TIED} differs from the token embedding; ESM-2 ties the two"
        raise InputError(message, file=source)
    return kept, sorted(set_aside)


def build_encoder(config: EncoderConfig, tensors: Tensors, *, name: str, source: str) -> Encoder:
    """An fp32 encoder on the CPU, filled from canonical tensors of any floating dtype; strict both ways.

    Raises:
        InputError: tensors are missing, unexpected, or of another shape or kind; all of them are named.
    """
    has_head = any(key.startswith("lm_head.") for key in tensors)
    names = encoder_names(config) | (head_names() if has_head else {})
    expected = {canonical for parts in names.values() for canonical in parts}
    problems = [f"missing {key}" for key in sorted(expected - tensors.keys())]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - expected)]
    if problems:
        message = f"not the tensors of this ESM-2 encoder: {shorten(problems)}"
        raise InputError(message, file=source)

    with torch.device("meta"):
        encoder = Encoder(config, head=has_head, name=name)
    wanted = encoder.state_dict()
    state: dict[str, torch.Tensor] = {}
    for own, parts in names.items():
        rows = wanted[own].shape[0] // len(parts)
        shape = (rows, *wanted[own].shape[1:])
        for part in parts:
            got = tensors[part]
            if tuple(got.shape) != shape or not got.is_floating_point():
                problems.append(f"{part} is {got.dtype} {tuple(got.shape)}, expected floating point {shape}")
        if not problems:
            state[own] = torch.cat([tensors[part].detach().to("cpu", torch.float32) for part in parts])
    if problems:
        message = f"tensors do not fit the configuration: {shorten(problems)}"
        raise InputError(message, file=source)
    if broken := [own for own, tensor in state.items() if not torch.isfinite(tensor).all()]:
        message = f"weights are not finite in {shorten(broken)}"
        raise InputError(message, file=source)
    encoder.load_state_dict(state, strict=True, assign=True)
    encoder.fingerprint = encoder_fingerprint(encoder)
    return encoder.eval()


def shorten(items: list[str], most: int = 8) -> str:
    """The first of a list of problems, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def encoder_fingerprint(encoder: Encoder) -> str:
    """Hash of an fp32 encoder's architecture and tensors: the same for every path, format and head it is saved with."""
    state = encoder.state_dict()
    return tensors_fingerprint(encoder.config, {name: state[name] for name in encoder_names(encoder.config)})


def head_fingerprint(encoder: Encoder) -> str:
    """Hash of the language-model head, of which a model's own fingerprint knows nothing; there must be one."""
    assert encoder.head is not None
    digest = hashlib.blake2b(digest_size=16)
    for tensor in encoder.head.state_dict().values():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tensors_fingerprint(config: Any, tensors: Tensors) -> str:
    """Hash of a model's configuration, a dataclass, and of tensors by their names, as fp32."""
    names = sorted(tensors)

    def digest(name: str) -> bytes:
        found = hashlib.blake2b(digest_size=16)
        # In pieces: a tensor that lies otherwise in memory, or is not fp32, is copied for it.
        for part in torch.split(tensors[name].detach(), _HASHED_ROWS):
            found.update(part.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
        return found.digest()

    # hashlib lets go of the interpreter on large buffers, so threads help.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, names))
    total = hashlib.blake2b(json.dumps(asdict(config), sort_keys=True).encode(), digest_size=16)
    for name, part in zip(names, digests, strict=True):
        total.update(name.encode() + part)
    return total.hexdigest()


def read_checkpoint(folder: Path, *, name: str | None = None) -> tuple[Encoder, list[str]]:
    """Reads a folder in Hugging Face layout: `config.json` beside `model.safetensors`, whole or in indexed shards.

    Returns:
        An fp32 encoder on the CPU, and the names of the tensors that were set aside.

    Raises:
        InputError: a file is missing or unreadable, or the tensors are not those of the configuration.
    """
    config = config_from_huggingface(read_settings(folder), file=str(folder / "config.json"))
    tensors = StoredTensors(folder)
    canonical, set_aside = canonical_tensors(tensors, source=tensors.source)
    return build_encoder(config, canonical, name=name or folder.name, source=tensors.source), set_aside


def read_settings(folder: Path) -> dict[str, Any]:
    """What `config.json` of a folder says.

    Raises:
        InputError: it is missing, or no JSON object.
    """
    return read_object(folder / "config.json", missing=_BESIDE_WEIGHTS)


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a folder in Hugging Face layout, whole or in indexed shards, each read when it is asked for.

    A tensor is a view of its file, whose pages count as the process's memory until the tensor is let go of: whoever
    copies one after the other never holds the file as well as the copies.

    Attributes:
        source: what messages call it.

    Raises:
        InputError: a file is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        files = _weight_files(folder)
        self._files: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                message = f"not a readable safetensors file ({error})"
                raise InputError(message, file=file) from error
        self.source = str(files[0] if len(files) == 1 else folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        message = "holds neither model.safetensors nor model.safetensors.index.json"
        raise InputError(message, file=folder)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        message = f"weight_map must give the file of each tensor, got {str(weight_map)[:80]}"
        raise InputError(message, file=index)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()] or not shards:
        message = f"the shards it lists are not all there: missing {missing}"
        raise InputError(message, file=index)
    return [folder / shard for shard in shards]


def save_checkpoint(encoder: Encoder, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes an encoder, with its head if it has one, in Hugging Face layout; transformers reads it as it is.

    Args:
        encoder: any precision but int8, any device.
        folder: made if it is not there; files of the same names are replaced.
        dtype: how the tensors are stored.

    Raises:
        InputError: the encoder is int8, whose weights are folded and rounded: save the one that it was made of.
    """
    if isinstance(encoder, QuantisedEncoder):
        message = f"{encoder.name} runs in int8 and is not saved: its weights are rounded; save the fp32 model"
        raise InputError(message)
    folder.mkdir(parents=True, exist_ok=True)
    names = encoder_names(encoder.config) | (head_names() if encoder.head is not None else {})
    state = encoder.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for own, parts in names.items():
        for part, rows in zip(parts, state[own].detach().to("cpu", dtype).chunk(len(parts)), strict=True):
            prefix = "" if part.startswith("lm_head.") else "esm."
            tensors[prefix + part] = rows.clone()
    settings = config_to_huggingface(encoder.config, dtype=str(dtype).removeprefix("torch."))
    texts = {"config.json": json.dumps(settings, indent=1), "vocab.txt": "\n".join(TOKENS)}

    def save_tensors(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})

    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    write_atomically(folder / "model.safetensors", save_tensors)
