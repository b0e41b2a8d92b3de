"""Everything that needs a GPU, in one call of less than nine minutes: tests, parity and speed, to one JSON file.

    python benchmarks/gpu.py --out gpu.json

It installs nothing. From a bare checkout, first `python -m pip install --no-deps --no-build-isolation .`, and see that
numpy, torch, dnaio and pytest are there; fair-esm, transformers and liger-kernel are compared with where they are
installed.

Exit code 0: all ran and all was right. 1: a test, a parity check or a section failed (the file says which, with the
traceback), or there is no CUDA GPU. See `benchmarks/README.md` for what the rows hold.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Section = Callable[[], list[dict[str, Any]]]

_SECTIONS = ("tests", "parity", "kernels", "kd", "graphs", "generate", "throughput")
# Left of the time for writing and for passes that cannot be cut short.
_RESERVE_SECONDS = 30.0
# Some sixty kernels are compiled for them.
_TEST_SECONDS = 200.0
# Of a problem; checks and compiling come on top.
_KD_SECONDS = 15.0


class _Notes(logging.Handler):
    """Keeps what the package logs: which attention ran, and why."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_guarded(name: str, section: Section) -> list[dict[str, Any]]:
    """A section's rows with its name; where it fails, one row with the traceback, so that the others still run."""
    begin = time.perf_counter()
    try:
        rows = section()
    except Exception:  # noqa: BLE001 - recorded as a row and as exit code 1
        rows = [{"ok": False, "traceback": traceback.format_exc()}]
    seconds = round(time.perf_counter() - begin, 1)
    return [{"section": name, "section_seconds": seconds, **row} for row in rows]


def _sections(options: argparse.Namespace, begin: float, device: Any) -> list[tuple[str, Section]]:
    """The sections that were asked for, in order; each is given its time when it starts."""
    from protnest.benchmarks.comparison import SHAPES
    from protnest.benchmarks.encoder_kernels import graph_rows, kernel_rows
    from protnest.benchmarks.generate_problems import Problem as Generated
    from protnest.benchmarks.gpu_suite import (
        GENERATE_PROBLEMS,
        KD_PROBLEMS,
        SMALL_SHAPES,
        generate_rows,
        kd_parity_rows,
        kd_rows,
        parity_rows,
        run_tests,
        throughput_rows,
    )
    from protnest.benchmarks.kd_problems import Problem
    from protnest.benchmarks.rows import ROOT
    from protnest.engine.graphs import WIDEST

    end: float = begin + 60 * options.minutes - _RESERVE_SECONDS

    def left() -> float:
        seconds = end - time.perf_counter()
        if seconds <= 0:
            message = f"out of time: {options.minutes} minutes are over"
            raise TimeoutError(message)
        return seconds

    def test() -> list[dict[str, Any]]:
        return run_tests(ROOT, seconds=min(_TEST_SECONDS, left()))

    def compare_with_gold(shape: str) -> list[dict[str, Any]]:
        left()
        return parity_rows(shape, parity_shapes[shape], ("fp32", "bf16", "fp16"), device)

    def measure_kernels(shape: str, precision: str) -> list[dict[str, Any]]:
        left()
        return kernel_rows(shape, SHAPES[shape], precision, device)

    def compare_graphs(shape: str) -> list[dict[str, Any]]:
        left()
        return graph_rows(shape, SHAPES[shape], device)

    def compare_losses() -> list[dict[str, Any]]:
        left()
        return kd_parity_rows(device)

    def measure_loss(problem: Problem) -> list[dict[str, Any]]:
        return kd_rows(problem, device, deadline=time.perf_counter() + min(_KD_SECONDS, left()))

    def generate(problem: Generated) -> list[dict[str, Any]]:
        left()
        return generate_rows(problem, device)

    def measure(index: int) -> list[dict[str, Any]]:
        # What is left is shared among the shapes that are left.
        share = left() / (len(shapes) - index)
        return throughput_rows(shapes[index], SHAPES[shapes[index]], device, deadline=time.perf_counter() + share)

    shapes = options.shapes
    parity_shapes = SMALL_SHAPES | {name: SHAPES[name] for name in ("8M", "35M")}
    sections: list[tuple[str, Section]] = []
    if "tests" in options.sections:
        sections.append(("tests", test))
    if "parity" in options.sections:
        sections += [("parity", partial(compare_with_gold, shape)) for shape in parity_shapes]
    if "kernels" in options.sections:
        # fp32 once: it differs from one shape to the next in nothing but size.
        pairs = [*((shape, "bf16") for shape in shapes), *((shape, "fp32") for shape in shapes[:1])]
        sections += [("kernels", partial(measure_kernels, *pair)) for pair in pairs]
    if "kd" in options.sections:
        sections += [("kd", compare_losses), *(("kd", partial(measure_loss, problem)) for problem in KD_PROBLEMS)]
    if "graphs" in options.sections:
        small = [shape for shape in shapes if SHAPES[shape].width <= WIDEST]
        sections += [("graphs", partial(compare_graphs, shape)) for shape in small]
    if "generate" in options.sections:
        sections += [("generate", partial(generate, problem)) for problem in GENERATE_PROBLEMS]
    if "throughput" in options.sections:
        sections += [("throughput", partial(measure, index)) for index in range(len(shapes))]
    return sections


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run every test and benchmark that needs a GPU.")

    def words(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--out", type=Path, required=True, help="JSON file, replaced after each section")
    parser.add_argument("--sections", type=words, default=list(_SECTIONS), help=f"of {','.join(_SECTIONS)}")
    parser.add_argument(
        "--shapes", type=words, default=["8M", "35M", "150M", "650M"], help="for kernels, graphs and throughput"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing more begins")
    parser.add_argument("--commit", help="what to record where the checkout came without git")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.sections if name not in _SECTIONS]:
        parser.error(f"--sections: no {', '.join(unknown)}; allowed are {', '.join(_SECTIONS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sections and returns the exit code."""
    begin = time.perf_counter()
    options = _options(arguments)
    try:
        import torch
        from protnest.benchmarks.comparison import SHAPES
        from protnest.benchmarks.rows import SCHEMA_VERSION, machine_facts, write_document
    except ImportError as error:
        print(
            f"{error}: from the checkout, run `python -m pip install --no-deps --no-build-isolation .`", file=sys.stderr
        )
        return 1
    if unknown := [shape for shape in options.shapes if shape not in SHAPES]:
        print(f"--shapes: no {', '.join(unknown)}; allowed are {', '.join(SHAPES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU here; this benchmark needs one", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    notes = _Notes()
    logger = logging.getLogger("protnest")
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "machine": machine_facts(device, commit=options.commit),
        "ok": True,
        "rows": [],
        "log": notes.lines,
    }
    for name, section in _sections(options, begin, device):
        rows = run_guarded(name, section)
        document["rows"] += rows
        document["ok"] &= all(row["ok"] for row in rows)
        document["seconds"] = round(time.perf_counter() - begin, 1)
        write_document(options.out, document)
        print(f"{document['seconds']:6.1f} s  {name}: {_summary(rows)}", flush=True)
        torch.cuda.empty_cache()
    print(f"{'all is right' if document['ok'] else 'FAILED: see the rows that are not ok'}; written to {options.out}")
    return 0 if document["ok"] else 1


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    wrong = [row for row in rows if not row["ok"]]
    if errors := [row["traceback"].strip().splitlines()[-1] for row in wrong if "traceback" in row]:
        return f"failed with {errors[0]}"
    first = rows[0]
    if "passed" in first:
        counts = ", ".join(f"{len(first[kind])} {kind}" for kind in ("failed", "broken", "skipped"))
        return f"{first['passed']} passed, {counts}"
    if "kernel" in first:
        return f"{first['shape']} {first['precision']}: " + "; ".join(_share(row) for row in rows)
    if "graphs" in first:
        return f"{first['shape']} {first['precision']}: " + "; ".join(
            _gain(row) for row in rows if row["engine"] == "eager"
        )
    if "tokens_per_s_median" in first:
        return f"{first['shape']}: " + "; ".join(_generated(row) for row in rows)
    if "residues_per_s_median" in first:
        return "; ".join(_rate(row) for row in rows)
    if "operation" in first:
        name = f"{first['operation']} V={first['vocabulary']:,} {first['precision']}"
        return f"{name}: " + "; ".join(_loss_rate(row) for row in rows)
    shapes = first["shape"] if len({row["shape"] for row in rows}) == 1 else "all shapes"
    return f"{shapes}: {len(rows) - len(wrong)} of {len(rows)} within their bounds"


def _rate(row: dict[str, Any]) -> str:
    text = f"{row['shape']} {row['engine']} {row['precision']} {row['residues_per_s_median']:,.0f} residues/s"
    faster = row["ours_times_faster_median"]
    return text if faster is None else f"{text}, ours {faster:.2f} times faster"


def _generated(row: dict[str, Any]) -> str:
    text = f"{row['engine']} {row['precision']} x {row['batch']} {row['residues_per_s_median']:,.0f} residues/s"
    faster = row["times_generate_median"] or row["times_pipeline_median"]
    return text if faster is None else f"{text}, ours {faster:.2f} times faster"


def _share(row: dict[str, Any]) -> str:
    text = f"{row['kernel']} {row['engine']} {row['ms']:.3f} ms, {row['percent_of_roofline']:.0f} % of roofline"
    return text if row["ok"] else f"{text}, WRONG"


def _gain(row: dict[str, Any]) -> str:
    return f"{row['budget_tokens']} tokens {row['ours_times_faster_median']:.2f} times faster with graphs"


def _loss_rate(row: dict[str, Any]) -> str:
    text = f"{row['direction']} {row['engine']}"
    if row["failure"]:
        return f"{text} {row['failure']}"
    text += f" {row['ms_median']:.2f} ms, {row['percent_of_ceiling']:.0f} % of ceiling"
    faster = row["ours_times_faster_median"]
    return text if faster is None else f"{text}, ours {faster:.2f} times faster"


if __name__ == "__main__":
    sys.exit(main())
