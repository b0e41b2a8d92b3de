"""From a FASTA file to a student: what is written, how good it is said to be, kills, flags, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError
from protnest.engine.models import load_model
from protnest.kernels.kd_options import KDOptions
from protnest.training.corpus import is_held_out, read_shares
from protnest.training.distillation import Callbacks, DistillConfig, distill
from protnest.training.perplexity import letter_perplexity
from protnest.training.prediction import EncoderPredictor
from protnest.training.row_task import RowTask
from protnest.training.teacher_cache import TeacherCache
from protnest.training.token_scores import score_tokens
from protnest.training.trainer import StepReport, TrainerConfig

from support.gpt2_models import byte_pairs, save_gpt2
from support.learning import TOY, TOY_DECODER, fasta_to_train, proteins_to_train, save_toy, toy_decoder, toy_encoder
from support.tiny import write_fasta


class _Killed(BaseException):
    pass


def _killing_at(step: int) -> Callbacks:
    def after_step(report: StepReport) -> None:
        if report.step == step:
            raise _Killed

    return Callbacks(after_step=after_step)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {
        "teacher": save_toy(tmp_path / "teacher", toy_encoder(1, replace(TOY, layers=3))),
        "student": save_toy(tmp_path / "student", toy_encoder(0)),
        "decoder teacher": save_toy(tmp_path / "decoder teacher", toy_decoder(1, replace(TOY_DECODER, layers=3))),
        "decoder student": save_toy(tmp_path / "decoder student", toy_decoder(0)),
    }


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return fasta_to_train(tmp_path / "in.fasta")


def _config(student: Path | str, **changes: Any) -> DistillConfig:
    trainer = {"steps": 6, "batch_tokens": 100, "learning_rate": 0.01, "warmup_steps": 2} | changes.pop("trainer", {})
    return DistillConfig(student=str(student), trainer=TrainerConfig(**trainer), **changes)


def _weights(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(out / "state.pt", weights_only=True)["model"]
    return found


def _are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is written


@pytest.mark.parametrize("kind", ["", "decoder "])
def test_a_run_leaves_what_is_documented(models: dict[str, Path], fasta: Path, tmp_path: Path, kind: str) -> None:
    out, config = tmp_path / "out", _config(models[f"{kind}student"])
    started: list[tuple[int, int]] = []
    callbacks = Callbacks(on_start=lambda *args: started.append(args))
    report = distill(models[f"{kind}teacher"], fasta, out, config, device="cpu", callbacks=callbacks)
    assert started == [(6, 0)]
    assert json.loads((out / "training.json").read_text()) == report
    files = {path.name for path in out.iterdir()} - {"tensorboard", ".lock"}
    assert files == {
        "run.json",
        "state.pt",
        "log.csv",
        "training.json",
        "model.safetensors",
        "config.json",
        "vocab.txt",
    }
    loaded = load_model(out, device="cpu", precision="fp32")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, _weights(out)[name].half().float()), name

    assert report["teacher"] == f"{kind}teacher"
    recipe = {**asdict(config.trainer), **asdict(KDOptions()), "init": "random", "epochs": None, "rows": "masked"}
    if not kind:
        recipe["mask_share"] = 0.15
    assert report["recipe"] == json.loads(json.dumps(recipe))
    data = report["data"]
    assert (data["file"], data["train_sequences"], data["held_out_sequences"]) == ("in.fasta", 16, 3)
    long = sum(len(s) + 2 > (24 if kind else 22) for s in proteins_to_train()[:16])
    assert long > 2
    assert data["split_sequences" if kind else "cropped_sequences"] == long
    found = report["perplexity"]
    assert found["sequences"] == 3
    for whose in ("student", "teacher"):
        for measure in ("token_perplexity", "residue_perplexity"):
            estimate = found[whose][measure]
            assert 1 < estimate["low"] <= estimate["value"] <= estimate["high"]
            assert estimate["n"] == 3
    assert found["divergence"]["value"] > 0


def test_perplexities_are_of_what_was_held_out(models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    report = distill(models["teacher"], fasta, tmp_path / "out", _config(models["student"]), device="cpu")
    train, held_out = read_shares(fasta)
    assert all(is_held_out(sequence) for sequence in held_out.sequences)
    teacher = load_model(models["teacher"], device="cpu", precision="fp32")
    scores = score_tokens(EncoderPredictor(teacher), held_out.sequences).model  # type: ignore[arg-type]
    expected = float(np.exp(scores.nll_N.mean()))
    assert report["perplexity"]["teacher"]["token_perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    assert report["perplexity"]["unigram"]["value"] == pytest.approx(
        letter_perplexity(*_counts(held_out.sequences, train.sequences)).value, rel=1e-9
    )


def _counts(*sets: tuple[str, ...]) -> list[Any]:
    from protnest.training.composition import letter_counts

    held_out, train = (letter_counts(each) for each in sets)
    return [held_out, train.sum(axis=0)]


def test_judged_are_at_most_so_many(models: dict[str, Path], tmp_path: Path) -> None:
    fasta = fasta_to_train(tmp_path / "more.fasta", held_out=12)
    report = distill(None, fasta, tmp_path / "out", _config(models["student"], held_out=5), device="cpu")
    assert report["perplexity"]["sequences"] == 5


def test_a_student_learns_from_its_teacher(models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    losses: dict[str, float] = {}
    for kind in ("", "decoder "):
        for steps in (1, 40):
            config = _config(
                models[f"{kind}student"],
                trainer={"steps": steps, "learning_rate": 0.03, "batch_tokens": 200},
                options=KDOptions(alpha=0.0),
            )
            out = tmp_path / f"{kind}{steps}"
            report = distill(models[f"{kind}teacher"], fasta, out, config, device="cpu")
            losses[f"{kind}{steps}"] = report["perplexity"]["divergence"]["value"]
    assert losses["40"] < 0.7 * losses["1"]
    assert losses["decoder 40"] < 0.7 * losses["decoder 1"]


def test_residue_decoders_are_made_from_labels_alone(fasta: Path, tmp_path: Path) -> None:
    teacher = distill(None, fasta, tmp_path / "gpt", _config("nano-gpt", trainer={"steps": 2}), device="cpu")
    assert teacher["teacher"] is None
    assert "teacher" not in teacher["perplexity"]
    assert "temperature" not in teacher["recipe"]
    config = _config("micro", trainer={"steps": 2})
    student = distill(tmp_path / "gpt", fasta, tmp_path / "micro", config, device="cpu")
    assert student["perplexity"]["divergence"]["n"] == 3
    assert load_model(tmp_path / "micro", device="cpu").config.vocabulary == 33  # type: ignore[union-attr]


def test_byte_pairs_come_from_the_teacher(fasta: Path, tmp_path: Path) -> None:
    save_gpt2(tmp_path / "pairs")
    config = _config("micro", trainer={"steps": 2})
    for name, cache in (("live", None), ("cached", tmp_path / "cache")):
        distill(tmp_path / "pairs", fasta, tmp_path / name, config, device="cpu", cache=cache)
        student = load_model(tmp_path / name, device="cpu")
        assert student.vocabulary.tokens == load_model(tmp_path / "pairs", device="cpu").vocabulary.tokens  # type: ignore[union-attr]
        assert (tmp_path / name / "tokenizer.json").exists()


def test_epochs_are_passes_over_the_data(models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    seen: list[StepReport] = []
    callbacks = Callbacks(after_step=seen.append)
    config = _config(models["student"], epochs=2, trainer={"accumulate": 2})
    report = distill(None, fasta, tmp_path / "out", config, device="cpu", callbacks=callbacks)
    tokens = sum(min(len(sequence), 20) + 2 for sequence in read_shares(fasta)[0].sequences)
    run = sum(step.tokens for step in seen)
    assert 2 * tokens <= run < 2 * tokens + 200
    assert report["recipe"]["steps"] == len(seen)


def test_layers_are_copied_first(models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    """With a rate of nearly nothing, the student stays what it began as."""
    slow = {"learning_rate": 1e-9, "steps": 1}
    config = _config(models["student"], init="layers", trainer=slow)
    distill(models["teacher"], fasta, tmp_path / "out", config, device="cpu")
    teacher = load_model(models["teacher"], device="cpu", precision="fp32").state_dict()
    torch.testing.assert_close(_weights(tmp_path / "out")["layers.1.fc1.weight"], teacher["layers.2.fc1.weight"])


# Flags


@pytest.mark.parametrize(
    "changes",
    [
        {"options": KDOptions(uncertainty=False)},
        {"options": KDOptions(smooth=False)},
        {"options": KDOptions(temperature=1.0)},
        {"options": KDOptions(alpha=0.9)},
        {"options": KDOptions(weight_normalization="weight")},
        {"rows": "all"},
        {"init": "layers"},
        {"trainer": {"seed": 1}},
        {"trainer": {"schedule": "cosine"}},
        {"trainer": {"weight_decay": 0.5}},
        {"trainer": {"precision": "bf16"}},
    ],
)
def test_each_setting_reaches_the_weights(
    models: dict[str, Path], fasta: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    few = {"steps": 5}
    plain = _config(models["student"], trainer=few)
    changed = _config(models["student"], **(changes | {"trainer": few | changes.get("trainer", {})}))
    for name, config in (("plain", plain), ("changed", changed)):
        distill(models["teacher"], fasta, tmp_path / name, config, device="cpu")
    assert not _are_equal(_weights(tmp_path / "plain"), _weights(tmp_path / "changed"))


def test_the_cache_changes_nothing_but_rounding(
    models: dict[str, Path], fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, masks in (("", 2), ("decoder ", None)):
        config = _config(models[f"{kind}student"], mask_epochs=masks, trainer={"steps": 12})
        teacher, out = models[f"{kind}teacher"], tmp_path / f"{kind}live"
        distill(teacher, fasta, out, config, device="cpu")
        cached = tmp_path / f"{kind}cached"
        shards: list[tuple[int, int]] = []
        callbacks = Callbacks(after_shard=lambda *args, shards=shards: shards.append(args))
        distill(teacher, fasta, cached, config, device="cpu", cache=tmp_path / f"{kind}cache", callbacks=callbacks)
        assert shards == ([(1, 1)] if kind else [(1, 2), (2, 2)])
        ours, theirs = _weights(cached), _weights(out)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-3)


def test_a_cache_is_filled_as_far_as_the_run_goes(models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    config = _config(models["student"], trainer={"steps": 1})
    distill(models["teacher"], fasta, tmp_path / "out", config, device="cpu", cache=tmp_path / "cache")
    key = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert list(key["shards"]) == ["0-00000"]
    assert key["key"]["mask_epochs"] == 4


# Kills


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["", "decoder "])
def test_a_killed_run_ends_as_if_uninterrupted(
    models: dict[str, Path], fasta: Path, tmp_path: Path, kind: str, cached: bool
) -> None:
    config = _config(models[f"{kind}student"], trainer={"accumulate": 2})

    def run(name: str, **options: Any) -> dict[str, Any]:
        cache = tmp_path / f"cache of {name}" if cached else None
        return distill(models[f"{kind}teacher"], fasta, tmp_path / name, config, device="cpu", cache=cache, **options)

    whole = run("whole")
    for step in (1, 4):
        with pytest.raises(_Killed):
            run("killed", save_every_s=0, callbacks=_killing_at(step))
    started: list[tuple[int, int]] = []
    report = run("killed", callbacks=Callbacks(on_start=lambda *args: started.append(args)))
    assert started == [(6, 4)]
    assert _are_equal(_weights(tmp_path / "killed"), _weights(tmp_path / "whole"))
    models_written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert models_written[0] == models_written[1]
    for each in (report, whole):
        del each["seconds"]
    assert report == whole


def test_a_finished_run_is_not_repeated(
    models: dict[str, Path], fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(models["student"])
    report = distill(models["teacher"], fasta, tmp_path / "out", config, device="cpu")
    monkeypatch.setattr(RowTask, "loss", None)
    assert distill(models["teacher"], fasta, tmp_path / "out", config, device="cpu") == report


def test_other_settings_are_refused_or_overwritten(models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    distill(models["teacher"], fasta, out, _config(models["student"]), device="cpu")
    other = _config(models["student"], options=KDOptions(uncertainty=False, alpha=0.2))
    with pytest.raises(InputError, match=r"\(alpha: 0.5 there, 0.2 now; uncertainty: True there, False now\)"):
        distill(models["teacher"], fasta, out, other, device="cpu")
    with pytest.raises(InputError, match=r"\(alpha: 0.5 there, None now; .*teacher: .* there, None now"):
        distill(None, fasta, out, _config(models["student"]), device="cpu")
    save_toy(models["student"], toy_encoder(9))
    with pytest.raises(InputError, match=r"\(initial: "):
        distill(models["teacher"], fasta, out, _config(models["student"]), device="cpu")
    report = distill(models["teacher"], fasta, out, other, device="cpu", overwrite=True)
    assert report["recipe"]["alpha"] == 0.2


# Refused


def test_what_does_not_go_together_is_refused(models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    headless = save_toy(tmp_path / "headless", toy_encoder(1, head=False))
    save_gpt2(tmp_path / "pairs")
    save_gpt2(tmp_path / "other pairs", pairs=byte_pairs(skip=20))
    cases: list[tuple[Any, DistillConfig, dict[str, Any], str]] = [
        (
            models["teacher"],
            _config("nano-gpt"),
            {},
            "teacher is an encoder, nano-gpt is a decoder: they",
        ),
        (models["decoder teacher"], _config("nano-xs"), {}, "decoder teacher is a decoder, nano-xs is an encoder"),
        (headless, _config("nano-xs"), {}, "headless has no language-model head: its checkpoint holds the encoder"),
        (
            tmp_path / "pairs",
            _config(models["decoder student"]),
            {},
            "pairs has 400 tokens, decoder student 33",
        ),
        (tmp_path / "pairs", _config(str(tmp_path / "other pairs")), {}, "400 tokens, other pairs 400, of which token"),
        (tmp_path / "pairs", _config("micro", vocabulary="residues"), {}, "differ: pairs has 400 tokens, micro 33"),
        (None, _config("micro"), {}, "micro has no vocabulary of its own"),
        (None, _config("nano-xs", init="layers"), {}, "init is 'layers', but there is no teacher to copy them from"),
        (models["teacher"], _config("nano-xs", init="layers"), {}, "layers cannot be copied from teacher to nano-xs: "),
        (None, _config("nano-xs", init="nano-xz"), {}, "no model 'nano-xz': did you mean 'nano-xs'"),
        (None, _config("nano-xs", init="nano-s"), {}, "feed-forward) cannot begin as nano-s (8 layers, 192 wide"),
        (None, _config("nano-gpt", init="nano-xs"), {}, "nano-gpt cannot begin as nano-xs: only encoders grow"),
        (None, _config("nano-xs"), {"cache": tmp_path / "cache"}, "a cache holds a teacher's answers, and there is no"),
        (models["teacher"], _config("nano-xs", mask_epochs=0), {"cache": tmp_path / "c"}, "masks that come again"),
        (tmp_path / "absent", _config("nano-xs"), {}, "no model"),
    ]
    for teacher, config, more, problem in cases:
        with pytest.raises(InputError, match=re.escape(problem)):
            distill(teacher, fasta, tmp_path / "out", config, device="cpu", **more)
        assert not (tmp_path / "out").exists()


def test_data_without_sequences_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for sequences, problem in (([], "holds no records"), (["MKT"], "1 sequences are too few")):
        fasta = write_fasta(tmp_path / "few.fasta", sequences)
        with pytest.raises(InputError, match=problem):
            distill(models["teacher"], fasta, tmp_path / "out", _config(models["student"]), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rows": "some"}, "rows is 'some'; allowed: masked, all"),
        ({"epochs": 0}, "epochs is 0, expected a whole number of at least 1"),
        ({"mask_share": 1.0}, "mask_share is 1.0, expected a number above 0 and below 1"),
        ({"mask_epochs": -1}, "mask_epochs is -1, expected a whole number of at least 0"),
        ({"cache_top_k": 2.5}, "cache_top_k is 2.5, expected a whole number of at least 1"),
        ({"held_out": 0}, "held_out is 0, expected a whole number of at least 1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(problem)}"):
        _config("nano-xs", **changes)


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(
    models: dict[str, Path], fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_rows, calls = TeacherCache.rows, []

    def broken(cache: TeacherCache, batch: Any) -> Any:
        calls.append(1)
        found = true_rows(cache, batch)
        if len(calls) == 4:
            found.hidden_ND[2, 5] = float("nan")  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(TeacherCache, "rows", broken)
    config = _config(models["student"])
    with pytest.raises(InputError, match=r"teacher_logits.*NaN.* at step 3, in a batch of protein\d+, "):
        distill(models["teacher"], fasta, tmp_path / "out", config, device="cpu", cache=tmp_path / "c", save_every_s=0)
    assert torch.load(tmp_path / "out" / "state.pt", weights_only=True)["step"] == 3
    assert not (tmp_path / "out" / "model.safetensors").exists()
