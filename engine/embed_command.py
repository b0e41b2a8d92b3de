"""`protnest embed`, which the command line mounts."""

from __future__ import annotations

import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table


def _parse_shard(text: str) -> str:
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        message = f"{text!r} is not I/N with 1 <= I <= N"
        raise typer.BadParameter(message)
    return text


def _check_usage(
    library: Path, id_col: str | None, seq_col: str | None, wt: Path | None, target: str | None, offset: int
) -> None:
    """What does not go together, before anything is read."""
    from .table import is_table

    if wt is None and (target is not None or offset):
        message = "--target and --offset go with --wt"
        raise typer.BadParameter(message)
    if wt is not None:
        if not is_table(library) and Path(library.name.lower().removesuffix(".gz")).suffix != ".txt":
            message = f"--wt makes proteins of variants: {library.name} is no .csv, .tsv, .parquet or .txt"
            raise typer.BadParameter(message)
    elif not is_table(library) and (id_col is not None or seq_col is not None):
        message = f"--id-col and --seq-col are of tables: {library.name} is no .csv, .tsv or .parquet"
        raise typer.BadParameter(message)


def embed(
    library: Annotated[
        str,
        typer.Argument(
            help="Proteins: FASTA, plain or .gz; or a table: .csv, .tsv (or .gz), .parquet. With --wt a table of "
            "variants, or a .txt with one a line. With --engine ray it may be a URI.",
            metavar="FILE",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Folder for the embeddings; an unfinished run in it is resumed. With --engine ray it may be a URI.",
            metavar="DIRECTORY",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Bundled name, folder in Hugging Face layout, fair-esm .pt file, published name, or exported .onnx or "
            ".engine file; with --chain several, smallest first, joined by commas.",
            show_default="nano-s; with --chain the names that it was fitted on",
        ),
    ] = None,
    id_col: Annotated[
        str | None,
        typer.Option(
            help="Of a table: column of ids; with --wt of A24G, A24G:L30V.",
            show_default="id, name, accession or entry; with --wt mutant",
        ),
    ] = None,
    seq_col: Annotated[
        str | None,
        typer.Option(
            help="Of a table: column of sequences; with --wt of whole mutated ones.",
            show_default="sequence, seq or protein_sequence; with --wt mutated_sequence",
        ),
    ] = None,
    wt: Annotated[
        Path | None,
        typer.Option(
            help="FILE is a table of variants of this: FASTA, or a table with ids and sequences.", show_default="none"
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="With --wt: id of the wild type, where FILE has no column `target`.", show_default="FILE's name"
        ),
    ] = None,
    offset: Annotated[
        int, typer.Option(help="With --wt: subtracted from residues' numbers: 23 where the first is called 24.")
    ] = 0,
    chain: Annotated[
        Path | None,
        typer.Option(help="Chain file of `fit-chain`, or `nano`: makes one nested row of several models' embeddings."),
    ] = None,
    dims: Annotated[
        int | None,
        typer.Option(
            help="With --chain: keep so many dimensions, and run no model beyond the one that they need.",
            min=1,
            show_default="all",
        ),
    ] = None,
    resident: Annotated[
        bool,
        typer.Option(
            "--resident/--sequential",
            help="Several models: keep all in memory, or run one after another over each output shard.",
        ),
    ] = True,
    pool: Annotated[
        Literal["mean", "max", "bos", "residue"], typer.Option(help="One vector a protein, or one a residue.")
    ] = "mean",
    layer: Annotated[
        int | None,
        typer.Option(
            help="Embeddings of this layer, as fair-esm counts them: 0 is the token embedding, -1 the last layer.",
            show_default="the last",
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
    output_format: Annotated[
        Literal["safetensors", "parquet", "h5", "npy", "pt", "lance"] | None,
        typer.Option(
            "--format",
            help="Beside the safetensors shards, write this format at the end. With --engine ray: parquet or lance.",
            show_default="safetensors; with --engine ray parquet",
        ),
    ] = None,
    engine: Annotated[
        Literal["native", "ray"], typer.Option(help="native: this machine. ray: a Ray cluster, or a local one.")
    ] = "native",
    storage_dtype: Annotated[Literal["fp32", "fp16"], typer.Option(help="How embeddings are stored.")] = "fp32",
    shard: Annotated[
        str, typer.Option(help="I/N: of all output shards, embed every N-th from the I-th on.", callback=_parse_shard)
    ] = "1/1",
    shard_records: Annotated[int, typer.Option(help="Most proteins in an output shard.", min=1)] = 2048,
    dedup: Annotated[bool, typer.Option("--dedup", help="Embed and store equal sequences once.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the work: one a GPU, or several on a CPU.",
            min=1,
            show_default="every GPU; on a CPU one",
        ),
    ] = None,
    long: Annotated[
        Literal["window", "full", "truncate", "error"],
        typer.Option(help="Proteins beyond the length that the model was trained on."),
    ] = "window",
    invalid: Annotated[Literal["mask", "skip", "error"], typer.Option(help="Letters outside the alphabet.")] = "error",
    overwrite: Annotated[bool, typer.Option(help="Throw away a run of other settings in --out.")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Embed a library of proteins."""
    from .embedder_plan import EmbedderPlan
    from .embeddings import read_embeddings
    from .formats import check_format, convert
    from .info import peak_memory_bytes, versions
    from .library import LibraryOptions, embed_library
    from .library_source import open_source
    from .progress import ResidueProgress

    _check_usage(Path(library), id_col, seq_col, wt, target, offset)
    if chain is not None and layer is not None:
        message = "--layer with --chain: a chain is fitted on last layers"
        raise typer.BadParameter(message)
    if engine == "native":
        if output_format == "lance":
            message = "--format lance goes with --engine ray"
            raise typer.BadParameter(message)
        check_format(output_format or "safetensors")
    started = time.perf_counter()
    plan = EmbedderPlan(
        models=() if model is None else tuple(model.split(",")),
        chain=chain,
        dims=dims,
        resident=resident,
        device=device,
        precision=precision,
        pool=pool,
        long=long,
        layer=layer,
        max_tokens=max_tokens,
    )
    index, count = map(int, shard.split("/"))
    options = LibraryOptions(
        invalid=invalid,
        storage_dtype=storage_dtype,
        shard=(index, count),
        shard_records=shard_records,
        dedup=dedup,
        workers=workers,
    )
    with ResidueProgress(Console(stderr=True, soft_wrap=True)) as progress:
        reading = partial(
            open_source,
            invalid=invalid,
            id_column=id_col,
            sequence_column=seq_col,
            wild_types=wt,
            target=target,
            offset=offset,
        )
        details = {"versions": versions()}
        if engine == "ray":
            from .ray_library import embed_on_ray

            result = embed_on_ray(
                library,
                out,
                plan,
                options,
                output_format=output_format or "parquet",
                open_source=reading,
                details=details,
                overwrite=overwrite,
                progress=progress,
            )
        else:
            result = embed_library(
                reading(Path(library)),
                Path(out),
                plan,
                options,
                details=details,
                overwrite=overwrite,
                progress=progress,
            )
    written: str | Path = out
    if engine == "native" and output_format not in (None, "safetensors"):
        written = convert(read_embeddings(out), Path(out), output_format)
    seconds = progress.seconds
    report: dict[str, Any] = {
        "out": str(written),
        "model": ",".join(result.models),
        "precision": result.settings["precision"],
        "device": result.settings["device"],
        "workers": result.workers,
        "width": result.settings["width"],
        "sequences": result.embedded + result.resumed,
        "embedded_now": result.embedded,
        "resumed": result.resumed,
        "rejected": result.survey.rejected,
        "duplicate_ids": result.duplicates,
        "restarted_workers": result.restarts,
        "flags": result.flags,
        "residues": result.residues,
        "residues_per_s": round(result.residues / seconds, 1) if result.residues else None,
        "embedding_s": round(seconds, 3),
        "seconds": {name: round(seconds, 3) for name, seconds in vars(result.times).items()},
        "idle_share": None if result.idle_share is None else round(result.idle_share, 4),
        "total_s": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if json_output:
        typer.echo(json.dumps(report))
    else:
        _print_report(report)


def _print_report(report: dict[str, Any]) -> None:
    rate = report["residues_per_s"]
    rows = {
        "embeddings": report["out"],
        "model": f"{report['model']}, {report['precision']} on {report['device']}",
        "sequences": f"{report['sequences']:,}" + (f" ({report['resumed']:,} resumed)" if report["resumed"] else ""),
        "residues": f"{report['residues']:,}",
        "residues/s": f"{rate:,.0f}" if rate else "nothing left to do",
        "peak memory": f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB",
    }
    for flag, count in report["flags"].items():
        rows[flag] = f"{count:,} sequences"
    if report["idle_share"] is not None:
        rows["model idle"] = f"{report['idle_share']:.1%} of the time: {_waits(report['seconds'])}"
    if report["restarted_workers"]:
        rows["workers"] = f"{report['workers']}; {report['restarted_workers']} died and were replaced, nothing is lost"
    if report["rejected"]:
        rows["left out"] = f"{report['rejected']:,} records, listed in rejects.csv"
    if report["duplicate_ids"]:
        rows["duplicate ids"] = f"{report['duplicate_ids']:,} rows, kept"
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(soft_wrap=True).print(table)


def _waits(seconds: dict[str, float]) -> str:
    words = {
        "loading": "loading the model",
        "checking": "checking the library",
        "awaiting_reader": "waiting for the reader",
        "awaiting_writer": "for the disk",
        "finishing": "merging the index",
    }
    return ", ".join(f"{text} {seconds[name]:.1f} s" for name, text in words.items())
