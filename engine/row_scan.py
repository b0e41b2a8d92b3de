"""The rows with the largest scalar products, among all of them: blocks of a matrix product, and selection as it goes.

Where rows are short, selection costs more than the products. So most products are looked at once: the largest of each
group of `GROUP` is compared with the query's k-th best so far, and only groups that hold something better are looked
into. What is found there waits until as many rows have passed as before, and is merged then: after 1, 2, 4, ... blocks.

Shapes: Q queries, N rows of a block, K numbers of each, k wanted, G groups of a block, H hits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

ROWS_AT_ONCE = 4096
QUERIES_AT_ONCE = 128
GROUP = 32


class _Best:
    """The k rows with the largest products so far, for each of a few queries.

    Rows are -1 and products minus infinity where fewer have been seen.
    """

    def __init__(self, queries_QK: torch.Tensor, k: int) -> None:
        self.queries_QK = queries_QK
        self.rows_Qk = np.full((len(queries_QK), k), -1, dtype=np.int64)
        self.scores_Qk = np.full((len(queries_QK), k), -np.inf, dtype=np.float32)
        self._least_Q = np.full(len(queries_QK), -np.inf, dtype=np.float32)
        self._waiting: list[tuple[Numbers, Numbers, Floats]] = []

    @property
    def is_full(self) -> bool:
        """Whether k rows have been seen; all queries see the same."""
        return bool(self._least_Q[0] > -np.inf)

    def take_all(self, products_QN: Floats, first: int) -> None:
        """Merges all products of a block, whose rows are `first` and following."""
        numbers = np.broadcast_to(np.arange(first, first + products_QN.shape[1]), products_QN.shape)
        self._keep(np.arange(len(products_QN)), products_QN, numbers)

    def take_better(self, products_QN: Floats, first: int) -> None:
        """Puts aside those of a block that are above the query's k-th best of the last merge."""
        whole = products_QN.shape[1] // GROUP * GROUP
        if whole:
            self._put_aside(*self._look_into_groups(products_QN[:, :whole]), first)
        if whole < products_QN.shape[1]:
            rest_QN = products_QN[:, whole:]
            query_H, column_H = np.nonzero(rest_QN > self._least_Q[:, None])
            self._put_aside(query_H, column_H, rest_QN[query_H, column_H], first + whole)

    def _look_into_groups(self, products_QN: Floats) -> tuple[Numbers, Numbers, Floats]:
        count, width = products_QN.shape
        groups = width // GROUP
        # Group g holds the columns g, g + G, g + 2 G, ...: so maxima are taken of whole vectors.
        grouped_QEG = products_QN.reshape(count, GROUP, groups)
        largest_QG = torch.from_numpy(grouped_QEG).amax(dim=1).numpy()
        query_H, group_H = divmod(np.flatnonzero(largest_QG > self._least_Q[:, None]), groups)
        members_HE = grouped_QEG[query_H, :, group_H]
        hit, member = divmod(np.flatnonzero(members_HE > self._least_Q[query_H, None]), GROUP)
        return query_H[hit], member * groups + group_H[hit], members_HE[hit, member]

    def _put_aside(self, query_H: Numbers, column_H: Numbers, score_H: Floats, first: int) -> None:
        if query_H.size:
            self._waiting.append((query_H, column_H + first, score_H))

    def merge(self) -> None:
        """Brings in what was put aside."""
        if not self._waiting:
            return
        query_H, row_H, score_H = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        order = np.argsort(query_H, kind="stable")
        touched, begin, counts = np.unique(query_H[order], return_index=True, return_counts=True)
        # One line for each query that has hits, filled from the left.
        line_H = np.repeat(np.arange(touched.size), counts)
        slot_H = np.arange(order.size) - begin[line_H]
        scores = np.full((touched.size, int(counts.max())), -np.inf, dtype=np.float32)
        rows = np.full(scores.shape, -1, dtype=np.int64)
        scores[line_H, slot_H] = score_H[order]
        rows[line_H, slot_H] = row_H[order]
        self._keep(touched, scores, rows)

    def _keep(self, queries: Numbers, scores_QN: Floats, rows_QN: Numbers) -> None:
        k = self.rows_Qk.shape[1]
        scores = np.concatenate([self.scores_Qk[queries], scores_QN], axis=1)
        rows = np.concatenate([self.rows_Qk[queries], rows_QN], axis=1)
        best = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]
        self.scores_Qk[queries] = np.take_along_axis(scores, best, axis=1)
        self.rows_Qk[queries] = np.take_along_axis(rows, best, axis=1)
        self._least_Q[queries] = self.scores_Qk[queries].min(axis=1)


def top_rows(blocks: Iterable[tuple[int, Floats]], queries_QK: Floats, k: int) -> tuple[Numbers, Floats]:
    """The k rows with the largest products with each query, in no order.

    Args:
        blocks: each a block of rows, float32 (N, K), after the number of its first row.
        queries_QK: float32.
        k: at least 1.

    Returns:
        int64 (Q, k), numbers of rows, -1 where there are fewer than k; and float32 (Q, k), their products, there minus
        infinity.
    """
    queries = torch.from_numpy(np.ascontiguousarray(queries_QK, dtype=np.float32))
    parts = [_Best(queries[begin : begin + QUERIES_AT_ONCE], k) for begin in range(0, len(queries), QUERIES_AT_ONCE)]
    buffer = torch.empty(QUERIES_AT_ONCE * ROWS_AT_ONCE)
    passed = merged = 0
    for first, block_NK in blocks:
        for begin in range(0, len(block_NK), ROWS_AT_ONCE):
            rows = torch.from_numpy(block_NK[begin : begin + ROWS_AT_ONCE])
            passed += len(rows)
            for part in parts:
                count = len(part.queries_QK)
                products = buffer[: count * len(rows)].view(count, len(rows))
                torch.mm(part.queries_QK, rows.T, out=products)
                if part.is_full:
                    part.take_better(products.numpy(), first + begin)
                else:
                    part.take_all(products.numpy(), first + begin)
                if passed >= 2 * merged:
                    part.merge()
            merged = passed if passed >= 2 * merged else merged
    for part in parts:
        part.merge()
    if not parts:
        return np.empty((0, k), dtype=np.int64), np.empty((0, k), dtype=np.float32)
    return np.concatenate([part.rows_Qk for part in parts]), np.concatenate([part.scores_Qk for part in parts])
