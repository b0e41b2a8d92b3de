"""`protnest search`, which the command line mounts."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from rich.table import Table

from .errors import InputError

if TYPE_CHECKING:
    from .search import Hits, Searcher
    from .search_queries import LibraryQueries, StoreQueries

COLUMNS = ("query", "rank", "hit", "similarity", "row")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}

# Making the keys of a store costs as much as comparing about so many queries with all of every row.
PAYS_FROM = 500


def search(
    folder: Annotated[Path, typer.Argument(help="A finished store: what `embed` wrote to --out.", metavar="DIR")],
    query: Annotated[
        Path,
        typer.Argument(
            help="Proteins to look for: what `embed` takes, FASTA or a table, or another store.", metavar="QUERY"
        ),
    ],
    id_col: Annotated[
        str | None,
        typer.Option(help="Of a table of queries: column of ids.", show_default="as of `embed`"),
    ] = None,
    seq_col: Annotated[
        str | None,
        typer.Option(help="Of a table of queries: column of sequences.", show_default="as of `embed`"),
    ] = None,
    neighbours: Annotated[int, typer.Option("-k", "--neighbours", help="Hits of each query.", min=1)] = 10,
    dims: Annotated[
        int | None,
        typer.Option(help="Compare rows at this nested width of the store's.", min=1, show_default="the whole row"),
    ] = None,
    metric: Annotated[
        Literal["cosine", "dot"], typer.Option(help="What similarity is: of directions, or the scalar product.")
    ] = "cosine",
    mode: Annotated[
        Literal["auto", "nested", "exact"],
        typer.Option(
            help="nested: short keys first, the best re-ranked at full width; exact: all of every row. auto: nested "
            "where an index is kept or there are enough queries for one to pay."
        ),
    ] = "auto",
    candidates: Annotated[
        int | None,
        typer.Option(help="nested: re-rank so many rows of each query.", min=1, show_default="32, or 3 k"),
    ] = None,
    keep_index: Annotated[
        bool, typer.Option("--keep-index", help="nested: keep the index in DIR, for later searches.")
    ] = False,
    check: Annotated[
        int, typer.Option(help="Look for the first N queries in exact mode too, and tell the recall.", min=0)
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Table of hits, .csv or .tsv.", show_default="CSV on standard output")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the store's models are, joined by commas.", show_default="by the store's names"),
    ] = None,
    chain: Annotated[Path | None, typer.Option(help="The store's chain file.", show_default="the bundled one")] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"] | None,
        typer.Option(help="Of embedding the queries.", show_default="the store's"),
    ] = None,
    device: Annotated[str, typer.Option(help="Of embedding the queries: auto, cpu, cuda or cuda:N.")] = "auto",
    invalid: Annotated[Literal["mask", "skip", "error"], typer.Option(help="Letters outside the alphabet.")] = "error",
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Find the nearest neighbours of proteins in a store."""
    if out is not None and out.suffix not in _SEPARATORS:
        message = f"{str(out)!r} ends in {out.suffix!r}; allowed: {', '.join(_SEPARATORS)}"
        raise typer.BadParameter(message, param_hint="--out")
    from .embeddings import read_embeddings
    from .info import peak_memory_bytes
    from .progress import ResidueProgress
    from .search import Searcher

    started = time.perf_counter()
    embeddings = read_embeddings(folder)
    searcher = Searcher(embeddings, folder, dims=dims, metric=metric)
    searcher.check_k(neighbours)
    settings = embeddings.run["settings"]
    console = Console(stderr=True, soft_wrap=True)
    with ResidueProgress(console, checking="checking the queries") as progress:
        given: dict[str, Any] = {"model": model, "chain": chain, "device": device, "precision": precision}
        reading = {"invalid": invalid, "id_column": id_col, "sequence_column": seq_col}
        queries = _open_queries(query, settings, folder, given, reading, progress)
        run = _Run(searcher, neighbours, candidates, check)
        run.choose(mode, queries.count, keep_index)
        rows = run.rows(queries, embeddings.ids)
        listed = _write(rows, out, json_output)
    report: dict[str, Any] = {
        "out": None if out is None else str(out),
        "store": str(folder),
        "proteins": len(searcher),
        "queries": run.queries,
        "rejected": queries.rejected,
        "k": neighbours,
        "metric": metric,
        "width": searcher.dims,
        "mode": run.mode,
        **run.report(),
        "total_s": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if json_output:
        typer.echo(json.dumps(report if listed is None else report | {"hits": listed}))
    else:
        # Hits on standard output stay alone there.
        _print_report(report, Console(stderr=out is None, soft_wrap=True))


def _open_queries(
    query: Path, settings: dict[str, Any], folder: Path, given: dict[str, Any], reading: dict[str, Any], progress: Any
) -> LibraryQueries | StoreQueries:
    from .embeddings import read_embeddings
    from .library_source import open_source
    from .search_queries import LibraryQueries, StoreQueries, open_embedder

    if query.is_dir():
        return StoreQueries(read_embeddings(query), query, settings)
    if not query.exists():
        message = "no such file: queries are a file of proteins, or a folder that `protnest embed` wrote"
        raise InputError(message, file=query)
    source = open_source(query, **reading)
    return LibraryQueries(source, open_embedder(settings, folder, **given), progress=progress)


@dataclass
class _Run:
    """One search: its mode, and what it took."""

    searcher: Searcher
    k: int
    candidates: int | None
    check: int
    mode: str = "nested"
    index: str | None = None
    queries: int = 0
    index_s: float = 0.0
    search_s: float = 0.0
    exact_s: float = 0.0
    checked: int = 0
    recalls: list[tuple[float, int]] = field(default_factory=list)

    def choose(self, mode: str, queries: int, keep_index: bool) -> None:
        """Settles the mode, and makes or loads the index."""
        began = time.perf_counter()
        found = mode != "exact" and self.searcher.load()
        if mode == "auto":
            mode = "nested" if found or keep_index or queries >= PAYS_FROM else "exact"
        self.mode = mode
        if mode == "nested":
            self.index = "loaded" if found else "built"
            if not found:
                self.searcher.build()
                if keep_index:
                    self.searcher.save()
        self.index_s = time.perf_counter() - began

    def rows(
        self, queries: LibraryQueries | StoreQueries, ids: list[str]
    ) -> Iterator[tuple[str, int, str, float, int]]:
        """The table's rows, batch after batch."""
        for names, vectors in queries.batches():
            began = time.perf_counter()
            hits = self._find(vectors, exactly=self.mode == "exact")
            self.search_s += time.perf_counter() - began
            self._compare(vectors, hits)
            self.queries += len(names)
            for name, numbers, similarities in zip(
                names, hits.rows_Qk.tolist(), hits.similarities_Qk.tolist(), strict=True
            ):
                for rank, (row, similarity) in enumerate(zip(numbers, similarities, strict=True), start=1):
                    yield name, rank, ids[row], round(similarity, 6), row

    def _find(self, vectors: Any, *, exactly: bool) -> Hits:
        if exactly:
            return self.searcher.search_exactly(vectors, self.k)
        return self.searcher.search(vectors, self.k, candidates=self.candidates)

    def _compare(self, vectors: Any, hits: Hits) -> None:
        from .search import recall

        some = min(len(vectors), self.check - self.checked)
        if some <= 0:
            return
        began = time.perf_counter()
        exact = self._find(vectors[:some], exactly=True)
        self.exact_s += time.perf_counter() - began
        self.recalls.append((recall(hits.first(some), exact), some))
        self.checked += some

    def report(self) -> dict[str, Any]:
        """What a user may want to know of it."""
        told: dict[str, Any] = {
            "index": self.index,
            "index_s": round(self.index_s, 4),
            "search_ms_per_query": round(1e3 * self.search_s / max(1, self.queries), 4),
        }
        if self.checked:
            told["checked"] = self.checked
            told["recall"] = round(sum(share * count for share, count in self.recalls) / self.checked, 6)
            told["exact_ms_per_query"] = round(1e3 * self.exact_s / self.checked, 4)
        return told


def _write(
    rows: Iterator[tuple[str, int, str, float, int]], out: Path | None, json_output: bool
) -> list[dict[str, Any]] | None:
    """Writes the table, to a file or to standard output; with --json and no file gives it back instead."""
    from .atomic import replacing

    if out is None and json_output:
        return [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    with contextlib.ExitStack() as held:
        stream: TextIO = sys.stdout
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = held.enter_context(replacing(out))
            stream = held.enter_context(temporary.open("w", newline="", encoding="utf-8"))
        separator = "," if out is None else _SEPARATORS[out.suffix]
        writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
        writer.writerow(COLUMNS)
        for query, rank, hit, similarity, row in rows:
            writer.writerow((query, rank, hit, f"{similarity:.6f}", row))
    return None


def _print_report(report: dict[str, Any], console: Console) -> None:
    rows = {
        **({} if report["out"] is None else {"hits": report["out"]}),
        "store": f"{report['store']}, {report['proteins']:,} proteins",
        "queries": f"{report['queries']:,}, {report['k']} neighbours each, {report['metric']} over {report['width']}",
        "mode": report["mode"] + (f", index {report['index']} in {report['index_s']:.2f} s" if report["index"] else ""),
        "ms a query": f"{report['search_ms_per_query']:.3f}",
    }
    if "recall" in report:
        rows["recall"] = (
            f"{report['recall']:.4f} of exact mode over {report['checked']:,} queries, "
            f"which took {report['exact_ms_per_query']:.3f} ms each"
        )
    if report["rejected"]:
        rows["left out"] = f"{report['rejected']:,} queries"
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
