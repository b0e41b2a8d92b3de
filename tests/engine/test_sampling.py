"""The next token: every penalty and filter against transformers' and a literal reference, choices, random numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError
from protnest.engine.sampling import SamplingOptions, choose, largest, next_probabilities, uniform_numbers


def _logits(B: int, V: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((B, V), generator=generator) * 3 + 0.5


def _dense(ids_BK: torch.Tensor, p_BK: torch.Tensor, V: int) -> torch.Tensor:
    return torch.zeros((len(ids_BK), V), dtype=torch.float64).scatter_(1, ids_BK, p_BK)


def _literal(logits_V: torch.Tensor, seen: list[int], forbidden: list[int], options: SamplingOptions) -> list[float]:
    """One sequence, in plain Python, term by term."""
    scores = [float(value) for value in logits_V]
    for token in set(seen):
        value = scores[token]
        scores[token] = value * options.repetition_penalty if value < 0 else value / options.repetition_penalty
    for token in forbidden:
        scores[token] = -math.inf
    scores = [value / options.temperature for value in scores]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    kept = order[: options.top_k]
    most = max(scores[token] for token in kept)
    weight = {token: math.exp(scores[token] - most) for token in kept}
    total = sum(weight.values())
    if options.top_p is not None:
        held, few = 0.0, []
        for token in kept:
            if held >= options.top_p:
                break
            few.append(token)
            held += weight[token] / total
        weight = {token: weight[token] for token in few}
        total = sum(weight.values())
    return [weight.get(token, 0.0) / total for token in range(len(scores))]


CHOICES = [
    SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    for temperature, top_k, top_p, penalty in itertools.product(
        (0.5, 1.0, 1.7), (None, 1, 5), (None, 0.3, 0.9), (1, 1.2, 0.8)
    )
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: f"{options}".partition("(")[2])
def test_probabilities(options: SamplingOptions) -> None:
    logits_BV = _logits(3, 40)
    seen_BT = torch.tensor([[1, 2, 2, 1], [5, 39, 0, 7], [3, 3, 3, 3]])
    mask_V = torch.zeros(40, dtype=torch.bool)
    mask_V[[4, 8, 15]] = True
    ids_BK, p_BK = next_probabilities(logits_BV, seen_BT, [None, mask_V, None], options)
    assert p_BK.dtype == torch.float64
    assert bool((ids_BK.diff(dim=1) > 0).all())
    got = _dense(ids_BK, p_BK, 40)
    for row, forbidden in enumerate(([], [4, 8, 15], [])):
        expected = _literal(logits_BV[row], seen_BT[row].tolist(), forbidden, options)
        np.testing.assert_allclose(got[row].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", CHOICES[::4], ids=lambda options: f"{options}".partition("(")[2])
def test_probabilities_are_those_of_transformers(options: SamplingOptions) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits_BV, seen_BT = _logits(2, 300, seed=1), torch.tensor([[1, 2, 9], [5, 299, 0]])
    steps: list[Any] = [process.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))]
    steps.append(process.TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        steps.append(process.TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        steps.append(process.TopPLogitsWarper(options.top_p))
    scores = logits_BV.clone()
    for step in steps:
        scores = step(seen_BT, scores)
    got = _dense(*next_probabilities(logits_BV, seen_BT, [None, None], options), 300)
    np.testing.assert_allclose(got.numpy(), scores.softmax(dim=1).double().numpy(), rtol=0, atol=1e-5)


def test_logits_are_left_alone() -> None:
    logits_BV = _logits(1, 30)
    before = logits_BV.clone()
    next_probabilities(logits_BV, torch.tensor([[1]]), [torch.arange(30) < 3], SamplingOptions())
    assert torch.equal(logits_BV, before)


@pytest.mark.parametrize("kind", ["random", "sorted", "spikes", "sampled spikes", "equal", "forbidden"])
@pytest.mark.parametrize("k", [1, 950, 2000])
def test_the_largest(kind: str, k: int) -> None:
    """Whatever the sample says, what is found is what torch finds."""
    scores = _logits(3, 50257)
    if kind == "sorted":
        scores = scores.sort(dim=1).values
    elif kind == "spikes":
        # All that matters lies where the sample does not look.
        scores[:, 1::16] += 30
    elif kind == "sampled spikes":
        scores[:, ::16] += 30
    elif kind == "equal":
        scores = scores.round()
    elif kind == "forbidden":
        scores[1, 500:] = -math.inf
    values, places = largest(scores, k)
    assert torch.equal(values, torch.topk(scores, k, dim=1).values)
    assert torch.equal(scores.gather(1, places), values)
    assert all(len(set(row)) == k for row in places.tolist())


def test_choices_follow_the_numbers() -> None:
    ids = torch.tensor([[2, 5, 7, 9]]).expand(5, 4)
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64).expand(5, 4)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.999999], dtype=torch.float64)
    assert choose(ids, p, uniform).tolist() == [2, 2, 7, 7, 9]


def test_a_share_of_nothing_is_never_chosen() -> None:
    p = torch.tensor([[0.5, 0.5 - 1e-17, 0.0]], dtype=torch.float64)
    last = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose(torch.tensor([[1, 2, 3]]), p, last).tolist() == [2]


def test_choices_have_the_distribution() -> None:
    ids_BK, p_BK = next_probabilities(_logits(1, 20), torch.tensor([[3]]), [None], SamplingOptions(top_k=6))
    count = 20_000
    chosen = choose(ids_BK.expand(count, -1), p_BK.expand(count, -1), torch.from_numpy(uniform_numbers(1, 2, count)))
    got = torch.bincount(chosen, minlength=20).double() / count
    expected = _dense(ids_BK, p_BK, 20)[0]
    assert float((got - expected).abs().max()) < 4 * math.sqrt(0.25 / count)


def test_random_numbers_are_a_sequences_own() -> None:
    first = uniform_numbers(0, 0, 100)
    assert np.array_equal(first[:50], uniform_numbers(0, 0, 50))
    others = [uniform_numbers(0, 1, 100), uniform_numbers(1, 0, 100), uniform_numbers(2**63, 5, 100)]
    assert all(abs(np.corrcoef(first, other)[0, 1]) < 0.4 for other in others)
    assert 0 <= first.min() < first.max() < 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a number above 0"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        SamplingOptions(**given)
