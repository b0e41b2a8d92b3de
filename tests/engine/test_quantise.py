"""int8 encoders: folding is exact, rounding within its bounds, fidelity on the real 8M checkpoint, and what is refused.

Shapes: B proteins, T tokens, N rows, D width, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from protnest.engine import Embedder, Encoder, InputError, load_model, quantise
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.packing import pack
from protnest.engine.quantise import QuantisedEncoder, QuantisedLinear, quantised
from protnest.kernels.bias_gelu import Move, bias_gelu
from protnest.kernels.product import Levels, Product
from torch import nn

from support.esm2_models import hostile_encoder
from support.int8_mutants import ENGINE_MUTANTS
from support.shared_data import REAL_8M, UNIPROT_500, shared_path, shared_sequences
from support.source_mutants import load_mutant
from support.tiny import random_proteins, save_tiny_model


class _Unrounded(nn.Module):
    """Stands for `QuantisedLinear`, with nothing rounded: what is left is the folding."""

    def __init__(
        self,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor,
        *,
        move: Move | None = None,
        refine_above: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.move, self.takes = weight_OI, bias_O, move, torch.float32

    def product(self, rows: torch.Tensor) -> Product:
        return Product(F.linear(rows.double(), self.weight.double(), self.bias.double()).float())

    def refine(self, x_TD: torch.Tensor, given: Product, rows: torch.Tensor) -> torch.Tensor:
        return x_TD


def _through(product: QuantisedLinear, given_NI: torch.Tensor) -> torch.Tensor:
    """What a layer's passes make of the rows before the GELU: moved, rounded, multiplied, wide rows rounded twice."""
    rows = bias_gelu(Product(given_NI.clone()), dtype=torch.int8, move=product.move)
    return product.refine(product.product(rows).numbers(), Product(given_NI.clone()), rows)


def check_folding(ops: ModuleType) -> None:
    """Without rounding the encoder is the one that it was made of, to fp32's digits."""
    encoder = hostile_encoder(2, 32, 2)
    with mock.patch.object(ops, "QuantisedLinear", _Unrounded):
        folded = ops.quantised(encoder)
    batch = pack(random_proteins(5))
    expected, got = encoder(batch).hidden_TD, folded(batch).hidden_TD
    assert (got - expected).abs().max() <= 2e-4 * expected.abs().max()


def check_rounding(ops: ModuleType) -> None:
    """Each output within half a step of each input times its weight, half a step of a step where rows are wide."""
    generator = torch.Generator().manual_seed(3)
    given_NI = torch.randn(60, 40, generator=generator) + 0.5
    given_NI[::7, 5] = 60.0
    weight_OI = torch.randn(24, 40, generator=generator) * torch.logspace(-1, 1, 24)[:, None]
    bias_O = torch.randn(24, generator=generator) * 3
    times_I = torch.exp2(torch.randn(40, generator=generator).round().clamp(-1, 1))
    times_I[5] = 1.0
    minus_I = torch.rand(40, generator=generator)
    product = ops.QuantisedLinear(weight_OI, bias_O, move=Move(times_I, minus_I), refine_above=50.0 / 255)
    moved_NI = F.gelu(given_NI.double()) * times_I - minus_I
    wide_OI = product.values_OI.double() * product.scale_O.double()[:, None]
    gold_NO = moved_NI @ wide_OI.T + bias_O
    scale_N1 = (moved_NI.amax(1) - moved_NI.amin(1))[:, None] / 255
    is_wide_N1 = scale_N1 > product.refine_above
    assert 0 < int(is_wide_N1.sum()) < 20
    steps_N1 = torch.where(is_wide_N1, scale_N1 / 254, scale_N1)
    fp32_NO = 8 * 2.0**-24 * (moved_NI.abs().amax(1)[:, None] * wide_OI.abs().sum(1) + bias_O.abs())
    error_NO = (_through(product, given_NI).double() - gold_NO).abs()
    assert (error_NO <= 0.5 * steps_N1 * wide_OI.abs().sum(1) + fp32_NO).all()
    # Narrow rows are rounded once: a second rounding would leave next to nothing.
    assert (error_NO / scale_N1)[~is_wide_N1[:, 0]].max() > 0.1


CHECKS = (check_folding, check_rounding)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks(check: Any) -> None:
    check(quantise)


@pytest.mark.parametrize("name", ENGINE_MUTANTS)
def test_mutants_are_killed(name: str, tmp_path: Path) -> None:
    old, new = ENGINE_MUTANTS[name]
    mutant = load_mutant("engine.quantise", {old: new}, tmp_path)
    for check in CHECKS:
        try:
            check(mutant)
        except AssertionError:
            return
    pytest.fail(f"{name}: every check passes")


@pytest.fixture
def tiny() -> Encoder:
    return hostile_encoder(2, 32, 2)


def test_the_given_encoder_is_left_as_it_is(tiny: Encoder) -> None:
    before = copy.deepcopy(tiny.state_dict())
    ours = quantised(tiny)
    with torch.no_grad():
        ours.embed_tokens.weight.zero_()
        ours.final_norm.weight.zero_()
    after = tiny.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tiny.training is False


def test_what_it_is(tiny: Encoder) -> None:
    tiny.fingerprint = "abc"
    ours = quantised(tiny)
    assert (ours.fingerprint, ours.name, ours.config, ours.dim) == ("abc", tiny.name, tiny.config, tiny.dim)
    assert (ours.precision, tiny.precision) == ("int8", "fp32")
    assert copy.deepcopy(tiny).to(torch.bfloat16).precision == "bf16"
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())
    for layer in ours.layers:
        assert isinstance(layer, nn.Module)
        for name in ("qkv", "out", "fc1", "fc2"):
            product = getattr(layer, name)
            assert isinstance(product, QuantisedLinear)
            assert product.values_OI.dtype == torch.int8
            assert (product.move is not None) == (name == "fc2")
            assert np.isfinite(product.refine_above) == (name == "fc2")
    hidden_TD = ours(pack(["MKTAYIAK"])).hidden_TD
    assert hidden_TD.dtype == torch.float32
    assert torch.equal(ours.logits(hidden_TD), tiny.logits(hidden_TD))


def test_the_same_bits_each_time(tiny: Encoder) -> None:
    first, second = quantised(tiny), quantised(copy.deepcopy(tiny))
    first.encode(["MKTAYIAKQR"])
    batch = pack(random_proteins(4))
    assert torch.equal(first(batch).hidden_TD, second(batch).hidden_TD)
    states = (first.state_dict(), second.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in states), strict=True))


def test_products_do_not_depend_on_the_batch(tiny: Encoder) -> None:
    """Narrow and wide rows alike have the same bits alone and together."""
    for name in ("qkv", "fc2"):
        product: Any = getattr(quantised(tiny).layers[0], name)
        given_NI = torch.randn(50, product.values_OI.shape[1], generator=torch.Generator().manual_seed(1)) * 3
        given_NI[::9, 2] = 90.0
        whole_NO = _through(product, given_NI)
        for begin, end in ((0, 1), (7, 8), (9, 10), (3, 41)):
            assert torch.equal(_through(product, given_NI[begin:end]), whole_NO[begin:end])


def test_a_protein_has_the_same_bits_alone_and_in_a_batch(tiny: Encoder) -> None:
    ours, proteins = quantised(tiny), random_proteins(12)
    for protein, together in zip(proteins, ours.encode(proteins), strict=True):
        np.testing.assert_array_equal(ours.encode([protein])[0], together)


def test_a_row_that_is_not_finite_stays_one(tiny: Encoder) -> None:
    product: Any = quantised(tiny).layers[0].fc2
    given_NI = torch.randn(4, product.values_OI.shape[1])
    clean_NO = _through(product, given_NI)
    given_NI[1, 3] = torch.inf
    y_NO = _through(product, given_NI)
    assert y_NO[1].isnan().all()
    assert torch.equal(y_NO[[0, 2, 3]], clean_NO[[0, 2, 3]])


def test_channels_without_spread(tiny: Encoder) -> None:
    """Channels that are constant, or that no output reads, still give finite scales and the right answer."""
    with torch.no_grad():
        for layer in tiny.layers:
            norm, product = layer.attention_norm, layer.qkv
            norm.weight[3] = 0.0  # type: ignore[index,operator,union-attr]
            product.weight[:, 5] = 0.0  # type: ignore[index,operator,union-attr]
    batch = pack(random_proteins(5))
    expected, got = tiny(batch).hidden_TD, quantised(tiny)(batch).hidden_TD
    assert F.cosine_similarity(got, expected, dim=1).median() > 0.99


def test_load_model_in_int8(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    ours, whole = load_model(folder, device="cpu", precision="int8"), load_model(folder, device="cpu", precision="fp32")
    assert isinstance(ours, QuantisedEncoder)
    assert Embedder(ours).precision == "int8"
    assert ours.fingerprint == whole.fingerprint
    batch = pack(random_proteins(6))
    assert F.cosine_similarity(ours(batch).hidden_TD, whole(batch).hidden_TD, dim=1).median() > 0.99


def test_what_int8_refuses(tiny: Encoder, tmp_path: Path) -> None:
    ours = quantised(tiny)
    for broken in (ours, copy.deepcopy(tiny).to(torch.bfloat16), copy.deepcopy(tiny).to("meta")):
        with pytest.raises(InputError, match="int8 is made of an fp32 model on the CPU"):
            quantised(broken)
    for move in (lambda: ours.to(torch.bfloat16), ours.half, ours.double, lambda: ours.to("meta")):
        with pytest.raises(InputError, match="runs in int8, on the CPU and with fp32 beside, and cannot become"):
            move()
    assert ours.to("cpu", torch.float32) is ours
    with pytest.raises(InputError, match="runs in int8, which is not trained"):
        ours.train()
    with pytest.raises(InputError, match="runs in int8 and is not saved"):
        save_checkpoint(ours, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with torch.no_grad():
        tiny.layers[1].fc1.weight[2, 3] = torch.nan  # type: ignore[index,operator,union-attr]
    with pytest.raises(InputError, match=r"cannot run in int8: weight row \d+ is not finite"):
        quantised(tiny)


def _cosines(got: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    a, b = (torch.from_numpy(np.stack(rows)).double() for rows in (got, expected))
    return F.cosine_similarity(a, b, dim=1).numpy()


def test_fidelity_on_the_real_8m() -> None:
    """Cosine to fp32, pooled and by residue: 0.998 in the median, 0.99 at the first percentile; pooled, centred too."""
    encoder = load_model(shared_path(REAL_8M), device="cpu", precision="fp32")
    proteins = [protein for protein in shared_sequences(UNIPROT_500) if len(protein) <= 200][:30]
    ours, whole = quantised(encoder).encode(proteins), encoder.encode(proteins)
    pooled = [[rows.mean(0) for rows in side] for side in (ours, whole)]
    center = np.mean(pooled[1], axis=0)
    figures = {
        "pooled": _cosines(*pooled),
        "residues": _cosines([row for rows in ours for row in rows], [row for rows in whole for row in rows]),
        "centred": _cosines([row - center for row in pooled[0]], [row - center for row in pooled[1]]),
    }
    for name, cosine in figures.items():
        median, first = np.percentile(cosine, [50, 1])
        assert median >= 0.998, (name, median, first)
        assert first >= (0.985 if name == "centred" else 0.99), (name, median, first)


def test_wide_rows_are_few_and_there_on_the_real_8m() -> None:
    """The second, small product is small: of a real protein's rows a few in a hundred."""
    ours = quantised(load_model(shared_path(REAL_8M), device="cpu", precision="fp32"))
    proteins = [protein for protein in shared_sequences(UNIPROT_500) if len(protein) <= 250][:10]
    rows, wide = 0, 0
    product_of = QuantisedLinear.product

    def counted(module: QuantisedLinear, levels: torch.Tensor | Levels) -> Product:
        nonlocal rows, wide
        if module.move is not None and isinstance(levels, Levels):
            rows, wide = rows + len(levels.scale_N), wide + int((levels.scale_N > module.refine_above).sum())
        return product_of(module, levels)

    with mock.patch.object(QuantisedLinear, "product", counted):
        ours.encode(proteins)
    assert 0 < wide < 0.05 * rows, f"{wide} of {rows}"
