"""Encoder.row_logits: what the head says of all tokens, at those asked about, whatever is asked and in any precision.

Shapes: B sequences, T tokens, R tokens asked about, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from protnest.engine import Encoder, from_fair_esm
from protnest.engine import encoder as module
from protnest.engine.alphabet import MASK_ID, TOKENS
from protnest.engine.packing import ChosenRows, PackedBatch, pack
from protnest.engine.quantise import quantised

from support.esm2_models import ALPHABET, fair_esm_outputs, in_fp64
from support.score_reference import scoring_model
from support.tiny import random_proteins

SMALL = (2, 32, 2)
ONE_LAYER = (1, 48, 3)
RAGGED = ("MKTAYIAKQR", "M", *random_proteins(4, seed=1, longest=40), "ACDEFG")
UNIFORM = tuple(protein[:9] for protein in random_proteins(40, seed=2) if len(protein) >= 9)[:5]
ONE = ("MKTAYIAKQRQISFVKSHFSRQ",)
BATCHES = {"ragged": RAGGED, "uniform": UNIFORM, "one": ONE}


@functools.cache
def _encoder(shape: tuple[int, int, int] = SMALL, precision: str = "fp32", dropout: bool = True) -> Encoder:
    with torch.inference_mode(False):
        encoder = from_fair_esm(scoring_model(*shape), ALPHABET)
    encoder.config = dataclasses.replace(encoder.config, token_dropout=dropout)
    if precision == "int8":
        return quantised(encoder)
    return encoder.to({"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}[precision])


def _batch(proteins: Sequence[str], masks: Sequence[int] = (3, 11)) -> PackedBatch:
    """Packed, with some tokens masked."""
    batch = pack(proteins)
    batch.tokens_T[list(masks)] = MASK_ID
    return batch


def _rows(batch: PackedBatch, counts: Sequence[int], seed: int = 0) -> ChosenRows:
    """So many tokens of each sequence, repeated in turn, at random and in any order; the first is <cls>."""
    generator = torch.Generator().manual_seed(seed)
    begins = batch.cu_seqlens.tolist()
    picked, counts_B = [], []
    for b, length in enumerate(batch.lengths_B):
        count = min(counts[b % len(counts)], length)
        order = [0, *(torch.randperm(length - 1, generator=generator) + 1).tolist()]
        picked += [begins[b] + row for row in order[:count]]
        counts_B.append(count)
    return ChosenRows(torch.tensor(picked, dtype=torch.int64), tuple(counts_B))


CHOICES = {
    "few": (1, 2, 0, 3),
    "<cls> of each": (1,),
    "two of each": (2,),
    "of some alone": (0, 0, 3),
    "none": (0,),
    "more than half": (99, 99, 3),
    "all": (99,),
}


def _expected(encoder: Encoder, batch: PackedBatch, chosen: ChosenRows) -> torch.Tensor:
    """By the whole forward pass; in the stream's precision, where products run in another one."""
    stream_TD = encoder.stream(batch)
    norm = encoder.final_norm
    weight_D, bias_D = norm.weight.to(stream_TD.dtype), norm.bias.to(stream_TD.dtype)
    hidden_TD = torch.nn.functional.layer_norm(stream_TD, weight_D.shape, weight_D, bias_D, norm.eps)
    return encoder.logits(hidden_TD)[chosen.index_R]


TOLERANCES = {"fp64": 1e-12, "fp32": 1e-4, "bf16": 0.1, "int8": 0.2}
"""Of logits that reach 10. Rounding to bf16, or to levels, may fall the other way where sums are in another order."""


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("dropout", [True, False], ids=["token dropout", "none"])
@pytest.mark.parametrize("company", BATCHES)
def test_as_all_tokens_say(company: str, dropout: bool, precision: str) -> None:
    encoder = _encoder(SMALL, precision, dropout)
    batch = _batch(BATCHES[company])
    for name, counts in CHOICES.items():
        chosen = _rows(batch, counts)
        with torch.inference_mode():
            got_RV, expected_RV = encoder.row_logits(batch, chosen), _expected(encoder, batch, chosen)
        assert got_RV.shape == (len(chosen.index_R), len(TOKENS))
        assert got_RV.dtype == (torch.float64 if precision == "fp64" else torch.float32)
        error = float((got_RV - expected_RV).abs().max()) if len(got_RV) else 0.0
        assert error <= TOLERANCES[precision], f"{name}: {error:.3g}"


@pytest.mark.parametrize("filled", [False, True], ids=["", "filled up"])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("shape", [SMALL, ONE_LAYER])
def test_as_the_head_says_of_hidden_states(
    shape: tuple[int, int, int], precision: str, filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch = _encoder(shape, precision), _batch(RAGGED)
    with torch.inference_mode():
        logits_TV = encoder.logits(encoder(batch).hidden_TD)
        # Where products are compiled for their numbers of rows, those of nobody come to both.
        monkeypatch.setattr(module, "is_compiled", lambda dtype, device: filled)
        for counts in CHOICES.values():
            chosen = _rows(batch, counts)
            got_RV = encoder.row_logits(batch, chosen)
            torch.testing.assert_close(got_RV, logits_TV[chosen.index_R], rtol=0, atol=TOLERANCES[precision])


def test_as_fair_esm_says() -> None:
    model, batch = scoring_model(*SMALL), _batch(RAGGED)
    chosen = _rows(batch, CHOICES["few"])
    with in_fp64(model) as twin:
        tokens = torch.split(batch.tokens_T, list(batch.lengths_B))
        gold_RV = fair_esm_outputs(twin, tokens)["logits"][chosen.index_R]
    with torch.inference_mode():
        for precision, tolerance in (("fp32", 1e-4), ("fp64", 1e-10)):
            got_RV = _encoder(SMALL, precision).row_logits(batch, chosen)
            torch.testing.assert_close(got_RV.double(), gold_RV, rtol=0, atol=tolerance)


def test_precisions_differ() -> None:
    """So that the comparisons above compare what they say."""
    batch = _batch(RAGGED)
    chosen = _rows(batch, CHOICES["few"])
    with torch.inference_mode():
        exact_RV = _encoder().row_logits(batch, chosen)
        for precision in ("bf16", "int8"):
            error = (_encoder(SMALL, precision).row_logits(batch, chosen) - exact_RV).abs()
            assert 1e-3 < float(error.max()) < 2


def test_order_and_repeats_are_the_callers() -> None:
    encoder, batch = _encoder(), _batch(UNIFORM)
    begins = batch.cu_seqlens.tolist()
    index_R = torch.tensor([begin + row for begin in begins[:-1] for row in (5, 0, 5, 10)])
    sorted_R = torch.tensor([begin + row for begin in begins[:-1] for row in (0, 5, 10)])
    counts = len(batch.lengths_B)
    with torch.inference_mode():
        got_BRV = encoder.row_logits(batch, ChosenRows(index_R, (4,) * counts)).view(counts, 4, -1)
        plain_BRV = encoder.row_logits(batch, ChosenRows(sorted_R, (3,) * counts)).view(counts, 3, -1)
    torch.testing.assert_close(got_BRV, plain_BRV[:, [1, 0, 1, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "is_few"), [(1, True), (5, True), (6, False), (12, False)])
def test_few_rows_have_an_attention_of_their_own(rows: int, is_few: bool) -> None:
    """Below half of twelve tokens: no other layer's, and products of these rows alone."""
    encoder, batch = _encoder(), pack(["MKTAYIAKQR"])
    chosen = ChosenRows(torch.arange(rows), (rows,))
    multiplied: list[int] = []
    last: Any = encoder.layers[-1]
    real = type(last.fc1).product

    def product(self: object, given: Any) -> Any:
        if self is last.fc1:
            multiplied.append(len(given))
        return real(self, given)  # type: ignore[arg-type]

    with (
        torch.inference_mode(),
        mock.patch.object(type(last.fc1), "product", product),
        mock.patch.object(module, "row_attention", wraps=module.row_attention) as few,
        mock.patch.object(module, "rotary_attention", wraps=module.rotary_attention) as whole,
    ):
        encoder.row_logits(batch, chosen)
    assert (few.call_count, whole.call_count) == ((1, 1) if is_few else (0, 2))
    assert multiplied == [rows if is_few else 12]


def test_the_head_runs_for_these_rows_alone() -> None:
    encoder, batch = _encoder(), _batch(RAGGED)
    assert encoder.head is not None
    seen: list[int] = []
    hook = encoder.head.register_forward_hook(lambda _, args, output: seen.append(len(args[0])))
    try:
        for name in ("few", "more than half"):
            encoder.row_logits(batch, _rows(batch, CHOICES[name]))
            assert seen.pop() == len(_rows(batch, CHOICES[name]).index_R)
    finally:
        hook.remove()
    assert seen == []


def test_no_tokens() -> None:
    nothing = ChosenRows(torch.zeros(0, dtype=torch.int64), ())
    assert _encoder().row_logits(pack([]), nothing).shape == (0, len(TOKENS))


def test_leaves_what_it_is_given_alone() -> None:
    batch = _batch(RAGGED)
    chosen = _rows(batch, CHOICES["few"])
    before = copy.deepcopy((batch.tokens_T, batch.cu_seqlens, chosen.index_R))
    first_RV = _encoder().row_logits(batch, chosen)
    assert all(map(torch.equal, before, (batch.tokens_T, batch.cu_seqlens, chosen.index_R)))
    assert torch.equal(_encoder().row_logits(batch, chosen), first_RV)


@pytest.mark.parametrize("rows", [1, 5])
def test_no_head(rows: int) -> None:
    encoder = Encoder(_encoder().config, head=False, name="headless")
    with pytest.raises(ValueError, match="headless has no language-model head: its checkpoint holds the encoder alone"):
        encoder.row_logits(pack(["MKT"]), ChosenRows(torch.arange(rows), (rows,)))


def test_counts_of_other_sequences() -> None:
    with pytest.raises(ValueError, match=r"rows \(1,\) and 1 counts for 2 sequences"):
        _encoder().row_logits(pack(["MKT", "MKTA"]), ChosenRows(torch.tensor([1]), (1,)))


@pytest.mark.parametrize("shape", [SMALL, ONE_LAYER])
@pytest.mark.parametrize("company", BATCHES)
@pytest.mark.parametrize("choice", ["few", "<cls> of each", "more than half", "all"])
def test_gradients_are_those_of_all_tokens(choice: str, company: str, shape: tuple[int, int, int]) -> None:
    """In training, in fp64; every parameter, and none where none flow."""
    batch = _batch(BATCHES[company])
    chosen = _rows(batch, CHOICES[choice])
    weights_V = torch.linspace(-1, 1, len(TOKENS), dtype=torch.float64)
    encoders = [copy.deepcopy(_encoder(shape, "fp64")).train() for _ in range(2)]
    torch.autograd.backward((encoders[0].row_logits(batch, chosen) @ weights_V).square().sum())
    logits_TV = encoders[1].logits(encoders[1](batch).hidden_TD)
    torch.autograd.backward((logits_TV[chosen.index_R] @ weights_V).square().sum())
    largest = 0.0
    for (name, got), wanted in zip(encoders[0].named_parameters(), encoders[1].parameters(), strict=True):
        assert got.grad is not None, name
        assert wanted.grad is not None, name
        size = float(wanted.grad.abs().max())
        assert float((got.grad - wanted.grad).abs().max()) <= 1e-10 * max(size, 1e-3), name
        largest = max(largest, size)
    assert largest > 0.1
