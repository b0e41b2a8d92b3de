"""Scores of variants: every method beside fair-esm's own code in fp64, long proteins, ensembles, what is
run and what is not, real scans.

Shapes: L residues, N variants, M models.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from protnest.engine import Encoder, InputError, from_fair_esm, load_model, score_variants
from protnest.engine.alphabet import AMINO_ACIDS, TOKEN_IDS
from protnest.engine.packing import PackedBatch
from protnest.engine.quantise import quantised
from protnest.engine.queries import Query, QueryRunner, token_ids
from protnest.engine.scoring import (
    METHODS,
    SITE_METHODS,
    aggregate_scores,
    marginals,
    mutant_marginals,
    pseudo_log_likelihoods,
    site_logits,
)
from protnest.engine.variants import Variant, parse_variant, read_scan, read_wild_type, variant_of_sequence

from support.esm2_models import ALPHABET
from support.score_reference import ScoreReference, score_reference, scoring_model
from support.shared_data import REAL_8M_MLM, shared_path

ESM2_8M = (6, 320, 20)
SMALL = (2, 32, 2)
LONGEST = 60
"""Residues that the small models take at once."""
TOLERANCE = 1e-4

WILD_TYPE = "MKTAYIAKQRXGLUWCDEFHNPSV"
SUBSTITUTIONS = [
    "M1A",
    "V24A",
    "A4G",
    "A7G",
    "A4C",
    "A4G",
    "A4G:A7C",
    "A7C:A4G",
    "X11K",
    "K2U:U14K:V24M",
    "WT",
    "A4A",
    "A4A:K2R",
    " m1w ",
    ":".join(f"{letter}{place}L" for place, letter in enumerate(WILD_TYPE, start=1)),
]
INDELS = [WILD_TYPE[1:], WILD_TYPE[:5] + "GG" + WILD_TYPE[5:], "M", WILD_TYPE + "A", "AC" * 20]

# Models and references


@functools.cache
def _model(shape: tuple[int, int, int], seed: int = 0) -> Any:
    return scoring_model(*shape, seed=seed)


@functools.cache
def _encoder(shape: tuple[int, int, int] = SMALL, seed: int = 0, longest: int = LONGEST) -> Encoder:
    encoder = from_fair_esm(_model(shape, seed), ALPHABET)
    encoder.config = dataclasses.replace(encoder.config, max_residues=longest)
    return encoder


@pytest.fixture(scope="module")
def reference() -> Iterator[ScoreReference]:
    """Of the small model, whose runs are kept for the whole file."""
    with score_reference(_model(SMALL), max_residues=LONGEST) as reference:
        yield reference


def _sequence(name: str, wild_type: str) -> str:
    """What a name means, written out by another hand; each part is `A24G`."""
    letters = list(wild_type)
    for part in [] if name == "WT" else name.strip().upper().split(":"):
        assert letters[int(part[1:-1]) - 1] == part[0]
        letters[int(part[1:-1]) - 1] = part[-1]
    return "".join(letters)


def _gold(reference: ScoreReference, method: str, wild_type: str, names: Sequence[str]) -> npt.NDArray[np.float64]:
    return np.array([reference.score(method, wild_type, _sequence(name, wild_type)) for name in names])


def _check(got: npt.NDArray[np.float32], gold: Any, tolerance: float = TOLERANCE) -> None:
    assert (got.dtype, got.shape) == (np.float32, np.shape(gold))
    error = np.abs(got - np.asarray(gold))
    assert (error <= tolerance).all(), f"{int(error.argmax())}: {error.max():.3g}, {got} instead of {gold}"


def _protein(residues: int, seed: int = 0) -> str:
    return "".join(random.Random(f"{residues} {seed}").choices(AMINO_ACIDS, k=residues))


def _substitutions(wild_type: str, *sites: int) -> list[str]:
    """Each residue, counted from 0, alone, and all of them together; none becomes what it is."""
    names = [f"{wild_type[site]}{site + 1}{'W' if wild_type[site] != 'W' else 'A'}" for site in sites]
    return [*names, ":".join(names)]


# Beside fair-esm


@pytest.mark.parametrize("method", METHODS)
def test_methods_at_the_sizes_of_8m(method: str) -> None:
    wild_type = "MKTAYIAKQRWG"
    names = ["A4G", "K8W:M1L"] if method != "pseudo-ll" else ["G12P:M1L"]
    with score_reference(_model(ESM2_8M)) as reference:
        gold = _gold(reference, method, wild_type, names)
        assert np.abs(gold).min() > 100 * TOLERANCE
        _check(score_variants(_encoder(ESM2_8M, longest=1022), wild_type, names, method=method), gold)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: Any, reference: ScoreReference) -> None:
    """Singles, multiples, the wild type, nothing changed, duplicates: all in their places."""
    gold = _gold(reference, method, WILD_TYPE, SUBSTITUTIONS)
    got = score_variants(_encoder(), WILD_TYPE, SUBSTITUTIONS, method=method)
    _check(got, gold)
    assert np.abs(gold[:4]).min() > 100 * TOLERANCE
    assert got[SUBSTITUTIONS.index("WT")] == got[SUBSTITUTIONS.index("A4A")] == 0
    assert got[2] == got[5]
    np.testing.assert_allclose(got[6], got[7], rtol=1e-6)


def test_masked_marginal_is_the_default(reference: ScoreReference) -> None:
    gold = _gold(reference, "masked-marginal", WILD_TYPE, ["A4G"])
    _check(score_variants(_encoder(), WILD_TYPE, ["A4G"]), gold)


def test_pseudo_ll_takes_insertions_and_deletions(reference: ScoreReference) -> None:
    variants: list[str | Variant] = [variant_of_sequence(sequence, WILD_TYPE) for sequence in INDELS]
    gold = [reference.score("pseudo-ll", WILD_TYPE, sequence) for sequence in INDELS]
    got = score_variants(_encoder(), WILD_TYPE, [*variants, "A4G", "WT"], method="pseudo-ll")
    _check(got, [*gold, reference.score("pseudo-ll", WILD_TYPE, _sequence("A4G", WILD_TYPE)), 0.0])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "pseudo-ll"])
def test_other_methods_refuse_them(method: Any) -> None:
    message = (
        f"variant 'short' inserts or deletes residues, and {method} is defined for substitutions alone; pseudo-ll "
        "takes both"
    )
    short = variant_of_sequence(WILD_TYPE[2:], WILD_TYPE, name="short")
    with pytest.raises(InputError, match=re.escape(message)):
        score_variants(_encoder(), WILD_TYPE, ["A4G", short], method=method)


@pytest.mark.parametrize("method", METHODS)
def test_variants_of_sequences(method: Any) -> None:
    """A mutated sequence scores as its substitutions do; a masked letter is an X."""
    given = [variant_of_sequence(_sequence(name, WILD_TYPE).lower(), WILD_TYPE) for name in SUBSTITUTIONS]
    got = score_variants(_encoder(), WILD_TYPE, given, method=method)
    _check(got, score_variants(_encoder(), WILD_TYPE, SUBSTITUTIONS, method=method), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_masked_letters_are_x(method: Any, reference: ScoreReference) -> None:
    masked = parse_variant("K2J", WILD_TYPE, invalid="mask")
    gold = _gold(reference, method, WILD_TYPE, ["K2X"])
    _check(score_variants(_encoder(), WILD_TYPE, [masked], method=method), gold)


def test_the_published_pseudo_ppl(reference: ScoreReference) -> None:
    """Off by one, without the last two residues, and not beside the wild type's."""
    names = ["A4G", "WT", "V24A", "M1A:S23G", "A4G"]
    gold = [reference.pseudo_ppl(_sequence(name, WILD_TYPE)) for name in names]
    got = score_variants(_encoder(), WILD_TYPE, names, method="pseudo-ll", compat="fair-esm")
    _check(got, gold)
    assert gold[1] < -10
    # The letters of the first residue, and what follows the one before the last, are never masked.
    assert len(set(got.tolist())) == len(set(names))


@pytest.mark.parametrize("wild_type", ["MK", "M"])
def test_the_published_pseudo_ppl_of_nothing(wild_type: str) -> None:
    assert score_variants(_encoder(), wild_type, ["M1A"], method="pseudo-ll", compat="fair-esm").tolist() == [0.0]


# Long proteins


@pytest.mark.parametrize(
    ("residues", "method"),
    # A thousand copies for pseudo-ll of 500 residues take fair-esm's code three seconds, and go the ways of 121.
    [
        (residues, method)
        for residues in (LONGEST, LONGEST + 1, 119, 120, 121, 500)
        for method in METHODS
        if residues < 500 or method != "pseudo-ll"
    ],
)
def test_long_proteins(residues: int, method: Any, reference: ScoreReference) -> None:
    """Each site through the window in whose middle it lies: at both ends, where windows begin to move, in between."""
    wild_type = _protein(residues)
    half = LONGEST // 2
    sites = sorted({0, 1, half - 1, half, half + 1, residues // 2, residues - half, residues - half + 1, residues - 1})
    names = _substitutions(wild_type, *sites)
    if method == "pseudo-ll":
        names = names[-1:]
    gold = _gold(reference, method, wild_type, names)
    _check(score_variants(_encoder(), wild_type, names, method=method), gold)


@pytest.mark.parametrize("residues", [LONGEST, LONGEST + 1, 121])
def test_pseudo_log_likelihoods(residues: int, reference: ScoreReference) -> None:
    proteins = [_protein(residues, seed=1), _protein(7)]
    got = pseudo_log_likelihoods(QueryRunner(_encoder()), proteins)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, [reference.pseudo_log_likelihood(each) for each in proteins], rtol=0, atol=2e-4)


# How variants are given


@pytest.mark.parametrize("method", METHODS)
def test_offset_and_case(method: Any) -> None:
    plain = score_variants(_encoder(), WILD_TYPE, ["A4G", "K8R:M1A"], method=method)
    shifted = score_variants(_encoder(), f" {WILD_TYPE.lower()} ", ["a27g", "k31r:m24a"], method=method, offset=23)
    np.testing.assert_array_equal(shifted, plain)


@pytest.mark.parametrize("method", METHODS)
def test_no_variants(method: Any) -> None:
    scores = score_variants(_encoder(), WILD_TYPE, [], method=method)
    assert (scores.shape, scores.dtype) == ((0,), np.float32)


def _score(**changes: Any) -> npt.NDArray[np.float32]:
    given: dict[str, Any] = {"model": _encoder(), "wt": WILD_TYPE, "variants": ["A4G"]}
    return score_variants(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"variants": "A4G"}, TypeError, "is one string; pass a list"),
        (
            {"method": "masked"},
            ValueError,
            "method is 'masked'; allowed: masked-marginal, wt-marginal, mutant-marginal, pseudo-ll",
        ),
        (
            {"compat": "esm", "method": "pseudo-ll"},
            ValueError,
            "compat is 'esm' with pseudo-ll; it is None, or 'fair-esm' with pseudo-ll",
        ),
        ({"compat": "fair-esm"}, ValueError, "compat is 'fair-esm' with masked-marginal; it is None, or"),
        ({"aggregate": "sum"}, ValueError, "aggregate is 'sum'; allowed: mean, median, min, max"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be positive, got 0"),
        ({"model": []}, InputError, "no model is given"),
        ({"wt": ""}, InputError, "the sequence is empty"),
        ({"wt": "MK1"}, InputError, "'1' at residue 3 is not a residue"),
        ({"variants": ["A4G", "G4A"]}, InputError, "variant 'G4A': residue 4 of the wild type is A, not G"),
        ({"variants": ["A4*"]}, InputError, "variant 'A4*': '*' is a stop codon"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        _score(**changes)


def test_models_without_a_head(caplog: pytest.LogCaptureFixture) -> None:
    headless = Encoder(_encoder().config, head=False, name="headless")
    with pytest.raises(InputError, match="headless has no language-model head: its checkpoint holds the encoder alone"):
        _score(model=[_encoder(), headless])


def test_what_does_not_fit_is_said_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        message = "CUDA out of memory. Tried"
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(Encoder, "_run", run)
    with pytest.raises(InputError, match=r"^a run of 24 residues does not fit into the memory of cpu"):
        _score()


# Several models


@pytest.mark.parametrize("method", METHODS)
def test_ensembles(method: Any) -> None:
    models = [_encoder(seed=seed) for seed in range(3)]
    names = ["A4G", "WT", "K2R:A7C"]
    each = np.stack([score_variants(model, WILD_TYPE, names, method=method) for model in models])
    assert (np.ptp(each, axis=0)[[0, 2]] > 0.01).all()
    for aggregate, expected in (
        ("mean", (each[0].astype(float) + each[1] + each[2]) / 3),
        ("median", np.sort(each, axis=0)[1]),
        ("min", np.sort(each, axis=0)[0]),
        ("max", np.sort(each, axis=0)[2]),
    ):
        got = score_variants(models, WILD_TYPE, names, method=method, aggregate=aggregate)  # type: ignore[arg-type]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7, err_msg=aggregate)
    mean = score_variants(tuple(models), WILD_TYPE, names, method=method)
    np.testing.assert_allclose(mean, each.mean(0), rtol=1e-6, atol=1e-7)


def test_aggregates_by_hand() -> None:
    scores_MN = np.array([[1.0, -2.0], [3.0, 5.0], [8.0, 0.0], [2.0, 1.0]])
    expected = {"mean": [3.5, 1.0], "median": [2.5, 0.5], "min": [1.0, -2.0], "max": [8.0, 5.0]}
    for aggregate, row in expected.items():
        got = aggregate_scores(scores_MN, aggregate)
        assert (got.tolist(), got.dtype) == (row, np.float32)
    assert aggregate_scores(scores_MN).tolist() == expected["mean"]
    # Added up in fp64: 1e8 and what is left of it would be lost.
    assert aggregate_scores(np.array([[1e8], [1.0], [-1e8]], dtype=np.float32))[0] == np.float32(1 / 3)


# Precisions


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_precisions(precision: str, method: Any) -> None:
    """Close: rounding is a small share of what the variants differ by."""
    names = [f"{letter}{place}{other}" for place, letter in enumerate(WILD_TYPE, start=1) for other in "AW"]
    exact = score_variants(_encoder(), WILD_TYPE, names, method=method)
    rounded = quantised(_encoder()) if precision == "int8" else copy.deepcopy(_encoder()).to(torch.bfloat16)
    got = score_variants(rounded, WILD_TYPE, names, method=method)
    assert 0 < np.sqrt(np.mean((got - exact) ** 2)) < (0.1 if precision == "int8" else 0.05) * exact.std()
    assert np.corrcoef(got, exact)[0, 1] > 0.995


# What is run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Query]:
    """The queries that are run, one after another."""
    seen: list[Query] = []
    real = QueryRunner.run

    def run(self: QueryRunner, queries: Any, take: Any) -> None:
        def told() -> Iterator[Query]:
            for query in queries:
                seen.append(query)
                yield query

        real(self, told(), take)

    monkeypatch.setattr(QueryRunner, "run", run)
    return seen


REPEATED = ["A4G", "A4C", "K8R:A4G", "A4G:K8R", "WT", "A4G", "K8R:A4G:M1M"]


def test_masked_marginal_runs_a_copy_for_each_touched_site(asked: list[Query]) -> None:
    score_variants(_encoder(), WILD_TYPE, REPEATED)
    assert [(query.masked, query.places) for query in asked] == [(1, (1,)), (4, (4,)), (8, (8,))]
    assert all(query.tokens is asked[0].tokens for query in asked)


def test_wt_marginal_runs_the_wild_type_once(asked: list[Query]) -> None:
    score_variants(_encoder(), WILD_TYPE, REPEATED, method="wt-marginal")
    assert [(query.masked, query.places) for query in asked] == [(None, (1, 4, 8))]


def test_mutant_marginal_runs_distinct_mutants_once(asked: list[Query]) -> None:
    score_variants(_encoder(), WILD_TYPE, [*REPEATED, "A4A"], method="mutant-marginal")
    assert [(query.masked, sorted(query.places)) for query in asked] == [(None, [4]), (None, [4]), (None, [4, 8])]
    assert sorted(bytes(query.tokens) for query in asked) == sorted(
        bytes(token_ids(_sequence(name, WILD_TYPE))) for name in ("A4G", "A4C", "A4G:K8R")
    )


@pytest.mark.parametrize("variants", [REPEATED, [*REPEATED, "A4A"], REPEATED[:4]])
def test_pseudo_ll_runs_distinct_mutants_and_the_wild_type_once(variants: list[str], asked: list[Query]) -> None:
    score_variants(_encoder(), WILD_TYPE, variants, method="pseudo-ll")
    wanted = {_sequence(name, WILD_TYPE) for name in variants} | {WILD_TYPE}
    assert len(asked) == len(wanted) * len(WILD_TYPE) == 4 * 24
    runs = sorted((bytes(query.tokens), query.masked, query.places) for query in asked)
    assert runs == sorted(
        (bytes(token_ids(sequence)), place, (place,)) for sequence in wanted for place in range(1, len(WILD_TYPE) + 1)
    )
    assert len({id(query.tokens) for query in asked}) == len(wanted)


def test_the_published_pseudo_ppl_leaves_the_wild_type_out(asked: list[Query]) -> None:
    score_variants(_encoder(), WILD_TYPE, ["A4G", "A4G"], method="pseudo-ll", compat="fair-esm")
    assert [query.masked for query in asked] == list(range(1, len(WILD_TYPE) - 1))


def test_windows_are_shared(asked: list[Query]) -> None:
    """Sites that see the same window are asked for together, and its tokens are made once."""
    wild_type = _protein(200)
    names = _substitutions(wild_type, 0, 5, 29, 30, 100, 198, 199)
    score_variants(_encoder(), wild_type, names, method="wt-marginal")
    assert [query.places for query in asked] == [(1, 6, 30, 31), (31,), (59, 60)]
    asked.clear()
    score_variants(_encoder(), wild_type, names[-1:], method="mutant-marginal")
    assert [query.places for query in asked] == [(1, 6, 30, 31), (31,), (59, 60)]
    asked.clear()
    score_variants(_encoder(), wild_type, names)
    assert [query.masked for query in asked] == [1, 6, 30, 31, 31, 59, 60]
    assert len({id(query.tokens) for query in asked}) == 3
    assert all(len(query.tokens) == LONGEST + 2 for query in asked)
    asked.clear()
    score_variants(_encoder(), wild_type, ["WT"], method="pseudo-ll")
    assert [query.masked for query in asked] == [*range(1, 31), *[31] * 140, *range(31, 61)]
    assert len({bytes(query.tokens) for query in asked}) == 141


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("residues", [24, 75])
def test_progress_adds_up(residues: int, method: Any) -> None:
    wild_type = _protein(residues)
    names = _substitutions(wild_type, 0, 10, residues - 1)
    done: list[int] = []
    score_variants(_encoder(), wild_type, names, method=method, after_batch=done.append, max_tokens=200)
    windows = 1 if residues <= LONGEST else 2
    each = min(residues, LONGEST)
    if method in SITE_METHODS:
        assert sum(done) == each * (3 if method == "masked-marginal" else windows)
        return
    if method == "pseudo-ll":
        assert sum(done) == 5 * residues * each
    else:
        assert sum(done) == each * (3 + windows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("residues", [24, 70])
def test_batches_change_nothing(residues: int, method: Any) -> None:
    wild_type = _protein(residues)
    names = _substitutions(wild_type, *range(0, residues, 7))
    names = names[-1:] if method == "pseudo-ll" else names
    usual = score_variants(_encoder(), wild_type, names, method=method)
    for max_tokens in (1, 64, 333, 100_000):
        got = score_variants(_encoder(), wild_type, names, method=method, max_tokens=max_tokens)
        _check(got, usual, 1e-5 if method != "pseudo-ll" else 1e-6 * residues)


def test_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked copies share batches: 24 of 26 tokens in batches of 64."""
    sizes: list[int] = []
    real = Encoder.row_logits

    def row_logits(self: Encoder, batch: PackedBatch, chosen: Any) -> torch.Tensor:
        sizes.append(len(batch.lengths_B))
        return real(self, batch, chosen)

    monkeypatch.setattr(Encoder, "row_logits", row_logits)
    score_variants(_encoder(), WILD_TYPE, _substitutions(WILD_TYPE, *range(24)), max_tokens=64)
    assert sizes == [2] * 12


# Parts


@pytest.mark.parametrize("masked", [False, True])
def test_site_logits(masked: bool, reference: ScoreReference) -> None:
    """In the order of the places, as often as they are named."""
    places = [23, 0, 5, 0]
    logits_PV = site_logits(QueryRunner(_encoder()), WILD_TYPE, places, masked=masked)
    assert (logits_PV.shape, logits_PV.dtype) == ((4, 33), np.float32)
    got = torch.from_numpy(logits_PV).double().log_softmax(-1)
    for place, row_V in zip(places, got, strict=True):
        gold_V = reference.log_probabilities(WILD_TYPE, place, masked=masked)
        assert (row_V - gold_V).abs().max() <= TOLERANCE
    assert site_logits(QueryRunner(_encoder()), WILD_TYPE, [], masked=masked).shape[0] == 0


def test_marginals_by_hand() -> None:
    """Rows may lie in any order; a site that is replaced by itself adds nothing."""
    places = [5, 1, 3]
    logits_PV = np.arange(99, dtype=np.float32).reshape(3, 33) ** 2
    names = ["A4G:K2R", "I6L", "WT", "K2R:A4G", "A4A", "WT"]
    gain = {
        name: float(logits_PV[row, TOKEN_IDS[name[-1]]]) - float(logits_PV[row, TOKEN_IDS[name[0]]])
        for name, row in (("A4G", 2), ("K2R", 1), ("I6L", 0))
    }
    both = gain["A4G"] + gain["K2R"]
    variants = [parse_variant(name, "MKTAYIAK") for name in names]
    got = marginals(variants, "MKTAYIAK", places, logits_PV)
    assert (got.tolist(), got.dtype) == ([both, gain["I6L"], 0, both, 0, 0], np.float32)


def test_values_of_mutants(reference: ScoreReference) -> None:
    """pseudo-ll still lacks the wild type's; the published one does so for good."""
    variants = [parse_variant(name, WILD_TYPE) for name in ("A4G", "K2R:A7C")]
    runner = QueryRunner(_encoder())
    sequences = [variant.sequence for variant in variants]
    for got, expected in (
        (
            mutant_marginals(runner, variants, WILD_TYPE),
            [reference.score("mutant-marginal", WILD_TYPE, sequence) for sequence in sequences],
        ),
        (
            pseudo_log_likelihoods(runner, sequences),
            [reference.pseudo_log_likelihood(sequence) for sequence in sequences],
        ),
        (
            pseudo_log_likelihoods(runner, sequences, compat="fair-esm"),
            [reference.pseudo_ppl(sequence) for sequence in sequences],
        ),
    ):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


# Real scans


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks; equal numbers share the mean of theirs."""
    ranks = []
    for numbers in (first, second):
        _, place, counts = np.unique(np.asarray(numbers), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(
    ("scan", "expected"),
    [
        ("BLAT_ECOLX_Stiffler_2015", 0.333),
        ("PABP_YEAST_Melamed_2013_singles", 0.382),
        ("DLG4_RAT_McLaughlin_2012", 0.374),
    ],
)
def test_real_scans(scan: str, expected: float) -> None:
    encoder = load_model(shared_path(REAL_8M_MLM), device="cpu", precision="fp32")
    wild_type = read_wild_type(shared_path("dms/wt.fasta"), scan)
    variants, measured = read_scan(shared_path(f"dms/{scan}.csv.gz"), wild_type)
    scores = score_variants(encoder, wild_type, variants, method="wt-marginal")
    assert abs(_spearman(scores.tolist(), measured) - expected) <= 0.02
