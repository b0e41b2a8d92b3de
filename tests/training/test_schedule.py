"""The learning rate over a run, and random streams that never meet."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from protnest.training.schedule import learning_rate_at
from protnest.training.streams import Stream, stream, torch_seed


def _rates(steps: int, warmup: int, peak: float = 0.5, schedule: str = "linear") -> list[float]:
    return [
        learning_rate_at(step, peak=peak, warmup_steps=warmup, steps=steps, schedule=schedule)
        for step in range(steps + 1)
    ]


def test_it_rises_and_falls_in_straight_lines() -> None:
    rates = _rates(100, 20)
    assert rates[0] == pytest.approx(0.5 / 20)
    np.testing.assert_allclose(np.diff(rates[:20]), 0.5 / 20)
    assert max(rates) == rates[19] == rates[20] == 0.5
    np.testing.assert_allclose(np.diff(rates[20:]), -0.5 / 80)
    assert rates[99] == pytest.approx(0.5 / 80)
    assert rates[100] == 0


def test_without_warm_up_and_with_little_else() -> None:
    assert _rates(4, 0, 2e-3) == pytest.approx([2e-3, 1.5e-3, 1e-3, 0.5e-3, 0])
    # A warm-up longer than the run: it never gets to the peak.
    assert _rates(4, 10, 2e-3) == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 0])


def test_cosine_falls_as_a_cosine() -> None:
    rates = _rates(100, 20, schedule="cosine")
    assert rates[:20] == _rates(100, 20)[:20]
    expected = [0.25 * (1 + math.cos(math.pi * (step - 20) / 80)) for step in range(20, 101)]
    np.testing.assert_allclose(rates[20:], expected, atol=1e-12)
    assert rates[60] == pytest.approx(0.25)
    assert rates[30] > _rates(100, 20)[30]


def test_constant_stays() -> None:
    assert _rates(10, 2, schedule="constant") == pytest.approx([0.25, *[0.5] * 10])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule is 'step'; allowed: linear, cosine, constant"):
        _rates(4, 0, schedule="step")


def test_streams_never_meet() -> None:
    """NumPy pads keys with zeros: the order of epoch 1 and the masks of step 0 used to be drawn from one stream."""
    keys = [(purpose, *place) for purpose in Stream for place in itertools.product(range(3), repeat=2)]
    drawn = {stream(0, *key).integers(2**63) for key in keys} | {stream(1, *key).integers(2**63) for key in keys}
    assert len(drawn) == 2 * len(keys)
    assert min(Stream) > 0, "a purpose of 0 would be the padding"
    assert torch_seed(3, Stream.TORCH, 1, 2) == torch_seed(3, Stream.TORCH, 1, 2) != torch_seed(3, Stream.TORCH, 2, 1)
