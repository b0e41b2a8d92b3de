"""The learning rate over a run: it rises in a straight line, then falls."""

from __future__ import annotations

import math

SCHEDULES = ("linear", "cosine", "constant")


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, steps: int, schedule: str = "linear") -> float:
    """The rate of a step, from 0.

    Args:
        step: 0 to `steps`; at `steps`, where no step is taken any more, "linear" and "cosine" are at 0.
        peak: the rate after `warmup_steps`; a run that is shorter never gets there.
        warmup_steps: steps of the rise: the first has `peak / warmup_steps`.
        steps: of the whole run.
        schedule: what follows the rise: "linear" or "cosine" to zero, or "constant".

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        message = f"schedule is {schedule!r}; allowed: {', '.join(SCHEDULES)}"
        raise ValueError(message)
    rising = (step + 1) / max(1, warmup_steps)
    left = (steps - step) / max(1, steps - warmup_steps)
    if schedule == "constant":
        return peak * min(1.0, rising)
    if schedule == "cosine" and left < 1.0:
        left = 0.5 - 0.5 * math.cos(math.pi * max(0.0, left))
    return peak * min(1.0, rising, left)
