"""What an encoder is asked, and what it says: against its own forward pass, sequence by sequence."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from protnest.engine import Encoder, InputError
from protnest.engine.alphabet import AMINO_ACIDS, BOS_ID, EOS_ID, MASK_ID, TOKEN_IDS, TOKENS
from protnest.engine.packing import pack_tokens
from protnest.training import prediction
from protnest.training.prediction import EncoderPredictor, Predictions, mask_by_hash

from support.families import tiny_family
from support.tiny import random_proteins

ENCODER = tiny_family()[0]
PROTEINS = [*random_proteins(25, seed=1, longest=29), "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGT"]


def _whole(predictor: EncoderPredictor, proteins: list[str], context: int | None = None) -> Predictions:
    chunks = list(predictor.predictions(proteins, context=context))
    return Predictions(
        log_probs_NV=torch.cat([each.log_probs_NV for each in chunks]),
        label_N=np.concatenate([each.label_N for each in chunks]),
        residues_N=np.concatenate([each.residues_N for each in chunks]),
        sequence_N=np.concatenate([each.sequence_N for each in chunks]),
    )


def test_masks() -> None:
    sequence = "".join(np.random.default_rng(0).choice(list(AMINO_ACIDS), size=20_000))
    shown, rows, hidden = mask_by_hash(sequence, context=30_000)
    assert (shown.size, shown[0], shown[-1]) == (20_002, BOS_ID, EOS_ID)
    assert 0.14 < rows.size / 20_000 < 0.16
    assert (shown[rows] == MASK_ID).all()
    assert (shown == MASK_ID).sum() == rows.size
    assert [TOKENS[token] for token in hidden] == [sequence[row - 1] for row in rows.tolist()]
    kept = np.setdiff1d(np.arange(1, 20_001), rows)
    assert [TOKENS[token] for token in shown[kept]] == [sequence[row - 1] for row in kept.tolist()]


def test_masks_follow_from_the_sequence_and_the_seed() -> None:
    first, again, other = (mask_by_hash(PROTEINS[-1], context=99, seed=seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert mask_by_hash(PROTEINS[-1] + "A", context=99)[1].tolist() != first


def test_only_standard_residues_are_asked_for_and_one_at_least() -> None:
    for letters in ("XXXXXXXXXXA", "AXBUZO.-XXX"):
        shown, rows, hidden = mask_by_hash(letters, context=99)
        assert rows.tolist() == [letters.index("A") + 1]
        assert hidden.tolist() == [TOKEN_IDS["A"]]
        assert (shown == MASK_ID).sum() == 1
    shown, rows, hidden = mask_by_hash("XBUZO", context=99)
    assert (rows.size, hidden.size, (shown == MASK_ID).sum()) == (0, 0, 0)


@pytest.mark.parametrize("context", [None, 7, 40, 2000])
def test_what_is_run_is_known_before(context: int | None) -> None:
    """Cropped sequences, and those without anything to hide, among others."""
    done: list[int] = []
    predictor = EncoderPredictor(ENCODER, after_batch=done.append)
    proteins = [*PROTEINS, "XXBUZ", "X" * 300, "X" * 150 + "A" + "X" * 150, "A" * 300]
    list(predictor.predictions(proteins, context=context))
    assert sum(done) == predictor.residues_run(proteins, context=context) > 0


def test_what_does_not_fit_alone_is_said_without_a_number() -> None:
    with (
        mock.patch.object(Encoder, "_run", side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried")),
        pytest.raises(InputError, match=r"^a run of \d+ residues does not fit into the memory of cpu"),
    ):
        list(EncoderPredictor(ENCODER).predictions(PROTEINS))


def test_crop() -> None:
    sequence = "".join(random_proteins(40, seed=2))
    begins = set()
    for seed in range(20):
        shown, rows, hidden = mask_by_hash(sequence, context=30, seed=seed)
        assert (shown.size, shown[0], shown[-1]) == (32, BOS_ID, EOS_ID)
        shown[rows] = hidden
        piece = "".join(TOKENS[token] for token in shown[1:-1])
        assert piece in sequence
        begins.add(sequence.index(piece))
    assert len(begins) > 10


def test_log_probabilities_are_the_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds of eight sequences and batches of 40 tokens, and one by one."""
    monkeypatch.setattr(prediction, "_ROUND", 8)
    proteins = ["XX", *PROTEINS[:12], "X", *PROTEINS[12:]]
    seen: list[int] = []
    predictor = EncoderPredictor(ENCODER, max_tokens=40, after_batch=seen.append)
    assert (predictor.name, predictor.context, predictor.vocabulary) == ("tiny16", 30, TOKENS)
    found = _whole(predictor, proteins)
    place = 0
    for number, protein in enumerate(proteins):
        shown, rows, hidden = mask_by_hash(protein, context=30)
        if not rows.size:
            continue
        batch = pack_tokens(shown, np.array([0, shown.size]))
        wanted = ENCODER.logits(ENCODER(batch).hidden_TD[torch.from_numpy(rows)]).log_softmax(-1)
        some = slice(place, place + rows.size)
        place += rows.size
        torch.testing.assert_close(found.log_probs_NV[some], wanted, atol=1e-4, rtol=1e-4)
        assert found.label_N[some].tolist() == hidden.tolist()
        assert set(found.sequence_N[some].tolist()) == {number}
    assert place == len(found.label_N)
    assert found.log_probs_NV.dtype == torch.float32
    assert found.residues_N.tolist() == [1] * place
    assert sum(seen) == sum(min(30, len(each)) for each in proteins if each.strip("X"))


def test_neither_batch_nor_company_matters() -> None:
    alone = _whole(EncoderPredictor(ENCODER), PROTEINS[5:6])
    among = _whole(EncoderPredictor(ENCODER), PROTEINS[::-1])
    place = among.sequence_N == len(PROTEINS) - 1 - 5
    assert alone.label_N.tolist() == among.label_N[place].tolist()
    torch.testing.assert_close(alone.log_probs_NV, among.log_probs_NV[place], atol=1e-4, rtol=1e-4)


def test_context_is_the_callers_or_the_models() -> None:
    long = [PROTEINS[-1]]
    longer, own, shorter = (len(_whole(EncoderPredictor(ENCODER), long, context).label_N) for context in (99, None, 4))
    assert longer == own > shorter >= 1


def test_without_a_head() -> None:
    with pytest.raises(InputError, match="no language-model head"):
        EncoderPredictor(Encoder(ENCODER.config, head=False))
