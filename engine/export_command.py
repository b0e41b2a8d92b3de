"""`protnest export`, which the command line mounts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table


def export(
    out: Annotated[Path, typer.Option(help="The file.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="As `embed` takes it; with --chain several, smallest first, joined by commas.",
            show_default="nano-s; with --chain the names that it was fitted on",
        ),
    ] = None,
    chain: Annotated[
        Path | None,
        typer.Option(help="Chain file of `fit-chain`, or `nano`: its projection becomes part of the graph."),
    ] = None,
    target: Annotated[
        Literal["onnx", "tensorrt-rtx", "tensorrt"],
        typer.Option(help="What is written: a graph, an engine for RTX cards, or an engine for this machine's GPU."),
    ] = "onnx",
    precision: Annotated[Literal["fp32", "fp16"], typer.Option(help="Of the matrix products.")] = "fp32",
    outputs: Annotated[
        str | None,
        typer.Option(
            help="Of logits, residue, mean and nested, joined by commas.",
            show_default="residue,logits; with --chain nested",
        ),
    ] = None,
    max_residues: Annotated[
        int | None, typer.Option(help="Longest protein.", min=2, show_default="what the models were trained on")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With tensorrt-rtx: of sm75 (alone, in fp16), sm80, sm86, sm89, sm120 and sm121, joined by commas.",
            show_default="sm86,sm89,sm120",
        ),
    ] = None,
    lengths: Annotated[
        Path | None,
        typer.Option(
            help="With an engine: FASTA file of proteins like those that it will run; its profiles fit their lengths.",
            show_default="lengths as in Swiss-Prot",
        ),
    ] = None,
    profiles: Annotated[
        int | None, typer.Option(help="With an engine: most ranges of lengths.", min=1, show_default="3")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="With an engine: most tokens of a batch.", min=1, show_default="8192")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Export an encoder, or a chain with its nested row, as one graph or engine for other runtimes."""
    from .chain import Chain
    from .models import DEFAULT_MODEL, load_encoder
    from .onnx_export import ONNX_SUFFIX, check_out, export_onnx, require

    given = {
        "gpus": None if gpu is None else [name.strip() for name in gpu.split(",")],
        "lengths": lengths,
        "profiles": profiles,
        "max_tokens": max_tokens,
    }
    engine_options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    # Said before a model is read.
    if target == "onnx":
        if engine_options:
            message = "--gpu, --lengths, --profiles and --max-tokens are for engines: --target tensorrt-rtx or tensorrt"
            raise typer.BadParameter(message)
        require("onnx", "onnxscript")
        check_out(out, ONNX_SUFFIX)
    else:
        from .tensorrt_export import check_target, export_tensorrt

        check_target(out, target, engine_options.get("gpus"), precision)
        if lengths is not None:
            engine_options["lengths"] = _read_lengths(lengths)
    started = time.perf_counter()
    fitted = None if chain is None else Chain.load(chain)
    if model is not None:
        names = model.split(",")
    else:
        names = [DEFAULT_MODEL] if fitted is None else [each.name for each in fitted.models]
    encoders = [load_encoder(name, device="cpu", precision="fp32") for name in names]
    options: dict[str, Any] = {
        "chain": fitted,
        "outputs": None if outputs is None else [name.strip() for name in outputs.split(",")],
        "precision": precision,
        "max_residues": max_residues,
    }
    if target == "onnx":
        facts = export_onnx(encoders, out, **options)
    else:
        facts = export_tensorrt(encoders, out, target=target, **options, **engine_options)
    report = {"out": str(out), "target": target, **facts, "total_s": round(time.perf_counter() - started, 3)}
    if json_output:
        typer.echo(json.dumps(report))
    else:
        print_facts(report)


def _read_lengths(path: Path) -> list[int]:
    from .fasta import read_fasta

    return [len(record.sequence) for record in read_fasta(path, invalid="mask", quiet=True)]


def print_facts(facts: dict[str, Any]) -> None:
    """Shows what an exported file says of itself."""
    rows: dict[str, Any] = {
        **{name: facts[name] for name in ("out", "target", "schema_version") if name in facts},
        "models": ", ".join(
            f"{each['name']} ({each['width']}), hash {each['fingerprint']}" for each in facts["models"]
        ),
        "chain": f"hash {facts['chain']}" if facts["chain"] else "none",
        "precision": facts["precision"],
        "takes": f"tokens, int64 (batch, length), up to {facts['limits']['max_residues']:,} residues",
        "gives": "; ".join(f"{name} ({', '.join(map(str, axes))})" for name, axes in facts["outputs"].items()),
        "opset": facts["opset"],
        **_engine_rows(facts),
        "made with": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console(soft_wrap=True).print(table)


def _engine_rows(facts: dict[str, Any]) -> dict[str, str]:
    """What only engines have."""
    rows = {}
    if "gpus" in facts:
        rows["runs on"] = ", ".join(facts["gpus"])
        rows["profiles"] = "; ".join(
            f"{each['fewest_tokens']} to {each['most_tokens']} tokens, up to {each['most_rows']} rows"
            for each in facts["profiles"]
        )
    if "engine" in facts:
        rows["engine file"] = f"{facts['engine']['bytes']:,} bytes, hash {facts['engine']['blake2b']}"
    return rows
