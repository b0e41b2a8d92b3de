"""Means and scatter of embeddings: all that fitting a chain needs, whatever the number of sequences.

For rows z, the raw embeddings of all models side by side, a Gram holds their count, their mean and

    S = sum (z - mean) (z - mean)^T

in fp64. Batches and shards are merged as Chan, Golub and LeVeque (1979) do, so that a large mean costs no digits. Two
of them, over nine tenths of the sequences and over the tenth held out by hash, make a `GramPair`: what is saved.

Shapes: R rows (residues), Z all models' widths together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..engine.atomic import write_atomically
from ..engine.chain import ChainModel
from ..engine.errors import InputError

SCHEMA_VERSION = 1
HELD_OUT_EVERY = 10


class Gram:
    """Count, mean and scatter of rows.

    Attributes:
        count: R, rows so far.
        mean_Z: fp64.
        scatter_ZZ: fp64, about the mean.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean_Z = torch.zeros(width, dtype=torch.float64)
        self.scatter_ZZ = torch.zeros((width, width), dtype=torch.float64)

    def add(self, rows_RZ: torch.Tensor) -> None:
        """Takes in rows of any floating dtype."""
        rows_RZ = rows_RZ.to("cpu", torch.float64)
        if not len(rows_RZ):
            return
        mean_Z = rows_RZ.mean(dim=0)
        centred_RZ = rows_RZ - mean_Z
        self.scatter_ZZ.addmm_(centred_RZ.T, centred_RZ)
        self._move(len(rows_RZ), mean_Z)

    def merge(self, other: Gram) -> None:
        """Takes in what another one has seen.

        Raises:
            ValueError: its width is another.
        """
        if other.mean_Z.shape != self.mean_Z.shape:
            message = f"widths {self.mean_Z.numel()} and {other.mean_Z.numel()} cannot be merged"
            raise ValueError(message)
        if other.count:
            self.scatter_ZZ += other.scatter_ZZ
            self._move(other.count, other.mean_Z)

    def _move(self, count: int, mean_Z: torch.Tensor) -> None:
        """The means' share of the scatter, and the new mean."""
        total = self.count + count
        shift_Z = mean_Z - self.mean_Z
        self.scatter_ZZ.addr_(shift_Z, shift_Z, alpha=self.count * count / total)
        self.mean_Z += shift_Z * (count / total)
        self.count = total

    def select(self, columns: torch.Tensor) -> Gram:
        """Of these columns alone, int64."""
        chosen = Gram(columns.numel())
        chosen.count = self.count
        chosen.mean_Z = self.mean_Z[columns]
        chosen.scatter_ZZ = self.scatter_ZZ[columns][:, columns]
        return chosen

    @property
    def covariance_ZZ(self) -> torch.Tensor:
        """The scatter over the count."""
        return self.scatter_ZZ / max(1, self.count)


@dataclass(kw_only=True)
class GramPair:
    """What one pass over sequences leaves.

    Attributes:
        models: whose embeddings lie side by side in the rows, in order.
        train, held_out: nine tenths of the sequences, and the tenth held out by hash.
        sequences: how many went into each, train first.
        data: where they came from, for people.
    """

    models: tuple[ChainModel, ...]
    train: Gram
    held_out: Gram
    sequences: tuple[int, int] = (0, 0)
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, models: Sequence[ChainModel]) -> GramPair:
        width = sum(model.width for model in models)
        return cls(models=tuple(models), train=Gram(width), held_out=Gram(width))

    def merge(self, other: GramPair) -> None:
        """Takes in another pass's, over other sequences with the same models.

        Raises:
            InputError: the models are others.
        """
        if other.models != self.models:
            ours, theirs = (", ".join(model.name for model in each.models) for each in (self, other))
            message = f"Grams of other models cannot be merged: {ours} here, {theirs} there"
            raise InputError(message)
        self.train.merge(other.train)
        self.held_out.merge(other.held_out)
        self.sequences = (self.sequences[0] + other.sequences[0], self.sequences[1] + other.sequences[1])

    def select(self, places: Sequence[int]) -> GramPair:
        """Of some of the models alone, by their places: any sub-chain can be fitted from one pass."""
        ends = [0]
        for model in self.models:
            ends.append(ends[-1] + model.width)
        columns = torch.cat([torch.arange(ends[place], ends[place + 1]) for place in places])
        return GramPair(
            models=tuple(self.models[place] for place in places),
            train=self.train.select(columns),
            held_out=self.held_out.select(columns),
            sequences=self.sequences,
            data=self.data,
        )

    def save(self, path: Path) -> None:
        """Writes one safetensors file, fp64."""
        tensors = {
            f"{name}.{part}": tensor
            for name, gram in (("train", self.train), ("held_out", self.held_out))
            for part, tensor in (("mean", gram.mean_Z), ("scatter", gram.scatter_ZZ))
        }
        facts = {
            "models": [asdict(model) for model in self.models],
            "counts": [self.train.count, self.held_out.count],
            "sequences": self.sequences,
            "data": self.data,
        }
        metadata = {"schema_version": str(SCHEMA_VERSION), "gram": json.dumps(facts)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> GramPair:
        """Reads what `save` wrote.

        Raises:
            InputError: the file is missing, damaged, no Gram, or of a schema version that this release does not know.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            message = f"not a readable Gram file ({error})"
            raise InputError(message, file=path) from error
        if metadata.get("schema_version") != str(SCHEMA_VERSION) or "gram" not in metadata:
            message = f"is no Gram file of schema version {SCHEMA_VERSION}"
            raise InputError(message, file=path)
        try:
            facts = json.loads(metadata["gram"])
            pair = cls.empty([ChainModel(**model) for model in facts["models"]])
            for gram, name, count in zip(
                (pair.train, pair.held_out), ("train", "held_out"), facts["counts"], strict=True
            ):
                gram.count = count
                gram.mean_Z.copy_(tensors[f"{name}.mean"])
                gram.scatter_ZZ.copy_(tensors[f"{name}.scatter"])
            pair.sequences = (facts["sequences"][0], facts["sequences"][1])
            pair.data = facts["data"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            message = f"not a readable Gram file: {type(error).__name__} {error}"
            raise InputError(message, file=path) from error
        return pair
