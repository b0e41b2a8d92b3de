"""Fitting a ridge head on a whole mutational scan, from the features that its probe has made.

Shapes: N variants, D width of a model, W of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..engine.chain import Chain, ChainModel
from ..engine.device import precision_name
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.ridge_head import RidgeHead, wild_type_hash
from .probe import ProbeResult
from .representation import chain_rows
from .ridge_probe import FOLDS, fitted, split

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadPlan:
    """What a head is to read.

    Attributes:
        pooling: "mean" or "site".
        chain: whose nested row; None for the largest model's raw embedding.
    """

    pooling: str
    chain: Chain | None

    @classmethod
    def of(
        cls, models: int, chains: Sequence[Chain], *, features: str | None = None, pooling: str | None = None
    ) -> HeadPlan:
        """What a probe of so many models and these chains can save.

        Args:
            models: how many the probe runs.
            chains: nested or naive; the first nested one counts.
            features: "nested" or "raw"; by default nested where there is a nested chain and a second model.
            pooling: "mean" or "site"; by default site.

        Raises:
            InputError: nested features are asked for and there are none.
        """
        nested = [chain for chain in chains if not chain.is_naive]
        if features == "nested" and not nested:
            message = "nested features take a chain that is not naive; none is given"
            raise InputError(message)
        if features == "nested" and models < 2:
            message = "nested features take two models of the chain or more, got 1: its own embedding is `raw`"
            raise InputError(message)
        use_chain = bool(nested) and models > 1 and features != "raw"
        return cls(pooling=pooling or "site", chain=nested[0] if use_chain else None)

    @property
    def features(self) -> str:
        """How a probe calls them: "raw" or "nested"."""
        return "raw" if self.chain is None else "nested"

    def check_lengths(self, encoders: Sequence[Encoder], residues: int) -> None:
        """Checks that the probe's features are those that a chain makes when it runs as one.

        A probe runs each model by itself, in windows of that model's length; a chain runs all in the shortest's.

        Raises:
            InputError: the protein is longer than the shortest of a chain's lengths, and another model's is longer.
        """
        if self.chain is None or residues <= self.chain.max_residues:
            return
        for encoder in encoders:
            if encoder.config.max_residues != self.chain.max_residues:
                message = (
                    f"a nested head cannot be saved for {residues} residues: the chain runs windows of "
                    f"{self.chain.max_residues}, {encoder.name} in its probe those of {encoder.config.max_residues}; "
                    "--region shortens the protein, --save-features raw reads one model"
                )
                raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class ScanOrigin:
    """Where variants came from.

    Attributes:
        file, column: of the scores.
        wild_type: the whole protein's residues.
        region: first and last residue that the models see, from 1; None for all.
    """

    file: str
    column: str
    wild_type: str
    region: tuple[int, int] | None = None


def check_out(path: Path) -> None:
    """What can be known of a file before it is written.

    Raises:
        InputError: it is a folder, or its folder is not there.
    """
    if path.is_dir():
        message = "is a folder; --save names a file"
        raise InputError(message, file=path)
    if not path.absolute().parent.is_dir():
        message = "its folder is not there"
        raise InputError(message, file=path)


def fit_head(
    plan: HeadPlan,
    encoders: Sequence[Encoder],
    scores: Sequence[float],
    features: Sequence[dict[str, Floats]],
    results: Sequence[ProbeResult],
    origin: ScanOrigin,
    *,
    seed: int = 0,
) -> RidgeHead:
    """Fits a head on all variants of a scan. The strength is the one with the least squared error over the probe's
    folds, each left out in turn.

    Args:
        plan: what the head reads.
        encoders: the probe's, smallest first.
        scores: N, of the variants.
        features: what `scan_features` gave.
        results: what `probe` made of these; the head's own row is kept in its `data`.
        origin: of the variants.
        seed: of the folds, the probe's.
    """
    level = len(encoders) - 1
    if plan.chain is None:
        rows_NW = features[level][plan.pooling]
        read = encoders[level:]
    else:
        rows_NW = chain_rows(plan.chain, [each[plan.pooling] for each in features])[-1]
        read = encoders
    weight_W, bias, strength = fitted(rows_NW, np.array(scores, dtype=np.float64), split(len(scores), seed=seed))
    judged = next(
        each
        for each in results
        if (each.representation, each.pooling, each.subset) == (plan.features, plan.pooling, "all")
        and each.model == encoders[level].name
        and each.width == rows_NW.shape[1]
    )
    return RidgeHead(
        weight_W=weight_W,
        bias=bias,
        pooling=plan.pooling,
        models=tuple(_described(encoder) for encoder in read),
        strength=strength,
        chain_fingerprint=None if plan.chain is None else plan.chain.fingerprint,
        data={
            "scan": origin.file,
            "column": origin.column,
            "variants": len(scores),
            "wild_type": {"residues": len(origin.wild_type), "hash": wild_type_hash(origin.wild_type)},
            "region": None if origin.region is None else list(origin.region),
            "folds": FOLDS,
            "seed": seed,
            "precision": precision_name(encoders[level].product_dtype),
            "spearman": judged.spearman,
            "low": judged.low,
            "high": judged.high,
        },
    )


def _described(encoder: Encoder) -> ChainModel:
    return ChainModel(
        name=encoder.name,
        width=encoder.dim,
        max_residues=encoder.config.max_residues,
        fingerprint=encoder.fingerprint,
    )
