"""Beginning a large encoder as a small one that is trained already.

The large one's residual stream holds the small one's n features, and in each further place their mean. LayerNorm of
that is LayerNorm of the n features, and 0 in every further place (after Wang et al. 2023, "LEMON: Lossless model
expansion", arXiv 2310.07999). What is new, heads, rows of the feed-forward and layers, reads the stream with fresh
weights and writes zeros into it. So the large model begins by saying what the small one says, its embedding begins with
the small one's, and what training it adds is added on top of that.

Shapes: n features of the small stream, N of the large one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from ..engine.encoder import Encoder, LanguageModelHead, Layer
from ..engine.errors import InputError


@torch.no_grad()
def grow(small: Encoder, large: Encoder) -> None:
    """Lets an encoder with a language-model head begin with the answers of a smaller one.

    Hidden states after the final norm are the small one's, followed by zeros. Logits are the small one's too where N is
    a multiple of n. Elsewhere they are nearly so: the norm within the head, behind a GELU, then sees some features
    twice and others once.

    Args:
        small: what it is to say.
        large: with fresh weights (see `students.initialise`), of which it keeps those that read the stream anew; as
            wide heads, and nothing less than the small one has.

    Raises:
        InputError: the shapes do not allow it, or the small model has no head.
    """
    _check(small, large)
    assert small.head is not None
    assert large.head is not None
    stream = _Stream(small.config.width, large.config.width)
    large.embed_tokens.weight.copy_(stream.written(small.embed_tokens.weight.T).T)
    for ours, theirs in zip(large.layers, small.layers, strict=False):
        assert isinstance(ours, Layer)
        assert isinstance(theirs, Layer)
        _grow_layer(ours, theirs, stream)
    for layer in large.layers[len(small.layers) :]:
        assert isinstance(layer, Layer)
        for linear in (layer.out, layer.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    stream.grow_norm(large.final_norm, small.final_norm)
    _grow_head(large.head, small.head, stream)


@dataclass(frozen=True)
class _Stream:
    """What is read from and written into a residual stream of N places that continues one of n.

    All n features are sqrt(N / n) times what they were: their variance over N places is then what it was over n, and
    epsilon as small beside it.
    """

    n: int
    N: int

    @property
    def scale(self) -> float:
        return math.sqrt(self.N / self.n)

    def written(self, values_nI: torch.Tensor) -> torch.Tensor:
        """(N, ...): rows or biases that write n features, and their mean in every further place."""
        mean_1I = values_nI.mean(dim=0, keepdim=True)
        return self.scale * torch.cat([values_nI, mean_1I.expand(self.N - self.n, *values_nI.shape[1:])])

    def grow_norm(self, ours: nn.LayerNorm, theirs: nn.LayerNorm) -> None:
        ours.weight[: self.n] = theirs.weight / self.scale
        ours.weight[self.n :] = 1.0
        ours.bias[: self.n] = theirs.bias
        ours.bias[self.n :] = 0.0


def _grow_layer(ours: Layer, theirs: Layer, stream: _Stream) -> None:
    stream.grow_norm(ours.attention_norm, theirs.attention_norm)
    stream.grow_norm(ours.feedforward_norm, theirs.feedforward_norm)
    # Queries, keys and values lie one under another, each with all heads.
    thirds = zip(ours.qkv.weight.chunk(3), theirs.qkv.weight.chunk(3), strict=True)
    for weight_OI, given_OI in thirds:
        weight_OI[: stream.n, : stream.n] = given_OI
    for bias_O, given_O in zip(ours.qkv.bias.chunk(3), theirs.qkv.bias.chunk(3), strict=True):
        bias_O.zero_()
        bias_O[: stream.n] = given_O
    inner = len(theirs.fc1.bias)
    ours.fc1.weight[:inner, : stream.n] = theirs.fc1.weight
    ours.fc1.bias.zero_()
    ours.fc1.bias[:inner] = theirs.fc1.bias
    for linear, given in ((ours.out, theirs.out), (ours.fc2, theirs.fc2)):
        linear.weight.zero_()
        linear.weight[:, : given.weight.shape[1]] = stream.written(given.weight)
        linear.bias.copy_(stream.written(given.bias))


def _grow_head(ours: LanguageModelHead, theirs: LanguageModelHead, stream: _Stream) -> None:
    # The head's norm follows a GELU: no product can write the mean there. Whole copies keep it, and its variance.
    for start, end in pairwise((*range(0, stream.N, stream.n), stream.N)):
        ours.dense.weight[start:end, : stream.n] = theirs.dense.weight[: end - start]
        ours.dense.bias[start:end] = theirs.dense.bias[: end - start]
    # The last product is with the embedding, which is `scale` times what it was.
    ours.norm.weight.zero_()
    ours.norm.weight[: stream.n] = theirs.norm.weight / stream.scale
    ours.norm.bias.zero_()
    ours.norm.bias[: stream.n] = theirs.norm.bias / stream.scale
    ours.bias.copy_(theirs.bias)


def _check(small: Encoder, large: Encoder) -> None:
    if small.head is None:
        message = f"{small.name} has no language-model head: nothing to begin {large.name} with"
        raise InputError(message)
    ours, theirs = large.config, small.config
    grows = all(getattr(ours, name) >= getattr(theirs, name) for name in ("layers", "width", "feedforward"))
    stays = all(
        getattr(ours, name) == getattr(theirs, name) for name in ("head_width", "layer_norm_eps", "token_dropout")
    )
    if large.head is None or not grows or not stays:
        message = (
            f"{large.name} ({_shape(large)}) cannot begin as {small.name} ({_shape(small)}): it needs a language-model "
            "head, no less of anything, and as wide heads, the same epsilon and token dropout"
        )
        raise InputError(message)


def _shape(encoder: Encoder) -> str:
    config = encoder.config
    return (
        f"{config.layers} layers, {config.width} wide, {config.heads} heads of {config.head_width}, "
        f"{config.feedforward} in its feed-forward"
    )
