"""What engines generate with: a decoder of a published shape with random weights, over a stand-in for its byte pairs.

ProtGPT2's tokenizer is downloaded with its weights; where neither can be had, all that its byte pairs decide about
speed is how many there are and how many residues each stands for. The stand-in has as many, 50,257: the end, 256 bytes,
every pair and every three residues, and of four residues those that are the likeliest by composition. They stand for
3.8 residues each; ProtGPT2's are said to stand for about four.

Random weights would end sequences at random places, and two engines would not do the same work. So the end's embedding
points away from where the final LayerNorm shifts all hidden states: its logit stays tens of nats below the others, and
each sequence is as long as it may be.

Shapes: D width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from protnest.engine.decoder import Decoder
from protnest.engine.decoder_checkpoint import save_decoder
from protnest.engine.decoder_config import DECODER_SHAPES, DecoderConfig
from protnest.engine.vocabulary import END_OF_TEXT, BytePairVocabulary

SHAPE_NAMES = {"protgpt2": "774M", "medium": "204M", "small": "82M", "tiny": "39M", "micro": "16M"}
"""Sizes by which people know the shapes."""

# The commonest residues of UniProt first: of four residues those with the smallest sum of ranks are taken.
_RESIDUES = "LAGVESIKRDTPNQFYMHCW"
# Spread of the logits of a trained model, about.
_LOGIT_SPREAD = 2.0
_SHIFT = 12.0
"""Length of the final LayerNorm's bias: times the end's embedding, of length 2, so many nats twice over."""


def stand_in_vocabulary(size: int = 50_257) -> BytePairVocabulary:
    """Byte pairs of that number of tokens: the end first, then bytes, then words of two, three and four residues.

    Raises:
        ValueError: there are fewer than the end and the bytes, or more than there are such words.
        ImportError: the package tokenizers is missing.
    """
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    spellings = [END_OF_TEXT, *sorted(ByteLevel.alphabet())]
    words = list(itertools.islice(_words(), max(0, size - len(spellings))))
    if len(spellings) + len(words) != size:
        message = f"size is {size:,}, expected {len(spellings)} to {len(spellings) + sum(20**n for n in (2, 3, 4)):,}"
        raise ValueError(message)
    spelt = {text: token for token, text in enumerate([*spellings, *words])}
    pairs = ByteLevelBPETokenizer(spelt, [(word[:-1], word[-1]) for word in words])
    pairs.add_special_tokens([END_OF_TEXT])
    return BytePairVocabulary(pairs._tokenizer)


def _words() -> itertools.chain[str]:
    """Words of two residues, then of three, then of four, the commonest of each first."""
    rank = {residue: place for place, residue in enumerate(_RESIDUES)}

    def of_length(count: int) -> list[str]:
        every = map("".join, itertools.product(_RESIDUES, repeat=count))
        return sorted(every, key=lambda word: sum(rank[residue] for residue in word))

    return itertools.chain.from_iterable(map(of_length, (2, 3, 4)))


def random_decoder(config: DecoderConfig, vocabulary: BytePairVocabulary, *, seed: int) -> Decoder:
    """An fp32 decoder on the CPU whose logits spread as a trained one's do, and which never ends a sequence."""
    decoder = Decoder(config, vocabulary, name="random")
    generator = torch.Generator().manual_seed(seed)
    D = config.width
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
            else:
                spread = _LOGIT_SPREAD if name.startswith("embed") else 1.0
                parameter.normal_(std=spread / math.sqrt(parameter.shape[1]), generator=generator)
        shift_D = torch.randn(D, generator=generator)
        shift_D *= _SHIFT / shift_D.norm()
        decoder.final_norm.bias.copy_(shift_D)
        decoder.embed_tokens.weight[vocabulary.end] = -_LOGIT_SPREAD * shift_D / shift_D.norm()
    return decoder.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A decoder to generate with.

    Attributes:
        shape: its name in `DECODER_SHAPES`, or any other where `config` says what it is.
        tokens: length of each sequence, the two of the prompt counted.
        seed: of the weights.
        config: of another architecture.

    Raises:
        ValueError: there is no such shape, or fewer than 3 or more tokens than the model has places for.
    """

    shape: str
    tokens: int
    seed: int = 0
    config: DecoderConfig | None = None

    def __post_init__(self) -> None:
        if self.config is None and self.shape not in DECODER_SHAPES:
            message = f"no shape {self.shape!r}; allowed are {', '.join(DECODER_SHAPES)}"
            raise ValueError(message)
        if not 3 <= self.tokens <= self.whole.places:
            message = f"tokens is {self.tokens}, expected 3 to the {self.whole.places} that {self.shape} has places for"
            raise ValueError(message)

    @property
    def whole(self) -> DecoderConfig:
        """The architecture as published, with all its places."""
        return self.config or DECODER_SHAPES[self.shape]

    @property
    def shortened(self) -> DecoderConfig:
        """The same with as many places as a sequence has tokens: so both engines stop there."""
        return replace(self.whole, places=self.tokens)

    @cached_property
    def parameters(self) -> int:
        """Of the architecture as published, the head being the embedding."""
        config = self.whole
        D = config.width
        per_layer = sum(into * out + out for into, out in layer_shapes(config)) + 4 * D
        return config.layers * per_layer + (config.vocabulary + config.places + 2) * D

    def write(self, folder: Path) -> None:
        """Writes the checkpoint, which transformers and `load_decoder` read alike."""
        vocabulary = stand_in_vocabulary(self.whole.vocabulary)
        save_decoder(random_decoder(self.shortened, vocabulary, seed=self.seed), folder)


def layer_shapes(config: DecoderConfig) -> tuple[tuple[int, int], ...]:
    """Inputs and outputs of a layer's four products."""
    D, inner = config.width, config.feedforward
    return ((D, 3 * D), (D, D), (D, inner), (inner, D))
