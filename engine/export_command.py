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
    target: Annotated[Literal["onnx"], typer.Option(help="What is written.")] = "onnx",
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
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Export an encoder, or a chain with its nested row, as one graph for other runtimes."""
    from .chain import Chain
    from .models import DEFAULT_MODEL, load_encoder
    from .onnx_export import export_onnx, require

    # Said before a model is read.
    require("onnx", "onnxscript")
    started = time.perf_counter()
    fitted = None if chain is None else Chain.load(chain)
    if model is not None:
        names = model.split(",")
    else:
        names = [DEFAULT_MODEL] if fitted is None else [each.name for each in fitted.models]
    facts = export_onnx(
        [load_encoder(name, device="cpu", precision="fp32") for name in names],
        out,
        chain=fitted,
        outputs=None if outputs is None else [name.strip() for name in outputs.split(",")],
        precision=precision,
        max_residues=max_residues,
    )
    report = {"out": str(out), "target": target, **facts, "total_s": round(time.perf_counter() - started, 3)}
    if json_output:
        typer.echo(json.dumps(report))
    else:
        print_facts(report)


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
        "made with": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console(soft_wrap=True).print(table)
