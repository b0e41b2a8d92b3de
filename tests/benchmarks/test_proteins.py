"""proteins: the mixes have the lengths that they say."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.benchmarks.proteins import MAX_RESIDUES, MIXES, make_up_mix


@pytest.mark.parametrize(
    ("mix", "median", "spread"), [("uniprot", 330, 300), ("uniform", 256, 0), ("antibody", 120, 5)]
)
def test_lengths_are_the_mixes(mix: str, median: int, spread: float) -> None:
    proteins = make_up_mix(mix, count=2000, seed=0)
    lengths = np.array(list(map(len, proteins.sequences)))
    low, middle, high = np.quantile(lengths, [0.16, 0.5, 0.84])
    assert middle == pytest.approx(median, rel=0.05)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.2)
    assert lengths.max() <= MAX_RESIDUES
    assert set("".join(proteins.sequences)) == set("ACDEFGHIKLMNPQRSTVWY")
    assert proteins.residues == lengths.sum()


@pytest.mark.parametrize("mix", MIXES)
def test_the_seed_decides(mix: str) -> None:
    one, again, other = (make_up_mix(mix, count=5, seed=seed).sequences for seed in (3, 3, 4))
    assert one == again != other


def test_an_unknown_mix_is_refused() -> None:
    with pytest.raises(ValueError, match="mix is 'equal', expected one of uniprot, uniform, antibody"):
        make_up_mix("equal", count=1, seed=0)
