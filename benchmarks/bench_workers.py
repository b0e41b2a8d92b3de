"""What a second worker gains: `protnest embed` by one and by two processes of one thread each, in interleaved pairs.

    python benchmarks/bench_workers.py SWISSPROT.fasta.gz

Each run is a process of its own, timed whole, so that starting workers counts against them; its own report tells the
rate while it embeds. See `benchmarks/README.md` for what each key of a row means.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from protnest.benchmarks.course import spread
from protnest.benchmarks.million import embed_command
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.benchmarks.variant_library import write_variants
from rich.console import Console

RESULTS = ROOT / "benchmarks" / "results" / "workers.jsonl"


def run_embed(library: Path, out: Path, *options: str) -> tuple[float, dict[str, Any]]:
    """Wall seconds of one `protnest embed` on one thread a process, and its report.

    Raises:
        RuntimeError: it failed; the message is what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    done = subprocess.run(
        embed_command(library, out, *options), capture_output=True, text=True, env=environment, check=False
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(done.stderr)
    return seconds, json.loads(done.stdout)


def compare_workers(library: Path, folder: Path, *, model: str, pairs: int, workers: int = 2) -> Row:
    """One row: pairs in turning order, ratios within each; the stores must be equal, bit for bit.

    Raises:
        RuntimeError: a run failed, or the stores differ.
    """
    seconds: dict[int, list[float]] = {1: [], workers: []}
    rates: dict[int, list[float]] = {1: [], workers: []}
    for pair in range(pairs):
        for count in (1, workers) if pair % 2 == 0 else (workers, 1):
            out = folder / f"{pair}-{count}"
            took, report = run_embed(library, out, "--model", model, "--device", "cpu", "--workers", str(count))
            seconds[count].append(took)
            rates[count].append(report["residues_per_s"])
        one, other = (folder / f"{pair}-{count}" for count in (1, workers))
        if any(path.read_bytes() != (other / path.name).read_bytes() for path in one.glob("part-*")):
            message = f"the stores in {one} and {other} differ"
            raise RuntimeError(message)
    faster = spread([one / many for one, many in zip(seconds[1], seconds[workers], strict=True)])
    return {
        "kind": "workers",
        "model": model,
        "workers": workers,
        "sequences": report["sequences"],
        "pairs": pairs,
        "seconds_of_one": [round(each, 2) for each in seconds[1]],
        "seconds_of_many": [round(each, 2) for each in seconds[workers]],
        "residues_per_s_of_one": [round(each) for each in rates[1]],
        "residues_per_s_of_many": [round(each) for each in rates[workers]],
        "faster": faster.median,
        "faster_low": faster.low,
        "faster_high": faster.high,
    }


def main(
    source: Annotated[Path, typer.Argument(help="FASTA file of real proteins, plain or .gz.")],
    count: Annotated[int, typer.Option(help="Variants of them that are embedded.", min=1)] = 10_000,
    model: Annotated[str, typer.Option(help="As `embed` takes it.")] = "nano-xs",
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.", min=1)] = 3,
    rows: Annotated[Path, typer.Option(help="File of JSON lines to which the row is added.")] = RESULTS,
) -> None:
    """Time one worker and two, and add a row."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.fasta"
        write_variants(source, library, count)
        row = compare_workers(library, Path(folder), model=model, pairs=pairs)
    append_rows(rows, [row | machine_facts(torch.device("cpu"))])
    Console().print_json(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
