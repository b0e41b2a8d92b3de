"""Two processes over gloo: the weights of one that accumulates twice as much, also gone on with from a checkpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("shard", ["ddp", "fsdp2"])
def test_two_processes_are_one_that_accumulates_twice(folder: Path, shard: str) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*run, str(WORKER), str(folder), shard, "2"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("encoder", "decoder"):
        trainer = TrainerConfig(steps=5, batch_tokens=60, accumulate=4, learning_rate=0.01, warmup_steps=2)
        config = DistillConfig(student=str(folder / f"{kind} student"), trainer=trainer)
        out, teacher = folder / f"{kind} alone", folder / f"{kind} teacher"
        distill(teacher, folder / "in.fasta", out, config, device="cpu", cache=folder / f"{kind} cache")
        ours, alone = _state(folder / f"{kind} {shard}"), _state(out)
        assert ours.keys() == alone.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5, msg=name)
        report = json.loads((folder / f"{kind} {shard}" / "training.json").read_text())
        assert report["processes"] == 2
        assert report["perplexity"]["sequences"] == 3
        lines = (folder / f"{kind} {shard}" / "log.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4", "5"]
        load_model(folder / f"{kind} {shard}", device="cpu", precision="fp32")


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
