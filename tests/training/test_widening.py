"""A wide encoder that begins as a narrow one."""

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
from protnest.training.students import initialise
from protnest.training.widening import widen

from support.learning import toy_encoder

NARROW = EncoderConfig(layers=2, width=16, heads=2, feedforward=24)
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDF", "GSHM"]


def _trained(config: EncoderConfig = NARROW, seed: int = 3) -> Encoder:
    """With no weight at the value that it has before training: all that can go wrong shows."""
    encoder = Encoder(config, name="narrow")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(shift + 0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder


def _wide(copies: int, **changes: Any) -> Encoder:
    shape = replace(NARROW, width=16 * copies, heads=2 * copies, feedforward=24 * copies)
    encoder = Encoder(replace(shape, **changes), name="wide")
    initialise(encoder, 0)
    return encoder


def _answers(encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    assert encoder.head is not None
    with torch.no_grad():
        hidden_TD = encoder(pack(SEQUENCES)).hidden_TD
        return hidden_TD, encoder.head(hidden_TD, encoder.embed_tokens.weight)


@pytest.mark.parametrize("copies", [2, 3])
def test_a_wide_encoder_begins_with_the_narrow_ones_answers(copies: int) -> None:
    narrow, wide = _trained().double(), _wide(copies).double()
    assert widen(narrow, wide, seed=0) == copies
    hidden_TD, logits_TV = _answers(narrow)
    wide_hidden_TD, wide_logits_TV = _answers(wide)
    torch.testing.assert_close(wide_hidden_TD, hidden_TD.repeat(1, copies), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide_logits_TV, logits_TV, rtol=1e-4, atol=1e-4)


def test_copies_part_when_they_are_trained() -> None:
    wide = _wide(2)
    widen(_trained(), wide, seed=0)
    hidden_TD = wide(pack(SEQUENCES)).hidden_TD
    assert wide.head is not None
    wide.head(hidden_TD, wide.embed_tokens.weight).logsumexp(1).sum().backward()
    for name, parameter in wide.named_parameters():
        assert parameter.grad is not None
        if name.startswith("head."):
            # The head's copies go to equal columns of the embedding, which part in the first step.
            continue
        # Queries', keys' and values' copies lie within their own third.
        thirds = parameter.grad.chunk(3) if ".qkv." in name else (parameter.grad,)
        for third in thirds:
            first, second = third.chunk(2, dim=1 if name == "embed_tokens.weight" else 0)
            assert not torch.allclose(first, second, rtol=0.05), name


def test_noise_follows_from_the_seed() -> None:
    first, same, other = (_wide(2) for _ in range(3))
    for encoder, seed in ((first, 1), (same, 1), (other, 2)):
        widen(_trained(), encoder, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.layers[0].fc1.weight, other.layers[0].fc1.weight)


@pytest.mark.parametrize(
    "changes", [{"layers": 3}, {"heads": 2}, {"feedforward": 40}, {"layer_norm_eps": 1e-6}, {"width": 40}]
)
def test_other_shapes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=re.escape("wide cannot begin as narrow (2 layers, 16 wide, 2 heads, 24 in its")
    ):
        widen(_trained(), _wide(2, **changes), seed=0)


def test_no_wider_is_refused() -> None:
    with pytest.raises(InputError, match="needs the same layers, and 2, 3"):
        widen(_trained(), _wide(1), seed=0)


def test_an_encoder_without_head_is_refused() -> None:
    headless = toy_encoder(0)
    headless.head = None
    with pytest.raises(InputError, match="has no language-model head: nothing to begin wide with"):
        widen(headless, _wide(2), seed=0)
