"""A decoder whose products run in int8: four a layer and the head, all else in fp32.

The scheme is the encoder's, see `quantise`: the weights of causal attention add up to one, too. The head, which in a
small decoder over byte pairs is most of the work, is one more product; its input is moved before it is rounded.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from ..kernels.add_norm import add_norm
from ..kernels.bias_gelu import Move
from ..kernels.product import Product
from ..kernels.varlen_attention import varlen_attention
from .decoder import Decoder, DecoderLayer, pack_ids
from .errors import InputError
from .quantise import Int8Model, QuantisedLinear, calibration_proteins, channel_scales, fill_layer

_HEAD_MIGRATION = 0.5
"""How much of a channel's spread goes over to the head's weights, see `quantise`."""


class QuantisedDecoder(Int8Model, Decoder):
    """A decoder made by `quantised_decoder`: int8 products, for inference on a CPU.

    Attributes:
        head: the language-model head's product.
    """

    head: QuantisedLinear

    def head_product(self, hidden_ND: torch.Tensor) -> Product:
        move = self.head.move
        assert move is not None
        return self.head.product(hidden_ND * move.times_F - move.minus_F)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        product = self.head_product(hidden_ND)
        # One pass in C++ in the place of six in torch, each over all of the vocabulary.
        zeros_NV = torch.zeros(product.values_NO.shape, dtype=torch.float32)
        return add_norm(zeros_NV, product, None, dtype=torch.float32)[0]


@torch.no_grad()
def quantised_decoder(decoder: Decoder) -> QuantisedDecoder:
    """The same decoder with its products in int8; the given one is left as it is.

    Takes one pass of the fp32 model over the made-up proteins. The fingerprint stays, since it names the fp32 weights.

    Args:
        decoder: fp32, on the CPU.

    Raises:
        InputError: it is on another device, in another precision, or its weights are not finite.
    """
    if isinstance(decoder, QuantisedDecoder) or decoder.dtype != torch.float32 or decoder.device.type != "cpu":
        message = f"{decoder.name} is {decoder.precision} on {decoder.device}: int8 is made of an fp32 model on the CPU"
        raise InputError(message)
    with torch.device("meta"):
        result = QuantisedDecoder(
            decoder.config, decoder.vocabulary, name=decoder.name, fingerprint=decoder.fingerprint
        )
    result.embed_tokens = copy.deepcopy(decoder.embed_tokens)
    result.embed_places = copy.deepcopy(decoder.embed_places)
    result.final_norm = copy.deepcopy(decoder.final_norm)
    inputs, hidden_TD = _inputs(decoder)
    try:
        for own, given, seen in zip(result.layers, decoder.layers, inputs, strict=True):
            fill_layer(own, given, seen)
        _fill_head(result, decoder, hidden_TD)
    except ValueError as error:
        message = f"{decoder.name} cannot run in int8: {error}"
        raise InputError(message) from error
    result.requires_grad_(False)
    return result.eval()


def _inputs(decoder: Decoder) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """What each layer's products meet on the made-up proteins, and the hidden states: plain fp32, layer by layer."""
    config = decoder.config
    batch = pack_ids([decoder.vocabulary.encode(protein)[: config.places] for protein in calibration_proteins()])
    places_T = torch.cat([torch.arange(length) for length in batch.lengths_B])
    x_TD = decoder.embed_tokens(batch.tokens_T) + decoder.embed_places(places_T)
    seen = []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        inputs = {"qkv": layer.attention_norm(x_TD)}
        q, k, v = layer.qkv(inputs["qkv"]).view(len(x_TD), 3 * config.heads, config.head_width).chunk(3, dim=1)
        inputs["out"] = varlen_attention(q, k, v, batch.cu_seqlens, batch.lengths_B, causal=True).flatten(1)
        x_TD = x_TD + layer.out(inputs["out"])
        inputs["fc1"] = layer.feedforward_norm(x_TD)
        inputs["fc2"] = F.gelu(layer.fc1(inputs["fc1"]), approximate="tanh")
        x_TD = x_TD + layer.fc2(inputs["fc2"])
        seen.append(inputs)
    return seen, decoder.final_norm(x_TD)


def _fill_head(result: QuantisedDecoder, decoder: Decoder, hidden_TD: torch.Tensor) -> None:
    weight_VD = decoder.embed_tokens.weight
    std_D, mean_D = torch.std_mean(hidden_TD, dim=0)
    scale_D = channel_scales(weight_VD, std_D, _HEAD_MIGRATION)
    move = Move(1 / scale_D, mean_D / scale_D)
    result.head = QuantisedLinear(weight_VD * scale_D, weight_VD @ mean_D, move=move)
