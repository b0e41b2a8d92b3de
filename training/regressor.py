"""Regressions of y on x from their moments: least squares, ridge, principal components. All have an intercept.

Everything happens in the eigenbasis of the inputs' covariance, found once. Eigenvalues below 1e-12 of the largest are
dropped: in fp64 they are rounding, and what stands there cannot be told from nothing.

Shapes: P inputs, D targets, K eigenvectors kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .moments import Moments

REGRESSORS = ("pcr", "ridge", "linear")

RELATIVE_RANK = 1e-12
_RIDGE_GRID: tuple[float, ...] = tuple(10.0 ** (exponent / 2) for exponent in range(-16, 3))
"""Strengths in units of the inputs' mean eigenvalue, 1e-8 to 10."""

_LEAST_VARIANCE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Regression:
    """A fitted map f(x) = x W + b.

    Attributes:
        weight_PD, bias_D: fp64.
        kept: eigenvectors of the inputs that it uses.
        strength: of ridge, in units of the inputs' mean eigenvalue; None for others.
        threshold: eigenvalue above which PCR keeps a component; None for others.
    """

    weight_PD: torch.Tensor
    bias_D: torch.Tensor
    kept: int
    strength: float | None = None
    threshold: float | None = None


def fix_signs(vectors_PK: torch.Tensor) -> torch.Tensor:
    """Turns each column so that its largest entry is positive."""
    if not vectors_PK.numel():
        return vectors_PK
    largest = vectors_PK.abs().argmax(dim=0, keepdim=True)
    signs = vectors_PK.gather(0, largest).sign()
    return vectors_PK * torch.where(signs == 0, 1.0, signs)


def principal_axes(covariance_PP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Eigenvalues (P,), largest first, none negative; eigenvectors (P, P), signs fixed; how many are not rounding."""
    values_P, vectors_PP = torch.linalg.eigh(covariance_PP)
    values_P, vectors_PP = values_P.flip(0).clamp(min=0), vectors_PP.flip(1)
    rank = int((values_P > RELATIVE_RANK * values_P[0]).sum())
    return values_P, fix_signs(vectors_PP), rank


def component_threshold(values_P: torch.Tensor, count: int) -> float:
    """Eigenvalue above which the published PCR keeps a principal component.

    The edge of the Marchenko-Pastur law, `noise (1 + sqrt(P / count))^2`, with the noise taken as the median of those
    eigenvalues that lie below that edge in units of their mean, or, if none does, of the last quarter.

    Args:
        values_P: eigenvalues of the inputs' covariance with Bessel's correction, largest first.
        count: rows.
    """
    P = values_P.numel()
    edge: float = (1 + math.sqrt(P / count)) ** 2
    below = values_P[values_P / values_P.mean() < edge]
    noise_set = below if below.numel() else values_P[-max(1, P // 4) :]
    return float(noise_set.quantile(0.5)) * edge


def _kept_components(values_P: torch.Tensor, count: int) -> tuple[int, float]:
    with_bessel_P = values_P * (count / (count - 1))
    threshold = component_threshold(with_bessel_P, count)
    kept = int((with_bessel_P > threshold).sum())
    if kept < 1:
        share_P = with_bessel_P.cumsum(0) / with_bessel_P.sum()
        kept = int(torch.searchsorted(share_P, _LEAST_VARIANCE)) + 1
    return kept, threshold


def fit_regression(train: Moments, held_out: Moments, kind: str) -> Regression:
    """Fits `kind`, one of `REGRESSORS`, on `train`; ridge takes the strength that explains most of `held_out`.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in REGRESSORS:
        message = f"regressor is {kind!r}; allowed: {', '.join(REGRESSORS)}"
        raise ValueError(message)
    values_P, vectors_PP, rank = principal_axes(train.xx_PP)
    strength = threshold = None
    kept = rank
    if kind == "pcr":
        kept, threshold = _kept_components(values_P, train.count)
        kept = min(kept, rank)
    values_K, vectors_PK = values_P[:kept], vectors_PP[:, :kept]
    turned_KD = vectors_PK.T @ train.xy_PD
    denominators_K = values_K
    if kind == "ridge":
        strength = _best_strength(held_out, train, values_K, vectors_PK, turned_KD)
        denominators_K = values_K + strength * float(values_P.mean())
    weight_PD = vectors_PK @ (turned_KD / denominators_K[:, None])
    return Regression(
        weight_PD=weight_PD,
        bias_D=train.mean_y_D - train.mean_x_P @ weight_PD,
        kept=kept,
        strength=strength,
        threshold=threshold,
    )


def _best_strength(
    held_out: Moments,
    train: Moments,
    values_K: torch.Tensor,
    vectors_PK: torch.Tensor,
    turned_KD: torch.Tensor,
) -> float:
    """The strength of the grid with the least squared error on `held_out`."""
    mean_value = float(values_K.sum()) / train.mean_x_P.numel()
    xx_KK = vectors_PK.T @ held_out.xx_PP @ vectors_PK
    xy_KD = vectors_PK.T @ held_out.xy_PD
    shift_K = (held_out.mean_x_P - train.mean_x_P) @ vectors_PK
    shift_D = held_out.mean_y_D - train.mean_y_D

    def error(strength: float) -> float:
        weight_KD = turned_KD / (values_K + strength * mean_value)[:, None]
        spread = (weight_KD * (xx_KK @ weight_KD - 2 * xy_KD)).sum()
        return float(spread + (shift_D - shift_K @ weight_KD).square().sum())

    return min(_RIDGE_GRID, key=error)
