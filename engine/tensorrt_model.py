"""An engine at work: batches of tokens, cut to what its profiles take.

Shapes: B rows, L tokens of the longest, R rows of one run, D width of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .length_profiles import find_profile
from .tensorrt_sidecar import read_profiles, read_sidecar

Floats = npt.NDArray[np.float32]


class Execution(Protocol):
    """What runs an engine."""

    def run(self, profile: int, tokens_RL: npt.NDArray[np.int64], outputs: Sequence[str], /) -> dict[str, Floats]:
        """The outputs asked for of tokens that lie within the profile of that number."""
        ...


class TensorRTModel:
    """An exported engine, run by TensorRT-RTX or TensorRT on a GPU.

    Args:
        path: the engine file; its sidecar lies beside it.
        device: "cuda" or "cuda:N".
        execution: runs it in place of the GPU.
        facts: what `read_sidecar` gave, where it was asked: it reads the whole engine.

    Attributes:
        facts: see `read_sidecar`.
        outputs: names of what it gives.
        max_residues: the longest protein.
        profiles: shortest first.

    Raises:
        InputError: see `read_sidecar`; without `execution` also where a package or a GPU is missing, or the engine was
            built for another generation of GPUs or is not taken.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cuda",
        execution: Execution | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.facts: dict[str, Any] = read_sidecar(path) if facts is None else facts
        self.outputs: tuple[str, ...] = tuple(self.facts["outputs"])
        self.max_residues: int = self.facts["limits"]["max_residues"]
        self.profiles = read_profiles(self.facts)
        if execution is None:
            from .tensorrt_execution import EngineExecution

            execution = EngineExecution(self.path, self.facts, device=device)
        self._execution = execution

    def run_tokens(self, tokens_BL: npt.NDArray[np.int64], outputs: Sequence[str] | None = None) -> dict[str, Floats]:
        """Runs padded tokens; more rows than the profile takes run one part after the other.

        Args:
            tokens_BL: int64; each row `<cls>`, residues, `<eos>`, then `<pad>`.
            outputs: of `self.outputs`; all of them by default.

        Returns:
            By output: float32 (B, L, D) of "residue" and "logits", without meaning at padded places; (B, D) of "mean"
            and "nested".

        Raises:
            TypeError: the tokens are not int64 (B, L).
            InputError: an output is not in the file, or the rows are shorter or longer than any profile.
        """
        wanted = self.outputs if outputs is None else tuple(outputs)
        if unknown := [name for name in wanted if name not in self.outputs]:
            message = f"output {unknown[0]!r} is not in the file; it gives {', '.join(self.outputs)}"
            raise InputError(message, file=self.path)
        if tokens_BL.dtype != np.int64 or tokens_BL.ndim != 2:
            message = f"tokens must be int64 (B, L), got {tokens_BL.dtype} {tokens_BL.shape}"
            raise TypeError(message)
        rows, length = tokens_BL.shape
        if not rows:
            sizes = {"batch": 0, "length": length}
            shapes = {name: [sizes.get(axis, axis) for axis in self.facts["outputs"][name]] for name in wanted}
            return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        place = find_profile(self.profiles, length)
        if place is None:
            message = (
                f"rows of {length} tokens, and its profiles take {self.profiles[0].fewest_tokens} to "
                f"{self.profiles[-1].most_tokens} (`<cls>` and `<eos>` counted): up to {self.max_residues} residues"
            )
            raise InputError(message, file=self.path)
        most = self.profiles[place].most_rows
        parts = [self._execution.run(place, tokens_BL[begin : begin + most], wanted) for begin in range(0, rows, most)]
        return {name: np.concatenate([part[name] for part in parts]) for name in wanted}
