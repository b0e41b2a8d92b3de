"""ESM-2 models with hostile random weights, and what fair-esm's own code says about them.

Hostile: LayerNorm weights of both signs and not one, biases with a mean, token embeddings whose rows differ a
hundredfold in scale, and queries and keys large enough for attention to be far from uniform.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import esm.multihead_attention
import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2
from protnest.engine import Encoder, from_fair_esm

ALPHABET: Any = Alphabet.from_architecture("ESM-1b")


def hostile_esm2(layers: int, width: int, heads: int, *, seed: int = 0) -> Any:
    """A fair-esm ESM-2 of these sizes with hostile weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    model = ESM2(layers, width, heads, ALPHABET).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if "layer_norm" in name and name.endswith("weight"):
                signs = torch.where(uniform(*shape) < 0.3, -1.0, 1.0)
                parameter.copy_(signs * (0.3 + 1.7 * uniform(*shape)))
            elif name.endswith("bias"):
                parameter.copy_(0.2 + 0.5 * normal(*shape))
            elif name.startswith("embed_tokens"):
                parameter.copy_(0.2 + normal(*shape) * 10 ** (2 * uniform(shape[0], 1) - 1))
            else:
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(normal(*shape) * gain / shape[1] ** 0.5)
    return model


def hostile_encoder(layers: int, width: int, heads: int, *, seed: int = 0) -> Encoder:
    """The same model as an `Encoder`, with a language-model head."""
    return from_fair_esm(hostile_esm2(layers, width, heads, seed=seed), ALPHABET)


def fair_esm_outputs(model: Any, tokens_by_sequence: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What fair-esm says, one sequence at a time: "layer 0" to "layer N" and "logits", packed like our batches."""
    layers = range(model.num_layers + 1)
    by_sequence = []
    with torch.no_grad():
        for tokens_L in tokens_by_sequence:
            output = model(tokens_L[None].long(), repr_layers=layers)
            tensors = {f"layer {layer}": output["representations"][layer][0] for layer in layers}
            by_sequence.append(tensors | {"logits": output["logits"][0]})
    return {name: torch.cat([tensors[name] for tensors in by_sequence]) for name in by_sequence[0]}


@contextmanager
def in_fp64(model: Any) -> Iterator[Any]:
    """A copy of a fair-esm model that is fp64 from end to end for as long as the context is open.

    `model.double()` alone is not: fair-esm takes the softmax of attention in fp32 whatever the model's dtype, and keeps
    the rotary tables of the last length it saw. Rotary frequencies stay the fp32 numbers that ESM-2 was trained with.
    """
    twin = copy.deepcopy(model).double()
    for layer in twin.layers:
        layer.self_attn.rot_emb._seq_len_cached = None

    def softmax(x: torch.Tensor, dim: int, onnx_trace: bool = False) -> torch.Tensor:
        return x.softmax(dim)

    with mock.patch.object(esm.multihead_attention, "utils_softmax", softmax):
        yield twin


def fair_esm_content(model: Any, **settings: object) -> dict[str, Any]:
    """What a published `.pt` file holds for this model; `settings` replace those of its `cfg`."""
    stated = {
        "encoder_layers": model.num_layers,
        "encoder_embed_dim": model.embed_dim,
        "encoder_attention_heads": model.attention_heads,
        "token_dropout": model.token_dropout,
    }
    tensors = {
        ("encoder." if name.startswith("lm_head.") else "encoder.sentence_encoder.") + name: tensor
        for name, tensor in model.state_dict().items()
        # The contact head's weights are published in a file of their own.
        if not name.startswith("contact_head.")
    }
    return {"cfg": {"model": argparse.Namespace(**(stated | settings))}, "model": tensors}


def assert_same_encoder(got: Encoder, wanted: Encoder) -> None:
    """Same architecture, same parameters bit for bit, same fingerprint."""
    assert got.config == wanted.config
    state, expected = got.state_dict(), wanted.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert got.fingerprint is not None
    assert got.fingerprint == wanted.fingerprint
