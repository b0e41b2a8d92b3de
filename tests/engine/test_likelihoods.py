"""Scores of a decoder: against a loop in fp64 that spells proteins by itself, transformers' loss, and by hand.

Shapes: N variants.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.engine import Encoder, InputError, likelihoods, score_variants
from protnest.engine.alphabet import TOKENS
from protnest.engine.config import EncoderConfig
from protnest.engine.decoder import Decoder
from protnest.engine.decoder_batches import DecoderBatches
from protnest.engine.likelihoods import LikelihoodRunner, Reach
from protnest.engine.packing import PackedBatch
from protnest.engine.quantise_decoder import quantised_decoder
from protnest.engine.retry import DoesNotFit
from protnest.engine.variants import variant_of_sequence
from protnest.engine.vocabulary import BytePairVocabulary, ResidueVocabulary, Vocabulary
from tokenizers import Tokenizer

from support.gpt2_models import END_OF_TEXT, byte_pairs, fasta_text, gentle_pair
from support.tiny import random_proteins

# With a line break inside, and an X; the models have 96 places.
WILD_TYPE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGXEKAVQVKVKALPDA"
SUBSTITUTIONS = ["M1A", "A65W", "K2A:X51K", "WT", "M1A", "A4A", "V59C:K60W:A61D"]
INDELS = [WILD_TYPE[1:], WILD_TYPE[:20] + "GG" + WILD_TYPE[20:], "M", WILD_TYPE + "A", WILD_TYPE[::-1]]
METHOD: Any = "pseudo-ll"
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=[False, True], ids=["pairs", "residues"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder]:
    return gentle_pair(tmp_path_factory.mktemp("gpt2") / "toy", residues=request.param)


@pytest.fixture
def decoder(pair: tuple[Any, Decoder]) -> Decoder:
    return pair[1]


def _ids(decoder: Decoder, sequence: str) -> list[int]:
    """The protein's tokens by another hand."""
    if isinstance(decoder.vocabulary, ResidueVocabulary):
        return [TOKENS.index(token) for token in ("<cls>", *sequence, "<eos>")]
    end = byte_pairs().token_to_id(END_OF_TEXT)
    return [end, *byte_pairs().encode(fasta_text(sequence)).ids, end]


def _gold(model: Any, decoder: Decoder, sequence: str) -> float:
    """Token by token, each from a run of all those before it."""
    model, ids, total = copy.deepcopy(model).double(), _ids(decoder, sequence), 0.0
    for place in range(1, len(ids)):
        with torch.no_grad():
            row_V = model(torch.tensor([ids[:place]])).logits[0, -1]
        assert row_V.dtype == torch.float64
        total += math.log(float(torch.exp(row_V - row_V.max())[ids[place]] / torch.exp(row_V - row_V.max()).sum()))
    return total


def _mutant(name: str) -> str:
    letters = list(WILD_TYPE)
    for part in [] if name == "WT" else name.split(":"):
        assert letters[int(part[1:-1]) - 1] == part[0]
        letters[int(part[1:-1]) - 1] = part[-1]
    return "".join(letters)


def test_scores_are_differences_of_log_likelihoods(pair: tuple[Any, Decoder]) -> None:
    """Substitutions, insertions and deletions, in the order in which they are asked for."""
    model, decoder = pair
    variants = [*SUBSTITUTIONS, *(variant_of_sequence(each, WILD_TYPE) for each in INDELS)]
    got = score_variants(decoder, WILD_TYPE, variants, method=METHOD)
    gold = {each: _gold(model, decoder, each) for each in {WILD_TYPE, *map(_mutant, SUBSTITUTIONS), *INDELS}}
    wanted = np.array([gold[each] - gold[WILD_TYPE] for each in [*map(_mutant, SUBSTITUTIONS), *INDELS]])
    assert (got.dtype, got.shape) == (np.float32, (12,))
    assert np.abs(got - wanted).max() <= TOLERANCE, (got, wanted)
    assert (got[3], got[5]) == (0.0, 0.0)
    assert got[0] == got[4] != 0
    assert np.ptp(wanted) > 3


def test_log_likelihoods_are_transformers_loss(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    sequences = [WILD_TYPE, "M", *INDELS]
    got = LikelihoodRunner(decoder).run(sequences)
    assert (got.dtype, got.shape) == (np.float64, (7,))
    for value, sequence in zip(got.tolist(), sequences, strict=True):
        ids = torch.tensor([_ids(decoder, sequence)])
        with torch.no_grad():
            loss = copy.deepcopy(model).double()(ids, labels=ids).loss
        assert value == pytest.approx(-float(loss) * (ids.shape[1] - 1), abs=TOLERANCE)


def test_a_uniform_model_by_hand(decoder: Decoder) -> None:
    """Each token costs log V, the end among them: a deletion gains one, an insertion costs one."""
    flat = copy.deepcopy(decoder)
    for parameter in flat.parameters():
        torch.nn.init.zeros_(parameter)
    each = math.log(decoder.vocabulary.size)
    assert LikelihoodRunner(flat).run(["MKT"])[0] == pytest.approx(-each * (len(_ids(decoder, "MKT")) - 1))
    if isinstance(decoder.vocabulary, ResidueVocabulary):
        indels = [variant_of_sequence(sequence, "MKTA") for sequence in ("MKA", "MKTAA", "MKTW", "M")]
        got = score_variants(flat, "MKTA", indels, method=METHOD)
        np.testing.assert_allclose(got, [each, -each, 0, 3 * each], rtol=1e-6)


# What is run


@contextmanager
def _seen(most: int | None = None) -> Iterator[list[tuple[int, ...]]]:
    """Tokens of each sequence of each batch that is tried; those of more than so many tokens run out of memory."""
    real, tried = Decoder.forward, list[tuple[int, ...]]()

    def forward(self: Decoder, batch: PackedBatch) -> torch.Tensor:
        tried.append(batch.lengths_B)
        if most is not None and sum(batch.lengths_B) > most:
            message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."
            raise torch.OutOfMemoryError(message)
        return real(self, batch)

    with mock.patch.object(Decoder, "forward", forward):
        yield tried


def test_distinct_mutants_run_once(decoder: Decoder) -> None:
    done: list[int] = []
    with _seen() as tried:
        score_variants(decoder, WILD_TYPE, SUBSTITUTIONS, method=METHOD, after_batch=done.append)
    assert sum(map(len, tried)) == 5
    assert len(tried) == 1
    assert sum(done) == 5 * len(WILD_TYPE)


def test_batches_keep_to_their_budget(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds of one batch and in few, and the scores are the same."""
    sequences = [*random_proteins(30, seed=2), WILD_TYPE]
    usual = LikelihoodRunner(decoder).run(sequences)
    for rounds, most in ((1, 70), (2, 200), (64, 130), (64, 1)):
        monkeypatch.setattr(likelihoods, "_ROUND_BATCHES", rounds)
        with _seen() as tried:
            got = LikelihoodRunner(decoder, max_tokens=most).run(sequences)
        np.testing.assert_allclose(got, usual, rtol=0, atol=TOLERANCE)
        assert all(sum(lengths) <= most or len(lengths) == 1 for lengths in tried)
        assert sum(map(len, tried)) == 31
        if rounds == 64 and most > 1:
            assert len(tried) <= sum(map(sum, tried)) / most * 11 / 9 + 4


def test_nothing_to_score(decoder: Decoder) -> None:
    assert LikelihoodRunner(decoder).run([]).shape == (0,)
    assert score_variants(decoder, WILD_TYPE, [], method=METHOD).shape == (0,)


def test_logits_in_parts(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = LikelihoodRunner(decoder).run(INDELS)
    for most in (1, 3 * decoder.vocabulary.size):
        monkeypatch.setattr(likelihoods, "_LOGITS", most)
        np.testing.assert_allclose(LikelihoodRunner(decoder).run(INDELS), usual, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rounds", [1, 64])
def test_batches_that_do_not_fit_are_cut(
    decoder: Decoder, rounds: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(likelihoods, "_ROUND_BATCHES", rounds)
    sequences, done = random_proteins(40, seed=5), list[int]()
    usual = LikelihoodRunner(decoder).run(sequences)
    with caplog.at_level(logging.INFO, logger="protnest.engine.retry"), _seen(120) as tried:
        got = LikelihoodRunner(decoder, max_tokens=400, after_batch=done.append).run(sequences)
    np.testing.assert_allclose(got, usual, rtol=0, atol=TOLERANCE)
    failed = [lengths for lengths in tried if sum(lengths) > 120]
    # Learnt once, and kept from round to round.
    assert 1 <= len(failed) <= 3
    assert 1 <= len(caplog.messages) <= 3
    assert f"a batch of {min(map(sum, failed))} tokens does not fit" in caplog.text
    assert sum(done) == sum(map(len, sequences))


def test_logits_that_do_not_fit_are_cut_too(decoder: Decoder) -> None:
    """Memory may end after the hidden states are there."""
    real: Callable[..., torch.Tensor] = Decoder.logits

    def logits(self: Decoder, hidden_ND: torch.Tensor) -> torch.Tensor:
        if len(hidden_ND) > 100:
            raise torch.OutOfMemoryError
        return real(self, hidden_ND)

    usual = LikelihoodRunner(decoder).run(INDELS)
    with mock.patch.object(Decoder, "logits", logits):
        np.testing.assert_allclose(LikelihoodRunner(decoder).run(INDELS), usual, rtol=0, atol=TOLERANCE)


def test_what_does_not_fit_alone(decoder: Decoder) -> None:
    problem = (
        rf"a run of {len(WILD_TYPE)} residues does not fit into the memory of cpu, not even alone "
        r"\(CUDA out of memory\); a lower precision or a smaller model needs less$"
    )
    with _seen(20), pytest.raises(InputError, match=f"^{problem}"):
        score_variants(decoder, WILD_TYPE, ["M1A"], method=METHOD)
    ids = [decoder.vocabulary.encode(each) for each in ("MK", "M", WILD_TYPE, "MKT")]
    with _seen(20), pytest.raises(DoesNotFit, match=r"^sequence 2: ") as caught:
        DecoderBatches(decoder).run(ids, lambda rows, batch: decoder.log_likelihoods(batch) and None)
    assert caught.value.row == 2


def test_other_errors_are_not_caught(decoder: Decoder) -> None:
    broken = mock.patch.object(Decoder, "forward", side_effect=RuntimeError("CUDA error: an illegal address"))
    with broken, pytest.raises(RuntimeError, match="illegal address"):
        LikelihoodRunner(decoder).run(["MKT"])


# Several models, and precisions


def test_ensembles(decoder: Decoder, tmp_path: Path) -> None:
    """Of decoders of any vocabulary, and an encoder among them."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(layers=1, width=16, heads=2, feedforward=32))
    models = [decoder, gentle_pair(tmp_path / "other", seed=3)[1], encoder]
    each = np.stack([score_variants(model, WILD_TYPE, SUBSTITUTIONS, method=METHOD) for model in models])
    assert (np.ptp(each, axis=0)[[0, 1]] > 0.01).all()
    for aggregate, wanted in (("mean", each.mean(axis=0)), ("max", each.max(axis=0))):
        got = score_variants(models, WILD_TYPE, SUBSTITUTIONS, method=METHOD, aggregate=aggregate)  # type: ignore[arg-type]
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_precisions(decoder: Decoder, precision: str) -> None:
    names = [f"{letter}{place}{other}" for place, letter in enumerate(WILD_TYPE, start=1) for other in "AW"]
    exact = score_variants(decoder, WILD_TYPE, names, method=METHOD)
    rounded = quantised_decoder(decoder) if precision == "int8" else copy.deepcopy(decoder).to(torch.bfloat16)
    got = score_variants(rounded, WILD_TYPE, names, method=METHOD)
    assert 0 < np.sqrt(np.mean((got - exact) ** 2)) < 0.2 * exact.std()
    assert np.corrcoef(got, exact)[0, 1] > 0.98


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "masked-marginal"}, "it scores by pseudo-ll alone, got masked-marginal, the default"),
        ({"method": "wt-marginal"}, "it scores by pseudo-ll alone, got wt-marginal"),
        ({"method": "mutant-marginal"}, "it scores by pseudo-ll alone, got mutant-marginal"),
        ({"compat": "fair-esm"}, "compat 'fair-esm' repeats scripts for masked language models; leave it out"),
    ],
)
def test_methods_of_encoders(decoder: Decoder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^toy is a decoder.*{re.escape(message)}$"):
        score_variants(decoder, WILD_TYPE, ["M1A"], **({"method": "pseudo-ll"} | changes))


def test_batches_must_hold_something(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="max_tokens must be positive, got 0"):
        score_variants(decoder, WILD_TYPE, ["M1A"], method=METHOD, max_tokens=0)


def test_longest_and_too_long(pair: tuple[Any, Decoder]) -> None:
    """As long as the places reach, start and end among the tokens; refused one token beyond."""
    model, decoder = pair
    protein = "".join(random_proteins(20, seed=9))
    fits = max(length for length in range(1, len(protein)) if len(_ids(decoder, protein[:length])) <= 96)
    assert len(_ids(decoder, protein[:fits])) == 96
    got = LikelihoodRunner(decoder).run([protein[:fits]])[0]
    assert got == pytest.approx(_gold(model, decoder, protein[:fits]), abs=TOLERANCE)
    tokens = len(_ids(decoder, protein[: fits + 1]))
    problem = f"^{fits + 1} residues are {tokens} tokens, and toy has places for 96: a decoder reads a protein whole"
    reach = Reach.of(decoder)
    reach.check(protein[:fits])
    with pytest.raises(InputError, match=problem):
        reach.check(protein[: fits + 1])
    for wild_type, name in ((protein[: fits + 1], "WT"), (protein[:fits], None)):
        variant = name or variant_of_sequence(protein[: fits + 1], wild_type)
        with pytest.raises(InputError, match=problem):
            score_variants(decoder, wild_type, [variant], method=METHOD)


def test_most_proteins_need_no_spelling_to_be_known_to_fit(decoder: Decoder) -> None:
    """The bound holds for the longest spelling that there is: a token a letter."""
    for length in (1, 59, 60, 61, 88, 89, 90, 91, 92, 93, 94):
        sequence = "W" * length
        with mock.patch.object(type(decoder.vocabulary), "encode", side_effect=AssertionError) as spelt:
            try:
                Reach.of(decoder).check(sequence)
            except AssertionError:
                assert length > 90
        assert spelt.call_count or length + 2 + 1 + -(-length // 60) <= 96


class _Deaf:
    """A vocabulary that drops a letter, as a tokenizer may that was trained on other text."""

    def __init__(self, inner: Vocabulary) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, sequence: str, *, whole: bool = True) -> Any:
        return self._inner.encode(sequence.replace("X", ""), whole=whole)


@pytest.mark.parametrize(("sequence", "place"), [("MKXT", 3), ("MKTX", 4)])
def test_letters_that_the_vocabulary_lacks(decoder: Decoder, sequence: str, place: int) -> None:
    deaf = copy.deepcopy(decoder)
    deaf.vocabulary = _Deaf(decoder.vocabulary)  # type: ignore[assignment]
    with pytest.raises(InputError, match=f"^toy cannot spell the protein: residue {place}, 'X', is not what"):
        LikelihoodRunner(deaf).run([sequence])


def test_vocabularies_have_hashes(tmp_path: Path) -> None:
    """Of all that decides the spelling: the same tokens with other merges are another vocabulary."""
    first, same, other = (BytePairVocabulary(byte_pairs(400, skip=skip)._tokenizer) for skip in (0, 0, 24))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert ResidueVocabulary().fingerprint not in (first.fingerprint, other.fingerprint)
    assert len(first.fingerprint) == len(ResidueVocabulary().fingerprint) == 32
    spelling = json.loads(byte_pairs()._tokenizer.to_str())
    spelling["model"]["merges"].reverse()
    turned = BytePairVocabulary(Tokenizer.from_str(json.dumps(spelling)))
    assert turned.tokens == first.tokens
    assert turned.encode(WILD_TYPE).tolist() != first.encode(WILD_TYPE).tolist()
    assert turned.fingerprint != first.fingerprint
