"""Landscapes: what they hold, what follows from it, and what is refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.engine.landscape import Landscape
from protnest.engine.palette import CHEMISTRY, COLOURS

from support.landscapes import make_landscape


def test_own_residues() -> None:
    landscape = make_landscape("MXK")
    assert landscape.length == 3
    own = [(int(site), AMINO_ACIDS[acid]) for site, acid in np.argwhere(landscape.own_LA)]
    assert own == [(0, "M"), (2, "K")]
    assert np.isnan(landscape.substitutions_LA[landscape.own_LA]).all()
    assert np.array_equal(landscape.substitutions_LA[~landscape.own_LA], landscape.scores_LA[~landscape.own_LA])


def test_mean_ignores_the_own_residue_and_what_is_unknown() -> None:
    scores_LA = np.full((3, 20), np.nan, dtype=np.float32)
    scores_LA[0, AMINO_ACIDS.index("A")] = 0
    scores_LA[0, AMINO_ACIDS.index("C")] = -3
    scores_LA[0, AMINO_ACIDS.index("W")] = -1
    scores_LA[1, AMINO_ACIDS.index("G")] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        landscape = make_landscape("AGK", scores_LA=scores_LA, entropy_L=None)
        assert landscape.mean_L.dtype == np.float32
        assert landscape.mean_L[0] == -2
        assert np.isnan(landscape.mean_L[1:]).all()
    assert landscape.known_L.tolist() == [True, False, False]
    entropy_L = np.array([np.nan, 1.5, np.nan], dtype=np.float32)
    assert make_landscape("AGK", scores_LA=scores_LA, entropy_L=entropy_L).known_L.tolist() == [True, True, False]


def test_names_count_from_first() -> None:
    assert make_landscape().name(3, "G") == "A4G"
    assert make_landscape(first=331).name(0, "P") == "M331P"


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ([], 1.0),
        ([0.0, 0.0], 1.0),
        ([2.4], 2.4),
        ([-2.41, 0.1], 2.4),  # its 98th percentile is 2.364
        ([-0.00123], 0.0013),
        ([123.0], 130.0),
        ([99.5], 100.0),
        ([-1.0] * 99 + [50.0], 1.0),  # an outlier
        ([0.0] * 99 + [5.0], 5.0),  # nothing else
    ],
)
def test_limit(values: list[float], limit: float) -> None:
    scores_LA = np.full((8, 20), np.nan, dtype=np.float32)
    places = np.argwhere(~make_landscape().own_LA)[: len(values)]
    for (site, acid), value in zip(places, values, strict=True):
        scores_LA[site, acid] = value
    assert make_landscape(scores_LA=scores_LA).limit == limit


def test_limit_ignores_the_own_residue() -> None:
    own_LA = make_landscape().own_LA
    assert make_landscape(scores_LA=np.where(own_LA, np.float32(0), np.float32(-3))).limit == 3
    assert make_landscape(scores_LA=np.where(own_LA, np.float32(9), np.float32(-3))).limit == 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"wild_type": "MKTAYIAJ"}, "wild_type: expected at least one residue and none but LAGV"),
        ({"wild_type": "mKTAYIAK"}, "got 'm'"),
        ({"wild_type": ""}, "got ''"),
        ({"wild_type": "MKTAYIA"}, "scores_LA: expected float32 (7, 20), got float32 (8, 20)"),
        ({"scores_LA": np.zeros((8, 20))}, "scores_LA: expected float32 (8, 20), got float64 (8, 20)"),
        ({"given_LA": np.zeros((20, 8), dtype=bool)}, "given_LA: expected bool (8, 20), got bool (20, 8)"),
        ({"given_LA": np.zeros((8, 20), dtype=np.uint8)}, "given_LA: expected bool (8, 20), got uint8 (8, 20)"),
        ({"entropy_L": np.zeros(7, dtype=np.float32)}, "entropy_L: expected float32 (8,), got float32 (7,)"),
    ],
)
def test_landscapes_that_cannot_be(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        make_landscape(**{**_fields(make_landscape()), **changes})


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_numbers_are_refused(value: float) -> None:
    scores_LA = make_landscape().scores_LA.copy()
    scores_LA[2, 7] = value
    with pytest.raises(ValueError, match=re.escape(f"scores_LA: {value} at (2, 7); only finite numbers")):
        make_landscape(scores_LA=scores_LA)
    entropy_L = np.full(8, value, dtype=np.float32)
    with pytest.raises(ValueError, match=re.escape(f"entropy_L: {value} at (0,)")):
        make_landscape(entropy_L=entropy_L)


def _fields(landscape: Landscape) -> dict[str, Any]:
    return {name: getattr(landscape, name) for name in landscape.__dataclass_fields__}


def test_palette_is_diverging_and_groups_are_complete() -> None:
    def luminance(colour: str) -> float:
        red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2

    brightness = [luminance(colour) for colour in COLOURS]
    middle = len(COLOURS) // 2
    assert len(COLOURS) % 2 == 1
    assert brightness[: middle + 1] == sorted(brightness[: middle + 1])
    assert brightness[middle:] == sorted(brightness[middle:], reverse=True)
    assert sorted("".join(acids for _, acids in CHEMISTRY)) == sorted(AMINO_ACIDS)
