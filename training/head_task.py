"""Numbers and classes to learn: their table, the task that a trainer takes, and how well they are told.

Shapes: B proteins, R rows (proteins, or residues of all of them), O outputs.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from xopen import xopen

from ..engine.bootstrap import draws
from ..engine.errors import InputError
from ..engine.ranking import spearman
from .estimate import Estimate, estimate, ratio
from .order import Index, Portion
from .task_head import HeadConfig, HeadedModel, outputs_of, residues_of, tokens_of
from .trainer import Loss

Floats = npt.NDArray[np.float64]

_UNKNOWN = ("", "-", "nan", "NaN", "NA")


@dataclass(frozen=True, kw_only=True)
class HeadData:
    """Proteins with what is to be learnt of them.

    Attributes:
        ids: of B proteins.
        sequences: upper case.
        targets: of each protein fp64 (1,), or a value a residue: numbers, or the numbers of classes; NaN where nothing
            is known.
    """

    ids: tuple[str, ...]
    sequences: tuple[str, ...]
    targets: tuple[Floats, ...]

    def some(self, places: npt.NDArray[np.int64]) -> HeadData:
        """Those at some places, in that order."""
        chosen = places.tolist()
        return HeadData(
            ids=tuple(self.ids[place] for place in chosen),
            sequences=tuple(self.sequences[place] for place in chosen),
            targets=tuple(self.targets[place] for place in chosen),
        )

    @property
    def fingerprint(self) -> str:
        """Hash of sequences and targets."""
        digest = hashlib.blake2b(json.dumps(self.sequences).encode(), digest_size=16)
        for values in self.targets:
            digest.update(values.astype("<f8").tobytes())
        return digest.hexdigest()


def read_labels(path: Path, *, id_column: str, label_column: str) -> dict[str, tuple[str, int]]:
    """Labels by id, with the line that each stands on. Tabs or commas, plain or .gz.

    Raises:
        InputError: the file is unreadable, lacks a column or rows, or an id is there twice.
    """
    found: dict[str, tuple[str, int]] = {}
    try:
        with xopen(path, "rt", encoding="utf-8", newline="") as file:
            header = file.readline()
            delimiter = "\t" if "\t" in header else ","
            names = next(csv.reader([header], delimiter=delimiter), [])
            for name in (id_column, label_column):
                if name not in names:
                    message = f"has no column {name!r}; it has {', '.join(names) or 'none'}"
                    raise InputError(message, file=path)
            rows = csv.DictReader(file, fieldnames=names, delimiter=delimiter)
            for row in rows:
                name, line = (row[id_column] or "").strip(), rows.line_num + 1
                if name in found:
                    message = f"id {name!r} is there twice, in line {found[name][1]} first"
                    raise InputError(message, file=path, line=line)
                found[name] = ((row[label_column] or "").strip(), line)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        message = f"not a readable table ({error})"
        raise InputError(message, file=path) from error
    if not found:
        message = "holds no label"
        raise InputError(message, file=path)
    return found


def join_labels(
    ids: Sequence[str],
    sequences: Sequence[str],
    labels: dict[str, tuple[str, int]],
    *,
    task: str,
    pooling: str,
    file: Path,
) -> tuple[HeadData, tuple[str, ...]]:
    """Proteins that have a label, and the classes by name, sorted.

    With "mean" a label is a number or a word. With "residue" it has a part for each residue: one letter of a class, or
    numbers with blanks between them; `-` where nothing is known (of numbers also nan).

    Raises:
        InputError: no protein has a label, a number is none, or a label's parts do not fit its protein.
    """
    parted: list[list[str]] = []
    kept: list[int] = []
    for place, (name, sequence) in enumerate(zip(ids, sequences, strict=True)):
        text, line = labels.get(name, ("", 0))
        if pooling == "mean":
            parts = [text]
        else:
            parts = list(text) if task == "classification" else text.replace(";", " ").split()
            if text and len(parts) != len(sequence):
                message = f"{name}: {len(parts)} labels for {len(sequence)} residues"
                raise InputError(message, file=file, line=line)
        if all(part in _UNKNOWN for part in parts):
            continue
        if task == "regression":
            _check_numbers(parts, name, file, line)
        kept.append(place)
        parted.append(parts)
    if not kept:
        message = f"none of {len(ids)} proteins has a label here; its ids are {', '.join(list(labels)[:3])}, ..."
        raise InputError(message, file=file)
    classes: tuple[str, ...] = ()
    if task == "classification":
        classes = tuple(sorted({part for parts in parted for part in parts if part not in _UNKNOWN}))
    numbers = {name: float(number) for number, name in enumerate(classes)}
    values = [
        [math.nan if part in _UNKNOWN else numbers[part] if classes else float(part) for part in parts]
        for parts in parted
    ]
    data = HeadData(
        ids=tuple(ids[place] for place in kept),
        sequences=tuple(sequences[place] for place in kept),
        targets=tuple(np.array(each, dtype=np.float64) for each in values),
    )
    return data, classes


def _check_numbers(parts: Sequence[str], name: str, file: Path, line: int) -> None:
    for part in parts:
        try:
            if part not in _UNKNOWN and not math.isfinite(float(part)):
                raise ValueError
        except ValueError as error:
            message = f"{name}: the label is {part!r}, expected a number"
            raise InputError(message, file=file, line=line) from error


def head_config(task: str, pooling: str, width: int, train: HeadData, classes: tuple[str, ...]) -> HeadConfig:
    """A head's configuration for what is trained on: its classes, or mean and scale of its numbers.

    Raises:
        InputError: the training share has fewer than two classes, or numbers that are all the same.
    """
    known = np.concatenate([each[np.isfinite(each)] for each in train.targets])
    if task == "classification":
        if len(np.unique(known)) < 2:
            message = f"{len(np.unique(known))} classes among {len(train.ids)} proteins to train on: at least 2"
            raise InputError(message)
        return HeadConfig(task=task, pooling=pooling, width=width, classes=classes)
    mean, scale = float(known.mean()), float(known.std())
    if not scale > 0:
        message = f"all labels of {len(train.ids)} proteins to train on are {mean:g}: nothing to learn"
        raise InputError(message)
    return HeadConfig(task=task, pooling=pooling, width=width, mean=mean, scale=scale)


class HeadTask:
    """Learning labels (a `trainer.Task`): squared error of standardised numbers, or cross-entropy.

    Args:
        model: with its head.
        data: what it is trained on.
    """

    def __init__(self, model: HeadedModel, data: HeadData) -> None:
        self.model, self.data = model, data
        self._tokens = [tokens_of(model.backbone, sequence) for sequence in data.sequences]
        self._targets = seen_targets(model, data)

    @property
    def lengths_B(self) -> Index:
        return np.array([len(ids) for ids in self._tokens], dtype=np.int64)

    def describe(self, index: int) -> str:
        return self.data.ids[index]

    def identity(self) -> dict[str, Any]:
        return {
            "architecture": asdict(self.model.backbone.config),
            "task": self.model.head.config.task,
            "pooling": self.model.head.config.pooling,
            "data": self.data.fingerprint,
        }

    def loss(self, portion: Portion) -> Loss:
        numbers = portion.index_B.tolist()
        outputs_RO = self.model([self._tokens[number] for number in numbers])
        targets_R = torch.from_numpy(np.concatenate([self._targets[number] for number in numbers]))
        return head_loss(outputs_RO, targets_R.to(outputs_RO.device), self.model.head.config)


def seen_targets(model: HeadedModel, data: HeadData) -> list[Floats]:
    """Each protein's targets for what its model sees of it: of residues beyond the model's length there is none."""
    if model.head.config.pooling == "mean":
        return list(data.targets)
    seen = [int(residues_of(model.backbone, tokens_of(model.backbone, each)).sum()) for each in data.sequences]
    return [targets[:count] for targets, count in zip(data.targets, seen, strict=True)]


def head_loss(outputs_RO: torch.Tensor, targets_R: torch.Tensor, config: HeadConfig) -> Loss:
    """The mean loss of the rows whose target is known; 0 of none."""
    known_R = torch.isfinite(targets_R)
    rows = int(known_R.sum())
    outputs, targets = outputs_RO[known_R].float(), targets_R[known_R]
    if not rows:
        return Loss(outputs_RO.sum() * 0.0, 0)
    if config.task == "classification":
        return Loss(F.cross_entropy(outputs, targets.long()), rows)
    wanted = (targets - config.mean) / config.scale
    return Loss(F.mse_loss(outputs[:, 0], wanted.float()), rows)


def judge_head(model: HeadedModel, data: HeadData, *, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How well labels are told: the loss, and Spearman or accuracy with a 95 % interval over proteins.

    Returns:
        `loss`; `rows`; `spearman` of a regression, or `accuracy` and `majority`, the share of the most frequent class.
    """
    config = model.head.config
    outputs = outputs_of(model, data.sequences)
    targets = seen_targets(model, data)
    joined_RO, joined_R = torch.cat(outputs), np.concatenate(targets)
    found = head_loss(joined_RO, torch.from_numpy(joined_R), config)
    report: dict[str, Any] = {"loss": float(found.value), "rows": found.rows}
    known = [np.isfinite(each) for each in targets]
    truly = [each[mask] for each, mask in zip(targets, known, strict=True)]
    if config.task == "classification":
        said = [each.argmax(dim=1).numpy()[mask] for each, mask in zip(outputs, known, strict=True)]
        hits_B = np.array([float((a == b).sum()) for a, b in zip(said, truly, strict=True)])
        rows_B = np.array([float(len(each)) for each in truly])
        majority = np.bincount(np.concatenate(truly).astype(np.int64)).max() / max(1, found.rows)
        report |= {"accuracy": asdict(ratio(hits_B, rows_B, samples=samples, seed=seed)), "majority": float(majority)}
        return report
    numbers = [each[:, 0].double().numpy()[mask] for each, mask in zip(outputs, known, strict=True)]
    return {**report, "spearman": asdict(_spearman(numbers, truly, samples=samples, seed=seed))}


def _spearman(said: list[Floats], truly: list[Floats], *, samples: int, seed: int) -> Estimate:
    """With proteins drawn with replacement, all residues of each together."""
    drawn = [
        spearman(np.concatenate([said[b] for b in rows_B]), np.concatenate([truly[b] for b in rows_B]))
        for rows_B in (rows.tolist() for rows in draws(len(said), samples=samples, seed=seed))
    ]
    return estimate(spearman(np.concatenate(said), np.concatenate(truly)), np.array(drawn), len(said))
