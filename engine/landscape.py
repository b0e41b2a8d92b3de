"""Scores of single substitutions of one protein: what a heatmap shows.

Shapes: L residues of the protein, A the 20 standard amino acids in the order of `alphabet.AMINO_ACIDS`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACIDS, RESIDUES

_LIMIT_PERCENTILE = 98.0
"""Share of scores, in percent, that the colours tell apart: a few outliers must not bleach all the others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Landscape:
    """Scores of single substitutions of one protein.

    Attributes:
        target: the protein's id.
        wild_type: its L residues.
        scores_LA: float32 (L, 20), columns in the order of `alphabet.AMINO_ACIDS`; NaN where nothing is known, 0 or NaN
            at the wild type's own residue. Higher is better tolerated.
        entropy_L: float32 (L,) in nats, of the model's distribution over the 20 amino acids at that place; NaN where
            unknown; None where the method has none.
        given_LA: bool (L, 20), the substitutions that the caller's table named.
        method: how the scores were made, `masked-marginal`.
        model: what made them.
        first: number of the first residue, as the caller counts.

    Raises:
        ValueError: a shape or type is another, the wild type is empty or holds what is no residue, a score or an
            entropy is infinite.
    """

    target: str
    wild_type: str
    scores_LA: npt.NDArray[np.float32]
    entropy_L: npt.NDArray[np.float32] | None
    given_LA: npt.NDArray[np.bool_]
    method: str
    model: str
    first: int = 1

    def __post_init__(self) -> None:
        if strange := sorted(set(self.wild_type) - set(RESIDUES)) or ([] if self.wild_type else [""]):
            message = f"wild_type: expected at least one residue and none but {RESIDUES}, got {strange[0]!r}"
            raise ValueError(message)
        length, acids = len(self.wild_type), len(AMINO_ACIDS)
        _check_array("scores_LA", self.scores_LA, np.float32, (length, acids))
        _check_array("given_LA", self.given_LA, np.bool_, (length, acids))
        if self.entropy_L is not None:
            _check_array("entropy_L", self.entropy_L, np.float32, (length,))

    @property
    def length(self) -> int:
        """L."""
        return len(self.wild_type)

    @cached_property
    def own_LA(self) -> npt.NDArray[np.bool_]:
        """bool (L, 20): the wild type's own residue; a row of False where that is none of the 20."""
        letters_L1 = np.array(list(self.wild_type))[:, None]
        return np.asarray(letters_L1 == np.array(list(AMINO_ACIDS)))

    @cached_property
    def substitutions_LA(self) -> npt.NDArray[np.float32]:
        """float32 (L, 20): the scores, with NaN at the wild type's own residue as well."""
        return np.where(self.own_LA, np.float32(np.nan), self.scores_LA)

    @cached_property
    def mean_L(self) -> npt.NDArray[np.float32]:
        """float32 (L,): mean score of the known substitutions at each place; NaN where there are none."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mean of empty slice")
            mean_L = np.nanmean(self.substitutions_LA, axis=1, dtype=np.float64)
        return np.asarray(mean_L, dtype=np.float32)

    @cached_property
    def known_L(self) -> npt.NDArray[np.bool_]:
        """bool (L,): places of which anything is known, the score of a substitution or the entropy."""
        known_L = np.asarray(np.isfinite(self.substitutions_LA).any(axis=1))
        return known_L if self.entropy_L is None else np.asarray(known_L | np.isfinite(self.entropy_L))

    @cached_property
    def limit(self) -> float:
        """Where the colours end, above 0: the 98th percentile of the scores' sizes, rounded up to two digits; 1 where
        no substitution is known or all score 0."""
        sizes = np.abs(self.substitutions_LA[np.isfinite(self.substitutions_LA)]).astype(np.float64)
        if not sizes.size or not sizes.any():
            return 1.0
        # Where all but a few score 0, the largest of these few.
        limit = float(np.percentile(sizes, _LIMIT_PERCENTILE)) or float(sizes.max())
        digit = math.floor(math.log10(limit)) - 1
        # Rounding takes away what float32 left behind, so that 2.4000001 does not become 2.5.
        tenths = math.ceil(round(limit / 10.0**digit, 5))
        return float(f"{tenths}e{digit}")

    def name(self, site: int, acid: str) -> str:
        """`A24G`: the substitution of the residue at `site`, from 0, by `acid`, as the caller counts."""
        return f"{self.wild_type[site]}{site + self.first}{acid}"


def _check_array(name: str, array: npt.NDArray[np.generic], kind: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != kind or array.shape != shape:
        message = f"{name}: expected {np.dtype(kind)} {shape}, got {array.dtype} {array.shape}"
        raise ValueError(message)
    if np.isinf(array).any():
        place = tuple(int(axis) for axis in np.argwhere(np.isinf(array))[0])
        message = f"{name}: {array[place]} at {place}; only finite numbers, and NaN where nothing is known"
        raise ValueError(message)
