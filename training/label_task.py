"""Embeddings judged by what a ridge classifier makes of them: classes of proteins, or states of their residues.

Training proteins stream by once, into Grams; then the proteins for testing are labelled. A protein's class is read from
the mean over its residues, a residue's state from its own row. Nothing is kept of either but sums and labels.

Shapes: R labelled rows (proteins or residues), D width of a model, W of a representation, B proteins, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..engine.bootstrap import finite, interval
from ..engine.chain import Chain
from ..engine.embedder import Embedder
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.family import Family
from .confusion import Floats, Labels, accuracy, bootstrapped, confusions, macro_f1
from .label_probe import LabelProbe, fold_of
from .labelled import Labelled
from .paired_difference import Against, held_against
from .representation import Representation, representations, rivals

_PROTEINS_AT_ONCE = 64
_MEASURES: dict[str, Callable[[Floats], Floats]] = {"accuracy": accuracy, "macro_f1": macro_f1}


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """How well one representation tells classes apart.

    Attributes:
        representation: "raw", "nested", "naive" or "concat".
        regressor: of the chain behind it, None without one.
        model: the largest model behind it.
        width: features.
        measure: "accuracy" (over residues' three states that is Q3) or "macro_f1".
        score, low, high: on the proteins for testing, with a 95 % interval by bootstrap over proteins.
        against: differences of `score` to others'.
    """

    representation: str
    regressor: str | None
    model: str
    width: int
    measure: str
    score: float | None
    low: float | None
    high: float | None
    against: tuple[Against, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What a task says.

    Attributes:
        kind: "protein" or "residue": what has a label.
        classes: by name, sorted.
        proteins, rows: how many, for training and for testing.
        majority: accuracy on the test rows of always naming the training rows' most frequent class.
        results: of each representation and measure.
    """

    kind: str
    classes: tuple[str, ...]
    proteins: tuple[int, int]
    rows: tuple[int, int]
    majority: float
    results: tuple[LabelResult, ...]

    def as_json(self, **facts: object) -> dict[str, Any]:
        """What the JSON file holds."""
        return {**facts, **asdict(self)}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Labelled rows of some proteins: each model's embeddings, and for each row its class and its protein."""

    raw: list[Floats]
    labels_R: Labels
    proteins_R: Labels


def _blocks(
    embedders: Sequence[Embedder],
    proteins: Sequence[Labelled],
    numbers: dict[str, int],
    after_batch: Callable[[int], None],
) -> Iterator[_Block]:
    for begin in range(0, len(proteins), _PROTEINS_AT_ONCE):
        some = proteins[begin : begin + _PROTEINS_AT_ONCE]
        labels_R = np.array([numbers.get(label, -1) for protein in some for label in protein.labels], dtype=np.int64)
        proteins_R = np.repeat(np.arange(begin, begin + len(some)), [len(protein.labels) for protein in some])
        known = labels_R >= 0
        raw = []
        for embedder in embedders:
            rows = embedder.embed_clean([protein.sequence for protein in some], after_batch=after_batch)
            rows_RD = rows if isinstance(rows, np.ndarray) else np.concatenate(rows)
            raw.append(rows_RD[known].astype(np.float64))
        yield _Block(raw=raw, labels_R=labels_R[known], proteins_R=proteins_R[known])


def probe_labels(
    encoders: Sequence[Encoder],
    proteins: Sequence[Labelled],
    *,
    chains: Sequence[Chain] = (),
    seed: int = 0,
    after_batch: Callable[[int], None] = lambda residues: None,
) -> LabelReport:
    """Judges each model alone, each nested prefix, naive rows and plain concatenations on labels.

    Args:
        encoders: smallest first.
        proteins: for training and for testing; all with one label, or all with one a residue.
        chains: nested or naive, whose models these are.
        seed: of the bootstrap.
        after_batch: called with the residues that have just been run, for each model.

    Raises:
        InputError: no protein is there for training or testing, fewer than two classes, or models are not a chain's.
    """
    family = Family.of(list(encoders))
    for chain in chains:
        chain.check_models(family.members)
    known = [protein for protein in proteins if any(protein.labels)]
    train, test = ([protein for protein in known if protein.is_test == is_test] for is_test in (False, True))
    if not train or not test:
        message = f"{len(train)} labelled proteins for training and {len(test)} for testing: both are needed"
        raise InputError(message)
    counts = Counter(label for protein in train for label in protein.labels if label)
    classes = sorted({label for protein in known for label in protein.labels if label})
    if len(counts) < 2:
        message = f"{len(counts)} classes in the training proteins are too few: at least 2"
        raise InputError(message)
    numbers = {label: number for number, label in enumerate(classes)}
    is_residue = any(len(protein.labels) > 1 for protein in proteins)
    embedders = [Embedder(encoder, pool="residue" if is_residue else "mean") for encoder in encoders]
    names = [encoder.name for encoder in encoders]
    shapes = representations(names, [np.zeros((0, encoder.dim)) for encoder in encoders], chains)
    probes = [LabelProbe(each.rows_NW.shape[1], len(classes)) for each in shapes]
    folds = np.array([fold_of(protein.sequence) for protein in train])
    for block in _blocks(embedders, train, numbers, after_batch):
        folds_R = folds[block.proteins_R]
        for probe, each in zip(probes, representations(names, block.raw, chains), strict=True):
            for fold in np.unique(folds_R).tolist():
                member = folds_R == fold
                probe.add(each.rows_NW[member], block.labels_R[member], fold=fold)
    for probe in probes:
        probe.fit()
    tested = [np.zeros((len(test), len(classes), len(classes))) for _ in probes]
    for block in _blocks(embedders, test, numbers, after_batch):
        for place, each in enumerate(representations(names, block.raw, chains)):
            predicted_R = probes[place].predict(each.rows_NW)
            tested[place] += confusions(block.labels_R, predicted_R, block.proteins_R, (len(test), len(classes)))
    truly_C = tested[0].sum(axis=(0, 2))
    return LabelReport(
        kind="residue" if is_residue else "protein",
        classes=tuple(classes),
        proteins=(len(train), len(test)),
        rows=(sum(counts.values()), int(truly_C.sum())),
        majority=float(truly_C[numbers[counts.most_common(1)[0][0]]] / truly_C.sum()),
        results=tuple(_results(shapes, tested, seed)),
    )


def _results(listed: Sequence[Representation], tested: Sequence[Floats], seed: int) -> Iterator[LabelResult]:
    others = rivals(listed)
    drawn = [bootstrapped(counts_BCC, seed=seed) for counts_BCC in tested]
    for measure, score in _MEASURES.items():
        scores = [float(score(counts_BCC.sum(axis=0))) for counts_BCC in tested]
        samples = [score(counts_SCC) for counts_SCC in drawn]
        for place, each in enumerate(listed):
            low, high = interval(samples[place])
            yield LabelResult(
                representation=each.kind,
                regressor=each.regressor,
                model=each.model,
                width=each.rows_NW.shape[1],
                measure=measure,
                score=finite(scores[place]),
                low=finite(low),
                high=finite(high),
                against=held_against(listed, place, others[place], scores, samples),
            )
