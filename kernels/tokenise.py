"""Letters to token ids, packed back to back: bytes in, one uint8 array and its offsets out.

Contract. Sequence b of L_b residues fills tokens_T[cu_seqlens_B1[b]:cu_seqlens_B1[b + 1]] with

    bos, table[sequence_b[0]], ..., table[sequence_b[L_b - 1]], eos

so T = sum(L_b + 2); an empty sequence gives bos, eos. Integers throughout, hence both twins agree bit for bit, in
their errors too. The reference holds three more arrays of about T bytes. The extension holds 16 bytes more per
sequence, looks up one byte at a time on one core (about 1 GB/s, which is below memory's rate and above a FASTA
reader's) and releases the interpreter's lock meanwhile.

Shapes: B sequences, B1 = B + 1, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from .extension import select

NOT_IN_ALPHABET = 255
"""The table's mark for a byte outside the alphabet."""


def tokenise_reference(
    sequences: Sequence[bytes], table: npt.NDArray[np.uint8], *, bos: int, eos: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """What the contract says, in NumPy; `tokenise` documents the arguments and validates the table."""
    for number, sequence in enumerate(sequences):
        if not isinstance(sequence, bytes):
            raise _wrong_type(number, sequence)
    lengths_B = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    residues = table[np.frombuffer(b"".join(sequences), dtype=np.uint8)]
    unknown = residues == NOT_IN_ALPHABET
    if unknown.any():
        place = int(unknown.argmax())
        ends_B = np.cumsum(lengths_B)
        number = int(np.searchsorted(ends_B, place, side="right"))
        raise _unknown_byte(sequences, number, place - int(ends_B[number] - lengths_B[number]))

    cu_seqlens_B1 = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum(lengths_B + 2, out=cu_seqlens_B1[1:])
    is_residue_T = np.ones(cu_seqlens_B1[-1], dtype=np.bool_)
    is_residue_T[cu_seqlens_B1[:-1]] = is_residue_T[cu_seqlens_B1[1:] - 1] = False
    tokens_T = np.empty(cu_seqlens_B1[-1], dtype=np.uint8)
    tokens_T[cu_seqlens_B1[:-1]] = bos
    tokens_T[cu_seqlens_B1[1:] - 1] = eos
    tokens_T[is_residue_T] = residues
    return tokens_T, cu_seqlens_B1


def _tokenise_cpu(
    extension: ModuleType, sequences: tuple[bytes, ...], table: npt.NDArray[np.uint8], bos: int, eos: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    tokens_T, cu_seqlens_B1, number, residue = extension.tokenise(sequences, table, bos, eos)
    if number >= 0:
        raise _wrong_type(number, sequences[number]) if residue < 0 else _unknown_byte(sequences, number, residue)
    return tokens_T, cu_seqlens_B1


def tokenise(
    sequences: Sequence[bytes], table: npt.NDArray[np.uint8], *, bos: int, eos: int, impl: str = "auto"
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Turns sequences into packed token ids.

    Args:
        sequences: B byte strings, one ASCII byte per residue; each may be empty, and B may be 0.
        table: uint8 (256,), the token id of every byte; 255 marks a byte outside the alphabet.
        bos: token id put before each sequence, 0 to 255.
        eos: token id put after each sequence, 0 to 255.
        impl: `auto`, `reference` (NumPy) or `cpu` (the C++ extension).

    Returns:
        tokens_T: uint8 (T,), all sequences back to back; T counts bos and eos.
        cu_seqlens_B1: int64 (B + 1,), where each begins; from 0 to T.

    Raises:
        TypeError: an item is not bytes (looked for in all items first).
        ValueError: a byte is outside the alphabet (names the sequence from 0, the residue from 1, and the byte); the
            table, bos, eos or impl is not as above.
        RuntimeError: impl is `cpu` and the extension is missing.
    """
    extension = select("tokenise", impl)
    table = _checked_table(table)
    bos, eos = _checked_token("bos", bos), _checked_token("eos", eos)
    items = tuple(sequences)
    if extension is None:
        return tokenise_reference(items, table, bos=bos, eos=eos)
    return _tokenise_cpu(extension, items, table, bos, eos)


def _checked_table(table: Any) -> npt.NDArray[np.uint8]:
    if not isinstance(table, np.ndarray):
        message = f"table is {type(table).__name__}, want a NumPy array, uint8 (256,)"
        raise ValueError(message)
    if table.dtype != np.uint8 or table.shape != (256,):
        message = f"table is {table.dtype} {table.shape}, want uint8 (256,)"
        raise ValueError(message)
    return np.ascontiguousarray(table)


def _checked_token(name: str, token: Any) -> int:
    try:
        value = index(token)
    except TypeError:
        value = -1
    if not 0 <= value <= 255:
        message = f"{name} is {token!r}, want an integer from 0 to 255"
        raise ValueError(message)
    return value


def _wrong_type(number: int, item: object) -> TypeError:
    return TypeError(f"sequences[{number}] is {type(item).__name__}, want bytes")


def _unknown_byte(sequences: Sequence[bytes], number: int, residue: int) -> ValueError:
    byte = sequences[number][residue : residue + 1]
    return ValueError(f"sequences[{number}], residue {residue + 1}: {byte!r} is not in the alphabet")
