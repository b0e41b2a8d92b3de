"""How far a model's distributions are from its teacher's: KL(teacher || model) at temperature 1.

Shapes: N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..engine.errors import InputError
from .prediction import Predictor


def divergence(teacher_NV: torch.Tensor, model_NV: torch.Tensor) -> npt.NDArray[np.float64]:
    """sum over v of p log(p / q) in nats, p the teacher's and q the model's probabilities: fp64 (N,).

    What the teacher thinks impossible adds nothing; what the model alone does makes it infinite.

    Args:
        teacher_NV, model_NV: log-probabilities, fp32 at least.
    """
    model_NV = model_NV.to(teacher_NV.device)
    p_NV = teacher_NV.exp()
    terms_NV = torch.where(p_NV > 0, p_NV * (teacher_NV - model_NV), torch.zeros_like(p_NV))
    # Rounding of equal distributions may fall below what a divergence can be.
    return terms_NV.sum(dim=-1, dtype=torch.float64).clamp(min=0.0).cpu().numpy()


def check_vocabularies(teacher: Predictor, model: Predictor) -> None:
    """A divergence is between distributions over the same tokens, asked for in the same way.

    Raises:
        InputError: they are not.
    """
    if teacher.vocabulary != model.vocabulary:
        message = (
            f"{teacher.name} knows {len(teacher.vocabulary):,} tokens, {model.name} {len(model.vocabulary):,}: a "
            "teacher must have the model's own vocabulary"
        )
        if len(teacher.vocabulary) == len(model.vocabulary):
            message = f"{teacher.name} and {model.name} have {len(model.vocabulary):,} tokens each, but not the same"
        raise InputError(message)
    if teacher.task != model.task:
        message = f"{teacher.name} is asked for {teacher.task}, {model.name} for {model.task}: they cannot be compared"
        raise InputError(message)
