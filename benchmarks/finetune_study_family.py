"""The families of a fine-tuning study: proteins of usual length, one split for all decoders and N, and profiles."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from protnest.benchmarks.family_profiles import family_profiles, recognised
from protnest.benchmarks.rows import Row
from protnest.engine.atomic import write_atomically
from protnest.engine.errors import InputError
from protnest.training.corpus import Share
from protnest.training.estimate import share
from protnest.training.family_data import FamilyData, Shares, read_family, split_family
from protnest.training.splits import SUBSETS

LEAST_TRAINING = 20
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.15
_DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What is done in every cell.

    Attributes:
        sizes: proteins to train on, rising.
        seeds: how many; each has shares, orders and designs of its own.
        epochs: at most.
        seen: proteins that a fine-tuning sees at most, repeats counted, rounded up to whole epochs; 0 for no limit.
        designs: of each decoder and temperature.
        judged: proteins of validation and of test share, at most.
        residues: least and most of the proteins that are kept.
        identity: of clusters. At 0.5 seven in ten globins are one cluster, so that all else is judged by those that are
            hardly globins; at 0.9 the shares hold near copies of each other.
        device: where decoders run.
    """

    sizes: tuple[int, ...] = SUBSETS
    seeds: int = 1
    epochs: int = 20
    seen: int = 1000
    designs: int = 200
    judged: int = 40
    residues: tuple[int, int] = (60, 300)
    identity: float = 0.7
    device: str = "auto"

    def quick(self) -> StudyPlan:
        """Whether all of it works, in a minute or two."""
        return replace(self, sizes=(20,), seeds=1, epochs=2, designs=20, judged=10)

    def epochs_for(self, n: int) -> int:
        """Of a fine-tuning on `n` proteins, at most."""
        return self.epochs if not self.seen else min(self.epochs, -(-self.seen // n))


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyFamily:
    """A family under one seed.

    Attributes:
        name: of its file.
        fasta: what is fine-tuned on.
        fingerprint: hash of its proteins.
        shares: all of them; the first ones of validation and test share stop and judge.
        sizes: N that the training share has.
        skipped: N that it has not; the whole training share stands in for them.
        profiles: of the training share.
        facts: for reports: what was kept, how it was split, what the profiles recognise of the test share.
    """

    name: str
    seed: int
    fasta: Path
    fingerprint: str
    shares: Shares
    sizes: tuple[int, ...]
    skipped: tuple[int, ...]
    profiles: Sequence[Any]
    facts: Row

    @property
    def limits(self) -> tuple[int, int]:
        """Least and most residues in the training share: designs stay within them."""
        lengths = list(map(len, self.shares.train.sequences))
        return min(lengths), max(lengths)


def family_name(data: Path) -> str:
    """A file's name without its endings."""
    return data.name.removesuffix(".gz").rsplit(".", 1)[0]


def read_study_family(data: Path, out: Path, plan: StudyPlan, *, seed: int) -> StudyFamily:
    """Reads, filters and splits a family, writes what is kept to `out`/families, and builds profiles.

    Raises:
        InputError: the file is invalid, too few proteins are left for three shares or for training, or no profile
            recognises any five of them.
    """
    found = read_family(data, None, task=None, pooling="mean")
    least, most = plan.residues
    records = zip(found.proteins.ids, found.proteins.sequences, strict=True)
    kept = [pair for pair in records if least <= len(pair[1]) <= most]
    # Files are sorted by organism or date; the first ones to judge by have to be any ones.
    kept.sort(key=lambda pair: _digest([pair[1]]))
    proteins = Share(tuple(name for name, _ in kept), tuple(text for _, text in kept))
    name = family_name(data)
    try:
        shares = _split(FamilyData(proteins=proteins, facts={}), plan, seed=seed)
        if len(shares.train.ids) < LEAST_TRAINING:
            message = f"{len(shares.train.ids)} proteins to train on, expected at least {LEAST_TRAINING}"
            raise InputError(message)
        profiles = family_profiles(shares.train.sequences)
    except InputError as error:
        message = f"{len(kept)} of {found.facts['found']} proteins have {least} to {most} residues: {error.problem}"
        raise InputError(message, file=data) from error
    fasta = out / "families" / f"{name}.fasta"
    fasta.parent.mkdir(exist_ok=True)
    write_records(fasta, kept)
    there = len(shares.train.ids)
    skipped = tuple(n for n in plan.sizes if n > there)
    sizes = tuple(n for n in plan.sizes if n <= there)
    natural = shares.test.sequences
    facts = {
        **found.facts,
        "kept": len(kept),
        **shares.facts,
        "validation_used": min(plan.judged, len(shares.validation.ids)),
        "test_used": min(plan.judged, len(shares.test.ids)),
        "profiles": len(profiles),
        "recognised_train": asdict(share(len(recognised(profiles, shares.train.sequences)), there)),
        "recognised_test": asdict(share(len(recognised(profiles, natural)), len(natural))),
        "test_mean_residues": round(float(np.mean(list(map(len, natural)))), 1),
    }
    return StudyFamily(
        name=name,
        seed=seed,
        fasta=fasta,
        fingerprint=_digest(proteins.sequences),
        shares=shares,
        sizes=tuple(dict.fromkeys((*sizes, there))) if skipped else sizes,
        skipped=skipped,
        profiles=profiles,
        facts=facts,
    )


def _split(family: FamilyData, plan: StudyPlan, *, seed: int) -> Shares:
    return split_family(
        family,
        n=None,
        judged=len(family.proteins.ids),
        validation=VALIDATION_SHARE,
        test=TEST_SHARE,
        identity=plan.identity,
        seed=seed,
        backend="kmers",
    )


def _digest(texts: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def write_records(path: Path, records: Sequence[tuple[str, str]]) -> None:
    """Writes ids and sequences as FASTA."""
    text = "".join(f">{name}\n{letters}\n" for name, letters in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
