"""Proteins to train on, to stop by and to judge by: whole clusters each, so that no homologue is in two shares.

Everything is decided by hashes of (seed, sequence), so neither the order of a file nor what else there is in it decides
which share a cluster would rather be in. Clusters go to the test share first, then to validation, as long as they fit;
training has the rest, and with it what is too large for either. Training's proteins come in an order of their own: the
first 50 are among the first 100, and so on.

Shapes: B sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError
from .clusters import Backend, Clusters, cluster

Integers = npt.NDArray[np.int64]

SUBSETS = (50, 100, 200, 500, 1000)
"""Sizes of nested training shares that studies of scarce data use."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Places of proteins, in three shares.

    Attributes:
        train: int64, in the order in which subsets take them.
        validation, test: int64, in the sequences' order.
        clusters: all of them.
    """

    train: Integers
    validation: Integers
    test: Integers
    clusters: Clusters

    def facts(self) -> dict[str, Any]:
        """For a report."""
        sizes = self.clusters.sizes
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "clusters": len(self.clusters),
            "largest_cluster": int(sizes.max()),
            "identity": self.clusters.identity,
            "clusters_by": self.clusters.backend,
        }

    def subset(self, n: int) -> Integers:
        """The first `n` of the training share: int64 (n,).

        Raises:
            InputError: there are fewer.
        """
        if not 1 <= n <= len(self.train):
            sizes = ", ".join(str(size) for size in SUBSETS if size <= len(self.train))
            hint = f", such as {sizes}" if sizes else ""
            message = f"{n} proteins to train on: the training share has {len(self.train)}; take 1 to that{hint}"
            raise InputError(message)
        return self.train[:n]


def split(
    sequences: Sequence[str],
    *,
    validation: float = 0.1,
    test: float = 0.1,
    identity: float = 0.5,
    seed: int = 0,
    backend: Backend = "auto",
) -> Split:
    """Splits proteins so that nothing as alike as `identity` to a protein of one share is in another.

    Args:
        sequences: B proteins, upper case; equal ones go together.
        validation, test: shares of the proteins, at most; no cluster is divided to reach them.
        identity: from which on proteins belong to one cluster, see `clusters`.
        seed: other clusters with another one.
        backend: of `clusters.cluster`.

    Raises:
        InputError: shares are not between 0 and 1 or leave nothing to train on, or there are too few clusters, or none
            small enough, for three shares.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 < share < 1:
            message = f"the {name} share is {share}, expected more than 0 and less than 1"
            raise InputError(message)
    if validation + test >= 1:
        message = f"shares of {validation} for validation and {test} for testing leave nothing to train on"
        raise InputError(message)
    found = cluster(sequences, identity=identity, backend=backend)
    if len(found) < 3:
        message = f"{len(found)} clusters at an identity of {identity} are too few for three shares: at least 3; "
        message += "cluster at a higher identity, or give more proteins"
        raise InputError(message)
    keys = [_key(seed, "protein", sequence) for sequence in sequences]
    members: list[list[int]] = [[] for _ in range(len(found))]
    for place, label in enumerate(found.label_B.tolist()):
        members[label].append(place)
    # A cluster's key is its members' least one: of the same proteins in another order it is the same.
    order = sorted(members, key=lambda places: _key(seed, "cluster", min(sequences[place] for place in places)))
    shares: dict[str, list[int]] = {"test": [], "validation": [], "train": []}
    wanted = {"test": test * len(sequences), "validation": validation * len(sequences)}
    for places in order:
        fits = [name for name in wanted if len(shares[name]) + len(places) <= max(1.0, wanted[name])]
        shares[fits[0] if fits else "train"] += places
    for name, taken in shares.items():
        if not taken:
            smallest = int(found.sizes.min())
            message = (
                f"no cluster is left for the {name} share: {len(found)} clusters at an identity of {identity} hold "
                f"{smallest} to {int(found.sizes.max())} of {len(sequences)} proteins; cluster at a higher identity, "
                "or take other shares"
            )
            raise InputError(message)
    return Split(
        train=np.array(sorted(shares["train"], key=lambda place: (keys[place], place)), dtype=np.int64),
        validation=np.array(sorted(shares["validation"]), dtype=np.int64),
        test=np.array(sorted(shares["test"]), dtype=np.int64),
        clusters=found,
    )


def _key(seed: int, purpose: str, sequence: str) -> bytes:
    return hashlib.blake2b(f"{seed} {purpose} {sequence}".encode(), digest_size=16).digest()
