"""What scores units of a run: an encoder's language-model head by a method, a decoder, or a fitted ridge head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .chain import Chain
from .checkpoint import head_fingerprint
from .decoder import Decoder
from .embedder import default_max_tokens
from .exported_encoder import AnyEncoder, ExportedEncoder
from .family import Family
from .likelihoods import LikelihoodRunner
from .queries import QueryRunner, check_logits
from .ridge_head import RidgeHead, score_with_head
from .score_state import Values
from .scoring import SITE_METHODS, mutant_marginals, pseudo_log_likelihoods, site_logits
from .variants import Variant


class ModelScorer:
    """One model's language-model head, see `scoring`; a `score_run.Scorer`.

    Args:
        encoder: has a language-model head, or is a file that gives logits.
        method, compat: see `scoring.score_variants`.
        max_tokens: most tokens in a batch; the device's usual number by default.
        after_batch: called with the number of residues that have just been run.

    Raises:
        InputError: the encoder has no language-model head, or the file gives no logits.
    """

    def __init__(
        self,
        encoder: AnyEncoder,
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


def language_head_hash(encoder: AnyEncoder) -> str:
    """Hash of the language-model head, on which scores depend and of which a model's own fingerprint knows nothing.

    An exported file's names its runtime, too, whose bits are others.

    Raises:
        InputError: the encoder has no language-model head, or the file gives no logits.
    """
    check_logits(encoder)
    if isinstance(encoder, ExportedEncoder):
        return f"{encoder.language_head} {encoder.runtime}"
    return head_fingerprint(encoder)


class LikelihoodScorer:
    """A decoder's log-likelihoods, see `likelihoods`; a `score_run.Scorer`.

    Args:
        decoder: reads every protein whole.
        max_tokens: most tokens in a batch; the device's usual number by default.
        after_batch: called with the number of residues that have just been run.
    """

    by_site = False
    in_one_go = False
    against_wild_type = True

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_tokens: int | None,
        after_batch: Callable[[int], None],
    ) -> None:
        self._runner = LikelihoodRunner(decoder, max_tokens=max_tokens, after_batch=after_batch)
        self.name = decoder.name
        # Of byte pairs each may hold several residues; no run is divided by this.
        self.limit = decoder.config.places
        self.max_tokens = self._runner.max_tokens

    def run_sites(self, wild_type: str, places: Sequence[int]) -> Values:
        message = "a decoder reads mutants, not sites"
        raise NotImplementedError(message)

    def run_mutants(self, variants: Sequence[Variant], wild_type: str) -> Values:
        return self._runner.run([variant.sequence for variant in variants])

    def cost(self, length: int, wild_type: str) -> int:
        return length


class HeadScorer:
    """A ridge head on embeddings, see `ridge_head`; a `score_run.Scorer`.

    Args:
        head: what was fitted.
        family: the models that it reads.
        chain: the one that it was fitted on, or None.
        max_tokens: most tokens in a batch; the device's usual number by default.
        after_batch: called with the number of residues that have just been run.

    Raises:
        InputError: models or chain are others than the head's.
    """

    by_site = False
    in_one_go = False
    against_wild_type = False

    def __init__(
        self,
        head: RidgeHead,
        family: Family,
        *,
        chain: Chain | None,
        max_tokens: int | None,
        after_batch: Callable[[int], None],
    ) -> None:
        head.check_models(family.members, chain)
        self._head = head
        self._family = family
        self._chain = chain
        self._after_batch = after_batch
        self.name = family.members[-1].name
        self.limit = min(member.config.max_residues for member in family.members)
        self.max_tokens = default_max_tokens(family.members[0].device) if max_tokens is None else max_tokens

    def run_sites(self, wild_type: str, places: Sequence[int]) -> Values:
        message = "a ridge head reads mutants, not sites"
        raise NotImplementedError(message)

    def run_mutants(self, variants: Sequence[Variant], wild_type: str) -> Values:
        scores = score_with_head(
            self._head,
            self._family,
            variants,
            wild_type=wild_type,
            chain=self._chain,
            max_tokens=self.max_tokens,
            after_batch=self._after_batch,
        )
        return scores.astype(np.float64)

    def cost(self, length: int, wild_type: str) -> int:
        return length
