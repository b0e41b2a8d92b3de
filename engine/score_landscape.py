"""From a scoring run to landscapes: what is known of every single substitution of each wild type.

Where scores follow from the wild type's sites, a touched site tells of all 20 amino acids and of the model's entropy.
Elsewhere a landscape holds the singles that the tables name.

Shapes: M models, P touched places, L residues of a wild type, A = 20 amino acids in the order of `AMINO_ACIDS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACIDS, TOKEN_IDS
from .assay import Entry, Target
from .landscape import Landscape
from .score_state import Values
from .scoring import aggregate_scores

_ACIDS = [TOKEN_IDS[letter] for letter in AMINO_ACIDS]


class Sightings:
    """The single substitutions that tables name, and their scores; fed row by row by the last reading."""

    def __init__(self) -> None:
        self._targets: dict[str, Target] = {}
        self._scores: dict[str, npt.NDArray[np.float32]] = {}
        self._given: dict[str, npt.NDArray[np.bool_]] = {}

    @property
    def targets(self) -> list[Target]:
        """Wild types that rows name, in order of appearance."""
        return list(self._targets.values())

    def see(self, entries: Sequence[Entry], scores_N: npt.NDArray[np.float32]) -> None:
        """Takes in rows and their scores."""
        for entry, score in zip(entries, scores_N, strict=True):
            target, variant = entry.target, entry.variant
            assert target is not None
            assert variant is not None
            if target.id not in self._targets:
                shape = (len(target.sequence), len(AMINO_ACIDS))
                self._targets[target.id] = target
                self._scores[target.id] = np.full(shape, np.nan, dtype=np.float32)
                self._given[target.id] = np.zeros(shape, dtype=bool)
            if not variant.is_single:
                continue
            (site,) = variant.sites
            acid = AMINO_ACIDS.find(variant.sequence[site])
            if acid >= 0:
                self._scores[target.id][site, acid] = score
                self._given[target.id][site, acid] = True

    def landscape(
        self,
        target: Target,
        places: Sequence[int],
        values: Sequence[Values] | None,
        *,
        aggregate: str,
        method: str,
        model: str,
        offset: int,
    ) -> Landscape:
        """What is known of a wild type that rows named.

        Args:
            target: the wild type.
            places: touched residues, from 0, where scores follow from those.
            values: logits (P, V) at these under each of M models; None where scores do not follow from sites.
            aggregate: how the models' scores become one.
            method, model: for the legend.
            offset: added to residues' numbers.
        """
        scores_LA, entropy_L = self._scores[target.id], None
        if values is not None:
            scores_LA = np.full_like(scores_LA, np.nan)
            entropy_L = np.full(len(target.sequence), np.nan, dtype=np.float32)
            if places:
                scores_LA[places], entropy_L[places] = _from_logits(target.sequence, places, values, aggregate)
        return Landscape(
            target=target.id,
            wild_type=target.sequence,
            scores_LA=scores_LA,
            entropy_L=entropy_L,
            given_LA=self._given[target.id],
            method=method,
            model=model,
            first=1 + offset,
        )


def _from_logits(
    wild_type: str, places: Sequence[int], values: Sequence[Values], aggregate: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scores (P, A), and the mean over models of the entropy in nats over the 20 amino acids, (P,)."""
    logits_MPV = np.stack(values).astype(np.float64)
    own_P = np.array([TOKEN_IDS[wild_type[place]] for place in places])
    acids_MPA = logits_MPV[:, :, _ACIDS]
    gains_MPA = acids_MPA - logits_MPV[:, np.arange(len(places)), own_P, None]
    shifted_MPA = acids_MPA - acids_MPA.max(axis=-1, keepdims=True)
    p_MPA = np.exp(shifted_MPA)
    total_MP1 = p_MPA.sum(axis=-1, keepdims=True)
    entropy_MP = np.log(total_MP1[..., 0]) - (p_MPA * shifted_MPA).sum(axis=-1) / total_MP1[..., 0]
    return aggregate_scores(gains_MPA, aggregate), entropy_MP.mean(axis=0).astype(np.float32)
