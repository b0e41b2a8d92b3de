"""Hits of profiles: a family's own, strangers, files that are none."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.training import hmm_hits as module
from protnest.training.hmm_hits import build_profile, hit_rows, hmm_hits, read_profile

from support.predictors import Followed
from support.shared_data import shared_path, shared_sequences
from support.tiny import LETTERS, random_proteins

pytest.importorskip("pyhmmer")

_RNG = np.random.default_rng(0)
ANCESTOR = "".join(_RNG.choice(LETTERS, size=120))
FAMILY = [
    "".join(str(_RNG.choice(LETTERS)) if _RNG.random() < 0.2 else letter for letter in ANCESTOR) for _ in range(20)
]
STRANGERS = ["".join(_RNG.choice(LETTERS, size=120)) for _ in range(30)]


def _alignment(path: Path, rows: list[str] = FAMILY) -> Path:
    path.write_text("".join(f">row{number}\n{row}\n" for number, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_profile(_alignment(tmp_path_factory.mktemp("family") / "made.afa"))


def test_a_family_is_recognised_and_strangers_are_not(profile: Any) -> None:
    found = hmm_hits(profile, [*STRANGERS, *FAMILY], reference=FAMILY)
    assert found.hits.value == 20 / 50
    assert found.hits.low < 0.4 < found.hits.high  # type: ignore[operator]
    assert found.reference is not None
    assert found.reference.value == 1.0
    assert found.shuffled.value == 0.0
    assert (found.hits.n, found.reference.n, found.shuffled.n) == (50, 20, 50)
    assert found.shuffled.high > 0  # type: ignore[operator]
    assert (found.profile, found.columns, found.evalue) == ("made", 120, 1e-5)
    assert hmm_hits(profile, FAMILY).reference is None


def test_rows_keep_their_places(profile: Any) -> None:
    mixed = [STRANGERS[0], FAMILY[0], STRANGERS[1], FAMILY[1], FAMILY[0]]
    assert hit_rows(profile, mixed) == {1, 3, 4}


def test_a_verdict_does_not_depend_on_the_company(profile: Any) -> None:
    """With E-values that grow with the number of sequences, it would."""
    rng = np.random.default_rng(3)
    distant = []
    for share in np.linspace(0.3, 0.9, 61):
        distant.append("".join(str(rng.choice(LETTERS)) if rng.random() < share else letter for letter in ANCESTOR))
    alone = {row for row, each in enumerate(distant) if hit_rows(profile, [each])}
    among = hit_rows(profile, [*distant, *random_proteins(2000, seed=77)])
    assert alone == among
    assert 5 < len(alone) < 55
    assert len(hit_rows(profile, distant, evalue=1e-15)) < len(alone) < len(hit_rows(profile, distant, evalue=10.0))


@pytest.mark.parametrize("residues", [1, 500, 100_000])
def test_neither_do_blocks_matter(profile: Any, residues: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever follows is told of every residue that is searched."""
    monkeypatch.setattr(module, "_BLOCK_RESIDUES", residues)
    mixed, seen = [*STRANGERS[:7], *FAMILY, *STRANGERS[7:]], Followed()
    found = hmm_hits(profile, mixed, reference=FAMILY, follower=seen)
    assert hit_rows(profile, mixed) == set(range(7, 27))
    assert (found.hits.value, found.shuffled.value) == (0.4, 0.0)
    assert found.reference is not None
    assert found.reference.value == 1.0
    assert seen.stages == [("searching 50 designs", 120 * 120)]
    assert sum(seen.told[0]) == 120 * 120
    assert len(seen.told[0]) == {1: 120, 500: 24, 100_000: 3}[residues]


def test_no_sequences(profile: Any) -> None:
    assert hit_rows(profile, []) == set()


def test_all_letters_can_be_searched(profile: Any) -> None:
    changed = "XBZUO.-" + FAMILY[0]
    assert hit_rows(profile, [changed, "XXXX"]) == {0}


@pytest.mark.parametrize("packed", [False, True])
def test_profiles_are_read_from_files(profile: Any, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / ("made.hmm.gz" if packed else "made.hmm")
    with gzip.open(path, "wb") if packed else path.open("wb") as file:
        profile.write(file)
    again = read_profile(path)
    assert hit_rows(again, [*FAMILY, *STRANGERS]) == hit_rows(profile, [*FAMILY, *STRANGERS]) == set(range(20))


def test_stockholm(tmp_path: Path) -> None:
    path = tmp_path / "made.sto"
    rows = "".join(f"row{number} {row}\n" for number, row in enumerate(FAMILY))
    path.write_text(f"# STOCKHOLM 1.0\n\n{rows}//\n")
    assert hit_rows(build_profile(path), [*STRANGERS, *FAMILY[:3]]) == {30, 31, 32}


def test_profiles_that_are_none(profile: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.hmm: there is no profile file"):
        read_profile(tmp_path / "none.hmm")
    for text in ("", "hello", ">a\nMKT\n"):
        (tmp_path / "bad.hmm").write_text(text)
        with pytest.raises(InputError, match=r"bad\.hmm: is no HMMER profile"):
            read_profile(tmp_path / "bad.hmm")
    (tmp_path / "bad.hmm").write_bytes(b"\xff\xfe\x00\x01" * 40)
    with pytest.raises(InputError, match="is no HMMER profile"):
        read_profile(tmp_path / "bad.hmm")
    with (tmp_path / "two.hmm").open("wb") as file:
        profile.write(file)
        profile.write(file)
    with pytest.raises(InputError, match="holds 2 profiles, expected one"):
        read_profile(tmp_path / "two.hmm")


def test_a_profile_of_nucleotides(tmp_path: Path) -> None:
    from pyhmmer.easel import Alphabet, TextSequence
    from pyhmmer.plan7 import Background, Builder

    dna: Any = Alphabet.dna()
    sequence = TextSequence(name=b"gene", sequence="ACGTTGCAAC" * 5).digitize(dna)
    hmm = Builder(dna).build(sequence, Background(dna))[0]
    with (tmp_path / "dna.hmm").open("wb") as file:
        hmm.write(file)
    with pytest.raises(InputError, match="is a profile of DNA, expected amino acids"):
        read_profile(tmp_path / "dna.hmm")


def test_alignments_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no alignment file"):
        build_profile(tmp_path / "none.afa")
    with pytest.raises(InputError, match=r"ends in '\.txt'; alignments end in \.a2m, \.afa"):
        build_profile(_alignment(tmp_path / "rows.txt"))
    with pytest.raises(InputError, match="holds 1 sequences: a family's profile needs at least two"):
        build_profile(_alignment(tmp_path / "one.afa", FAMILY[:1]))
    (tmp_path / "empty.afa").write_text("")
    with pytest.raises(InputError, match=r"holds 0 sequences|is no alignment"):
        build_profile(tmp_path / "empty.afa")
    with pytest.raises(InputError, match="is no alignment in the format afa"):
        build_profile(_alignment(tmp_path / "ragged.afa", ["MKT", "MKTAYIAK"]))
    with pytest.raises(InputError, match="is no alignment in the format stockholm"):
        build_profile(_alignment(tmp_path / "rows.sto"))
    with pytest.raises(InputError, match="gives no profile"):
        build_profile(_alignment(tmp_path / "gaps.afa", ["-----", "-----"]))


def test_without_pyhmmer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read in (read_profile, build_profile):
        with pytest.raises(InputError, match=r"need pyhmmer: pip install 'protnest\[eval\]'"):
            read(tmp_path / "x")


def test_real_families() -> None:
    """A profile of TEM-1's homologues knows class A beta-lactamases, and neither lysozymes nor random sequences."""
    family = build_profile(shared_path("families/BLAT_ECOLX_homologs.a2m.gz"))
    own = shared_sequences("families/swissprot_beta_lactamase.fasta.gz")
    others = shared_sequences("families/swissprot_lysozyme.fasta.gz")
    found = hmm_hits(family, own, reference=others)
    assert found.columns == pytest.approx(263, abs=10)
    # The set holds classes B to D too, which are of other folds.
    assert 0.4 < found.hits.value < 0.8  # type: ignore[operator]
    assert found.shuffled.value == 0.0
    assert found.reference is not None
    assert found.reference.value == 0.0
