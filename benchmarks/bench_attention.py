"""Attention on a CPU by itself: ours with the rotary turn fused in, beside torch's rotary and SDPA by sequence.

    python benchmarks/bench_attention.py --head-widths 16,24,32,64 --pairs 15
    python benchmarks/bench_attention.py --cached --sequences 1,64 --lengths 64,200,512 --threads 1

Both are given the same queries, keys and values of proteins with UniProt's lengths, packed, as a layer's product leaves
them. They are compared before anything is timed; a difference ends the run with exit code 1. Pairs take turns and are
measured in CPU time of the process, which other processes lengthen less than they do the clock on the wall.

With `--cached`, attention of a decoder's step instead, see `cached_step`.

Shapes: T tokens, H heads, K head width.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from protnest.benchmarks import cached_step
from protnest.benchmarks.ceiling import product_gflops
from protnest.benchmarks.course import Spread, spread
from protnest.benchmarks.lists import split_numbers, split_words
from protnest.benchmarks.proteins import make_up
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.engine.packing import PackedBatch, pack
from protnest.kernels.rotary import rotary_table
from protnest.kernels.rotary_attention import RotaryTable, rotary_attention
from rich.console import Console
from rich.table import Table

RESULTS = ROOT / "benchmarks" / "results" / "attention.jsonl"
HEADS = 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = {"fp32": 1e-5, "bf16": 0.03}
"""Norm of the difference over the norm."""

_CPU = torch.device("cpu")


def _batch(tokens: int, seed: int) -> PackedBatch:
    """Proteins of at least so many tokens."""
    proteins: list[str] = []
    for protein in make_up(count=tokens, seed=seed).sequences:
        if sum(map(len, proteins)) + 2 * len(proteins) >= tokens:
            break
        proteins.append(protein)
    return pack(proteins)


def measure(head_width: int, precision: str, *, tokens: int, pairs: int, seed: int = 0) -> Row:
    """One head width in one precision.

    Raises:
        RuntimeError: the two differ by more than `ALLOWED`, or C++ cannot run.
    """
    batch, K = _batch(tokens, seed), head_width
    T = sum(batch.lengths_B)
    generator = torch.Generator().manual_seed(seed)
    qkv_TC = torch.randn((T, 3 * HEADS * K), generator=generator).to(DTYPES[precision])
    cos, sin = rotary_table(torch.arange(max(batch.lengths_B)), K, torch.float32)
    table = RotaryTable(cos.squeeze(1), sin.squeeze(1))

    def attend(impl: str) -> tuple[float, torch.Tensor]:
        begin = time.process_time()
        with torch.inference_mode():
            attended_TD = rotary_attention(qkv_TC, table, batch.cu_seqlens, batch.lengths_B, HEADS, impl=impl)
        return time.process_time() - begin, attended_TD

    ours, theirs = attend("cpu")[1].float(), attend("torch")[1].float()
    error = float((ours - theirs).norm() / theirs.norm())
    if not error <= ALLOWED[precision]:
        message = f"K = {K}, {precision}: off by {error:.2g} of the norm, allowed is {ALLOWED[precision]:g}"
        raise RuntimeError(message)
    turns = [(attend("torch")[0], attend("cpu")[0]) for _ in range(pairs)]
    flops = 4 * HEADS * K * sum(length * length for length in batch.lengths_B)
    faster, seconds = spread([torch_s / ours_s for torch_s, ours_s in turns]), spread([ours_s for _, ours_s in turns])
    ceiling = product_gflops([(1280, 1280)], torch.float32, _CPU, rows=(1024,), repeats=3)
    return {
        "suite": "attention",
        "head_width": K,
        "heads": HEADS,
        "precision": precision,
        "tokens": T,
        "sequences": len(batch.lengths_B),
        "pairs": pairs,
        "error": error,
        "cpu_ms_median": 1e3 * seconds.median,
        "gflops": flops / seconds.median / 1e9,
        "fp32_gemm_gflops": ceiling,
        **_named("ours_times_faster", faster),
    }


def _named(name: str, values: Spread) -> Row:
    return {f"{name}_median": values.median, f"{name}_min": values.low, f"{name}_max": values.high}


def _measure_steps(
    shapes: str, precisions: list[str], sequences: str, lengths: str, pairs: int, seed: int
) -> list[Row]:
    wanted = split_words(shapes, list(cached_step.SHAPES), "--shapes")
    return [
        cached_step.measure_step(shape, precision, sequences=B, length=length, mixed=mixed, pairs=pairs, seed=seed)
        for B in split_numbers(sequences, "--sequences")
        for length in split_numbers(lengths, "--lengths")
        for shape in wanted
        for precision in precisions
        for mixed in ((False, True) if B > 1 and length > 1 else (False,))
    ]


def attention(
    head_widths: Annotated[str, typer.Option(help="With commas between.")] = "16,24,32,64",
    precisions: Annotated[str, typer.Option(help="fp32, bf16; with --cached the cache's.")] = "fp32,bf16",
    tokens: Annotated[int, typer.Option(help="Of a batch, at least.", min=16)] = 4096,
    pairs: Annotated[int, typer.Option(help="Turns of torch with ours.", min=2)] = 15,
    threads: Annotated[int | None, typer.Option(help="Torch's own choice by default.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of proteins and numbers.")] = 0,
    cached: Annotated[bool, typer.Option("--cached", help="Attention of a decoder's step instead.")] = False,
    shapes: Annotated[str, typer.Option(help="With --cached: heads x head width.")] = ",".join(cached_step.SHAPES),
    sequences: Annotated[str, typer.Option(help="With --cached: of a step.")] = "1,64",
    lengths: Annotated[str, typer.Option(help="With --cached: tokens of a sequence.")] = "64,200,512",
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
) -> None:
    """Measure attention of this CPU beside torch's, in interleaved pairs."""
    console = Console(stderr=True)
    widths = split_numbers(head_widths, "--head-widths")
    wanted = split_words(precisions, list(DTYPES), "--precisions")
    if threads is not None:
        torch.set_num_threads(threads)
    facts = machine_facts(_CPU)
    rows: list[Row] = []
    try:
        if cached:
            rows = [facts | row for row in _measure_steps(shapes, wanted, sequences, lengths, pairs, seed)]
        else:
            for K in widths:
                rows += [facts | measure(K, name, tokens=tokens, pairs=pairs, seed=seed) for name in wanted]
    except (RuntimeError, ValueError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    append_rows(out, rows)
    Console(width=120).print(_steps_table(rows) if cached else _packed_table(rows))


def _packed_table(rows: list[Row]) -> Table:
    table = Table(title="attention with the rotary turn, CPU time")
    for column in ("K", "precision", "ours ms", "GFLOP/s", "of fp32 products", "ours is faster by"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["ours_times_faster_min"], row["ours_times_faster_max"]
        table.add_row(
            str(row["head_width"]),
            row["precision"],
            f"{row['cpu_ms_median']:.1f}",
            f"{row['gflops']:.0f}",
            f"{100 * row['gflops'] / row['fp32_gemm_gflops']:.0f} %",
            f"{row['ours_times_faster_median']:.2f} ({low:.2f} to {high:.2f})",
        )
    return table


def _steps_table(rows: list[Row]) -> Table:
    table = Table(title="attention of a step over cached keys and values, CPU time")
    for column in (
        "B",
        "tokens",
        "H x K",
        "cache",
        "ours us",
        "GB/s read",
        "of copy",
        "padded SDPA /",
        "SDPA by one /",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["sequences"]),
            f"{row['length']}{' mixed' if row['mixed'] else ''}",
            row["shape"],
            row["precision"],
            f"{row['cpu_us_median']:.0f}",
            f"{row['read_gbytes_per_s']:.1f}",
            f"{100 * row['read_gbytes_per_s'] / row['copy_gbytes_per_s']:.0f} %",
            *(
                f"{row[f'times_{name}_median']:.2f} ({row[f'times_{name}_min']:.2f} to {row[f'times_{name}_max']:.2f})"
                for name in ("padded", "each")
            ),
        )
    return table


if __name__ == "__main__":
    typer.run(attention)
