"""ONNX Runtime with an exported graph in it, on the CPU or on a CUDA GPU.

Shapes: B sequences, L tokens of the longest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .denormals import no_denormals
from .device import resolve_device
from .errors import InputError
from .onnx_attention import with_fused_attention
from .onnx_export import INPUT, require

_logger = logging.getLogger(__name__)
_explained: set[str] = set()

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CPU = torch.device("cpu")
_FLUSHES = "session.set_denormal_as_zero"
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


def choose_device(device: str = "auto") -> torch.device:
    """Where ONNX Runtime runs: `auto` is a GPU that torch sees, where the installed runtime has CUDA, else the CPU.

    Raises:
        InputError: the device is unknown or not there, or the runtime has no CUDA and it was asked for; or the package
            onnxruntime is missing.
    """
    require("onnxruntime")
    import onnxruntime

    resolved = resolve_device(device)
    available = onnxruntime.get_available_providers()
    if _PROVIDERS[resolved.type] in available:
        return resolved
    lacking = f"this onnxruntime has no CUDA (it has {', '.join(available)}); `pip install onnxruntime-gpu` brings it"
    if device != "auto":
        message = f"device is {device!r}, but {lacking}"
        raise InputError(message)
    if lacking not in _explained:
        _explained.add(lacking)
        _logger.info("exported files run on the CPU: %s", lacking)
    return _CPU


class OnnxRunner:
    """A session of ONNX Runtime; an `exported_encoder.TokenRunner`.

    Args:
        path: the file; its `.data` file, where it has one, lies beside it.
        device: as `choose_device` gives it.
        threads: of one operation on the CPU; as many as torch has by default.

    Raises:
        InputError: the runtime does not take the file, or does not start on the device; or the package onnxruntime is
            missing.
    """

    name = "onnxruntime"

    def __init__(self, path: str | Path, *, device: torch.device = _CPU, threads: int | None = None) -> None:
        require("onnx", self.name)
        import onnxruntime

        self.path = Path(path)
        self.device = device
        provider = _PROVIDERS[device.type]
        settings: dict[str, Any] = {"device_id": device.index or 0} if device.type == "cuda" else {}
        model: bytes | None = None
        options = onnxruntime.SessionOptions()
        # Of its own threads. Nano-m runs 2.3 times as fast with it: attention's probabilities are full of denormals.
        options.add_session_config_entry(_FLUSHES, "1")
        if device.type == "cpu" and (model := with_fused_attention(self.path)) is not None:
            # A graph from memory does not know where its `.data` file lies.
            options.add_session_config_entry(_DATA_FOLDER, str(self.path.absolute().parent))
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        try:
            with no_denormals():  # A process's first session would set this thread for good.
                self._session = onnxruntime.InferenceSession(
                    model or str(path), options, providers=[(provider, settings)]
                )
        except Exception as error:  # Its errors share no narrower class.
            message = f"ONNX Runtime does not take it ({str(error).splitlines()[0]})"
            raise InputError(message, file=path) from error
        # Where a provider cannot start, it says so on standard error and takes the CPU.
        if self._session.get_providers()[0] != provider:
            message = f"ONNX Runtime could not start {provider} on {device}; its own lines above say why"
            raise InputError(message, file=path)

    def run_tokens(
        self, tokens_BL: npt.NDArray[np.int64], outputs: Sequence[str]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Runs padded rows, see `exported_encoder.TokenRunner`.

        Raises:
            torch.OutOfMemoryError: the rows do not fit into memory together.
            InputError: the runtime fails otherwise.
        """
        try:
            with no_denormals():
                found = self._session.run(list(outputs), {INPUT: tokens_BL})
        except Exception as error:  # As above.
            said, (rows, tokens) = str(error).splitlines()[0], tokens_BL.shape
            message = f"ONNX Runtime failed on {rows} rows of {tokens} tokens ({said})"
            if any(words in said.lower() for words in ("failed to allocate", "out of memory", "bad allocation")):
                raise torch.OutOfMemoryError(message) from error
            raise InputError(message, file=self.path) from error
        return dict(zip(outputs, found, strict=True))
