"""bench_generate: both do the same work, a difference ends it, ratios are of turns, the published table adds up."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from protnest.benchmarks import bench_generate, generate_comparison, generate_engines, generate_memory
from protnest.benchmarks.bench_generate import generate, plan_generation, plan_problems
from protnest.benchmarks.ceiling import read_gbytes_per_s
from protnest.benchmarks.generate_comparison import (
    GeneratePlan,
    compare_generation,
    family_rows,
    step_bytes,
    take_turns,
)
from protnest.benchmarks.generate_engines import (
    GENERATE,
    OURS,
    PIPELINE,
    PROMPT,
    PROMPT_TOKENS,
    Answer,
    Batched,
    Ours,
    Pipeline,
    TransformersModel,
    check_decoder,
    count_residues,
    load_ours,
)
from protnest.benchmarks.generate_memory import MemoryTask, MemoryUse, measure_memory
from protnest.benchmarks.generate_problems import Problem, random_decoder, stand_in_vocabulary
from protnest.benchmarks.parity import ParityError
from protnest.benchmarks.published_generation import PUBLISHED_RATES, hours_for, published_rows
from protnest.engine.decode_step import DecodeStep, Turn
from protnest.engine.decoder import Decoder, pack_ids
from protnest.engine.decoder_config import DECODER_SHAPES
from typer.testing import CliRunner

from support.generating import GENERATED, tiny_generation

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("checkpoint")
    tiny_generation().write(found)
    return found


@pytest.fixture(scope="module")
def theirs(folder: Path) -> TransformersModel:
    pytest.importorskip("transformers")
    return TransformersModel(folder, precision="fp32", device=CPU)


@pytest.fixture
def ours(folder: Path) -> Decoder:
    return load_ours(folder, precision="fp32", device=CPU)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape at no size, ceilings that take no time, and this process's threads left alone."""

    def problem(*, shape: str, tokens: int, seed: int) -> Problem:
        return tiny_generation(shape=shape, tokens=min(tokens, 64), seed=seed)

    monkeypatch.setattr(bench_generate, "Problem", problem)
    for name in ("read_gbytes_per_s", "product_gflops", "int8_product_gflops"):
        monkeypatch.setattr(generate_comparison, name, lambda *given, **options: 2.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def run(small: None, tmp_path: Path) -> Any:
    app = typer.Typer()
    app.command()(generate)

    def invoke(*options: str) -> tuple[Any, list[dict[str, Any]]]:
        out = tmp_path / "rows.jsonl"
        result = CliRunner().invoke(app, [*options, "--out", str(out)])
        lines = out.read_text("utf-8").splitlines() if out.exists() else []
        return result, [json.loads(line) for line in lines]

    return invoke


def _answer(seconds: float, tokens: Sequence[int], residues: Sequence[int] = (4,), cpu: float = 1.0) -> Answer:
    return Answer(seconds, seconds / 2, cpu, list(tokens), list(residues))


class _Scripted:
    """An engine whose answers are given."""

    precision = "fp32"

    def __init__(self, name: str, batch: int, answers: list[Answer], order: list[tuple[str, int, int]]) -> None:
        self.name, self.batch, self._answers, self._order = name, batch, answers, order

    def generate(self, count: int, *, first: int = 0) -> Answer:
        self._order.append((self.name, count, first))
        return self._answers.pop(0)


def test_the_stand_in_is_as_large_and_stands_for_about_four_residues() -> None:
    vocabulary = stand_in_vocabulary()
    assert (vocabulary.size, vocabulary.end, vocabulary.tokens[0]) == (50_257, 0, "<|endoftext|>")
    assert 3.7 < vocabulary.residues_V.mean() < 4.1
    counts = np.bincount(vocabulary.residues_V)
    assert list(counts[2:4]) == [400, 8000]
    assert counts[4] == 50_257 - 257 - 8400
    # The commonest four are there, the rarest are not.
    assert "LLLL" in vocabulary.tokens
    assert "WWWW" not in vocabulary.tokens
    assert vocabulary.decode(vocabulary.encode("MKTAYIAKQR")) == "MKTAYIAKQR"
    assert stand_in_vocabulary(257).size == 257
    with pytest.raises(ValueError, match="size is 256, expected 257 to 168,657"):
        stand_in_vocabulary(256)
    with pytest.raises(ValueError, match="size is 168,658"):
        stand_in_vocabulary(168_658)


@pytest.mark.parametrize("shape", ["tiny", "micro"])
def test_no_sequence_ends(shape: str) -> None:
    """The end's logit is tens of nats below the others', wherever a sequence stands, and the others' spread is sane."""
    config = replace(DECODER_SHAPES[shape], vocabulary=700, places=64)
    decoder = random_decoder(config, stand_in_vocabulary(700), seed=1)
    ids = np.random.default_rng(0).integers(700, size=60)
    ids[:3] = 0
    logits_TV = decoder.logits(decoder(pack_ids([ids]))).detach().numpy()
    ends_T, others_TV = logits_TV[:, 0], logits_TV[:, 1:]
    assert (ends_T < others_TV.max(axis=1) - 15).all()
    assert 1 < others_TV.std(axis=1).mean() < 4


def test_problems() -> None:
    """Parameters are the published counts; places are those of a sequence."""
    for each in PUBLISHED_RATES:
        assert Problem(shape=each.shape, tokens=24).parameters == each.parameters
    decoder = random_decoder(GENERATED, stand_in_vocabulary(700), seed=0)
    problem = tiny_generation(tokens=12)
    assert problem.parameters == sum(parameter.numel() for parameter in decoder.parameters())
    assert (problem.whole.places, problem.shortened.places) == (64, 12)
    with pytest.raises(ValueError, match="no shape 'large'; allowed are protgpt2, medium"):
        Problem(shape="large", tokens=10)
    for tokens in (2, 1025):
        with pytest.raises(ValueError, match=f"tokens is {tokens}, expected 3 to the 1024 that tiny has"):
            Problem(shape="tiny", tokens=tokens)


def test_seeds_make_other_weights(folder: Path, tmp_path: Path) -> None:
    tiny_generation(seed=1).write(tmp_path)
    other = load_ours(tmp_path, precision="fp32", device=CPU)
    assert other.fingerprint != load_ours(folder, precision="fp32", device=CPU).fingerprint


def test_every_engine_does_the_same_work(theirs: TransformersModel, ours: Decoder) -> None:
    """From the same prompt, as many tokens, as many sequences; texts differ from pass to pass."""
    assert theirs.start().tolist() == [ours.vocabulary.encode("", whole=False).tolist()]
    assert PROMPT_TOKENS == theirs.start().shape[1]
    engines = [
        Pipeline(theirs, tokens=10),
        Batched(theirs, tokens=10, batch=3),
        Ours(ours, batch=1),
        Ours(ours, batch=3),
    ]
    for engine in engines:
        first, second = engine.generate(7), engine.generate(7, first=7)
        assert first.tokens == second.tokens == [8] * 7
        assert len(first.residues) == 7
        assert first.residues != second.residues
        assert 0 < first.first_seconds < first.seconds
        assert first.cpu_seconds > 0
        assert first.tokens_per_s == pytest.approx(56 / first.seconds)
        assert first.residues_per_s == pytest.approx(sum(first.residues) / first.seconds)
        # Of this vocabulary's tokens two in three stand for one to three residues.
        assert 0.5 < sum(first.residues) / 56 < 3
    assert Ours(ours, batch=3).generate(7).residues == Ours(ours, batch=1).generate(7).residues


def test_transformers_is_given_the_published_settings(
    theirs: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"do_sample": True, "top_k": 950, "repetition_penalty": 1.2, "max_new_tokens": 8, "use_cache": True}
    given: list[dict[str, Any]] = []
    real = theirs.model.generate

    def watched(*ids: Any, **options: Any) -> Any:
        given.append(options)
        assert torch.is_inference_mode_enabled()
        assert not theirs.model.training
        return real(*ids, **options)

    monkeypatch.setattr(theirs.model, "generate", watched)
    Pipeline(theirs, tokens=10).generate(2)
    Batched(theirs, tokens=10, batch=5).generate(5)
    assert [options.get("num_return_sequences", 1) for options in given] == [1, 1, 5]
    for options in given:
        # The pipeline puts settings into a configuration.
        settings = options.get("generation_config")
        for name, value in expected.items():
            assert (options[name] if name in options else getattr(settings, name)) == value
    assert theirs.model.config._attn_implementation == "sdpa"


def test_residues_are_letters_that_are_residues() -> None:
    assert count_residues(f"{PROMPT}MKTX\nAC�#e|{PROMPT}") == 6


def test_strange_letters_are_no_residues(ours: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Ours(ours, batch=4)
    designs = list(engine._generator.run(4))
    assert any(design.strange for design in designs)
    expected = [sum(letter != "X" for letter in design.sequence) for design in designs]
    assert engine.generate(4).residues == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_ours_is_right(folder: Path, theirs: TransformersModel, precision: str) -> None:
    difference = check_decoder(load_ours(folder, precision=precision, device=CPU), theirs)
    assert 0 < difference < generate_engines.ALLOWED[precision] / 3


def test_a_wrong_likelihood_is_seen(theirs: TransformersModel, ours: Decoder) -> None:
    with torch.no_grad():
        ours.layers[0].fc1.weight.mul_(1.05)
    with pytest.raises(ParityError, match=r"ours fp32: log-likelihoods differ .* allowed 0.001; nothing is timed"):
        check_decoder(ours, theirs)
    with torch.no_grad():
        ours.layers[0].fc1.weight.fill_(torch.nan)
    with pytest.raises(ParityError, match="by up to nan nats"):
        check_decoder(ours, theirs)


def test_another_generated_sequence_is_seen(
    theirs: TransformersModel, ours: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps over the cache that err where the packed pass is right: the second token takes the first one's place."""
    real = DecodeStep.run

    def late(self: DecodeStep, turns: Sequence[Turn]) -> tuple[list[int], list[float]]:
        chosen, nats = real(self, turns)
        if turns[0].length == 3:
            chosen[0] = 100
        return chosen, nats

    monkeypatch.setattr(DecodeStep, "run", late)
    with pytest.raises(ParityError, match="ours fp32: the likeliest tokens spell"):
        check_decoder(ours, theirs)


def test_turns() -> None:
    """All engines in each turn, in order; sequences of other lengths end it."""
    order: list[tuple[str, int, int]] = []
    single = _Scripted(PIPELINE, 1, [_answer(1, [5, 5])] * 2, order)
    batched = _Scripted(OURS, 3, [_answer(1, [5, 5, 5])] * 2, order)
    answers = take_turns([single, batched], 2, singles=2, tokens=5)
    assert order == [(PIPELINE, 2, 0), (OURS, 3, 0), (PIPELINE, 2, 2), (OURS, 3, 3)]
    assert [len(each) for each in answers.values()] == [2, 2]
    for wrong in ([5, 4, 5], [5, 5]):
        shorter = _Scripted(OURS, 3, [_answer(1, wrong)], order)
        with pytest.raises(ParityError, match=r"protnest fp32: \d sequences of .* tokens, expected 3 of 5"):
            take_turns([shorter], 1, singles=1, tokens=5)


def test_ratios_are_taken_within_turns(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    # Seconds, CPU seconds and residues of each turn; 8 tokens a sequence.
    times = {
        (PIPELINE, 1): [(6.0, 1.0, 30), (10.0, 2.0, 20), (90.0, 3.0, 20)],
        (OURS, 1): [(3.0, 1.0, 10), (2.0, 1.0, 20), (30.0, 1.0, 10)],
        (GENERATE, 2): [(4.0, 4.0, 20)] * 3,
        (OURS, 2): [(1.0, 2.0, 20), (2.0, 2.0, 20), (4.0, 2.0, 40)],
    }

    def turns(engines: Sequence[Any], count: int, *, singles: int, tokens: int) -> dict[Any, list[Answer]]:
        return {
            engine: [
                _answer(seconds, [tokens] * engine.batch, [residues // engine.batch] * engine.batch, cpu)
                for seconds, cpu, residues in times[engine.name, engine.batch]
            ]
            for engine in engines
        }

    monkeypatch.setattr(generate_comparison, "take_turns", turns)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    plan = GeneratePlan(precisions=("fp32",), pairs=3, batch=2, memory=False)
    pipeline, single, batched, many = compare_generation(tiny_generation(), plan)
    ends = ("median", "min", "max")

    def of(row: dict[str, Any], name: str) -> list[float | None]:
        return [row[f"{name}_{end}"] for end in ends]

    # The medians' ratio would be 10 / 3.
    assert of(single, "times_pipeline") == pytest.approx([3, 2, 5])
    assert of(single, "times_pipeline_cpu") == pytest.approx([2, 1, 3])
    assert of(single, "times_pipeline_residues") == pytest.approx([1.5, 2 / 3, 5])
    assert of(single, "times_generate") == [None] * 3
    assert of(many, "times_generate") == pytest.approx([2, 1, 4])
    assert of(many, "times_generate_cpu") == pytest.approx([2, 2, 2])
    assert of(many, "times_generate_residues") == pytest.approx([2, 2, 4])
    assert of(many, "times_pipeline") == pytest.approx([12, 10, 45])
    for row in (pipeline, batched):
        assert of(row, "times_pipeline") == of(row, "times_generate") == [None] * 3
    assert of(many, "tokens_per_s") == pytest.approx([8, 4, 16])
    assert of(many, "residues_per_s") == pytest.approx([10, 10, 20])
    assert of(many, "first_sequence_seconds") == pytest.approx([1, 0.5, 2])
    # Eight steps of two sequences each.
    assert of(many, "ms_per_step") == pytest.approx([250, 125, 500])
    assert of(pipeline, "ms_per_step") == pytest.approx([1250, 750, 11250])
    assert many["residues_per_token"] == pytest.approx(80 / 48)
    assert (many["sequences"], many["tokens"], many["batch"], many["pairs"]) == (2, 8, 2, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert of(compare_generation(tiny_generation(), plan)[1], "times_pipeline_cpu") == [None] * 3


def test_ceilings(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Singly weights are read; in a batch the longer of reading and multiplying counts."""
    pytest.importorskip("transformers")
    products = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64) + 32 * 700
    assert step_bytes(GENERATED, "fp32", CPU) == 4 * products
    assert step_bytes(GENERATED, "int8", CPU) == products
    for units, size in ((True, 2), (False, 4)):
        monkeypatch.setattr(generate_comparison, "multiplies_bf16", lambda device, units=units: units)
        assert step_bytes(GENERATED, "bf16", CPU) == size * products
    plan = GeneratePlan(precisions=("int8",), pairs=1, batch=4, memory=False)
    for read, limit in ((2.0, "products"), (0.1, "reading weights")):
        monkeypatch.setattr(generate_comparison, "read_gbytes_per_s", lambda *given, read=read, **o: read)
        pipeline, single, _, many = compare_generation(tiny_generation(), plan)
        assert (pipeline["ceiling"], single["ceiling"]) == ("reading weights", "reading weights")
        assert single["ceiling_ms_per_step"] == pytest.approx(products / read / 1e6)
        assert many["ceiling"] == limit
        assert many["step_gflop"] == pytest.approx(2 * 4 * products / 1e9)
        expected = 8 * products / 2 / 1e6 if limit == "products" else products / read / 1e6
        assert many["ceiling_ms_per_step"] == pytest.approx(expected)
        assert many["percent_of_ceiling"] == pytest.approx(100 * expected / many["ms_per_step_median"])


def test_reading_has_a_rate() -> None:
    assert 0.1 < read_gbytes_per_s(CPU, size_bytes=1 << 22, repeats=1) < 5000
    assert read_gbytes_per_s(CPU, size_bytes=1, repeats=1) > 0


@pytest.mark.parametrize("maker", ["transformers", "protnest"])
def test_memory_is_watched_in_a_process_of_its_own(tmp_path: Path, maker: str) -> None:
    """It is about the weights' 34 MB; libraries, hundreds of megabytes, are told apart."""
    if maker == "transformers":
        pytest.importorskip("transformers")
    config = replace(GENERATED, width=512, heads=8, feedforward=4096, layers=2)
    problem = Problem(shape="wide", tokens=8, config=config)
    problem.write(tmp_path)
    found = measure_memory(
        MemoryTask(
            maker=maker,
            folder=str(tmp_path),
            precision="fp32",
            batches=(1, 4),
            tokens=8,
            device="cpu",
            threads=1,
        )
    )
    if found.libraries_bytes is None:
        pytest.skip("this system does not tell a process's peak")
    assert set(found.peak_bytes) == {1, 4}
    weights = 4 * problem.parameters
    assert found.libraries_bytes > 100e6 > 2 * weights
    for peak in found.peak_bytes.values():
        assert peak is not None
        assert 0.8 * weights < peak < 2.5 * weights
    assert found.load_peak_bytes is not None
    assert found.held_bytes is not None
    assert 0 < found.held_bytes <= found.load_peak_bytes


def test_a_process_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = MemoryTask(
        maker="vllm", folder=str(tmp_path), precision="fp32", batches=(1,), tokens=8, device="cpu", threads=1
    )
    with pytest.raises(ValueError, match="no maker 'vllm'; allowed are transformers, protnest"):
        generate_memory.watch(task)

    def failed(*given: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "MemoryError: it is full\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(RuntimeError, match="watching the memory of vllm fp32 failed: MemoryError: it is full"):
        measure_memory(task)

    def late(*given: Any, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(list(given), timeout)

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(RuntimeError, match="took more than 1800 s"):
        measure_memory(task)


def test_without_transformers_it_says_so(folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        generate_engines.importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name)
    )
    with pytest.raises(RuntimeError, match="transformers is not installed"):
        TransformersModel(folder, precision="fp32", device=CPU)
    result, rows = run("--shapes", "tiny")
    assert result.exit_code == 1
    assert "error: transformers is not installed, and generation is measured beside it" in result.output
    assert rows == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"batch": 1}, "batch must be at least 2, got 1"),
        ({"singles": 0}, "singles must be at least 1, got 0"),
        ({"precisions": ()}, "precisions must not be empty"),
        ({"peer_precisions": ("bf16",)}, r"peer_precisions are \('bf16',\), expected fp32"),
        ({"peer_precisions": ("fp32", "int8")}, "peer_precisions are"),
    ],
)
def test_plans_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratePlan(**options)


def test_plans_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench_generate, generate_comparison):
        monkeypatch.setattr(module, "multiplies_bf16", lambda device: device.type == "cuda")
    plan = plan_generation(CPU)
    assert (tuple(plan.precisions), plan.peer_precisions) == (("fp32", "bf16", "int8"), ("fp32",))
    assert (plan.pairs, plan.batch, plan.singles) == (5, 64, 1)
    quick = plan_generation(CPU, pairs=9, quick=True)
    assert (quick.precisions, quick.pairs) == (["fp32", "int8"], 3)
    assert plan_generation(CPU, precisions="bf16", quick=True).precisions == ["bf16"]
    on_gpu = plan_generation(CUDA, quick=True)
    assert (on_gpu.precisions, on_gpu.peer_precisions) == (["fp32", "bf16", "fp16"], ("fp32", "bf16"))
    lengths = {each.shape: each.tokens for each in plan_problems(CPU)}
    assert lengths == {"protgpt2": 24, "medium": 64, "small": 200, "tiny": 200, "micro": 200}
    assert {each.tokens for each in plan_problems(CUDA)} == {200}
    assert {each.shape: each.tokens for each in plan_problems(CPU, quick=True)} == {"tiny": 24, "micro": 24}
    own = plan_problems(CPU, shapes="micro,protgpt2", tokens=9, quick=True)
    assert [(each.shape, each.tokens) for each in own] == [("protgpt2", 9), ("micro", 9)]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--shapes", "39M"], 2, "unknown: 39M"),
        (["--precisions", "fp16"], 2, "unknown: fp16"),
        (["--tokens", "2"], 2, "--tokens"),
        (["--batch", "1"], 2, "--batch"),
        (["--pairs", "1"], 2, "--pairs"),
    ],
)
def test_wrong_usage_is_named(run: Any, options: list[str], code: int, message: str) -> None:
    result, rows = run(*options)
    assert result.exit_code == code
    assert message in re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert rows == []


def test_too_many_tokens_are_named() -> None:
    with pytest.raises(typer.BadParameter, match="tokens is 2000, expected 3 to the 1024 that tiny has places for"):
        plan_problems(CPU, shapes="tiny", tokens=2000)


def test_a_wrong_answer_ends_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(generate_engines.ALLOWED, "fp32", 1e-12)
    result, rows = run("--shapes", "tiny", "--precisions", "fp32")
    assert result.exit_code == 1
    assert "error: ours fp32: log-likelihoods differ" in result.output
    assert rows == []


def test_a_run_appends_rows_of_all_parts(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_generate, "multiplies_bf16", lambda device: False)
    tasks: list[MemoryTask] = []

    def watched(task: MemoryTask) -> MemoryUse:
        tasks.append(task)
        peaks = {batch: 1000 * batch for batch in task.batches}
        return MemoryUse(libraries_bytes=1, load_peak_bytes=2, held_bytes=3, peak_bytes=dict(peaks))

    monkeypatch.setattr(generate_comparison, "measure_memory", watched)
    result, rows = run("--shapes", "protgpt2,tiny", "--pairs", "2", "--batch", "3", "--tokens", "6")
    assert result.exit_code == 0, result.output
    assert "generate x" in result.stdout
    assert "hours for 10^6" in result.stdout
    ours = ("fp32", "bf16", "int8")
    expected = [
        *((PIPELINE, "fp32", 1), *((OURS, name, 1) for name in ours)),
        *((GENERATE, "fp32", 3), *((OURS, name, 3) for name in ours)),
    ]
    shapes = ("protgpt2", "tiny")
    every = [(shape, *engine) for shape in shapes for engine in expected]
    for part in ("speed", "family"):
        found = [row for row in rows if row["part"] == part]
        assert [(row["shape"], row["engine"], row["precision"], row["batch"]) for row in found] == every
    speed = [row for row in rows if row["part"] == "speed"]
    published = [row["shape"] for row in rows if row["part"] == "published"]
    assert len(rows) == 2 * len(every) + len(published)
    assert published == ["protgpt2", "medium", "small", "tiny"]
    for row in rows:
        assert (row["suite"], row["device"], row["schema_version"]) == ("generate", "cpu", 1)
    for row in speed:
        assert (row["tokens"], row["pairs"], row["peak_bytes"]) == (4, 2, 1000 * row["batch"])
        assert (row["libraries_bytes"], row["load_peak_bytes"], row["held_bytes"]) == (1, 2, 3)
        assert row["weights_bytes"] == row["parameters"] * {"fp32": 4, "bf16": 2, "int8": 1}[row["precision"]]
        assert (row["max_difference"] is not None) == (row["engine"] == OURS)
    # One process for each model, not for each batch.
    makers = [("transformers", "fp32"), *((OURS, name) for name in ours)]
    assert [(task.maker, task.precision) for task in tasks] == makers * 2
    assert {(task.batches, task.tokens, task.device) for task in tasks} == {((1, 3), 6, "cpu")}
    assert "bf16: no units for it here" in result.output


def test_a_run_that_fails_keeps_the_shapes_that_are_done(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(problem: Problem, plan: GeneratePlan, tell: Any) -> list[dict[str, Any]]:
        if problem.shape == "micro":
            message = "the machine is full"
            raise RuntimeError(message)
        return [{"part": "speed", "shape": problem.shape}]

    monkeypatch.setattr(bench_generate, "compare_generation", compare)
    result, rows = run("--shapes", "tiny,micro")
    assert result.exit_code == 1
    assert "error: the machine is full" in result.output
    assert [row["shape"] for row in rows] == ["tiny"]


def test_json_is_one_object_and_memory_can_be_left_out(run: Any) -> None:
    pytest.importorskip("transformers")
    result, rows = run("--shapes", "tiny", "--precisions", "fp32", "--tokens", "5", "--no-memory", "--json", "--quick")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["suite"], report["device"]) == ("generate", "cpu")
    assert report["rows"] == rows
    speed = [row for row in rows if row["part"] == "speed"]
    assert {row["peak_bytes"] for row in speed} == {None}
    # Without the teacher there are no ratios to it.
    assert {row["times_faster_per_sequence"] for row in rows if row["part"] == "family"} == {None}


def test_the_family_beside_its_teacher() -> None:
    def row(shape: str, tokens_per_s: float, residues_per_s: float, *, engine: str = PIPELINE) -> dict[str, Any]:
        return {
            **{"shape": shape, "parameters": 1, "engine": engine, "precision": "fp32", "batch": 1, "tokens": 8},
            **{"tokens_per_s_median": tokens_per_s, "residues_per_s_median": residues_per_s},
            **{"peak_bytes": 3 << 20, "weights_bytes": 2 << 20},
        }

    given = [row("protgpt2", 2.0, 10.0), row("tiny", 9.9, 40.0), row("tiny", 99.0, 400.0, engine=OURS)]
    teacher, tiny, ours = family_rows(given)
    assert (teacher["times_faster_per_sequence"], teacher["times_faster_per_residue"]) == (1, 1)
    assert (tiny["times_faster_per_sequence"], tiny["times_faster_per_residue"]) == (pytest.approx(4.95), 4)
    assert (ours["times_faster_per_sequence"], ours["times_faster_per_residue"]) == (None, None)
    # 198 tokens are sampled.
    assert tiny["seconds_per_sequence"] == pytest.approx(20)
    assert tiny["sequences_per_minute"] == pytest.approx(3)
    assert tiny["hours_per_million"] == pytest.approx(1e6 / 3 / 60)
    assert (tiny["peak_mib"], tiny["weights_mib"], tiny["residues_per_s"]) == (3, 2, 40)


def test_the_published_table_adds_up_but_for_its_hours() -> None:
    rows = {row["shape"]: row for row in published_rows()}
    for row in rows.values():
        assert row["recomputed_sequences_per_minute"] == pytest.approx(row["sequences_per_minute"], abs=0.06)
        assert row["recomputed_residues_per_s"] == pytest.approx(row["residues_per_s"], abs=1)
        assert row["recomputed_per_sequence"] == pytest.approx(row["times_faster_per_sequence"], abs=0.006)
        assert row["recomputed_per_residue"] == pytest.approx(row["times_faster_per_residue"], abs=0.012)
        # fp32 weights, 4 bytes each, to a MiB.
        assert row["weights_mib"] == pytest.approx(4 * row["parameters"] / 2**20, abs=0.9)
    assert hours_for(1_000_000, 111) == pytest.approx(150, abs=0.5)
    assert rows["tiny"]["hours_per_million"] == pytest.approx(150.3, abs=0.1)
    assert rows["tiny"]["claimed_hours_per_million"] == 6
    assert rows["protgpt2"]["hours_per_million"] == pytest.approx(797.4, abs=0.1)
    assert rows["protgpt2"]["batched_per_minute"] == pytest.approx(231.7, abs=0.1)
    assert rows["tiny"]["batched_per_minute"] is None
    assert rows["tiny"]["times_faster_per_sequence"] == 5.31
    assert round(rows["tiny"]["peak_mib"]) == 170
