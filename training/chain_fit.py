"""Fitting a nesting chain from Grams: every stage on the rows that it meets at inference.

The row so far is affine in the raw embeddings z, so its moments follow from theirs:

    x = z A + t          cov(x) = A^T cov(z) A          cov(x, y) = A^T cov(z)[:, y]

Stage k is then a regression of the new model's y on x and the leading eigenvectors of what it leaves: algorithm 3 of
Catrina, Bepler, Sledzieski, Singh, ICLR 2026. Their published script fits on the smaller model's raw embedding instead.

Shapes: Z all models' widths together, X width of the row so far, D of the new model, N dimensions a stage adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..engine.chain import Chain, Stage
from ..engine.errors import InputError
from .gram import Gram, GramPair
from .moments import Moments
from .regressor import REGRESSORS, RELATIVE_RANK, Regression, fit_regression, principal_axes

NAIVE = "naive"


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What a fit says of one stage. R² are pooled over dimensions.

    Attributes:
        model: the larger model.
        train_r2, held_out_r2: share of its embedding's variance that the row so far predicts; None in a naive stage.
        explained: share of the residual's variance in the new dimensions; in a naive stage of the concatenation's.
        held_out_explained: the same on held-out sequences.
        max_correlation: largest absolute correlation between an old and a new dimension, on held-out sequences; None in
            a naive stage.
        kept: eigenvectors of the inputs that the regression uses; None in a naive stage.
        dropped: new dimensions that are constant, since nothing is left to put into them.
        strength: of ridge; threshold: of PCR.
    """

    model: str
    train_r2: float | None
    held_out_r2: float | None
    explained: float
    held_out_explained: float
    max_correlation: float | None
    kept: int | None
    dropped: int
    strength: float | None = None
    threshold: float | None = None


@dataclass(kw_only=True, eq=False)
class _Row:
    """The row so far as a map of the raw embeddings: x = z A + t."""

    matrix_ZX: torch.Tensor
    shift_X: torch.Tensor

    def moments(self, gram: Gram, new: slice) -> Moments:
        """Of the row and of the columns `new` of the raw embeddings."""
        covariance_ZZ = gram.covariance_ZZ
        with_z_XZ = self.matrix_ZX.T @ covariance_ZZ
        return Moments(
            count=gram.count,
            mean_x_P=gram.mean_Z @ self.matrix_ZX + self.shift_X,
            mean_y_D=gram.mean_Z[new],
            xx_PP=with_z_XZ @ self.matrix_ZX,
            xy_PD=with_z_XZ[:, new],
            yy_DD=covariance_ZZ[new, new],
        )

    def append(self, stage: Stage, new: slice) -> None:
        """Adds the columns of a fitted stage."""
        assert stage.weight_XD is not None
        assert stage.bias_D is not None
        weight_XD, bias_D, mean_D, components_ND = (
            each.double() for each in (stage.weight_XD, stage.bias_D, stage.mean, stage.components)
        )
        from_row_XN = -weight_XD @ components_ND.T
        added_ZN = self.matrix_ZX @ from_row_XN
        added_ZN[new] += components_ND.T
        shift_N = self.shift_X @ from_row_XN - (bias_D + mean_D) @ components_ND.T
        self.matrix_ZX = torch.cat((self.matrix_ZX, added_ZN), dim=1)
        self.shift_X = torch.cat((self.shift_X, shift_N))

    def replace(self, stage: Stage, new: slice) -> None:
        """Puts a naive stage in the row's place."""
        mean_Z, components = stage.mean.double(), stage.components.double()
        X = self.shift_X.numel()
        matrix_ZD = self.matrix_ZX @ components[:, :X].T
        matrix_ZD[new] += components[:, X:].T
        self.shift_X = self.shift_X @ components[:, :X].T - mean_Z @ components.T
        self.matrix_ZX = matrix_ZD


def fit_chain(pair: GramPair, *, regressor: str = "pcr") -> Chain:
    """Fits a chain over all models of a pair, in their order; `pair.select` chooses a sub-chain.

    Args:
        pair: of one pass, or merged.
        regressor: "pcr" (the published threshold rule), "ridge" (strength by held-out R²), "linear", or "naive" for
            principal components of the concatenation, a baseline without prefixes.

    Returns:
        The chain, fp32, with a report of each stage.

    Raises:
        InputError: fewer residues than dimensions, no held-out sequence, or embeddings that do not vary.
        ValueError: `regressor` is unknown.
    """
    if regressor not in (*REGRESSORS, NAIVE):
        message = f"regressor is {regressor!r}; allowed: {', '.join((*REGRESSORS, NAIVE))}"
        raise ValueError(message)
    widths = [model.width for model in pair.models]
    _check_enough(pair, widths)
    total = sum(widths)
    matrix_ZX = torch.eye(total, dtype=torch.float64)[:, : widths[0]].clone()
    row = _Row(matrix_ZX=matrix_ZX, shift_X=torch.zeros(widths[0], dtype=torch.float64))
    stages, reports = [], []
    begin = widths[0]
    for model in pair.models[1:]:
        new = slice(begin, begin + model.width)
        begin += model.width
        train, held_out = (row.moments(gram, new) for gram in (pair.train, pair.held_out))
        if not float(train.yy_DD.trace()) > 0 or not float(train.xx_PP.trace()) > 0:
            message = f"the embeddings do not vary: nothing to fit for {model.name}"
            raise InputError(message)
        fit = _naive_stage if regressor == NAIVE else _nested_stage
        stage, report = fit(model.name, train, held_out, regressor)
        stages.append(stage)
        reports.append(report)
        if regressor == NAIVE:
            row.replace(stage, new)
        else:
            row.append(stage, new)
    return Chain(
        models=pair.models,
        stages=tuple(stages),
        regressor=regressor,
        data={
            **pair.data,
            "train_sequences": pair.sequences[0],
            "held_out_sequences": pair.sequences[1],
            "train_residues": pair.train.count,
            "held_out_residues": pair.held_out.count,
        },
        report=tuple(asdict(report) for report in reports),
    )


def _check_enough(pair: GramPair, widths: Sequence[int]) -> None:
    needed = sum(widths)
    if pair.train.count <= needed:
        message = (
            f"{pair.train.count} residues are too few to fit {needed} dimensions ({' + '.join(map(str, widths))}): "
            "add sequences"
        )
        raise InputError(message)
    if pair.held_out.count < 2:
        message = f"none of {sum(pair.sequences)} sequences is held out: one in ten is, by hash; add sequences"
        raise InputError(message)


def _top_axes(covariance_DD: torch.Tensor, count: int, of_DD: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """The leading `count` eigenvectors as rows, with the share of variance in them. Those whose variance is rounding
    beside that of `of_DD`, which the covariance is what is left of, become zero; how many these are comes last."""
    values_D, vectors_DD, _ = principal_axes(covariance_DD)
    kept = min(count, int((values_D > RELATIVE_RANK * torch.linalg.eigvalsh(of_DD)[-1]).sum()))
    axes_ND = vectors_DD[:, :count].T.clone()
    axes_ND[kept:] = 0
    total = float(values_D.sum())
    return axes_ND, float(values_D[:kept].sum()) / total if total > 0 else 0.0, count - kept


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    """As the chain's file stores it, so that later stages are fitted on what this one will give."""
    return tensor.to(torch.float32)


def _nested_stage(name: str, train: Moments, held_out: Moments, regressor: str) -> tuple[Stage, StageReport]:
    D, X = train.mean_y_D.numel(), train.mean_x_P.numel()
    regression = fit_regression(train, held_out, regressor)
    # The intercept belongs to the weight as it is stored; what fp32 cannot hold of it goes into the residual's mean. On
    # inputs of condition 1e4 these roundings would otherwise be the largest errors of all.
    weight_XD = _rounded(regression.weight_PD).double()
    bias_D = _rounded(train.mean_y_D - train.mean_x_P @ weight_XD).double()
    regression = dataclasses.replace(regression, weight_PD=weight_XD, bias_D=bias_D)
    residual_DD = train.residual(regression.weight_PD)
    axes_ND, explained, dropped = _top_axes(residual_DD, D - X, train.yy_DD)
    stage = Stage(
        weight_XD=_rounded(regression.weight_PD),
        bias_D=_rounded(regression.bias_D),
        mean=_rounded(train.residual_mean(regression.weight_PD, regression.bias_D)),
        components=_rounded(axes_ND),
    )
    return stage, StageReport(
        model=name,
        train_r2=train.r2(regression.weight_PD, regression.bias_D),
        held_out_r2=held_out.r2(regression.weight_PD, regression.bias_D),
        explained=explained,
        held_out_explained=_share(held_out.residual(regression.weight_PD), axes_ND),
        max_correlation=_max_correlation(held_out, regression, axes_ND),
        kept=regression.kept,
        dropped=dropped,
        strength=regression.strength,
        threshold=regression.threshold,
    )


def _naive_stage(name: str, train: Moments, held_out: Moments, regressor: str) -> tuple[Stage, StageReport]:
    joined = [
        torch.cat((torch.cat((m.xx_PP, m.xy_PD), dim=1), torch.cat((m.xy_PD.T, m.yy_DD), dim=1)))
        for m in (train, held_out)
    ]
    axes, explained, dropped = _top_axes(joined[0], train.mean_y_D.numel(), joined[0])
    stage = Stage(
        weight_XD=None,
        bias_D=None,
        mean=_rounded(torch.cat((train.mean_x_P, train.mean_y_D))),
        components=_rounded(axes),
    )
    return stage, StageReport(
        model=name,
        train_r2=None,
        held_out_r2=None,
        explained=explained,
        held_out_explained=_share(joined[1], axes),
        max_correlation=None,
        kept=None,
        dropped=dropped,
    )


def _share(covariance_DD: torch.Tensor, axes_ND: torch.Tensor) -> float:
    total = float(covariance_DD.trace())
    return float((axes_ND @ covariance_DD @ axes_ND.T).trace()) / total if total > 0 else 0.0


def _max_correlation(moments: Moments, regression: Regression, axes_ND: torch.Tensor) -> float:
    """Largest absolute correlation between a dimension of the row so far and a new one."""
    new_XN = (moments.xy_PD - moments.xx_PP @ regression.weight_PD) @ axes_ND.T
    old_X = moments.xx_PP.diagonal().clamp(min=0).sqrt()
    added_N = (axes_ND @ moments.residual(regression.weight_PD) @ axes_ND.T).diagonal().clamp(min=0).sqrt()
    scale_XN = old_X[:, None] * added_N[None]
    # A dimension that does not vary correlates with nothing.
    noise = 1e-9 * float(old_X.max() * added_N.max()) if new_XN.numel() else 0.0
    return float(torch.where(scale_XN > noise, new_XN / scale_XN, 0.0).abs().max()) if new_XN.numel() else 0.0
