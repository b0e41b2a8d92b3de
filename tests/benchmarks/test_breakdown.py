"""breakdown: operators find their stages, shares add up, and what is made slower is what grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from protnest.benchmarks.breakdown import STAGES, break_down, stage_of
from protnest.benchmarks.peers import Protnest, random_encoder
from protnest.engine import embedder as embedder_file
from protnest.engine import encoder as encoder_file
from protnest.engine.config import EncoderConfig

from support.tiny import random_proteins

CONFIG = EncoderConfig(layers=2, width=32, heads=2, feedforward=64)
PROTEINS = random_proteins(12, seed=0)
SLOWED_SECONDS = 0.2


@pytest.fixture
def engine() -> Protnest:
    return Protnest(random_encoder(CONFIG, seed=0), precision="fp32", device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("operator", "stage"),
    [
        *[("aten::addmm", "products"), ("aten::linear", "products"), ("onednn::qlinear_pointwise", "products")],
        *[("aten::_int_mm", "products"), ("mkldnn::_linear_pointwise", "products"), ("aten::bmm", "products")],
        *[("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("protnest::rotary", "attention")],
        *[("aten::native_layer_norm", "norms"), ("protnest::add_layer_norm", "norms"), ("aten::add", "norms")],
        *[("aten::gelu", "gelu"), ("protnest::linear_gelu", "products"), ("aten::addcmul", None)],
        *[("aten::copy_", None), ("aten::embedding", None), ("aten::cat", None), ("aten::empty", None)],
    ],
)
def test_operators_find_their_stage(operator: str, stage: str | None) -> None:
    assert stage_of(operator) == stage


def test_shares_add_up(engine: Protnest) -> None:
    row = break_down(engine, PROTEINS, 64)
    assert tuple(row["shares"]) == STAGES
    assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert all(share > 0 for share in row["shares"].values())
    assert (row["engine"], row["precision"], row["budget_tokens"]) == ("protnest", "fp32", 64)
    assert 0 < len(row["top_operators"]) <= 10


def _slow(real: Callable[..., Any], label: str | None = None) -> Callable[..., Any]:
    """A function that takes longer, inside of an operator of that name where one is given."""

    def slowed(*given: Any, **options: Any) -> Any:
        if label is None:
            time.sleep(SLOWED_SECONDS)
        else:
            with torch.profiler.record_function(label):
                time.sleep(SLOWED_SECONDS)
        return real(*given, **options)

    return slowed


@pytest.mark.parametrize(
    ("stage", "owner", "name", "label"),
    [
        ("norms", encoder_file.F, "layer_norm", "test::layer_norm"),
        ("norms", encoder_file, "add_norm", None),
        ("gelu", encoder_file, "bias_gelu", None),
        ("plan_pack", embedder_file, "pack", None),
        ("pooling", torch, "segment_reduce", None),
        ("attention", encoder_file, "rotary_attention", None),
        ("products", encoder_file.F, "linear", "test::linear"),
        ("rest", encoder_file.F, "embedding", None),
    ],
)
def test_what_is_made_slower_is_what_grows(
    engine: Protnest, monkeypatch: pytest.MonkeyPatch, stage: str, owner: Any, name: str, label: str | None
) -> None:
    if not hasattr(owner, name):
        pytest.skip(f"{name} is no longer called there")
    monkeypatch.setattr(owner, name, _slow(getattr(owner, name), label))
    shares = break_down(engine, PROTEINS, 10_000)["shares"]
    assert max(shares, key=shares.__getitem__) == stage, shares


def test_nothing_stays_behind(engine: Protnest) -> None:
    before = dict(vars(embedder_file)), dict(vars(encoder_file))
    break_down(engine, PROTEINS, 64)
    assert before == (vars(embedder_file), vars(encoder_file))
    for module in engine.encoder.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
