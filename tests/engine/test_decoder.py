"""GPT-2, packed and token by token: against transformers' own, in every precision.

Shapes: B sequences, T packed tokens, N tokens of a step, L tokens of one sequence, V vocabulary, D width.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from protnest.engine import decoder as module
from protnest.engine.decoder import Decoder, pack_ids
from protnest.engine.decoder_checkpoint import read_decoder, save_decoder
from protnest.engine.errors import InputError
from protnest.engine.models import load_decoder
from protnest.engine.quantise_decoder import QuantisedDecoder, quantised_decoder
from protnest.kernels.cached_attention import KeyValueCache, cache_prompts, cached_attention
from protnest.kernels.hardware import multiplies_bf16
from protnest.kernels.product import Product
from protnest.kernels.product_shapes import rows_to_multiply
from protnest.kernels.varlen_attention import varlen_attention

from support.gpt2_models import example_proteins, gpt2_logits, load_pair

Ids = npt.NDArray[np.int64]

# Head widths 16 and 8; an inner width of four times the width, and not; byte pairs and residues.
SIZES: dict[str, dict[str, Any]] = {
    "pairs, heads of 16": {"layers": 2, "width": 48, "heads": 3},
    "pairs, heads of 8": {"layers": 3, "width": 32, "heads": 4, "n_inner": 40},
    "residues": {"layers": 2, "width": 32, "heads": 2, "residues": True},
}
PROTEINS = [
    protein[begin:][:length]
    for protein, begin, length in zip(example_proteins(), range(9), (1, 59, 7, 60, 61, 2, 88, 30), strict=False)
]


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder, Path]:
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    return (*load_pair(folder, **SIZES[request.param]), folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_pair(tmp_path_factory.mktemp("gpt2"))[1]


def _ids(decoder: Decoder, proteins: list[str] = PROTEINS) -> list[Ids]:
    return [decoder.vocabulary.encode(protein) for protein in proteins]


@torch.no_grad()
def _logits(decoder: Decoder, ids: list[Ids]) -> torch.Tensor:
    return decoder.logits(decoder(pack_ids(ids)))


# Packed


def test_logits_are_transformers(pair: tuple[Any, Decoder, Path]) -> None:
    """Each sequence alone, and all of them in one ragged batch: up to the rounding of fp32."""
    theirs, ours, _ = pair
    ids = _ids(ours)
    gold_TV = gpt2_logits(copy.deepcopy(theirs).double(), ids)
    allowed = 3e-6 * float(gold_TV.abs().max())
    alone_TV = torch.cat([_logits(ours, [each]) for each in ids])
    for found_TV in (_logits(ours, ids), alone_TV):
        assert found_TV.dtype == torch.float32
        torch.testing.assert_close(found_TV.double(), gold_TV, rtol=0, atol=allowed)


def test_logits_in_fp64(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    ids = _ids(ours)
    gold_TV = gpt2_logits(copy.deepcopy(theirs).double(), ids)
    found_TV = _logits(copy.deepcopy(ours).double(), ids)
    torch.testing.assert_close(found_TV, gold_TV, rtol=0, atol=1e-14 * float(gold_TV.abs().max()))


def test_log_likelihoods_written_out(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    ids = _ids(ours)
    found = ours.log_likelihoods(pack_ids(ids))
    assert len(found) == len(ids)
    for ids_L, values in zip(ids, found, strict=True):
        log_probs_LV = gpt2_logits(copy.deepcopy(theirs).double(), [ids_L]).log_softmax(dim=-1)
        wanted = [float(log_probs_LV[place, token]) for place, token in enumerate(ids_L[1:].tolist())]
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, wanted, rtol=0, atol=2e-3)


def test_rows_of_nobody_leave_no_trace(pair: tuple[Any, Decoder, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are compiled for their shapes, batches are filled up: what is asked for has the same numbers."""
    ours = copy.deepcopy(pair[1]).double()
    ids = _ids(ours)
    wanted_TV, wanted = _logits(ours, ids), ours.log_likelihoods(pack_ids(ids))
    heights: set[int] = set()
    attend = module.varlen_attention

    def watched(q_THK: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        heights.add(len(q_THK))
        return attend(q_THK, *rest, **options)

    monkeypatch.setattr(module, "is_compiled", lambda dtype, device: True)
    monkeypatch.setattr(module, "varlen_attention", watched)
    torch.testing.assert_close(_logits(ours, ids), wanted_TV, rtol=1e-12, atol=1e-12)
    assert heights == {rows_to_multiply(len(wanted_TV))} != {len(wanted_TV)}
    for rows_at_once in (7, 1024):
        for found, values in zip(ours.log_likelihoods(pack_ids(ids), rows_at_once=rows_at_once), wanted, strict=True):
            np.testing.assert_allclose(found, values, rtol=0, atol=1e-12)
    start = np.array([ours.vocabulary.start])
    assert [each.size for each in ours.log_likelihoods(pack_ids([start]))] == [0]


def test_log_likelihoods_in_parts(decoder: Decoder) -> None:
    batch = pack_ids(_ids(decoder))
    whole, parts = decoder.log_likelihoods(batch), decoder.log_likelihoods(batch, rows_at_once=7)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


def test_log_likelihoods_of_little(decoder: Decoder) -> None:
    start = np.array([decoder.vocabulary.start])
    assert decoder.log_likelihoods(pack_ids([])) == []
    assert [each.size for each in decoder.log_likelihoods(pack_ids([start]))] == [0]
    two = np.array([decoder.vocabulary.start, 5])
    alone, among = decoder.log_likelihoods(pack_ids([two])), decoder.log_likelihoods(pack_ids([start, two, start]))
    assert [each.size for each in among] == [0, 1, 0]
    np.testing.assert_allclose(among[1], alone[0], atol=1e-4)


def test_neither_order_nor_neighbours_matter(decoder: Decoder) -> None:
    ids = _ids(decoder)
    hidden_TD = [each for each in decoder(pack_ids(ids)).split([len(each) for each in ids])]
    other = np.random.default_rng(0).integers(0, decoder.vocabulary.size, size=90)
    backwards = [*ids[::-1], other]
    for found_LD, wanted_LD in zip(
        decoder(pack_ids(backwards)).split([len(each) for each in backwards]), hidden_TD[::-1], strict=False
    ):
        torch.testing.assert_close(found_LD, wanted_LD, rtol=0, atol=1e-5)


def test_nothing_is_seen_ahead(decoder: Decoder) -> None:
    """Hidden states of a sequence's first tokens do not depend on the later ones."""
    ids = _ids(decoder)[6]
    whole_LD = decoder(pack_ids([ids]))
    for length in (1, 2, 17, len(ids) - 1):
        torch.testing.assert_close(decoder(pack_ids([ids[:length]])), whole_LD[:length], rtol=0, atol=1e-5)


def test_longest_and_too_long(decoder: Decoder) -> None:
    places = decoder.config.places
    long = np.full(places + 1, 5, dtype=np.int64)
    assert decoder(pack_ids([long[:-1], long[:3]])).shape == (places + 3, decoder.dim)
    with pytest.raises(ValueError, match=rf"a sequence has {places + 1} tokens; .* has positions for {places}$"):
        decoder(pack_ids([long[:3], long]))


def test_no_sequences(decoder: Decoder) -> None:
    assert decoder(pack_ids([])).shape == (0, decoder.dim)


def test_packing_ids() -> None:
    batch = pack_ids([np.array([3, 1, 4]), np.array([1]), np.array([50256, 2])])
    assert (batch.tokens_T.tolist(), batch.tokens_T.dtype) == ([3, 1, 4, 1, 50256, 2], torch.int32)
    assert (batch.cu_seqlens.tolist(), batch.cu_seqlens.dtype) == ([0, 3, 4, 6], torch.int32)
    assert (batch.lengths_B, batch.index_B.tolist()) == ((3, 1, 2), [0, 1, 2])


def test_what_it_is(decoder: Decoder) -> None:
    assert (decoder.dim, decoder.family, decoder.precision) == (48, "gpt2", "fp32")
    assert (decoder.device, decoder.dtype, decoder.product_dtype) == (torch.device("cpu"), torch.float32, torch.float32)


def test_gradients_are_transformers(tmp_path: Path) -> None:
    """As a student is trained: the embedding has those of both its uses."""
    theirs, ours = load_pair(tmp_path, residues=True)
    theirs, ours = theirs.double(), ours.double().requires_grad_(True)
    ids = [_ids(ours)[1]]
    theirs(torch.as_tensor(ids[0])[None]).logits[0].log_softmax(dim=-1)[:-1, 7].sum().backward()
    ours.logits(ours(pack_ids(ids))).log_softmax(dim=-1)[:-1, 7].sum().backward()
    for own, given in (
        (ours.embed_tokens.weight.grad, theirs.transformer.wte.weight.grad),
        (ours.embed_places.weight.grad, theirs.transformer.wpe.weight.grad),
        (ours.layers[0].qkv.weight.grad, theirs.transformer.h[0].attn.c_attn.weight.grad.T),  # type: ignore[union-attr]
    ):
        assert own is not None
        torch.testing.assert_close(own, given, rtol=1e-9, atol=1e-10 * float(given.abs().max()))


def test_the_head_follows_the_embedding(decoder: Decoder) -> None:
    """bf16 keeps its head in fp32 as well: it must not outlive the weights that it was made of."""
    narrow = copy.deepcopy(decoder).to(torch.bfloat16)
    hidden_ND = torch.randn(3, decoder.dim, generator=torch.Generator().manual_seed(0))
    before_NV = narrow.logits(hidden_ND)
    with torch.no_grad():
        narrow.embed_tokens.weight.mul_(2)
    torch.testing.assert_close(narrow.logits(hidden_ND), 2 * before_NV)


# Turned matrices


def _straight(decoder: Decoder) -> Decoder:
    """The same decoder as it would be made from nothing."""
    straight = copy.deepcopy(decoder)
    for parameter in straight.parameters():
        parameter.data = parameter.data.contiguous()
    return straight


def test_checkpoints_are_read_turned(decoder: Decoder) -> None:
    for name, own in decoder.named_parameters():
        lies_turned = own.dim() == 2 and name != "embed_places.weight"
        assert own.is_contiguous() != lies_turned, name
        assert not lies_turned or own.T.is_contiguous(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_turned_matrices_give_the_same_states(decoder: Decoder, precision: str) -> None:
    """Up to the order in which a product adds up."""
    turned, straight, allowed = copy.deepcopy(decoder), _straight(decoder), 1e-5
    if precision == "bf16":
        turned, straight, allowed = turned.to(torch.bfloat16), straight.to(torch.bfloat16), 0.02
    ids = _ids(decoder)
    wanted_TV, found_TV = _logits(straight, ids), _logits(turned, ids)
    assert found_TV.dtype == torch.float32
    assert float((found_TV - wanted_TV).norm() / wanted_TV.norm()) < allowed


def test_turned_matrices_are_saved_as_ever(decoder: Decoder, tmp_path: Path) -> None:
    save_decoder(_straight(decoder), tmp_path / "straight")
    save_decoder(decoder, tmp_path / "turned")
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "turned" / path.name).read_bytes(), path.name
    assert read_decoder(tmp_path / "turned")[0].fingerprint == decoder.fingerprint


def test_turned_matrices_are_quantised_as_ever(decoder: Decoder) -> None:
    own, given = (quantised_decoder(each) for each in (decoder, _straight(decoder)))
    ids = _ids(decoder)
    wanted_TV, found_TV = _logits(given, ids), _logits(own, ids)
    # What is rounded was computed in another order.
    assert float((found_TV - wanted_TV).norm() / wanted_TV.norm()) < 5e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_heads_product_is_the_logits(pair: tuple[Any, Decoder, Path], precision: str) -> None:
    ours = load_decoder(pair[2], device="cpu", precision=precision)
    hidden_ND = torch.randn(3, ours.dim, generator=torch.Generator().manual_seed(0))
    product = ours.head_product(hidden_ND)
    assert (product.scales is not None) == (precision == "int8")
    torch.testing.assert_close(product.numbers(), ours.logits(hidden_ND), rtol=1e-5, atol=1e-5)


# Lower precisions


@pytest.mark.parametrize(("precision", "worst", "typical"), [("bf16", 0.9997, 0.01), ("int8", 0.998, 0.02)])
def test_lower_precisions_are_close(
    pair: tuple[Any, Decoder, Path], precision: str, worst: float, typical: float
) -> None:
    """Cosine of every token's logits to fp32's, and the error's size relative to them: twice what was measured.

    That was without units for bf16. With them the rows are rounded as well: as in transformers, and no worse.
    """
    theirs, whole, folder = pair
    ours, ids = load_decoder(folder, device="cpu", precision=precision), _ids(whole)
    assert (ours.precision, ours.fingerprint) == (precision, whole.fingerprint)
    wanted_TV, found_TV = _logits(whole, ids), _logits(ours, ids)
    if precision == "bf16" and multiplies_bf16(torch.device("cpu")):
        rounded_TV = gpt2_logits(copy.deepcopy(theirs).bfloat16(), ids).float()
        worst = min(worst, float(F.cosine_similarity(rounded_TV, wanted_TV).min()))
    assert found_TV.dtype == torch.float32
    assert float(F.cosine_similarity(found_TV, wanted_TV).min()) > worst
    assert float((found_TV - wanted_TV).norm() / wanted_TV.norm()) < typical
    # It did run in another precision.
    assert float((found_TV - wanted_TV).norm() / wanted_TV.norm()) > typical / 20


def test_int8_leaves_the_given_decoder_as_it_is(decoder: Decoder) -> None:
    before = copy.deepcopy(decoder.state_dict())
    ours = quantised_decoder(decoder)
    with torch.no_grad():
        for own in (ours.embed_tokens, ours.embed_places, ours.final_norm):
            own.weight.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())
    assert (ours.name, ours.fingerprint, ours.config) == (decoder.name, decoder.fingerprint, decoder.config)
    assert ours.vocabulary is decoder.vocabulary
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())
    assert ours.head.values_OI.dtype == torch.int8


def test_int8_has_the_same_bits_alone_and_in_a_batch(decoder: Decoder) -> None:
    ours = quantised_decoder(decoder)
    ids = _ids(ours)
    together = _logits(ours, ids).split([len(each) for each in ids])
    for each, wanted_LV in zip(ids, together, strict=True):
        assert torch.equal(_logits(ours, [each]), wanted_LV)


def test_what_int8_refuses(decoder: Decoder) -> None:
    ours = quantised_decoder(decoder)
    assert isinstance(ours, QuantisedDecoder)
    for broken in (ours, copy.deepcopy(decoder).to(torch.bfloat16), copy.deepcopy(decoder).to("meta")):
        with pytest.raises(InputError, match="int8 is made of an fp32 model on the CPU"):
            quantised_decoder(broken)
    for move in (lambda: ours.to(torch.bfloat16), ours.half, ours.double, lambda: ours.to("meta")):
        with pytest.raises(InputError, match="runs in int8, on the CPU and with fp32 beside, and cannot become"):
            move()
    assert ours.to("cpu", torch.float32) is ours
    with pytest.raises(InputError, match="runs in int8, which is not trained"):
        ours.train()
    for name in ("layers.1.fc1.weight", "embed_tokens.weight"):
        broken = copy.deepcopy(decoder)
        with torch.no_grad():
            broken.get_parameter(name)[2, 3] = torch.nan
        with pytest.raises(InputError, match=rf"{decoder.name} cannot run in int8: weight row \d+ is not finite"):
            quantised_decoder(broken)


# Token by token


class Steps:
    """Runs sequences token by token, in slots that were handed out in another order; what is not set is NaN."""

    def __init__(self, decoder: Decoder, slots: int, *, dtype: torch.dtype = torch.float32) -> None:
        config = decoder.config
        self._decoder = decoder
        self._caches = [
            KeyValueCache.empty(slots, config.heads, config.places, config.head_width, dtype=dtype)
            for _ in range(config.layers)
        ]
        for cache in self._caches:
            for part in cache:
                part.fill_(torch.nan)

    @torch.no_grad()
    def prompt(self, sequences: list[Ids], slots: list[int]) -> torch.Tensor:
        """Whole prompts in one packed pass, which fills their slots: (T, D)."""
        decoder, batch = self._decoder, pack_ids(sequences)
        places_T = torch.cat([torch.arange(length) for length in batch.lengths_B])

        def attend(layer: int, qkv: Product) -> torch.Tensor:
            cache_prompts(qkv, self._caches[layer], torch.tensor(slots), batch.cu_seqlens, batch.lengths_B)
            heads = qkv.numbers().view(-1, 3 * decoder.config.heads, decoder.config.head_width).chunk(3, dim=1)
            return varlen_attention(*heads, batch.cu_seqlens, batch.lengths_B, causal=True).flatten(1)

        return decoder.run(batch.tokens_T, places_T, attend)

    @torch.no_grad()
    def step(self, tokens: list[int], slots: list[int], places: list[int]) -> torch.Tensor:
        """One more token for some sequences: (N, D)."""
        slots_N, places_N = torch.tensor(slots), torch.tensor(places)

        def attend(layer: int, qkv: Product) -> torch.Tensor:
            return cached_attention(qkv, self._caches[layer], slots_N, places_N)

        return self._decoder.run(torch.tensor(tokens), places_N, attend)


def _token_by_token(
    decoder: Decoder, ids: list[Ids], *, prompts: list[int], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Hidden states of each sequence, (L, D), its first tokens as a prompt."""
    slots = np.random.default_rng(1).permutation(len(ids) + 2)[: len(ids)].tolist()
    steps = Steps(decoder, len(ids) + 2, dtype=dtype)
    rows: list[list[torch.Tensor]] = [[] for _ in ids]
    prompted = [number for number, length in enumerate(prompts) if length]
    if prompted:
        begun_TD = steps.prompt([ids[number][: prompts[number]] for number in prompted], [slots[n] for n in prompted])
        for number, part_LD in zip(prompted, begun_TD.split([prompts[n] for n in prompted]), strict=True):
            rows[number] += list(part_LD)
    while running := [number for number, done in enumerate(rows) if len(done) < len(ids[number])]:
        places = [len(rows[number]) for number in running]
        tokens = [int(ids[number][place]) for number, place in zip(running, places, strict=True)]
        for number, row_D in zip(running, steps.step(tokens, [slots[n] for n in running], places), strict=True):
            rows[number].append(row_D)
    return [torch.stack(done) for done in rows]


def test_token_by_token_is_the_packed_pass(pair: tuple[Any, Decoder, Path]) -> None:
    """Sequences that end at different times, begun without a prompt and with prompts of different lengths."""
    _, ours, _ = pair
    ids = _ids(ours)
    wanted = ours(pack_ids(ids)).split([len(each) for each in ids])
    for prompts in ([0] * len(ids), [len(each) * (number % 4) // 3 for number, each in enumerate(ids)]):
        for found_LD, wanted_LD in zip(_token_by_token(ours, ids, prompts=prompts), wanted, strict=True):
            torch.testing.assert_close(found_LD, wanted_LD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_token_by_token_in_every_precision(pair: tuple[Any, Decoder, Path], precision: str, dtype: torch.dtype) -> None:
    """Steps differ from the packed pass by no more than a few roundings of the narrowest dtype in play."""
    _, whole, folder = pair
    ours, ids = load_decoder(folder, device="cpu", precision=precision), _ids(whole)
    with torch.no_grad():
        packed_TD = ours(pack_ids(ids))
    prompts = [min(number, len(each)) for number, each in enumerate(ids)]
    stepped_TD = torch.cat(_token_by_token(ours, ids, prompts=prompts, dtype=dtype))
    allowed = 1e-4 if precision == "fp32" and dtype == torch.float32 else 0.02
    assert float((stepped_TD - packed_TD).norm() / packed_TD.norm()) < allowed
    assert float(F.cosine_similarity(stepped_TD, packed_TD).min()) > 0.999
