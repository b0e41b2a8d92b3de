"""Masking as ESM-2 was trained: 15 % of residues are asked for, of these 80 % masked, 10 % swapped, 10 % left.

Source: Devlin et al. 2019; Lin et al. 2023, supplement A.2. More may be asked for: each pass then teaches more, from
less context (Wettig et al. 2023, arXiv 2202.08005).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..engine.alphabet import AMINO_ACIDS, BOS_ID, EOS_ID, MASK_ID, TOKEN_IDS

ASKED = 0.15
_MASKED, _SWAPPED = 0.8, 0.1
_SWAPS = np.array([TOKEN_IDS[letter] for letter in AMINO_ACIDS], dtype=np.uint8)


def mask_tokens(
    tokens_T: npt.NDArray[np.uint8], rng: np.random.Generator, *, swaps: bool = True, share: float = ASKED
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Hides residues and says which are asked for.

    Args:
        tokens_T: token ids, uint8; `<cls>` and `<eos>` are never asked for.
        rng: decides everything.
        swaps: as in training; False shows `<mask>` at every row that is asked for, as in judging.
        share: of the residues that are asked for, on average.

    Returns:
        The tokens to show, uint8 (T,), and the rows asked for, int64 (R,), at least one where there is a residue.
    """
    residues = np.flatnonzero((tokens_T != BOS_ID) & (tokens_T != EOS_ID))
    rows = residues[rng.random(residues.size) < share]
    if not rows.size and residues.size:
        rows = rng.choice(residues, size=1)
    shown = tokens_T.copy()
    fate = rng.random(rows.size) if swaps else np.zeros(rows.size)
    shown[rows[fate < _MASKED]] = MASK_ID
    swapped = rows[(fate >= _MASKED) & (fate < _MASKED + _SWAPPED)]
    shown[swapped] = rng.choice(_SWAPS, size=swapped.size)
    return shown, rows
