"""Generation beside transformers: first green, then interleaved pairs, then ceilings and memory, then the family.

In each turn transformers' pipeline and ours generate singly, then transformers' `generate` and ours in batches; ratios
are taken within the turn. All sequences of a run have the same number of tokens, whoever generates them, so that
tokens/s and sequences/s say the same; residues/s also hold the luck of which byte pairs were drawn.

A step reads every weight once and multiplies it with each running sequence's numbers. What it takes at least is the
longer of two times: to read the weights' bytes, and to multiply them. Attention over the cache, about a hundredth of
the products at 200 tokens, and choosing tokens are in no ceiling.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from protnest.benchmarks.ceiling import int8_product_gflops, product_gflops, read_gbytes_per_s
from protnest.benchmarks.course import Spread, spread
from protnest.benchmarks.generate_engines import (
    GENERATE,
    OURS,
    PIPELINE,
    PROMPT_TOKENS,
    Answer,
    Engine,
    Ours,
    TransformersModel,
    check_decoder,
    load_ours,
)
from protnest.benchmarks.generate_memory import TRANSFORMERS, MemoryTask, MemoryUse, measure_memory, transformers_engine
from protnest.benchmarks.generate_problems import Problem, layer_shapes
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.published_generation import MAX_TOKENS, SEQUENCES_CLAIMED, TEACHER, hours_for
from protnest.benchmarks.rows import Row
from protnest.engine.decoder_config import DecoderConfig
from protnest.engine.device import PRECISIONS
from protnest.kernels.hardware import multiplies_bf16

INT8 = "int8"
_MIB = 1 << 20
# Beyond any cache; more would only take longer.
_MOST_READ_BYTES = 1 << 29
_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, INT8: 1}
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class GeneratePlan:
    """How generation is measured.

    Attributes:
        precisions: of ours.
        peer_precisions: of transformers; fp32 is among them.
        pairs: turns.
        batch: sequences of a batch.
        singles: sequences that each engine generates one at a time in a turn.
        memory: also watch each engine's memory, in processes of their own.
        device: where.
        seed: of random numbers.
    """

    precisions: Sequence[str] = ("fp32", "bf16", INT8)
    peer_precisions: Sequence[str] = ("fp32",)
    pairs: int = 5
    batch: int = 64
    singles: int = 1
    memory: bool = True
    device: torch.device = _CPU
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.precisions:
            message = "precisions must not be empty"
            raise ValueError(message)
        if "fp32" not in self.peer_precisions or INT8 in self.peer_precisions:
            message = f"peer_precisions are {tuple(self.peer_precisions)}, expected fp32 and others but int8"
            raise ValueError(message)
        for name, least in (("pairs", 1), ("batch", 2), ("singles", 1)):
            if getattr(self, name) < least:
                message = f"{name} must be at least {least}, got {getattr(self, name)}"
                raise ValueError(message)

    def quick(self) -> GeneratePlan:
        """The same with at most 3 pairs of one sequence; bf16 only where the hardware has it."""
        kept = [name for name in self.precisions if name != "bf16" or multiplies_bf16(self.device)]
        return replace(self, pairs=min(self.pairs, 3), singles=1, precisions=kept or self.precisions)


def check_answer(engine: Engine, answer: Answer, count: int, tokens: int) -> None:
    """Compares the lengths of sequences with what was asked for.

    Raises:
        ParityError: there are more or fewer sequences, or one has another number of sampled tokens than `tokens`.
    """
    if answer.tokens != [tokens] * count:
        message = (
            f"{engine.name} {engine.precision}: {len(answer.tokens)} sequences of {sorted(set(answer.tokens))} tokens, "
            f"expected {count} of {tokens}: engines that do not generate as much cannot be compared"
        )
        raise ParityError(message)


def take_turns(engines: Sequence[Engine], turns: int, *, singles: int, tokens: int) -> dict[Engine, list[Answer]]:
    """Passes of all engines, each once in a turn in their order; a short one of each before, so that none starts cold.

    Raises:
        ParityError: see `check_answer`.
    """
    answers: dict[Engine, list[Answer]] = {engine: [] for engine in engines}
    for turn in range(turns):
        for engine, passes in answers.items():
            count = singles if engine.batch == 1 else engine.batch
            passes.append(engine.generate(count, first=turn * count))
            check_answer(engine, passes[-1], count, tokens)
    return answers


def named(name: str, values: Spread | None) -> Row:
    """Three keys of a row: `name_median`, `name_min` and `name_max`; null where nothing was measured."""
    return {
        f"{name}_{end}": None if values is None else values[place] for place, end in enumerate(("median", "min", "max"))
    }


def step_bytes(config: DecoderConfig, precision: str, device: torch.device) -> int:
    """Bytes of the weights that a step multiplies with; bf16 without bf16 units is kept, and read, in fp32."""
    widened = precision == "bf16" and not multiplies_bf16(device)
    products = config.layers * _products(layer_shapes(config)) + config.width * config.vocabulary
    return products * (4 if widened else _WEIGHT_BYTES[precision])


class GenerateCourse:
    """The passes over one problem's checkpoint.

    Args:
        problem: what is generated with.
        plan: how it is measured.
        folder: an empty one, for the checkpoint.
        tell: told what begins.

    Raises:
        RuntimeError: transformers is not installed.
        ParityError: a decoder of ours is not transformers'.
    """

    def __init__(
        self, problem: Problem, plan: GeneratePlan, folder: Path, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self._problem, self._plan, self._folder, self._tell = problem, plan, folder, tell
        self._tokens = problem.tokens - PROMPT_TOKENS
        problem.write(folder)
        theirs = {name: TransformersModel(folder, precision=name, device=plan.device) for name in plan.peer_precisions}
        decoders = {name: load_ours(folder, precision=name, device=plan.device) for name in plan.precisions}
        tell(f"{problem.shape}: parity of {', '.join(decoders)}")
        self.differences = {name: check_decoder(decoder, theirs["fp32"]) for name, decoder in decoders.items()}
        self.engines: list[Engine] = []
        for batch in (1, plan.batch):
            self.engines += [
                transformers_engine(model, tokens=problem.tokens, batch=batch) for model in theirs.values()
            ]
            self.engines += [Ours(decoder, batch=batch, seed=plan.seed) for decoder in decoders.values()]
        # CPU time is one thread's work; of several it counts their waiting.
        self._counts_cpu = plan.device.type == "cpu" and torch.get_num_threads() == 1

    def run(self) -> list[Row]:
        """Rows of part "speed": one for each engine, precision and batch.

        Raises:
            ParityError: sequences have other lengths than they should.
            RuntimeError: a process that watches memory failed.
        """
        plan = self._plan
        self._tell(f"{self._problem.shape}: {plan.pairs} turns of {len(self.engines)} engines, {self._tokens} tokens")
        for engine in self.engines:
            if engine.batch == 1:
                engine.generate(1)  # Shared with the batch's: models are warm, and kernels chosen.
        answers = take_turns(self.engines, plan.pairs, singles=plan.singles, tokens=self._tokens)
        ceilings = {engine: self._ceiling(engine) for engine in self.engines}
        memory = self._watch_memory() if plan.memory else {}
        return [self._row(engine, answers, ceilings[engine], memory.get(_made_by(engine))) for engine in self.engines]

    def _row(self, engine: Engine, answers: dict[Engine, list[Answer]], ceiling: Row, memory: MemoryUse | None) -> Row:
        passes = answers[engine]
        sequences = len(passes[0].tokens)
        # A step gives a token to each running sequence.
        ms_per_step = spread([1e3 * each.seconds * engine.batch / sum(each.tokens) for each in passes])
        return {
            "part": "speed",
            "shape": self._problem.shape,
            "parameters": self._problem.parameters,
            "engine": engine.name,
            "precision": engine.precision,
            "batch": engine.batch,
            "sequences": sequences,
            "tokens": self._tokens,
            "pairs": len(passes),
            "residues_per_token": sum(map(_residues, passes)) / (len(passes) * sequences * self._tokens),
            **named("tokens_per_s", spread([each.tokens_per_s for each in passes])),
            **named("residues_per_s", spread([each.residues_per_s for each in passes])),
            **named("first_sequence_seconds", spread([each.first_seconds for each in passes])),
            **named("ms_per_step", ms_per_step),
            **self._ratios("times_pipeline", self._peer(PIPELINE, engine), engine, answers),
            **self._ratios(
                "times_generate", self._peer(GENERATE, engine) if engine.batch > 1 else None, engine, answers
            ),
            "max_difference": self.differences[engine.precision] if engine.name == OURS else None,
            **ceiling,
            "percent_of_ceiling": 100 * ceiling["ceiling_ms_per_step"] / ms_per_step.median,
            "weights_bytes": self._problem.parameters * _WEIGHT_BYTES[engine.precision],
            "libraries_bytes": None if memory is None else memory.libraries_bytes,
            "load_peak_bytes": None if memory is None else memory.load_peak_bytes,
            "held_bytes": None if memory is None else memory.held_bytes,
            "peak_bytes": None if memory is None else memory.peak_bytes[engine.batch],
        }

    def _peer(self, name: str, own: Engine) -> Engine:
        """transformers in the same precision, or else in fp32."""
        found = {engine.precision: engine for engine in self.engines if engine.name == name}
        return found.get(own.precision, found["fp32"])

    def _ratios(self, name: str, peer: Engine | None, own: Engine, answers: dict[Engine, list[Answer]]) -> Row:
        """Ours over the peer's, turn by turn: tokens a second, the same of CPU time, and residues a second."""
        if own.name != OURS or peer is None:
            return {key: None for each in (name, f"{name}_cpu", f"{name}_residues") for key in named(each, None)}
        turns = list(zip(answers[own], answers[peer], strict=True))
        cpu = [_per_cpu_second(mine) / _per_cpu_second(theirs) for mine, theirs in turns] if self._counts_cpu else None
        return {
            **named(name, spread([mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in turns])),
            **named(f"{name}_cpu", None if cpu is None else spread(cpu)),
            **named(
                f"{name}_residues", spread([mine.residues_per_s / theirs.residues_per_s for mine, theirs in turns])
            ),
        }

    def _ceiling(self, engine: Engine) -> Row:
        """What a step takes at least, and which of its two times that is."""
        config, device = self._problem.whole, self._plan.device
        size = step_bytes(config, engine.precision, device)
        read = read_gbytes_per_s(device, size_bytes=min(size, _MOST_READ_BYTES), repeats=3)
        layer, head = layer_shapes(config), ((config.width, config.vocabulary),)
        layers_flops, head_flops = (2 * engine.batch * _products(shapes) for shapes in (layer * config.layers, head))
        parts = ((layers_flops, layer), (head_flops, head))
        seconds = sum(flops / _gflops(shapes, engine, device) / 1e9 for flops, shapes in parts)
        flops = layers_flops + head_flops
        times_ms = {"reading weights": size / read / 1e6, "products": 1e3 * seconds}
        # One row's product is a reading of its weights: its rate says nothing else.
        limit = "reading weights" if engine.batch == 1 else max(times_ms, key=lambda name: times_ms[name])
        return {
            "ceiling": limit,
            "ceiling_ms_per_step": times_ms[limit],
            "step_weight_bytes": size,
            "read_gbytes_per_s": read,
            "step_gflop": flops / 1e9,
            "gemm_gflops": flops / seconds / 1e9,
        }

    def _watch_memory(self) -> dict[tuple[str, str], MemoryUse]:
        """By maker and precision."""
        plan, found = self._plan, dict[tuple[str, str], MemoryUse]()
        for maker, precision in dict.fromkeys(map(_made_by, self.engines)):
            self._tell(f"{self._problem.shape}: memory of {maker} {precision}")
            found[maker, precision] = measure_memory(
                MemoryTask(
                    maker=maker,
                    folder=str(self._folder),
                    precision=precision,
                    batches=(1, plan.batch),
                    tokens=self._problem.tokens,
                    device=str(plan.device),
                    threads=torch.get_num_threads(),
                )
            )
        return found


def _made_by(engine: Engine) -> tuple[str, str]:
    return OURS if engine.name == OURS else TRANSFORMERS, engine.precision


def _products(shapes: Sequence[tuple[int, int]]) -> int:
    """Multiply-adds of one row."""
    return sum(into * out for into, out in shapes)


def _gflops(shapes: Sequence[tuple[int, int]], engine: Engine, device: torch.device) -> float:
    """The machine's rate at products of an engine's batch and precision; 16-bit numbers can also be widened to fp32."""
    if engine.precision == INT8:
        return int8_product_gflops(shapes, device, rows=(engine.batch,), repeats=3)
    dtypes = {PRECISIONS[engine.precision], torch.float32}
    return max(product_gflops(shapes, dtype, device, rows=(engine.batch,), repeats=3) for dtype in dtypes)


def _residues(answer: Answer) -> int:
    return sum(answer.residues)


def _per_cpu_second(answer: Answer) -> float:
    return sum(answer.tokens) / answer.cpu_seconds


def compare_generation(
    problem: Problem, plan: GeneratePlan, tell: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """Rows of one shape, see `GenerateCourse`.

    Raises:
        ParityError: an answer of ours is wrong, or sequences have other lengths than they should.
        RuntimeError: transformers is not installed, or a process that watches memory failed.
    """
    load = {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "seed": problem.seed}
    with tempfile.TemporaryDirectory() as folder:
        return [load | row for row in GenerateCourse(problem, plan, Path(folder), tell).run()]


def family_rows(rows: Sequence[Row]) -> list[Row]:
    """Part "family": models beside their teacher, each engine by itself, in the published table's words.

    Seconds are those of a sequence of 200 tokens at the rate that was measured, in a batch each sequence's share;
    ratios to the teacher are null where it was not measured. The pipeline singly is the published way.

    Args:
        rows: of part "speed", of any shapes.
    """
    teachers = {_way(row): row for row in rows if row["shape"] == TEACHER}
    family: list[Row] = []
    for row in rows:
        teacher = teachers.get(_way(row))
        seconds = (MAX_TOKENS - PROMPT_TOKENS) / row["tokens_per_s_median"]
        per_sequence = teacher and row["tokens_per_s_median"] / teacher["tokens_per_s_median"]
        per_residue = teacher and row["residues_per_s_median"] / teacher["residues_per_s_median"]
        peak = row["peak_bytes"]
        family.append(
            {
                "part": "family",
                **{key: row[key] for key in ("shape", "parameters", "engine", "precision", "batch", "tokens")},
                "seconds_per_sequence": seconds,
                "sequences_per_minute": 60 / seconds,
                "residues_per_s": row["residues_per_s_median"],
                "times_faster_per_sequence": per_sequence,
                "times_faster_per_residue": per_residue,
                "peak_mib": None if peak is None else peak / _MIB,
                "weights_mib": row["weights_bytes"] / _MIB,
                "hours_per_million": hours_for(SEQUENCES_CLAIMED, 60 / seconds),
            }
        )
    return family


def _way(row: Row) -> tuple[str, str, int]:
    return row["engine"], row["precision"], row["batch"]
