"""Nearest neighbours among a store's proteins: a coarse pass over short keys, re-ranked at full width.

With u a row over its norm (metric "cosine"; the row itself for "dot"), m the mean of all u and q a query likewise,

    q . u = (q - m) . (u - m)  +  m . (u - m)  +  q . m

The last term is the query's alone and ranks nothing. The second is one number a row. The first is a product of centred
rows, of which the prefix tells nearly all, and a few principal axes A of the prefix nearly all of that:

    key of a row    [A^T (u - m)[:P] | m . (u - m)]        key of a query    [A^T (q - m)[:P] | 1]

P is the smallest of the nested widths whose columns hold 95 % of the variance, for a store without a chain the whole
row. So the coarse pass multiplies keys of 24 numbers, where nano's rows have 256, over all rows: there is no graph that
must be built, nor a neighbour that a walk through one can miss. The best few dozen by keys are read at full width and
ranked by their true similarity.

Shapes: Q queries, N rows, D their width, P of the prefix, K numbers of a key, C candidates, k neighbours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..kernels.top_rows import Floats, Numbers, top_rows
from .atomic import write_atomically
from .embeddings import Embeddings
from .errors import InputError
from .schema_version import check_schema_version
from .shard_file import read_tensors

SCHEMA_VERSION = 1
METRICS = ("cosine", "dot")

EXPLAINED = 0.995
"""Of the prefix's variance, what the axes of a key keep. Of nano's prefix 23 axes of 128 do."""

HELD = 0.95
"""Of a row's variance, what its prefix holds: a chain whose larger models add more than the rest has a wider one."""

_KEY_MULTIPLE = 8
# Mean and axes are those of so many rows at most, spread over the store: any would be right, and some are as good.
_SAMPLED_BLOCKS = 4
_ROWS_AT_ONCE = 8192
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Hits:
    """Neighbours of Q queries, the most similar first; of equally similar rows the first in the store comes first.

    Attributes:
        rows_Qk: int64, numbers of the rows in the store.
        similarities_Qk: float32.
    """

    rows_Qk: Numbers
    similarities_Qk: Floats

    def first(self, queries: int) -> Hits:
        """Those of the first so many queries."""
        return Hits(self.rows_Qk[:queries], self.similarities_Qk[:queries])


@dataclass(frozen=True, eq=False)
class Keys:
    """What the coarse pass compares.

    Attributes:
        mean_D: m.
        axes_PA: A, orthonormal columns.
        rows_NK: the rows' keys, K = A + 1; may be mapped from a file.
    """

    mean_D: Floats
    axes_PA: Floats
    rows_NK: Floats

    @property
    def prefix(self) -> int:
        """P."""
        return len(self.axes_PA)

    def of_queries(self, queries_QD: Floats) -> Floats:
        """The queries' keys, (Q, K)."""
        along = (queries_QD[:, : self.prefix] - self.mean_D[: self.prefix]) @ self.axes_PA
        return np.concatenate([along, np.ones((len(along), 1), np.float32)], axis=1)


class Searcher:
    """Finds rows of a store.

    Args:
        embeddings: a finished store of one row a protein.
        folder: where it lies.
        dims: compare so many of a row's first dimensions: one of the store's nested widths; by default all.
        metric: "cosine", or "dot" for the scalar product.

    Attributes:
        keys: of `build` or `load`, else None.

    Raises:
        InputError: the store holds residues or nothing, `dims` is none of its widths, or `metric` is unknown.
    """

    def __init__(
        self, embeddings: Embeddings, folder: Path, *, dims: int | None = None, metric: str = "cosine"
    ) -> None:
        settings = embeddings.run["settings"]
        widths: list[int] = settings.get("dims", [settings["width"]])
        self.dims = widths[-1] if dims is None else dims
        if metric not in METRICS:
            message = f"metric is {metric!r}; allowed: {', '.join(METRICS)}"
            raise InputError(message)
        if embeddings.offsets is not None:
            message = "holds a row for each residue (--pool residue); a search takes a store of one row a protein"
            raise InputError(message, file=folder)
        if self.dims not in widths:
            message = f"dims is {self.dims}, but rows are nested at {', '.join(map(str, widths))}"
            raise InputError(message, file=folder)
        if not len(embeddings):
            message = "holds no proteins"
            raise InputError(message, file=folder)
        self.metric = metric
        self._widths = [width for width in widths if width <= self.dims]
        self.keys: Keys | None = None
        self._array = embeddings.array
        self._folder = folder
        self._fingerprint = _fingerprint(embeddings.run)

    def __len__(self) -> int:
        return len(self._array)

    @property
    def path(self) -> Path:
        """Where `save` puts the keys."""
        return self._folder / f"search-{self.metric}-{self.dims}.safetensors"

    def build(self) -> None:
        """Makes the keys: mean and axes of a sample of rows, then one pass over the store."""
        mean_D, scatter_DD = self._moments()
        held_D = np.cumsum(np.diag(scatter_DD))
        prefix = next(width for width in self._widths if held_D[width - 1] >= HELD * held_D[-1])
        axes_PA = _leading_axes(scatter_DD[:prefix, :prefix])
        keys_NK = np.empty((len(self), axes_PA.shape[1] + 1), dtype=np.float32)
        for first, block_ND in self._blocks():
            centred_ND = block_ND - mean_D
            into = keys_NK[first : first + len(block_ND)]
            into[:, :-1] = centred_ND[:, :prefix] @ axes_PA
            into[:, -1] = centred_ND @ mean_D
        self.keys = Keys(mean_D, axes_PA, keys_NK)

    def save(self) -> Path:
        """Writes the keys beside the store, whole or not at all, for `load` to find."""
        assert self.keys is not None
        tensors = {"mean": self.keys.mean_D, "axes": self.keys.axes_PA, "keys": self.keys.rows_NK}
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        metadata = {
            "schema_version": str(SCHEMA_VERSION),
            "store": self._fingerprint,
            "sha256": _sha256(self.keys),
        }
        write_atomically(self.path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))
        return self.path

    def load(self) -> bool:
        """Maps the keys that `save` wrote; False where there are none, or where the store is no longer theirs.

        Raises:
            InputError: the file is damaged, or of a schema version that this release does not know.
        """
        if not self.path.exists():
            return False
        try:
            with safe_open(self.path, framework="np") as file:
                metadata: dict[str, str] = file.metadata() or {}
                check_schema_version(metadata.get("schema_version"), str(SCHEMA_VERSION), file=self.path)
                if metadata.get("store") != self._fingerprint:
                    return False
                mean_D, axes_PA = file.get_tensor("mean"), file.get_tensor("axes")
            keys = Keys(mean_D, axes_PA, read_tensors(self.path)["keys"].view())
        except (SafetensorError, OSError) as error:
            message = f"not a readable index ({error}); delete it, and it is made again"
            raise InputError(message, file=self.path) from error
        if _sha256(keys) != metadata.get("sha256"):
            message = "not a readable index (its SHA-256 is another one); delete it, and it is made again"
            raise InputError(message, file=self.path)
        self.keys = keys
        return True

    def search(self, queries_QD: npt.NDArray[Any], k: int, *, candidates: int | None = None) -> Hits:
        """The k nearest rows of each query: by keys, then re-ranked.

        Args:
            queries_QD: embedded as the store was; D of the store, or `dims`.
            k: neighbours.
            candidates: how many rows of each query are re-ranked; by default as `default_candidates` says.

        Raises:
            InputError: k is not between 1 and the store's rows.
        """
        self.check_k(k)
        if self.keys is None:
            self.build()
        assert self.keys is not None
        queries_QD = self._unit(queries_QD)
        few = min(len(self), max(k, default_candidates(k) if candidates is None else candidates))
        rows_NK = self.keys.rows_NK
        spans = ((first, rows_NK[first : first + _ROWS_AT_ONCE]) for first in range(0, len(rows_NK), _ROWS_AT_ONCE))
        rows_QC, _ = top_rows(
            ((first, np.asarray(block)) for first, block in spans), self.keys.of_queries(queries_QD), few
        )
        return self._rank(rows_QC, queries_QD, k)

    def search_exactly(self, queries_QD: npt.NDArray[Any], k: int) -> Hits:
        """The k nearest rows of each query, by comparing all of every row: one pass over the store.

        Raises:
            InputError: k is not between 1 and the store's rows.
        """
        self.check_k(k)
        queries_QD = self._unit(queries_QD)
        # A few more, since products of blocks differ from those that rank in the last bits.
        rows_QC, _ = top_rows(self._blocks(), queries_QD, min(len(self), k + 8))
        return self._rank(rows_QC, queries_QD, k)

    def check_k(self, k: int) -> None:
        """Raises InputError unless the store has k rows."""
        if not 1 <= k <= len(self):
            message = f"k is {k}, but the store holds {len(self)} proteins"
            raise InputError(message, file=self._folder)

    def _blocks(self) -> Iterator[tuple[int, Floats]]:
        for first in range(0, len(self), _ROWS_AT_ONCE):
            yield first, self._unit(self._array[first : first + _ROWS_AT_ONCE])

    def _unit(self, rows_ND: npt.NDArray[Any]) -> Floats:
        """Cut to `dims`, in fp32, and for cosines on their norm; a row of zeros stays one."""
        cut: Floats = np.ascontiguousarray(rows_ND[:, : self.dims], dtype=np.float32)
        if self.metric == "dot":
            return cut
        return cut / _norms(np.einsum("nd,nd->n", cut, cut))[:, None]

    def _moments(self) -> tuple[Floats, npt.NDArray[np.float64]]:
        """Mean, (D,), and centred scatter, (D, D), of unit rows; blocks are added up in fp64."""
        firsts = range(0, len(self), _ROWS_AT_ONCE)
        some = firsts[:: -(-len(firsts) // _SAMPLED_BLOCKS)]
        sum_D, square_DD, count = np.zeros(self.dims), np.zeros((self.dims, self.dims)), 0
        shift_D: Floats | None = None
        for first in some:
            block_ND = self._unit(self._array[first : first + _ROWS_AT_ONCE])
            # Products of rows that are nearly alike would lose their differences in fp32.
            shift_D = block_ND.mean(axis=0) if shift_D is None else shift_D
            block_ND = block_ND - shift_D
            sum_D += block_ND.sum(axis=0, dtype=np.float64)
            square_DD += block_ND.T @ block_ND
            count += len(block_ND)
        assert shift_D is not None
        mean_D = sum_D / count
        return (mean_D + shift_D).astype(np.float32), square_DD / count - np.outer(mean_D, mean_D)

    def _rank(self, rows_QC: Numbers, queries_QD: Floats, k: int) -> Hits:
        similarity_QC = np.empty(rows_QC.shape, dtype=np.float32)
        for begin in range(0, len(rows_QC), _QUERIES_AT_ONCE):
            rows = rows_QC[begin : begin + _QUERIES_AT_ONCE]
            found = self._array[rows][:, :, : self.dims].astype(np.float32, copy=False)
            similarity = np.einsum("qcd,qd->qc", found, queries_QD[begin : begin + _QUERIES_AT_ONCE])
            if self.metric == "cosine":
                similarity /= _norms(np.einsum("qcd,qcd->qc", found, found))
            similarity_QC[begin : begin + len(rows)] = similarity
        if self.metric == "cosine":
            np.clip(similarity_QC, -1, 1, out=similarity_QC)
        order = np.lexsort((rows_QC, -similarity_QC), axis=1)[:, :k]
        return Hits(np.take_along_axis(rows_QC, order, axis=1), np.take_along_axis(similarity_QC, order, axis=1))


def default_candidates(k: int) -> int:
    """How many rows are re-ranked for k neighbours."""
    return max(32, 3 * k)


def recall(found: Hits, exact: Hits, *, tolerance: float = 1e-6) -> float:
    """Share of `found` that is as similar as the k-th of `exact`, whichever of equally similar rows was taken."""
    least_Q1 = exact.similarities_Qk[:, -1:] - tolerance
    return float((found.similarities_Qk >= least_Q1).mean())


def _norms(squares: Floats) -> Floats:
    """Their roots, and 1 for a row of zeros, which so stays one."""
    norms: Floats = np.sqrt(squares)
    return np.where(norms > 0, norms, np.float32(1))


def _leading_axes(scatter_PP: npt.NDArray[np.float64]) -> Floats:
    """The fewest principal axes that keep `EXPLAINED` of the variance, and as many as make keys a multiple of 8."""
    variance_P, axes_PP = np.linalg.eigh(scatter_PP)
    kept_P = np.cumsum(variance_P[::-1].clip(min=0))
    wanted = 1 + int(np.searchsorted(kept_P, EXPLAINED * kept_P[-1]))
    padded = -(-(wanted + 1) // _KEY_MULTIPLE) * _KEY_MULTIPLE - 1
    return np.ascontiguousarray(axes_PP[:, ::-1][:, :padded], dtype=np.float32)


def _sha256(keys: Keys) -> str:
    """Of all their numbers."""
    digest = hashlib.sha256()
    for tensor in (keys.mean_D, keys.axes_PA, keys.rows_NK):
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()


def _fingerprint(run: dict[str, Any]) -> str:
    """Hash of what decides a store's rows."""
    facts = json.dumps([run["settings"], run["shards"]], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
