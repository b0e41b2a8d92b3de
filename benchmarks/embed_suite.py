"""What `bench_embed.py` and `protnest bench --suite embed` run: proteins, plan, comparison, tables.

Everything is told through a console; rows are returned, and written by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from protnest.benchmarks.ceiling import copy_gbytes_per_s
from protnest.benchmarks.comparison import SHAPES, Plan, contest
from protnest.benchmarks.esm_cpp import ESM_CPP, VARIABLE, find_python, version
from protnest.benchmarks.parity import ALLOWED
from protnest.benchmarks.peers import INT8, PEER_MODULES, is_installed
from protnest.benchmarks.proteins import UNIFORM_BATCH, UNIFORM_RESIDUES, Proteins, make_up_mix, sample_fasta
from protnest.benchmarks.rows import ROOT, Row, machine_facts
from protnest.kernels.hardware import multiplies_bf16
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

LIBRARY = ROOT.parent / "shared" / "data" / "sequences" / "uniprot20k_mmseqs2_DB.fasta.gz"
PEERS = (*PEER_MODULES, ESM_CPP)
# Of the sequences, the share on which parity is checked and budgets are tried.
_TRIED_SHARE = 0.3
_QUICK_SEQUENCES, _QUICK_PAIRS, _QUICK_PASS_SECONDS = 40, 3, 3.0
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """What is measured.

    Attributes:
        shapes: keys of `SHAPES`.
        mixes: of `proteins.MIXES`.
        sequences: how many proteins.
        pairs: turns of each peer with ours.
        precisions: of ours, and of peers that have them.
        budgets: tokens a batch to choose among.
        pass_seconds: a pair runs as many proteins as the slower engine does in this time.
        device: where; esm-cpp is left out on a GPU.
        peers: packages to compare with.
        esm_cpp_python: of esm-cpp's environment; None looks for it.
        fasta: proteins of the mix "uniprot"; None takes the library beside the checkout, else made up ones.
        seed: of sample and weights.
    """

    shapes: Sequence[str] = ("8M", "35M")
    mixes: Sequence[str] = ("uniprot",)
    sequences: int = 200
    pairs: int = 5
    precisions: Sequence[str] = ("fp32", "bf16", INT8)
    budgets: Sequence[int] = (1, 1024, 2048, 4096)
    pass_seconds: float = 15.0
    device: torch.device = _CPU
    peers: Sequence[str] = PEERS
    esm_cpp_python: Path | None = None
    fasta: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fasta is not None and tuple(self.mixes) != ("uniprot",):
            message = f"a FASTA file goes with the mix uniprot alone, not with {', '.join(self.mixes)}"
            raise ValueError(message)

    def quick(self) -> EmbedSettings:
        """The same at 8M, with at most 40 proteins, and 3 pairs of 3 seconds."""
        return replace(
            self,
            shapes=("8M",),
            sequences=min(self.sequences, _QUICK_SEQUENCES),
            pairs=min(self.pairs, _QUICK_PAIRS),
            pass_seconds=min(self.pass_seconds, _QUICK_PASS_SECONDS),
        )


@dataclass(frozen=True, kw_only=True)
class Field:
    """Who takes part here, and the facts that every row holds.

    Attributes:
        precisions: of ours.
        peers: that are installed.
        esm_cpp_python: None where esm-cpp is left out.
        facts: of the machine.
    """

    precisions: list[str]
    peers: list[str]
    esm_cpp_python: Path | None
    facts: Row


def survey(settings: EmbedSettings, console: Console) -> Field:
    """Finds out who can take part, and says who cannot and why.

    Raises:
        ValueError: esm-cpp's Python was named, and does not have it; or there is no precision of ours left.
    """
    found = None
    if ESM_CPP in settings.peers and settings.device.type == "cpu":
        found = find_python(settings.esm_cpp_python)
    absent = [name for name in settings.peers if name in PEER_MODULES and not is_installed(name)]
    if ESM_CPP in settings.peers and found is None:
        absent.append(f"{ESM_CPP} (--esm-cpp-python or {VARIABLE} names the Python that has it; CPU only)")
    if absent:
        console.print(f"[yellow]left out, not there: {', '.join(absent)}[/yellow]", highlight=False)
    precisions = list(settings.precisions)
    if INT8 in precisions and settings.device.type != "cpu":
        console.print("[yellow]left out: ours in int8, which runs on a CPU alone[/yellow]")
        precisions.remove(INT8)
    if not precisions:
        message = "no precision of ours is left to measure"
        raise ValueError(message)
    if "bf16" in precisions and not multiplies_bf16(settings.device):
        console.print(
            "[yellow]this device has no bf16 units: ours runs bf16 in fp32 units, peers run torch's emulation[/yellow]"
        )
    facts = machine_facts(settings.device) | {
        "suite": "embed",
        "esm_cpp": found and version(found),
        "copy_gbytes_per_s": round(copy_gbytes_per_s(settings.device), 2),
    }
    peers = [name for name in settings.peers if name in PEER_MODULES and is_installed(name)]
    return Field(
        precisions=precisions, peers=[*peers, *([ESM_CPP] if found else [])], esm_cpp_python=found, facts=facts
    )


def say_what_is_allowed(precisions: Sequence[str], console: Console) -> None:
    """The bounds that answers are held to; int8's always, since a peer has it."""
    shown = [name for name in ALLOWED if name in (*precisions, "fp32", INT8)]
    console.print(
        "answers are held to the reference's; allowed, of the norm: "
        + ", ".join(f"{name} {ALLOWED[name]:g}" for name in shown),
        highlight=False,
    )


def choose_proteins(settings: EmbedSettings, mix: str) -> Proteins:
    """Proteins of one mix.

    Raises:
        ValueError: the FASTA file holds too few.
        InputError: it cannot be read.
    """
    fasta = settings.fasta or (LIBRARY if mix == "uniprot" and LIBRARY.is_file() else None)
    if fasta is None:
        return make_up_mix(mix, count=settings.sequences, seed=settings.seed)
    return sample_fasta(fasta, count=settings.sequences, seed=settings.seed)


def budgets_for(settings: EmbedSettings, mix: str) -> list[int]:
    """The budgets; for the mix "uniform" also that of eight whole proteins."""
    whole = {UNIFORM_BATCH * (UNIFORM_RESIDUES + 2)} if mix == "uniform" else set()
    return sorted({*settings.budgets, *whole})


def run_embed(settings: EmbedSettings, console: Console) -> tuple[list[Row], list[Row]]:
    """Rows of engines, and the verdicts: one for each mix and shape.

    Raises:
        ParityError: an engine's answer is wrong; nothing after that was timed.
        ValueError, InputError: of `survey` and `choose_proteins`.
        RuntimeError: engines' weights differ, or esm-cpp failed.
    """
    here = survey(settings, console)
    say_what_is_allowed(here.precisions, console)
    rows: list[Row] = []
    verdicts: list[Row] = []
    with _progress(console) as watch:
        for mix in settings.mixes:
            proteins = choose_proteins(settings, mix)
            console.print(
                f"{mix}: {settings.sequences} proteins ({proteins.source}), {proteins.residues:,} residues; "
                f"{proteins.truncated} cut to 1,022",
                highlight=False,
            )
            plan = Plan(
                sequences=proteins.sequences,
                budgets=budgets_for(settings, mix),
                precisions=here.precisions,
                pairs=settings.pairs,
                checked=max(1, round(_TRIED_SHARE * settings.sequences)),
                device=settings.device,
                ceiling_rows=(1024, 4096) if settings.device.type == "cpu" else (8192, 32768),
                most_pass_seconds=settings.pass_seconds,
                seed=settings.seed,
                peers=here.peers,
                esm_cpp_python=here.esm_cpp_python,
            )
            facts = here.facts | {
                "mix": mix,
                "data": proteins.source,
                "sequences": settings.sequences,
                "residues": proteins.residues,
                "truncated": proteins.truncated,
            }
            for shape in settings.shapes:
                outcome = contest(shape, SHAPES[shape], plan, begun=watch(f"{shape} {mix}"))
                rows += [facts | row for row in outcome.rows]
                if outcome.verdict is not None:
                    verdicts.append(facts | outcome.verdict | {"suite": "verdict"})
    return rows, verdicts


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], Callable[[int], Callable[[str], None]]]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[engine]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def watch(title: str) -> Callable[[int], Callable[[str], None]]:
            def begun(passes: int) -> Callable[[str], None]:
                task = progress.add_task(title, total=passes, engine="")
                return lambda engine: progress.update(task, advance=1, engine=engine)

            return begun

        yield watch


def embed_table(rows: Sequence[Row]) -> Table:
    """Rates, ratios and shares of the ceiling."""
    table = Table(title="residues/s, mean-pooled embeddings")
    for column in ("shape", "mix", "engine", "tokens a batch"):
        table.add_column(column)
    for column in ("residues/s (min to max)", "ours is faster by", "GFLOP/s", "of ceiling", "peak growth"):
        table.add_column(column, justify="right")
    for row in rows:
        faster, grown = row["ours_times_faster_median"], row["peak_growth_bytes"]
        slowest, fastest = row["residues_per_s_min"], row["residues_per_s_max"]
        low, high = row["ours_times_faster_min"], row["ours_times_faster_max"]
        only = "" if row["gives"] == "embeddings" else f" ({row['gives']})"
        table.add_row(
            row["shape"],
            row["mix"],
            f"{row['engine']} {row['precision']}{only}",
            "one sequence" if row["budget_tokens"] == 1 else f"{row['budget_tokens']:,}",
            f"{row['residues_per_s_median']:,.0f} ({slowest:,.0f} to {fastest:,.0f})",
            "" if faster is None else f"{faster:.2f} ({low:.2f} to {high:.2f}) in {row['ours_precision']}",
            f"{row['gflops']:,.0f}",
            f"{row['percent_of_ceiling']:.0f} %",
            "" if grown is None else f"{grown / 1e6:,.0f} MB",
        )
    return table


def verdict_table(verdicts: Sequence[Row]) -> Table:
    """What decides: how many times faster ours is."""
    table = Table(title="how many times faster, medians of interleaved pairs")
    for column in ("shape", "mix", "ratio", "peer"):
        table.add_column(column)
    for column in ("median (min to max)", "pairs"):
        table.add_column(column, justify="right")
    for row in verdicts:
        for name, ratio in row["ratios"].items():
            shown = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            table.add_row(row["shape"], row["mix"], name, ratio["peer"], shown, str(ratio["pairs"]))
    return table
