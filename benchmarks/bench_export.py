"""What ONNX Runtime makes of exported files on this CPU, beside torch's packed pass, in interleaved pairs of CPU time.

    python benchmarks/bench_export.py --models nano-xs,nano-s,nano-m

Both run `Embedder` with mean pooling on the same proteins, fp32, one thread; the file gives residues. Pairs come in
turning order. Embeddings are compared before anything is timed, and a difference ends the run with exit code 1. See
`benchmarks/README.md` for what each key of a row means.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from protnest.benchmarks.bench_nested import LIBRARY, median_interval, paired_ratios
from protnest.benchmarks.proteins import make_up, sample_fasta
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.engine import Embedder, InputError
from protnest.engine.exported_encoder import RUN_TOKENS, runs_of
from protnest.engine.models import load_any_encoder, load_encoder
from protnest.engine.onnx_export import export_onnx
from protnest.kernels import plan_batches
from rich.console import Console
from rich.table import Table

RESULTS = ROOT / "benchmarks" / "results" / "export.jsonl"
ALLOWED = 1e-5
"""Of a protein's embedding: the largest difference over the largest magnitude."""


def padding_share(lengths: Sequence[int], max_tokens: int) -> float:
    """Padding of the runs in which proteins of so many tokens go, over their own tokens."""
    order, offsets = plan_batches(list(lengths), max_tokens)
    padded = 0
    for begin, end in pairwise(offsets.tolist()):
        batch = [lengths[place] for place in order[begin:end].tolist()]
        padded += sum(len(rows) * batch[rows[0]] for rows in runs_of(batch, RUN_TOKENS["cpu"]))
    return padded / sum(lengths) - 1


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(checkpoint: str, exported: Path, sequences: Sequence[str], pairs: int) -> Row:
    """One row: an exported file beside its checkpoint.

    Raises:
        RuntimeError: embeddings differ by more than `ALLOWED`.
    """
    embedders = [
        Embedder(load_any_encoder(each, device="cpu", precision="fp32"), long="truncate")
        for each in (checkpoint, exported)
    ]
    by_torch, by_onnx = (np.asarray(embedder.embed(sequences)) for embedder in embedders)
    error = float((np.abs(by_onnx - by_torch).max(axis=1) / np.abs(by_torch).max(axis=1)).max())
    if not error <= ALLOWED:
        message = f"{embedders[0].members[0].name}: embeddings are off by {error:.2g}, allowed is {ALLOWED:g}"
        raise RuntimeError(message)
    torch_pass, onnx_pass = (lambda embedder=embedder: embedder.embed(sequences) for embedder in embedders)
    ones, others, slower = paired_ratios(torch_pass, onnx_pass, pairs)
    ratios = [1 / each for each in slower]
    low, high = median_interval(ratios)
    lengths = [min(len(sequence), embedders[0].max_residues) + 2 for sequence in sequences]
    residues = sum(lengths) - 2 * len(lengths)
    return {
        "model": embedders[0].members[0].name,
        "width": embedders[0].dims[-1],
        "file_bytes": exported.stat().st_size,
        "pairs": pairs,
        "torch_residues_per_cpu_s_median": round(residues / float(np.median(ones)), 1),
        "onnx_residues_per_cpu_s_median": round(residues / float(np.median(others)), 1),
        "onnx_residues_per_wall_s": round(residues / _seconds(onnx_pass), 1),
        "onnx_over_torch_median": round(float(np.median(ratios)), 3),
        "onnx_over_torch_median_low": round(low, 3),
        "onnx_over_torch_median_high": round(high, 3),
        "onnx_over_torch_min": round(min(ratios), 3),
        "onnx_over_torch_max": round(max(ratios), 3),
        "padding_share": round(padding_share(lengths, embedders[1].max_tokens), 4),
        "parity_error": error,
    }


def export_table(rows: Sequence[Row]) -> Table:
    table = Table(title="residues per second of CPU time, fp32, one thread")
    for column in ("model", "torch", "ONNX Runtime", "ratio (its 95 %)", "min to max", "padding", "file"):
        table.add_column(column)
    for row in rows:
        median, low, high = (row[f"onnx_over_torch_median{end}"] for end in ("", "_low", "_high"))
        table.add_row(
            row["model"],
            f"{row['torch_residues_per_cpu_s_median']:,.0f}",
            f"{row['onnx_residues_per_cpu_s_median']:,.0f}",
            f"{median:.2f} ({low:.2f} to {high:.2f})",
            f"{row['onnx_over_torch_min']:.2f} to {row['onnx_over_torch_max']:.2f}",
            f"{row['padding_share']:.1%}",
            f"{row['file_bytes'] / 1e6:.1f} MB",
        )
    return table


def exported(
    models: Annotated[str, typer.Option(help="Names or folders, joined by commas.")] = "nano-xs,nano-s,nano-m",
    sequences: Annotated[int, typer.Option(help="How many proteins to sample.", min=1)] = 6,
    pairs: Annotated[int, typer.Option(help="Pairs for each model.", min=2)] = 9,
    fasta: Annotated[
        Path | None, typer.Option(help="Proteins; by default those beside the checkout, else made up ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
) -> None:
    """Measure exported files in ONNX Runtime beside torch, on this CPU, on one thread, in fp32."""
    torch.set_num_threads(1)
    source = fasta or (LIBRARY if LIBRARY.is_file() else None)
    rows: list[Row] = []
    try:
        proteins = (
            make_up(count=sequences, seed=seed) if source is None else sample_fasta(source, count=sequences, seed=seed)
        )
        facts = machine_facts(torch.device("cpu")) | {
            "suite": "export",
            "onnxruntime": importlib.metadata.version("onnxruntime"),
            "precision": "fp32",
            "data": proteins.source,
            "sequences": sequences,
            "residues": proteins.residues,
        }
        with tempfile.TemporaryDirectory() as folder:
            for name in models.split(","):
                path = Path(folder) / "m.onnx"
                export_onnx([load_encoder(name, device="cpu", precision="fp32")], path, outputs=["residue"])
                rows.append(facts | measure(name, path, proteins.sequences, pairs))
    except (InputError, ValueError, RuntimeError) as error:
        Console(stderr=True).print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    append_rows(out, rows)
    Console().print(export_table(rows))


if __name__ == "__main__":
    typer.run(exported)
