"""What probes compare: each model alone, a chain's rows, plain concatenations; and against whom each is held.

Shapes: N rows (proteins, variants or residues), D width of a model, W of a representation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..engine.chain import Chain

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Representation:
    """Features of one kind.

    Attributes:
        kind: "raw", "nested", "naive" or "concat".
        model: the largest model behind them.
        level: its place, from 0.
        chain: which of the chains they come from, None for "raw" and "concat".
        regressor: that chain's.
        rows_NW: fp64.
    """

    kind: str
    model: str
    level: int
    chain: int | None
    regressor: str | None
    rows_NW: Floats


def chain_rows(chain: Chain, embeddings: Sequence[Floats]) -> list[Floats]:
    """The chain's rows after each model, from embeddings of its models, pooled or not: fp64 (N, W) each."""
    rows = [torch.from_numpy(embeddings[0])]
    for stage, embedding in zip(chain.stages, embeddings[1:], strict=False):
        row, y = rows[-1], torch.from_numpy(embedding)
        mean, components = stage.mean.double(), stage.components.double()
        if stage.weight_XD is None or stage.bias_D is None:
            rows.append((torch.cat((row, y), dim=1) - mean) @ components.T)
        else:
            missed = y - row @ stage.weight_XD.double() - stage.bias_D.double() - mean
            rows.append(torch.cat((row, missed @ components.T), dim=1))
    return [row.numpy() for row in rows]


def representations(names: Sequence[str], raw: Sequence[Floats], chains: Sequence[Chain]) -> list[Representation]:
    """What is compared, from each model's embeddings, in an order that depends on the models and chains alone."""

    def one(kind: str, level: int, rows_NW: Floats, chain: int | None = None) -> Representation:
        regressor = None if chain is None else chains[chain].regressor
        return Representation(
            kind=kind, model=names[level], level=level, chain=chain, regressor=regressor, rows_NW=rows_NW
        )

    listed = [one("raw", level, features) for level, features in enumerate(raw)]
    for number, chain in enumerate(chains):
        kind = "naive" if chain.is_naive else "nested"
        listed += [one(kind, level, row, number) for level, row in enumerate(chain_rows(chain, raw)) if level]
    listed += [one("concat", level, np.concatenate(raw[: level + 1], axis=1)) for level in range(1, len(raw))]
    return listed


def rivals(listed: Sequence[Representation]) -> list[list[int]]:
    """For each representation, the places of those that it is held against: what the next smaller model gives in the
    same way, the largest model alone, and, for a nested row, naive rows and the concatenation of the same models."""
    out: list[list[int]] = []
    for each in listed:
        before = [
            place
            for place, other in enumerate(listed)
            if other.level == each.level - 1
            and ((other.kind, other.chain) == (each.kind, each.chain) or (other.kind == "raw" and other.level == 0))
        ]
        beside = {"nested": ("raw", "naive", "concat"), "naive": ("raw",), "concat": ("raw",)}.get(each.kind, ())
        out.append(
            before + [place for place, other in enumerate(listed) if other.level == each.level and other.kind in beside]
        )
    return out
