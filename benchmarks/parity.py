"""No speed without green: whether an engine's embeddings are those of the reference, before and after it was timed.

The error of a protein is the norm of the difference over the norm of the reference's vector: unlike a cosine, it also
sees a wrong scale. Allowed are 1e-5 in fp32, 0.004 in fp16 and 0.03 in bf16; the latter means a cosine of at least
0.9995. Right engines at 8M and 35M were seen at 7e-7 in fp32 and 0.011 in bf16, against fp64. In int8 0.1 are allowed
(a cosine of about 0.995): less than the 0.12 that ESM-2's rescaled embeddings are worth, which one engine had lost.
This keeps speed honest; what int8 costs a model, random weights cannot say. esm-cpp was seen at 0.02 at 8M.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

ALLOWED = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2, "int8": 0.1}


class ParityError(Exception):
    """An engine's answer is not the reference's."""


def row_errors(expected_ND: Floats, got_ND: Floats) -> Floats:
    """Norm of the difference of each row over the norm of the expected row, float64 (N,)."""
    expected = expected_ND.astype(np.float64)
    difference = np.linalg.norm(got_ND.astype(np.float64) - expected, axis=1)
    errors: Floats = difference / np.linalg.norm(expected, axis=1)
    return errors


def check_parity(name: str, precision: str, expected_BD: Floats, got_BD: Floats) -> float:
    """Compares the first rows of an answer with the reference's.

    Args:
        name: the engine, for the message.
        precision: "fp32", "bf16", "fp16" or "int8"; decides what is allowed.
        expected_BD: the reference's embeddings.
        got_BD: at least as many rows.

    Returns:
        The largest error of a protein.

    Raises:
        ParityError: an error is beyond what is allowed, or not a number.
    """
    rows, width = expected_BD.shape
    if got_BD.shape[0] < rows or got_BD.shape[1] != width:
        message = f"{name} {precision}: embeddings of shape {got_BD.shape}, expected at least {expected_BD.shape}"
        raise ParityError(message)
    errors = row_errors(expected_BD, got_BD[:rows])
    worst = int(np.nan_to_num(errors, nan=np.inf).argmax())
    error = float(errors[worst])
    if not error <= ALLOWED[precision]:
        message = (
            f"{name} {precision}: the embedding of protein {worst} is off by {error:.2e} of its norm, allowed "
            f"{ALLOWED[precision]:.2g}; nothing is timed"
        )
        raise ParityError(message)
    return error
