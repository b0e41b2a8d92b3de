"""Pretraining a one-layer toy: known perplexities, a loss that falls, runs that are killed, resumed and refused.

Shapes: B sequences, T tokens, R rows asked for, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from protnest.engine import Encoder, InputError, load_model
from protnest.engine.alphabet import AMINO_ACIDS, BOS_ID, EOS_ID, MASK_ID, RESIDUE_TABLE, TOKEN_IDS, TOKENS
from protnest.engine.cli import app
from protnest.engine.config import EncoderConfig
from protnest.kernels import tokenise
from protnest.training import pretrain as module
from protnest.training.corpus import Corpus, is_held_out
from protnest.training.masked_task import MaskedTask
from protnest.training.perplexity import held_out_perplexity, unigram_perplexity
from protnest.training.pretrain import PretrainConfig, pretrain
from protnest.training.students import ENCODER_PRESETS, initialise
from protnest.training.trainer import Trainer
from protnest.training.training_folder import TrainingFolder
from typer.testing import CliRunner

from support.tiny import random_proteins, write_fasta

TOY = EncoderConfig(layers=1, width=16, heads=2, feedforward=32, max_residues=20)
CPU = torch.device("cpu")
AfterStep = Callable[[int, float], None]


@pytest.fixture(autouse=True)
def _toy_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODER_PRESETS, "toy", TOY)


def _corpus(sequences: list[str]) -> Corpus:
    return Corpus(*tokenise([s.encode() for s in sequences], RESIDUE_TABLE, bos=BOS_ID, eos=EOS_ID))


def _config(**changes: Any) -> PretrainConfig:
    """Six steps of about five sequences; the small corpus below has four batches an epoch."""
    settings: dict[str, Any] = {"preset": "toy", "steps": 6, "batch_tokens": 100, "warmup_steps": 2} | changes
    return PretrainConfig(**settings)


def _trainer(config: PretrainConfig, corpus: Corpus) -> Trainer:
    """What `pretrain` trains with, without a folder."""
    return Trainer(MaskedTask(_toy_encoder(config.seed), corpus, seed=config.seed), config.trainer(), device=CPU)


def _toy_encoder(seed: int = 0) -> Encoder:
    encoder = Encoder(TOY)
    initialise(encoder, seed)
    return encoder.eval()


def _sequences() -> list[str]:
    """A dozen to train on, some longer than the toy's 20 residues, and three held out."""
    pool = random_proteins(200, seed=4, longest=40)
    return [s for s in pool if not is_held_out(s)][:16] + [s for s in pool if is_held_out(s)][:3]


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return write_fasta(tmp_path / "in.fasta", _sequences())


class _Killed(BaseException):
    pass


def _killed_at(step: int) -> AfterStep:
    def after_step(now: int, loss: float) -> None:
        if now == step:
            raise _Killed

    return after_step


def _state(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "state.pt", weights_only=True)
    return state


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, (dict, list, tuple)):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(branch, f"{path}/{key}")
    else:
        yield path, tree


def _assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, optimiser and place, bit for bit."""
    left, right = dict(_leaves(one)), dict(_leaves(other))
    assert left.keys() == right.keys()
    for path, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[path].dtype, path
            assert torch.equal(value, right[path]), path
        else:
            assert value == right[path], path


# The recipe


def test_fresh_weights_have_the_documented_spread() -> None:
    config = EncoderConfig(layers=8, width=64, heads=4, feedforward=256)
    encoder = Encoder(config)
    initialise(encoder, 0)
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 1:
            is_norm_weight = "norm" in name and name.endswith("weight")
            assert (parameter == (1.0 if is_norm_weight else 0.0)).all(), name
            continue
        expected = parameter.shape[1] ** -0.5 / (4 if name.endswith(("out.weight", "fc2.weight")) else 1)
        # Of n normal draws the spread is off by 1 / sqrt(2 n) of itself, the mean by 1 / sqrt(n).
        draws, off = parameter.detach(), 5 * parameter.numel() ** -0.5
        assert float(draws.std()) == pytest.approx(expected, rel=off / math.sqrt(2)), name
        assert abs(float(draws.mean())) < off * expected, name


def test_fresh_weights_come_from_the_seed_alone() -> None:
    first, again, other = _toy_encoder(0), _toy_encoder(0), _toy_encoder(1)
    torch.manual_seed(123)
    later = _toy_encoder(0)
    for name, parameter in first.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])
        assert torch.equal(parameter, later.state_dict()[name])
        assert parameter.dim() == 1 or not torch.equal(parameter, other.state_dict()[name])


# Perplexities


def test_unigram_perplexity_of_even_residues_is_their_number() -> None:
    even = _corpus([AMINO_ACIDS, AMINO_ACIDS[::-1]])
    assert unigram_perplexity(even, even) == pytest.approx(20, abs=1e-6)
    # What is judged may be uneven: under even frequencies everything costs the same.
    assert unigram_perplexity(even, _corpus(["AAC", "W"])) == pytest.approx(20, abs=1e-6)
    assert unigram_perplexity(_corpus(["AC"]), _corpus(["CCCCA"])) == pytest.approx(2, abs=1e-6)


def test_unigram_perplexity_by_hand() -> None:
    train, judged = _corpus(["AAAC"]), _corpus(["AC", "A"])
    by_hand = (4 / 3) ** (2 / 3) * 4 ** (1 / 3)
    assert unigram_perplexity(train, judged) == pytest.approx(by_hand, abs=1e-6)


def test_unigram_perplexity_of_what_was_never_seen_is_finite_and_large() -> None:
    assert 1e6 < unigram_perplexity(_corpus(["AAAC"]), _corpus(["W"])) < math.inf


def _constant_encoder(bias: dict[str, float]) -> Encoder:
    """Says the same of every row: the bias alone."""
    encoder = _toy_encoder()
    assert encoder.head is not None
    with torch.no_grad():
        encoder.embed_tokens.weight.zero_()
        encoder.head.bias.zero_()
        for letter, value in bias.items():
            encoder.head.bias[TOKEN_IDS[letter]] = value
    return encoder


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_a_model_that_knows_nothing_has_the_alphabet_s_perplexity(batch_tokens: int) -> None:
    corpus = _corpus(random_proteins(30, longest=50))
    encoder = _constant_encoder({})
    assert held_out_perplexity(encoder, corpus, sequences=30, batch_tokens=batch_tokens) == pytest.approx(33, rel=1e-6)


def test_held_out_perplexity_is_of_the_true_residue() -> None:
    """A bias of log 16 gives A 16 of 48 shares, so poly-A costs 3 and all else 48."""
    encoder = _constant_encoder({"A": math.log(16)})
    corpus = _corpus(["A" * 30] * 5 + ["C" * 15] * 5)
    assert held_out_perplexity(encoder, corpus, sequences=5) == pytest.approx(3, rel=1e-6)
    assert held_out_perplexity(encoder, _corpus(["C" * 15] * 5), sequences=5) == pytest.approx(48, rel=1e-6)


def test_held_out_perplexity_is_a_function_of_model_and_corpus() -> None:
    corpus = _corpus(random_proteins(40, longest=50))
    encoder = _toy_encoder()
    np.random.seed(1)  # noqa: NPY002 - no global generator may matter
    first = held_out_perplexity(encoder, corpus, sequences=40)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert held_out_perplexity(encoder, corpus, sequences=40) == first
    assert held_out_perplexity(encoder, corpus, sequences=1000) == first
    assert held_out_perplexity(encoder, corpus, sequences=20) != first
    head = Corpus(corpus.tokens_T, corpus.cu_seqlens[:21])
    assert held_out_perplexity(encoder, head, sequences=1000) == held_out_perplexity(encoder, corpus, sequences=20)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_held_out_perplexity_shows_masks_alone_and_asks_for_15_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No residue that is asked for may be left visible, or swapped, as in training."""
    sequences = random_proteins(200, seed=6, longest=50)
    corpus = _corpus(sequences)
    encoder = _toy_encoder()
    true_logits = encoder.logits
    masks: list[int] = []
    asked: list[int] = []

    def logits(hidden_RD: torch.Tensor) -> torch.Tensor:
        asked.append(len(hidden_RD))
        return true_logits(hidden_RD)

    encoder.register_forward_pre_hook(lambda _, given: masks.append(int((given[0].tokens_T == MASK_ID).sum())))
    monkeypatch.setattr(encoder, "logits", logits)
    held_out_perplexity(encoder, corpus, sequences=200, batch_tokens=600)
    assert masks == asked
    assert len(masks) > 5
    residues = sum(min(20, len(sequence)) for sequence in sequences)
    assert abs(sum(masks) - 0.15 * residues) < 4 * math.sqrt(residues * 0.15 * 0.85)


def test_held_out_perplexity_does_not_depend_on_batch_tokens() -> None:
    corpus = _corpus(random_proteins(40, longest=50))
    encoder = _toy_encoder()
    values = [held_out_perplexity(encoder, corpus, sequences=40, batch_tokens=size) for size in (1, 100, 8192)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    encoder = _constant_encoder({"A": 1e4})
    assert held_out_perplexity(encoder, _corpus(["C" * 10]), sequences=1) == math.inf


# Whole runs


def test_the_loss_falls_on_what_can_be_memorised() -> None:
    """Proteins of one letter each: whatever is shown of one tells all of it."""
    corpus = _corpus([letter * 15 for letter in "ACDEFGHI"])
    run = _trainer(_config(steps=80, batch_tokens=136, learning_rate=2e-2, warmup_steps=10, weight_decay=0.0), corpus)
    encoder = run.task.model
    assert isinstance(encoder, Encoder)
    before = held_out_perplexity(encoder.eval(), corpus, sequences=8)
    losses: list[float] = []
    run.run(after_step=lambda report: losses.append(report.loss))
    assert len(losses) == 80
    first, last = float(np.mean(losses[:5])), float(np.mean(losses[-20:]))
    assert 0.8 * math.log(33) < first < 2 * math.log(33)
    assert last < first / 3, f"{first:.2f} -> {last:.2f}"
    after = held_out_perplexity(encoder.eval(), corpus, sequences=8)
    assert after < 2 < 15 < before, f"perplexity {before:.2f} -> {after:.2f}"


def test_a_run_leaves_what_is_documented(fasta: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    steps: list[int] = []
    report = pretrain(fasta, out, _config(), device="cpu", after_step=lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6]
    files = {path.name for path in out.iterdir()}
    model = {"model.safetensors", "config.json", "vocab.txt", "training.json"}
    assert files - {"tensorboard"} == model | {"log.csv", "run.json", "state.pt", ".lock"}

    assert json.loads((out / "training.json").read_text()) == report
    recipe = dataclasses.asdict(_config())
    assert {key: report[key] for key in recipe} == recipe
    extra = {"device", "torch", "data", "seconds", "held_out_perplexity", "unigram_perplexity"}
    assert report.keys() == recipe.keys() | extra
    assert report["data"] == {"file": "in.fasta", "train_sequences": 16, "held_out_sequences": 3}
    assert report["device"] == "cpu"
    assert 10 < report["held_out_perplexity"] < 200
    assert 5 < report["unigram_perplexity"] < 40
    assert (out / "vocab.txt").read_text().split() == list(TOKENS)
    _assert_log(out, 6)


def _assert_log(out: Path, steps: int) -> None:
    header, *lines = (out / "log.csv").read_text().splitlines()
    assert header == "step,seconds,loss,learning_rate,gradient_norm,tokens"
    rows = [line.split(",") for line in lines]
    assert [int(row[0]) for row in rows] == list(range(1, steps + 1)), "one line a step"
    seconds = [float(row[1]) for row in rows]
    assert seconds == sorted(seconds)
    assert all(0 < float(row[2]) < 20 for row in rows)


def test_the_report_is_json_even_of_a_hopeless_model(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "held_out_perplexity", lambda *args, **options: math.inf)
    pretrain(fasta, tmp_path / "out", _config(steps=1), device="cpu")

    def refuse(word: str) -> None:
        message = f"{word} is no JSON"
        raise ValueError(message)

    json.loads((tmp_path / "out" / "training.json").read_text(), parse_constant=refuse)


def test_what_is_written_loads_as_a_model(fasta: Path, tmp_path: Path) -> None:
    pretrain(fasta, tmp_path / "out", _config(), device="cpu")
    loaded = load_model(tmp_path / "out", device="cpu", precision="fp32")
    assert loaded.config == TOY
    assert loaded.head is not None
    trained = _state(tmp_path / "out")["model"]
    fresh = _toy_encoder().state_dict()
    for name, parameter in loaded.state_dict().items():
        assert torch.equal(parameter, trained[name].half().float()), name
    assert not torch.equal(trained["embed_tokens.weight"], fresh["embed_tokens.weight"])
    (hidden_LD,) = loaded.encode(["MKTAY"])
    assert hidden_LD.shape == (5, 16)
    assert np.isfinite(hidden_LD).all()


def test_the_model_is_as_readable_as_its_config(fasta: Path, tmp_path: Path) -> None:
    pretrain(fasta, tmp_path / "out", _config(steps=1), device="cpu")
    modes = {name: (tmp_path / "out" / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert modes["model.safetensors"] == modes["config.json"]


def test_bf16_trains_with_fp32_weights(fasta: Path, tmp_path: Path) -> None:
    report = pretrain(fasta, tmp_path / "out", _config(precision="bf16"), device="cpu")
    assert report["precision"] == "bf16"
    state = _state(tmp_path / "out")
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
    pretrain(fasta, tmp_path / "fp32", _config(), device="cpu")
    other = _state(tmp_path / "fp32")["model"]
    assert any(not torch.equal(tensor, other[name]) for name, tensor in state["model"].items())


def test_the_seed_decides_the_weights(fasta: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        pretrain(fasta, tmp_path / name, _config(seed=seed), device="cpu")
    first, again, other = (_state(tmp_path / name) for name in ("first", "again", "other"))
    _assert_same_state(first, again)
    for name, tensor in first["model"].items():
        assert not torch.equal(tensor, other["model"][name]), name


@pytest.mark.parametrize("trained", ["order", "masks"])
def test_the_seed_is_not_only_that_of_the_weights(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same weights, another seed must show other sequences, and of the same sequences other masks."""
    sequences = _sequences()[:16] if trained == "order" else ["ACDEFGHIKLMNPQRSTVWY"]
    seen: list[Any] = []
    true_rows = Encoder.row_hidden

    def watched(encoder: Encoder, batch: Any, chosen: Any) -> torch.Tensor:
        seen.append(batch)
        return true_rows(encoder, batch, chosen)

    monkeypatch.setattr(Encoder, "row_hidden", watched)
    for seed in (0, 1):
        run = _trainer(_config(seed=seed, steps=1), _corpus(sequences))
        initialise(run.task.model, 7)  # type: ignore[arg-type]
        run.run()
    if trained == "order":
        assert seen[0].index_B.tolist() != seen[1].index_B.tolist()
    else:
        assert seen[0].tokens_T.tolist() != seen[1].tokens_T.tolist()


# Killed and resumed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fasta = write_fasta(folder / "in.fasta", _sequences())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODER_PRESETS, "toy", TOY)
        pretrain(fasta, folder / "out", _config(), device="cpu")
    return folder / "out"


def _assert_as_uninterrupted(out: Path, uninterrupted: Path) -> None:
    _assert_same_state(_state(out), _state(uninterrupted))
    assert (out / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    _assert_log(out, 6)
    logs = [(folder / "log.csv").read_text().splitlines() for folder in (out, uninterrupted)]
    losses, expected = ([line.split(",")[2] for line in log] for log in logs)
    assert losses == expected
    reports = [json.loads((folder / "training.json").read_text()) for folder in (out, uninterrupted)]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("kills", [(1,), (3,), (5,), (6,), (1, 2, 4)])
def test_a_killed_run_ends_as_if_uninterrupted(
    fasta: Path, tmp_path: Path, uninterrupted: Path, kills: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    for step in kills:
        with pytest.raises(_Killed):
            pretrain(fasta, out, _config(), device="cpu", save_every_s=0, after_step=_killed_at(step))
        assert _state(out)["step"] == step
        assert not (out / "model.safetensors").exists()
    steps: list[int] = []
    pretrain(fasta, out, _config(), device="cpu", after_step=lambda step, loss: steps.append(step))
    assert steps == list(range(kills[-1] + 1, 7))
    _assert_as_uninterrupted(out, uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(fasta: Path, tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(_Killed):
        pretrain(fasta, tmp_path / "out", _config(), device="cpu", after_step=_killed_at(4))
    assert not (tmp_path / "out" / "state.pt").exists()
    pretrain(fasta, tmp_path / "out", _config(), device="cpu")
    _assert_as_uninterrupted(tmp_path / "out", uninterrupted)


def test_a_kill_between_checkpoints_repeats_the_steps_since(
    fasta: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is then ahead of the state, its last line cut short: the lines are written again, none twice."""
    out = tmp_path / "out"
    true_save = TrainingFolder.save

    def save(folder: TrainingFolder, trainer: Trainer) -> None:
        if trainer.step <= 2:
            true_save(folder, trainer)

    monkeypatch.setattr(TrainingFolder, "save", save)
    with pytest.raises(_Killed):
        pretrain(fasta, out, _config(), device="cpu", save_every_s=0, after_step=_killed_at(5))
    assert _state(out)["step"] == 2
    monkeypatch.undo()
    monkeypatch.setitem(ENCODER_PRESETS, "toy", TOY)
    log = out / "log.csv"
    log.write_text(log.read_text()[:-4])
    pretrain(fasta, out, _config(), device="cpu")
    _assert_as_uninterrupted(out, uninterrupted)


def test_a_kill_while_saving_leaves_the_state_before(
    fasta: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    true_save = torch.save

    def half_written(state: dict[str, Any], file: Path) -> None:
        true_save(state, file)
        if state["step"] == 4:
            os.truncate(file, file.stat().st_size // 2)
            raise _Killed

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(_Killed):
        pretrain(fasta, out, _config(), device="cpu", save_every_s=0)
    assert _state(out)["step"] == 3
    monkeypatch.setattr(torch, "save", true_save)
    pretrain(fasta, out, _config(), device="cpu")
    _assert_as_uninterrupted(out, uninterrupted)
    assert not list(out.glob(".*.tmp"))


def test_a_kill_while_resuming_loses_no_lines_of_the_log(
    fasta: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _unfinished(fasta, out)
    true_write = Path.write_text

    def emptied(path: Path, *args: Any, **options: Any) -> int:
        if "log.csv" not in path.name:
            return true_write(path, *args, **options)
        true_write(path, "")
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", emptied)
        with pytest.raises(_Killed):
            pretrain(fasta, out, _config(), device="cpu")
    pretrain(fasta, out, _config(), device="cpu")
    _assert_as_uninterrupted(out, uninterrupted)


def test_a_finished_run_is_not_repeated(fasta: Path, tmp_path: Path, uninterrupted: Path) -> None:
    pretrain(fasta, tmp_path / "out", _config(), device="cpu")
    again: list[int] = []
    pretrain(fasta, tmp_path / "out", _config(), device="cpu", after_step=lambda step, loss: again.append(step))
    assert again == []
    _assert_as_uninterrupted(tmp_path / "out", uninterrupted)


def test_stopping_and_going_on_in_memory_is_the_same() -> None:
    whole, parts = (_trainer(_config(), _corpus(_sequences())) for _ in range(2))
    whole.run()
    for until in (2, 2, 5, 6):
        parts.run(until=until)
        assert parts.step == until
    _assert_same_state(whole.state(), parts.state())


# Refused


def _unfinished(fasta: Path, out: Path, **changes: Any) -> None:
    with pytest.raises(_Killed):
        pretrain(fasta, out, _config(**changes), device="cpu", save_every_s=0, after_step=_killed_at(2))


def _contents(folder: Path) -> dict[Path, bytes]:
    """Every file, those of TensorBoard where it is installed among them."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 5}, "seed: 0 there, 5 now"),
        ({"steps": 7}, "steps: 6 there, 7 now"),
        ({"learning_rate": 0.1}, "learning_rate: 0.002 there, 0.1 now"),
        (
            {"batch_tokens": 50, "weight_decay": 0.5},
            "batch_tokens: 100 there, 50 now; weight_decay: 0.01 there, 0.5 now",
        ),
        ({"preset": "nano-xs"}, "preset: toy there, nano-xs now"),
        ({"precision": "bf16"}, "precision: fp32 there, bf16 now"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    fasta: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    out = tmp_path / "out"
    _unfinished(fasta, out)
    before = _contents(out)
    problem, ending = (re.escape(text) for text in ("out: holds a run with other settings (", f"{named}); choose"))
    with pytest.raises(InputError, match=f"{problem}(.*; )?{ending}"):
        pretrain(fasta, out, _config(**changes), device="cpu")
    assert _contents(out) == before


def test_resuming_with_other_data_is_refused(fasta: Path, tmp_path: Path) -> None:
    _unfinished(fasta, tmp_path / "out")
    other = write_fasta(tmp_path / "other.fasta", random_proteins(60, seed=77))
    with pytest.raises(InputError, match=r"holds a run with other settings \(data: "):
        pretrain(other, tmp_path / "out", _config(), device="cpu")


@pytest.mark.parametrize("architecture", [{"feedforward": 48}, {"heads": 1}, {"max_residues": 10}])
def test_resuming_another_architecture_of_the_same_name_is_refused(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: dict[str, int]
) -> None:
    _unfinished(fasta, tmp_path / "out")
    changed = dataclasses.replace(TOY, **architecture)  # type: ignore[arg-type]
    monkeypatch.setitem(ENCODER_PRESETS, "toy", changed)
    with pytest.raises(InputError, match=r"holds a run with other settings \(architecture: "):
        pretrain(fasta, tmp_path / "out", _config(), device="cpu")


def test_a_state_of_another_release_is_refused(fasta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _unfinished(fasta, out)
    torch.save(_state(out) | {"version": 99}, out / "state.pt")
    with pytest.raises(InputError, match=r"state\.pt: state has schema version 99, this release reads 2"):
        pretrain(fasta, out, _config(), device="cpu")


@pytest.mark.parametrize("content", [b"", b"garbage", "cut", "a list"])
def test_an_unreadable_state_is_refused(fasta: Path, tmp_path: Path, content: bytes | str) -> None:
    out = tmp_path / "out"
    _unfinished(fasta, out)
    state = out / "state.pt"
    if content == "a list":
        torch.save([1, 2], state)
    else:
        state.write_bytes(content if isinstance(content, bytes) else state.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"state\.pt"):
        pretrain(fasta, out, _config(), device="cpu")


def test_a_loss_that_is_no_number_ends_the_run(fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last good state stays, as a clean run would have left it, and nothing is written as a model."""
    true_loss, calls = F.cross_entropy, []

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return true_loss(*args, **options) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(F, "cross_entropy", broken)
    out = tmp_path / "out"
    problem = r"the loss is nan at step 3, in a batch of protein\d+, .*: try a learning rate below 0\.002"
    with pytest.raises(InputError, match=problem):
        pretrain(fasta, out, _config(), device="cpu", save_every_s=0)
    monkeypatch.setattr(F, "cross_entropy", true_loss)
    with pytest.raises(_Killed):
        pretrain(fasta, tmp_path / "clean", _config(), device="cpu", save_every_s=0, after_step=_killed_at(3))
    _assert_same_state(_state(out), _state(tmp_path / "clean"))
    _assert_log(out, 3)
    assert not (out / "model.safetensors").exists()


def test_a_learning_rate_beyond_reason_ends_the_run(fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the loss is nan at step \d+, in .*: try a learning rate below 1e\+30"):
        pretrain(fasta, tmp_path / "out", _config(learning_rate=1e30, warmup_steps=0), device="cpu")


def test_gradients_that_are_no_numbers_never_reach_the_weights() -> None:
    run = _trainer(_config(), _corpus(_sequences()))
    encoder = run.task.model
    assert isinstance(encoder, Encoder)
    encoder.final_norm.bias.register_hook(lambda grad: grad * math.inf)  # type: ignore[no-untyped-call]
    with pytest.raises(InputError, match="gradient"):
        run.run(until=1)
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())


def test_too_few_sequences_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "few.fasta", ["MKT"])
    with pytest.raises(InputError, match=r"few\.fasta: 1 sequences are too few"):
        pretrain(fasta, tmp_path / "out", _config(), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"preset": "nano-xl"}, "preset is 'nano-xl'; allowed: nano-2xs, nano-xs, nano-s"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"steps": -3}, "steps must be positive, got -3"),
        ({"batch_tokens": 0}, "batch_tokens must be positive, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"precision": "fp16"}, "precision is 'fp16'; allowed: fp32, bf16"),
        ({"precision": "auto"}, "precision is 'auto'; allowed: fp32, bf16"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(problem)}"):
        _config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": -1},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"weight_decay": math.nan},
        {"learning_rate": math.inf},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        _config(**changes)


def test_misspelt_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        _config(learning_rat=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        _config().steps = 3  # type: ignore[misc]


# The command


def _arguments(fasta: Path, out: Path, *more: str) -> list[str]:
    small = ["--preset", "nano-xs", "--steps", "2", "--batch-tokens", "64", "--precision", "fp32", "--device", "cpu"]
    return ["pretrain", str(fasta), "--out", str(out), *small, *more]


def test_command_trains_and_reports(fasta: Path, tmp_path: Path, command: CliRunner) -> None:
    out = tmp_path / "out"
    result = command.invoke(app, _arguments(fasta, out, "--json"))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "training.json").read_text())
    assert (report["preset"], report["steps"], report["batch_tokens"], report["seed"]) == ("nano-xs", 2, 64, 0)
    assert load_model(out, device="cpu", precision="fp32").dim == 128
    _assert_log(out, 2)

    # The same command on a finished folder does nothing; another one is refused, with a message and no traceback.
    plain = command.invoke(app, _arguments(fasta, out))
    assert plain.exit_code == 0, plain.output
    assert plain.stdout == ""
    assert "held_out_perplexity" in plain.stderr
    refused = command.invoke(app, _arguments(fasta, out, "--seed", "3"))
    assert refused.exit_code == 1
    assert "holds a run with other settings (seed: 0 there, 3 now)" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        (("--preset", "nano-xl"), 2, "nano-xl"),
        (("--precision", "fp16"), 2, "fp16"),
        (("--device", "tpu"), 1, "device is 'tpu'"),
        (("--learning-rate", "-1"), 2, "--learning-rate"),
        (("--steps", "0"), 2, "--steps"),
        (("--batch-tokens", "15"), 2, "--batch-tokens"),
        (("--stepz", "3"), 2, "No such option"),
    ],
)
def test_command_refuses_wrong_settings(
    fasta: Path, tmp_path: Path, command: CliRunner, more: tuple[str, ...], code: int, problem: str
) -> None:
    result = command.invoke(app, _arguments(fasta, tmp_path / "out", *more))
    assert result.exit_code == code, result.output
    assert problem in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_command_names_the_file_at_fault(tmp_path: Path, command: CliRunner) -> None:
    result = command.invoke(app, _arguments(tmp_path / "absent.fasta", tmp_path / "out"))
    assert result.exit_code == 1
    assert "absent.fasta: cannot be opened" in " ".join(result.stderr.split())


def test_command_refuses_a_negative_seed(fasta: Path, tmp_path: Path, command: CliRunner) -> None:
    result = command.invoke(app, _arguments(fasta, tmp_path / "out", "--seed", "-1"))
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_command_has_help(command: CliRunner) -> None:
    result = command.invoke(app, ["pretrain", "--help"])
    assert result.exit_code == 0
    assert "masked language model" in result.output
