"""First and second moments of inputs x and targets y: what a regression needs, and how well one does on them.

Shapes: P inputs, D targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Means and covariances (over the count) of rows x and y, fp64.

    Attributes:
        count: rows.
        mean_x_P, mean_y_D: means.
        xx_PP, xy_PD, yy_DD: covariances.
    """

    count: int
    mean_x_P: torch.Tensor
    mean_y_D: torch.Tensor
    xx_PP: torch.Tensor
    xy_PD: torch.Tensor
    yy_DD: torch.Tensor

    def residual(self, weight_PD: torch.Tensor) -> torch.Tensor:
        """Covariance (D, D) of y - x W."""
        crossed_DD = weight_PD.T @ self.xy_PD
        return self.yy_DD - crossed_DD - crossed_DD.T + weight_PD.T @ self.xx_PP @ weight_PD

    def residual_mean(self, weight_PD: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
        """Mean (D,) of y - x W - b."""
        return self.mean_y_D - self.mean_x_P @ weight_PD - bias_D

    def r2(self, weight_PD: torch.Tensor, bias_D: torch.Tensor) -> float:
        """Share of the targets' variance, pooled over dimensions, that x W + b explains."""
        missed = self.residual(weight_PD).trace() + self.residual_mean(weight_PD, bias_D).square().sum()
        return 1 - float(missed / self.yy_DD.trace())
