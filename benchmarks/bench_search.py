"""Searching a store: short keys of the nested prefix, re-ranked, beside brute force at full width, in pairs.

    python benchmarks/bench_search.py STORE QUERIES --pairs 7

STORE and QUERIES are folders of `protnest embed`, of real proteins: made-up vectors have no neighbours. All rows are in
memory for both; one thread; CPU time of the process. Brute force is the fastest of those here: blocked matrix products
with selection as it goes, and faiss's IndexFlatIP where it is installed. Recall comes first: below 0.99 nothing is
timed. See `benchmarks/README.md` for what each key of a row means.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from protnest.benchmarks.bench_nested import median_interval, paired_ratios
from protnest.benchmarks.rows import ROOT, Row, append_rows, machine_facts
from protnest.engine import read_embeddings
from protnest.engine.search import Searcher, default_candidates, recall
from protnest.kernels.top_rows import Floats, top_rows
from rich.console import Console
from rich.table import Table

RESULTS = ROOT / "benchmarks" / "results" / "search.jsonl"
LEAST_RECALL = 0.99


def unit(rows: np.ndarray) -> Floats:
    """Rows over their norms."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: Floats = np.ascontiguousarray(rows / norms, dtype=np.float32)
    return directions


def brute_forces(rows_ND: Floats, k: int) -> dict[str, Callable[[Floats], object]]:
    """Searches that compare all of every row, by name."""
    found: dict[str, Callable[[Floats], object]] = {
        "products": lambda queries_QD: top_rows([(0, rows_ND)], queries_QD, k, impl="reference")
    }
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(rows_ND.shape[1])
        index.add(rows_ND)
        found["faiss IndexFlatIP"] = lambda queries_QD: index.search(queries_QD, k)
    return found


def run_search(store: Path, queries: Path, *, k: int = 10, pairs: int = 7) -> list[Row]:
    """A row for each brute force; torch runs on one thread from then on.

    Raises:
        InputError: a store cannot be read or searched.
        RuntimeError: the recall is too low.
    """
    torch.set_num_threads(1)
    embeddings = read_embeddings(store)
    queries_QD = np.asarray(read_embeddings(queries).array)
    searcher = Searcher(embeddings, store)
    build_s = np.median([_seconds(searcher.build) for _ in range(3)])
    assert searcher.keys is not None
    share = recall(searcher.search(queries_QD, k), searcher.search_exactly(queries_QD, k))
    if share < LEAST_RECALL:
        message = f"recall@{k} is {share:.4f}, allowed is {LEAST_RECALL}; nothing is timed"
        raise RuntimeError(message)
    facts: Row = machine_facts(torch.device("cpu")) | {
        "suite": "search",
        "proteins": len(embeddings),
        "queries": len(queries_QD),
        "k": k,
        "width": searcher.dims,
        "prefix": searcher.keys.prefix,
        "key": searcher.keys.rows_NK.shape[1],
        "candidates": default_candidates(k),
        "recall": share,
        "build_ms": round(1e3 * float(build_s), 1),
        "pairs": pairs,
    }
    directions_QD = unit(queries_QD)
    rows = []
    for name, brute in brute_forces(unit(np.asarray(embeddings.array)), k).items():
        one, other, ratios = paired_ratios(lambda: searcher.search(queries_QD, k), partial(brute, directions_QD), pairs)
        low, high = median_interval(ratios)
        ours_ms, brute_ms = (1e3 * float(np.median(times)) / len(queries_QD) for times in (one, other))
        rows.append(
            facts
            | {
                "brute_force": name,
                "cpu_ms_per_query": round(ours_ms, 4),
                "cpu_ms_per_query_brute_force": round(brute_ms, 4),
                "times_faster_median": round(float(np.median(ratios)), 3),
                "times_faster_median_low": round(low, 3),
                "times_faster_median_high": round(high, 3),
                "times_faster_min": round(min(ratios), 3),
                "times_faster_max": round(max(ratios), 3),
                "pays_from_queries": round(1e3 * float(build_s) / (brute_ms - ours_ms)) if brute_ms > ours_ms else None,
            }
        )
    return rows


def _seconds(run: Callable[[], Any]) -> float:
    return paired_ratios(run, lambda: None, 1)[0][0]


def search_table(rows: list[Row]) -> Table:
    """What a reader wants of them."""
    table = Table(title="Search by short keys beside brute force, CPU time of one thread")
    for column in ("brute force", "recall", "ms a query", "its ms", "times faster (its 95 %)", "pays from"):
        table.add_column(column)
    for row in rows:
        median, low, high = (row[f"times_faster_median{end}"] for end in ("", "_low", "_high"))
        table.add_row(
            row["brute_force"],
            f"{row['recall']:.4f}",
            f"{row['cpu_ms_per_query']:.3f}",
            f"{row['cpu_ms_per_query_brute_force']:.3f}",
            f"{median:.2f} ({low:.2f} to {high:.2f})",
            "never" if row["pays_from_queries"] is None else f"{row['pays_from_queries']:,} queries",
        )
    return table


def search(
    store: Annotated[Path, typer.Argument(help="A finished store of real proteins.")],
    queries: Annotated[Path, typer.Argument(help="Another, of proteins to look for.")],
    k: Annotated[int, typer.Option("-k", help="Neighbours.", min=1)] = 10,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.", min=2)] = 7,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are appended.")] = RESULTS,
) -> None:
    """Measure searching by short keys beside brute force at full width, on this CPU, on one thread."""
    console = Console(stderr=True)
    try:
        rows = run_search(store, queries, k=k, pairs=pairs)
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    append_rows(out, rows)
    Console().print(search_table(rows))
    console.print(f"{len(rows)} rows appended to {out}")


if __name__ == "__main__":
    typer.run(search)
