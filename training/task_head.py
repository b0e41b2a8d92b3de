"""A head that reads a fine-tuned model's hidden states: numbers or classes, of proteins or of their residues.

    outputs = 10 (hidden @ weight.T) + bias         standardised numbers, or logits of classes

Its weight begins at zero, so that it first says what the training labels say on average. The factor lets it learn ten
times as fast as the model below it, which has to move far less. Its file is safetensors beside the model's:
`weight` (O, D) and `bias` (O,) in fp32; the metadata hold `schema_version` and, as JSON under `head`, the rest.

Shapes: B sequences, T tokens, R rows that are read (sequences or residues), D width, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..engine.atomic import write_atomically
from ..engine.decoder import Decoder, pack_ids
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.packing import PackedBatch
from ..engine.queries import token_ids
from ..engine.schema_version import check_schema_version
from ..kernels import plan_batches

SCHEMA_VERSION = 1
HEAD_FILE = "task_head.safetensors"
TASKS = ("regression", "classification")
POOLINGS = ("mean", "residue")
GAIN = 10.0

Model = Encoder | Decoder
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a head says, and of what.

    Attributes:
        task: "regression" or "classification".
        pooling: "mean" reads a protein's residues together, "residue" each by itself.
        width: D, of the model.
        classes: by name, of a classification.
        mean, scale: what standardised numbers are turned back with, of a regression.
        model: hash of the model that it was trained with; None where it is not known yet.

    Raises:
        InputError: a word is unknown, there are fewer than two classes, or a number is not finite.
    """

    task: str
    pooling: str = "mean"
    width: int
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0
    model: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("task", TASKS), ("pooling", POOLINGS)):
            if getattr(self, name) not in allowed:
                message = f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                raise InputError(message)
        if self.task == "classification" and len(self.classes) < 2:
            message = f"{len(self.classes)} classes are too few: at least 2"
            raise InputError(message)
        if not (np.isfinite(self.mean) and np.isfinite(self.scale) and self.scale > 0):
            message = f"mean {self.mean} and scale {self.scale} must be finite, and the scale positive"
            raise InputError(message)

    @property
    def outputs(self) -> int:
        """O: one number, or a logit a class."""
        return len(self.classes) if self.task == "classification" else 1


class TaskHead(nn.Module):
    """The last product, see the top of the file."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.outputs, config.width))
        self.bias = nn.Parameter(torch.zeros(config.outputs))

    def forward(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Standardised numbers or logits: fp32 (R, O)."""
        weight_OD = self.weight.to(hidden_RD.device)
        return GAIN * (hidden_RD.float() @ weight_OD.T) + self.bias.to(hidden_RD.device)


class HeadedModel(nn.Module):
    """A model and its head, as one module to train.

    Args:
        backbone: an encoder or a decoder.
        head: of its width.

    Raises:
        InputError: widths differ, or residues are to be read of a model whose tokens stand for several.
    """

    def __init__(self, backbone: Model, head: TaskHead) -> None:
        super().__init__()
        if backbone.dim != head.config.width:
            message = f"the head reads a width of {head.config.width}, {backbone.name} has {backbone.dim}"
            raise InputError(message)
        several = isinstance(backbone, Decoder) and int(backbone.vocabulary.residues_V.max()) > 1
        if head.config.pooling == "residue" and several:
            message = f"{backbone.name} has tokens of several residues: a head cannot read residues one by one"
            raise InputError(message)
        self.backbone, self.head = backbone, head

    def forward(self, tokens: Sequence[Integers]) -> torch.Tensor:
        """Outputs for proteins' tokens, see `tokens_of`: (B, O), or with "residue" (R, O) of all their residues."""
        batch = pack_ids(tokens)
        hidden_TD = _hidden(self.backbone, batch)
        is_residue_T = torch.from_numpy(np.concatenate([residues_of(self.backbone, ids) for ids in tokens]))
        rows_T = torch.where(is_residue_T, 1.0, 0.0).to(hidden_TD.device)
        if self.head.config.pooling == "residue":
            outputs_RO: torch.Tensor = self.head(hidden_TD[rows_T > 0])
            return outputs_RO
        owner_T = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(batch.lengths_B)).to(rows_T.device)
        sums_BD = hidden_TD.new_zeros(len(tokens), hidden_TD.shape[1], dtype=torch.float32)
        sums_BD = sums_BD.index_add(0, owner_T, hidden_TD.float() * rows_T[:, None])
        counts_B = rows_T.new_zeros(len(tokens)).index_add(0, owner_T, rows_T).clamp(min=1)
        outputs_BO: torch.Tensor = self.head(sums_BD / counts_B[:, None])
        return outputs_BO


def _hidden(model: Model, batch: PackedBatch) -> torch.Tensor:
    hidden_TD: torch.Tensor = model(batch).hidden_TD if isinstance(model, Encoder) else model(batch)
    return hidden_TD


def tokens_of(model: Model, sequence: str) -> Integers:
    """A protein's tokens as its model reads them, int64; what is beyond the model's length is left out."""
    if isinstance(model, Encoder):
        return token_ids(sequence[: model.config.max_residues]).astype(np.int64)
    return model.vocabulary.encode(sequence)[: model.config.places]


def residues_of(model: Model, tokens: Integers) -> npt.NDArray[np.bool_]:
    """Which of a protein's tokens stand for residues: bool, as many."""
    if isinstance(model, Encoder):
        inner = np.ones(len(tokens), dtype=bool)
        inner[[0, -1]] = False
        return inner
    inner = model.vocabulary.residues_V[tokens] > 0
    return np.asarray(inner)


@torch.no_grad()
def outputs_of(model: HeadedModel, sequences: Sequence[str], *, batch_tokens: int = 4096) -> list[torch.Tensor]:
    """What the head says of each protein, in their order: fp32 (1, O), or with "residue" (L, O), on the CPU."""
    tokens = [tokens_of(model.backbone, sequence) for sequence in sequences]
    found: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
    order, offsets = plan_batches([len(ids) for ids in tokens], batch_tokens)
    for begin, end in pairwise(offsets.tolist()):
        numbers = order[begin:end].tolist()
        chosen = [tokens[number] for number in numbers]
        counts = [1] * len(chosen)
        if model.head.config.pooling == "residue":
            counts = [int(residues_of(model.backbone, ids).sum()) for ids in chosen]
        for number, part in zip(numbers, model(chosen).cpu().split(counts), strict=True):
            found[number] = part
    return found


def predict(model: HeadedModel, sequences: Sequence[str], *, batch_tokens: int = 4096) -> list[npt.NDArray[np.float32]]:
    """What a head says of proteins: numbers in the labels' units, or probabilities of the classes.

    Args:
        model: of `load_headed`.
        sequences: B proteins, upper case.
        batch_tokens: most tokens in a batch.

    Returns:
        For each protein float32 (1,) or, of classes, (1, O); with "residue" (L,) or (L, O).
    """
    config = model.head.config
    found = []
    for outputs_RO in outputs_of(model, sequences, batch_tokens=batch_tokens):
        if config.task == "classification":
            found.append(outputs_RO.softmax(dim=1).numpy())
        else:
            found.append((outputs_RO[:, 0].double() * config.scale + config.mean).float().numpy())
    return found


def save_head(head: TaskHead, folder: Path) -> None:
    """Writes `task_head.safetensors` beside a model's files."""
    tensors = {name: each.detach().to("cpu", torch.float32).contiguous() for name, each in head.state_dict().items()}
    metadata = {"schema_version": str(SCHEMA_VERSION), "head": json.dumps(asdict(head.config))}
    write_atomically(folder / HEAD_FILE, lambda path: save_file(tensors, path, metadata=metadata))


def load_head(folder: Path) -> TaskHead:
    """Reads what `save_head` wrote.

    Raises:
        InputError: there is no such file, it is unreadable, of another schema version, or its tensors do not fit.
    """
    path = folder / HEAD_FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        message = f"not a readable head ({error})"
        raise InputError(message, file=path) from error
    check_schema_version(metadata.get("schema_version"), str(SCHEMA_VERSION), file=path)
    try:
        settings = json.loads(metadata["head"])
        known = {field.name for field in fields(HeadConfig)}
        if unknown := sorted(settings.keys() - known):
            message = f"unknown settings {unknown}"
            raise InputError(message)
        head = TaskHead(HeadConfig(**{**settings, "classes": tuple(settings["classes"])}))
        head.load_state_dict(tensors, strict=True)
    except (InputError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        message = f"does not hold a whole head ({str(error).splitlines()[0]})"
        raise InputError(message, file=path) from error
    return head.eval()


def load_headed(folder: Path, *, device: str = "auto", precision: str = "auto") -> HeadedModel:
    """A fine-tuned model with its head, ready for `predict`.

    Raises:
        InputError: as `load_model` and `load_head`, or the head was trained with another model.
    """
    from ..engine.models import load_checkpoint

    head = load_head(folder)
    model = load_checkpoint(folder, device=device, precision=precision)
    if head.config.model is not None and model.fingerprint != head.config.model:
        message = f"the head belongs to a model of the hash {head.config.model}, that there has {model.fingerprint}"
        raise InputError(message, file=folder / HEAD_FILE)
    return HeadedModel(model, head.to(model.device)).eval().requires_grad_(False)
