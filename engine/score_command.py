"""`protnest score`, which the command line mounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .score_job import ScoreJobResult


def score(
    wt: Annotated[
        Path,
        typer.Option(help="Wild types: FASTA, plain or .gz; or a table with ids and sequences, as ProteinGym's list."),
    ],
    mutants: Annotated[
        list[Path] | None,
        typer.Option(
            help="Table of variants: .csv, .tsv, .parquet, or .txt with one a line; or a folder. Again for more.",
            show_default="none",
        ),
    ] = None,
    all_singles: Annotated[
        bool, typer.Option("--all-singles", help="Instead: every single substitution of each wild type.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The table with a score column: .csv, .tsv (or .gz), .parquet; a folder for several tables."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Encoder or decoder: bundled name, folder in Hugging Face layout, fair-esm .pt file, published name, "
            "exported .onnx or .engine file; several, joined by commas, are an ensemble (with --head the chain's "
            "models, smallest first).",
            show_default="nano-s; with --head the names that it was fitted on",
        ),
    ] = None,
    method: Annotated[
        Literal["masked-marginal", "wt-marginal", "mutant-marginal", "pseudo-ll"],
        typer.Option(help="What a score is; only pseudo-ll takes insertions and deletions, and decoders."),
    ] = "masked-marginal",
    compat: Annotated[
        Literal["fair-esm"] | None,
        typer.Option(help="With pseudo-ll: that package's pseudo-ppl, off by one, to reproduce published numbers."),
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="A ridge head of `probe --save`, in place of the method.", show_default="none")
    ] = None,
    chain: Annotated[
        Path | None,
        typer.Option(help="With --head: the chain whose rows it reads, a file or `nano`.", show_default="none"),
    ] = None,
    aggregate: Annotated[
        Literal["mean", "median", "min", "max"], typer.Option(help="How an ensemble's scores become one.")
    ] = "mean",
    target: Annotated[
        str | None,
        typer.Option(
            help="Id of the wild type, where a table has no column of them.", show_default="the table's file name"
        ),
    ] = None,
    offset: Annotated[
        int, typer.Option(help="Subtracted from residues' numbers: 23 where the first residue is called 24.")
    ] = 0,
    mutant_col: Annotated[str, typer.Option(help="Column of A24G, A24G:L30V.")] = "mutant",
    sequence_col: Annotated[str, typer.Option(help="Column of whole mutated sequences.")] = "mutated_sequence",
    target_col: Annotated[str, typer.Option(help="Column of wild types' ids.")] = "target",
    score_col: Annotated[str, typer.Option(help="The new column.")] = "score",
    truth_col: Annotated[str, typer.Option(help="With --report: column of measurements.")] = "DMS_score",
    on_error: Annotated[
        Literal["error", "skip"], typer.Option(help="Rows that cannot be scored: stop, or list them in a rejects file.")
    ] = "error",
    invalid: Annotated[
        Literal["error", "mask"], typer.Option(help="Letters that are no residues; mask puts X and flags the row.")
    ] = "error",
    heatmap: Annotated[
        Path | None, typer.Option(help="Picture (.png, .svg, .pdf) or page (.html) of scores.", show_default="none")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Hold the scores against measurements: Spearman, AUC, MCC, NDCG, recall.")
    ] = False,
    cutoff: Annotated[
        float | None,
        typer.Option(
            help="With --report: what is above counts as positive.", show_default="DMS_score_bin, or the median"
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"],
        typer.Option(
            help="auto: bf16 where the hardware has it, else fp32. fp16 runs on GPUs only, int8 on CPUs only."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in a batch.", min=1, show_default="4096 on a CPU, 65536 on a GPU")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what another run left in --out.")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Score variants of proteins: how well each is tolerated, by a language model or a fitted head."""
    import time

    from .assay import AssayOptions
    from .info import versions
    from .progress import ResidueProgress
    from .score_job import run_job
    from .score_models import ScoreJob

    if all_singles == bool(mutants):
        message = "give either --mutants or --all-singles"
        raise typer.BadParameter(message)
    if out is None and heatmap is None and not report:
        message = "nothing would be kept: give --out, --heatmap or --report"
        raise typer.BadParameter(message)
    models = None if model is None else tuple(name.strip() for name in model.split(","))
    if models is not None and not all(models):
        message = f"--model {model!r} holds an empty name"
        raise typer.BadParameter(message)
    if compat is not None and method != "pseudo-ll":
        message = "--compat goes with --method pseudo-ll"
        raise typer.BadParameter(message)
    if all_singles and report:
        message = "--report needs measurements, which --all-singles has none of"
        raise typer.BadParameter(message)
    job = ScoreJob(
        wild_types=wt,
        tables=tuple(mutants or ()),
        out=out,
        models=models,
        method=method,
        compat=compat,
        head=head,
        chain=chain,
        aggregate=aggregate,
        reading=AssayOptions(
            mutant_column=mutant_col,
            sequence_column=sequence_col,
            target_column=target_col,
            target=target,
            offset=offset,
            invalid=invalid,
        ),
        on_error=on_error,
        score_column=score_col,
        truth_column=truth_col,
        cutoff=cutoff,
        heatmap=heatmap,
        report=report,
        precision=precision,
        device=device,
        max_tokens=max_tokens,
        overwrite=overwrite,
    )
    console = Console(stderr=True, soft_wrap=True)
    started = time.perf_counter()
    with ResidueProgress(console, checking="checking the variants", doing=("scoring", "variants")) as progress:
        result = run_job(job, progress, details={"versions": versions()})
    facts = _facts(job.method if head is None else "ridge head", result, time.perf_counter() - started)
    if json_output:
        from .judgement import as_report

        judged = as_report(result.judgements) if report else None
        typer.echo(json.dumps(facts | {"report": judged}, allow_nan=False))
        return
    _print_facts(facts)
    if report:
        from .judgement import report_table

        Console(soft_wrap=True).print(report_table(result.judgements))


def _facts(method: str, result: ScoreJobResult, total_s: float) -> dict[str, Any]:
    from .info import peak_memory_bytes

    return {
        "files": result.files,
        "models": list(result.models),
        "method": method,
        "precision": result.precision,
        "device": result.device,
        "rows": result.rows,
        "scored": result.rows - result.rejected,
        "rejected": result.rejected,
        "rejects": str(result.outputs.rejects) if result.outputs is not None and result.rejected else None,
        "flagged": result.flagged,
        "heatmaps": [str(path) for path in result.heatmaps],
        "finished_before": result.finished_before,
        "residues": result.residues,
        "residues_per_s": round(result.residues / result.seconds, 1) if result.residues else None,
        "total_s": round(total_s, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _print_facts(facts: dict[str, Any]) -> None:
    written = [each["out"] for each in facts["files"] if each["out"] is not None]
    rows = {
        "scores": f"{len(written)} tables in {Path(written[0]).parent}" if len(written) > 1 else "".join(written),
        "model": f"{', '.join(facts['models'])}, {facts['precision']} on {facts['device']}",
        "method": facts["method"],
        "variants": f"{facts['scored']:,}",
        "left out": f"{facts['rejected']:,} rows" + (f", listed in {facts['rejects']}" if facts["rejects"] else ""),
        "with X": f"{facts['flagged']:,} rows, flagged",
        "heatmap": ", ".join(facts["heatmaps"][:3]) + (", ..." if len(facts["heatmaps"]) > 3 else ""),
        "residues/s": f"{facts['residues_per_s']:,.0f}" if facts["residues_per_s"] else "nothing left to do",
        "peak memory": f"{facts['peak_memory_bytes'] / 2**20:,.0f} MiB",
    }
    for name, count in (("left out", facts["rejected"]), ("with X", facts["flagged"])):
        if not count:
            del rows[name]
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    Console(soft_wrap=True).print(table)
