"""The proteins that a model is adapted to, with or without labels, and their three shares.

Shapes: B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.atomic import write_atomically
from ..engine.errors import InputError
from ..engine.fasta import read_fasta
from .clusters import Backend
from .corpus import Share
from .head_task import HeadData, join_labels, read_labels
from .splits import split

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LabelSource:
    """Where labels stand.

    Attributes:
        file: a table.
        id_column, label_column: its columns; ids are those of the FASTA file.
    """

    file: Path
    id_column: str = "id"
    label_column: str = "label"


@dataclass(frozen=True, kw_only=True)
class FamilyData:
    """Proteins.

    Attributes:
        proteins: each sequence once, but where there are labels.
        facts: how they came about, for a report.
        labelled: the same proteins with their labels, None without any.
        classes: by name.
    """

    proteins: Share
    facts: dict[str, Any]
    labelled: HeadData | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Three shares of a family.

    Attributes:
        train, validation, test: proteins.
        places: of each in the family, by the share's name.
        facts: for a report.
    """

    train: Share
    validation: Share
    test: Share
    places: dict[str, Integers]
    facts: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Writes train.fasta, validation.fasta and test.fasta: what others need who judge the model."""
        for name in ("train", "validation", "test"):
            share: Share = getattr(self, name)
            _write_fasta(folder / f"{name}.fasta", share)


def _write_fasta(path: Path, share: Share) -> None:
    text = "".join(f">{name}\n{letters}\n" for name, letters in zip(share.ids, share.sequences, strict=True))
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_family(data: Path, labels: LabelSource | None, *, task: str | None, pooling: str) -> FamilyData:
    """Reads proteins; with labels those that have one.

    Raises:
        InputError: a record is invalid, there is none, ids that labels go by are there twice, or as `join_labels`.
    """
    records = [(record.id, record.sequence) for record in read_fasta(data)]
    if not records:
        message = "holds no protein"
        raise InputError(message, file=data)
    if labels is None:
        distinct: dict[str, str] = {}
        for name, sequence in records:
            distinct.setdefault(sequence, name)
        proteins = Share(tuple(distinct.values()), tuple(distinct))
        return FamilyData(proteins=proteins, facts={"found": len(records), "repeated": len(records) - len(distinct)})
    ids = [name for name, _ in records]
    if len(set(ids)) < len(ids):
        twice = next(name for place, name in enumerate(ids) if name in ids[:place])
        message = f"id {twice!r} is there twice: labels go by ids"
        raise InputError(message, file=data)
    assert task is not None
    table = read_labels(labels.file, id_column=labels.id_column, label_column=labels.label_column)
    found, classes = join_labels(
        ids, [sequence for _, sequence in records], table, task=task, pooling=pooling, file=labels.file
    )
    facts = {"found": len(records), "labels": labels.file.name, "labelled": len(found.ids), "classes": list(classes)}
    return FamilyData(proteins=Share(found.ids, found.sequences), facts=facts, labelled=found, classes=classes)


def split_family(
    family: FamilyData,
    *,
    n: int | None,
    judged: int,
    validation: float,
    test: float,
    identity: float,
    seed: int,
    backend: Backend,
) -> Shares:
    """Splits a family by clusters.

    Args:
        family: proteins.
        n: to train on, None for all that are left to it.
        judged: most of the validation share, and of the test share: the first ones.
        validation, test, identity, seed, backend: as `splits.split` takes them.

    Raises:
        InputError: as `splits.split` and `Split.subset`.
    """
    proteins = family.proteins
    found = split(proteins.sequences, validation=validation, test=test, identity=identity, seed=seed, backend=backend)
    places = {
        "train": found.train if n is None else found.subset(n),
        "validation": found.validation[:judged],
        "test": found.test[:judged],
    }
    shares = {name: _share(proteins, chosen) for name, chosen in places.items()}
    facts = {**found.facts(), **{f"{name}_used": len(chosen) for name, chosen in places.items()}}
    return Shares(**shares, places=places, facts=facts)


def _share(proteins: Share, places: Integers) -> Share:
    chosen = places.tolist()
    return Share(tuple(proteins.ids[place] for place in chosen), tuple(proteins.sequences[place] for place in chosen))
