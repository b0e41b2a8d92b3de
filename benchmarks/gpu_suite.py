"""What `gpu.py` runs: the tests that need a GPU, parity against fp64, and speed beside peers.

Each function takes a device, so that all of it can be tried without a GPU, at tiny sizes.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from protnest.benchmarks.ceiling import copy_gbytes_per_s
from protnest.benchmarks.comparison import Plan, compare
from protnest.benchmarks.generate_comparison import GeneratePlan, compare_generation
from protnest.benchmarks.generate_problems import Problem as Generated
from protnest.benchmarks.kd_comparison import KDPlan, allowed_errors, compare_kd, measure_errors
from protnest.benchmarks.kd_engines import COMPILED, EAGER, LIGER, OURS, protnest
from protnest.benchmarks.kd_problems import BOTH, HEADS, LOGITS, OPERATIONS, Data, Problem
from protnest.benchmarks.parity import row_errors
from protnest.benchmarks.peers import random_encoder
from protnest.benchmarks.proteins import make_up
from protnest.benchmarks.rows import Row
from protnest.engine import Encoder
from protnest.engine.alphabet import BOS_ID, EOS_ID, MASK_ID
from protnest.engine.config import EncoderConfig
from protnest.engine.device import PRECISIONS
from protnest.engine.packing import PackedBatch, pack, pack_tokens
from protnest.kernels.kd_options import KDOptions

SMALL_SHAPES: dict[str, EncoderConfig] = {
    "2 layers, K=8": EncoderConfig(layers=2, width=24, heads=3, feedforward=96),
    "2 layers, K=16": EncoderConfig(layers=2, width=64, heads=4, feedforward=256),
    "2 layers, K=24": EncoderConfig(layers=2, width=120, heads=5, feedforward=480),
    "2 layers, K=64": EncoderConfig(layers=2, width=256, heads=4, feedforward=1024),
    "2 layers, K=128": EncoderConfig(layers=2, width=256, heads=2, feedforward=1024),
}
"""Shapes that run in no time and cover the head widths K of the published models, and odd ones."""

MIXED_LENGTHS = (1, 2, 7, 33, 130, 420, 900)

KD_PROBLEMS: tuple[Problem, ...] = (
    Problem(operation=LOGITS, vocabulary=50_257, rows=8192, segments="long", precision="bf16"),
    Problem(operation=LOGITS, vocabulary=50_257, rows=8192, segments="long", precision="fp32"),
    Problem(operation=LOGITS, vocabulary=33, rows=262_144, segments="proteins", precision="bf16"),
    Problem(operation=LOGITS, vocabulary=33, rows=262_144, segments="proteins", precision="fp32"),
    Problem(operation=HEADS, vocabulary=50_257, rows=8192, segments="long", precision="bf16"),
)
"""What the distillation loss is timed on."""

GENERATE_PROBLEMS: tuple[Generated, ...] = (
    Generated(shape="tiny", tokens=200),
    Generated(shape="protgpt2", tokens=64),
)
"""What generation is timed on: the smallest published student, and the teacher for fewer tokens."""

KD_VOCABULARIES = (33, 256, 257, 50_257)
"""Both kinds of kernels, and the edge between them."""

# Few, since each choice is a kernel of its own to compile: the default, all off, and both temperatures but 2.
_KD_OPTIONS = (
    KDOptions(),
    KDOptions(uncertainty=False, smooth=False),
    KDOptions(temperature=1.0, smooth=False),
    KDOptions(temperature=3.0, weight_normalization="weight", alpha=0.2),
)
_KD_PEERS = (EAGER, COMPILED, LIGER)

_GPU_MARK = "mark.gpu"
_OUTPUT_CHARACTERS = 4000
# A precision's error against fp64 may be this many times that of the CPU in the same precision, plus two roundings.
_TIMES_CPU_ERROR, _ROUNDINGS = 2.0, 2.0


def run_tests(root: Path, *, seconds: float, paths: Sequence[Path] | None = None) -> list[Row]:
    """Runs `pytest -m gpu` on the files that hold such tests, in a process of its own.

    Args:
        root: the checkout.
        seconds: after which the process is killed.
        paths: test files; by default all below `root/tests` that mention the mark.

    Returns:
        One row: how many passed; the names of those that failed, broke or were skipped; the end of what pytest printed.

    Raises:
        subprocess.TimeoutExpired: it took longer than `seconds`.
        FileNotFoundError: there are no such test files, or pytest left no report.
    """
    if paths is None:
        everything = sorted((root / "tests").rglob("test_*.py"))
        paths = [path for path in everything if _GPU_MARK in path.read_text(encoding="utf-8")]
    if not paths:
        message = f"no test file below {root / 'tests'} mentions {_GPU_MARK}: is this a checkout?"
        raise FileNotFoundError(message)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"),
                *(f"--junitxml={report}", *map(str, paths)),
            ],
            # A safe path: the checkout's folders `kernels` and `engine` must not be found by their bare names.
            env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=root,
            timeout=seconds,
            capture_output=True,
            text=True,
        )
        output = (done.stdout + done.stderr)[-_OUTPUT_CHARACTERS:]
        if not report.is_file():
            message = f"pytest left no report; it printed: {output}"
            raise FileNotFoundError(message)
        outcomes = _read_report(report)
    return [
        {
            "passed": len(outcomes["passed"]),
            **{kind: names for kind, names in outcomes.items() if kind != "passed"},
            "exit_code": done.returncode,
            "seconds": round(time.perf_counter() - begin, 1),
            "output": output,
            "ok": bool(outcomes["passed"]) and not outcomes["failed"] and not outcomes["broken"],
        }
    ]


def _read_report(report: Path) -> dict[str, list[str]]:
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "broken": [], "skipped": []}
    kinds = {"failure": "failed", "error": "broken", "skipped": "skipped"}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found = [(kinds[child.tag], child.get("message") or "") for child in case if child.tag in kinds]
        for kind, reason in found or [("passed", "")]:
            outcomes[kind].append(f"{name}: {reason}" if reason else name)
    return outcomes


def mixed_batch(*, seed: int, lengths: Sequence[int] = MIXED_LENGTHS) -> PackedBatch:
    """Sequences of all kinds of lengths in one batch: some without masks, some with 15 %, one with nothing else."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    batch = pack(["".join(generator.choice(letters, size=length)) for length in lengths])
    tokens = batch.tokens_T.numpy().copy()
    ends = np.cumsum(batch.lengths_B)
    for row, (end, length) in enumerate(zip(ends.tolist(), batch.lengths_B, strict=True)):
        residues = tokens[end - length + 1 : end - 1]
        if row == 1:
            residues[:] = MASK_ID
        elif row % 2:
            residues[generator.random(residues.size) < 0.15] = MASK_ID
    return dataclasses.replace(batch, tokens_T=torch.from_numpy(tokens))


def split_batch(batch: PackedBatch) -> Iterator[PackedBatch]:
    """Each sequence of a batch as a batch of its own."""
    for tokens in torch.split(batch.tokens_T, list(batch.lengths_B)):
        assert tokens[0] == BOS_ID
        assert tokens[-1] == EOS_ID
        yield pack_tokens(tokens.numpy().astype(np.uint8), np.array([0, tokens.numel()]))


@torch.inference_mode()
def _outputs(encoder: Encoder, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Hidden states (T, D), logits (T, V), and hidden states of each sequence run alone (T, D): fp64, on the CPU."""
    hidden_TD = encoder(batch).hidden_TD
    alone_TD = torch.cat([encoder(single).hidden_TD for single in split_batch(batch)])
    outputs = {"hidden": hidden_TD, "logits": encoder.logits(hidden_TD), "alone": alone_TD}
    return {name: tensor.to("cpu", torch.float64) for name, tensor in outputs.items()}


def parity_rows(
    shape: str,
    config: EncoderConfig,
    precisions: Sequence[str],
    device: torch.device,
    *,
    lengths: Sequence[int] = MIXED_LENGTHS,
) -> list[Row]:
    """The encoder on a device against fp64 on the CPU, masked tokens and mixed lengths included.

    The error of a token is the norm of the difference over the norm of what is right. It is bounded by twice what the
    CPU errs by in the same precision, plus two roundings: a bound that holds for every shape and depth.

    Returns:
        A row for each precision and output; `ok` where the largest error is within the bound.
    """
    encoder = random_encoder(config, seed=0)
    batch = mixed_batch(seed=1, lengths=lengths)
    gold = _outputs(copy.deepcopy(encoder).double(), batch)
    rows: list[Row] = []
    for precision in precisions:
        dtype = PRECISIONS[precision]
        on_cpu = _outputs(copy.deepcopy(encoder).to(dtype), batch)
        on_device = _outputs(copy.deepcopy(encoder).to(device, dtype), batch)
        for name, right in gold.items():
            error = float(row_errors(right.numpy(), on_device[name].numpy()).max())
            cpu_error = float(row_errors(right.numpy(), on_cpu[name].numpy()).max())
            bound = _TIMES_CPU_ERROR * cpu_error + _ROUNDINGS * torch.finfo(dtype).eps
            rows.append(
                {
                    "shape": shape,
                    "precision": precision,
                    "output": name,
                    "tokens": len(batch.tokens_T),
                    # JSON has no NaN: an answer that is not a number has no error, and is not ok.
                    "error": error if np.isfinite(error) else None,
                    "cpu_error": cpu_error if np.isfinite(cpu_error) else None,
                    "bound": bound if np.isfinite(bound) else None,
                    "ok": error <= bound,
                }
            )
    return rows


def throughput_rows(
    shape: str,
    config: EncoderConfig,
    device: torch.device,
    *,
    deadline: float,
    sequences: int = 8000,
    budgets: Sequence[int] = (16384, 32768, 65536, 131072),
    precisions: Sequence[str] = ("bf16",),
    pairs: int = 5,
    checked: int = 64,
    ceiling_rows: Sequence[int] = (8192, 32768),
    longest: int = 1022,
    seconds_per_pass: float = 3.0,
) -> list[Row]:
    """Ours beside the peers that are installed, on made-up proteins; see `comparison`.

    Args:
        shape: what rows call the model.
        config: its architecture.
        device: where.
        deadline: value of `time.perf_counter()` that ends it early, after three pairs at the earliest.
        sequences: proteins at most; a duel takes as many as the slower engine runs in `seconds_per_pass`.
        budgets: tokens a batch to choose among.
        precisions: of ours and of transformers; fair-esm runs in fp32.
        pairs: turns of each peer with ours.
        checked: how many proteins are compared with the reference in every pass.
        ceiling_rows: rows of the matrix products that give the ceiling.
        longest: residues of the longest protein.
        seconds_per_pass: see `sequences`.
    """
    proteins = make_up(count=sequences, seed=0, longest=longest)
    plan = Plan(
        sequences=proteins.sequences,
        budgets=budgets,
        precisions=precisions,
        pairs=pairs,
        checked=checked,
        device=device,
        ceiling_rows=ceiling_rows,
        most_pass_seconds=seconds_per_pass,
        deadline=deadline,
    )
    facts: Row = {"data": proteins.source, "copy_gbytes_per_s": round(copy_gbytes_per_s(device), 1), "ok": True}
    return [row | facts for row in compare(shape, config, plan)]


def kd_parity_rows(
    device: torch.device,
    *,
    ours: str | None = None,
    vocabularies: Sequence[int] = KD_VOCABULARIES,
    precisions: Sequence[str] = tuple(PRECISIONS),
    rows: int = 150,
) -> list[Row]:
    """The distillation loss and its gradients against the fp64 reference on the same numbers.

    Args:
        device: where.
        ours: implementation; by default the device's fastest.
        vocabularies: values of V.
        precisions: of logits, or of hidden states and heads.
        rows: N, a few segments of them.

    Returns:
        A row for each operation, vocabulary, precision and choice of options; `ok` where both errors are within the
        bounds that a benchmark has, see `kd_engines`.
    """
    found: list[Row] = []
    for operation, V, precision in itertools.product(OPERATIONS, vocabularies, precisions):
        problem = Problem(operation=operation, vocabulary=V, rows=rows, segments="proteins", precision=precision)
        data = Data.of_problem(problem, device)
        exact = data.to(device, torch.float64)
        for options in _KD_OPTIONS:
            engine = protnest(ours or OURS[device.type], options)
            errors = measure_errors(protnest("reference", options).run(exact, BOTH), engine.run(data, BOTH))
            bounds = allowed_errors(engine, problem)
            found.append(
                {
                    "shape": f"{operation} V={V}",
                    "engine": engine.name,
                    "precision": precision,
                    "rows": rows,
                    "options": dataclasses.asdict(options),
                    # JSON has no NaN, see `parity_rows`.
                    **{
                        f"{name}_error": error if error is not None and np.isfinite(error) else None
                        for name, error in errors._asdict().items()
                    },
                    **{f"{name}_bound": bound for name, bound in zip(errors._fields, bounds, strict=True)},
                    "ok": all(
                        error is not None and error <= bound for error, bound in zip(errors, bounds, strict=True)
                    ),
                }
            )
    return found


def kd_rows(
    problem: Problem,
    device: torch.device,
    *,
    deadline: float,
    ours: str | None = None,
    peers: tuple[str, ...] = _KD_PEERS,
    pairs: int = 7,
) -> list[Row]:
    """The distillation loss beside the published code, that compiled, and Liger's part; see `kd_comparison`.

    Args:
        problem: what is measured.
        device: where.
        deadline: value of `time.perf_counter()` that ends it early, after three pairs of each peer at the earliest.
        ours: implementation; by default the device's fastest.
        peers: who meets it; one that does not fit into memory or does not compile has a row that says so.
        pairs: turns of each peer with ours.

    Raises:
        ParityError: a loss or a gradient is wrong.
    """
    copy_rate = round(copy_gbytes_per_s(device), 1)
    plan = KDPlan(device=device, copy_gbytes_per_s=copy_rate, pairs=pairs, peers=peers, ours=ours, deadline=deadline)
    return [row | {"copy_gbytes_per_s": copy_rate, "ok": True} for row in compare_kd(problem, plan)]


def generate_rows(
    problem: Generated,
    device: torch.device,
    *,
    precisions: Sequence[str] = ("fp32", "bf16"),
    pairs: int = 3,
    batch: int = 64,
    memory: bool = True,
) -> list[Row]:
    """Generation beside transformers' pipeline and `generate`, each in the same precision; see `generate_comparison`.

    Args:
        problem: shape and tokens.
        device: where.
        precisions: of ours and of transformers; fp32 is among them.
        pairs: turns.
        batch: sequences of a batch.
        memory: also watch each engine's memory, in processes of their own.

    Raises:
        ParityError: an answer of ours is wrong, or sequences have other lengths than they should.
        RuntimeError: transformers is not installed, or a process that watches memory failed.
    """
    plan = GeneratePlan(
        precisions=precisions, peer_precisions=precisions, pairs=pairs, batch=batch, memory=memory, device=device
    )
    return [row | {"ok": True} for row in compare_generation(problem, plan)]
