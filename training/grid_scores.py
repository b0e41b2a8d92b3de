"""How a grid's students are judged: which proteins choose, which judge, and what is kept of each student.

Shapes: B proteins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.atomic import write_atomically
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.models import load_checkpoint
from .corpus import Share
from .decoder_prediction import DecoderPredictor
from .estimate import exp, ratio
from .grid_report import ProteinScores
from .prediction import EncoderPredictor
from .token_scores import score_tokens

HALVES = ("selection", "judged")


def held_out_halves(held_out: Share, most: int, *, file: Path) -> dict[str, list[str]]:
    """Distinct held-out proteins in two halves: `selection`, to choose settings by, and `judged`, the larger one.

    The draw has one seed, so that all students, whatever theirs, are asked the same.

    Args:
        held_out: proteins that nobody is trained on.
        most: of both halves together.
        file: where they come from, for messages.

    Raises:
        InputError: there are fewer than two.
    """
    distinct = list(dict.fromkeys(held_out.sequences))
    drawn = np.random.default_rng(0).permutation(len(distinct))[:most].tolist()
    if len(drawn) < 2:
        message = f"{len(drawn)} held-out proteins: a grid needs one to choose by and one to judge by"
        raise InputError(message, file=file)
    middle = len(drawn) // 2
    return {
        "selection": [distinct[place] for place in sorted(drawn[:middle])],
        "judged": [distinct[place] for place in sorted(drawn[middle:])],
    }


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """What is kept of a student.

    Attributes:
        halves: by name of the half: `nll` and `residues` of each protein.
        diverged: why there is no student, None where there is one.
    """

    halves: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    diverged: str | None = None

    @classmethod
    def read(cls, path: Path) -> RunScores:
        """Raises InputError where the file is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            scores = cls(halves=content["halves"], diverged=content["diverged"])
            if scores.diverged is None:
                for half in HALVES:
                    scores.log_perplexity(half)
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"not readable as a student's scores ({error}); without it the student is judged anew"
            raise InputError(message, file=path) from error
        return scores

    def write(self, path: Path) -> None:
        text = json.dumps(asdict(self), allow_nan=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def proteins(self, half: str) -> ProteinScores:
        """The proteins of one half."""
        found = self.halves[half]
        return ProteinScores(nll_B=np.array(found["nll"], float), residues_B=np.array(found["residues"], float))

    def log_perplexity(self, half: str) -> float:
        """Nats a residue; infinite where training diverged."""
        return math.inf if self.diverged is not None else self.proteins(half).log_perplexity


class Judges:
    """Asks models of the same held-out proteins.

    Args:
        halves: of `held_out_halves`.
        device, precision: as `load_model` takes them.
    """

    def __init__(self, halves: Mapping[str, list[str]], *, device: str, precision: str) -> None:
        self._halves, self._device, self._precision = halves, device, precision

    def score(self, model: str | Path) -> RunScores:
        """Scores of a checkpoint, as `load_model` takes it."""
        loaded = load_checkpoint(model, device=self._device, precision=self._precision)
        predictor = EncoderPredictor(loaded) if isinstance(loaded, Encoder) else DecoderPredictor(loaded)
        halves = {}
        for half, sequences in self._halves.items():
            scored = score_tokens(predictor, sequences).model
            halves[half] = {"nll": scored.sums_B(scored.nll_N).tolist(), "residues": scored.residues_B.tolist()}
        return RunScores(halves=halves)

    def whole(self, path: Path, model: str | Path) -> dict[str, Any]:
        """Perplexity per residue of a model on what is judged by, as JSON; kept in a file, and asked once."""
        if path.exists():
            scores = RunScores.read(path)
        else:
            scores = self.score(model)
            scores.write(path)
        found = scores.proteins("judged")
        return asdict(ratio(found.nll_B, found.residues_B, after=exp))
