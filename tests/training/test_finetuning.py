"""Fine-tuning toys on toy families: what is kept, what is judged, runs that are killed, and what is refused.

Shapes: B sequences.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError, load_model, read_fasta
from protnest.engine.cli import app
from protnest.engine.config import EncoderConfig
from protnest.engine.decoder import Decoder
from protnest.engine.decoder_config import DecoderConfig
from protnest.engine.encoder import Encoder
from protnest.engine.generation import GenerationOptions, Generator
from protnest.engine.sampling import SamplingOptions
from protnest.engine.vocabulary import ResidueVocabulary
from protnest.training.early_stopping import Progress
from protnest.training.family_data import LabelSource
from protnest.training.finetuning import Callbacks, FinetuneConfig, default_learning_rate, finetune
from protnest.training.finetuning_plot import finetuning_figure
from protnest.training.finetuning_subject import LanguageSubject
from protnest.training.lora import load_adapters
from protnest.training.perplexity import residue_perplexity
from protnest.training.prediction import EncoderPredictor
from protnest.training.task_head import load_headed, predict
from protnest.training.token_scores import score_tokens
from safetensors.torch import load_file
from typer.testing import CliRunner

from support.learning import save_toy, toy_decoder, toy_encoder
from support.planted_families import planted_families
from support.tiny import write_fasta

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")

SMALL = EncoderConfig(layers=1, width=16, heads=2, feedforward=32, max_residues=40)
PLAIN = SamplingOptions(repetition_penalty=1.0)
READER = DecoderConfig(layers=2, width=32, heads=2, feedforward=64, vocabulary=33, places=64)


def _proteins(families: int = 20, members: int = 3) -> list[str]:
    return planted_families(families, members, kept=0.85, residues=30, seed=7)[0]


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return write_fasta(tmp_path / "family.fasta", _proteins())


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    model = toy_encoder(1, SMALL)
    with torch.no_grad():
        # Gentler than the toys' own: a head that shouts nonsense only has to be silenced.
        for each in model.parameters():
            each.mul_(0.3)
        for name, each in model.named_parameters():
            if name.endswith("norm.weight"):
                each.fill_(1.0)
    return save_toy(tmp_path / "encoder", model)


def _config(**changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_tokens": 256,
        "learning_rate": 3e-3,
        "validation_share": 0.15,
        "test_share": 0.15,
        "clusters_by": "kmers",
    }
    return FinetuneConfig(**{**settings, **changes})


def _sequences(path: Path) -> list[str]:
    return [record.sequence for record in read_fasta(path)]


# What comes out


def test_an_encoder_learns_its_family(family: Path, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[Progress] = []
    report = finetune(encoder, family, out, _config(epochs=6), callbacks=Callbacks(after_epoch=seen.append))
    assert report == json.loads((out / "training.json").read_text())
    assert (report["task"], report["method"]) == ("mlm", "full")
    assert report["parameters"] == report["trained_parameters"]
    assert report["validation_losses"] == list(seen[-1].losses)
    assert report["epochs"] == len(report["validation_losses"]) - 1
    # The shares are all of the family, each protein once, and none in two of them.
    shares = {name: _sequences(out / f"{name}.fasta") for name in ("train", "validation", "test")}
    assert sorted(itertools.chain(*shares.values())) == sorted(set(_proteins()))
    assert [report["data"][name] for name in shares] == [len(each) for each in shares.values()] == [42, 9, 9]
    # What the report says is what the files hold: the tuned model, and the one before.
    for name, folder in (("after", out), ("before", encoder)):
        model = load_model(folder, precision="fp32")
        assert isinstance(model, Encoder)
        scores = score_tokens(EncoderPredictor(model), shares["test"]).model
        assert report["test"][name]["value"] == pytest.approx(residue_perplexity(scores).value, rel=1e-5)
        assert report["test"][name]["n"] == 9
        validation = score_tokens(EncoderPredictor(model), shares["validation"]).model.nll_N.mean()
        wanted = min(report["validation_losses"]) if name == "after" else report["validation_losses"][0]
        assert validation == pytest.approx(wanted, rel=1e-5)
    test = report["test"]
    assert test["ratio"]["value"] == pytest.approx(test["after"]["value"] / test["before"]["value"])
    assert test["ratio"]["high"] < 1
    assert 15 < test["unigram"]["value"] < 25
    assert report["seconds"] > 0


def test_the_learning_rate_rises_in_proportion(family: Path, encoder: Path, tmp_path: Path) -> None:
    reports = [
        finetune(encoder, family, tmp_path / str(n), _config(epochs=2, n=n, warmup_share=0.25, learning_rate=None))
        for n in (8, 40)
    ]
    for report in reports:
        recipe = report["recipe"]
        assert recipe["warmup_steps"] == round(0.25 * recipe["steps"])
        assert recipe["learning_rate"] == default_learning_rate(report["parameters"], "full") == 1e-3
    assert reports[1]["recipe"]["steps"] > 3 * reports[0]["recipe"]["steps"]
    first, both = (_sequences(tmp_path / n / "train.fasta") for n in ("8", "40"))
    assert first == both[:8]
    assert _sequences(tmp_path / "8" / "test.fasta") == _sequences(tmp_path / "40" / "test.fasta")


def test_default_learning_rates() -> None:
    """The published ones, within a third."""
    for parameters, rate in ((39e6, 2e-4), (82e6, 1e-4), (204e6, 5e-5), (774e6, 2e-5)):
        assert default_learning_rate(int(parameters), "full") == pytest.approx(rate, rel=0.34)
    assert default_learning_rate(10**12, "full") == 2e-5
    assert default_learning_rate(10**3, "lora") == 5 * default_learning_rate(10**3, "full")


def test_it_stops_and_keeps_the_best(family: Path, encoder: Path, tmp_path: Path) -> None:
    """At an absurd rate the model before any step is the best one."""
    report = finetune(encoder, family, tmp_path / "out", _config(epochs=9, patience=2, learning_rate=3.0))
    assert (report["best_epoch"], report["epochs"], report["stopped_early"]) == (0, 2, True)
    assert report["test"]["ratio"]["value"] == pytest.approx(1.0)
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_decoder_learns_to_stop(tmp_path: Path) -> None:
    """Generated lengths are the family's: the end is learnt like any other token, from each sequence's own length."""
    proteins = _proteins(30, 4)
    family = write_fasta(tmp_path / "family.fasta", proteins)
    torch.manual_seed(1)
    base = save_toy(tmp_path / "decoder", Decoder(READER, ResidueVocabulary()))
    report = finetune(base, family, tmp_path / "out", _config(epochs=8, patience=4, learning_rate=1e-2))
    assert (report["task"], report["data"]["cut_into_pieces"]) == ("clm", 0)
    assert report["test"]["ratio"]["high"] < 0.7

    def lengths(folder: Path) -> tuple[list[int], float]:
        model = load_model(folder, precision="fp32")
        assert isinstance(model, Decoder)
        designs = list(Generator(model, GenerationOptions(seed=3, sampling=PLAIN)).run(60))
        return [len(each.sequence) for each in designs], float(np.mean([each.ended for each in designs]))

    found, ended = lengths(tmp_path / "out")
    assert {len(each) for each in proteins} == {30}
    assert ended > 0.9
    assert np.quantile(found, [0.2, 0.8]).tolist() == [30, 30]
    untaught, _ = lengths(base)
    assert abs(np.median(untaught) - 30) > 5


@needs_peft
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_adapters_are_kept_and_merged(kind: str, family: Path, encoder: Path, tmp_path: Path) -> None:
    base = encoder if kind == "encoder" else save_toy(tmp_path / "decoder", toy_decoder(1, READER))
    out = tmp_path / "out"
    report = finetune(base, family, out, _config(method="lora", rank=2, lora_alpha=6.0, learning_rate=2e-2))
    layers, width, inner = (1, 16, 32) if kind == "encoder" else (2, 32, 64)
    assert report["trained_parameters"] == layers * 2 * ((1 + 3) * width + 2 * width + 2 * (width + inner))
    assert (report["recipe"]["rank"], report["recipe"]["lora_alpha"]) == (2, 6.0)
    assert report["best_epoch"] > 0
    assert report["test"]["ratio"]["value"] < 1
    assert all("lora_" in name for name in load_file(out / "best.safetensors"))
    again, saved = load_model(base, precision="fp32"), load_model(out, precision="fp32")
    load_adapters(again, out / "adapter").merge()
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(tensor, again.state_dict()[name], rtol=1e-6, atol=1e-6)
    assert {*load_file(out / "model.safetensors")} == {*load_file(base / "model.safetensors")}


# Heads


def _labelled(folder: Path, pooling: str, task: str) -> tuple[Path, LabelSource]:
    """Of proteins how many tryptophans they have; of residues whether they are charged."""
    proteins = _proteins()
    rows = []
    for number, sequence in enumerate(proteins):
        charged = ["+" if letter in "KRDEH" else "o" for letter in sequence]
        counted = sequence.count("W") + sequence.count("C")
        label = "".join(charged) if pooling == "residue" else str(counted)
        if task == "classification" and pooling == "mean":
            label = "many" if counted > 2 else "few"
        rows.append(f"protein{number},{label}")
    table = folder / "labels.csv"
    table.write_text("name,y\n" + "\n".join(rows[:-1]) + "\n")
    return write_fasta(folder / "labelled.fasta", proteins), LabelSource(file=table, id_column="name", label_column="y")


def test_numbers_are_learnt(encoder: Path, tmp_path: Path) -> None:
    data, labels = _labelled(tmp_path, "mean", "regression")
    config = _config(task="regression", epochs=30, patience=30, learning_rate=1e-2, test_share=0.3)
    report = finetune(encoder, data, tmp_path / "out", config, labels=labels)
    assert (report["task"], report["data"]["labelled"], report["data"]["pooling"]) == ("regression", 59, "mean")
    test = report["test"]
    assert test["spearman"]["value"] > 0.7
    assert test["spearman"]["low"] > 0.3
    # The saved head says the same, in the labels' units.
    model = load_headed(tmp_path / "out", precision="fp32")
    sequences = _sequences(tmp_path / "out" / "test.fasta")
    said = np.concatenate(predict(model, sequences))
    truth = np.array([each.count("W") + each.count("C") for each in sequences])
    assert np.mean((said - truth) ** 2) / model.head.config.scale**2 == pytest.approx(test["loss"], rel=1e-4)


@needs_peft
def test_classes_of_residues_are_learnt(tmp_path: Path) -> None:
    data, labels = _labelled(tmp_path, "residue", "classification")
    torch.manual_seed(1)
    base = save_toy(tmp_path / "decoder", Decoder(READER, ResidueVocabulary()))
    config = _config(task="classification", pooling="residue", method="lora", learning_rate=3e-2, epochs=12, rank=4)
    report = finetune(base, data, tmp_path / "out", config, labels=labels)
    assert report["data"]["classes"] == ["+", "o"]
    assert report["test"]["accuracy"]["value"] > 0.95 > report["test"]["majority"]
    probabilities = predict(load_headed(tmp_path / "out", precision="fp32"), ["AKA"])[0]
    assert probabilities.argmax(axis=1).tolist() == [1, 0, 1]


# Runs that are killed, finished, or others


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("last", [3, 12])
@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=needs_peft)])
def test_killed_runs_end_alike(last: int, method: str, family: Path, encoder: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, and at the end of one: bit for bit, and with the same report."""
    config = _config(method=method, rank=2)
    whole = finetune(encoder, family, tmp_path / "whole", config)
    steps: list[int] = []

    def kill(report: Any) -> None:
        steps.append(report.step)
        if report.step == last:
            raise _KilledError

    with pytest.raises(_KilledError):
        finetune(encoder, family, tmp_path / "out", config, save_every_s=0.0, callbacks=Callbacks(after_step=kill))
    started: list[tuple[int, int]] = []
    again = finetune(
        encoder,
        family,
        tmp_path / "out",
        config,
        callbacks=Callbacks(on_start=lambda of, done: started.append((of, done))),
    )
    assert started == [(whole["recipe"]["steps"], last)]
    assert 3 < whole["recipe"]["steps"] / 3 <= 12
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_killed_between_the_last_epoch_and_the_files(
    family: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it stopped early: no step is taken again."""
    config = _config(epochs=9, patience=1, learning_rate=3.0)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("protnest.training.finetuning.save_checkpoint", fails)
        with pytest.raises(InputError, match=r"the model cannot be written \(.*No space left on device"):
            finetune(encoder, family, tmp_path / "out", config)
    taken: list[int] = []
    report = finetune(
        encoder, family, tmp_path / "out", config, callbacks=Callbacks(after_step=lambda each: taken.append(each.step))
    )
    assert (report["epochs"], report["stopped_early"], taken) == (1, True, [])


def test_finished_and_other_runs(family: Path, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = finetune(encoder, family, out, _config(epochs=1))
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert finetune(encoder, family, out, _config(epochs=1)) == report
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    for changes in ({"epochs": 2}, {"seed": 1}, {"n": 10}, {"patience": 9}):
        with pytest.raises(InputError, match="other settings"):
            finetune(encoder, family, out, _config(**{"epochs": 1, **changes}))
    again = finetune(encoder, family, out, _config(epochs=1, n=10), overwrite=True)
    assert again["data"]["train_used"] == 10


# What is refused


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"task": "mlp"}, "task is 'mlp'; allowed: mlm, clm, regression, classification"),
        ({"method": "half"}, "method is 'half'; allowed: full, lora"),
        ({"pooling": "max"}, "pooling is 'max'; allowed: mean, residue"),
        ({"schedule": "step"}, "schedule is 'step'; allowed"),
        ({"clusters_by": "blast"}, "clusters_by is 'blast'; allowed: auto, mmseqs, kmers"),
        ({"epochs": 0}, "epochs is 0, expected a whole number of at least 1"),
        ({"n": 0}, "n is 0, expected"),
        ({"rank": 1.5}, "rank is 1.5, expected"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"lora_alpha": math.inf}, "lora_alpha must be positive, got inf"),
        ({"warmup_share": 1.0}, "warmup_share is 1.0, expected 0 to less than 1"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        FinetuneConfig(**changes)


def test_models_that_do_not_fit_their_task(family: Path, encoder: Path, tmp_path: Path) -> None:
    labels = LabelSource(file=tmp_path / "none.csv")
    decoder = save_toy(tmp_path / "decoder", toy_decoder(1))
    headless = save_toy(tmp_path / "headless", toy_encoder(1, SMALL, head=False))
    for model, config, source, problem in (
        (encoder, _config(task="clm"), None, "task is 'clm', and encoder is an encoder: it learns 'mlm'"),
        (decoder, _config(task="mlm"), None, "task is 'mlm', and decoder is a decoder: it learns 'clm'"),
        (headless, _config(), None, "has no language-model head"),
        (encoder, _config(task="regression"), None, "task regression: it needs --labels"),
        (encoder, _config(), labels, "task of a language model: it takes no labels"),
        (encoder, _config(task="regression"), labels, "not a readable table"),
        (encoder, _config(n=50), None, "50 proteins to train on: the training share has 42"),
    ):
        with pytest.raises(InputError, match=re.escape(problem)):
            finetune(model, family, tmp_path / "out", config, labels=source)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be(encoder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.fasta"
    empty.write_text("")
    with pytest.raises(InputError, match=r"empty\.fasta"):
        finetune(encoder, empty, tmp_path / "out", _config())
    twice = write_fasta(tmp_path / "twice.fasta", _proteins())
    twice.write_text(twice.read_text().replace(">protein7 ", ">protein3 "))
    _, labels = _labelled(tmp_path, "mean", "regression")
    with pytest.raises(InputError, match=r"twice\.fasta: id 'protein3' is there twice: labels go by ids"):
        finetune(encoder, twice, tmp_path / "out", _config(task="regression"), labels=labels)


def test_repeats_count_once(encoder: Path, tmp_path: Path) -> None:
    proteins = _proteins()
    report = finetune(
        encoder, write_fasta(tmp_path / "f.fasta", proteins + proteins[:5]), tmp_path / "out", _config(epochs=1)
    )
    assert (report["data"]["found"], report["data"]["repeated"], report["data"]["train"]) == (65, 5, 42)


def test_a_validation_loss_that_is_no_number(
    family: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, math.nan])
    monkeypatch.setattr(LanguageSubject, "validation_loss", lambda self: next(losses))
    with pytest.raises(InputError, match="the validation loss is nan after epoch 1: try a lower learning rate"):
        finetune(encoder, family, tmp_path / "out", _config())


def test_without_peft(family: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(InputError, match="adapters need peft"):
        finetune(encoder, family, tmp_path / "out", _config(method="lora"))


# The command


@pytest.fixture
def _own_logging() -> Iterator[None]:
    """The command line gives the package's logger a handler; others' tests should not meet it."""
    logger = logging.getLogger("protnest")
    before = logger.handlers[:]
    yield
    logger.handlers[:] = before


@pytest.mark.usefixtures("_own_logging")
def test_command(family: Path, encoder: Path, tmp_path: Path) -> None:
    common = ["finetune", "--data", str(family), "--model", str(encoder), "--clusters-by", "kmers", "--quick"]
    common += ["--batch-tokens", "256", "--precision", "fp32"]
    page = tmp_path / "page.svg"
    result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "out"), "--json", "--plot", str(page)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["epochs"], report["data"]["train_used"]) == (3, 20)
    assert page.read_text().startswith("<?xml")
    shown = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    value = report["test"]["after"]
    line = f"after, perplexity per residue: {value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    assert line in " ".join(shown.stderr.split())
    for extra in (["--labels", str(family)], ["--task", "regression"]):
        wrong = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "other"), *extra])
        assert wrong.exit_code == 2
        assert "--labels goes with" in wrong.output
    failed = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "other"), "--task", "clm"])
    assert (failed.exit_code, "it learns 'mlm'" in " ".join(failed.output.split())) == (1, True)
    assert CliRunner().invoke(app, [*common, "--out", str(tmp_path / "o"), "--plot", "page.txt"]).exit_code == 1


@pytest.mark.usefixtures("_own_logging")
def test_command_with_labels(encoder: Path, tmp_path: Path) -> None:
    data, labels = _labelled(tmp_path, "mean", "classification")
    options = ["--labels", str(labels.file), "--id-col", "name", "--label-col", "y", "--task", "classification"]
    common = ["finetune", "--data", str(data), "--model", str(encoder), "--clusters-by", "kmers", "--precision", "fp32"]
    result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "out"), *options, "--quick"])
    assert result.exit_code == 0, result.output
    assert "the most frequent class alone:" in result.stderr
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    axes = finetuning_figure(report).axes
    assert [label.get_text() for label in axes[1].get_yticklabels()] == ["accuracy"]
    assert axes[0].lines[0].get_ydata().tolist() == report["validation_losses"]  # type: ignore[union-attr]
