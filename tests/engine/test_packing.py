"""Packed batches: which token lies where, and in which dtype."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from protnest.engine.alphabet import BOS_ID, EOS_ID, MASK_ID, RESIDUES, TOKENS
from protnest.engine.packing import pack, pack_tokens

SEQUENCES = ["MKT", "A", RESIDUES, "ACDEFGHIKLMNPQRSTVWY" * 20]


def test_pack_lays_sequences_back_to_back() -> None:
    batch = pack(SEQUENCES)
    expected = [["<cls>", *sequence, "<eos>"] for sequence in SEQUENCES]
    assert [TOKENS[token] for token in batch.tokens_T.tolist()] == list(itertools.chain(*expected))
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(map(len, expected))]
    assert batch.lengths_B == tuple(map(len, expected))
    assert all(type(length) is int for length in batch.lengths_B)
    assert batch.index_B.tolist() == [0, 1, 2, 3]


def test_dtypes_and_devices_are_the_documented_ones() -> None:
    for batch in (pack(SEQUENCES), pack([]), pack(["M"], np.array([7]))):
        assert batch.tokens_T.dtype == torch.int32
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.index_B.dtype == np.int64
        for tensor in (batch.tokens_T, batch.cu_seqlens):
            assert tensor.device.type == "cpu"
            assert tensor.dim() == 1
            assert tensor.is_contiguous()


def test_an_empty_batch() -> None:
    batch = pack([])
    assert batch.tokens_T.numel() == 0
    assert batch.cu_seqlens.tolist() == [0]
    assert batch.lengths_B == ()
    assert batch.index_B.shape == (0,)


def test_an_empty_sequence_is_its_two_specials() -> None:
    batch = pack(["", "M", ""])
    assert batch.tokens_T.tolist() == [BOS_ID, EOS_ID, BOS_ID, TOKENS.index("M"), EOS_ID, BOS_ID, EOS_ID]
    assert batch.lengths_B == (2, 3, 2)


def test_lower_case_is_the_same() -> None:
    assert torch.equal(pack(["mkTx"]).tokens_T, pack(["MKTX"]).tokens_T)


@pytest.mark.parametrize(
    ("sequence", "residue"), [("MéT", 2), ("MK\N{GREEK CAPITAL LETTER ALPHA}", 3), ("\udc80", 1), ("M T", 2), ("M*", 2)]
)
def test_letters_outside_the_alphabet_are_named(sequence: str, residue: int) -> None:
    with pytest.raises(ValueError, match=rf"sequences\[1\], residue {residue}: .* is not in the alphabet"):
        pack(["MKT", sequence])


def test_index_is_the_caller_s() -> None:
    index_B = np.array([5, 3], dtype=np.int64)
    assert pack(["MK", "T"], index_B).index_B.tolist() == [5, 3]
    assert pack_tokens(np.zeros(5, dtype=np.uint8), np.array([0, 4, 5]), index_B).index_B.tolist() == [5, 3]


def test_pack_tokens_keeps_any_token() -> None:
    tokens_T = np.array([BOS_ID, MASK_ID, EOS_ID, BOS_ID, 5, MASK_ID, EOS_ID], dtype=np.uint8)
    batch = pack_tokens(tokens_T, np.array([0, 3, 7]))
    assert batch.tokens_T.tolist() == tokens_T.tolist()
    assert batch.lengths_B == (3, 4)
    tokens_T[:] = 0
    assert batch.tokens_T.sum() > 0, "the batch shares memory with the caller's tokens"


def test_moving_to_the_same_device_is_free() -> None:
    batch = pack(SEQUENCES)
    assert batch.to(torch.device("cpu")) is batch


def test_moving_keeps_everything() -> None:
    batch = pack(SEQUENCES, np.arange(4)[::-1].copy())
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.tokens_T, moved.cu_seqlens)} == {"meta"}
    assert moved.lengths_B == batch.lengths_B
    assert moved.index_B is batch.index_B


def test_filled_with_sequences_of_one_token() -> None:
    batch = pack(["MK", "T"], np.array([5, 3]))
    filled = batch.filled(10)
    assert filled.tokens_T.tolist() == [*batch.tokens_T.tolist(), 0, 0, 0]
    assert filled.cu_seqlens.tolist() == [0, 4, 7, 8, 9, 10]
    assert (filled.tokens_T.dtype, filled.cu_seqlens.dtype) == (torch.int32, torch.int32)
    assert filled.lengths_B == (4, 3, 1, 1, 1)
    assert filled.index_B is batch.index_B
    assert batch.lengths_B == (4, 3)
    assert batch.filled(7) is batch
    assert pack([]).filled(0).lengths_B == ()
