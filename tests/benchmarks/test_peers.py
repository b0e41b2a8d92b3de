"""peers: all engines say the same with the same weights, whatever the batches; who meets whom; how batches are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from protnest.benchmarks import peers
from protnest.benchmarks.parity import ALLOWED, check_parity
from protnest.benchmarks.peers import FAIR_ESM, TRANSFORMERS, Lineup, build_lineup, sorted_batches
from protnest.engine.config import EncoderConfig

from support.tiny import random_proteins

TINY = EncoderConfig(layers=2, width=48, heads=2, feedforward=192)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lineup() -> Lineup:
    pytest.importorskip("esm")
    pytest.importorskip("transformers")
    return build_lineup(TINY, seed=0, precisions=["fp32", "bf16"], device=CPU)


def test_all_engines_agree_whatever_the_batches(lineup: Lineup) -> None:
    proteins = [*random_proteins(9, seed=1), "M", "MKXBUZO"]
    expected = lineup.reference.embed(proteins, 1)
    assert {(engine.name, engine.precision) for engine in lineup.engines} == {
        *(("protnest", "fp32"), ("protnest", "bf16"), ("fair-esm", "fp32")),
        *(("transformers", "fp32"), ("transformers", "bf16")),
    }
    for engine in lineup.engines:
        for budget in (1, 64, 10_000):
            vectors = engine.embed(proteins, budget)
            assert vectors.dtype == np.float32
            check_parity(engine.name, engine.precision, expected, vectors)


def test_weights_hide_nothing(lineup: Lineup) -> None:
    """Proteins differ; so do a protein and itself with two residues exchanged, by a thousand times fp32's errors."""
    first, turned, other = lineup.reference.embed(["MKTAYIAKQR", "KMTAYIAKQR", "GSHMLEDPWV"], 1)
    norm = np.linalg.norm(first)
    assert np.linalg.norm(first - other) > 0.2 * norm
    assert np.linalg.norm(first - turned) > 1000 * ALLOWED["fp32"] * norm


def test_rotary_frequencies_of_transformers_stay_fp32(lineup: Lineup) -> None:
    (bf16,) = [peer for peer in lineup.peers if (peer.name, peer.precision) == (TRANSFORMERS, "bf16")]
    assert {parameter.dtype for parameter in bf16._model.parameters()} == {torch.bfloat16}
    assert bf16._model.rotary_embeddings.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        ("fp32", {"fair-esm fp32": ["fp32", "bf16"], "transformers fp32": ["fp32"], "transformers bf16": ["bf16"]}),
        ("bf16", {"fair-esm fp32": ["fp32", "bf16"], "transformers fp32": ["fp32"], "transformers bf16": ["bf16"]}),
    ],
)
def test_like_meets_like_and_default_meets_default(
    lineup: Lineup, default: str, expected: dict[str, list[str]]
) -> None:
    here = Lineup(ours=lineup.ours, peers=lineup.peers, reference=lineup.reference, default_precision=default)
    met = {f"{peer.name} {peer.precision}": [own.precision for own in here.rivals(peer)] for peer in here.peers}
    assert met == expected


def test_a_peer_without_a_like_still_meets_ours(lineup: Lineup) -> None:
    here = Lineup(ours=lineup.ours[1:], peers=lineup.peers, reference=lineup.reference, default_precision="fp32")
    fair = next(peer for peer in here.peers if peer.name == FAIR_ESM)
    assert [own.precision for own in here.rivals(fair)] == ["bf16"]


@pytest.mark.parametrize("missing", [{TRANSFORMERS}, {FAIR_ESM}, {FAIR_ESM, TRANSFORMERS}])
def test_packages_that_are_missing_are_left_out(missing: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: name not in missing)
    here = build_lineup(TINY, seed=0, precisions=["fp32"], device=CPU)
    assert {peer.name for peer in here.peers} == {FAIR_ESM, TRANSFORMERS} - missing
    assert here.reference.precision == "fp32"
    proteins = random_proteins(3, seed=2)
    check_parity("protnest", "fp32", here.reference.embed(proteins, 64), here.ours[0].embed(proteins, 64))


def test_different_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_all_but_one(source: torch.nn.Module, target: torch.nn.Module, layers: int) -> None:
        real(source, target, layers)
        with torch.no_grad():
            target.layers[1].fc2.bias[5] += 1e-6  # type: ignore[index,union-attr]

    real = peers._copy_to_fair_esm
    monkeypatch.setattr(peers, "_copy_to_fair_esm", copy_all_but_one)
    with pytest.raises(RuntimeError, match="the engines' weights differ"):
        build_lineup(TINY, seed=0, precisions=["fp32"], device=CPU)


def test_sorted_batches_keep_to_the_padded_budget() -> None:
    lengths = [30, 7, 100, 7, 64, 12, 5, 33]
    batches = sorted_batches(lengths, 64)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 64
    assert all(len(batch) == 1 for batch in sorted_batches(lengths, 1))
    assert sorted_batches([], 64) == []
