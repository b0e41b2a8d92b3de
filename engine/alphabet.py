"""ESM-2's alphabet: 33 tokens, their ids, and the letters that a protein may hold.

Source: Lin et al., Science 379:1123 (2023); the order is that of the published checkpoints' vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TOKENS: tuple[str, ...] = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
)
TOKEN_IDS: dict[str, int] = {token: index for index, token in enumerate(TOKENS)}

BOS_ID = TOKEN_IDS["<cls>"]
PAD_ID = TOKEN_IDS["<pad>"]
EOS_ID = TOKEN_IDS["<eos>"]
MASK_ID = TOKEN_IDS["<mask>"]

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 standard amino acids, in the order in which tables and heatmaps list them."""

RESIDUES = "".join(token for token in TOKENS if len(token) == 1)
"""Every letter that a sequence may hold: the 20, X, B, U, Z, O, `.` and `-`."""

NOT_A_RESIDUE = 255


def _residue_table() -> npt.NDArray[np.uint8]:
    table = np.full(256, NOT_A_RESIDUE, dtype=np.uint8)
    for letter in RESIDUES:
        table[ord(letter.upper())] = table[ord(letter.lower())] = TOKEN_IDS[letter]
    table.setflags(write=False)
    return table


RESIDUE_TABLE = _residue_table()
"""uint8 (256,): token id of each byte, upper and lower case alike; `NOT_A_RESIDUE` for bytes outside the alphabet."""
