"""The rows with the largest scalar products with each query, among all of them.

    score[q, n] = sum_i queries[q, i] rows[n, i]        of each q the k largest; of equal ones the first row

Rows come in blocks, so memory holds one block, k results a query and, in the reference, the products of some of both.

Implementations:
    reference  a matrix product of some rows and some queries at a time, of which what is above the k-th best so far is
               merged. What `auto` runs for rows of more than 128 numbers, where a library's product is faster.
    cpu        csrc/top_rows.cpp: products stay in registers and are compared there with the k-th best so far. It pays
               where rows are short (K of some dozens): there writing products down costs as much as making them.

On the CPU, in fp32. Sums are in any order: the two differ in the last bits, and between scores that near in the choice.

Shapes: Q queries, N rows of a block, K numbers of each, k wanted.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from .cpu_kernels import cpu_level
from .extension import select

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 1024
_QUERIES_AT_ONCE = 512
_WIDEST = 128


def _reference(rows_NK: Floats, first: int, queries_QK: Floats, scores_Qk: Floats, numbers_Qk: Numbers) -> None:
    """Brings a block of rows, `first` and following, into the best so far."""
    for begin in range(0, len(rows_NK), _ROWS_AT_ONCE):
        rows = torch.from_numpy(rows_NK[begin : begin + _ROWS_AT_ONCE])
        for start in range(0, len(queries_QK), _QUERIES_AT_ONCE):
            these = slice(start, start + _QUERIES_AT_ONCE)
            products_QN = (torch.from_numpy(queries_QK[these]) @ rows.T).numpy()
            _merge(products_QN, first + begin, scores_Qk[these], numbers_Qk[these])


def _merge(products_QN: Floats, first: int, scores_Qk: Floats, numbers_Qk: Numbers) -> None:
    """Only what is above the k-th best so far is looked at: after the first rows little is."""
    width, k = products_QN.shape[1], scores_Qk.shape[1]
    above = np.flatnonzero(products_QN > scores_Qk.min(axis=1)[:, None])
    if not above.size:
        return
    query_H, column_H = divmod(above, width)
    # One line for each query that has hits, filled from the left.
    touched, begin, counts = np.unique(query_H, return_index=True, return_counts=True)
    line_H = np.repeat(np.arange(touched.size), counts)
    slot_H = np.arange(query_H.size) - begin[line_H]
    fresh = np.full((touched.size, int(counts.max())), -np.inf, dtype=np.float32)
    places = np.full(fresh.shape, -1, dtype=np.int64)
    fresh[line_H, slot_H] = products_QN[query_H, column_H]
    places[line_H, slot_H] = column_H + first
    scores = np.concatenate([scores_Qk[touched], fresh], axis=1)
    numbers = np.concatenate([numbers_Qk[touched], places], axis=1)
    best = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]
    scores_Qk[touched] = np.take_along_axis(scores, best, axis=1)
    numbers_Qk[touched] = np.take_along_axis(numbers, best, axis=1)


def top_rows(
    blocks: Iterable[tuple[int, Floats]], queries_QK: Floats, k: int, *, impl: str = "auto"
) -> tuple[Numbers, Floats]:
    """The k rows with the largest products with each query, in no order.

    Args:
        blocks: the number of a block's first row, and its rows: float32 (N, K), contiguous.
        queries_QK: float32.
        k: at least 1.
        impl: "auto", "reference" or "cpu"; a named one runs or raises.

    Returns:
        int64 (Q, k), numbers of rows, -1 where there are fewer than k; and float32 (Q, k), their products, there minus
        infinity.

    Raises:
        ValueError: k is not positive, a block or the queries are not float32 of one width, or `impl` is unknown.
        RuntimeError: "cpu" cannot run here.
    """
    if k < 1:
        message = f"k must be positive, got {k}"
        raise ValueError(message)
    extension = select("top_rows", impl)
    if impl == "auto" and queries_QK.shape[-1] > _WIDEST:
        extension = None
    _check("queries", queries_QK, queries_QK.shape[-1])
    queries_QK = np.ascontiguousarray(queries_QK)
    numbers_Qk = np.full((len(queries_QK), k), -1, dtype=np.int64)
    scores_Qk = np.full(numbers_Qk.shape, -np.inf, dtype=np.float32)
    for first, rows_NK in blocks:
        _check("rows", rows_NK, queries_QK.shape[1])
        rows_NK = np.ascontiguousarray(rows_NK)
        if extension is None:
            _reference(rows_NK, first, queries_QK, scores_Qk, numbers_Qk)
        else:
            extension.top_rows(rows_NK, first, queries_QK, scores_Qk, numbers_Qk, cpu_level(), torch.get_num_threads())
    return numbers_Qk, scores_Qk


def _check(name: str, array: Floats, width: int) -> None:
    if array.dtype != np.float32 or array.ndim != 2 or array.shape[1] != width:
        message = f"{name} are {array.dtype} {array.shape}, want float32 (any, {width})"
        raise ValueError(message)
