"""One training loop for all that is learnt here: pre-training, distilling, fine-tuning.

What is learnt is a `Task`: a model, sequences, and a loss. How is a `TrainerConfig`. A `Trainer` brings the two
together and takes optimiser steps; `training_folder` keeps what it does on disk.

    task = MaskedTask(encoder, corpus, seed=0)                               # or CausalTask, or one of your own
    trainer = Trainer(task, TrainerConfig(steps=1000, learning_rate=1e-3), device=torch.device("cpu"))
    trainer.run(after_step=lambda report: print(report.step, report.loss))

A run is a function of task and configuration: whatever is drawn follows from (seed, stream, place), so that a run that
goes on from a saved state ends as an uninterrupted one: bit for bit on a CPU with a fixed number of threads.

Shapes: B sequences.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn

from ..engine.denormals import no_denormals
from ..engine.errors import InputError
from ..kernels.kd_rows import NotFiniteLogitsError
from .distributed import ALONE, Processes
from .order import BatchOrder, Index, Portion, Position
from .schedule import SCHEDULES, learning_rate_at
from .streams import LARGEST_SEED, Stream, torch_seed

PRECISIONS = ("fp32", "bf16")
_NAMED_SEQUENCES = 8


class NotFiniteError(InputError):
    """What the model says, the loss, or the gradient is not finite: the settings cannot be used, the data can."""


@dataclass(frozen=True, eq=False)
class Loss:
    """The loss of one forward pass.

    Attributes:
        value: 0-d, the mean over `rows`; carries a graph.
        rows: how many rows (tokens, labels) it is the mean of. The portions of a step are weighed by it, so that
            accumulated portions give what one large batch would.
    """

    value: torch.Tensor
    rows: int


class Task(Protocol):
    """What is learnt, and from what.

    Attributes:
        model: holds the parameters that are trained, those with `requires_grad`. The trainer moves it to its device.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def lengths_B(self) -> Index:
        """int64 (B,), tokens that each sequence takes in a batch."""
        ...

    def loss(self, portion: Portion) -> Loss:
        """The loss of some sequences. What it draws must follow from the portion alone (see `streams`).

        Raises:
            InputError, ValueError: it cannot be worked out; the trainer adds step and sequences.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """All that decides what is learnt, as JSON: architecture, data's fingerprint, teacher, options.

        A state is resumed under an equal identity only.
        """
        ...

    def describe(self, index: int) -> str:
        """What messages call a sequence: its id, or its number."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a task is trained: AdamW, weight decay on matrices alone.

    Attributes:
        steps: optimiser steps.
        batch_tokens: most tokens in one forward pass.
        accumulate: forward passes whose gradients make one step, on each process.
        learning_rate: its peak, reached after `warmup_steps`.
        schedule: what follows: "linear" or "cosine" to zero, or "constant".
        weight_decay: on parameters of two or more dimensions, not on biases and norms.
        clip: largest norm of a step's gradient; a longer one is shortened.
        betas: of AdamW.
        seed: of order, crops, masks and dropout.
        precision: of matrix products: "fp32" or "bf16"; weights and optimiser stay fp32.

    Raises:
        InputError: a value is outside its range.
    """

    steps: int
    batch_tokens: int = 4096
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "linear"
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        whole, positive = ("steps", "batch_tokens", "accumulate"), ("learning_rate", "clip")
        for name in (*whole, "warmup_steps", "seed"):
            if type(getattr(self, name)) is not int:
                message = f"{name} must be a whole number, got {getattr(self, name)!r}"
                raise InputError(message)
        for name in (*whole, *positive):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                message = f"{name} must be positive, got {getattr(self, name)}"
                raise InputError(message)
        for name in ("warmup_steps", "weight_decay", "seed"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                message = f"{name} must not be negative, got {getattr(self, name)}"
                raise InputError(message)
        if self.seed > LARGEST_SEED:
            message = f"seed is {self.seed}, expected 0 to {LARGEST_SEED}"
            raise InputError(message)
        for name, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                message = f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                raise InputError(message)

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step, from 0."""
        return learning_rate_at(
            step, peak=self.learning_rate, warmup_steps=self.warmup_steps, steps=self.steps, schedule=self.schedule
        )


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What is known of a step that was taken.

    Attributes:
        step: from 1.
        epoch: of its last portion, from 0.
        loss: mean over the step's rows, on all processes.
        learning_rate: it was taken with.
        gradient_norm: before clipping.
        tokens: that this process ran.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int


class Trainer:
    """Takes the optimiser steps of one run.

    Args:
        task: what is learnt.
        config: how.
        device: where; the task's model is moved there.
        processes: who else trains the same weights; by default nobody.

    Attributes:
        step: steps taken.
        position: the next batch.
        extra: a caller's own place in the run, kept in the state beside the rest: tensors, numbers, strings, lists and
            dicts of these.

    Raises:
        InputError: there is no sequence, or no parameter to train.
    """

    def __init__(
        self, task: Task, config: TrainerConfig, *, device: torch.device, processes: Processes = ALONE
    ) -> None:
        if not len(task.lengths_B):
            message = "no sequence to train on"
            raise InputError(message)
        self.task, self.config, self.device = task, config, device
        task.model.to(device)
        self.processes = processes
        self._forward = processes.spread(task.model, self._loss_of)
        self.optimiser = _optimiser(task.model, config, device)
        self.order = BatchOrder(task.lengths_B, config.batch_tokens, seed=config.seed)
        self.step = 0
        self.position = Position()
        self.extra: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """All that decides the weights: the configuration's fields, and the task's identity."""
        return {**asdict(self.config), "processes": self.processes.world, **self.task.identity()}

    @property
    def batches_a_step(self) -> int:
        """Forward passes of one step on all processes together."""
        return self.config.accumulate * self.processes.world

    def run(self, *, until: int | None = None, after_step: Callable[[StepReport], None] = lambda report: None) -> None:
        """Trains from `self.step` until so many steps are taken, `config.steps` by default.

        Args:
            until: where to stop; a later call goes on from there as if nothing had been.
            after_step: called after each step. What it raises ends the run between two steps.

        Raises:
            NotFiniteError: loss or gradient is not finite; step and sequences are named. The weights are those before
                that step.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        walk = self.order.walk(self.position)
        while self.step < last:
            taken = list(islice(walk, self.batches_a_step))
            # What the caller did in between, such as judging the model, may have left it in evaluation mode.
            self.task.model.train()
            own = range(self.processes.rank, len(taken), self.processes.world)
            with no_denormals():
                report = self._step([Portion(*taken[part][:2], step=self.step, part=part) for part in own])
            self.step, self.position = self.step + 1, taken[-1][2]
            after_step(report)

    def _step(self, portions: list[Portion]) -> StepReport:
        rate = self.config.learning_rate_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        losses, rows = [], 0
        for portion in portions:
            last = portion is portions[-1]
            with contextlib.nullcontext() if last else self.processes.holding_back(self._forward):
                found: Loss = self._forward(portion)
                (found.value * found.rows).backward()  # type: ignore[no-untyped-call]
            losses.append(found.value.detach() * found.rows)
            rows += found.rows
        # One wait for the device a step: for the numbers that say whether the step may be taken.
        totals = self.processes.sum(torch.stack([torch.stack(losses).double().sum().cpu(), torch.tensor(float(rows))]))
        mean, all_rows = float(totals[0]) / max(1.0, float(totals[1])), max(1.0, float(totals[1]))
        norm = self._finish_gradients(all_rows)
        for name, value in (("loss", mean), ("gradient's norm", norm)):
            if not math.isfinite(value):
                broken = [portion for portion, loss in zip(portions, losses, strict=True) if not loss.isfinite()]
                problem = f"the {name} is {value}"
                refusal = self._refusal(problem, broken or portions)
                raise NotFiniteError(refusal.problem)
        self.optimiser.step()
        tokens = sum(int(self.task.lengths_B[portion.index_B].sum()) for portion in portions)
        return StepReport(
            step=self.step + 1,
            epoch=portions[-1].epoch,
            loss=mean,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=tokens,
        )

    def _loss_of(self, portion: Portion) -> Loss:
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with self._drawing(portion), autocast:
            try:
                return self.task.loss(portion)
            except ValueError as error:
                refusal = self._refusal(str(error), [portion])
                if isinstance(error, NotFiniteLogitsError) and error.logits == "student_logits":
                    refusal = NotFiniteError(refusal.problem)
                raise refusal from error

    @contextlib.contextmanager
    def _drawing(self, portion: Portion) -> Iterator[None]:
        """Lets modules draw numbers that follow from the place in the run, and leaves torch's own as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(torch_seed(self.config.seed, Stream.TORCH, portion.step, portion.part))
            yield

    def _finish_gradients(self, rows: float) -> float:
        """Turns sums over rows into means, clips them; gives the norm that they had before."""
        gradients = [each.grad for each in self.task.model.parameters() if each.grad is not None]
        if not gradients:
            return 0.0
        # What processes give is their mean, and theirs are sums.
        to_mean = self.processes.world / rows
        norm = float(self.processes.whole(nn.utils.get_total_norm(gradients))) * to_mean
        if math.isfinite(norm):
            torch._foreach_mul_(gradients, to_mean * min(1.0, self.config.clip / (norm + 1e-6)))
        return norm

    def _refusal(self, problem: str, portions: list[Portion]) -> InputError:
        numbers = [int(index) for portion in portions for index in portion.index_B]
        named = ", ".join(self.task.describe(index) for index in numbers[:_NAMED_SEQUENCES])
        more = f" and {len(numbers) - _NAMED_SEQUENCES} more" if len(numbers) > _NAMED_SEQUENCES else ""
        return InputError(
            f"{problem} at step {self.step}, in a batch of {named}{more}: try a learning rate below "
            f"{self.config.learning_rate:g}, or look at these sequences; the last checkpoint is as it was"
        )

    def state(self) -> dict[str, Any]:
        """Weights that are trained, buffers, optimiser and place: with `load_state` all that a run needs to go on.

        All processes call it together.
        """
        kept = self._kept()
        model, optimiser = self.processes.states(self.task.model, self.optimiser)
        return {
            "step": self.step,
            "position": asdict(self.position),
            "model": {name: tensor for name, tensor in model.items() if name in kept},
            "optimiser": optimiser,
            "extra": self.extra,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave.

        Raises:
            RuntimeError, KeyError, ValueError: it is another model's.
        """
        missing, unexpected = self.processes.load(self.task.model, self.optimiser, (state["model"], state["optimiser"]))
        if unexpected or (lost := self._kept() & set(missing)):
            message = f"not the tensors of this model: {', '.join(sorted(unexpected or lost)[:3])}"
            raise ValueError(message)
        self.step, self.position, self.extra = state["step"], Position(**state["position"]), state["extra"]

    def whole_model(self) -> nn.Module:
        """The model as it is now, with all its weights, in the first process at least; all processes call it."""
        return self.processes.whole_model(self.task.model)

    def _kept(self) -> set[str]:
        """Names of what training changes; what is frozen is the task's to load."""
        model = self.task.model
        return {name for name, each in model.named_parameters() if each.requires_grad} | {
            name for name, _ in model.named_buffers()
        }


def _optimiser(model: nn.Module, config: TrainerConfig, device: torch.device) -> torch.optim.AdamW:
    trained = [each for each in model.parameters() if each.requires_grad]
    if not trained:
        message = "the model has no parameter to train"
        raise InputError(message)
    groups = [
        {"params": [each for each in trained if each.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each in trained if each.dim() < 2], "weight_decay": 0.0},
    ]
    # One pass over each parameter instead of ten.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
