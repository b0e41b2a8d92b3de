"""`protnest score` from its settings to its files: survey, run, tables, report, heatmaps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .assay import AllSingles, Assay, Source, Target, fingerprint_targets, read_targets
from .atomic import write_atomically
from .errors import InputError
from .heatmap import check_heatmap, draw_heatmap
from .judgement import Judgement, as_report, judge
from .library import Progress
from .score_landscape import Sightings
from .score_models import CLASS_COLUMN, HEAD_METHOD, ScoreJob, ScoreModels
from .score_outputs import ScoreOutputs
from .score_run import RunResult, ScoreRun
from .score_state import ScoreState
from .score_survey import Survey, SurveyedAssay, survey_assays
from .score_table import ScoreColumns, look_up, write_scores
from .scoring import check_method
from .table import Table


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
    _check(job)
    targets = read_targets(job.wild_types, invalid=job.reading.invalid)
    sources = _sources(job, targets)
    assays = [Assay(source, targets, job.reading) for source in sources]
    outputs = None if job.out is None else _outputs(job, job.out, sources)
    if job.report and not any(job.truth_column in source.columns for source in sources):
        message = f"a report needs measurements: no table has a column {job.truth_column!r}; --truth-col names another"
        raise InputError(message, file=sources[0].path)
    models = ScoreModels(job)
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
    if outputs is not None and outputs.work.is_dir():
        # Another run's folder is refused before anything of that run is written over. What a finished run was killed
        # while removing goes.
        with ScoreState(outputs.work, settings, overwrite=job.overwrite or finished) as state:
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
    return _run(job, models, survey, columns, settings, progress, result, details or {})


def _check(job: ScoreJob) -> None:
    """What can be known before anything is read."""
    check_method(job.method, job.compat)
    if job.heatmap is not None:
        check_heatmap(job.heatmap)
    if job.cutoff is not None and not math.isfinite(job.cutoff):
        message = f"the cutoff is {job.cutoff}, expected a finite number"
        raise InputError(message)


def _outputs(job: ScoreJob, out: Path, sources: Sequence[Source]) -> ScoreOutputs:
    others = [path for path in (job.wild_types, job.head, job.chain) if path is not None]
    return ScoreOutputs.at(out, [source.path for source in sources], others=others)


def _run(
    job: ScoreJob,
    models: ScoreModels,
    survey: Survey,
    columns: ScoreColumns,
    settings: dict[str, Any],
    progress: Progress,
    result: ScoreJobResult,
    details: dict[str, Any],
) -> ScoreJobResult:
    """Runs what the survey found, and writes tables, heatmaps and report; the record comes last."""
    outputs = result.outputs
    with ScoreState(None if outputs is None else outputs.work, settings, overwrite=job.overwrite) as state:
        run = ScoreRun(survey, models.names, models.scorer, state, progress).run()
        sightings = Sightings()
        scores = _write(job, models, survey, run, columns, outputs, sightings)
        heatmaps = [] if job.heatmap is None else _draw(job, models, survey, run, sightings)
        result = replace(result, residues=run.residues, seconds=run.seconds, heatmaps=heatmaps)
        result = _judged(job, survey, scores, result)
        if outputs is not None:
            outputs.write_record(settings, files=result.files, **details)
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
        return [AllSingles(some, offset=job.reading.offset, path=Path("all-singles.csv"), columns=columns)]
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


def _settings(
    job: ScoreJob, models: ScoreModels, sources: Sequence[Source], targets: Sequence[Target]
) -> dict[str, Any]:
    """Everything that decides the bits of what is written."""
    reading = job.reading
    return {
        "method": HEAD_METHOD if models.head is not None else job.method,
        "compat": job.compat,
        "models": [[name, fingerprint] for name, fingerprint in models.fingerprints],
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
    models: ScoreModels,
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


def _draw(job: ScoreJob, models: ScoreModels, survey: Survey, run: RunResult, sightings: Sightings) -> list[Path]:
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
            method=HEAD_METHOD if models.head is not None else job.method,
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
