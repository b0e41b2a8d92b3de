"""An exported file in an encoder's place: what `Embedder` and the scorers ask of one, given by padded rows.

A packed batch is unpacked to rows. Those of like length run together, each filled up to the longest of them: a row's
padding is at most an eighth of that length, or `_FEW` tokens where that is more. Answers are put back in packed order.

Shapes: B sequences, T tokens of all of them, L tokens of the longest in a run, R chosen tokens, D width of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .alphabet import PAD_ID
from .config import EncoderConfig
from .device import PRECISIONS
from .encoder import Encoder, EncoderOutput
from .errors import InputError
from .packing import ChosenRows, PackedBatch, pack

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]

# Of a run, padding counted. On a CPU one protein of usual length fills the caches; a GPU wants more to be busy, and
# attention's scores of so many tokens in rows of 1,024 are 1.3 GB over 20 heads in fp32.
RUN_TOKENS = {"cpu": 1024, "cuda": 16384}
_SHARE = 8
_FEW = 8


class TokenRunner(Protocol):
    """A runtime with an exported graph in it."""

    def run_tokens(self, tokens_BL: Tokens, outputs: Sequence[str]) -> dict[str, Floats]:
        """Runs padded rows.

        Args:
            tokens_BL: each row `<cls>`, residues, `<eos>`, then `<pad>`.
            outputs: names of what the graph gives.

        Returns:
            By name float32, (B, L, D) or (B, D).

        Raises:
            torch.OutOfMemoryError: the rows do not fit into memory together.
        """
        ...


class ExportedEncoder:
    """An exported file that embeds and scores like the encoder that it was made of.

    Args:
        runner: what runs the graph.
        facts: what the file says of itself, see `onnx_export`.
        path: the file, for messages.
        device: where the runner runs.
        runtime: its name.

    Attributes:
        name, fingerprint: of the file's largest model.
        config: of the same, but `max_residues` is the file's.
        language_head: hash of the language-model head, None where the file gives no logits.
        outputs: names of what the file gives, see `export_graph.OUTPUTS`.
        widths: of the nested row's prefixes; without a chain the model's own.
        facts, path, device, runtime: as given.
    """

    family = Encoder.family

    def __init__(
        self, runner: TokenRunner, facts: dict[str, Any], *, path: Path, device: torch.device, runtime: str
    ) -> None:
        largest, limits = facts["models"][-1], facts["limits"]
        self._runner = runner
        self._most_tokens: int = limits["max_tokens"]
        self.facts, self.path, self.device, self.runtime = facts, path, device, runtime
        self.name: str = largest["name"]
        self.fingerprint: str | None = largest["fingerprint"]
        self.language_head: str | None = facts["language_head"]
        self.config = replace(EncoderConfig(**largest["config"]), max_residues=limits["max_residues"])
        self.outputs: tuple[str, ...] = tuple(facts["outputs"])
        self.widths: tuple[int, ...] = tuple(facts["widths"])

    @property
    def dim(self) -> int:
        """D, the width of the embeddings."""
        return self.config.width

    @property
    def precision(self) -> str:
        """Name of the precision in which the products run: it was chosen at the export."""
        name: str = self.facts["precision"]
        return name

    @property
    def dtype(self) -> torch.dtype:
        """Of what the products multiply. All outputs are fp32."""
        return PRECISIONS[self.precision]

    product_dtype = dtype

    def __call__(self, batch: PackedBatch, *, layers: Collection[int] = ()) -> EncoderOutput:
        """Hidden states of every token of the batch, on the CPU.

        Raises:
            InputError: the file gives no residues, inner layers are asked for, or a sequence is too long for the file.
        """
        if layers:
            message = f"gives no inner layers, and {sorted(layers)} are asked for: they are the checkpoint's"
            raise InputError(message, file=self.path)
        return EncoderOutput(self._tokens(batch, "residue"))

    def stream(self, batch: PackedBatch) -> torch.Tensor:
        """Raises InputError: a chain's models run in one file, or as checkpoints."""
        message = "a chain takes checkpoints; `protnest export --chain` puts it and its models into one file"
        raise InputError(message, file=self.path)

    def row_logits(self, batch: PackedBatch, chosen: ChosenRows) -> torch.Tensor:
        """Logits of some tokens: float32 (R, V), on the CPU. All tokens' are computed.

        Raises:
            InputError: the file gives no logits, or a sequence is too long for it.
        """
        return self._tokens(batch, "logits")[chosen.index_R.cpu()]

    def row_hidden(self, batch: PackedBatch, chosen: ChosenRows) -> torch.Tensor:
        """Hidden states of some tokens after the final LayerNorm: float32 (R, D), on the CPU.

        Raises:
            InputError: the file gives no residues, or a sequence is too long for it.
        """
        return self._tokens(batch, "residue")[chosen.index_R.cpu()]

    def pooled(self, batch: PackedBatch, output: str) -> torch.Tensor:
        """What the file itself pools, "mean" or "nested": float32 (B, D), on the CPU.

        Raises:
            InputError: the file lacks the output, or a sequence is too long for it.
        """
        rows_BD = np.empty((len(batch.lengths_B), self._width(output)), dtype=np.float32)

        def take(rows: Sequence[int], value_BD: Floats) -> None:
            rows_BD[rows] = value_BD

        self._run(batch, output, take)
        return torch.from_numpy(rows_BD)

    @torch.inference_mode()
    def encode(self, sequences: Sequence[str]) -> list[Floats]:
        """As `Encoder.encode`: residues only, float32 (L, D) of each sequence."""
        batch = pack(sequences)
        hidden_TD = self(batch).hidden_TD.numpy()
        ends = np.cumsum(batch.lengths_B).tolist()
        return [hidden_TD[end - length + 1 : end - 1] for end, length in zip(ends, batch.lengths_B, strict=True)]

    def check_output(self, output: str) -> None:
        """Raises InputError where the file lacks an output."""
        if output not in self.outputs:
            wanted = [name for name in self.outputs if name != "nested"]
            message = (
                f"the file gives {' and '.join(self.outputs)} alone, and {output} is asked for; export with "
                f"--outputs {','.join([*wanted, output])}"
            )
            raise InputError(message, file=self.path)

    def pooled_output(self, pool: str) -> str | None:
        """The output that is a protein's vector for `pool`; None where residues are pooled outside.

        Raises:
            InputError: the file gives neither.
        """
        if "nested" in self.outputs:
            if pool == "mean":
                return "nested"
            message = (
                f"holds a chain's nested row, which is a mean over residues: pool {pool!r} takes the chain's "
                "checkpoints, or a file that was exported without `nested`"
            )
            raise InputError(message, file=self.path)
        if pool == "mean" and "residue" not in self.outputs and "mean" in self.outputs:
            return "mean"
        self.check_output("residue")
        return None

    def check_chain(self, fingerprint: str) -> None:
        """Raises InputError unless the file's nested row is that of the chain with this hash."""
        if "nested" not in self.outputs:
            message = "holds no chain's row; --chain takes checkpoints, or export with --chain"
            raise InputError(message, file=self.path)
        if self.facts["chain"] != fingerprint:
            message = (
                f"the chain has changed since the export: its hash is {fingerprint}, the file holds "
                f"{self.facts['chain']}; export again, or leave --chain out"
            )
            raise InputError(message, file=self.path)

    def why_not_beyond(self, long: str, pool: str) -> str | None:
        """Why a protein beyond `max_residues` cannot run; None where it can.

        Args:
            long, pool: as `Embedder` takes them.
        """
        if long == "full":
            return f"{self.path.name} takes at most {self.config.max_residues} residues (`export --max-residues`)"
        if long == "window" and self.pooled_output(pool) is not None:
            return (
                f"{self.path.name} takes at most {self.config.max_residues} residues and pools them itself, so that "
                "windows cannot be blended; take --long truncate, or a checkpoint"
            )
        return None

    def _width(self, output: str) -> int:
        self.check_output(output)
        width: int = self.facts["outputs"][output][-1]
        return width

    def _tokens(self, batch: PackedBatch, output: str) -> torch.Tensor:
        """An output of every token, packed: float32 (T, D)."""
        begins = np.cumsum((0, *batch.lengths_B))
        out_TD = np.empty((int(begins[-1]), self._width(output)), dtype=np.float32)

        def take(rows: Sequence[int], value_BLD: Floats) -> None:
            for row, value_LD in zip(rows, value_BLD, strict=True):
                out_TD[begins[row] : begins[row + 1]] = value_LD[: batch.lengths_B[row]]

        self._run(batch, output, take)
        return torch.from_numpy(out_TD)

    def _run(self, batch: PackedBatch, output: str, take: Callable[[Sequence[int], Floats], None]) -> None:
        longest = max(batch.lengths_B, default=0)
        if longest > self._most_tokens:
            message = f"a run of {longest - 2} residues, but the file takes at most {self.config.max_residues}"
            raise InputError(message, file=self.path)
        tokens_T = batch.tokens_T.cpu().numpy()
        begins = np.cumsum((0, *batch.lengths_B))
        for rows in runs_of(batch.lengths_B, RUN_TOKENS[self.device.type]):
            tokens_BL = np.full((len(rows), batch.lengths_B[rows[0]]), PAD_ID, dtype=np.int64)
            for row_L, row in zip(tokens_BL, rows, strict=True):
                row_L[: batch.lengths_B[row]] = tokens_T[begins[row] : begins[row + 1]]
            take(rows, self._runner.run_tokens(tokens_BL, (output,))[output])


AnyEncoder = Encoder | ExportedEncoder


def runs_of(lengths_B: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Rows that run together, longest first, each run's first row its longest.

    Args:
        lengths_B: tokens of each row.
        most_tokens: of a run, padding counted; a longer row runs alone.
    """
    runs: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths_B)), key=lambda row: (-lengths_B[row], row)):
        is_like = longest - lengths_B[row] <= max(longest // _SHARE, _FEW)
        if runs and is_like and (len(runs[-1]) + 1) * longest <= most_tokens:
            runs[-1].append(row)
        else:
            runs.append([row])
            longest = lengths_B[row]
    return runs
