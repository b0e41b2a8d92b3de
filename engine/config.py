"""What an ESM-2 encoder is made of: the sizes and switches that a checkpoint's config.json states."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .alphabet import MASK_ID, PAD_ID, TOKENS
from .errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Architecture of an ESM-2 encoder.

    Attributes:
        layers: transformer layers.
        width: D, the model's width and that of its embeddings.
        heads: H, attention heads; `width` is a multiple of `2 * heads`, since rotary positions turn pairs.
        feedforward: F, width of the inner feed-forward layer.
        max_residues: length in residues that the model was trained on.
        token_dropout: rescale embeddings by the share of masks, as every published ESM-2 does.
        layer_norm_eps: added to the variance in every LayerNorm.

    Raises:
        ValueError: a size or `layer_norm_eps` is not positive, or the heads do not divide the width.
    """

    layers: int
    width: int
    heads: int
    feedforward: int
    max_residues: int = 1022
    token_dropout: bool = True
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "feedforward", "max_residues"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                message = f"{name} must be a positive whole number, got {value!r}"
                raise ValueError(message)
        token_dropout: object = self.token_dropout
        if not isinstance(token_dropout, bool):
            message = f"token_dropout must be true or false, got {token_dropout!r}"
            raise ValueError(message)
        if not isinstance(self.layer_norm_eps, float) or not 0 < self.layer_norm_eps < math.inf:
            message = f"layer_norm_eps must be a positive number, got {self.layer_norm_eps!r}"
            raise ValueError(message)
        if self.width % (2 * self.heads):
            message = f"width {self.width} is not a multiple of 2 x {self.heads} heads"
            raise ValueError(message)

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads


def _published(layers: int, width: int, heads: int) -> EncoderConfig:
    return EncoderConfig(layers=layers, width=width, heads=heads, feedforward=4 * width)


PUBLISHED: dict[str, EncoderConfig] = {
    "esm2_t6_8M_UR50D": _published(6, 320, 20),
    "esm2_t12_35M_UR50D": _published(12, 480, 20),
    "esm2_t30_150M_UR50D": _published(30, 640, 20),
    "esm2_t33_650M_UR50D": _published(33, 1280, 20),
    "esm2_t36_3B_UR50D": _published(36, 2560, 40),
    "esm2_t48_15B_UR50D": _published(48, 5120, 40),
}
"""The six published ESM-2 encoders (Lin et al. 2023, table S1)."""

BUNDLED: dict[str, EncoderConfig] = {
    "nano-xs": EncoderConfig(layers=6, width=128, heads=4, feedforward=512),
    "nano-s": EncoderConfig(layers=8, width=192, heads=6, feedforward=768),
    "nano-m": EncoderConfig(layers=6, width=256, heads=8, feedforward=1024),
}
"""The encoders inside the package."""

BUNDLED_CHAINS: dict[str, tuple[str, ...]] = {"nano": ("nano-xs", "nano-s", "nano-m")}
"""The nesting chains inside the package, and the bundled models that each runs."""

BUNDLED_FOLDER = Path(__file__).parent / "bundled"
"""Holds a folder for each bundled model, and NAME.chain for each chain."""

# What ESM-2 is, in the words of a Hugging Face config.json. A checkpoint that says otherwise is another architecture.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("esm",),
    "vocab_size": (len(TOKENS),),
    "position_embedding_type": ("rotary",),
    "hidden_act": ("gelu",),
    "emb_layer_norm_before": (False, None),
    "is_folding_model": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (False, None),
    "rope_theta": (10000.0, None),
    "mask_token_id": (MASK_ID, None),
    "pad_token_id": (PAD_ID, None),
}
# Absent in some configs; transformers' EsmConfig then means these values.
_HF_DEFAULTS: dict[str, Any] = {"hidden_act": "gelu"}
_HF_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "token_dropout",
    "max_position_embeddings",
    # Where it is not said, transformers takes 1e-12, which no ESM-2 was trained with.
    "layer_norm_eps",
)
# max_position_embeddings counts BOS, EOS and two unused rows that the padding index shifts in.
_SPECIAL_POSITIONS = 4


def config_from_huggingface(settings: Mapping[str, Any], *, file: str | None = None) -> EncoderConfig:
    """Reads the ESM-2 architecture from the keys of a Hugging Face `config.json`.

    Raises:
        InputError: a key is missing, or has a value that makes it another architecture than ESM-2.
    """
    for key, allowed in _HF_FIXED.items():
        if allowed[-1] is None and key not in settings:
            continue
        value = settings.get(key, _HF_DEFAULTS.get(key))
        if value not in allowed:
            shown = " or ".join(repr(choice) for choice in allowed if choice is not None)
            message = f"{key} is {value!r}; an ESM-2 encoder has {shown}"
            raise InputError(message, file=file)
    missing = [key for key in _HF_REQUIRED if settings.get(key) is None]
    if missing:
        hints = (f"{key}{_nearest(key, settings)}" for key in missing)
        message = f"missing in the configuration: {', '.join(hints)}"
        raise InputError(message, file=file)
    try:
        return EncoderConfig(
            layers=settings["num_hidden_layers"],
            width=settings["hidden_size"],
            heads=settings["num_attention_heads"],
            feedforward=settings["intermediate_size"],
            max_residues=settings["max_position_embeddings"] - _SPECIAL_POSITIONS,
            token_dropout=settings["token_dropout"],
            layer_norm_eps=settings["layer_norm_eps"],
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error), file=file) from error


def _nearest(key: str, settings: Mapping[str, Any]) -> str:
    known = config_to_huggingface(PUBLISHED["esm2_t6_8M_UR50D"], dtype="float32").keys()
    close = difflib.get_close_matches(key, [name for name in settings if name not in known], n=1)
    return f" (did {close[0]!r} mean this?)" if close else ""


def config_to_huggingface(config: EncoderConfig, *, dtype: str) -> dict[str, Any]:
    """The `config.json` of a checkpoint in Hugging Face layout; `dtype` is torch's name of the stored type."""
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "vocab_size": len(TOKENS),
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feedforward,
        "max_position_embeddings": config.max_residues + _SPECIAL_POSITIONS,
        "position_embedding_type": "rotary",
        "hidden_act": "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "token_dropout": config.token_dropout,
        "emb_layer_norm_before": False,
        "is_folding_model": False,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "pad_token_id": TOKENS.index("<pad>"),
        "mask_token_id": TOKENS.index("<mask>"),
        "vocab_list": None,
        "torch_dtype": dtype,
    }
