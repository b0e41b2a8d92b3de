"""The decode step: prompts, slots used anew, growth; and which graph it replays, with a stand-in on the CPU.

Shapes: S slots, V vocabulary, P places.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import decode_step, generation
from protnest.engine.decode_step import DecodeStep, Turn, token_sizes
from protnest.engine.decoder import Decoder, pack_ids
from protnest.engine.decoder_config import DecoderConfig
from protnest.engine.generation import Design, GenerationOptions, Generator
from protnest.engine.graphs import SWITCH
from protnest.engine.vocabulary import BytePairVocabulary, ResidueVocabulary
from protnest.kernels.next_token import NEVER, Filters

from support.gpt2_models import byte_pairs

CONFIG = DecoderConfig(layers=2, width=32, heads=2, feedforward=64, vocabulary=33, places=150)
GREEDY = Filters(top_k=1)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG, ResidueVocabulary(), name="tiny")
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval().requires_grad_(False)


def _turn(slot: int, ids: list[int], *, room: int = 1000, may_end: bool = True, uniform: float = 0.4) -> Turn:
    return Turn(slot=slot, token=ids[-1], length=len(ids) - 1, room=room, may_end=may_end, uniform=uniform)


def _expected(decoder: Decoder, ids: list[int]) -> tuple[int, float]:
    """The likeliest token that is a residue or the end, by a packed pass, and its log probability."""
    logits_V = decoder.logits(decoder(pack_ids([np.array(ids)])))[-1].double()
    allowed_V = torch.from_numpy(decoder.vocabulary.residues_V > 0)
    allowed_V[decoder.vocabulary.end] = True
    token = int(logits_V.masked_fill(~allowed_V, -torch.inf).argmax())
    return token, float(logits_V.log_softmax(dim=0)[token])


def _check(step: DecodeStep, sequences: dict[int, list[int]], steps: int) -> None:
    """Takes greedy steps of sequences by slot, each of which is what a packed pass says."""
    for _ in range(steps):
        expected = [_expected(step.decoder, ids) for ids in sequences.values()]
        chosen, nats = step.run([_turn(slot, ids) for slot, ids in sequences.items()])
        assert chosen == [token for token, _ in expected]
        assert nats == pytest.approx([log_p for _, log_p in expected], abs=1e-4)
        for ids, token in zip(sequences.values(), chosen, strict=True):
            ids.append(token)


# Prompts and slots


@pytest.mark.parametrize("prompt", ["", "M", "MKTAYIAKQR" * 7])
def test_prompts(decoder: Decoder, prompt: str) -> None:
    ids = decoder.vocabulary.encode(prompt, whole=False)
    step = DecodeStep(decoder, 3, GREEDY)
    step.read_prompt(ids)
    sequences = {slot: ids.tolist() for slot in (2, 0)}
    for slot in sequences:
        step.begin(slot, len(ids))
    sequences[0][-1] = 7  # another last token, so that the two differ
    _check(step, sequences, 5)


def test_another_prompt_takes_the_place_of_the_first(decoder: Decoder) -> None:
    step = DecodeStep(decoder, 1, Filters(top_k=1, repetition_penalty=5.0))
    first, second = (decoder.vocabulary.encode(text, whole=False) for text in ("ACDEFGHIKLMN", "WY"))
    for ids in (first, second):
        step.read_prompt(ids)
    step.begin(0, len(second))
    assert step._seen_SV[0].nonzero()[:, 0].tolist() == sorted(second.tolist())
    fresh = DecodeStep(decoder, 1, step.filters)
    fresh.read_prompt(second)
    fresh.begin(0, len(second))
    turn = _turn(0, second.tolist())
    assert step.run([turn]) == fresh.run([turn])


def test_of_a_slots_former_sequence_nothing_is_seen(decoder: Decoder) -> None:
    """Neither its keys and values nor, by the penalty, its tokens."""
    prompt = decoder.vocabulary.encode("MK", whole=False)
    filters = Filters(temperature=0.8, repetition_penalty=3.0)

    def take(step: DecodeStep, count: int) -> list[tuple[list[int], list[float]]]:
        step.begin(1, len(prompt))
        ids, outcomes = prompt.tolist(), []
        for number in range(count):
            outcomes.append(step.run([_turn(1, ids, may_end=False, uniform=(0.37 * number) % 1)]))
            ids.append(outcomes[-1][0][0])
        return outcomes

    used, fresh = (DecodeStep(decoder, 2, filters) for _ in range(2))
    for step in (used, fresh):
        step.read_prompt(prompt)
    take(used, 90)
    assert int(used._seen_SV[1].sum()) > 10
    assert used._seen_SV[0].sum() == 0
    assert take(used, 20) == take(fresh, 20)


def test_what_is_chosen_has_been_seen(decoder: Decoder) -> None:
    step = DecodeStep(decoder, 3, Filters())
    step.read_prompt(decoder.vocabulary.encode("", whole=False))
    for slot in (0, 2):
        step.begin(slot, 1)
    start = decoder.vocabulary.start
    (one, other), _ = step.run([_turn(2, [start], uniform=0.1), _turn(0, [start], uniform=0.9)])
    assert one != other
    for slot, held in ((2, {start, one}), (0, {start, other}), (1, set()), (3, {start})):
        assert set(step._seen_SV[slot].nonzero()[:, 0].tolist()) == held


def test_limits_reach_the_choice(decoder: Decoder) -> None:
    step = DecodeStep(decoder, 2, Filters())
    step.read_prompt(decoder.vocabulary.encode("", whole=False))
    for slot in (0, 1):
        step.begin(slot, 1)
    ids = [decoder.vocabulary.start]
    for uniform in np.linspace(0, 0.999, 30):
        (full, young), _ = step.run(
            [_turn(1, ids, room=0, uniform=uniform), _turn(0, ids, may_end=False, uniform=uniform)]
        )
        assert full == decoder.vocabulary.end
        assert decoder.vocabulary.residues_V[young] == 1


# Growth


def test_caches_grow_and_keep_what_they_hold(decoder: Decoder) -> None:
    step = DecodeStep(decoder, 2, GREEDY)
    step.read_prompt(decoder.vocabulary.encode("", whole=False))
    step.begin(0, 1)
    assert step.places == 64
    sequences = {0: [decoder.vocabulary.start]}
    grown = set()
    for _ in range(140):
        _check(step, sequences, 1)
        grown.add(step.places)
    # Never more than the model has places for.
    assert sorted(grown) == [64, 128, 150]
    step.grow(3)
    assert step.places == 150


def test_a_long_prompt_has_room(decoder: Decoder) -> None:
    step = DecodeStep(decoder, 1, GREEDY)
    step.read_prompt(decoder.vocabulary.encode("A" * 139, whole=False))
    assert step.places == 140


def test_caches_of_few_places() -> None:
    few = DecoderConfig(layers=1, width=16, heads=2, feedforward=16, vocabulary=33, places=9)
    small = Decoder(few, ResidueVocabulary()).to(torch.bfloat16).eval().requires_grad_(False)
    step = DecodeStep(small, 4, GREEDY)
    assert step.places == 9
    assert {(part.shape, part.dtype) for cache in step._caches for part in cache} == {((5, 2, 9, 8), torch.bfloat16)}


# Sizes


def test_sizes_of_residues() -> None:
    vocabulary = ResidueVocabulary()
    sizes_V = token_sizes(vocabulary)
    assert sizes_V.dtype == torch.int32
    assert sizes_V.tolist() == [1 if holds else NEVER for holds in vocabulary.residues_V.tolist()]


def test_sizes_of_byte_pairs() -> None:
    """Line breaks take no room, and may be chosen."""
    vocabulary = BytePairVocabulary(byte_pairs()._tokenizer)
    sizes_V = token_sizes(vocabulary)
    assert sizes_V.dtype == torch.int32
    assert sizes_V.tolist() == [len(vocabulary.decode(np.array([token]))) for token in range(vocabulary.size)]
    assert sizes_V.min() == 0
    assert sizes_V.max() > 1


# Graphs, with a stand-in


class _Standin:
    """Runs eagerly what a graph would replay, on buffers of its own, and counts."""

    made: list[int]
    replays: list[int]
    inputs: list[torch.Tensor]
    wrong = ""

    def __init__(self, step: DecodeStep, inputs: Any, places: int) -> None:
        if self.wrong == "cannot":
            step._seen_SV.fill_(True)  # what a run that was broken off may leave
            message = "operation not permitted when stream is capturing\nmore"
            raise RuntimeError(message)
        self.made.append(places)
        self._step, self._places, self._static = step, places, inputs.clone()
        # As when it warms up: with what the eager run has marked.
        self._outcome = step.take(self._static, places)

    def replay(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._static.copy_(inputs)
        self.replays.append(self._places)
        self.inputs.append(self._static.integers.clone())
        chosen_S, nats_S = self._step.take(self._static, self._places)
        if self.wrong == "tokens":
            chosen_S = (chosen_S + 1) % 33
        if self.wrong == "far off":
            nats_S = nats_S + 0.06
        if self.wrong == "no number":
            nats_S = nats_S * torch.nan
        for static, given in zip(self._outcome, (chosen_S, nats_S), strict=True):
            static.copy_(given)
        return self._outcome


class _Captured(DecodeStep):
    """A step that captures on the CPU, too."""

    last: DecodeStep

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        assert not self._captures
        self._captures = True
        _Captured.last = self


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> type[_Standin]:
    monkeypatch.setattr(decode_step, "_Graph", _Standin)
    for name in ("made", "replays", "inputs"):
        monkeypatch.setattr(_Standin, name, [], raising=False)
    return _Standin


def _designs(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, *, captured: bool, **given: Any) -> list[Design]:
    monkeypatch.setattr(generation, "DecodeStep", _Captured if captured else DecodeStep)
    return list(Generator(decoder, GenerationOptions(**{"batch": 4, "prompt": "MK"} | given)).run(11))


def _same(found: list[Design], wanted: list[Design]) -> None:
    assert [design.sequence for design in found] == [design.sequence for design in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)


def test_replays_give_the_same_sequences(
    decoder: Decoder, standin: type[_Standin], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when slots fall idle, when the caches grow, and in each bucket of places."""
    wanted = _designs(decoder, monkeypatch, captured=False, min_residues=132)
    assert max(design.tokens for design in wanted) > 130
    assert not standin.made
    with caplog.at_level(logging.WARNING):
        _same(_designs(decoder, monkeypatch, captured=True, min_residues=132), wanted)
    assert not caplog.messages
    # Every growth of the caches clears the graphs, which hold the old ones.
    assert set(standin.made) == {64, 128, 150}
    assert len(standin.replays) > 100


def test_a_bucket_is_captured_once_until_the_caches_grow(decoder: Decoder, standin: type[_Standin]) -> None:
    step = _Captured(decoder, 2, GREEDY)
    step.read_prompt(decoder.vocabulary.encode("", whole=False))
    step.begin(0, 1)
    sequences = {0: [decoder.vocabulary.start]}
    _check(step, sequences, 64)
    # Eager first, then captured, held against the eager run, and replayed.
    assert (standin.made, standin.replays) == ([64], [64] * 64)
    _check(step, sequences, 1)
    assert (standin.made, list(step._graphs)) == ([64, 128], [128])
    step.begin(0, 1)
    sequences = {0: [decoder.vocabulary.start]}
    _check(step, sequences, 66)
    # A graph of fewer places of the larger cache, beside the one of all.
    assert (standin.made, list(step._graphs)) == ([64, 128, 64], [128, 64])
    assert standin.replays[-3:] == [64, 128, 128]


def test_idle_slots_run_along_and_leave_no_trace(decoder: Decoder, standin: type[_Standin]) -> None:
    step, plain = (
        _Captured(decoder, 4, Filters(repetition_penalty=2.0)),
        DecodeStep(decoder, 4, Filters(repetition_penalty=2.0)),
    )
    prompt = decoder.vocabulary.encode("MKT", whole=False)
    for each in (step, plain):
        each.read_prompt(prompt)
        each.begin(2, len(prompt))
    ids = prompt.tolist()
    for _ in range(5):
        (found, nats), (wanted, plain_nats) = step.run([_turn(2, ids)]), plain.run([_turn(2, ids)])
        assert (len(found), len(nats)) == (1, 1)
        assert found == wanted
        assert nats == pytest.approx(plain_nats, abs=1e-4)
        ids += found
    slots, tokens, lengths, rooms = standin.inputs[-1].tolist()
    assert slots == [2, 0, 1, 3]
    assert tokens[1:] == [decoder.vocabulary.start] * 3
    assert (lengths[1:], rooms[1:]) == ([0, 0, 0], [1, 1, 1])
    # The prompt's own slot is nobody's, and slots that were idle begin anew.
    assert torch.equal(step._seen_SV[[2, 4]], plain._seen_SV[[2, 4]])
    for each in (step, plain):
        each.begin(1, len(prompt))
    turns = [_turn(2, ids), _turn(1, prompt.tolist(), uniform=0.8)]
    found, nats = step.run(turns)
    wanted, plain_nats = plain.run(turns)
    assert found == wanted
    assert nats == pytest.approx(plain_nats, abs=1e-4)
    assert torch.equal(step._seen_SV[[1, 2, 4]], plain._seen_SV[[1, 2, 4]])


REASONS = {
    "tokens": r"a replay chose \d+ other tokens, with log probabilities .* away from the eager run",
    "far off": "a replay chose 0 other tokens, with log probabilities 0.06 away from the eager run",
    "no number": "a replay chose 0 other tokens, with log probabilities nan away from the eager run",
    "cannot": "operation not permitted when stream is capturing$",
}


@pytest.mark.parametrize("wrong", REASONS)
def test_what_cannot_be_captured_runs_eagerly_and_says_why(
    wrong: str,
    decoder: Decoder,
    standin: type[_Standin],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = _designs(decoder, monkeypatch, captured=False)
    monkeypatch.setattr(standin, "wrong", wrong)
    with caplog.at_level(logging.WARNING, logger=decode_step.__name__):
        _same(_designs(decoder, monkeypatch, captured=True), wanted)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.match(f"tiny generates without CUDA graphs: {REASONS[wrong]}", record.getMessage())
    assert len(standin.made) == len(standin.replays) == (wrong != "cannot")
    assert not _Captured.last._graphs


def test_a_later_bucket_that_fails_clears_the_first(
    decoder: Decoder, standin: type[_Standin], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = _Captured(decoder, 1, GREEDY)
    step.grow(150)
    step.read_prompt(decoder.vocabulary.encode("", whole=False))
    step.begin(0, 1)
    sequences = {0: [decoder.vocabulary.start]}
    _check(step, sequences, 60)
    assert [*step._graphs] == [64]
    monkeypatch.setattr(standin, "wrong", "tokens")
    before = len(standin.replays)
    with caplog.at_level(logging.WARNING):
        step._graphs[64].wrong = ""  # the first one stays right
        _check(step, sequences, 12)
    assert len(caplog.messages) == 1
    assert len(standin.replays) == before + 5
    assert not step._graphs


def test_on_a_cpu_nothing_is_captured(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not DecodeStep(decoder, 1, GREEDY)._captures
    # A device that says that it is a GPU, and has no memory: only what is decided is looked at.
    monkeypatch.setattr(decode_step.DecodeStep, "_empty_caches", lambda *given: [])
    monkeypatch.setattr(decode_step, "to_device", lambda tensor, device: tensor)
    monkeypatch.setattr(torch, "zeros", lambda *given, device, **more: None)
    monkeypatch.setattr(Decoder, "device", torch.device("cuda"))
    for switch, captures in ((None, True), ("1", True), ("0", False)):
        monkeypatch.delenv(SWITCH, raising=False)
        if switch is not None:
            monkeypatch.setenv(SWITCH, switch)
        assert DecodeStep(decoder, 1, GREEDY)._captures == captures
