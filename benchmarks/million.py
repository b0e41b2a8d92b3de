"""A million sequences end to end, by the command that users run: does it stay in bounds, and does it stay as fast?

    python -m protnest.benchmarks.million SWISSPROT.fasta.gz --out out/million

Writes a library of variants of real proteins, embeds a small part of it, then all of it, each with `protnest embed`,
and watches these processes from outside: their processor time, their memory, and the shards that run.json lists. What
it saw is kept beside the store, so that a run that was stopped or killed goes on, both the store's and this one's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from protnest.benchmarks.rows import Row, append_rows, machine_facts
from protnest.benchmarks.variant_library import write_variants

_TICKS_PER_S = 100  # What Linux counts processor time in, whatever its own clock is.
_PERIOD_S = 0.5

MOST_GROWTH_BYTES = 300 * 10**6
"""Of the peak, from the part to the whole."""
MOST_IDLE = 0.05
"""Of the workers' time, in which no model ran."""
MOST_DRIFT = 0.05
"""Of processor time a shard, from the first tenth to the last."""
_LEAST_SHARDS = 100


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was seen of a run's processes when another shard was finished.

    Attributes:
        shards: finished, over all calls.
        cpu_s: processor time of this call's processes so far.
        peak_bytes: most memory that each of them ever had, added up.
        wall_s: since the call began.
    """

    shards: int
    cpu_s: float
    peak_bytes: int
    wall_s: float


def embed_command(library: Path, out: Path, *options: str) -> list[str]:
    """`protnest embed`, as a process of this Python, with a report for machines."""
    words = ["-m", "protnest.engine.cli", "embed", str(library), "--out", str(out), "--json", *options]
    return [sys.executable, *words]


def watch(command: list[str], out: Path) -> Iterator[Sample]:
    """Runs a command that writes a store to `out`, and yields a sample each time run.json lists more shards.

    Raises:
        subprocess.CalledProcessError: it failed; its report stands in `out`.json.
    """
    began = time.monotonic()
    shards = -1
    with out.with_suffix(".json").open("w") as report, subprocess.Popen(command, stdout=report) as process:
        while process.poll() is None:
            time.sleep(_PERIOD_S)
            cpu_s, peak_bytes = _tree(process.pid)
            found = _shards(out)
            if found != shards and cpu_s:
                shards = found
                yield Sample(shards=found, cpu_s=cpu_s, peak_bytes=peak_bytes, wall_s=time.monotonic() - began)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _tree(pid: int) -> tuple[float, int]:
    """Processor seconds and peak bytes of a process and its children, dead ones' seconds included."""
    try:
        folder = Path(f"/proc/{pid}")
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        # utime, stime, and those of children that were waited for.
        cpu_s = sum(int(fields[place]) for place in (11, 12, 13, 14)) / _TICKS_PER_S
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        peak = int(status.get("VmHWM", "0 kB").split()[0]) * 1024
        children = [
            int(child) for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()
        ]
    except (OSError, ValueError):
        return 0.0, 0  # It is just gone.
    for child in children:
        seconds, most = _tree(child)
        cpu_s, peak = cpu_s + seconds, peak + most
    return cpu_s, peak


def _shards(out: Path) -> int:
    try:
        return len(json.loads((out / "run.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def seconds_by_tenth(samples: list[Sample]) -> list[float]:
    """Processor seconds a shard in each tenth of the shards: the slope of a line through its samples.

    Not the difference of the first and the last of them: shards that are under way at either end, one a worker, would
    count whole or not at all, which of two workers and 49 shards a tenth is up to 4 %.

    Args:
        samples: of one call or of several, one after another; those before a call's first shard hold its start, and
            are left out.
    """
    last = samples[-1].shards
    calls: list[list[Sample]] = [[]]
    for before, after in itertools.pairwise([samples[0], *samples]):
        # A call that was killed ends where the processor time falls, and another begins.
        if after.cpu_s < before.cpu_s:
            calls.append([])
        calls[-1].append(after)
    tenths = []
    for tenth in range(10):
        of_shards = of_seconds = 0.0
        for call in calls:
            begun = [sample for sample in call if sample.shards > call[0].shards]
            inside = [sample for sample in begun if tenth * last <= 10 * sample.shards <= (tenth + 1) * last]
            if inside:
                middle = statistics.fmean(sample.shards for sample in inside)
                of_shards += sum((sample.shards - middle) ** 2 for sample in inside)
                of_seconds += sum((sample.shards - middle) * sample.cpu_s for sample in inside)
        tenths.append(of_seconds / of_shards if of_shards else math.nan)
    return tenths


def _embed(library: Path, out: Path, options: list[str], course: Path) -> tuple[list[Sample], dict[str, Any]]:
    for sample in watch(embed_command(library, out, *options), out):
        append_rows(course, [vars(sample)])
        print(f"\r{out.name}: {sample.shards} shards, {sample.peak_bytes / 1e6:,.0f} MB", end="", file=sys.stderr)
    print(file=sys.stderr)
    samples = [Sample(**json.loads(line)) for line in course.read_text().splitlines()]
    return samples, json.loads(out.with_suffix(".json").read_text())


def run(source: Path, out: Path, *, count: int, part: int, options: list[str]) -> Row:
    """Makes the library, embeds its first `part` sequences and all of it, and gives what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {"part": out / f"library-{part}.fasta", "whole": out / f"library-{count}.fasta"}
    for path, size in zip(paths.values(), (part, count), strict=True):
        if not path.exists():
            write_variants(source, path, size)
    reports, samples = {}, {}
    for name, path in paths.items():
        samples[name], reports[name] = _embed(path, out / name, options, out / f"{name}.jsonl")
    tenths = seconds_by_tenth(samples["whole"])
    peaks = {name: max(sample.peak_bytes for sample in seen) for name, seen in samples.items()}
    report = reports["whole"]
    return {
        "kind": "million",
        "sequences": report["sequences"],
        "asked": count,
        "part": part,
        "shards": samples["whole"][-1].shards,
        "model": report["model"],
        "workers": report["workers"],
        "resumed": report["resumed"],
        "residues": report["residues"],
        "residues_per_s": report["residues_per_s"],
        "total_s": report["total_s"],
        "idle_share": report["idle_share"],
        "seconds": report["seconds"],
        "peak_bytes": peaks["whole"],
        "peak_bytes_part": peaks["part"],
        "peak_grows_by_bytes": peaks["whole"] - peaks["part"],
        "cpu_s_a_shard_by_tenth": [None if math.isnan(seconds) else round(seconds, 3) for seconds in tenths],
        "last_tenth_over_first": None if math.isnan(tenths[-1] / tenths[0]) else round(tenths[-1] / tenths[0], 4),
    }


def misses(row: Row) -> list[str]:
    """What a run should have reached and did not, in words.

    Of fewer than 100 shards tenths say nothing, and what processes take to come up is not small beside the rest.
    """
    missed = []
    if row["sequences"] != row["asked"]:
        missed.append(f"{row['sequences']:,} sequences of {row['asked']:,} are in the store")
    if row["peak_grows_by_bytes"] > MOST_GROWTH_BYTES:
        grown, allowed = row["peak_grows_by_bytes"] / 1e6, MOST_GROWTH_BYTES / 1e6
        missed.append(f"memory grew by {grown:,.0f} MB, allowed are {allowed:,.0f}")
    is_long = row["shards"] >= _LEAST_SHARDS
    if is_long and row["idle_share"] is not None and row["idle_share"] > MOST_IDLE:
        missed.append(f"stages beside the model took {row['idle_share']:.1%} of the time, allowed are {MOST_IDLE:.0%}")
    ratio = row["last_tenth_over_first"]
    if is_long and ratio is not None and abs(ratio - 1) > MOST_DRIFT:
        missed.append(
            f"the last tenth of shards took {ratio:.3f} of the first's processor time, allowed are "
            f"{1 - MOST_DRIFT} to {1 + MOST_DRIFT}"
        )
    return missed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="FASTA file of real proteins, plain or .gz")
    parser.add_argument("--out", type=Path, default=Path("out/million"), help="folder for libraries and stores")
    parser.add_argument("--count", type=int, default=1_000_000, help="sequences of the whole library")
    parser.add_argument("--part", type=int, default=20_000, help="sequences of the small part")
    parser.add_argument("--model", default="nano-xs")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where memory or time grow, or the model waits"
    )
    parser.add_argument("--rows", type=Path, help="file of JSON lines to which the result is added")
    args = parser.parse_args()
    options = ["--model", args.model, "--workers", str(args.workers), "--device", "cpu"]
    row = run(args.source, args.out, count=args.count, part=args.part, options=options)
    if args.rows is not None:
        append_rows(args.rows, [row | machine_facts(torch.device("cpu"))])
    print(json.dumps(row, indent=1))
    if args.check and (missed := misses(row)):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
