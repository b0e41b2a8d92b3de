"""Tasks of rows: what is shown and asked, losses beside literal ones in fp64, alone and packed, live and fused.

Shapes: B sequences, T tokens, N rows, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError
from protnest.engine.alphabet import BOS_ID, EOS_ID, MASK_ID
from protnest.engine.decoder import Decoder
from protnest.engine.encoder import Encoder
from protnest.engine.vocabulary import BytePairVocabulary, ResidueVocabulary
from protnest.kernels.kd_loss import kd_loss_reference
from protnest.kernels.kd_options import KDOptions
from protnest.training.causal_task import CausalTask, causal_corpus
from protnest.training.corpus import Corpus, Share
from protnest.training.masked_task import MaskedTask
from protnest.training.order import Portion
from protnest.training.row_task import IGNORED, RowTask
from protnest.training.teacher import LiveTeacher, model_fingerprint
from protnest.training.trainer import Trainer, TrainerConfig

from support.gpt2_models import byte_pairs
from support.learning import CPU, TOY, TOY_DECODER, corpus_of, proteins_to_train, toy_decoder, toy_encoder

SEQUENCES = proteins_to_train()


def _share(sequences: list[str]) -> Share:
    return Share(tuple(f"id{number}" for number in range(len(sequences))), tuple(sequences))


def _pieces(places: int = 24) -> Corpus:
    return causal_corpus(_share(SEQUENCES), ResidueVocabulary(), places)[0]


def _task(kind: str, *, teacher: bool = True, options: KDOptions | None = None, **more: Any) -> RowTask:
    if kind == "encoder":
        live = LiveTeacher(toy_encoder(1, replace(TOY, layers=1, width=32, heads=4))) if teacher else None
        return MaskedTask(toy_encoder(0), corpus_of(SEQUENCES), seed=3, teacher=live, options=options, **more)
    live = LiveTeacher(toy_decoder(1, replace(TOY_DECODER, width=32, feedforward=16))) if teacher else None
    return CausalTask(toy_decoder(0), _pieces(), teacher=live, options=options, **more)


def _portion(*numbers: int, epoch: int = 0) -> Portion:
    return Portion(np.array(numbers), epoch, 0, 0)


def _literal(task: RowTask, numbers: list[int], *, epoch: int = 0) -> float:
    """One sequence at a time, whole logits, fp64, the formulas of the loss written out."""
    batch = task.batch(numbers, epoch)
    models = [task.model.double(), *([task.teacher.model.double()] if isinstance(task.teacher, LiveTeacher) else [])]
    logits = []
    for model in models:
        rows = []
        begins = np.cumsum([0, *batch.packed.lengths_B])
        for place in range(len(numbers)):
            own = task.batch([numbers[place]], epoch)
            assert own.packed.tokens_T.tolist() == batch.packed.tokens_T[begins[place] : begins[place + 1]].tolist()
            if isinstance(model, Encoder):
                all_TV = model.logits(model(own.packed).hidden_TD)
            else:
                assert isinstance(model, Decoder)
                all_TV = model.logits(model(own.packed))
            rows.append(all_TV[own.chosen.index_R])
        logits.append(torch.cat(rows).detach())
    for model in models:
        model.float()
    if task.teacher is None:
        counted = batch.labels_N != IGNORED
        return float(torch.nn.functional.cross_entropy(logits[0][counted], batch.labels_N[counted]))
    soft = torch.ones_like(batch.labels_N, dtype=torch.bool) if batch.soft else None
    return float(kd_loss_reference(logits[0], logits[1], batch.labels_N, batch.cu_seqlens, soft, options=task.options))


# What is shown


def test_masks_follow_from_sequence_and_epoch_alone() -> None:
    task = MaskedTask(toy_encoder(), corpus_of(SEQUENCES), seed=3)
    together, alone = task.batch([4, 0, 7], 2), task.batch([0], 2)
    begin, end = together.packed.cu_seqlens[1:3].tolist()
    assert together.packed.tokens_T[begin:end].tolist() == alone.packed.tokens_T.tolist()
    first, count = together.chosen.counts_B[0], together.chosen.counts_B[1]
    assert (together.chosen.index_R[first : first + count] - begin).tolist() == alone.chosen.index_R.tolist()
    assert together.labels_N[first : first + count].tolist() == alone.labels_N.tolist()
    assert together.keys == ((4, 2), (0, 2), (7, 2))
    shown = {tuple(task.batch([0], epoch).packed.tokens_T.tolist()) for epoch in range(6)}
    assert len(shown) > 3, "another epoch shows something else"
    other = MaskedTask(toy_encoder(), corpus_of(SEQUENCES), seed=4)
    assert any(
        other.batch([n], 0).packed.tokens_T.tolist() != task.batch([n], 0).packed.tokens_T.tolist() for n in range(5)
    )


def test_another_epoch_shows_another_crop() -> None:
    task = MaskedTask(toy_encoder(), corpus_of(["ACDEFGHIKLMNPQRSTVWY" * 2]), seed=3)
    assert len({tuple(task.shown(0, mask)[0].tolist()) for mask in range(12)}) > 4


def test_more_may_be_masked() -> None:
    few, many = (
        MaskedTask(toy_encoder(), corpus_of(["ACDEFGHIKLMNPQRSTVWY"] * 50), seed=3, mask_share=share)
        for share in (0.15, 0.6)
    )
    assert many.batch(range(50), 0).rows > 3 * few.batch(range(50), 0).rows


def test_masks_come_again() -> None:
    task = MaskedTask(toy_encoder(), corpus_of(SEQUENCES), seed=3, mask_epochs=2)
    shown = [task.batch([0, 1, 2], epoch) for epoch in range(4)]
    assert shown[0].packed.tokens_T.tolist() == shown[2].packed.tokens_T.tolist()
    assert shown[1].packed.tokens_T.tolist() == shown[3].packed.tokens_T.tolist()
    assert shown[0].packed.tokens_T.tolist() != shown[1].packed.tokens_T.tolist()
    assert shown[3].keys == ((0, 1), (1, 1), (2, 1))


@pytest.mark.parametrize("rows", ["masked", "all"])
def test_a_masked_batch_is_cropped_masked_and_labelled(rows: str) -> None:
    corpus = corpus_of(["ACDEFGHIKLMNPQRSTVWY" * 3, "MKTAY", "W" * 20])
    task = MaskedTask(toy_encoder(), corpus, seed=0, rows=rows)
    assert task.lengths_B.tolist() == [22, 7, 22]
    batch = task.batch([2, 0, 1], 0)
    assert batch.packed.lengths_B == (22, 22, 7)
    assert batch.packed.index_B.tolist() == [2, 0, 1]
    tokens = batch.packed.tokens_T.numpy()
    asked = batch.chosen.index_R.numpy()
    labels = batch.labels_N.numpy()
    true = tokens.copy()
    true[asked[labels != IGNORED]] = labels[labels != IGNORED]
    assert MASK_ID in tokens
    assert MASK_ID not in true
    assert [true[begin] for begin in (0, 22, 44)] == [BOS_ID] * 3
    assert [true[end] for end in (21, 43, 50)] == [EOS_ID] * 3
    assert true[44:].tolist() == corpus[1].tolist()
    assert len(set(true[1:21].tolist())) == 1
    whole = corpus[0].tolist()
    assert any(whole[begin : begin + 20] == true[23:43].tolist() for begin in range(1, 42))
    if rows == "all":
        assert batch.chosen.counts_B == (20, 20, 5)
        assert asked.tolist() == [*range(1, 21), *range(23, 43), *range(45, 50)]
        assert batch.rows == 45
        assert 1 <= (labels != IGNORED).sum() < 20
    else:
        assert (labels != IGNORED).all()
        assert batch.rows == len(labels) == sum(batch.chosen.counts_B)
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *batch.chosen.counts_B]).tolist()


def test_a_causal_batch_predicts_every_token_but_the_first() -> None:
    corpus, split = causal_corpus(_share(["MKT", "ACDEFG"]), ResidueVocabulary(), 24)
    assert split == 0
    task = CausalTask(toy_decoder(), corpus)
    batch = task.batch([1, 0], 5)
    ids = [ResidueVocabulary().encode(sequence).tolist() for sequence in ("ACDEFG", "MKT")]
    assert batch.packed.tokens_T.tolist() == [*ids[0], *ids[1]]
    assert batch.labels_N.tolist() == [*ids[0][1:], *ids[1][1:]]
    assert batch.labels_N[-1] == EOS_ID, "the end is learnt"
    assert batch.chosen.index_R.tolist() == [*range(7), *range(8, 12)]
    assert batch.cu_seqlens.tolist() == [0, 7, 11]
    assert batch.keys == ((1, 0), (0, 0))


@pytest.mark.parametrize("places", [2, 5, 8, 100])
def test_long_sequences_are_split_and_every_token_is_predicted_once(places: int) -> None:
    sequences = ["MKTAYIAKQRQISF", "ACD", "G"]
    corpus, split = causal_corpus(_share(sequences), ResidueVocabulary(), places)
    assert split == sum(len(sequence) + 2 > places for sequence in sequences)
    assert corpus.lengths_B.max() <= places
    for number, sequence in enumerate(sequences):
        pieces = [corpus[row].tolist() for row in range(len(corpus)) if corpus.ids[row] == f"id{number}"]
        predicted = [token for piece in pieces for token in piece[1:]]
        whole = ResidueVocabulary().encode(sequence).tolist()
        assert predicted == whole[1:]
        assert pieces[0][0] == BOS_ID
        assert all(left[-1] == right[0] for left, right in itertools.pairwise(pieces))


def test_byte_pairs_take_two_bytes_a_token() -> None:
    vocabulary = BytePairVocabulary(byte_pairs()._tokenizer)
    corpus, _ = causal_corpus(_share(SEQUENCES[:3]), vocabulary, 100)
    assert corpus.tokens_T.dtype == np.uint16
    assert corpus[1].tolist() == vocabulary.encode(SEQUENCES[1]).tolist()
    assert corpus[1][-1] == vocabulary.end


# Losses

OPTIONS = {
    "default": KDOptions(),
    "no uncertainty": KDOptions(uncertainty=False),
    "no smoothing": KDOptions(smooth=False),
    "neither": KDOptions(uncertainty=False, smooth=False),
    "all else": KDOptions(temperature=1.4, alpha=0.3, smoothing=0.5, weight_normalization="weight"),
}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_is_the_literal_one(kind: str, name: str) -> None:
    task = _task(kind, options=OPTIONS[name])
    found = task.loss(_portion(3, 0, 9, 5))
    assert found.value.item() == pytest.approx(_literal(task, [3, 0, 9, 5]), rel=2e-5)
    assert found.rows == len(task.batch([3, 0, 9, 5], 0).labels_N)


def test_each_switch_reaches_the_loss() -> None:
    for kind in ("encoder", "decoder"):
        values = [_task(kind, options=options).loss(_portion(3, 0, 9, 5)).value.item() for options in OPTIONS.values()]
        assert len({round(value, 5) for value in values}) == len(OPTIONS)


def test_all_residues_may_learn_from_the_teacher() -> None:
    task = _task("encoder", rows="all")
    found = task.loss(_portion(3, 0, 9, 5))
    assert found.value.item() == pytest.approx(_literal(task, [3, 0, 9, 5]), rel=2e-5)
    assert found.rows == sum(min(20, len(SEQUENCES[number])) for number in (3, 0, 9, 5))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_without_a_teacher_it_is_cross_entropy(kind: str) -> None:
    task = _task(kind, teacher=False)
    assert task.loss(_portion(3, 0, 9)).value.item() == pytest.approx(_literal(task, [3, 0, 9]), rel=2e-5)


def test_large_vocabularies_go_through_the_fused_loss() -> None:
    vocabulary = BytePairVocabulary(byte_pairs()._tokenizer)
    config = replace(TOY_DECODER, vocabulary=vocabulary.size, places=64)
    corpus, _ = causal_corpus(_share(SEQUENCES), vocabulary, 64)
    student, teacher = toy_decoder(0, config, vocabulary), toy_decoder(1, config, vocabulary)
    for live in (None, LiveTeacher(teacher)):
        task = CausalTask(student, corpus, teacher=live)
        loss = task.loss(_portion(1, 2))
        assert loss.value.item() == pytest.approx(_literal(task, [1, 2]), rel=2e-5)
        student.zero_grad()
        loss.value.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in student.parameters())
        assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_packed_sequences_learn_what_they_learn_alone(kind: str) -> None:
    """Gradients of a packed batch are the row-weighted mean of the sequences' own."""
    task = _task(kind)
    numbers = [3, 0, 9, 5]
    packed = task.loss(_portion(*numbers))
    packed.value.backward()  # type: ignore[no-untyped-call]
    together = [parameter.grad.clone() for parameter in task.model.parameters() if parameter.grad is not None]
    task.model.zero_grad()
    for number in numbers:
        own = task.loss(_portion(number))
        (own.value * own.rows / packed.rows).backward()  # type: ignore[no-untyped-call]
    alone = [parameter.grad for parameter in task.model.parameters() if parameter.grad is not None]
    assert len(together) == len(alone) > 10
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_every_parameter_is_trained_and_the_teacher_is_not(kind: str) -> None:
    task = _task(kind)
    assert isinstance(task.teacher, LiveTeacher)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    taught = {name: tensor.clone() for name, tensor in task.teacher.model.state_dict().items()}
    Trainer(task, TrainerConfig(steps=2, batch_tokens=200, learning_rate=0.01), device=CPU).run()
    for name, tensor in task.model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
    for name, tensor in task.teacher.model.state_dict().items():
        assert torch.equal(tensor, taught[name]), name


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_student_comes_to_agree_with_its_teacher(kind: str) -> None:
    task = _task(kind, options=KDOptions(alpha=0.0, smooth=False, uncertainty=False, temperature=1.0))
    losses: list[float] = []
    trainer = Trainer(task, TrainerConfig(steps=60, batch_tokens=400, learning_rate=0.02), device=CPU)
    trainer.run(after_step=lambda report: losses.append(report.loss))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_bf16_is_rounded_and_no_more(kind: str) -> None:
    task = _task(kind)
    exact = task.loss(_portion(3, 0, 9)).value.item()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = task.loss(_portion(3, 0, 9)).value
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact
    assert rounded.item() == pytest.approx(exact, rel=0.05)


# Identity and refusals


def test_the_identity_knows_all_that_decides() -> None:
    def identity(**changes: Any) -> str:
        return str(sorted(_task("encoder", **changes).identity().items()))

    seen = {
        identity(),
        identity(teacher=False),
        identity(rows="all"),
        identity(mask_epochs=3),
        identity(mask_share=0.3),
        identity(max_residues=10),
        *(identity(options=options) for options in OPTIONS.values() if options != KDOptions()),
    }
    assert len(seen) == 6 + len(OPTIONS) - 1
    # Without a teacher the loss's options have no effect.
    assert identity(teacher=False, options=KDOptions(alpha=0.1)) == identity(teacher=False)


def test_a_fingerprint_is_of_head_and_precision_too() -> None:
    one, same, other = toy_encoder(0), toy_encoder(0), toy_encoder(0)
    assert model_fingerprint(one) == model_fingerprint(same)
    with torch.no_grad():
        assert other.head is not None
        other.head.bias[3] += 1
    assert model_fingerprint(one) != model_fingerprint(other)
    assert model_fingerprint(one) != model_fingerprint(same.bfloat16())


def test_what_cannot_be_learnt_is_refused() -> None:
    corpus = corpus_of(SEQUENCES)
    with pytest.raises(InputError, match="toy0 has no language-model head: nothing to learn"):
        MaskedTask(toy_encoder(head=False), corpus, seed=0)
    with pytest.raises(InputError, match="rows is 'some'; allowed: masked, all"):
        MaskedTask(toy_encoder(), corpus, seed=0, rows="some")
    with pytest.raises(InputError, match="a sequence has 40 tokens; toy0 has positions for 24"):
        CausalTask(toy_decoder(), _pieces(40))
    with pytest.raises(InputError, match="a context of 1 tokens predicts nothing"):
        _pieces(1)
    with pytest.raises(InputError, match="no sequence to train on"):
        causal_corpus(_share([]), ResidueVocabulary(), 24)
    headless = MaskedTask(toy_encoder(), corpus, seed=0, teacher=LiveTeacher(toy_encoder(1, head=False)))
    with pytest.raises(InputError, match="toy1 has no language-model head"):
        headless.loss(_portion(0))
