"""esm-cpp behind two pipes: run by the Python of an environment that has esm-cpp and numpy < 2, not by this project's.

    python esm_cpp_worker.py model.safetensors fp32|int8

It imports nothing of protnest. Requests are lines of JSON on standard input: `sequences`, `budget` (tokens a batch, 1
is one sequence at a time) and `watch` (tell the peak of memory). An answer is a line of JSON on standard output with
`rows`, `columns`, `kind`, `seconds`, `growth_bytes`, and behind it the float32 vectors; or with `error` alone. The
first line says that the model is loaded. Time is taken here: neither pipe counts. Nor does memory that esm-cpp keeps
between passes hide in what was held before: growth is from the loaded model on.

Vectors are means over residues. esm-cpp gives hidden states of one sequence at a time only: at a budget of 1 they are
the embeddings. Its batched forwards end in logits, and it is these whose means are told at larger budgets. Of its two
batched forwards the one runs that was faster on the first batch.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def _held_bytes() -> int | None:
    """Bytes held now, with the peak started anew, see proc(5); None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5", encoding="ascii")
        return _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None


def _batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices by rising length, so that esm-cpp need not cut a batch again, of at most `budget` tokens each."""
    batches: list[list[int]] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and held + lengths[index] <= budget:
            batches[-1].append(index)
            held += lengths[index]
        else:
            batches.append([index])
            held = lengths[index]
    return batches


class _Runner:
    """The model, and which of its batched forwards is the faster one at each budget."""

    def __init__(self, file: str, precision: str) -> None:
        import esm_cpp

        self.model = esm_cpp.Model.load_from_safetensors(file)
        if precision == "int8":
            self.model.quantize_weights()
        self._encode = esm_cpp.Tokenizer().encode
        self._forwards = {"packed": self._packed, "batch": self.model.forward_batch}
        self._faster: dict[int, str] = {}
        # The shortest forward: afterwards all weights are in memory, and next to nothing else.
        self.vectors(["M"], 1)
        self.held_bytes = _held_bytes()

    def _packed(self, tokens: list[Any]) -> Any:
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        return self.model.forward_packed(np.concatenate(tokens), offsets)

    def _ids(self, sequences: list[str]) -> list[Any]:
        return [np.asarray(self._encode(sequence), dtype=np.int32) for sequence in sequences]

    def choose(self, sequences: list[str], budget: int) -> None:
        """Tries both batched forwards on the first batch of a budget that was not seen yet."""
        if budget == 1 or budget in self._faster:
            return
        tokens = self._ids(sequences)
        batch = [tokens[index] for index in _batches(list(map(len, tokens)), budget)[0]]
        seconds = {}
        for name, forward in self._forwards.items():
            begin = time.perf_counter()
            forward(batch)
            seconds[name] = time.perf_counter() - begin
        self._faster[budget] = min(seconds, key=lambda name: seconds[name])

    def vectors(self, sequences: list[str], budget: int) -> Any:
        """Means over residues: of the last layer after the final LayerNorm at a budget of 1, else of logits."""
        tokens = self._ids(sequences)
        rows: list[Any] = [None] * len(tokens)
        if budget == 1:
            for index, ids in enumerate(tokens):
                rows[index] = self.model.forward_with_hidden_states(ids)[1][-1][1:-1].mean(0)
        else:
            forward = self._forwards[self._faster[budget]]
            for batch in _batches(list(map(len, tokens)), budget):
                for index, logits in zip(batch, forward([tokens[index] for index in batch])):  # noqa: B905
                    rows[index] = logits[1:-1].mean(0)
        return np.stack(rows)


def _answer(runner: _Runner, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    sequences, budget = request["sequences"], request["budget"]
    runner.choose(sequences, budget)
    if request["watch"]:
        _held_bytes()
    begin = time.perf_counter()
    vectors = runner.vectors(sequences, budget)
    seconds = time.perf_counter() - begin
    growth = None
    if request["watch"] and runner.held_bytes is not None:
        growth = max(0, _status_bytes("VmHWM") - runner.held_bytes)
    rows, columns = vectors.shape
    about = {
        "rows": rows,
        "columns": columns,
        "kind": "embeddings" if budget == 1 else "logits",
        "seconds": seconds,
        "growth_bytes": growth,
    }
    return about, vectors.astype("<f4").tobytes()


def main() -> None:
    """Answers until standard input ends."""
    # esm-cpp prints; what it prints must not run into the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    file, precision = sys.argv[1:]

    def tell(about: dict[str, Any], data: bytes = b"") -> None:
        out.write(json.dumps(about).encode() + b"\n" + data)
        out.flush()

    try:
        import esm_cpp

        runner = _Runner(file, precision)
    except Exception as error:  # noqa: BLE001 - the other side raises it
        tell({"error": f"{type(error).__name__}: {error}"})
        return
    tell({"version": esm_cpp.__version__, "instructions": esm_cpp.current_isa()})
    for line in sys.stdin:
        try:
            about, data = _answer(runner, json.loads(line))
        except Exception as error:  # noqa: BLE001 - the other side raises it
            tell({"error": f"{type(error).__name__}: {error}"})
        else:
            tell(about, data)


if __name__ == "__main__":
    main()
