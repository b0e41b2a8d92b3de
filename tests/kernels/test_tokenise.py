"""tokenise: both twins against the contract and each other, and every error."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protnest.kernels.extension import load, missing_reason
from protnest.kernels.tokenise import NOT_IN_ALPHABET, tokenise

needs_extension = pytest.mark.skipif(load() is None, reason=f"cpu: {missing_reason()}")
each_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=needs_extension)])

LETTERS = b"ACDEFGHIKLMNPQRSTVWYacdefghiklmnpqrstvwy.-"
BOS, EOS = 0, 2


def _table() -> npt.NDArray[np.uint8]:
    table = np.full(256, NOT_IN_ALPHABET, dtype=np.uint8)
    for token, letter in enumerate(LETTERS):
        table[letter] = 4 + token
    table[0], table[255] = 254, 253  # the ends of the table, and ids next to the mark
    table.setflags(write=False)
    return table


TABLE = _table()
known = st.lists(st.sampled_from([0, 255, *LETTERS]), max_size=40).map(bytes)


def _expected(sequences: list[bytes], bos: int, eos: int) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    offsets = [0]
    for sequence in sequences:
        tokens += [bos, *(int(TABLE[byte]) for byte in sequence), eos]
        offsets.append(len(tokens))
    return tokens, offsets


def _outcome(sequences: list[Any], impl: str) -> tuple[str, ...]:
    """Everything a caller sees, comparable bit for bit."""
    try:
        tokens_T, cu_seqlens_B1 = tokenise(sequences, TABLE, bos=BOS, eos=EOS, impl=impl)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return tokens_T.tobytes().hex(), cu_seqlens_B1.tobytes().hex(), str(tokens_T.dtype), str(cu_seqlens_B1.dtype)


@each_impl
@settings(deadline=None)
@given(sequences=st.lists(known, max_size=12), bos=st.integers(0, 255), eos=st.integers(0, 255))
def test_equals_the_contract(impl: str, sequences: list[bytes], bos: int, eos: int) -> None:
    tokens_T, cu_seqlens_B1 = tokenise(sequences, TABLE, bos=bos, eos=eos, impl=impl)
    tokens, offsets = _expected(sequences, bos, eos)
    assert tokens_T.dtype == np.uint8
    assert cu_seqlens_B1.dtype == np.int64
    assert tokens_T.tolist() == tokens
    assert cu_seqlens_B1.tolist() == offsets


@needs_extension
@settings(deadline=None, max_examples=300)
@given(sequences=st.lists(st.one_of(known, known, st.binary(max_size=8), st.just("MKT"), st.none()), max_size=8))
def test_twins_agree_bit_for_bit_and_in_their_errors(sequences: list[Any]) -> None:
    assert _outcome(sequences, "cpu") == _outcome(sequences, "reference")


@each_impl
def test_no_sequences(impl: str) -> None:
    tokens_T, cu_seqlens_B1 = tokenise([], TABLE, bos=BOS, eos=EOS, impl=impl)
    assert tokens_T.dtype == np.uint8
    assert tokens_T.shape == (0,)
    assert cu_seqlens_B1.dtype == np.int64
    assert cu_seqlens_B1.tolist() == [0]


@each_impl
def test_empty_sequences_keep_their_place(impl: str) -> None:
    tokens_T, cu_seqlens_B1 = tokenise([b"", b"A", b"", b""], TABLE, bos=BOS, eos=EOS, impl=impl)
    assert tokens_T.tolist() == [0, 2, 0, 4, 2, 0, 2, 0, 2]
    assert cu_seqlens_B1.tolist() == [0, 2, 5, 7, 9]


@each_impl
def test_one_very_long_among_short(impl: str) -> None:
    sequences = [b"M", LETTERS * 50_000, b"K"]
    tokens_T, cu_seqlens_B1 = tokenise(sequences, TABLE, bos=BOS, eos=EOS, impl=impl)
    tokens, offsets = _expected(sequences, BOS, EOS)
    np.testing.assert_array_equal(tokens_T, np.array(tokens, dtype=np.uint8))
    assert cu_seqlens_B1.tolist() == offsets


@each_impl
def test_takes_tuples_subclasses_and_strided_tables(impl: str) -> None:
    class Sequence(bytes):
        pass

    strided = np.repeat(TABLE, 2)[::2]
    tokens_T, _ = tokenise((Sequence(b"AC"), b"D"), strided, bos=np.int64(1), eos=np.uint8(3), impl=impl)
    assert tokens_T.tolist() == [1, 4, 5, 3, 1, 6, 3]


@each_impl
def test_auto_gives_the_same(impl: str) -> None:
    sequences = [b"ACD", b"", b"yw.-"]
    assert _outcome(sequences, "auto") == _outcome(sequences, impl)


@each_impl
@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([b"ACD", b"", b"AC*D*"], "sequences[2], residue 3: b'*' is not in the alphabet"),
        ([b"*"], "sequences[0], residue 1: b'*' is not in the alphabet"),
        ([b"", b"", b"AC\n"], "sequences[2], residue 3: b'\\n' is not in the alphabet"),
        ([b"A" * 99 + b"\xc3", b"1"], "sequences[0], residue 100: b'\\xc3' is not in the alphabet"),
        ([b"A", b"'"], 'sequences[1], residue 1: b"\'" is not in the alphabet'),
    ],
)
def test_names_the_first_byte_outside_the_alphabet(impl: str, sequences: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokenise(sequences, TABLE, bos=BOS, eos=EOS, impl=impl)


@each_impl
@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([b"AC", "AC"], "sequences[1] is str, want bytes"),
        ([b"A*", bytearray(b"A")], "sequences[1] is bytearray, want bytes"),  # types come before bytes
        ([None, 3], "sequences[0] is NoneType, want bytes"),
        (b"AC", "sequences[0] is int, want bytes"),
        ("AC", "sequences[0] is str, want bytes"),
    ],
)
def test_names_the_first_item_that_is_not_bytes(impl: str, sequences: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        tokenise(sequences, TABLE, bos=BOS, eos=EOS, impl=impl)


@each_impl
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.tolist(), "table is list, want a NumPy array, uint8 (256,)"),
        (TABLE.astype(np.int64), "table is int64 (256,), want uint8 (256,)"),
        (TABLE.view(np.int8), "table is int8 (256,), want uint8 (256,)"),
        (TABLE[:128], "table is uint8 (128,), want uint8 (256,)"),
        (TABLE.reshape(16, 16), "table is uint8 (16, 16), want uint8 (256,)"),
    ],
)
def test_refuses_a_wrong_table(impl: str, table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenise([b"A"], table, bos=BOS, eos=EOS, impl=impl)


@each_impl
@pytest.mark.parametrize("token", [-1, 256, 2**70, 1.0, "A", None])
@pytest.mark.parametrize("name", ["bos", "eos"])
def test_refuses_a_wrong_special_token(impl: str, name: str, token: Any) -> None:
    specials: dict[str, Any] = {"bos": BOS, "eos": EOS, name: token}
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(token))}, want an integer from 0 to 255$"):
        tokenise([b"A"], TABLE, impl=impl, **specials)


def test_refuses_an_unknown_impl() -> None:
    with pytest.raises(ValueError, match="tokenise: impl is 'triton', allowed are 'auto', 'reference', 'cpu'"):
        tokenise([b"A"], TABLE, bos=BOS, eos=EOS, impl="triton")
