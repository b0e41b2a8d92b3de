"""Ridge heads: what goes in comes out, what does not fit is named, and scores are the formula's, variant by variant.

Shapes: N variants, W width of the features.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from protnest.engine import Chain, Embedder, Encoder, InputError, ridge_head
from protnest.engine.alphabet import TOKEN_IDS
from protnest.engine.family import Family
from protnest.engine.ridge_head import RidgeHead, score_with_head, wild_type_hash
from protnest.engine.variants import Variant, parse_variant
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from support.families import models_of, random_chain, tiny_family

FAMILY = tiny_family()
CHAIN = random_chain(FAMILY)
WILD_TYPE = "MKTAYIAKQRQISFVKSHFS"
NAMES = ["A4G", "K2R:Q9E", "S20W", "T3T:K2R", "K2R", "A4G"]
VARIANTS = [parse_variant(name, WILD_TYPE) for name in NAMES]


def _head(
    models: int = 3,
    *,
    chain: Chain | None = CHAIN,
    pooling: str = "site",
    region: Any = None,
    wild_type: str = WILD_TYPE,
) -> RidgeHead:
    read = models_of(FAMILY[:models] if chain is not None else FAMILY[models - 1 : models])
    return RidgeHead(
        weight_W=np.random.default_rng(models).normal(size=read[-1].width),
        bias=0.75,
        pooling=pooling,
        models=read,
        strength=0.01,
        chain_fingerprint=None if chain is None else chain.fingerprint,
        data={
            "wild_type": {"residues": len(wild_type), "hash": wild_type_hash(wild_type)},
            "region": region,
            "spearman": None,
        },
    )


HEAD, RAW = _head(), _head(2, chain=None)


def _literally(
    head: RidgeHead, encoders: list[Encoder], variants: list[Variant], chain: Chain | None
) -> npt.NDArray[Any]:
    """Each variant by itself."""
    scores = []
    for variant in variants:
        rows = Embedder(encoders, chain=chain, pool="residue").embed([variant.sequence])[0]
        picked = rows if head.pooling == "mean" else np.array([rows[site] for site in variant.sites])
        scores.append(float(np.asarray(picked, dtype=np.float64).mean(0) @ head.weight_W + head.bias))
    return np.array(scores)


# Scores


@pytest.mark.parametrize("pooling", ["mean", "site"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "raw"])
def test_scores_are_the_formulas(pooling: str, nested: bool) -> None:
    head = _head(3, pooling=pooling) if nested else _head(2, chain=None, pooling=pooling)
    encoders, chain = (FAMILY, CHAIN) if nested else (FAMILY[1:2], None)
    scores = score_with_head(head, encoders, VARIANTS, chain=chain, wild_type=WILD_TYPE)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, _literally(head, encoders, VARIANTS, chain), rtol=1e-5, atol=1e-5)
    assert len(set(scores.tolist())) == (5 if pooling == "site" else 4), "T3T:K2R and K2R differ by their sites alone"


def test_each_mutant_is_embedded_once_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score_with_head(HEAD, FAMILY, VARIANTS, chain=CHAIN)
    ran: list[int] = []
    calls: list[int] = []
    embed_clean = Embedder.embed_clean

    def counted(self: Embedder, sequences: Any, **given: Any) -> Any:
        calls.append(len(sequences))
        return embed_clean(self, sequences, **given)

    monkeypatch.setattr(Embedder, "embed_clean", counted)
    monkeypatch.setattr(ridge_head, "_CHUNK_BYTES", 2 * 20 * 4 * HEAD.width)
    chunked = score_with_head(HEAD, FAMILY, VARIANTS * 3, chain=CHAIN, max_tokens=30, after_batch=ran.append)
    assert calls == [2, 2], "four distinct mutants, two at a time"
    assert ran == [20] * 4
    np.testing.assert_allclose(chunked, np.tile(whole, 3), rtol=1e-5)
    monkeypatch.setattr(ridge_head, "_CHUNK_BYTES", 1)
    score_with_head(HEAD, FAMILY, VARIANTS, chain=CHAIN)
    assert calls[2:] == [1] * 4, "one at least"


def test_no_variant() -> None:
    assert score_with_head(HEAD, FAMILY, [], chain=CHAIN).shape == (0,)


def test_only_the_models_that_the_width_needs_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of two models, with all three of the chain at hand."""
    head = _head(2)
    wanted = score_with_head(head, FAMILY[:2], VARIANTS, chain=CHAIN)
    monkeypatch.setattr(FAMILY[2], "forward", lambda *_: pytest.fail("the largest model ran"))
    monkeypatch.setattr(FAMILY[2], "stream", lambda *_: pytest.fail("the largest model ran"))
    assert np.array_equal(score_with_head(head, Family.of(FAMILY), VARIANTS, chain=CHAIN), wanted)


def test_a_long_protein_runs_in_windows() -> None:
    """45 residues with models of at most 20 to 30, windows of which overlap."""
    protein = "MKTAYIAKQRQISFVKSHFSACDEFGHIKLMNPQRSTVWYMKTAY"
    variants = [parse_variant(name, protein) for name in ("M1A", "D23E:Y45F")]
    head = _head(3, wild_type=protein)
    scores = score_with_head(head, FAMILY, variants, chain=CHAIN)
    np.testing.assert_allclose(scores, _literally(head, FAMILY, variants, CHAIN), rtol=1e-4)


def test_without_sites() -> None:
    wild = Variant(name="wild type", sites=(), sequence=WILD_TYPE)
    shorter = Variant(name="A4del", sites=(), sequence=WILD_TYPE[:3] + WILD_TYPE[4:])
    for variant in (wild, shorter):
        with pytest.raises(
            InputError, match=rf"'{variant.name}' has no substituted site.* --save-pooling mean takes it"
        ):
            score_with_head(HEAD, FAMILY, [VARIANTS[0], variant], chain=CHAIN)
    head = _head(3, pooling="mean")
    scores = score_with_head(head, FAMILY, [wild, shorter], chain=CHAIN, wild_type=WILD_TYPE)
    np.testing.assert_allclose(scores, _literally(head, FAMILY, [wild, shorter], CHAIN), rtol=1e-5)


def test_a_region_is_what_the_models_see() -> None:
    part, shift = WILD_TYPE[2:12], 2
    inside = [parse_variant(name, WILD_TYPE) for name in ("T3A", "A4G", "I12V")]
    alone = [parse_variant(f"{v.name[0]}{int(v.name[1:-1]) - shift}{v.name[-1]}", part) for v in inside]
    scores = score_with_head(_head(region=[3, 12]), FAMILY, inside, chain=CHAIN, wild_type=WILD_TYPE)
    assert np.array_equal(scores, score_with_head(_head(wild_type=part), FAMILY, alone, chain=CHAIN, wild_type=part))
    with pytest.raises(InputError, match="'S13A': residue 13 lies outside of 3 to 12"):
        _head(region=[3, 12]).check_variants([inside[0], parse_variant("S13A", WILD_TYPE)])
    shorter = Variant(name="A4del", sites=(), sequence=WILD_TYPE[:3] + WILD_TYPE[4:])
    with pytest.raises(
        InputError, match=r"'A4del' has 19 residues, the wild type 20: a head .* region 3-12 takes subst"
    ):
        _head(region=[3, 12], pooling="mean").check_variants([shorter])


def test_another_wild_type() -> None:
    with pytest.raises(InputError, match=r"fitted on variants of another protein: of 20 residues .* got 21 residues"):
        score_with_head(HEAD, FAMILY, VARIANTS, chain=CHAIN, wild_type=WILD_TYPE + "A")
    with pytest.raises(InputError, match="got 20 residues"):
        HEAD.check_variants(VARIANTS, wild_type="A" + WILD_TYPE[1:])


def test_scores_that_are_not_finite() -> None:
    broken = copy.deepcopy(FAMILY[1])
    with torch.no_grad():
        broken.embed_tokens.weight[TOKEN_IDS["E"]] = torch.inf
    assert np.isfinite(score_with_head(RAW, broken, [VARIANTS[0]])).all()
    with pytest.raises(InputError, match="variant 'K2R:Q9E': its score is not finite: fp16 ends at 65,504"):
        score_with_head(RAW, broken, VARIANTS)


def test_predict_takes_rows_of_its_width() -> None:
    features = np.random.default_rng(0).normal(size=(3, 40))
    scores = HEAD.predict(features.astype(np.float32))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, features @ HEAD.weight_W + 0.75, rtol=1e-5)
    for shape in ((40,), (3, 39), (1, 3, 40)):
        with pytest.raises(ValueError, match=re.escape(f"features have shape {shape}, expected (N, 40)")):
            HEAD.predict(np.zeros(shape))


# Models and chains


def _members(*encoders: Encoder) -> Any:
    return Family.of(list(encoders)).members


def test_models_that_are_the_heads() -> None:
    HEAD.check_models(_members(*FAMILY), CHAIN)
    _head(2).check_models(_members(*FAMILY), CHAIN)
    RAW.check_models(_members(FAMILY[1]))
    renamed = copy.deepcopy(FAMILY[1])
    renamed.name = "moved elsewhere"
    RAW.check_models(_members(renamed))


def test_other_models() -> None:
    a, b, c = FAMILY
    other = tiny_family(seed=1)[1]
    for head, members, chain, problem in (
        (
            RAW,
            _members(b),
            CHAIN,
            r"reads the raw embedding of tiny24 \(24\): it takes no chain, got tiny16 \(16\) -> ",
        ),
        (
            HEAD,
            _members(a, b, c),
            None,
            rf"rows of a chain of tiny16 .* \(hash {CHAIN.fingerprint}\): no chain is given",
        ),
        (
            HEAD,
            _members(a, b, c),
            random_chain(FAMILY, seed=1),
            f"of another chain: .* {CHAIN.fingerprint}, got tiny16",
        ),
        (HEAD, _members(a, b), CHAIN, r"reads tiny16 \(16\) -> tiny24 \(24\) -> tiny40 \(40\), got tiny16, tiny24$"),
        (RAW, _members(b, c), None, r"reads tiny24 \(24\), got tiny24, tiny40"),
        (RAW, [], None, r"reads tiny24 \(24\), got none"),
        (RAW, _members(c), None, r"model 1 of the head is tiny24 \(24\), got tiny40 of width 40"),
        (
            RAW,
            _members(other),
            None,
            f"got tiny24, another checkpoint .*: its hash is {other.fingerprint}, .*{b.fingerprint}",
        ),
        (
            HEAD,
            _members(b, a, c),
            CHAIN,
            r"model 1 of the head is tiny16 \(16\), got its tiny24: the order must be tiny16",
        ),
        (_head(2), _members(a, b, a), CHAIN, r"model 3 of the chain is tiny40 \(40\), got its tiny16"),
    ):
        with pytest.raises(InputError, match=problem):
            head.check_models(members, chain)
    with pytest.raises(InputError, match="another checkpoint"):
        score_with_head(RAW, other, VARIANTS)


def test_a_model_without_a_hash_goes_by_its_name() -> None:
    bare = copy.deepcopy(FAMILY[1])
    bare.fingerprint = None
    head = dataclasses.replace(RAW, models=models_of([bare]))
    head.check_models(_members(bare))
    with pytest.raises(InputError, match=r"got tiny24, another checkpoint of that width: .* fitted on one without"):
        head.check_models(_members(FAMILY[1]))
    with pytest.raises(InputError, match="its hash is not known"):
        RAW.check_models(_members(bare))
    bare.name = "another"
    with pytest.raises(InputError, match="got another, another checkpoint"):
        head.check_models(_members(bare))


# Files


@pytest.mark.parametrize("head", [HEAD, RAW, _head(region=[3, 12], pooling="mean")], ids=["nested", "raw", "region"])
def test_round_trip(tmp_path: Path, head: RidgeHead) -> None:
    head.save(tmp_path / "head")
    again = RidgeHead.load(tmp_path / "head")
    for name in (
        "bias",
        "pooling",
        "models",
        "strength",
        "chain_fingerprint",
        "data",
        "width",
        "region",
        "fingerprint",
    ):
        assert getattr(again, name) == getattr(head, name), name
    assert again.weight_W.dtype == np.float64
    assert np.array_equal(again.weight_W, head.weight_W)
    assert [each.name for each in tmp_path.iterdir()] == ["head"]
    with safe_open(tmp_path / "head", framework="np") as file:
        assert set(file.keys()) == {"weight", "bias"}
        assert file.metadata()["schema_version"] == "1"
        assert json.loads(file.metadata()["head"])["width"] == head.width


def test_fingerprint_covers_all_that_decides_a_score() -> None:
    weight = HEAD.weight_W.copy()
    weight[-1] += 1e-12
    other = dataclasses.replace(HEAD.models[0], fingerprint="0" * 32)
    changes: list[dict[str, Any]] = [
        {"weight_W": weight},
        {"bias": 0.7500001},
        {"pooling": "mean"},
        {"models": (other, *HEAD.models[1:])},
        {"chain_fingerprint": "0" * 32},
        {"data": {**HEAD.data, "region": [1, 20]}},
    ]
    seen = {HEAD.fingerprint, *(dataclasses.replace(HEAD, **change).fingerprint for change in changes)}
    assert len(seen) == 7
    assert dataclasses.replace(HEAD, data={**HEAD.data, "spearman": 0.5}).fingerprint == HEAD.fingerprint


def _saved(path: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A head's file whose facts or tensors are changed."""
    HEAD.save(path)
    with safe_open(path, framework="np") as file:
        metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    facts = {**json.loads(metadata["head"]), **changes}
    kept = {name: tensor for name, tensor in {**held, **(tensors or {})}.items() if tensor is not None}
    save_file(kept, path, metadata={"schema_version": "1", "head": json.dumps(facts)})
    return path


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "head"
    HEAD.save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: is damaged: what it holds has the hash"):
        RidgeHead.load(path)
    with pytest.raises(InputError, match="is damaged"):
        RidgeHead.load(_saved(path, pooling="mean"))


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_file_cut_short(tmp_path: Path, size: int) -> None:
    path = tmp_path / "head"
    HEAD.save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: not a readable head"):
        RidgeHead.load(path)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "head"
    with pytest.raises(InputError, match="no such file; `protnest probe --save` writes one"):
        RidgeHead.load(path)
    with pytest.raises(InputError, match="not a readable head"):
        RidgeHead.load(tmp_path)
    CHAIN.save(path)
    with pytest.raises(InputError, match="is a safetensors file, but no head"):
        RidgeHead.load(path)
    save_torch_file({"weight": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(InputError, match=r"no head|not a readable head"):
        RidgeHead.load(path)
    for metadata, problem in (
        ({"schema_version": "7", "head": "{}"}, "has schema version 7, this release reads 1"),
        ({"head": "{}"}, "has schema version None, this release reads 1"),
        ({"schema_version": "1", "head": "{"}, "not a readable head: JSONDecodeError"),
        ({"schema_version": "1", "head": "{}"}, "not a readable head: KeyError 'bias'"),
    ):
        save_file({"x": np.zeros(2)}, path, metadata=metadata)
        with pytest.raises(InputError, match=problem):
            RidgeHead.load(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tensors": {"weight": np.zeros(39)}}, r"weight is float64 \(39,\), expected float64 \(40,\) for tiny40"),
        ({"tensors": {"weight": np.zeros((40, 1))}}, r"weight is float64 \(40, 1\), expected float64 \(40,\)"),
        ({"tensors": {"weight": np.zeros(40, dtype=np.float32)}}, r"weight is float32 \(40,\), expected float64"),
        ({"tensors": {"weight": np.full(40, np.nan)}}, "weight is not finite"),
        ({"tensors": {"weight": None}}, "not a readable head: KeyError 'weight'"),
        ({"tensors": {"bias": np.array([np.inf])}}, "bias is not finite"),
        ({"tensors": {"bias": np.zeros(2)}}, r"bias is float64 \(2,\), expected float64 \(1,\)"),
        ({"tensors": {"bias": np.zeros(1, dtype=np.int64)}}, r"bias is int64 \(1,\), expected float64"),
        ({"strength": float("nan")}, "strength is not finite"),
        ({"strength": None}, "not a readable head: TypeError"),
        ({"pooling": "max"}, "pooling is 'max'; allowed: mean, site"),
        ({"models": []}, "0 models and no chain: a head reads one model"),
        ({"models": [{"name": "x"}]}, "not a readable head: TypeError"),
        ({"chain_fingerprint": None}, "3 models and no chain"),
        ({"data": {}}, "data's wild_type is None, expected `residues` and `hash`"),
        ({"data": {**HEAD.data, "region": [3]}}, r"data's region is \[3\], expected first and last of .* 20 residues"),
        ({"data": {**HEAD.data, "region": [5, 4]}}, r"data's region is \[5, 4\]"),
        ({"data": {**HEAD.data, "region": [0, 4]}}, r"data's region is \[0, 4\]"),
        ({"data": {**HEAD.data, "region": [1, 21]}}, r"data's region is \[1, 21\]"),
        ({"data": 3}, "not a readable head: TypeError"),
    ],
)
def test_heads_that_cannot_be(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = _saved(tmp_path / "head", **changes)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: {problem}"):
        RidgeHead.load(path)


def test_what_is_not_json_is_not_written(tmp_path: Path) -> None:
    """JSON has no NaN; other readers would stumble."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        dataclasses.replace(HEAD, data={**HEAD.data, "spearman": float("nan")}).save(tmp_path / "head")
    assert not list(tmp_path.iterdir())
