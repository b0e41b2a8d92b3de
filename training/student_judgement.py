"""What a trained model's report says of it: perplexity on held-out proteins, beside its teacher's and the unigram's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from ..engine.decoder import Decoder
from ..engine.encoder import Encoder
from .composition import letter_counts
from .corpus import Share
from .decoder_prediction import DecoderPredictor
from .estimate import ratio
from .perplexity import letter_perplexity, residue_perplexity, token_perplexity
from .prediction import EncoderPredictor, Predictor
from .token_scores import TokenScores, score_tokens


def judge(
    student: Encoder | Decoder,
    teacher: Encoder | Decoder | None,
    *,
    train: Share,
    held_out: Share,
    sequences: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexities with 95 % intervals over sequences, as JSON.

    Args:
        student: as it is; it is run in evaluation mode.
        teacher: on the same tokens; None for none.
        train: whose amino acids' frequencies make the unigram.
        held_out: each sequence counts once.
        sequences: at most so many of them, drawn at random.
        seed: of the draw.

    Returns:
        `sequences`; `student`, `teacher`: `token_perplexity` and `residue_perplexity`; `divergence`, the mean
        KL(teacher || student) of a token; `unigram` per residue. Estimates are value, low, high, n.
    """
    distinct = list(dict.fromkeys(held_out.sequences))
    if len(distinct) > sequences:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(distinct))[:sequences])
        distinct = [distinct[place] for place in chosen.tolist()]
    student.eval()
    beside = None if teacher is None else _predictor(teacher)
    scored = score_tokens(_predictor(student), distinct, teacher=beside)
    report: dict[str, Any] = {"sequences": len(distinct), "student": _perplexities(scored.model)}
    if scored.teacher is not None and scored.divergence_N is not None:
        divergence = ratio(scored.model.sums_B(scored.divergence_N), scored.model.tokens_B)
        report |= {"teacher": _perplexities(scored.teacher), "divergence": asdict(divergence)}
    known_A = letter_counts(train.sequences).sum(axis=0)
    report["unigram"] = asdict(letter_perplexity(letter_counts(distinct), known_A))
    return report


def _predictor(model: Encoder | Decoder) -> Predictor:
    return EncoderPredictor(model) if isinstance(model, Encoder) else DecoderPredictor(model)


def _perplexities(scores: TokenScores) -> dict[str, Any]:
    return {
        "token_perplexity": asdict(token_perplexity(scores)),
        "residue_perplexity": asdict(residue_perplexity(scores)),
    }
