"""Grams: sums equal to direct ones, merged, resumed and selected; passes over files, killed and refused.

Shapes: R rows, Z all models' widths together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine import Encoder, InputError
from protnest.engine.chain import ChainModel
from protnest.training.corpus import is_held_out
from protnest.training.gram import Gram, GramPair
from protnest.training.gram_pass import PassOptions, accumulate, chain_models, run_pass

from support.families import tiny_family
from support.tiny import random_proteins, write_fasta

FAMILY = tiny_family()
PROTEINS = random_proteins(700, seed=3, longest=30)


def _rows(R: int, Z: int = 7, *, seed: int = 0) -> torch.Tensor:
    """Correlated rows whose mean is ten thousand deviations."""
    generator = torch.Generator().manual_seed(seed)
    mixed = (
        torch.randn((R, Z), generator=generator, dtype=torch.float64)
        @ torch.randn((Z, Z), generator=generator).double()
    )
    return mixed + 1e4


def _assert_same(one: Gram, other: Gram, tolerance: float = 1e-11) -> None:
    assert one.count == other.count
    for got, wanted in ((one.mean_Z, other.mean_Z), (one.scatter_ZZ, other.scatter_ZZ)):
        assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def _pair(sequences: list[str]) -> GramPair:
    pair = GramPair.empty(chain_models(FAMILY))
    accumulate(FAMILY, sequences, pair, max_tokens=512)
    return pair


def test_batches_add_up_to_the_direct_sums() -> None:
    rows_RZ = _rows(1000)
    gram = Gram(7)
    for batch in rows_RZ.split([1, 0, 300, 1, 698]):
        gram.add(batch)
    assert gram.count == 1000
    torch.testing.assert_close(gram.mean_Z, rows_RZ.mean(0), rtol=1e-14, atol=0)
    # With the mean in the sums and not beside them, eight of sixteen digits would be gone.
    torch.testing.assert_close(gram.covariance_ZZ, torch.cov(rows_RZ.T, correction=0), rtol=1e-9, atol=1e-9)


def test_merged_halves_equal_one_pass() -> None:
    rows_RZ = _rows(1000)
    whole, first, second = Gram(7), Gram(7), Gram(7)
    whole.add(rows_RZ)
    first.add(rows_RZ[:300])
    second.add(rows_RZ[300:])
    first.merge(second)
    _assert_same(first, whole)
    empty = Gram(7)
    empty.merge(whole)
    whole.merge(Gram(7))
    _assert_same(empty, whole)
    with pytest.raises(ValueError, match="widths 7 and 3 cannot be merged"):
        whole.merge(Gram(3))


def test_pairs_of_two_halves_merge_to_one_pass() -> None:
    whole, first, second = _pair(PROTEINS), _pair(PROTEINS[:250]), _pair(PROTEINS[250:])
    first.merge(second)
    _assert_same(first.train, whole.train)
    _assert_same(first.held_out, whole.held_out)
    assert first.sequences == whole.sequences
    other = GramPair.empty(
        [ChainModel(name="a", width=3, max_residues=9), ChainModel(name="b", width=4, max_residues=9)]
    )
    with pytest.raises(
        InputError, match="Grams of other models cannot be merged: tiny16, tiny24, tiny40 here, a, b there"
    ):
        first.merge(other)


def test_residues_alone_and_each_share_by_hash() -> None:
    """Against each encoder's own answer for each protein, cut to the shortest of the models' lengths."""
    pair = _pair(PROTEINS)
    wanted = GramPair.empty(chain_models(FAMILY))
    for sequence in PROTEINS:
        rows = torch.cat([torch.from_numpy(encoder.encode([sequence[:20]])[0]) for encoder in FAMILY], dim=1)
        (wanted.held_out if is_held_out(sequence, every=10) else wanted.train).add(rows)
    _assert_same(pair.train, wanted.train, 1e-5)
    _assert_same(pair.held_out, wanted.held_out, 1e-5)
    held_out = sum(is_held_out(sequence, every=10) for sequence in PROTEINS)
    assert pair.sequences == (700 - held_out, held_out)
    assert 40 <= held_out <= 100


def test_selecting_models_is_a_pass_with_these_alone() -> None:
    alone = GramPair.empty(chain_models([FAMILY[0], FAMILY[2]]))
    accumulate([FAMILY[0], FAMILY[2]], [sequence[:20] for sequence in PROTEINS], alone, max_tokens=512)
    chosen = _pair([sequence[:20] for sequence in PROTEINS]).select([0, 2])
    assert chosen.models == alone.models
    _assert_same(chosen.train, alone.train)


def test_saved_pair_comes_back(tmp_path: Path) -> None:
    pair = _pair(PROTEINS[:50])
    pair.data = {"file": "x"}
    pair.save(tmp_path / "gram")
    again = GramPair.load(tmp_path / "gram")
    _assert_same(again.train, pair.train, 0)
    _assert_same(again.held_out, pair.held_out, 0)
    assert (again.models, again.sequences, again.data) == (pair.models, pair.sequences, pair.data)


def test_memory_does_not_grow_with_the_sequences(tmp_path: Path) -> None:
    sizes = []
    for count in (50, 700):
        _pair(PROTEINS[:count]).save(tmp_path / "gram")
        sizes.append((tmp_path / "gram").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 64


@pytest.mark.parametrize("size", [0, 10, -8])
def test_damaged_state_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "gram"
    _pair(PROTEINS[:50]).save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=rf"{path}: not a readable Gram file"):
        GramPair.load(path)


# Passes over files


class _Killed(BaseException):
    pass


def test_killed_pass_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.training.gram_pass._WINDOW_RECORDS", 100)
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS)
    options = PassOptions(max_tokens=256)
    whole = run_pass(FAMILY, fasta, tmp_path / "whole", options)
    left = 25

    def count(residues: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise _Killed

    with pytest.raises(_Killed):
        run_pass(FAMILY, fasta, tmp_path / "cut", options, save_every_s=0, after_batch=count)
    partial = GramPair.load(tmp_path / "cut")
    assert 0 < sum(partial.sequences) < 700
    started: list[tuple[int, ...]] = []
    run: list[int] = []
    resumed = run_pass(
        FAMILY, fasta, tmp_path / "cut", options, start=lambda *given: started.append(given), after_batch=run.append
    )
    _assert_same(resumed.train, whole.train, 0)
    _assert_same(resumed.held_out, whole.held_out, 0)
    residues = sum(min(20, len(sequence)) for sequence in PROTEINS)
    assert started == [(700, residues, partial.train.count + partial.held_out.count)]
    assert sum(run) == residues - started[0][2]
    run.clear()
    _assert_same(run_pass(FAMILY, fasta, tmp_path / "cut", options, after_batch=run.append).train, whole.train, 0)
    assert run == []


def test_first_sequences_alone(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS)
    pair = run_pass(FAMILY, fasta, tmp_path / "gram", PassOptions(sequences=90))
    assert sum(pair.sequences) == 90
    assert pair.data["file"] == "in.fasta"


@pytest.mark.parametrize("change", ["models", "sequences", "max_tokens", "file"])
def test_state_of_another_pass(tmp_path: Path, change: str) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS[:40])
    run_pass(FAMILY, fasta, tmp_path / "gram", PassOptions())
    if change == "file":
        write_fasta(fasta, PROTEINS[1:41])
    options: dict[str, Any] = {"sequences": 30} if change == "sequences" else {}
    options |= {"max_tokens": 99} if change == "max_tokens" else {}
    with pytest.raises(InputError, match="is of another pass"):
        run_pass(FAMILY[:2] if change == "models" else FAMILY, fasta, tmp_path / "gram", PassOptions(**options))


def test_models_that_make_no_chain(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS[:5])
    nameless: list[Encoder] = tiny_family()[:2]
    nameless[1].fingerprint = None
    for encoders, problem in (
        (FAMILY[::-1], "widths must grow along a chain: tiny40 has 40, tiny24 after it 24"),
        ([FAMILY[0], FAMILY[0]], "widths must grow along a chain: tiny16 has 16, tiny16 after it 16"),
        (FAMILY[:1], "a chain takes at least two models, got 1"),
        (nameless, "tiny24 has no hash: a chain is fitted on models that were read from checkpoints"),
    ):
        with pytest.raises(InputError, match=problem):
            run_pass(encoders, fasta, tmp_path / "gram")


@pytest.mark.parametrize("name", ["sequences", "max_tokens"])
def test_wrong_options(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be positive, got 0"):
        PassOptions(**{name: 0})
