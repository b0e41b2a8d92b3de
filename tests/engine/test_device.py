"""Devices and precisions by name, on machines with and without GPUs."""

from __future__ import annotations

import pytest
import torch
from protnest.engine import InputError
from protnest.engine import device as device_file
from protnest.engine.device import (
    DEVICE_NAMES,
    PRECISION_NAMES,
    PRECISIONS,
    precision_name,
    resolve_device,
    resolve_precision,
)

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int, *, current: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)


def test_names() -> None:
    assert DEVICE_NAMES == ("auto", "cpu", "cuda")
    assert PRECISION_NAMES == ("auto", "fp32", "bf16", "fp16", "int8")


# Devices


@pytest.mark.parametrize(
    ("device", "gpus", "current", "resolved"),
    [
        ("auto", 0, 0, CPU),
        ("auto", 1, 0, GPU),
        ("auto", 2, 1, torch.device("cuda", 1)),
        ("cpu", 0, 0, CPU),
        ("cpu", 2, 1, CPU),
        ("cuda", 1, 0, GPU),
        ("cuda", 2, 1, torch.device("cuda", 1)),
        ("cuda:0", 2, 1, GPU),
        ("cuda:1", 2, 0, torch.device("cuda", 1)),
        (CPU, 2, 0, CPU),
        (torch.device("cuda"), 2, 1, torch.device("cuda", 1)),
        (torch.device("cuda", 1), 2, 0, torch.device("cuda", 1)),
    ],
)
def test_resolve_device(
    monkeypatch: pytest.MonkeyPatch, device: str | torch.device, gpus: int, current: int, resolved: torch.device
) -> None:
    _gpus(monkeypatch, gpus, current=current)
    assert resolve_device(device) == resolved


def test_auto_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 0)
    assert resolve_device() == CPU


@pytest.mark.parametrize(
    "device", ["gpu", "CUDA", "", "cuda:x", "cuda:-1", "auto:0", "mps", "meta", torch.device("meta")]
)
def test_unknown_device(monkeypatch: pytest.MonkeyPatch, device: str | torch.device) -> None:
    _gpus(monkeypatch, 2)
    with pytest.raises(InputError) as caught:
        resolve_device(device)
    assert caught.value.problem == f"device is {str(device)!r}; allowed: auto, cpu, cuda, cuda:N"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1)])
def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch, device: str | torch.device) -> None:
    _gpus(monkeypatch, 0)
    with pytest.raises(InputError, match="but torch sees no CUDA GPU here; `protnest info` says what there is"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["cuda:2", torch.device("cuda", 7)])
def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: str | torch.device) -> None:
    _gpus(monkeypatch, 2)
    with pytest.raises(InputError, match=f"device is '{device}', but there are 2 GPUs"):
        resolve_device(device)


# Precisions


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, multiplies: bool, dtype: torch.dtype
) -> None:
    asked: list[torch.device] = []

    def multiplies_bf16(device: torch.device) -> bool:
        asked.append(device)
        return multiplies

    monkeypatch.setattr(device_file, "multiplies_bf16", multiplies_bf16)
    assert resolve_precision("auto", device) == dtype
    assert asked == [device]


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("fp32", CPU, torch.float32),
        ("bf16", CPU, torch.bfloat16),
        ("fp32", GPU, torch.float32),
        ("bf16", GPU, torch.bfloat16),
        ("fp16", GPU, torch.float16),
        ("int8", CPU, torch.int8),
    ],
)
def test_named_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    assert resolve_precision(precision, device) == dtype


@pytest.mark.parametrize("precision", ["fp64", "float32", "FP32", ""])
def test_unknown_precision(precision: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_precision(precision, CPU)
    assert caught.value.problem == f"precision is {precision!r}; allowed: auto, fp32, bf16, fp16, int8"


def test_fp16_on_a_cpu() -> None:
    with pytest.raises(InputError, match="precision is 'fp16' on a CPU, where ESM-2 can overflow and runs slowly"):
        resolve_precision("fp16", CPU)


def test_int8_on_a_gpu() -> None:
    with pytest.raises(InputError, match="precision is 'int8' on cuda:0: int8 runs on a CPU alone"):
        resolve_precision("int8", GPU)


def test_precision_name_of_int8() -> None:
    assert precision_name(resolve_precision("int8", CPU)) == "int8"


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_name(name: str) -> None:
    assert precision_name(PRECISIONS[name]) == name


def test_precision_name_of_another_dtype() -> None:
    # Never StopIteration: inside a generator it would end the loop without a word.
    with pytest.raises(ValueError, match="float64"):
        precision_name(torch.float64)
