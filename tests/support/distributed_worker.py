"""What each of several processes runs for tests/training/test_distributed.py, under torchrun.

    distributed_worker.py FOLDER SHARD ACCUMULATE

trains an encoder and a decoder, each stopped after step 2 and gone on with from what is on disk.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from protnest.training.distillation import DistillConfig, distill
from protnest.training.distributed import joined_processes
from protnest.training.order import Portion
from protnest.training.trainer import StepReport, Trainer, TrainerConfig


class Stopped(BaseException):
    """All processes end between two steps."""


def main() -> None:
    folder, shard, accumulate = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    true_step = Trainer._step

    def stopping(trainer: Trainer, portions: list[Portion]) -> StepReport:
        if trainer.step == 2:
            raise Stopped
        return true_step(trainer, portions)

    trainer = TrainerConfig(steps=5, batch_tokens=60, accumulate=accumulate, learning_rate=0.01, warmup_steps=2)
    with joined_processes(torch.device("cpu"), shard) as processes:
        for kind in ("encoder", "decoder"):
            config = DistillConfig(student=str(folder / f"{kind} student"), trainer=trainer)
            for step in (stopping, true_step):
                Trainer._step = step  # type: ignore[method-assign]
                with contextlib.suppress(Stopped):
                    distill(
                        folder / f"{kind} teacher",
                        folder / "in.fasta",
                        folder / f"{kind} {shard}",
                        config,
                        device="cpu",
                        cache=folder / f"{kind} cache",
                        save_every_s=0,
                        processes=processes,
                    )
                processes.wait()


if __name__ == "__main__":
    main()
