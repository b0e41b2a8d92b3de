"""What a grid tries: cells, the runs that choose for each, and the runs that repeat what was chosen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from ..kernels.kd_options import WEIGHT_NORMALIZATIONS
from .distillation import DistillConfig
from .streams import LARGEST_SEED

KINDS = ("2x2",)


def name_of(student: str) -> str:
    """Of a preset, or of a folder without those above it."""
    return Path(student).expanduser().name


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of teaching.

    Attributes:
        name: of it, and of its folder.
        taught: by the teacher; else by labels alone.
        uncertainty, smooth, weight_normalization: of the loss.
    """

    name: str
    taught: bool = True
    uncertainty: bool = False
    smooth: bool = False
    weight_normalization: str = "count"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student to train."""

    student: str
    cell: Cell
    learning_rate: float
    warmup_steps: int
    seed: int

    @property
    def folder(self) -> Path:
        """Below the grid's `runs`."""
        settings = f"lr{self.learning_rate!r}-warmup{self.warmup_steps}-seed{self.seed}"
        return Path(name_of(self.student), self.cell.name, settings)

    def __str__(self) -> str:
        return (
            f"{name_of(self.student)}, {self.cell.name}, learning rate {self.learning_rate:g}, warm-up "
            f"{self.warmup_steps}, seed {self.seed}"
        )


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """What is tried.

    Attributes:
        kind: "2x2".
        students: presets or folders, as `DistillConfig.student`.
        learning_rates, warmups: each with each, for every cell.
        seeds: how many; the first, which also chooses, is that of `base.trainer`.
        weight_normalizations: of "count" and "weight".
        base: all that cells share; its student, learning rate, warm-up and switches of the loss do not count, and
            `held_out` is how many proteins are drawn, to choose by and to judge by together.

    Raises:
        InputError: a value is not allowed.
    """

    kind: str = "2x2"
    students: tuple[str, ...]
    learning_rates: tuple[float, ...]
    warmups: tuple[int, ...]
    seeds: int = 3
    weight_normalizations: tuple[str, ...] = ("count",)
    base: DistillConfig

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            message = f"no grid {self.kind!r}; there is {', '.join(KINDS)}"
            raise InputError(message)
        lists: dict[str, tuple[Any, ...]] = {
            "students": tuple(map(name_of, self.students)),
            "learning rates": self.learning_rates,
            "warm-ups": self.warmups,
            "weight normalizations": self.weight_normalizations,
        }
        for what, values in lists.items():
            if not values:
                message = f"a grid needs {what} to try, and there are none"
                raise InputError(message)
            if len(set(values)) < len(values):
                message = f"{what} are {', '.join(map(str, values))}: one is there twice"
                raise InputError(message)
        for normalization in self.weight_normalizations:
            if normalization not in WEIGHT_NORMALIZATIONS:
                allowed = ", ".join(WEIGHT_NORMALIZATIONS)
                message = f"weight_normalization is {normalization!r}; allowed: {allowed}"
                raise InputError(message)
        if not 1 <= self.seeds <= LARGEST_SEED - self.base.trainer.seed + 1:
            message = f"seeds is {self.seeds}, expected 1 or more, the last of them up to {LARGEST_SEED}"
            raise InputError(message)
        if self.base.init != "random":
            message = f"init is {self.base.init!r}: in a grid all begin alike, and labels alone have no layers to copy"
            raise InputError(message)
        for rate in self.learning_rates:
            for warmup in self.warmups:
                dataclasses.replace(self.base.trainer, learning_rate=rate, warmup_steps=warmup)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All, labels alone last."""
        weighted = tuple(
            Cell(
                name=f"{name}{'' if each == 'count' else f'-{each}'}",
                uncertainty=True,
                smooth=name == "both",
                weight_normalization=each,
            )
            for each in self.weight_normalizations
            for name in ("uncertainty", "both")
        )
        return (
            Cell(name="baseline"),
            Cell(name="smoothing", smooth=True),
            *weighted,
            Cell(name="labels", taught=False),
        )

    def selections(self, student: str) -> list[Run]:
        """The runs that choose: every cell's are the same but for the cell."""
        return [
            Run(student=student, cell=cell, learning_rate=rate, warmup_steps=warmup, seed=self.base.trainer.seed)
            for cell in self.cells
            for rate in self.learning_rates
            for warmup in self.warmups
        ]

    def repetitions(self, chosen: Run) -> list[Run]:
        """The chosen run, and the same with the other seeds."""
        return [dataclasses.replace(chosen, seed=chosen.seed + more) for more in range(self.seeds)]

    @property
    def runs(self) -> int:
        """How many students are trained in all."""
        cells = len(self.cells)
        return len(self.students) * cells * (len(self.learning_rates) * len(self.warmups) + self.seeds - 1)
