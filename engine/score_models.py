"""What `protnest score` is asked for, and the models that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .assay import AssayOptions
from .chain import Chain
from .errors import InputError
from .family import Family
from .models import DEFAULT_MODEL, load_encoder
from .ridge_head import RidgeHead
from .score_run import Scorer
from .score_survey import SurveyOptions
from .scorers import HeadScorer, ModelScorer, language_head_hash
from .scoring import SITE_METHODS, check_variant
from .variants import Variant

CLASS_COLUMN = "DMS_score_bin"
"""Where a table has it, what counts as positive in a report, as in ProteinGym's tables."""
HEAD_METHOD = "ridge head"


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """Everything that `protnest score` is asked for.

    Attributes:
        wild_types: FASTA file, or table, see `assay.read_targets`.
        tables: of variants, or folders of them; none for all single substitutions of every wild type.
        out: a file for one table, a folder for several; None writes none.
        models: names, folders or files; with `chain` the chain's, smallest first. None takes the head's, the chain's,
            or the default.
        method, compat: see `scoring`.
        head, chain: files of a fitted ridge head, which then scores in the method's place, and of the chain it reads.
        aggregate: how the scores of several models become one.
        reading: how rows are read.
        on_error: "error" stops at a row that cannot be scored; "skip" lists it among the rejects.
        score_column: the name of the new column.
        truth_column: measurements for the report.
        cutoff: above it a measurement is positive; by default the assay's median, or its column DMS_score_bin.
        heatmap: .png, .svg, .pdf or .html; with several wild types their ids are put into the name.
        report: whether scores are judged by the measurements.
        precision, device, max_tokens: how models run.
        overwrite: throw away what another run left.
    """

    wild_types: Path
    tables: tuple[Path, ...] = ()
    out: Path | None = None
    models: tuple[str, ...] | None = None
    method: str = "masked-marginal"
    compat: str | None = None
    head: Path | None = None
    chain: Path | None = None
    aggregate: str = "mean"
    reading: AssayOptions = field(default_factory=AssayOptions)
    on_error: Literal["error", "skip"] = "error"
    score_column: str = "score"
    truth_column: str = "DMS_score"
    cutoff: float | None = None
    heatmap: Path | None = None
    report: bool = False
    precision: str = "auto"
    device: str = "auto"
    max_tokens: int | None = None
    overwrite: bool = False


class ScoreModels:
    """The models of a job, or the one head that reads them; what is wrong with them is known once this is made.

    Args:
        job: what is asked for.

    Attributes:
        head, chain: what was read of the job's files.
        family: the models.
        language_heads: hashes of their language-model heads, by place, where these score.

    Raises:
        InputError: a file cannot be read, a model is none, or head, chain and models do not belong together.
    """

    def __init__(self, job: ScoreJob) -> None:
        self._job = job
        self.head = None if job.head is None else RidgeHead.load(job.head)
        self.chain = None if job.chain is None else Chain.load(job.chain)
        names = job.models
        if self.head is not None:
            names = names or tuple(model.name for model in self.head.models)
        elif self.chain is not None:
            message = "a chain is read by a ridge head: --chain goes with --head"
            raise InputError(message)
        names = names or (DEFAULT_MODEL,)
        self.language_heads: dict[int, str] = {}

        def load(place: int) -> Any:
            encoder = load_encoder(names[place], device=job.device, precision=job.precision)
            if self.head is None:
                self.language_heads[place] = language_head_hash(encoder)
            return encoder

        self.family = Family(load, len(names), resident=self.head is not None or len(names) == 1)
        if self.head is not None:
            self.head.check_models(self.family.members, self.chain)

    @property
    def names(self) -> tuple[str, ...]:
        """Of those whose scores are aggregated."""
        members = self.family.members
        return tuple(member.name for member in (members[-1:] if self.head is not None else members))

    @property
    def precision(self) -> str:
        """In which they run."""
        return self.family[0].precision

    @property
    def device(self) -> str:
        """On which they run."""
        return self.family.members[0].device.type

    def scorer(self, place: int, after_batch: Callable[[int], None]) -> Scorer:
        """What asks the model at a place."""
        job = self._job
        if self.head is not None:
            return HeadScorer(
                self.head, self.family, chain=self.chain, max_tokens=job.max_tokens, after_batch=after_batch
            )
        return ModelScorer(
            self.family[place],
            method=job.method,
            compat=job.compat,
            max_tokens=job.max_tokens,
            after_batch=after_batch,
        )

    def survey_options(self) -> SurveyOptions:
        """What the first reading asks of rows, for these models."""
        job, head = self._job, self.head
        classes = (CLASS_COLUMN,) if job.report and job.cutoff is None else ()
        numbers = (job.truth_column, *classes) if job.report else ()
        if head is not None:
            return SurveyOptions(
                by_site=False,
                by_place=head.pooling == "site",
                check=lambda variant, wild_type: _check_head(head, variant, wild_type),
                on_error=job.on_error,
                number_columns=numbers,
                class_columns=classes,
            )
        return SurveyOptions(
            by_site=job.method in SITE_METHODS,
            with_wild_type=job.method == "pseudo-ll" and job.compat is None,
            check=lambda variant, wild_type: check_variant(variant, job.method),
            on_error=job.on_error,
            number_columns=numbers,
            class_columns=classes,
        )


def _check_head(head: RidgeHead, variant: Variant, wild_type: str) -> None:
    head.check_variants([variant], wild_type=wild_type)
