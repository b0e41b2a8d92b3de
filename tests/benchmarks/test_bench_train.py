"""bench_train: both engines take the same step; what a row holds; no speed while a loss is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from protnest.benchmarks import bench_train
from protnest.benchmarks.bench_train import make_problem, run_problem, train_table
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.published_trainer import PublishedTrainer
from protnest.engine.config import EncoderConfig
from protnest.engine.decoder_config import DecoderConfig
from protnest.training.students import DECODER_PRESETS, ENCODER_PRESETS
from protnest.training.teacher import LiveTeacher
from protnest.training.trainer import Trainer, TrainerConfig


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = EncoderConfig(layers=1, width=16, heads=2, feedforward=32)
    decoder = DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=33)
    for name in ("nano-xs", "nano-s"):
        monkeypatch.setitem(ENCODER_PRESETS, name, encoder)
    for name in ("nano-gpt", "micro", "tiny"):
        monkeypatch.setitem(DECODER_PRESETS, name, decoder)
    monkeypatch.setattr(bench_train, "BATCH_SEQUENCES", 2)


@pytest.mark.parametrize("name", ["nano-xs", "nano-gpt"])
def test_both_take_the_same_steps(name: str) -> None:
    problem = make_problem(name, batches=2)
    config = TrainerConfig(steps=6, learning_rate=0.01, schedule="constant", warmup_steps=2)
    published = PublishedTrainer(problem.task, problem.teacher, config, problem.groups)
    problem.task.teacher = LiveTeacher(problem.teacher)
    trainer = Trainer(problem.task, config, device=torch.device("cpu"))
    trainer.order = bench_train._FixedOrder(problem.groups)
    losses: list[float] = []
    trainer.run(after_step=lambda report: losses.append(report.loss))
    assert losses == pytest.approx([published.take_step() for _ in range(6)], rel=2e-3)
    assert losses[-1] < losses[0]


def test_a_row_holds_what_is_documented() -> None:
    rows = run_problem("nano-xs", batches=1, pairs=2)
    assert [row["engine"] for row in rows] == ["ours", "published"]
    for row in rows:
        assert row["tokens_per_s_min"] <= row["tokens_per_s_median"] <= row["tokens_per_s_max"]
        assert row["loss_error"] < 5e-4
    assert rows[0]["teacher_read_seconds"] > 0
    assert rows[0]["ours_times_faster_median"] is None
    assert rows[1]["ours_times_faster_median"] > 0
    assert train_table(rows).row_count == 2


def test_no_speed_without_green(monkeypatch: pytest.MonkeyPatch) -> None:
    true_loss = PublishedTrainer.loss

    def wrong(trainer: PublishedTrainer, batch: Any) -> torch.Tensor:
        return 1.01 * true_loss(trainer, batch)

    monkeypatch.setattr(PublishedTrainer, "loss", wrong)
    with pytest.raises(ParityError, match=r"nano-xs: the loss is off by 9\.9e-03"):
        run_problem("nano-xs", batches=1, pairs=1)
