"""Proteins that are alike, in clusters: MMseqs2 where it is installed, else k-mers that they share, and alignment.

Two proteins are linked where as large a share of the shorter one's residues as `identity` is found again in the longer
one; a cluster is what links hold together, directly or by way of others (single linkage). So no protein of one cluster
is as alike as that to one of another, as far as the search sees: a greedy cover, MMseqs2's default, does not give that.

Shapes: B sequences, W k-mers.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..engine.alphabet import AMINO_ACIDS
from ..engine.cpus import usable_cpus
from ..engine.errors import InputError
from .composition import LETTERS
from .identity import check_aligner, identical_residues

_logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]
Backend = Literal["auto", "mmseqs", "kmers"]
BACKENDS = ("auto", "mmseqs", "kmers")

WORD = 4
LEAST_IDENTITY = {"mmseqs": 0.2, "kmers": 0.5}
"""Below it a back end misses what is alike. 300 residues at an identity of 0.5 share some 19 of their 4-mers, unrelated
ones 1; at 0.3 it would be 2."""

_SHARE_OF_EXPECTED = 0.5
_NO_LETTER = 255
_CODE_OF = np.full(256, _NO_LETTER, dtype=np.uint8)
_CODE_OF[np.frombuffer(LETTERS.encode(), dtype=np.uint8)] = np.arange(len(LETTERS), dtype=np.uint8)
_OTHER = re.compile(f"[^{AMINO_ACIDS}]")


@dataclass(frozen=True, kw_only=True, eq=False)
class Clusters:
    """Which proteins belong together.

    Attributes:
        label_B: int64, the cluster of each protein: 0, 1, ... in the order of their first members.
        backend: what found them: "mmseqs" or "kmers".
        identity: share of identical residues from which on two proteins are linked.
    """

    label_B: Integers
    backend: str
    identity: float

    def __len__(self) -> int:
        return int(self.label_B.max(initial=-1)) + 1

    @property
    def sizes(self) -> Integers:
        """How many proteins each holds: int64."""
        return np.bincount(self.label_B, minlength=len(self)).astype(np.int64)


def cluster(sequences: Sequence[str], *, identity: float = 0.5, backend: Backend = "auto") -> Clusters:
    """Puts proteins that are alike into clusters; equal sequences share one always.

    Args:
        sequences: B proteins, upper case.
        identity: see above; at most 1, at least `LEAST_IDENTITY` of the back end.
        backend: "mmseqs" (the program on PATH), "kmers", or "auto": the first where it is installed.

    Raises:
        InputError: the back end is unknown, not installed or fails, or cannot tell this identity.
    """
    if backend not in BACKENDS:
        message = f"clusters by {backend!r}; allowed: {', '.join(BACKENDS)}"
        raise InputError(message)
    chosen = backend
    if backend == "auto":
        chosen = "kmers" if shutil.which("mmseqs") is None else "mmseqs"
        _logger.info("clusters by %s: mmseqs is %son PATH", chosen, "not " if chosen == "kmers" else "")
    least = LEAST_IDENTITY[chosen]
    if not least <= identity <= 1:
        message = f"identity is {identity}; clusters by {chosen} take {least} to 1"
        if chosen == "kmers" and LEAST_IDENTITY["mmseqs"] <= identity < least:
            message += ", lower ones need MMseqs2 (Debian's package mmseqs2)"
        raise InputError(message)
    distinct = list(dict.fromkeys(sequences))
    if chosen == "mmseqs":
        joined = _by_mmseqs(distinct, identity)
    else:
        joined = _by_kmers(distinct, identity)
    place_of = {sequence: place for place, sequence in enumerate(distinct)}
    roots = joined[[place_of[sequence] for sequence in sequences]] if sequences else np.empty(0, dtype=np.int64)
    numbers = {root: number for number, root in enumerate(dict.fromkeys(roots.tolist()))}
    label_B = np.array([numbers[root] for root in roots.tolist()], dtype=np.int64)
    return Clusters(label_B=label_B, backend=chosen, identity=identity)


class _Links:
    """Places joined by links; the root of a place is the smallest one that it is linked to so far."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def root(self, place: int) -> int:
        while self.parent[place] != place:
            self.parent[place] = self.parent[self.parent[place]]
            place = self.parent[place]
        return place

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self.parent[high] = low

    def roots(self) -> Integers:
        return np.array([self.root(place) for place in range(len(self.parent))], dtype=np.int64)


def _words(sequence: str) -> Integers:
    """Its distinct 4-mers of standard residues, as numbers to the base 20."""
    codes = _CODE_OF[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]
    if len(codes) < WORD:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, WORD)
    windows = windows[(windows != _NO_LETTER).all(axis=1)]
    numbers: Integers = windows.astype(np.int64) @ len(LETTERS) ** np.arange(WORD, dtype=np.int64)
    return np.unique(numbers)


def _by_kmers(sequences: Sequence[str], identity: float) -> Integers:
    """The root of each sequence's cluster.

    Substitutions that fall anywhere leave a share of identity^4 of the shorter one's 4-mers as they are, and chance
    adds what two heaps of letters share. Pairs that share half of the former and all of the latter are aligned, unless
    links have joined them already.
    """
    check_aligner()
    lists = [_words(sequence) for sequence in sequences]
    sizes = np.array([each.size for each in lists], dtype=np.int64)
    word_W = np.concatenate([np.empty(0, dtype=np.int64), *lists])
    # The chance that two words are the same one, from how often letters are.
    share = np.bincount(word_W % len(LETTERS), minlength=len(LETTERS)) / max(1, word_W.size)
    chance = float((share**2).sum() ** WORD)
    owner_W = np.repeat(np.arange(len(lists)), sizes)[np.argsort(word_W, kind="stable")]
    begins = np.searchsorted(np.sort(word_W), np.arange(len(LETTERS) ** WORD + 1))
    links = _Links(len(lists))
    for place, words in enumerate(lists):
        # Where in `owner_W` those that hold the same words stand, one word after another.
        many_W = begins[words + 1] - begins[words]
        steps = np.arange(many_W.sum()) - np.repeat(np.cumsum(many_W) - many_W, many_W)
        counts = np.bincount(owner_W[np.repeat(begins[words], many_W) + steps], minlength=place)[:place]
        met = np.flatnonzero(counts)
        expected = np.minimum(sizes[met], words.size) * identity**WORD
        needed = _SHARE_OF_EXPECTED * expected + chance * sizes[met] * words.size
        likely = met[counts[met] >= needed]
        # Those that share most come first: once they are joined, their clusters need no alignment any more.
        for other in likely[np.argsort(-counts[likely], kind="stable")].tolist():
            if links.root(place) != links.root(other):
                one, two = sequences[place], sequences[other]
                if identical_residues(one, two) >= identity * min(len(one), len(two)):
                    links.join(place, other)
    return links.roots()


def _by_mmseqs(sequences: Sequence[str], identity: float) -> Integers:
    """The root of each sequence's cluster: all against all, then connected components."""
    links = _Links(len(sequences))
    if len(sequences) < 2:
        return links.roots()
    program = shutil.which("mmseqs")
    if program is None:
        message = "mmseqs is not on PATH: install MMseqs2 (Debian's package mmseqs2), or take clusters by kmers"
        raise InputError(message)
    with tempfile.TemporaryDirectory(prefix="protnest-") as name:
        folder = Path(name)
        fasta = folder / "in.fasta"
        fasta.write_text("".join(f">{place}\n{_OTHER.sub('X', text)}\n" for place, text in enumerate(sequences)))
        command = [program, "easy-cluster", str(fasta), str(folder / "out"), str(folder / "work")]
        # Of the shorter one's residues (seq-id-mode 1); as many of the target's have to be aligned, and both proteins
        # are the other's target. Connected components over all hits, in one step: the cascade joins representatives.
        command += ["--min-seq-id", str(identity), "--seq-id-mode", "1", "-c", str(identity), "--cov-mode", "1"]
        command += ["--cluster-mode", "1", "--single-step-clustering", "1", "-k", "5", "-s", "7.5"]
        command += ["--max-seqs", "1000", "-e", "0.1", "--threads", str(usable_cpus()), "-v", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        table = folder / "out_cluster.tsv"
        if done.returncode or not table.is_file():
            said = (done.stderr or done.stdout).strip().splitlines()
            message = f"mmseqs failed with code {done.returncode}: {said[-1] if said else 'it says nothing'}"
            raise InputError(message)
        for line in table.read_text().splitlines():
            one, other = line.split("\t")
            links.join(int(one), int(other))
    return links.roots()
