"""An engine on a GPU: TensorRT's runtime, with torch's memory and stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import InputError
from .onnx_export import INPUT, require
from .tensorrt_export import GPUS, TARGETS, capability_name, load_target, make_logger

NEEDED = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("create_execution_context", "num_optimization_profiles"),
    "IExecutionContext": (
        "execute_async_v3",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
}
"""What is called of the package: a test without a GPU can at least hold that it is there."""
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "failed to allocate")


def check_gpu(facts: dict[str, Any], capability: tuple[int, int], name: str, *, file: Path) -> None:
    """Raises InputError, naming both, where an engine was built for GPUs of other generations than this one."""
    here = capability_name(capability)
    if here not in facts["gpus"]:
        if facts["target"] == "tensorrt":
            hint = "`protnest export --target tensorrt` on this machine builds one for it"
        elif here in GPUS:
            hint = f"`protnest export --target tensorrt-rtx --gpu {here}` builds one for it"
        else:
            hint = f"TensorRT-RTX builds for {', '.join(GPUS)} alone"
        message = f"is built for {', '.join(facts['gpus'])}, and this GPU ({name}) is {here}: {hint}"
        raise InputError(message, file=file)


class EngineExecution:
    """A loaded engine.

    Args:
        path: the engine file.
        facts: of its sidecar.
        device: "cuda" or "cuda:N".

    Raises:
        InputError: the package is missing or cannot be loaded, torch sees no GPU, the GPU is of another generation, or
            the runtime does not take the engine.
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, device: str = "cuda") -> None:
        target = facts["target"]
        if target == "tensorrt-rtx":
            require(TARGETS[target])
        trt = load_target(target)
        if not torch.cuda.is_available():
            message = (
                "runs on a GPU alone, and torch sees none: it needs NVIDIA's driver and a build of torch with CUDA. "
                "`protnest export --target onnx` makes a file that runs on a CPU"
            )
            raise InputError(message, file=path)
        self._device = torch.device(device)
        check_gpu(
            facts, torch.cuda.get_device_capability(self._device), torch.cuda.get_device_name(self._device), file=path
        )
        self._axes: dict[str, list[Any]] = facts["outputs"]
        self._logger = make_logger(trt)
        with torch.cuda.device(self._device):
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            self._context: Any = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            message = (
                f"{target} {trt.__version__} does not load it, which {facts['versions'].get(target)} built: "
                f"{self._reasons()}"
            )
            raise InputError(message, file=path)
        if self._engine.num_optimization_profiles != len(facts["profiles"]):
            message = (
                f"has {self._engine.num_optimization_profiles} profiles, its sidecar tells of {len(facts['profiles'])}"
            )
            raise InputError(message, file=path)
        self._path = path
        self._profile: int | None = None

    def run(
        self, profile: int, tokens_BL: npt.NDArray[np.int64], outputs: Sequence[str]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Runs tokens (B, L) that lie within a profile; gives the outputs asked for, on the host.

        Raises:
            torch.OutOfMemoryError: the rows do not fit into memory together.
            InputError: the runtime fails otherwise.
        """
        self._logger.errors.clear()
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if profile != self._profile:
                self._check(
                    self._context.set_optimization_profile_async(profile, stream.cuda_stream), f"profile {profile}"
                )
                self._profile = profile
            tokens = torch.from_numpy(np.ascontiguousarray(tokens_BL)).to(self._device)
            self._check(self._context.set_input_shape(INPUT, tuple(tokens.shape)), f"shape {tuple(tokens.shape)}")
            self._check(self._context.set_tensor_address(INPUT, tokens.data_ptr()), INPUT)
            sizes = {"batch": tokens.shape[0], "length": tokens.shape[1]}
            found = {}
            # The engine writes all that it computes; only what is asked for is copied.
            for name, axes in self._axes.items():
                shape = [sizes.get(axis, axis) for axis in axes]
                found[name] = torch.empty(shape, dtype=torch.float32, device=self._device)
                self._check(self._context.set_tensor_address(name, found[name].data_ptr()), name)
            self._check(self._context.execute_async_v3(stream.cuda_stream), "the batch")
            return {name: found[name].cpu().numpy() for name in outputs}

    def _check(self, done: bool, what: str) -> None:
        if not done:
            message = f"TensorRT does not take {what}: {self._reasons()}"
            if any(words in message.lower() for words in _OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(message)
            raise InputError(message, file=self._path)

    def _reasons(self) -> str:
        return "; ".join(self._logger.errors[-5:]) or "it gave no reason"
