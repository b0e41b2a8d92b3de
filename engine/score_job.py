"""`protnest score` from its settings to its files: survey, run, tables, report, heatmaps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .assay import AllSingles, Assay, AssayOptions, Source, Target, fingerprint_targets, read_targets
from .atomic import write_atomically
from .chain import Chain
from .errors import InputError
from .family import Family
from .heatmap import check_heatmap, draw_heatmap
from .judgement import Judgement, as_report, judge
from .library import Progress
from .models import DEFAULT_MODEL, load_model
from .ridge_head import RidgeHead
from .score_landscape import Sightings
from .score_outputs import ScoreOutputs
from .score_run import RunResult, Scorer, ScoreRun
from .score_state import ScoreState
from .score_survey import Survey, SurveyedAssay, SurveyOptions, survey_assays
from .score_table import ScoreColumns, look_up, write_scores
from .scorers import HeadScorer, ModelScorer, language_head_hash
from .scoring import SITE_METHODS, check_method, check_variant
from .table import Table
from .variants import Variant

CLASS_COLUMN = "DMS_score_bin"
"""Where a table has it, what counts as positive in a report, as in ProteinGym's tables."""
_HEAD_METHOD = "ridge head"
_ALL_SINGLES = "all-singles"


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


@dataclass(frozen=True, kw_only=True)
class ScoreJobResult:
    """What was done.

    Attributes:
        outputs: files; None where nothing was to be written.
        models: names of the models.
        precision, device: in which, and on which, they ran.
        rows, rejected, flagged: of all tables.
        residues: that this call ran.
        seconds: that running them took.
        finished_before: nothing was left to do.
        judgements: of each table with measurements, where a report was asked for.
        heatmaps: files.
        files: for each table what was read, what was written, and how many rows.
    """

    outputs: ScoreOutputs | None
    models: tuple[str, ...]
    precision: str
    device: str
    rows: int = 0
    rejected: int = 0
    flagged: int = 0
    residues: int = 0
    seconds: float = 0.0
    finished_before: bool = False
    judgements: list[Judgement] = field(default_factory=list)
    heatmaps: list[Path] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)


class _Models:
    """The models of a job, or the one head that reads them; what is wrong with them is known once this is made."""

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
            encoder = load_model(names[place], device=job.device, precision=job.precision)
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
        return self.family[0].precision

    @property
    def device(self) -> str:
        return self.family.members[0].device.type

    def scorer(self, place: int, after_batch: Callable[[int], None]) -> Scorer:
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


def run_job(job: ScoreJob, progress: Progress, *, details: dict[str, Any] | None = None) -> ScoreJobResult:
    """Scores tables of variants, or all single substitutions.

    Args:
        job: what is asked for.
        progress: is told how far the run is.
        details: kept in the record: versions and the like.

    Raises:
        InputError: files, rows, models or settings cannot be used as they are; names which, and where.
        ValueError: method, compat or aggregate is unknown.
    """
    check_method(job.method, job.compat)
    if job.heatmap is not None:
        check_heatmap(job.heatmap)
    if job.cutoff is not None and not math.isfinite(job.cutoff):
        message = f"the cutoff is {job.cutoff}, expected a finite number"
        raise InputError(message)
    targets = read_targets(job.wild_types, invalid=job.reading.invalid)
    sources = _sources(job, targets)
    assays = [Assay(source, targets, job.reading) for source in sources]
    others = [path for path in (job.wild_types, job.head, job.chain) if path is not None]
    outputs = None if job.out is None else ScoreOutputs.at(job.out, [source.path for source in sources], others=others)
    if job.report and not any(job.truth_column in source.columns for source in sources):
        message = f"a report needs measurements: no table has a column {job.truth_column!r}; --truth-col names another"
        raise InputError(message, file=sources[0].path)
    models = _Models(job)
    columns = ScoreColumns(
        score=job.score_column,
        models=models.names,
        aggregate=job.aggregate,
        flags=job.reading.invalid == "mask",
    )
    for source in sources:
        columns.check(source)
    settings = _settings(job, models, sources, list(targets.values()))
    finished = outputs is not None and outputs.is_finished(settings, overwrite=job.overwrite)
    work = None if outputs is None else outputs.work
    if work is not None and work.is_dir():
        # Another run's folder is refused before anything of that run is written over. What a finished run was killed
        # while removing goes.
        with ScoreState(work, settings, overwrite=job.overwrite or finished) as state:
            if finished:
                state.clear()
    survey = survey_assays(assays, models.survey_options(), rejects=None if outputs is None else outputs.rejects)
    if outputs is not None:
        _begin(outputs, survey, columns, finished=finished)
    result = ScoreJobResult(
        outputs=outputs,
        models=models.names,
        precision=models.precision,
        device=models.device,
        rows=survey.rows,
        rejected=survey.rejected,
        flagged=sum(assay.flagged for assay in survey.assays),
        files=_files(survey, outputs),
    )
    if finished and job.heatmap is None:
        assert outputs is not None
        scores = [_read_scores(table, job.score_column) for table in outputs.tables]
        return _judged(job, survey, scores, replace(result, finished_before=True))
    with ScoreState(work, settings, overwrite=job.overwrite) as state:
        run = ScoreRun(survey, models.names, models.scorer, state, progress).run()
        sightings = Sightings()
        scores = _write(job, models, survey, run, columns, outputs, sightings)
        heatmaps = [] if job.heatmap is None else _draw(job, models, survey, run, sightings)
        result = replace(result, residues=run.residues, seconds=run.seconds, heatmaps=heatmaps)
        result = _judged(job, survey, scores, result)
        if outputs is not None:
            outputs.write_record(settings, files=result.files, **(details or {}))
        state.clear()
    return result


def _begin(outputs: ScoreOutputs, survey: Survey, columns: ScoreColumns, *, finished: bool) -> None:
    for surveyed, table in zip(survey.assays, outputs.tables, strict=True):
        columns.check_output(surveyed, table)
    if not finished:
        outputs.begin(rejected=survey.rejected)


def _sources(job: ScoreJob, targets: dict[str, Target]) -> list[Source]:
    if not job.tables:
        chosen = job.reading.target
        if chosen is not None and chosen not in targets:
            message = f"holds no wild type {chosen!r}; it has {', '.join([*targets][:10])}"
            raise InputError(message, file=job.wild_types)
        some = [target for name, target in targets.items() if chosen in (None, name)]
        columns = (job.reading.target_column, job.reading.mutant_column)
        return [AllSingles(some, offset=job.reading.offset, path=Path(f"{_ALL_SINGLES}.csv"), columns=columns)]
    paths: list[Path] = []
    for path in job.tables:
        inside = sorted(each for each in path.iterdir() if _is_table(each)) if path.is_dir() else [path]
        if not inside:
            message = "is a folder without .csv, .tsv or .parquet files"
            raise InputError(message, file=path)
        paths += inside
    return [Table(path) for path in paths]


def _is_table(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return not name.startswith(".") and name.endswith((".csv", ".tsv", ".parquet"))


def _settings(job: ScoreJob, models: _Models, sources: Sequence[Source], targets: Sequence[Target]) -> dict[str, Any]:
    """Everything that decides the bits of what is written."""
    reading = job.reading
    return {
        "method": _HEAD_METHOD if models.head is not None else job.method,
        "compat": job.compat,
        "models": [[member.name, member.fingerprint] for member in models.family.members],
        "language_heads": [*models.language_heads.values()],
        "head": None if models.head is None else models.head.fingerprint,
        "chain": None if models.chain is None else models.chain.fingerprint,
        "aggregate": job.aggregate,
        "precision": models.precision,
        "device": models.device,
        "max_tokens": job.max_tokens,
        "tables": [[source.path.name, source.fingerprint()] for source in sources],
        "wild_types": fingerprint_targets(targets),
        "columns": [reading.mutant_column, reading.sequence_column, reading.target_column, job.score_column],
        "target": reading.target,
        "offset": reading.offset,
        "invalid": reading.invalid,
        "on_error": job.on_error,
    }


def _files(survey: Survey, outputs: ScoreOutputs | None) -> list[dict[str, Any]]:
    written = [None] * len(survey.assays) if outputs is None else [str(table) for table in outputs.tables]
    return [
        {"table": str(each.assay.source.path), "out": out, "rows": each.rows, "rejected": each.rejected}
        for each, out in zip(survey.assays, written, strict=True)
    ]


def _write(
    job: ScoreJob,
    models: _Models,
    survey: Survey,
    run: RunResult,
    columns: ScoreColumns,
    outputs: ScoreOutputs | None,
    sightings: Sightings,
) -> list[Any]:
    options = models.survey_options()
    scores = []
    for number, surveyed in enumerate(survey.assays):
        found = look_up(survey, surveyed, run, by_site=options.by_site, against_wild_type=options.with_wild_type)
        out = None if outputs is None else outputs.tables[number]
        if job.heatmap is None:
            scores.append(write_scores(surveyed, found, columns, out))
        else:
            scores.append(write_scores(surveyed, found, columns, out, after_rows=sightings.see))
    return scores


def _read_scores(table: Path, column: str) -> Any:
    """The scores that an earlier run wrote, float32 (N,)."""
    read = Table(table)
    place = read.place(column)
    return np.array([float(row.cells[place]) for row in read.rows()], dtype=np.float32)


def _draw(job: ScoreJob, models: _Models, survey: Survey, run: RunResult, sightings: Sightings) -> list[Path]:
    assert job.heatmap is not None
    by_site = models.survey_options().by_site
    drawn: list[Path] = []
    for target in sightings.targets:
        path = job.heatmap
        if len(sightings.targets) > 1:
            safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in target.id)
            path = path.with_name(f"{path.stem}-{safe}{path.suffix}")
            # Two ids may differ in what file names lack.
            if path in drawn:
                path = path.with_name(f"{path.stem}-{len(drawn) + 1}{path.suffix}")
        landscape = sightings.landscape(
            target,
            survey.proteins[target.sequence].places,
            run.values[target.sequence] if by_site else None,
            aggregate=job.aggregate,
            method=_HEAD_METHOD if models.head is not None else job.method,
            model=", ".join(models.names),
            offset=job.reading.offset,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_heatmap(path, landscape)
        drawn.append(path)
    return drawn


def _judged(job: ScoreJob, survey: Survey, scores: Sequence[Any], result: ScoreJobResult) -> ScoreJobResult:
    if not job.report:
        return result
    found: list[Judgement] = []
    for surveyed, score_N in zip(survey.assays, scores, strict=True):
        if job.truth_column in surveyed.numbers:
            found += _judge(job, surveyed, score_N)
    if result.outputs is not None:
        text = json.dumps(as_report(found, models=list(result.models)), indent=1, allow_nan=False) + "\n"
        write_atomically(result.outputs.report, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return replace(result, judgements=found)


def _judge(job: ScoreJob, surveyed: SurveyedAssay, score_N: Any) -> list[Judgement]:
    """A table's judgements, those of each wild type that its rows name apart."""
    truth_N, is_single_N = np.array(surveyed.numbers[job.truth_column]), surveyed.is_single()
    classes_N = np.array(surveyed.numbers.get(CLASS_COLUMN, ()))
    targets_N = np.array(surveyed.targets)
    found: list[Judgement] = []
    for target, number in surveyed.target_ids.items():
        rows = targets_N == number
        judged = rows & ~np.isnan(truth_N)
        has_classes = job.cutoff is None and classes_N.size and not np.isnan(classes_N[judged]).any()
        found += judge(
            truth_N[rows],
            score_N[rows],
            is_single_N=is_single_N[rows],
            target=target,
            positive_N=np.nan_to_num(classes_N[rows]) if has_classes else None,
            cutoff=job.cutoff,
        )
    return found
