"""What scores units of a run: a language-model head by one of its methods, or a fitted ridge head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .encoder import Encoder
from .queries import QueryRunner
from .score_state import Values
from .scoring import SITE_METHODS, mutant_marginals, pseudo_log_likelihoods, site_logits
from .variants import Variant


class ModelScorer:
    """One model's language-model head, see `scoring`; a `score_run.Scorer`.

    Args:
        encoder: has a language-model head.
        method, compat: see `scoring.score_variants`.
        max_tokens: most tokens in a batch; the device's usual number by default.
        after_batch: called with the number of residues that have just been run.

    Raises:
        InputError: the encoder has no language-model head.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        method: str,
        compat: str | None,
        max_tokens: int | None,
        after_batch: Callable[[int], None],
    ) -> None:
        self._runner = QueryRunner(encoder, max_tokens=max_tokens, after_batch=after_batch)
        self._method = method
        self._compat = compat
        self.name = encoder.name
        self.by_site = method in SITE_METHODS
        self.in_one_go = method == "wt-marginal"
        self.against_wild_type = method == "pseudo-ll" and compat is None
        self.limit = encoder.config.max_residues
        self.max_tokens = self._runner.max_tokens

    def run_sites(self, wild_type: str, places: Sequence[int]) -> Values:
        return site_logits(self._runner, wild_type, places, masked=self._method == "masked-marginal")

    def run_mutants(self, variants: Sequence[Variant], wild_type: str) -> Values:
        if self._method == "pseudo-ll":
            sequences = [variant.sequence for variant in variants]
            return pseudo_log_likelihoods(self._runner, sequences, compat=self._compat)
        return mutant_marginals(self._runner, variants, wild_type)

    def cost(self, length: int, wild_type: str) -> int:
        return min(length, self.limit) * (length if self._method == "pseudo-ll" else 1)
