"""What a GPT-2 decoder is made of: the sizes and switches that a checkpoint's config.json states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .alphabet import TOKENS
from .errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Architecture of a GPT-2 decoder, as ProtGPT2 uses it (Ferruz et al., Nat. Commun. 13:4348, 2022).

    Attributes:
        layers: transformer layers.
        width: D, the model's width.
        heads: H, attention heads; they divide the width.
        feedforward: F, width of the inner feed-forward layer.
        vocabulary: V, tokens.
        places: longest sequence in tokens, `<|endoftext|>` counted; positions are learned.
        layer_norm_eps: added to the variance in every LayerNorm.

    Raises:
        ValueError: a size or `layer_norm_eps` is not positive, or the heads do not divide the width.
    """

    layers: int
    width: int
    heads: int
    feedforward: int
    vocabulary: int
    places: int = 1024
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "feedforward", "vocabulary", "places"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                message = f"{name} must be a positive whole number, got {value!r}"
                raise ValueError(message)
        if not isinstance(self.layer_norm_eps, float) or not 0 < self.layer_norm_eps < math.inf:
            message = f"layer_norm_eps must be a positive number, got {self.layer_norm_eps!r}"
            raise ValueError(message)
        if self.width % self.heads:
            message = f"width {self.width} is not a multiple of {self.heads} heads"
            raise ValueError(message)

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads


def _sized(layers: int, heads: int, width: int, vocabulary: int = 50257) -> DecoderConfig:
    return DecoderConfig(layers=layers, heads=heads, width=width, feedforward=4 * width, vocabulary=vocabulary)


DECODER_SHAPES: dict[str, DecoderConfig] = {
    "protgpt2": _sized(36, 20, 1280),
    "medium": _sized(12, 16, 1024),
    "small": _sized(6, 8, 768),
    "tiny": _sized(4, 4, 512),
    "micro": _sized(4, 4, 256),
}
"""The published teacher, 774M, and its students, 204M, 82M, 39M and 16M (Wijaya 2026)."""


def residue_decoder(*, layers: int, heads: int, width: int) -> DecoderConfig:
    """A shape over residues, one token each (`ResidueVocabulary`)."""
    return _sized(layers, heads, width, vocabulary=len(TOKENS))


BUNDLED_DECODERS: dict[str, DecoderConfig] = {"nano-gpt": residue_decoder(layers=5, heads=6, width=192)}
"""The decoders inside the package."""

# What GPT-2 is, in the words of a Hugging Face config.json. A checkpoint that says otherwise is another architecture.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", None),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "reorder_and_upcast_attn": (False, None),
    "tie_word_embeddings": (True, None),
    "add_cross_attention": (False, None),
}
_HF_REQUIRED = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")


def decoder_config_from_huggingface(settings: Mapping[str, Any], *, file: str | None = None) -> DecoderConfig:
    """Reads the GPT-2 architecture from the keys of a Hugging Face `config.json`.

    Raises:
        InputError: a key is missing, or has a value that makes it another architecture than GPT-2.
    """
    for key, allowed in _HF_FIXED.items():
        if settings.get(key) not in allowed:
            message = f"{key} is {settings.get(key)!r}; a GPT-2 decoder has {allowed[0]!r}"
            raise InputError(message, file=file)
    if missing := [key for key in _HF_REQUIRED if settings.get(key) is None]:
        message = f"missing in the configuration: {', '.join(missing)}"
        raise InputError(message, file=file)
    width = settings["n_embd"]
    try:
        return DecoderConfig(
            layers=settings["n_layer"],
            width=width,
            heads=settings["n_head"],
            feedforward=4 * width if settings.get("n_inner") is None else settings["n_inner"],
            vocabulary=settings["vocab_size"],
            places=settings["n_positions"],
            layer_norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error), file=file) from error


def decoder_config_to_huggingface(config: DecoderConfig, *, bos: int, eos: int, dtype: str) -> dict[str, Any]:
    """The `config.json` of a checkpoint in Hugging Face layout; `bos` and `eos` are ids, `dtype` torch's name."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "n_inner": config.feedforward,
        "vocab_size": config.vocabulary,
        "n_positions": config.places,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
