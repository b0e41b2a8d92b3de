"""Where a pass of ours spends its time: shares of its stages, from torch's profiler.

Inside the encoder, every operator's own time counts for the outermost operator around it whose name says a stage, so a
custom operator counts whole, whatever it calls; so do the functions and modules of the encoder that are a stage.
A fused operator counts for the first of its names in `_STAGES`: a product with a GELU in it is a product. What no name
tells (copies, casts, the embedding, Python between operators) is the rest. Outside of the encoder, planning, tokenising
and packing are timed as calls; what is left is pooling.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from protnest.benchmarks.peers import Protnest
from protnest.benchmarks.rows import Row
from protnest.engine import embedder as embedder_file
from protnest.engine import encoder as encoder_file
from torch.profiler import ProfilerActivity, profile, record_function

_RANGE = "protnest encoder"
_STAGES = (
    ("attention", re.compile(r"attention|rotary|softmax|flash")),
    ("products", re.compile(r"linear|addmm|(^|[:_])mm($|_)|bmm|matmul|gemm|mkldnn")),
    ("norms", re.compile(r"norm|^aten::add_?$")),
    ("gelu", re.compile(r"gelu")),
)
STAGES = ("plan_pack", *(name for name, _ in _STAGES), "pooling", "rest")
"""Keys of shares: planning, tokenising and packing; attention with rotary; matrix products; LayerNorm and residual."""
# What the embedder calls before the encoder.
_BEFORE = ("pack", "plan_batches")
# What the encoder calls that is a stage, by its own name for it; the profiler is told, as it is of modules whose name
# ends in norm. Those that a version does not have are left out.
_CALLED = {"rotary_attention": "attention", "rotary_table": "rotary", "add_norm": "norm", "bias_gelu": "gelu"}


def stage_of(operator: str) -> str | None:
    """The stage that an operator's name tells, None where it tells none."""
    return next((name for name, pattern in _STAGES if pattern.search(operator)), None)


class _Stopwatch:
    """Seconds spent in functions that are replaced by timed ones."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*given, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def _as_range(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def told(*given: Any, **options: Any) -> Any:
        with record_function(f"{_RANGE} {name}"):
            return function(*given, **options)

    return told


def _tell_of(module: torch.nn.Module, name: str) -> list[Any]:
    """Hooks that make a range of each of a module's calls."""
    open_ranges: list[Any] = []

    def enter(module: torch.nn.Module, given: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def leave(module: torch.nn.Module, given: Any, result: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


@contextmanager
def _watched(engine: Protnest, watch: _Stopwatch) -> Iterator[None]:
    """The encoder's calls and stages as ranges of the profiler, and the embedder's first steps on the stopwatch."""
    handles = _tell_of(engine.encoder, _RANGE)
    for name, module in engine.encoder.named_modules():
        if name.endswith("norm"):
            handles += _tell_of(module, f"{_RANGE} norm")
    replaced = [(embedder_file, name, watch.around) for name in _BEFORE if hasattr(embedder_file, name)]
    replaced += [
        (encoder_file, name, functools.partial(_as_range, stage))
        for name, stage in _CALLED.items()
        if hasattr(encoder_file, name)
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, wrap in replaced:
        setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
        for handle in handles:
            handle.remove()


def _inside(events: Any) -> tuple[float, dict[str, float]]:
    """Seconds of the encoder's ranges, and those of each stage in them."""
    total = 0.0
    seconds = dict.fromkeys((name for name, _ in _STAGES), 0.0)
    known: dict[int, tuple[bool, str | None]] = {}

    def place(event: Any) -> tuple[bool, str | None]:
        """Whether an event is in the encoder, and the stage of the outermost operator that tells one."""
        if event is None:
            return False, None
        if event.id not in known:
            inside, stage = place(event.cpu_parent)
            known[event.id] = inside or event.name == _RANGE, stage or (stage_of(event.name) if inside else None)
        return known[event.id]

    for event in events:
        if event.name == _RANGE:
            total += event.cpu_time_total / 1e6
            continue
        inside, stage = place(event)
        if inside and stage is not None:
            seconds[stage] += event.self_cpu_time_total / 1e6
    return total, seconds


def break_down(engine: Protnest, sequences: Sequence[str], budget: int) -> Row:
    """Shares of one pass, after one that warms up.

    Returns:
        `seconds`, and `shares`: those of `STAGES`, which add up to one; `top_operators`, the ten with most time of
        their own, for whoever wants to see behind a stage.
    """
    engine.embed(sequences, budget)
    watch = _Stopwatch()
    with _watched(engine, watch), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        begin = time.perf_counter()
        engine.embed(sequences, budget)
        seconds = time.perf_counter() - begin
    encoder, inside = _inside(profiler.events())
    parts = {"plan_pack": watch.seconds, **inside}
    parts["pooling"] = max(0.0, seconds - encoder - watch.seconds)
    parts["rest"] = max(0.0, seconds - sum(parts.values()))
    averages = sorted(profiler.key_averages(), key=lambda each: -each.self_cpu_time_total)
    averages = [each for each in averages if not each.key.startswith(_RANGE)][:10]
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "budget_tokens": budget,
        "seconds": round(seconds, 4),
        "shares": {name: round(parts[name] / sum(parts.values()), 4) for name in STAGES},
        "top_operators": {each.key: round(each.self_cpu_time_total / 1e6 / seconds, 4) for each in averages},
    }
