"""Rotary positions: each pair of channels is turned by an angle that grows with the position.

    out[t, :, i]       = x[t, :, i] cos(a) - x[t, :, i + K/2] sin(a)
    out[t, :, i + K/2] = x[t, :, i + K/2] cos(a) + x[t, :, i] sin(a)        a = position[t] * 10000^(-2 i / K)

Source: Su et al. 2021, in the half-split form of the published ESM-2 code. Angles are computed in fp32 (fp64 for fp64
inputs), whatever the dtype of x. Shapes: T tokens, H heads, K head width (even).
"""

from __future__ import annotations

import torch

_BASE = 10000.0


def rotary_table(positions_T: torch.Tensor, head_width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for `apply_rotary`, each (T, 1, K / 2) of `dtype`, on the device of `positions_T`."""
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    # The published frequencies are fp32 numbers; fp64 runs start from the same ones.
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions_T.device) / head_width
    frequencies = 1.0 / _BASE**exponents
    angles = positions_T.to(accurate)[:, None, None] * frequencies.to(accurate)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns (T, H, K) by the angles of `rotary_table`; a new tensor of the same shape and dtype.

    Raises:
        ValueError: x has not three axes, K is not twice the width of the table, or T differs.
    """
    if x_THK.dim() != 3 or x_THK.shape[-1] != 2 * cos.shape[-1] or x_THK.shape[0] != cos.shape[0]:
        message = (
            f"x has shape {tuple(x_THK.shape)}, the table {tuple(cos.shape)}: expected (T, H, K) and (T, 1, K / 2)"
        )
        raise ValueError(message)
    first, second = x_THK.chunk(2, dim=-1)
    turned_first = torch.addcmul(first * cos, second, sin, value=-1)
    turned_second = torch.addcmul(second * cos, first, sin)
    return torch.cat((turned_first, turned_second), dim=-1)
