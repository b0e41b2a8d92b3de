"""How the next token is chosen: options, and each sequence's random numbers; tests/kernels/test_next_token.py has the
choice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.engine.sampling import SamplingOptions, uniform_numbers
from protnest.kernels.next_token import Filters


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


def test_filters_are_the_options() -> None:
    options = SamplingOptions(temperature=0.7, top_k=11, top_p=0.9, repetition_penalty=1.3)
    assert options.filters() == Filters(temperature=0.7, top_k=11, top_p=0.9, repetition_penalty=1.3)
    assert SamplingOptions().filters() == Filters(1.0, 950, None, 1.2)
    assert SamplingOptions(top_k=None).filters().top_k is None
