"""What `protnest score` is asked for, and the models that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .assay import AssayOptions
from .chain import Chain
from .decoder import Decoder
from .errors import InputError
from .exported_encoder import AnyEncoder
from .family import Family
from .likelihoods import Reach, check_decoder_method
from .models import DEFAULT_MODEL, load_any_encoder, load_model
from .ridge_head import RidgeHead
from .score_run import Scorer
from .score_survey import SurveyOptions
from .scorers import HeadScorer, LikelihoodScorer, ModelScorer, language_head_hash
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
        models: names, folders or files, exported ones among them; with `chain` the chain's, smallest first. None takes
            the head's, the chain's, or the default.
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
        family: the encoders that a head reads, None without one.
        names: of the models whose scores are aggregated.
        fingerprints: name and hash of each model that runs.
        language_heads: where the models themselves score, by place: hash of an encoder's language-model head, or of a
            decoder's vocabulary, of which the model's own knows nothing.
        precision, device: in which, and on which, they run.

    Raises:
        InputError: a file cannot be read, a model is none, the method is not defined for it, or head, chain and models
            do not belong together.
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
        self._paths = names or (DEFAULT_MODEL,)
        self.family: Family | None = None
        self.language_heads: dict[int, str] = {}
        self._reaches: list[Reach] = []
        self._reached: set[str] = set()
        self._held: tuple[int, AnyEncoder | Decoder] | None = None
        if self.head is not None:
            self._read_family(self.head, self._paths)
        else:
            self._meet()

    def _read_family(self, head: RidgeHead, paths: Sequence[str]) -> None:
        job = self._job
        self.family = Family(
            lambda place: load_any_encoder(paths[place], device=job.device, precision=job.precision), len(paths)
        )
        members = self.family.members
        head.check_models(members, self.chain)
        self.names: tuple[str, ...] = (members[-1].name,)
        self.fingerprints = [(member.name, member.fingerprint) for member in members]
        self.precision, self.device = self.family[0].precision, members[0].device.type

    def _meet(self) -> None:
        """Loads each model once, to learn what it is."""
        self.fingerprints = []
        for place in range(len(self._paths)):
            model = self._model(place)
            if isinstance(model, Decoder):
                check_decoder_method(model.name, self._job.method, self._job.compat)
                self.language_heads[place] = model.vocabulary.fingerprint
                self._reaches.append(Reach.of(model))
            else:
                self.language_heads[place] = language_head_hash(model)
            self.fingerprints.append((model.name, model.fingerprint))
            # All are asked for in the same precision, on the same device.
            self.precision, self.device = model.precision, model.device.type
        self.names = tuple(name for name, _ in self.fingerprints)

    def _model(self, place: int) -> AnyEncoder | Decoder:
        """The model at a place; the one before it is let go of first."""
        if self._held is None or self._held[0] != place:
            self._held = None
            model = load_model(self._paths[place], device=self._job.device, precision=self._job.precision)
            self._held = (place, model)
        return self._held[1]

    def scorer(self, place: int, after_batch: Callable[[int], None]) -> Scorer:
        """What asks the model at a place."""
        job = self._job
        if self.head is not None and self.family is not None:
            return HeadScorer(
                self.head, self.family, chain=self.chain, max_tokens=job.max_tokens, after_batch=after_batch
            )
        model = self._model(place)
        if isinstance(model, Decoder):
            return LikelihoodScorer(model, max_tokens=job.max_tokens, after_batch=after_batch)
        return ModelScorer(
            model, method=job.method, compat=job.compat, max_tokens=job.max_tokens, after_batch=after_batch
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
            check=self._check,
            on_error=job.on_error,
            number_columns=numbers,
            class_columns=classes,
        )

    def _check(self, variant: Variant, wild_type: str) -> None:
        check_variant(variant, self._job.method)
        for reach in self._reaches:
            reach.check(variant.sequence)
        if wild_type not in self._reached:
            for reach in self._reaches:
                reach.check(wild_type)
            self._reached.add(wild_type)


def _check_head(head: RidgeHead, variant: Variant, wild_type: str) -> None:
    head.check_variants([variant], wild_type=wild_type)
