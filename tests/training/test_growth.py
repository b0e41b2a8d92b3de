"""A large encoder that begins as a small one."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from protnest.engine import InputError
from protnest.engine.config import EncoderConfig
from protnest.engine.encoder import Encoder
from protnest.engine.packing import pack
from protnest.training.growth import grow
from protnest.training.students import initialise

from support.learning import toy_encoder

SMALL = EncoderConfig(layers=2, width=16, heads=2, feedforward=24)
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDF", "GSHM"]
SHAPES = [
    {"width": 32, "heads": 4, "feedforward": 48},
    {"width": 48, "heads": 6, "feedforward": 72},
    {"width": 32, "heads": 4},
    {"feedforward": 25},
    {"layers": 5},
    {"layers": 3, "width": 64, "heads": 8, "feedforward": 30},
    {},
]


def _trained(config: EncoderConfig = SMALL, seed: int = 3) -> Encoder:
    """With no weight at the value that it has before training: all that can go wrong shows."""
    encoder = Encoder(config, name="small")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.2
            parameter.copy_(shift + 0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder.double()


def _large(seed: int = 0, **changes: Any) -> Encoder:
    encoder = Encoder(replace(SMALL, **changes), name="large")
    initialise(encoder, seed)
    return encoder.double()


def _answers(encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        hidden_TD = encoder(pack(SEQUENCES)).hidden_TD
        return hidden_TD, encoder.logits(hidden_TD)


@pytest.mark.parametrize("changes", SHAPES)
def test_a_large_encoder_begins_with_the_small_ones_answers(changes: dict[str, Any]) -> None:
    small, large = _trained(), _large(**changes)
    grow(small, large)
    hidden_TD, logits_TV = _answers(small)
    large_hidden_TD, large_logits_TV = _answers(large)
    torch.testing.assert_close(large_hidden_TD[:, :16], hidden_TD, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(large_hidden_TD[:, 16:], torch.zeros_like(large_hidden_TD[:, 16:]), rtol=0, atol=1e-9)
    torch.testing.assert_close(large_logits_TV, logits_TV, rtol=1e-9, atol=1e-9)


def test_part_of_a_copy_says_nearly_the_same() -> None:
    small, large = _trained(), _large(width=24, heads=3, layers=3)
    grow(small, large)
    hidden_TD, logits_TV = _answers(small)
    large_hidden_TD, large_logits_TV = _answers(large)
    torch.testing.assert_close(large_hidden_TD[:, :16], hidden_TD, rtol=1e-9, atol=1e-9)
    differs = (large_logits_TV.softmax(1) - logits_TV.softmax(1)).abs().sum(1) / 2
    assert 1e-6 < differs.mean() < 0.1


def test_all_that_is_new_learns() -> None:
    small, large = _trained(), _large(layers=3, width=32, heads=4, feedforward=40)
    grow(small, large)
    adam = torch.optim.Adam(large.parameters(), lr=1e-3)
    for _ in range(3):
        before = {name: parameter.detach().clone() for name, parameter in large.named_parameters()}
        adam.zero_grad()
        (large.logits(large(pack(SEQUENCES)).hidden_TD).logsumexp(1) ** 2).sum().backward()
        adam.step()
    for name, parameter in large.named_parameters():
        moved = (parameter.detach() - before[name]).ne(0)
        # Token rows that no sequence has get a gradient through the head alone; keys' biases get none at all.
        if name.endswith("qkv.bias"):
            moved = torch.cat(moved.chunk(3)[::2])
        assert moved.all(), name


def test_fresh_weights_are_the_large_ones_own() -> None:
    first, same, other = (_large(seed, width=32, heads=4, feedforward=48) for seed in (1, 1, 2))
    for encoder in (first, same, other):
        grow(_trained(), encoder)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.layers[0].fc1.weight, other.layers[0].fc1.weight)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 1},
        {"width": 8, "heads": 1},
        {"width": 32},
        {"feedforward": 23},
        {"layer_norm_eps": 1e-6},
        {"token_dropout": False},
    ],
)
def test_other_shapes_are_refused(changes: dict[str, Any]) -> None:
    message = "cannot begin as small (2 layers, 16 wide, 2 heads of 8, 24 in its feed-forward): it needs a language-"
    with pytest.raises(InputError, match=re.escape(message)):
        grow(_trained(), _large(**changes))


def test_a_large_encoder_without_head_is_refused() -> None:
    large = _large()
    large.head = None
    with pytest.raises(InputError, match="it needs a language-model head"):
        grow(_trained(), large)


def test_an_encoder_without_head_is_refused() -> None:
    headless = toy_encoder(0)
    headless.head = None
    with pytest.raises(InputError, match="has no language-model head: nothing to begin large with"):
        grow(headless, _large())
