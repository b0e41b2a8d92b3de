"""An exported ONNX file: what it says of itself, and proteins through it by name of output.

Shapes: B proteins, L tokens of the longest, D width of an output.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .alphabet import BOS_ID, EOS_ID, PAD_ID, RESIDUE_TABLE
from .errors import InputError
from .export_facts import check_facts
from .fasta import clean_sequence
from .onnx_export import SCHEMA_VERSION, require
from .onnx_runner import OnnxRunner
from .packing import refuse_one_string
from .schema_version import check_schema_version

Floats = npt.NDArray[np.float32]


def read_facts(path: str | Path) -> dict[str, Any]:
    """What an exported file says of itself: models, chain, precision, outputs, limits, versions.

    Raises:
        InputError: the file is missing, no ONNX, no export of this package, of a schema version that this release
            does not know, or does not say all of it; or the package onnx is missing.
    """
    require("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        message = "no such file; `protnest export` writes one"
        raise InputError(message, file=path) from error
    except (DecodeError, OSError) as error:
        message = f"not a readable ONNX file ({error})"
        raise InputError(message, file=path) from error
    props = {each.key: each.value for each in model.metadata_props}
    if "protnest" not in props:
        message = "is no export of protnest: its metadata lack `protnest`"
        raise InputError(message, file=path)
    check_schema_version(props.get("schema_version"), str(SCHEMA_VERSION), file=path)
    try:
        facts: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **json.loads(props["protnest"])}
    except (TypeError, ValueError) as error:  # No object; no JSON.
        message = f"has damaged metadata ({error})"
        raise InputError(message, file=path) from error
    check_facts(facts, file=path)
    return facts


class OnnxModel:
    """An exported file, run by ONNX Runtime on the CPU; `load_model` makes an encoder of it.

    Args:
        path: the file; its `.data` file, where it has one, lies beside it.
        threads: see `OnnxRunner`.

    Attributes:
        facts: see `read_facts`.
        outputs: names of what it gives.
        max_residues: the longest protein.

    Raises:
        InputError: see `read_facts` and `OnnxRunner`.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self.facts = read_facts(path)
        self.outputs: tuple[str, ...] = tuple(self.facts["outputs"])
        self.max_residues: int = self.facts["limits"]["max_residues"]
        self._runner = OnnxRunner(path, threads=threads)

    def run(self, sequences: Sequence[str], outputs: Sequence[str] | None = None) -> dict[str, Floats | list[Floats]]:
        """Runs proteins as one padded batch.

        Args:
            sequences: B strings; lower case, spaces and a final `*` are accepted.
            outputs: of `self.outputs`; all of them by default.

        Returns:
            By output: float32 (B, D) of "mean" and "nested"; of "residue" and "logits" a list of float32 (L, D), rows
            of residues only.

        Raises:
            TypeError: `sequences` is a plain string.
            InputError: an output is not in the file; a sequence is empty, too long, or holds a letter outside the
                alphabet.
        """
        refuse_one_string(sequences)
        wanted = self.outputs if outputs is None else tuple(outputs)
        if unknown := [name for name in wanted if name not in self.outputs]:
            message = f"output {unknown[0]!r} is not in the file; it gives {', '.join(self.outputs)}"
            raise InputError(message, file=self.path)
        cleaned = [self._clean(row, sequence) for row, sequence in enumerate(sequences)]
        if not cleaned:
            return {name: self._nothing(name) for name in wanted}
        found = self._runner.run_tokens(pad_tokens(cleaned), wanted)
        return {name: value if value.ndim == 2 else _residues(value, cleaned) for name, value in found.items()}

    def _clean(self, row: int, sequence: str) -> str:
        try:
            cleaned = clean_sequence(sequence)
        except InputError as error:
            message = f"sequence {row}: {error.problem}"
            raise InputError(message) from error
        if len(cleaned) > self.max_residues:
            message = f"sequence {row}: {len(cleaned)} residues, but {self.path.name} takes at most {self.max_residues}"
            raise InputError(message)
        return cleaned

    def _nothing(self, name: str) -> Floats | list[Floats]:
        axes = self.facts["outputs"][name]
        return np.zeros((0, axes[-1]), dtype=np.float32) if len(axes) == 2 else []


def pad_tokens(sequences: Sequence[str]) -> npt.NDArray[np.int64]:
    """int64 (B, L): each row `<cls>`, the residues, `<eos>`, then `<pad>`; of letters of the alphabet only."""
    tokens_BL = np.full((len(sequences), max(map(len, sequences)) + 2), PAD_ID, dtype=np.int64)
    tokens_BL[:, 0] = BOS_ID
    for row_L, sequence in zip(tokens_BL, sequences, strict=True):
        row_L[1 : len(sequence) + 1] = RESIDUE_TABLE[np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)]
        row_L[len(sequence) + 1] = EOS_ID
    return tokens_BL


def _residues(value_BLD: Floats, sequences: Sequence[str]) -> list[Floats]:
    return [rows_LD[1 : len(sequence) + 1] for rows_LD, sequence in zip(value_BLD, sequences, strict=True)]
