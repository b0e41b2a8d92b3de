"""Scores of variants as fair-esm's own code gives them, in fp64: the oracle of engine/scoring.py, of which it uses
nothing.

Each masked copy runs by itself, is tokenised by fair-esm's batch converter and read from a log-softmax over all tokens.
The definitions are those of Meier et al., NeurIPS 2021; `pseudo_ppl` is what facebookresearch/esm's
examples/variant-prediction/predict.py computes under that name, off by one and without the last two residues.

Shapes: L residues, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .esm2_models import ALPHABET, hostile_esm2, in_fp64


def scoring_model(layers: int, width: int, heads: int, *, seed: int = 0) -> Any:
    """A hostile fair-esm model whose logits reach 10, as a trained one's do, and not 500."""
    model = hostile_esm2(layers, width, heads, seed=seed)
    with torch.no_grad():
        for parameter in model.lm_head.layer_norm.parameters():
            parameter.mul_(0.02)
    return model


class ScoreReference:
    """Scores of one fp64 model.

    Args:
        model: of fair-esm, in fp64, as `in_fp64` gives it.
        max_residues: longer proteins are seen through windows of so many residues.
    """

    def __init__(self, model: Any, max_residues: int) -> None:
        self._model = model
        self._size = max_residues
        self._known: dict[tuple[str, int | None], torch.Tensor] = {}

    def score(self, method: str, wild_type: str, mutant: str) -> float:
        """Of a mutated sequence, by a method of `METHODS`."""
        if method == "pseudo-ll":
            return self.pseudo_log_likelihood(mutant) - self.pseudo_log_likelihood(wild_type)
        assert len(mutant) == len(wild_type)
        sites = [site for site in range(len(mutant)) if mutant[site] != wild_type[site]]
        total = 0.0
        for site in sites:
            context = mutant if method == "mutant-marginal" else wild_type
            row_V = self.log_probabilities(context, site, masked=method == "masked-marginal")
            total += float(row_V[ALPHABET.get_idx(mutant[site])]) - float(row_V[ALPHABET.get_idx(wild_type[site])])
        return total

    def pseudo_log_likelihood(self, sequence: str) -> float:
        """Each residue masked singly, its own letter looked up."""
        rows = ((letter, self.log_probabilities(sequence, site, masked=True)) for site, letter in enumerate(sequence))
        return sum(float(row_V[ALPHABET.get_idx(letter)]) for letter, row_V in rows)

    def pseudo_ppl(self, sequence: str) -> float:
        """The published one, of a protein that needs no window: token i is masked, and the letter of residue i counted
        from 0 looked up, which is the next one."""
        assert len(sequence) <= self._size
        tokens = range(1, len(sequence) - 1)
        return sum(float(self._run(sequence, token)[token, ALPHABET.get_idx(sequence[token])]) for token in tokens)

    def log_probabilities(self, sequence: str, site: int, *, masked: bool) -> torch.Tensor:
        """Log-probabilities (V,) at a residue, counted from 0, seen through the window in whose middle it lies."""
        begins = range(max(0, len(sequence) - self._size) + 1)
        begin = min(begins, key=lambda begin: abs(begin + self._size // 2 - site))
        token = 1 + site - begin
        return self._run(sequence[begin : begin + self._size], token if masked else None)[token]

    def _run(self, sequence: str, masked: int | None) -> torch.Tensor:
        """Log-probabilities (L + 2, V) of a sequence, one token of it masked or none."""
        if (sequence, masked) not in self._known:
            tokens_1L = ALPHABET.get_batch_converter()([("", sequence)])[2]
            assert tokens_1L.shape == (1, len(sequence) + 2)
            if masked is not None:
                tokens_1L[0, masked] = ALPHABET.mask_idx
            with torch.no_grad():
                logits_LV = self._model(tokens_1L)["logits"][0]
            assert logits_LV.dtype == torch.float64
            self._known[sequence, masked] = logits_LV.log_softmax(dim=-1)
        return self._known[sequence, masked]


@contextmanager
def score_reference(model: Any, *, max_residues: int = 1022) -> Iterator[ScoreReference]:
    """The reference of a fair-esm model, for as long as the context is open."""
    with in_fp64(model) as twin:
        yield ScoreReference(twin, max_residues)
