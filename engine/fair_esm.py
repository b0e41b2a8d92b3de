"""Checkpoints and models of the fair-esm package, brought to canonical names."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from .alphabet import TOKENS
from .checkpoint import Tensors, build_encoder, canonical_tensors
from .config import EncoderConfig
from .encoder import Encoder
from .errors import InputError

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^encoder\.(sentence_encoder\.)?(?!layer\.)", ""),
    (r"^embed_tokens\.", "embeddings.word_embeddings."),
    (r"^layers\.(\d+)\.self_attn\.q_proj\.", r"encoder.layer.\1.attention.self.query."),
    (r"^layers\.(\d+)\.self_attn\.k_proj\.", r"encoder.layer.\1.attention.self.key."),
    (r"^layers\.(\d+)\.self_attn\.v_proj\.", r"encoder.layer.\1.attention.self.value."),
    (r"^layers\.(\d+)\.self_attn\.out_proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^layers\.(\d+)\.self_attn_layer_norm\.", r"encoder.layer.\1.attention.LayerNorm."),
    (r"^layers\.(\d+)\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^layers\.(\d+)\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"^layers\.(\d+)\.final_layer_norm\.", r"encoder.layer.\1.LayerNorm."),
    (r"^emb_layer_norm_after\.", "encoder.emb_layer_norm_after."),
    (r"^lm_head\.weight$", "lm_head.decoder.weight"),
)


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _build(
    tensors: Tensors, *, layers: int, width: int, heads: int, token_dropout: bool, name: str, source: str
) -> tuple[Encoder, list[str]]:
    try:
        # The width's own message comes first: 4 times no number is no number either.
        feedforward = 4 * width if isinstance(width, int) else 4
        config = EncoderConfig(
            layers=layers, width=width, heads=heads, feedforward=feedforward, token_dropout=token_dropout
        )
    except ValueError as error:
        raise InputError(str(error), file=source) from error
    renamed: dict[str, torch.Tensor] = {}
    for original, tensor in tensors.items():
        canonical_name = _rename(original)
        if canonical_name in renamed:
            message = f"tensor {original!r} is there twice, under two spellings"
            raise InputError(message, file=source)
        renamed[canonical_name] = tensor
    canonical, set_aside = canonical_tensors(renamed, source=source)
    return build_encoder(config, canonical, name=name, source=source), set_aside


def read_fair_esm(path: Path, *, name: str | None = None) -> tuple[Encoder, list[str]]:
    """Reads a `.pt` file as fair-esm publishes them, without running any code that the file may hold.

    Returns:
        An fp32 encoder on the CPU, and the names of the tensors that were set aside.

    Raises:
        InputError: the file is unreadable, asks for code to run, or is no ESM-2 checkpoint.
    """
    try:
        # fair-esm's files hold their settings as an argparse.Namespace; nothing else beyond tensors is let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        message = f"not a checkpoint that can be read safely ({error})"
        raise InputError(message, file=path) from error
    except Exception as error:
        # Not torch's own words: they tell the reader how to run whatever the file holds.
        reason = (
            "it holds more than tensors and settings"
            if "Unsupported global" in str(error)
            else "damaged, or no .pt file"
        )
        message = f"not a checkpoint that can be read safely ({reason}; {type(error).__name__})"
        raise InputError(message, file=path) from error
    try:
        settings, tensors = content["cfg"]["model"], content["model"]
        layers, width, heads = (
            settings.encoder_layers,
            settings.encoder_embed_dim,
            settings.encoder_attention_heads,
        )
        token_dropout = settings.token_dropout
    except (LookupError, TypeError, AttributeError) as error:
        message = (
            f"not a fair-esm ESM-2 checkpoint: it lacks {error}; expected 'model' and 'cfg' with the encoder's sizes"
        )
        raise InputError(message, file=path) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in tensors.items()
    ):
        message = "not a fair-esm ESM-2 checkpoint: 'model' holds something else than tensors by name"
        raise InputError(message, file=path)
    return _build(
        tensors,
        layers=layers,
        width=width,
        heads=heads,
        token_dropout=token_dropout,
        name=name or path.stem,
        source=str(path),
    )


def from_fair_esm(model: torch.nn.Module, alphabet: Any, *, name: str = "fair-esm model") -> Encoder:
    """Adopts a fair-esm `ESM2` that is already in memory; its weights are copied to an fp32 encoder on the CPU.

    Args:
        model: an `esm.model.esm2.ESM2`.
        alphabet: the `esm.data.Alphabet` that came with it.
        name: how messages call the encoder.

    Raises:
        InputError: the alphabet is not ESM-2's, or the model is no ESM-2.
    """
    tokens = tuple(alphabet.all_toks)
    if tokens != TOKENS:
        message = f"{name}: its alphabet is {tokens}, ESM-2's is {TOKENS}"
        raise InputError(message)
    try:
        sizes = {
            "layers": int(model.num_layers),  # type: ignore[arg-type]
            "width": int(model.embed_dim),  # type: ignore[arg-type]
            "heads": int(model.attention_heads),  # type: ignore[arg-type]
        }
        token_dropout = bool(model.token_dropout)
    except AttributeError as error:
        message = f"{name} is no fair-esm ESM-2 model: {error}"
        raise InputError(message) from error
    encoder, _ = _build(model.state_dict(), **sizes, token_dropout=token_dropout, name=name, source=name)
    return encoder
