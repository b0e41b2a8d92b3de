"""The packed encoder: parity with fair-esm layer by layer, that the parity test can fail, packing, precisions.

Gold is fair-esm's own code in fp64 on the same hostile weights. Our fp32 may be as far from it as fair-esm's fp32 is,
times two; our fp64 must meet it. Shapes: B sequences, T tokens, L residues, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import random
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from protnest.engine import Embedder, Encoder, from_fair_esm, load_model
from protnest.engine import encoder as module
from protnest.engine.alphabet import AMINO_ACIDS, MASK_ID, PAD_ID, RESIDUES, TOKEN_IDS, TOKENS
from protnest.engine.encoder import EncoderOutput
from protnest.engine.packing import PackedBatch, pack
from protnest.engine.quantise import quantised
from protnest.kernels.cpu_kernels import LEVELS
from protnest.kernels.product import Product

from support.esm2_models import ALPHABET, fair_esm_outputs, hostile_encoder, hostile_esm2, in_fp64
from support.mutants import ENCODER_MUTANTS
from support.shared_data import REAL_8M, REAL_8M_MLM, UNIPROT_500, shared_path, shared_sequences

Tensors = dict[str, torch.Tensor]

SMALL = (2, 64, 4)
ESM2_8M = (6, 320, 20)
ESM2_35M = (12, 480, 20)


def _protein(residues: int, seed: int = 0) -> str:
    return "".join(random.Random(f"{residues} {seed}").choices(AMINO_ACIDS, k=residues))


def _batch(proteins: Sequence[tuple[str, float]]) -> PackedBatch:
    """Packs proteins, each with a share of its residues, chosen at random, shown as <mask>."""
    batch = pack([protein for protein, _ in proteins])
    tokens_T = batch.tokens_T.clone()
    for row, (begin, (protein, share)) in enumerate(zip(batch.cu_seqlens.tolist(), proteins, strict=False)):
        chosen = random.Random(row).sample(range(len(protein)), round(share * len(protein)))
        tokens_T[[begin + 1 + place for place in chosen]] = MASK_ID
    return dataclasses.replace(batch, tokens_T=tokens_T)


def _by_sequence(tensor: torch.Tensor, batch: PackedBatch) -> list[torch.Tensor]:
    return [tensor[begin:end] for begin, end in itertools.pairwise(batch.cu_seqlens.tolist())]


def _outputs(encoder: Encoder, batch: PackedBatch) -> Tensors:
    deepest = encoder.config.layers
    with torch.inference_mode():
        output = encoder(batch, layers=range(deepest + 1))
        tensors = {f"layer {layer}": output.layers[layer] for layer in range(deepest + 1)}
        return tensors | {"logits": encoder.logits(output.hidden_TD)}


@dataclasses.dataclass(frozen=True)
class _Truth:
    batch: PackedBatch
    encoder: Encoder
    gold: Tensors
    allowed: dict[str, float]


@functools.cache
def _truth(shape: tuple[int, int, int], case: str) -> _Truth:
    model = hostile_esm2(*shape)
    batch = _batch(CASES[case])
    tokens = _by_sequence(batch.tokens_T, batch)
    with in_fp64(model) as twin:
        gold = fair_esm_outputs(twin, tokens)
    theirs = fair_esm_outputs(model, tokens)
    allowed = {name: 2 * float((theirs[name].double() - gold[name]).abs().max()) for name in gold}
    return _Truth(batch, from_fair_esm(model, ALPHABET), gold, allowed)


def _failures(got: Tensors, truth: _Truth) -> list[str]:
    """What breaks the parity criterion: an element further from gold than twice fair-esm's worst in fp32."""
    assert got.keys() == truth.gold.keys()
    failures = []
    for name, gold in truth.gold.items():
        assert got[name].shape == gold.shape, name
        error = (got[name].double() - gold).abs().nan_to_num(nan=torch.inf)
        worst = int(error.argmax())
        if not error.flatten()[worst] <= truth.allowed[name]:
            index = tuple(int(place) for place in np.unravel_index(worst, gold.shape))
            failures.append(
                f"{name} {index}: got {got[name].flatten()[worst]:.9g}, gold {gold.flatten()[worst]:.9g}, "
                f"error {error.flatten()[worst]:.3g}, allowed {truth.allowed[name]:.3g}"
            )
    return failures


CASES: dict[str, list[tuple[str, float]]] = {
    "lengths": [(_protein(length), 0.0) for length in (1, 2, 37, 150, 1022)],
    "longest": [(_protein(1022), 0.0), (_protein(3), 0.0), (_protein(40), 0.15), ("X" * 5, 0.0)],
    "masks": [
        (_protein(60, 1), 0.0),
        (_protein(60, 2), 0.02),
        (_protein(61, 3), 0.15),
        (_protein(130, 4), 0.5),
        (_protein(2, 5), 0.5),
        ("X" * 40, 0.0),
        (RESIDUES, 0.1),
    ],
    # Apart from the others: 1 / (1 - r) makes <cls> and <eos> so large that they would loosen every bound.
    "all masked": [(_protein(45), 1.0), (_protein(1), 1.0), (_protein(30), 0.9)],
    # Many short ones: the last lie far from the batch's beginning.
    "mutants": [
        (_protein(50, 1), 0.0),
        (_protein(50, 2), 0.15),
        (_protein(20, 3), 0.5),
        ("X" * 10, 0.0),
        *((_protein(12 + row % 9, 4 + row), 0.1 * (row % 2)) for row in range(60)),
    ],
}


# Parity with fair-esm


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        *((ESM2_8M, case) for case in ("lengths", "masks", "all masked")),
        (ESM2_35M, "longest"),
        *((SMALL, case) for case in ("lengths", "masks", "all masked", "mutants")),
    ],
)
def test_fp32_is_as_close_to_gold_as_fair_esm(shape: tuple[int, int, int], case: str) -> None:
    truth = _truth(shape, case)
    assert not _failures(_outputs(truth.encoder, truth.batch), truth)


@pytest.mark.parametrize(
    ("shape", "case"),
    [(ESM2_8M, "masks"), (ESM2_8M, "all masked"), (SMALL, "lengths"), (SMALL, "mutants")],
)
def test_fp64_is_gold(shape: tuple[int, int, int], case: str) -> None:
    truth = _truth(shape, case)
    for name, tensor in _outputs(copy.deepcopy(truth.encoder).double(), truth.batch).items():
        assert tensor.dtype == torch.float64
        # Relative to the tensor's largest value: logits reach 200 and an all but masked <cls> 400.
        bound = 1e-10 * max(1.0, float(truth.gold[name].abs().max()))
        error = float((tensor - truth.gold[name]).abs().max())
        assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}"


def test_fp64_gradients_are_those_of_fair_esm() -> None:
    model = hostile_esm2(2, 32, 2)
    batch = _batch([(_protein(9), 0.3), (_protein(4), 0.0), (_protein(3), 1.0)])
    weights = torch.linspace(-1, 1, len(TOKENS), dtype=torch.float64)
    ours = from_fair_esm(model, ALPHABET).double()
    torch.autograd.backward((ours.logits(ours(batch).hidden_TD) @ weights).square().sum())
    with in_fp64(model) as theirs:
        for tokens_L in _by_sequence(batch.tokens_T, batch):
            torch.autograd.backward((theirs(tokens_L[None].long())["logits"] @ weights).square().sum())
    # The gradients take the parameters' place, so that the adoption itself says which is which; it rounds to fp32.
    for parameter in theirs.parameters():
        parameter.data = parameter.data if parameter.grad is None else parameter.grad
    wanted = dict(from_fair_esm(theirs, ALPHABET).named_parameters())
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        gold = wanted[name].detach().double()
        error = float((parameter.grad - gold).abs().max())
        assert error <= 1e-7 * float(gold.abs().max()), name


def _run_at(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the C++ kernels run with other vector instructions; "" takes the extension away."""
    files = [f"protnest.kernels.{name}" for name in ("rotary_attention", "add_norm", "bias_gelu", "quantise_rows")]
    if level == "":
        for file in (*files, "protnest.kernels.linear"):
            for name, absent in (("why_not_cpu", lambda product: "taken away"), ("load", lambda: None)):
                if hasattr(sys.modules[file], name):
                    monkeypatch.setattr(sys.modules[file], name, absent)
        return
    best = sys.modules["protnest.kernels.cpu_kernels"].module().best_level()
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this processor runs {best}, not {level}")
    for file in files:
        monkeypatch.setattr(sys.modules[file], "cpu_level", lambda: level)


@pytest.mark.parametrize("level", [*LEVELS, ""], ids=[*LEVELS, "no extension"])
def test_parity_at_each_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _run_at(level, monkeypatch)
    truth = _truth(ESM2_8M, "masks")
    assert not _failures(_outputs(truth.encoder, truth.batch), truth)


@pytest.mark.parametrize("level", [*LEVELS, ""], ids=[*LEVELS, "no extension"])
def test_int8_at_each_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to levels may fall the other way where numbers differ in their last bit, no more than that."""
    encoder = quantised(hostile_encoder(*SMALL))
    batch = pack([_protein(40), _protein(17, 1)])
    usual = encoder(batch).hidden_TD
    _run_at(level, monkeypatch)
    difference = (encoder(batch).hidden_TD - usual).norm(dim=1) / usual.norm(dim=1)
    assert difference.max() < 0.02


@pytest.mark.parametrize("name", ENCODER_MUTANTS)
def test_parity_kills_mutant(name: str) -> None:
    truth = _truth(SMALL, "mutants")
    encoder = copy.deepcopy(truth.encoder)
    with ENCODER_MUTANTS[name](encoder):
        failures = _failures(_outputs(encoder, truth.batch), truth)
    assert failures, f"not killed: {name}"
    assert not _failures(_outputs(encoder, truth.batch), truth), f"the mutant is still there: {name}"


# What a sequence's neighbours may do to it: nothing


def _hidden(encoder: Encoder, proteins: Sequence[tuple[str, float]]) -> list[torch.Tensor]:
    batch = _batch(proteins)
    with torch.inference_mode():
        return _by_sequence(encoder(batch).hidden_TD, batch)


NEIGHBOURS = [(_protein(30), 0.0), (_protein(1), 0.0), (_protein(70), 0.3), ("X" * 12, 0.0), (_protein(25, 6), 1.0)]


@pytest.mark.parametrize(("dtype", "share_of_std"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_same_answer_alone_in_any_batch_in_any_order(dtype: torch.dtype, share_of_std: float) -> None:
    # Matrix products of other heights are blocked otherwise, so sums round in another order: a few dozen eps (1.2e-7 in
    # fp32) of the hidden states' size is all that neighbours may change. A leak or a shared scale changes 1e-2.
    encoder = hostile_encoder(*ESM2_8M).to(dtype)
    # Masks are drawn by the row in the batch, so these proteins carry none; the masked ones come as neighbours.
    watched = [protein for protein, share in NEIGHBOURS if share == 0]
    alone = {protein: _hidden(encoder, [(protein, 0.0)])[0] for protein in watched}
    tolerance = share_of_std * float(torch.cat(list(alone.values())).std())
    orders = [NEIGHBOURS, NEIGHBOURS[::-1], NEIGHBOURS[2:] + NEIGHBOURS[:2], NEIGHBOURS * 5]
    for order in orders:
        for (protein, share), hidden_LD in zip(order, _hidden(encoder, order), strict=True):
            if share == 0:
                error = float((hidden_LD - alone[protein]).abs().max())
                assert error <= tolerance, f"{len(protein)} residues: {error:.3g} > {tolerance:.3g}"


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((_protein(40, 1), 0.0), id="other residues"),
        pytest.param((_protein(40), 0.5), id="masks"),
        pytest.param((_protein(40), 1.0), id="masks only"),
        pytest.param(("X" * 40, 0.0), id="X only"),
        pytest.param(("." * 40, 0.0), id="NaN"),
    ],
)
def test_neighbour_does_not_leak(other: tuple[str, float]) -> None:
    encoder = hostile_encoder(*SMALL)
    # Poison: a letter that only the last neighbour holds is worth NaN, and zero times NaN is NaN.
    with torch.no_grad():
        encoder.embed_tokens.weight[TOKEN_IDS["."]] = torch.nan
    watched = [(_protein(33), 0.2), (_protein(7), 0.0)]
    before = _hidden(encoder, [watched[0], (_protein(40), 0.0), watched[1]])
    after = _hidden(encoder, [watched[0], other, watched[1]])
    assert not torch.equal(before[1], after[1])
    # Of one height, so even the rounding is the same.
    for place in (0, 2):
        assert torch.equal(before[place], after[place])
        assert after[place].isfinite().all()


def test_rescale_is_each_sequences_own() -> None:
    """The published formula by hand: 0.88 / (1 - masks / (L + 2)), masked rows zero."""
    encoder = hostile_encoder(*SMALL).double()
    batch = _batch([(_protein(18), 0.0), (_protein(18), 0.5), (_protein(6), 1.0)])
    with torch.inference_mode():
        embedded = _by_sequence(encoder(batch, layers=[0]).layers[0], batch)
    for tokens_L, embedded_LD, masks in zip(_by_sequence(batch.tokens_T, batch), embedded, (0, 9, 6), strict=True):
        scale = 0.88 / (1 - masks / len(tokens_L))
        expected_LD = scale * encoder.embed_tokens.weight[tokens_L]
        expected_LD[tokens_L == MASK_ID] = 0
        torch.testing.assert_close(embedded_LD, expected_LD, rtol=1e-14, atol=0)


def test_token_dropout_off_leaves_embeddings_alone() -> None:
    model = hostile_esm2(*SMALL)
    model.token_dropout = False
    encoder = from_fair_esm(model, ALPHABET)
    assert not encoder.config.token_dropout
    batch = _batch([(_protein(18), 0.5)])
    with torch.inference_mode():
        assert torch.equal(encoder(batch, layers=[0]).layers[0], encoder.embed_tokens.weight[batch.tokens_T])


# Forward


def test_forward_keeps_the_layers_that_are_asked_for() -> None:
    encoder = hostile_encoder(*SMALL)
    batch = pack(["MKT", "A"])
    plain = encoder(batch)
    assert isinstance(plain, EncoderOutput)
    assert plain.layers == {}
    assert plain.hidden_TD.shape == (8, 64)
    some = encoder(batch, layers={2, 0})
    assert sorted(some.layers) == [0, 2]
    assert torch.equal(some.layers[2], plain.hidden_TD)
    assert torch.equal(some.hidden_TD, plain.hidden_TD)


@pytest.mark.parametrize(("layers", "named"), [([3], r"\[3\]"), ([-1], r"\[-1\]"), ([0, 9, 2, 4], r"\[4, 9\]")])
def test_layers_outside(layers: list[int], named: str) -> None:
    encoder = hostile_encoder(*SMALL)
    with pytest.raises(ValueError, match=f"layers {named} do not exist: fair-esm model has 0 to 2"):
        encoder(pack(["MKT"]), layers=layers)


def test_forward_runs_the_head_only_when_asked() -> None:
    encoder = hostile_encoder(*SMALL)
    assert encoder.head is not None
    rows: list[int] = []
    encoder.head.register_forward_hook(lambda _, args, output: rows.append(len(args[0])))
    hidden_TD = encoder(pack(["MKT", "A"]), layers=[0, 1, 2]).hidden_TD
    encoder.encode(["MKT"])
    Embedder(encoder).embed(["MKT"])
    assert rows == []
    logits_NV = encoder.logits(hidden_TD[2:4])
    assert rows == [2]
    assert logits_NV.shape == (2, len(TOKENS))
    torch.testing.assert_close(logits_NV, encoder.logits(hidden_TD)[2:4], rtol=1e-5, atol=1e-4)


def test_logits_without_head() -> None:
    encoder = Encoder(hostile_encoder(*SMALL).config, head=False, name="headless")
    hidden_TD = encoder(pack(["MKT"])).hidden_TD
    with pytest.raises(ValueError, match="headless has no language-model head: its checkpoint holds the encoder alone"):
        encoder.logits(hidden_TD)


def test_empty_batch() -> None:
    encoder = hostile_encoder(*SMALL)
    output = encoder(pack([]), layers=[0, 2])
    assert output.hidden_TD.shape == output.layers[0].shape == output.layers[2].shape == (0, 64)
    assert encoder.logits(output.hidden_TD).shape == (0, len(TOKENS))


def test_rows_of_nobody_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are compiled for their shapes, batches are filled up: what is asked for has the same numbers."""
    encoder = hostile_encoder(*SMALL).double()
    batches = [_batch([(_protein(length), 0.2), (_protein(5), 0.0)]) for length in (1, 9, 70)]
    everything = range(3)
    plain = [(encoder(batch, layers=everything), encoder.stream(batch), encoder.hidden(batch, 1)) for batch in batches]
    heights: set[int] = set()
    multiply = module.Linear.product

    def watched(self: module.Linear, rows: torch.Tensor) -> Product:
        heights.add(len(rows))
        return multiply(self, rows)

    monkeypatch.setattr(module, "is_compiled", lambda dtype, device: True)
    monkeypatch.setattr(module.Linear, "product", watched)
    for batch, (output, stream_TD, hidden_TD) in zip(batches, plain, strict=True):
        filled = encoder(batch, layers=everything)
        pairs = [(filled.hidden_TD, output.hidden_TD), (encoder.stream(batch), stream_TD)]
        pairs += [(encoder.hidden(batch, 1), hidden_TD)]
        pairs += [(filled.layers[layer], output.layers[layer]) for layer in everything]
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert heights == {16, 32, 80}
    assert encoder(pack([])).hidden_TD.shape == (0, 64)


def test_leaves_its_batch_alone() -> None:
    batch = _batch([(_protein(20), 0.3)])
    before = copy.deepcopy(batch)
    hostile_encoder(*SMALL)(batch)
    for name in ("tokens_T", "cu_seqlens"):
        assert torch.equal(getattr(batch, name), getattr(before, name))


# encode


def test_encode_gives_residues_of_the_last_layer() -> None:
    encoder = hostile_encoder(*SMALL)
    proteins = [_protein(5), _protein(1), "", RESIDUES]
    encoded = encoder.encode(proteins)
    batch = pack(proteins)
    with torch.inference_mode():
        hidden = _by_sequence(encoder(batch).hidden_TD, batch)
    assert [array.shape for array in encoded] == [(5, 64), (1, 64), (0, 64), (len(RESIDUES), 64)]
    for array, hidden_LD in zip(encoded, hidden, strict=True):
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, hidden_LD[1:-1].numpy())
    assert [parameter.grad for parameter in encoder.parameters()] == [None] * len(list(encoder.parameters()))


def test_encode_nothing() -> None:
    assert hostile_encoder(*SMALL).encode([]) == []


def test_encode_takes_lower_case() -> None:
    encoder = hostile_encoder(*SMALL)
    np.testing.assert_array_equal(encoder.encode(["mkTa"])[0], encoder.encode(["MKTA"])[0])


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float64])
def test_encode_gives_fp32_in_any_precision(precision: torch.dtype) -> None:
    encoder = hostile_encoder(*SMALL).to(precision)
    assert encoder.dtype == precision
    (array,) = encoder.encode(["MKT"])
    assert array.dtype == np.float32
    assert np.isfinite(array).all()


@pytest.mark.parametrize("protein", ["MK1T", "MK T", "MKJ", "MKé", "<mask>", "MK*"])
def test_encode_refuses_what_is_no_letter_of_the_alphabet(protein: str) -> None:
    with pytest.raises(ValueError, match=r"sequences\[1\], residue \d: .* is not in the alphabet"):
        hostile_encoder(*SMALL).encode(["MKT", protein])


def test_properties() -> None:
    encoder = hostile_encoder(*SMALL)
    assert (encoder.dim, encoder.family, encoder.name) == (64, "esm2", "fair-esm model")
    assert encoder.device == torch.device("cpu")
    assert encoder.dtype == torch.float32


# Real weights


def _check_bf16(proteins: list[str]) -> None:
    folder = shared_path(REAL_8M)
    exact = Embedder(load_model(folder, device="cpu", precision="fp32")).embed(proteins)
    rounded = Embedder(load_model(folder, device="cpu", precision="bf16")).embed(proteins)
    assert isinstance(exact, np.ndarray)
    assert isinstance(rounded, np.ndarray)
    norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
    cosine_B = (exact * rounded).sum(axis=1) / norms
    worst = int(cosine_B.argmin())
    print(f"smallest cosine of {len(proteins)}: {cosine_B[worst]:.6f}, {len(proteins[worst])} residues")
    assert cosine_B[worst] >= 0.9995, f"sequence {worst}: {cosine_B[worst]}"


def test_bf16_embeddings_of_real_proteins() -> None:
    # The first 40 of up to 300 residues: bf16 is slow where the hardware has none.
    proteins = [protein for protein in shared_sequences(UNIPROT_500) if len(protein) <= 300][:40]
    assert len(proteins) == 40
    _check_bf16(proteins)


@pytest.mark.slow
def test_bf16_embeddings_of_500_real_proteins() -> None:
    proteins = shared_sequences(UNIPROT_500)
    assert len(proteins) == 500
    _check_bf16(proteins)


def test_parity_with_transformers_on_real_weights() -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_path(REAL_8M_MLM)
    theirs = transformers.EsmForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder, device="cpu", precision="fp32")
    short = [protein for protein in shared_sequences(UNIPROT_500) if len(protein) < 260]
    batch = _batch([(short[0], 0.0), (short[1], 0.15), (short[2], 0.6), ("M", 0.0), ("X" * 9, 0.0), (short[3], 0.01)])
    rows = _by_sequence(batch.tokens_T.long(), batch)
    tokens_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    inside_BL = tokens_BL != PAD_ID
    with torch.inference_mode():
        output = theirs(tokens_BL, attention_mask=inside_BL.long(), output_hidden_states=True)
    got = _outputs(ours, batch)
    wanted = {f"layer {layer}": hidden_BLD for layer, hidden_BLD in enumerate(output.hidden_states)}
    for name, tensor in (wanted | {"logits": output.logits}).items():
        error = float((got[name] - tensor[inside_BL]).abs().max())
        assert error <= 1e-4, f"{name}: {error:.3g}"
