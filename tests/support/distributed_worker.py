"""What each of several processes runs for tests/training/test_distributed.py, under torchrun.

    distributed_worker.py FOLDER ACCUMULATE

trains an encoder and a decoder by DDP and by FSDP2, each stopped after step 2 and gone on with from what is on disk.
"""

from __future__ import annotations

import contextlib
import itertools
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
    folder, accumulate = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    true_step = Trainer._step

    def stopping(trainer: Trainer, portions: list[Portion]) -> StepReport:
        if trainer.step == 2:
            raise Stopped
        return true_step(trainer, portions)

    trainer = TrainerConfig(steps=5, batch_tokens=60, accumulate=accumulate, learning_rate=0.01, warmup_steps=2)
    for shard in ("ddp", "fsdp2"):
        with joined_processes(torch.device("cpu"), shard) as processes:
            for kind, step in itertools.product(("encoder", "decoder"), (stopping, true_step)):
                Trainer._step = step  # type: ignore[method-assign]
                with contextlib.suppress(Stopped):
                    distill(
                        folder / f"{kind} teacher",
                        folder / "in.fasta",
                        folder / f"{kind} {shard}",
                        DistillConfig(student=str(folder / f"{kind} student"), trainer=trainer),
                        device="cpu",
                        cache=folder / f"{kind} cache",
                        save_every_s=0,
                        processes=processes,
                    )
                processes.wait()


if __name__ == "__main__":
    main()
