"""The training loop on toys: AdamW written out, accumulation, dropout, places gone on from, numbers that are none.

Shapes: B sequences.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError
from protnest.training.masked_task import MaskedTask
from protnest.training.order import Portion, Position
from protnest.training.teacher import LiveTeacher
from protnest.training.trainer import Loss, StepReport, Trainer, TrainerConfig

from support.learning import CPU, LinearTask, corpus_of, proteins_to_train, toy_encoder


def _config(**changes: Any) -> TrainerConfig:
    settings: dict[str, Any] = {"steps": 8, "batch_tokens": 20, "learning_rate": 0.05, "warmup_steps": 2} | changes
    return TrainerConfig(**settings)


def _trained(task: LinearTask, **changes: Any) -> tuple[Trainer, list[StepReport]]:
    trainer, reports = Trainer(task, _config(**changes), device=CPU), list[StepReport]()
    trainer.run(after_step=reports.append)
    return trainer, reports


def _weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in trainer.task.model.parameters()])


def test_steps_written_out() -> None:
    """The mean over rows, gradients clipped to 1, decay of matrices alone, AdamW, the rate of the schedule."""
    task, config = LinearTask(), _config(weight_decay=0.3, accumulate=2)
    reference = copy.deepcopy(task)
    trainer = Trainer(task, config, device=CPU)
    reports: list[StepReport] = []
    trainer.run(after_step=reports.append)

    ours = list(reference.model.parameters())
    moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in ours]
    batches = itertools.islice(trainer.order.walk(Position()), 16)
    norms = []
    for step, pair in enumerate(itertools.batched(batches, 2) if hasattr(itertools, "batched") else _pairs(batches)):
        index_B = np.concatenate([each[0] for each in pair])
        loss = reference.loss(Portion(index_B, 0, step, 0)).value
        assert reports[step].loss == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, ours)
        norms.append(math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients)))
        assert reports[step].gradient_norm == pytest.approx(norms[-1], rel=1e-5)
        rate = config.learning_rate_at(step)
        assert reports[step].learning_rate == rate
        assert reports[step].tokens == reference.lengths_B[index_B].sum()
        with torch.no_grad():
            for parameter, gradient, (first, second) in zip(ours, gradients, moments, strict=True):
                clipped = gradient / max(1.0, norms[-1])
                first += 0.1 * (clipped - first)
                second += 0.02 * (clipped**2 - second)
                if parameter.dim() == 2:
                    parameter.mul_(1 - rate * 0.3)
                spread = (second / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8
                parameter.sub_(rate * first / (1 - 0.9 ** (step + 1)) / spread)
    assert max(norms) > 1.5, "nothing was clipped"
    for trained, parameter in zip(task.model.parameters(), ours, strict=True):
        torch.testing.assert_close(trained.detach(), parameter.detach(), rtol=0, atol=1e-5)


def _pairs(batches: Any) -> Any:
    while pair := list(itertools.islice(batches, 2)):
        yield pair


def test_the_step_of_a_report_counts_from_one_and_names_the_epoch() -> None:
    trainer, reports = _trained(LinearTask())
    assert [report.step for report in reports] == list(range(1, 9))
    epochs = [report.epoch for report in reports]
    assert epochs == sorted(epochs)
    assert epochs[-1] == trainer.position.epoch >= 1


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_portions_are_one_large_batch(accumulate: int) -> None:
    """Also where portions have different numbers of rows: a mean of means would not do."""
    parts, whole = LinearTask(), LinearTask()
    trainer, _ = _trained(parts, accumulate=accumulate)
    beside = Trainer(whole, _config(), device=CPU)
    beside.order.batches = (
        lambda epoch: [  # type: ignore[method-assign]
            np.concatenate([portion.index_B for portion in parts.seen[begin : begin + accumulate]])
            for begin in range(0, len(parts.seen), accumulate)
        ]
    )
    beside.run()
    rows = [int(whole.lengths_B[portion.index_B].sum()) for portion in parts.seen]
    assert len(set(rows)) > 1
    torch.testing.assert_close(_weights(trainer), _weights(beside), rtol=1e-5, atol=1e-6)


def test_portions_tell_step_part_and_epoch() -> None:
    task = LinearTask()
    _trained(task, accumulate=2, steps=3)
    assert [(portion.step, portion.part) for portion in task.seen] == [(s, p) for s in range(3) for p in range(2)]


def test_bf16_reaches_the_products_and_not_the_weights() -> None:
    first, second = (_trained(LinearTask(), precision=precision)[0] for precision in ("fp32", "bf16"))
    assert _weights(second).dtype == torch.float32
    assert not torch.equal(_weights(first), _weights(second))


# Going on


def _same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _same(one[key], other[key])
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            _same(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_going_on_from_a_state_is_as_if_uninterrupted(stop: int) -> None:
    """With dropout, whose numbers must follow from the place and not from what was drawn before."""
    whole, _ = _trained(LinearTask(dropout=0.5), accumulate=2)
    first = Trainer(LinearTask(dropout=0.5), _config(accumulate=2), device=CPU)
    first.extra["best"] = 3.5
    first.run(until=stop)
    state = copy.deepcopy(first.state())
    torch.manual_seed(99)
    second = Trainer(LinearTask(dropout=0.5, seed=0), _config(accumulate=2), device=CPU)
    second.load_state(state)
    assert (second.step, second.extra) == (stop, {"best": 3.5})
    second.run()
    second.extra = {}
    _same(second.state(), whole.state())


def test_dropout_follows_the_seed_and_leaves_torch_s_numbers_alone() -> None:
    task = LinearTask(dropout=0.5)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = _trained(task)
    assert torch.equal(torch.rand(3), expected)
    other, _ = _trained(LinearTask(dropout=0.5), seed=1)
    plain, _ = _trained(LinearTask())
    assert not torch.equal(_weights(first), _weights(plain))
    assert not torch.equal(_weights(first), _weights(other))


def test_each_step_drops_something_else() -> None:
    task = LinearTask(2, dropout=0.5)
    shown: list[torch.Tensor] = []
    task.model[0].register_forward_hook(lambda _, given, out: shown.append(out == 0))
    _trained(task, batch_tokens=100, accumulate=2, steps=2)
    assert len(shown) == 4
    assert len({tuple(sorted(each.flatten().tolist())) + tuple(each.flatten().tolist()) for each in shown}) == 4


def test_a_model_left_in_evaluation_mode_is_trained_all_the_same() -> None:
    task = LinearTask(dropout=0.5)
    trainer = Trainer(task, _config(), device=CPU)
    trainer.run(after_step=lambda report: task.model.eval() and None)
    whole, _ = _trained(LinearTask(dropout=0.5))
    assert torch.equal(_weights(trainer), _weights(whole))


def _denormals() -> bool:
    return bool((torch.tensor(1e-30) * torch.tensor(1e-10)).item())


class _Denormal(LinearTask):
    """Tells whether numbers below 1.2e-38 are there in a step, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.there: list[bool] = []

    def loss(self, portion: Portion) -> Loss:
        self.there.append(_denormals())
        loss = super().loss(portion)
        loss.value.register_hook(lambda _: self.there.append(_denormals()))
        return loss


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
def test_numbers_too_small_to_matter_take_no_time_in_a_step_and_are_left_alone_outside() -> None:
    assert _denormals()
    task, after = _Denormal(), list[bool]()
    Trainer(task, _config(), device=CPU).run(after_step=lambda report: after.append(_denormals()))
    assert len(task.there) == 16
    assert not any(task.there)
    assert all(after)
    with pytest.raises(InputError):
        Trainer(_Broken(math.nan), _config(accumulate=2), device=CPU).run()
    assert _denormals()


def test_what_is_frozen_stays_and_is_not_kept() -> None:
    task = LinearTask()
    task.model[1].bias.requires_grad_(False)
    before = task.model[1].bias.clone()
    trainer, _ = _trained(task)
    assert torch.equal(task.model[1].bias, before)
    assert set(trainer.state()["model"]) == {"1.weight"}
    again = Trainer(task, _config(), device=CPU)
    again.load_state(trainer.state())


def test_a_state_of_another_model_is_refused() -> None:
    trainer, _ = _trained(LinearTask())
    state = trainer.state()
    state["model"] = {"1.weight": state["model"]["1.weight"]}
    with pytest.raises(ValueError, match=r"not the tensors of this model: 1\.bias"):
        trainer.load_state(state)


# What goes wrong


class _Broken(LinearTask):
    """The loss of step 3's second portion is what it is told."""

    def __init__(self, factor: float | Exception) -> None:
        super().__init__()
        self.factor = factor

    def loss(self, portion: Portion) -> Loss:
        found = super().loss(portion)
        if (portion.step, portion.part) != (3, 1):
            return found
        if isinstance(self.factor, Exception):
            raise self.factor
        return dataclasses.replace(found, value=found.value * self.factor)


@pytest.mark.parametrize("factor", [math.nan, math.inf, ValueError("row 7 holds NaN"), InputError("row 7 holds NaN")])
def test_a_loss_that_is_no_number_names_step_and_sequences(factor: float | Exception) -> None:
    task = _Broken(factor)
    trainer = Trainer(task, _config(accumulate=2), device=CPU)
    with pytest.raises(InputError) as found:
        trainer.run()
    at_fault = task.seen[-1].index_B.tolist()
    named = ", ".join(f"row{index}" for index in at_fault[:8])
    what = str(factor) if isinstance(factor, Exception) else f"the loss is {factor}"
    assert str(found.value).startswith(f"{what} at step 3, in a batch of {named}")
    assert "try a learning rate below 0.05" in str(found.value)
    clean = Trainer(LinearTask(), _config(accumulate=2), device=CPU)
    clean.run(until=3)
    assert trainer.step == 3
    assert torch.equal(_weights(trainer), _weights(clean)), "the weights are those before the step"


def test_many_sequences_are_named_in_part() -> None:
    task = _Broken(math.nan)
    trainer = Trainer(task, _config(accumulate=2, batch_tokens=50), device=CPU)
    with pytest.raises(InputError, match=r"in a batch of (row\d+, ){7}row\d+ and \d+ more: "):
        trainer.run()


def test_a_gradient_that_is_no_number_never_reaches_the_weights() -> None:
    task = LinearTask()
    trainer = Trainer(task, _config(), device=CPU)
    trainer.run(until=2)
    before = _weights(trainer)
    task.model[1].bias.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(InputError, match=r"the gradient's norm is (inf|nan) at step 2"):
        trainer.run()
    assert torch.equal(_weights(trainer), before)


def test_logits_that_are_no_numbers_name_the_sequences() -> None:
    encoder = toy_encoder()
    teacher = toy_encoder(1)
    with torch.no_grad():
        encoder.final_norm.weight[0] = math.nan
    task = MaskedTask(encoder, corpus_of(proteins_to_train()), seed=0, teacher=LiveTeacher(teacher))
    with pytest.raises(InputError, match=r"NaN or an infinity.* at step 0, in a batch of protein\d+"):
        Trainer(task, _config(), device=CPU).run()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"batch_tokens": -1}, "batch_tokens must be positive, got -1"),
        ({"accumulate": 0}, "accumulate must be positive, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"weight_decay": math.inf}, "weight_decay must not be negative, got inf"),
        ({"seed": 2**32}, "seed is 4294967296, expected 0 to 4294967295"),
        ({"schedule": "step"}, "schedule is 'step'; allowed: linear, cosine, constant"),
        ({"precision": "fp16"}, "precision is 'fp16'; allowed: fp32, bf16"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(problem)}"):
        _config(**changes)


def test_nothing_to_train_on_or_to_train_is_refused() -> None:
    task = LinearTask(0)
    with pytest.raises(InputError, match="no sequence to train on"):
        Trainer(task, _config(), device=CPU)
    frozen = LinearTask()
    frozen.model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter to train"):
        Trainer(frozen, _config(), device=CPU)
