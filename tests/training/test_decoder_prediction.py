"""What a decoder is asked, and what it says: against transformers, sequence by sequence, and through the command line.

Shapes: N predicted tokens, V vocabulary, L tokens of one sequence.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.engine.decoder import Decoder
from protnest.engine.errors import InputError
from protnest.engine.models import load_decoder
from protnest.engine.packing import PackedBatch
from protnest.engine.progress import ResidueProgress
from protnest.training import decoder_prediction
from protnest.training.decoder_prediction import DecoderPredictor
from protnest.training.perplexity import residue_perplexity, token_perplexity
from protnest.training.prediction import Predictions
from protnest.training.token_scores import score_tokens
from typer.testing import CliRunner

from support.esm2_models import hostile_encoder
from support.gpt2_models import byte_pairs, example_proteins, gpt2_logits, load_pair, save_gpt2, save_residue_gpt2
from support.tiny import write_fasta

# The last two are longer than the models' 96 places, in residues and in byte pairs.
PROTEINS = [protein[:length] for protein, length in zip(example_proteins(), (30, 1, 61, 12, 120, 3), strict=False)]
LONG = ["MKTAYIAKQR" * 9 + "ACD", "W" * 96, "".join(example_proteins())[:600]]


@pytest.fixture(scope="module", params=["pairs", "residues"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder]:
    return load_pair(tmp_path_factory.mktemp("gpt2") / "toy", residues=request.param == "residues")


def _whole(predictor: DecoderPredictor, proteins: list[str], context: int | None = None) -> Predictions:
    chunks = list(predictor.predictions(proteins, context=context))
    return Predictions(
        log_probs_NV=torch.cat([each.log_probs_NV for each in chunks]),
        label_N=np.concatenate([each.label_N for each in chunks]),
        residues_N=np.concatenate([each.residues_N for each in chunks]),
        sequence_N=np.concatenate([each.sequence_N for each in chunks]),
    )


def _literal(model: Any, decoder: Decoder, protein: str, most: int) -> tuple[torch.Tensor, list[int]]:
    """fp64 log-probabilities (L - 1, V) of the next tokens of transformers' model, and the tokens that are there."""
    ids = decoder.vocabulary.encode(protein)[:most]
    log_probs_LV = gpt2_logits(copy.deepcopy(model).double(), [ids]).log_softmax(dim=-1)
    return log_probs_LV[:-1], ids[1:].tolist()


@pytest.mark.parametrize("context", [None, 20, 1000])
def test_log_probabilities_are_transformers(
    pair: tuple[Any, Decoder], context: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds of about 50 tokens, batches of 40 and chunks of a few rows."""
    theirs, ours = pair
    monkeypatch.setattr(decoder_prediction, "_ROUND_TOKENS", 50)
    monkeypatch.setattr(decoder_prediction, "CHUNK_NUMBERS", 9 * ours.vocabulary.size + 1)
    proteins, seen = [*PROTEINS, *LONG], list[int]()
    predictor = DecoderPredictor(ours, max_tokens=40, after_batch=seen.append)
    assert (predictor.name, predictor.task, predictor.context) == ("toy", "next tokens", 96)
    found, place = _whole(predictor, proteins, context), 0
    assert found.log_probs_NV.dtype == torch.float32
    assert found.label_N.dtype == found.residues_N.dtype == found.sequence_N.dtype == np.int64
    shown = 0
    for number, protein in enumerate(proteins):
        wanted_LV, labels = _literal(theirs, ours, protein, min(context or 96, 96))
        some = slice(place, place + len(labels))
        place += len(labels)
        torch.testing.assert_close(found.log_probs_NV[some].double(), wanted_LV, rtol=0, atol=2e-3)
        assert found.label_N[some].tolist() == labels
        assert set(found.sequence_N[some].tolist()) == {number}
        assert ours.vocabulary.decode(found.label_N[some]) == protein[: int(found.residues_N[some].sum())]
        shown += int(found.residues_N[some].sum())
    assert place == len(found.label_N)
    torch.testing.assert_close(found.log_probs_NV.double().exp().sum(dim=-1), torch.ones(place).double())
    assert sum(seen) == shown == predictor.residues_run(proteins, context=context)


def test_chunks_follow_from_the_sequences_alone(pair: tuple[Any, Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither precision nor batches move them, so that a teacher is walked beside."""
    _, ours = pair
    monkeypatch.setattr(decoder_prediction, "_ROUND_TOKENS", 50)
    monkeypatch.setattr(decoder_prediction, "CHUNK_NUMBERS", 9 * ours.vocabulary.size + 1)
    predictors = [DecoderPredictor(ours, max_tokens=1), DecoderPredictor(copy.deepcopy(ours).to(torch.bfloat16))]
    one, other = ([each.label_N.tolist() for each in each.predictions(PROTEINS)] for each in predictors)
    assert one == other
    assert {len(chunk) for chunk in one} > {9}
    assert max(map(len, one)) == 9


def test_one_row_at_least(pair: tuple[Any, Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_prediction, "CHUNK_NUMBERS", 3)
    assert {len(chunk.label_N) for chunk in DecoderPredictor(pair[1]).predictions(PROTEINS[:2])} == {1}


def test_nothing_asked(pair: tuple[Any, Decoder]) -> None:
    assert list(DecoderPredictor(pair[1]).predictions([])) == []
    assert list(DecoderPredictor(pair[1]).predictions(PROTEINS, context=1)) == []


def test_neither_order_nor_company_matters(pair: tuple[Any, Decoder]) -> None:
    predictor = DecoderPredictor(pair[1])
    alone, among = _whole(predictor, PROTEINS[2:3]), _whole(predictor, PROTEINS[::-1])
    place = among.sequence_N == len(PROTEINS) - 1 - 2
    assert alone.label_N.tolist() == among.label_N[place].tolist()
    torch.testing.assert_close(alone.log_probs_NV, among.log_probs_NV[place], rtol=0, atol=1e-3)


def test_batches_must_hold_something(pair: tuple[Any, Decoder]) -> None:
    with pytest.raises(ValueError, match="max_tokens must be positive, got 0"):
        DecoderPredictor(pair[1], max_tokens=0)


# Memory that ends


@contextmanager
def _memory_for(tokens: int) -> Iterator[list[int]]:
    """The decoder runs batches of so many tokens at most; gives the tokens of each run that was tried."""
    real, tried = Decoder.forward, []

    def forward(self: Decoder, batch: PackedBatch) -> torch.Tensor:
        tried.append(sum(batch.lengths_B))
        if tried[-1] > tokens:
            message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."
            raise torch.OutOfMemoryError(message)
        return real(self, batch)

    with mock.patch.object(Decoder, "forward", forward):
        yield tried


def test_batches_that_do_not_fit_are_cut(
    pair: tuple[Any, Decoder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the same log-probabilities in the same chunks; what does not fit is learnt once for all rounds."""
    monkeypatch.setattr(decoder_prediction, "_ROUND_TOKENS", 150)
    proteins, done = [*PROTEINS, *LONG] * 3, list[int]()
    right = list(DecoderPredictor(pair[1]).predictions(proteins))
    with caplog.at_level(logging.INFO, logger="protnest.engine.retry"), _memory_for(100) as tried:
        predictor = DecoderPredictor(pair[1], max_tokens=1000, after_batch=done.append)
        found = list(predictor.predictions(proteins))
    assert 1 <= sum(tokens > 100 for tokens in tried) <= 3
    assert len(caplog.messages) >= 1
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.log_probs_NV, other.log_probs_NV, rtol=0, atol=1e-3)
        assert one.label_N.tolist() == other.label_N.tolist()
        assert one.sequence_N.tolist() == other.sequence_N.tolist()
    assert sum(done) == predictor.residues_run(proteins)


def test_what_does_not_fit_alone(pair: tuple[Any, Decoder]) -> None:
    with _memory_for(5), pytest.raises(InputError, match=r"^a run of \d+ residues does not fit into the memory of cpu"):
        list(DecoderPredictor(pair[1]).predictions(PROTEINS))


# Judged


def _perplexities(model: Any, decoder: Decoder, proteins: list[str]) -> tuple[float, float]:
    """Per token and per residue, written out: residues are the letters of what was asked for."""
    nll, tokens, residues = 0.0, 0, 0
    for protein in proteins:
        log_probs_LV, labels = _literal(model, decoder, protein, 96)
        nll -= sum(float(log_probs_LV[place, label]) for place, label in enumerate(labels))
        tokens += len(labels)
        residues += len(decoder.vocabulary.decode(np.array(labels)))
    return math.exp(nll / tokens), math.exp(nll / residues)


def _gentle(model: Any) -> Any:
    """With smaller logits: perplexities that are numbers one meets."""
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0.05)
        model.transformer.ln_f.bias.mul_(0.05)
    return model


def _run(*words: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words), "--device", "cpu", "--precision", "fp32"])


@pytest.mark.parametrize("residues", [False, True], ids=["pairs", "residues"])
def test_evaluate(tmp_path: Path, residues: bool) -> None:
    """A student and its teacher, of one vocabulary."""
    save = save_residue_gpt2 if residues else save_gpt2
    student = _gentle(save(tmp_path / "student"))
    teacher = _gentle(save(tmp_path / "teacher", layers=3, width=32, heads=4, places=200, seed=4))
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    proteins = [*PROTEINS, *LONG]
    fasta = write_fasta(tmp_path / "ours.fasta", proteins)
    result = _run(fasta, "--model", tmp_path / "student", "--teacher", tmp_path / "teacher", "--json")
    assert result.exit_code == 0, result.output
    judged = json.loads(result.stdout)["prediction"]
    decoder = load_decoder(tmp_path / "student", device="cpu", precision="fp32")
    divergence, tokens = 0.0, 0
    for protein in proteins:
        (q_LV, labels), (p_LV, _) = (_literal(model, decoder, protein, 96) for model in (student, teacher))
        divergence += float((p_LV.exp() * (p_LV - q_LV)).sum())
        tokens += len(labels)
    assert judged["divergence"]["value"] == pytest.approx(divergence / tokens, rel=1e-4)
    for name, model in (("student", student), ("teacher", teacher)):
        found = judged["model" if name == "student" else "teacher"]
        assert (found["name"], found["task"], found["tokens"]) == (name, "next tokens", tokens)
        assert (found["vocabulary"], found["sequences"]) == (decoder.vocabulary.size, len(proteins))
        per_token, per_residue = _perplexities(model, decoder, proteins)
        assert found["token_perplexity"]["value"] == pytest.approx(per_token, rel=1e-4)
        assert found["residue_perplexity"]["value"] == pytest.approx(per_residue, rel=1e-4)
    assert residues or judged["model"]["token_perplexity"]["value"] != judged["model"]["residue_perplexity"]["value"]


def test_a_uniform_decoder_has_the_vocabularys_perplexity(pair: tuple[Any, Decoder]) -> None:
    flat = copy.deepcopy(pair[1])
    for parameter in flat.parameters():
        torch.nn.init.zeros_(parameter)
    scores, V = score_tokens(DecoderPredictor(flat), PROTEINS).model, flat.vocabulary.size
    found = token_perplexity(scores)
    assert (found.value, found.low, found.high) == tuple(pytest.approx(V, rel=1e-5) for _ in range(3))
    assert found.n == len(PROTEINS)
    tokens = sum(len(flat.vocabulary.encode(protein)[:96]) - 1 for protein in PROTEINS)
    residues = int(scores.residues_N.sum())
    assert residue_perplexity(scores).value == pytest.approx(V ** (tokens / residues), rel=1e-4)


@pytest.mark.parametrize("residues", [False, True], ids=["pairs", "residues"])
def test_progress_ends_at_all_of_it(tmp_path: Path, residues: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and teacher of other lengths, proteins beyond both."""
    save = save_residue_gpt2 if residues else save_gpt2
    save(tmp_path / "student")
    save(tmp_path / "teacher", places=70, seed=4)
    work, done = list[int](), list[int]()
    monkeypatch.setattr(ResidueProgress, "start", lambda self, records, total, before: work.append(total))
    monkeypatch.setattr(ResidueProgress, "advance", lambda self, residues: done.append(residues))
    fasta = write_fasta(tmp_path / "ours.fasta", [*PROTEINS, *LONG])
    for more in ([], ["--teacher", tmp_path / "teacher"]):
        work.clear()
        done.clear()
        result = _run(fasta, "--model", tmp_path / "student", *more, "--json")
        assert result.exit_code == 0, result.output
        assert sum(done) == sum(work) > 0


def _refusal(folder: Path, model: str, teacher: str) -> str:
    fasta = write_fasta(folder / "ours.fasta", PROTEINS)
    result = _run(fasta, "--model", folder / model, "--teacher", folder / teacher)
    assert result.exit_code == 1
    return " ".join(result.output.replace("│", " ").split())


def test_teachers_of_another_kind(tmp_path: Path) -> None:
    save_gpt2(tmp_path / "pairs")
    save_gpt2(tmp_path / "others", pairs=byte_pairs(skip=24))
    save_gpt2(tmp_path / "fewer", pairs=byte_pairs(380))
    save_residue_gpt2(tmp_path / "residues")
    save_checkpoint(hostile_encoder(1, 16, 2), tmp_path / "encoder")
    assert "others and pairs have 400 tokens each, but not the same" in _refusal(tmp_path, "pairs", "others")
    assert "fewer knows 380 tokens, pairs 400" in _refusal(tmp_path, "pairs", "fewer")
    told = _refusal(tmp_path, "residues", "encoder")
    assert "encoder is asked for masked residues, residues for next tokens: they cannot be compared" in told


def test_broken_weights_are_said(tmp_path: Path) -> None:
    """A decoder whose numbers overflow gives no perplexity."""
    _, ours = load_pair(tmp_path, residues=True)
    with torch.no_grad():
        ours.layers[0].fc2.bias.fill_(torch.inf)  # type: ignore[operator,union-attr]
    with pytest.raises(InputError, match="gives probabilities that are no numbers"):
        score_tokens(DecoderPredictor(ours), PROTEINS)
