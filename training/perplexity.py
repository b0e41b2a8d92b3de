"""How well a model predicts residues or tokens, and what knowing nothing but amino acids' frequencies gives.

Shapes: B sequences, A the 20 standard amino acids.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ..engine.alphabet import RESIDUES, TOKEN_IDS
from ..engine.encoder import Encoder
from ..engine.packing import pack_tokens
from ..kernels import plan_batches
from .corpus import Corpus, crop
from .estimate import Estimate, exp, ratio
from .masking import mask_tokens
from .token_scores import TokenScores

_CROP_SEED, _MASK_SEED = 7, 8


@torch.inference_mode()
def held_out_perplexity(encoder: Encoder, corpus: Corpus, *, sequences: int, batch_tokens: int = 4096) -> float:
    """Perplexity per masked residue: exp of the mean negative log-likelihood, over the first `sequences` of a corpus.

    15 % of each sequence's residues are shown as `<mask>`: the same ones in every call, whatever the batches.

    Raises:
        ValueError: there is no sequence to judge by.
    """
    if min(sequences, len(corpus)) < 1:
        message = f"no sequence to judge by: {sequences} asked for, {len(corpus)} there"
        raise ValueError(message)
    shown, rows, labels = [], [], []
    for index in range(min(sequences, len(corpus))):
        tokens = crop(corpus[index], encoder.config.max_residues, np.random.default_rng((_CROP_SEED, index)))
        masked, asked = mask_tokens(tokens, np.random.default_rng((_MASK_SEED, index)), swaps=False)
        shown.append(masked)
        rows.append(asked)
        labels.append(tokens[asked].astype(np.int64))
    order, offsets = plan_batches([tokens.size for tokens in shown], batch_tokens)
    total = 0.0
    for batch in np.split(order, offsets[1:-1]):
        begins = np.cumsum([0, *(shown[index].size for index in batch)])
        packed = pack_tokens(np.concatenate([shown[index] for index in batch]), begins)
        asked = np.concatenate([rows[index] + begin for index, begin in zip(batch, begins[:-1], strict=True)])
        hidden_RD = encoder(packed).hidden_TD[torch.from_numpy(asked).to(encoder.device)]
        wanted = torch.from_numpy(np.concatenate([labels[index] for index in batch])).to(encoder.device)
        total += F.cross_entropy(encoder.logits(hidden_RD).float(), wanted, reduction="sum").item()
    mean = total / sum(asked.size for asked in rows)
    return exp(mean)


def unigram_perplexity(train: Corpus, held_out: Corpus) -> float:
    """Perplexity of held-out residues under the training share's frequencies: what a model that knows no more gives."""
    residues = [TOKEN_IDS[letter] for letter in RESIDUES]
    counts = np.bincount(train.tokens_T, minlength=len(TOKEN_IDS))[residues].astype(np.float64)
    judged = np.bincount(held_out.tokens_T, minlength=len(TOKEN_IDS))[residues].astype(np.float64)
    # A letter that training never saw would make it infinite: it counts as seen a billionth of a time.
    counts = np.maximum(counts, 1e-9)
    return float(np.exp(-(judged * np.log(counts / counts.sum())).sum() / judged.sum()))


def token_perplexity(scores: TokenScores, *, samples: int = 1000, seed: int = 0) -> Estimate:
    """exp of the mean negative log-likelihood of a predicted token; over another vocabulary it is another scale."""
    return ratio(scores.sums_B(scores.nll_N), scores.tokens_B, after=exp, samples=samples, seed=seed)


def residue_perplexity(scores: TokenScores, *, samples: int = 1000, seed: int = 0) -> Estimate:
    """exp of all tokens' negative log-likelihood over the residues that they stand for: the same scale for all models.

    Ends of sequences count above and not below: a model that cannot say where a protein ends pays for it.
    """
    return ratio(scores.sums_B(scores.nll_N), scores.residues_B, after=exp, samples=samples, seed=seed)


def letter_perplexity(
    letters_BA: npt.NDArray[np.int64],
    known_A: npt.NDArray[np.int64] | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Perplexity per standard residue under nothing but amino acids' frequencies, which any model should beat.

    Args:
        letters_BA: int64 (B, 20), how often each sequence holds each amino acid.
        known_A: int64 (20,), counts that the frequencies come from, each plus one; by default the sequences' own.
        samples, seed: of the bootstrap over sequences; the frequencies stay.
    """
    counts_A = (letters_BA.sum(axis=0) if known_A is None else known_A) + 1
    surprise_A = -np.log(counts_A / counts_A.sum())
    return ratio(
        letters_BA @ surprise_A, letters_BA.sum(axis=1).astype(np.float64), after=exp, samples=samples, seed=seed
    )
