"""Two processes over gloo: the weights of one that accumulates twice as much, also gone on with from a checkpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from protnest.engine import InputError
from protnest.engine.models import load_model
from protnest.training.distillation import DistillConfig, distill
from protnest.training.distributed import joined_processes, own_device
from protnest.training.trainer import TrainerConfig

from support.learning import fasta_to_train, save_toy, toy_decoder, toy_encoder

CPU = torch.device("cpu")
WORKER = Path(__file__).resolve().parents[1] / "support" / "distributed_worker.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, whose in enumerate(("student", "teacher")):
        save_toy(tmp_path / f"encoder {whose}", toy_encoder(seed))
        save_toy(tmp_path / f"decoder {whose}", toy_decoder(seed))
    fasta_to_train(tmp_path / "in.fasta")
    return tmp_path


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _state(out: Path) -> dict[str, torch.Tensor]:
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 5
    found: dict[str, torch.Tensor] = state["model"]
    return found


@pytest.fixture
def trained(folder: Path) -> Path:
    """What two processes leave: one launch for all, since starting them is what takes long."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    done = subprocess.run(
        [*run, str(WORKER), str(folder), "2"],
        capture_output=True,
        text=True,
        # By the host's name gloo's processes have been seen to wait for each other for ever.
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _figures(out: Path) -> list[list[float]]:
    lines = (out / "log.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3", "4", "5"]
    # Loss and norm of the gradient: AdamW alone would not notice a gradient that is a multiple of the true one.
    return [[float(number) for number in (line.split(",")[2], line.split(",")[4])] for line in lines]


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates_twice(trained: Path) -> None:
    for kind in ("encoder", "decoder"):
        trainer = TrainerConfig(steps=5, batch_tokens=60, accumulate=4, learning_rate=0.01, warmup_steps=2)
        config = DistillConfig(student=str(trained / f"{kind} student"), trainer=trainer)
        alone, teacher = trained / f"{kind} alone", trained / f"{kind} teacher"
        distill(teacher, trained / "in.fasta", alone, config, device="cpu", cache=trained / f"{kind} cache")
        for shard in ("ddp", "fsdp2"):
            out = trained / f"{kind} {shard}"
            np.testing.assert_allclose(_figures(out), _figures(alone), rtol=1e-4)
            ours, expected = _state(out), _state(alone)
            assert ours.keys() == expected.keys()
            for name, tensor in ours.items():
                if name.endswith("qkv.bias"):
                    # Keys' biases move no softmax: their gradient is rounding, which AdamW makes as large as any.
                    for part in (0, 2):
                        one, other = tensor.chunk(3)[part], expected[name].chunk(3)[part]
                        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)
                else:
                    torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
            report = json.loads((out / "training.json").read_text())
            assert report["processes"] == 2
            assert report["perplexity"]["sequences"] == 3
            load_model(out, device="cpu", precision="fp32")


def test_alone_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined_processes(torch.device("cpu")) as processes:
        assert (processes.rank, processes.world, processes.is_first) == (0, 1, True)
    assert own_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(torch.device("cuda", 0)) == torch.device("cuda", 3)
    assert own_device(torch.device("cpu")) == torch.device("cpu")


def test_an_unknown_way_of_sharing_is_refused() -> None:
    with pytest.raises(InputError, match="shard is 'zero'; allowed: ddp, fsdp2"), joined_processes(CPU, "zero"):
        pass
