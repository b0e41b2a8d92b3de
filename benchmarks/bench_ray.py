"""What Ray costs: a library embedded by two workers of the native engine, and by two on a Ray cluster of this machine.

    OMP_NUM_THREADS=1 python benchmarks/bench_ray.py --pairs 5 --proteins 20000

Runs come in turning order (native, ray, ray, native, ...), each into a folder of its own. Of each run the wall time is
taken, of Ray's with and without starting the cluster, and the pace: residues a second from the first finished batch or
block to the last, which leaves out how long processes take to come up. All rows are compared bit by bit, and a
difference ends the run with exit code 1. See `benchmarks/README.md` for what each key of a row means.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from protnest.benchmarks.proteins import make_up, sample_fasta
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.engine import InputError, embed_library, read_embeddings
from protnest.engine.cpus import usable_cpus
from protnest.engine.embedder_plan import EmbedderPlan
from protnest.engine.library import LibraryOptions
from protnest.engine.ray_cluster import check_ray, start_local
from protnest.engine.ray_library import embed_on_ray
from rich.console import Console
from rich.table import Table

LIBRARY = ROOT.parent / "shared" / "data" / "sequences" / "swissprot201401_nr60k_le1022.fasta.gz"
RESULTS = ROOT / "benchmarks" / "results" / "ray.jsonl"
ENGINES = ("native", "ray")


class Pace:
    """Follows a run: residues a second between its first and its last sign of life."""

    def __init__(self) -> None:
        self._first = self._last = 0.0
        self._residues = 0

    def start(self, records: int, work: int, done: int) -> None:
        pass

    def advance(self, residues: int) -> None:
        self._last = time.perf_counter()
        if not self._first:
            # What was done before the first sign took an unknown time.
            self._first = self._last
            return
        self._residues += residues

    @property
    def residues_per_s(self) -> float:
        """NaN where there were fewer than two signs."""
        return self._residues / (self._last - self._first) if self._last > self._first else float("nan")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        whole_s: wall time, processes and cluster started and stopped.
        cluster_s: of these, for Ray's cluster.
        residues_per_s: the pace between the first finished piece and the last.
    """

    whole_s: float
    cluster_s: float
    residues_per_s: float


def run_native(fasta: Path, out: Path, plan: EmbedderPlan, options: LibraryOptions) -> Run:
    """Embeds with the native engine."""
    pace = Pace()
    started = time.perf_counter()
    embed_library(fasta, out, plan, options, progress=pace)
    return Run(time.perf_counter() - started, 0.0, pace.residues_per_s)


def run_ray(fasta: Path, out: Path, plan: EmbedderPlan, options: LibraryOptions) -> Run:
    """Embeds on a Ray cluster that is started for it, and stopped."""
    import ray

    pace = Pace()
    started = time.perf_counter()
    start_local(max(usable_cpus(), options.workers or 1))
    ready = time.perf_counter()
    try:
        embed_on_ray(str(fasta), str(out), plan, options, progress=pace)
        done = time.perf_counter()
    finally:
        ray.shutdown()
    return Run(time.perf_counter() - started, ready - started + time.perf_counter() - done, pace.residues_per_s)


def check_rows(native: Path, ray: Path) -> None:
    """Raises RuntimeError unless both hold the same rows, bit for bit."""
    stored = read_embeddings(native)
    begin = 0
    for part in sorted(ray.glob("part-*.parquet")):
        table = pq.read_table(part, columns=["id", "embedding"])
        end = begin + table.num_rows
        rows = np.stack(table["embedding"].to_numpy())
        if table["id"].to_pylist() != stored.ids[begin:end] or rows.tobytes() != stored.array[begin:end].tobytes():
            message = f"{part.name}: its rows are not the native engine's"
            raise RuntimeError(message)
        begin = end
    if begin != len(stored):
        message = f"{begin} rows by Ray, {len(stored)} by the native engine"
        raise RuntimeError(message)


def measure(fasta: Path, plan: EmbedderPlan, options: LibraryOptions, pairs: int) -> list[Row]:
    """Interleaved pairs; one row an engine.

    Raises:
        RuntimeError: the engines disagree.
    """
    runs: dict[str, list[Run]] = {engine: [] for engine in ENGINES}
    for pair in range(pairs):
        with tempfile.TemporaryDirectory(prefix="bench-ray-") as name:
            folder = Path(name)
            for engine in ENGINES if pair % 2 == 0 else reversed(ENGINES):
                embed = run_native if engine == "native" else run_ray
                runs[engine].append(embed(fasta, folder / engine, plan, options))
            check_rows(folder / "native", folder / "ray")
    return [_row(engine, runs[engine], runs["native"]) for engine in ENGINES]


def _row(engine: str, runs: list[Run], native: list[Run]) -> Row:
    pairs = list(zip(runs, native, strict=True))
    warm = [run.whole_s - run.cluster_s for run in runs]
    return {
        "engine": engine,
        "pairs": len(runs),
        "whole_s": round(statistics.median(run.whole_s for run in runs), 3),
        "without_cluster_s": round(statistics.median(warm), 3),
        "residues_per_s": round(statistics.median(run.residues_per_s for run in runs), 1),
        "all_whole_s": [round(run.whole_s, 3) for run in runs],
        "all_cluster_s": [round(run.cluster_s, 3) for run in runs],
        "all_residues_per_s": [round(run.residues_per_s, 1) for run in runs],
        "whole_overhead": round(statistics.median(run.whole_s / other.whole_s for run, other in pairs) - 1, 4),
        "without_cluster_overhead": round(
            statistics.median((run.whole_s - run.cluster_s) / other.whole_s for run, other in pairs) - 1, 4
        ),
        "pace_overhead": round(
            statistics.median(other.residues_per_s / run.residues_per_s for run, other in pairs) - 1, 4
        ),
    }


def bench_ray(
    pairs: Annotated[int, typer.Option(help="Runs of each engine.", min=1)] = 5,
    proteins: Annotated[int, typer.Option(help="In the library.", min=1)] = 20000,
    model: Annotated[str, typer.Option(help="Bundled name or path.")] = "nano-xs",
    workers: Annotated[int, typer.Option(help="Of each engine, one thread each.", min=1)] = 2,
    shard_records: Annotated[int, typer.Option(help="Most proteins in a shard or block.", min=1)] = 2048,
    fasta: Annotated[
        Path | None, typer.Option(help="Proteins; by default those beside the checkout, else made up ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
) -> None:
    """Measure what embedding on Ray costs over the native engine's workers, on this CPU, in fp32."""
    console = Console(stderr=True)
    source = fasta or (LIBRARY if LIBRARY.is_file() else None)
    options = LibraryOptions(workers=workers, shard_records=shard_records)
    plan = EmbedderPlan(models=(model,), device="cpu", precision="fp32")
    try:
        check_ray()
        taken = (
            make_up(count=proteins, seed=seed) if source is None else sample_fasta(source, count=proteins, seed=seed)
        )
        with tempfile.TemporaryDirectory(prefix="bench-ray-") as name:
            library = Path(name) / "library.fasta"
            library.write_text("".join(f">p{row}\n{text}\n" for row, text in enumerate(taken.sequences)), "ascii")
            measured = measure(library, plan, options, pairs)
    except (InputError, ValueError, RuntimeError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    facts = machine_facts(torch.device("cpu")) | {
        "suite": "ray",
        "model": model,
        "precision": "fp32",
        "data": taken.source,
        "proteins": proteins,
        "residues": taken.residues,
        "workers": workers,
        "shard_records": shard_records,
    }
    rows = [facts | row for row in measured]
    append_rows(out, rows)
    table = Table(
        "engine", "whole, s", "without cluster, s", "residues/s", "overhead: whole", "without cluster", "pace"
    )
    for row in rows:
        shares = [f"{row[name]:+.1%}" for name in ("whole_overhead", "without_cluster_overhead", "pace_overhead")]
        numbers = [f"{row['whole_s']:.1f}", f"{row['without_cluster_s']:.1f}", f"{row['residues_per_s']:,.0f}"]
        table.add_row(row["engine"], *numbers, *shares)
    Console().print(table)
    console.print(f"{len(rows)} rows appended to {out}")


if __name__ == "__main__":
    typer.run(bench_ray)
