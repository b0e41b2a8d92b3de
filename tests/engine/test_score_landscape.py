"""Landscapes from scoring runs, beside their definition written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from protnest.engine.alphabet import AMINO_ACIDS, TOKEN_IDS, TOKENS
from protnest.engine.assay import Target
from protnest.engine.landscape import Landscape
from protnest.engine.score_landscape import Sightings
from protnest.engine.score_state import Values

from support.assays import open_assays, write_tables

WILD_TYPE = "MXTAUK"
TARGET = Target(id="one", sequence=WILD_TYPE)
PLACES = [0, 1, 3, 4]


def seen(folder: Path, mutants: str, scores: list[float]) -> Sightings:
    (path,) = write_tables(folder, {"x.csv": f"mutant\n{mutants}"})
    (assay,) = open_assays([path], {"one": WILD_TYPE})
    entries = list(assay.entries())
    sightings = Sightings()
    half = len(entries) // 2
    for part in (slice(None, half), slice(half, None)):
        sightings.see(entries[part], np.array(scores[part], dtype=np.float32))
    return sightings


def landscape(
    sightings: Sightings, values: list[Values] | None, places: list[int] = PLACES, **changes: object
) -> Landscape:
    fields: dict[str, object] = {"aggregate": "mean", "method": "masked-marginal", "model": "tiny", "offset": 0}
    return sightings.landscape(TARGET, places, values, **{**fields, **changes})  # type: ignore[arg-type]


def logits(models: int) -> list[Values]:
    rng = np.random.default_rng(3)
    return [rng.normal(0, 4, (len(PLACES), len(TOKENS))).astype(np.float32) for _ in range(models)]


def test_given_are_singles_that_rows_name(tmp_path: Path) -> None:
    sightings = seen(tmp_path, "M1A\nWT\nT3C:A4G\nA4A\nX2W\nU5U\n", [1, 0, 5, 0.5, 2, 0])
    found = landscape(sightings, None)
    given = {(0, "A"), (3, "A"), (1, "W")}
    assert {(int(site), AMINO_ACIDS[acid]) for site, acid in np.argwhere(found.given_LA)} == given
    known = np.argwhere(~np.isnan(found.scores_LA))
    assert {(int(site), AMINO_ACIDS[acid]) for site, acid in known} == given
    assert [found.scores_LA[site, AMINO_ACIDS.index(acid)] for site, acid in [(0, "A"), (3, "A"), (1, "W")]] == [
        1,
        0.5,
        2,
    ]
    assert found.entropy_L is None
    assert (found.target, found.wild_type, found.method, found.model) == ("one", WILD_TYPE, "masked-marginal", "tiny")
    assert sightings.targets == [TARGET]


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("aggregate", ["mean", "median", "min", "max"])
def test_touched_sites_tell_of_all_acids(tmp_path: Path, models: int, aggregate: str) -> None:
    values = logits(models)
    found = landscape(seen(tmp_path, "M1A\nX2A\nA4C\nU5C\n", [9, 9, 9, 9]), values, aggregate=aggregate)
    assert found.entropy_L is not None
    for site in range(len(WILD_TYPE)):
        if site not in PLACES:
            assert np.isnan(found.scores_LA[site]).all()
            assert np.isnan(found.entropy_L[site])
            continue
        rows = [[float(value) for value in each[PLACES.index(site)]] for each in values]
        for acid, letter in enumerate(AMINO_ACIDS):
            gains = [row[TOKEN_IDS[letter]] - row[TOKEN_IDS[WILD_TYPE[site]]] for row in rows]
            expected = {"mean": sum(gains) / len(gains), "min": min(gains), "max": max(gains)}
            expected["median"] = sorted(gains)[len(gains) // 2]
            assert found.scores_LA[site, acid] == pytest.approx(expected[aggregate], rel=1e-6, abs=1e-6)
        entropies = []
        for row in rows:
            sizes = [math.exp(row[TOKEN_IDS[letter]]) for letter in AMINO_ACIDS]
            shares = [size / sum(sizes) for size in sizes]
            entropies.append(-sum(share * math.log(share) for share in shares))
        assert found.entropy_L[site] == pytest.approx(sum(entropies) / models, rel=1e-5)
    given = {(0, "A"), (1, "A"), (3, "C"), (4, "C")}
    assert {(int(site), AMINO_ACIDS[acid]) for site, acid in np.argwhere(found.given_LA)} == given
    assert found.scores_LA.dtype == found.entropy_L.dtype == np.float32


def test_logits_of_any_size_have_an_entropy(tmp_path: Path) -> None:
    values = [np.full((4, len(TOKENS)), 1e4, dtype=np.float32)]
    values[0][1, TOKEN_IDS["W"]] = 2e4
    found = landscape(seen(tmp_path, "M1A\n", [1]), values)
    assert found.entropy_L is not None
    np.testing.assert_allclose(found.entropy_L[[0, 1, 3]], [math.log(20), 0, math.log(20)], rtol=1e-6)


def test_wild_types_alone_know_nothing(tmp_path: Path) -> None:
    found = landscape(seen(tmp_path, "WT\n", [0]), [np.empty((0, 0), dtype=np.float32)], places=[])
    assert np.isnan(found.scores_LA).all()
    assert found.entropy_L is not None
    assert np.isnan(found.entropy_L).all()


@pytest.mark.parametrize("offset", [0, 23, -1])
def test_residues_are_numbered_as_tables_do(tmp_path: Path, offset: int) -> None:
    assert landscape(seen(tmp_path, "M1A\n", [1]), None, offset=offset).name(2, "G") == f"T{3 + offset}G"


def test_targets_of_one_sequence_are_apart(tmp_path: Path) -> None:
    (path,) = write_tables(tmp_path, {"x.csv": "target,mutant\nb,M1A\na,M1C\nb,K2A\n"})
    (assay,) = open_assays([path], {"a": "MK", "b": "MK"})
    sightings = Sightings()
    sightings.see(list(assay.entries()), np.array([1, 2, 3], dtype=np.float32))
    assert [target.id for target in sightings.targets] == ["b", "a"]
    assert [
        int(sightings.landscape(target, [], None, aggregate="mean", method="", model="", offset=0).given_LA.sum())
        for target in sightings.targets
    ] == [2, 1]
