"""The family: its table, one run of all of it with toys in the presets' place, its figures, what ships."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protnest.engine import Chain, Embedder, InputError, load_model, score_variants
from protnest.engine.cli import app
from protnest.engine.config import BUNDLED, BUNDLED_CHAINS, EncoderConfig
from protnest.engine.decoder_config import BUNDLED_DECODERS
from protnest.engine.ranking import spearman
from protnest.training import distillation, family_run, students
from protnest.training.corpus import is_held_out, read_shares
from protnest.training.family import STAGES, FamilyStage, train_family
from protnest.training.family_figures import FigureOptions, read_scans
from protnest.training.family_run import MEMBERS, FamilyRun, code_commit, stage_config
from protnest.training.student_judgement import judge
from typer.testing import CliRunner

from support.learning import TOY_DECODER, fasta_to_train

TOYS = {
    "nano-xs": EncoderConfig(layers=2, width=16, heads=2, feedforward=32, max_residues=30),
    "nano-s": EncoderConfig(layers=3, width=24, heads=3, feedforward=48, max_residues=30),
    "nano-m": EncoderConfig(layers=2, width=32, heads=4, feedforward=64, max_residues=30),
}
SHORT, LONG = "MKTAYIAKQRQISFVKSH", "MKTAYIAKQRQISFVKSHFSRQLEERLG"
OPTIONS = FigureOptions(judged=5, variants=6, chain_proteins=60, chain_residues=32)


@pytest.fixture(scope="module", autouse=True)
def _toys() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in TOYS.items():
            patch.setitem(students.ENCODER_PRESETS, name, config)
        patch.setitem(students.DECODER_PRESETS, "nano-gpt", TOY_DECODER)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FASTA file, scans, and the family that was trained on them."""
    home = tmp_path_factory.mktemp("home")
    fasta_to_train(home / "in.fasta", count=90, held_out=8)
    scans = home / "dms"
    scans.mkdir()
    (scans / "wt.fasta").write_text(f">short\n{SHORT}\n>long\n{LONG}\n")
    for name, wild_type in (("short", SHORT), ("long", LONG)):
        rows = [f"{letter}{site}W,{site % 5 + site / 100}\n" for site, letter in enumerate(wild_type[:12], start=1)]
        (scans / f"{name}.csv").write_text("mutant,DMS_score\n" + "".join(rows))
    FamilyRun(home / "in.fasta", home / "family", device="cpu").train(scale=1e-6)
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path) -> FamilyRun:
    """A run whose stages are finished, in a folder that a test may change."""
    shutil.copytree(home / "family", tmp_path / "family")
    return FamilyRun(home / "in.fasta", tmp_path / "family", device="cpu")


# The table


def test_the_table_hangs_together() -> None:
    seen: set[str] = set()
    for stage in STAGES:
        assert not (stage.trained_on and stage.grown_from), stage.name
        for before in (stage.trained_on, stage.grown_from, stage.teacher):
            assert before is None or before in seen, f"{stage.name} needs {before}, which is not trained yet"
        seen.add(stage.name)
    assert len(seen) == len(STAGES)
    assert set(MEMBERS) == {*BUNDLED, *BUNDLED_DECODERS} <= seen
    assert {stage.name: stage.preset for stage in STAGES if stage.name in MEMBERS} == {name: name for name in MEMBERS}


def test_a_stage_is_what_the_command_would_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Word by word what `protnest distill` asks for, so that a stage trained by hand is known as finished."""
    asked: list[tuple[Any, ...]] = []

    class _StopError(Exception):
        pass

    def distill(teacher: Any, data: Any, out: Any, config: Any, **_: Any) -> None:
        asked.append((teacher, out, config))
        raise _StopError

    monkeypatch.setattr(distillation, "distill", distill)
    taught = "--no-uncertainty --no-smoothing --mask-share 0.4"
    by_hand = [
        "--student {0}/seed-xs --mask-share 0.4 --steps 5000 --warmup 100 --seed 4",
        "--student nano-m --init {0}/trunk --mask-share 0.4 --steps 2400 --warmup 100 --seed 5",
        f"--student nano-s --init {{0}}/trunk --teacher {{0}}/nano-m {taught} --steps 500 --warmup 40 --seed 6",
        f"--student {{0}}/trunk --teacher {{0}}/nano-s {taught} --steps 300 --warmup 40 --seed 7",
        "--student nano-gpt --steps 3600 --warmup 150 --seed 0",
    ]
    rates = {"trunk": "0.001", "nano-m": "0.0007", "nano-s": "0.0005", "nano-xs": "0.0005", "nano-gpt": "0.002"}
    for (name, rate), words in zip(rates.items(), by_hand, strict=True):
        given = ["distill", "--data", "d", "--out", name, "--batch-tokens", "2048", "--learning-rate", rate]
        given += ["--schedule", "cosine", "--precision", "fp32", "--device", "cpu"]
        CliRunner().invoke(app, [*given, *words.format(tmp_path).split()])
        stage = next(each for each in STAGES if each.name == name)
        assert asked[-1][2] == stage_config(stage, tmp_path)
        assert asked[-1][0] == (None if stage.teacher is None else str(tmp_path / stage.teacher))
    assert len(asked) == 5


def test_scale() -> None:
    stage = FamilyStage(
        name="a", preset="nano-xs", steps=1000, warmup=100, learning_rate=1e-3, schedule="linear", seed=0
    )
    found = [stage_config(stage, Path("x"), scale=scale).trainer for scale in (1.0, 0.1, 1e-4)]
    assert [(each.steps, each.warmup_steps) for each in found] == [(1000, 100), (100, 10), (2, 0)]


# The run


def test_all_stages_are_trained(home: Path) -> None:
    reports = {stage.name: json.loads((home / "family" / stage.name / "training.json").read_text()) for stage in STAGES}
    for stage in STAGES:
        report = reports[stage.name]
        assert report["teacher"] == stage.teacher
        assert report["recipe"]["steps"] == 2
        assert report["recipe"]["seed"] == stage.seed
        assert report["recipe"]["init"] == (
            "random" if stage.grown_from is None else str(home / "family" / stage.grown_from)
        )
    assert reports["nano-xs"]["student"] == str(home / "family" / "trunk")
    # The teacher is what was trained here, and not the bundled model of that name.
    assert reports["nano-s"]["perplexity"]["teacher"]["residue_perplexity"]["n"] == 8
    trained = load_model(home / "family" / "nano-m", device="cpu", precision="fp32")
    assert trained.config == TOYS["nano-m"]


def test_finished_stages_are_not_trained_again(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(home / "family")
    before = {path: path.stat().st_mtime_ns for path in (home / "family").glob("*/[!.]*")}
    # Called otherwise, the folder is the same.
    FamilyRun(home / "in.fasta", Path(), device="cpu").train(scale=1e-6)
    assert {path: path.stat().st_mtime_ns for path in (home / "family").glob("*/[!.]*")} == before
    with pytest.raises(InputError, match="seed-xs: holds a run with other settings"):
        FamilyRun(home / "in.fasta", home / "family", device="cpu").train(scale=0.002)


# Figures


def test_figures_are_those_of_the_product(home: Path, run: FamilyRun) -> None:
    figures = run.figures(replace(OPTIONS, dms=home / "dms"))
    assert json.loads((run.out / "figures.json").read_text()) == figures
    train, held_out = read_shares(home / "in.fasta")
    assert figures["perplexity"]["sequences"] == 5
    for name in MEMBERS:
        model = load_model(run.out / name, device="cpu", precision="fp32")
        judged = judge(model, None, train=train, held_out=held_out, sequences=5)
        assert figures["perplexity"]["models"][name] == judged["student"]["residue_perplexity"]
        assert figures["perplexity"]["unigram"] == judged["unigram"]

    scans = figures["spearman"]["scans"]
    assert [*scans] == ["short", "long"]
    for each in scans.values():
        assert (each["found"], each["variants"], [*each["models"]]) == (12, 6, [*MEMBERS])
    # A decoder reads no protein that has more tokens than it has places; an encoder in windows.
    assert scans["long"]["models"]["nano-gpt"] is None
    (scan, _) = read_scans(home / "dms")
    rows = sorted(np.random.default_rng(0).permutation(12)[:6].tolist())
    assert rows != [*range(6)]
    for name, method in (("nano-m", "masked-marginal"), ("nano-gpt", "pseudo-ll")):
        model = load_model(run.out / name, device="cpu", precision="fp32")
        scores = score_variants(model, SHORT, [scan.variants[row] for row in rows], method=method)
        expected = spearman(scores.astype(float), np.array([scan.measured[row] for row in rows]))
        found = scans["short"]["models"][name]
        assert found["value"] == pytest.approx(expected)
        assert found["n"] == 6
        assert found["low"] <= found["value"] <= found["high"]


def test_the_chain_is_fitted_on_short_training_proteins(home: Path, run: FamilyRun) -> None:
    figures = run.figures(OPTIONS)
    assert figures["spearman"] is None
    chain = Chain.load(run.out / "nano.chain")
    assert tuple(model.name for model in chain.models) == BUNDLED_CHAINS["nano"]
    assert chain.widths == (16, 24, 32)
    train, _ = read_shares(home / "in.fasta")
    fitted = [line for line in (run.out / "nano-proteins.fasta").read_text().splitlines() if line[0] != ">"]
    assert fitted == [each for each in train.sequences if len(each) <= 32][:60]
    assert len(fitted) == 60
    assert not any(is_held_out(each) for each in fitted)
    assert figures["chain"]["proteins"] == 60
    assert figures["chain"]["longest_residues"] == chain.data["longest_residues"] == 32
    assert chain.data["file"] == "in.fasta"
    family = [load_model(run.out / name, device="cpu", precision="fp32") for name in BUNDLED_CHAINS["nano"]]
    assert Embedder(family, chain=chain).embed(["MKTAY"]).shape == (1, 32)  # type: ignore[arg-type]


def test_figures_are_kept_until_something_changes(run: FamilyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run.figures(OPTIONS)
    calls: list[str] = []
    real = family_run.judge_members

    def counted(*args: Any, **kwargs: Any) -> dict[str, Any]:
        calls.append("judged")
        return real(*args, **kwargs)

    monkeypatch.setattr(family_run, "judge_members", counted)
    assert run.figures(OPTIONS) == first
    assert calls == []
    run.figures(replace(OPTIONS, judged=4))
    assert calls == ["judged"]
    # Another model under the same name: chain and figures are its.
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run.out / "trunk" / name, run.out / "nano-xs" / name)
    before = Chain.load(run.out / "nano.chain").fingerprint
    run.figures(replace(OPTIONS, judged=4))
    assert calls == ["judged"] * 2
    assert Chain.load(run.out / "nano.chain").fingerprint != before


def test_scans_that_cannot_be_used(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dms", tmp_path / "dms")
    (tmp_path / "dms" / "long.csv").unlink()
    with pytest.raises(InputError, match=r"holds the wild type 'long', but there is no long\.csv\.gz beside it"):
        read_scans(tmp_path / "dms")
    with pytest.raises((InputError, OSError), match=r"wt\.fasta"):
        read_scans(tmp_path)


# Cards, and what ships


def test_cards_tell_the_way(run: FamilyRun) -> None:
    run.write_cards(run.figures(OPTIONS))
    card = (run.out / "nano-xs" / "README.md").read_text()
    assert "|  | seed-xs | trunk | nano-xs |" in card
    assert "| begins as | fresh weights | seed-xs, trained on | trunk, trained on |" in card
    assert "| residues asked for | 0.15 | 0.4 | 0.4 |" in card
    assert "| teacher | none: labels alone | none: labels alone | nano-s |" in card
    assert "The proteins of in.fasta." in card
    assert "trunk, grown" in (run.out / "nano-m" / "README.md").read_text()
    for name in MEMBERS:
        assert str(run.out.parent) not in (run.out / name / "README.md").read_text()


def test_bundling_copies_what_ships(run: FamilyRun, tmp_path: Path) -> None:
    run.write_cards(run.figures(OPTIONS))
    written = run.bundle(tmp_path / "bundled")
    there = {path.relative_to(tmp_path / "bundled").as_posix() for path in (tmp_path / "bundled").rglob("*.*")}
    files = ("config.json", "model.safetensors", "vocab.txt", "training.json", "README.md")
    assert there == {f"{name}/{file}" for name in MEMBERS for file in files} | {"nano.chain"}
    assert {path.relative_to(tmp_path / "bundled").as_posix() for path in written} == there
    for name in there:
        if not name.endswith("training.json"):
            assert (tmp_path / "bundled" / name).read_bytes() == (run.out / name).read_bytes()
    report = json.loads((tmp_path / "bundled" / "nano-xs" / "training.json").read_text())
    assert (report["student"], report["teacher"], report["recipe"]["init"]) == ("trunk", "nano-s", "random")
    grown = json.loads((tmp_path / "bundled" / "nano-m" / "training.json").read_text())
    assert (grown["student"], grown["recipe"]["init"]) == ("nano-m", "trunk")
    assert report["perplexity"] == json.loads((run.out / "nano-xs" / "training.json").read_text())["perplexity"]


def test_nothing_is_bundled_of_half_a_family(run: FamilyRun, tmp_path: Path) -> None:
    run.figures(OPTIONS)
    with pytest.raises(InputError, match=r"family: lacks nano-xs/README\.md, .*: nothing was bundled$"):
        run.bundle(tmp_path / "bundled")
    assert not (tmp_path / "bundled").exists()


def test_the_commit_is_the_checkouts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = code_commit()
    assert commit is None or 7 <= len(commit.removesuffix("-dirty")) <= 40
    (tmp_path / "family_run.py").touch()
    monkeypatch.setattr(family_run, "__file__", str(tmp_path / "family_run.py"))
    assert code_commit() is None


# The command


def _command(*words: object) -> Any:
    import typer

    command = typer.Typer(pretty_exceptions_enable=False)
    command.command()(train_family)
    return CliRunner().invoke(command, [str(word) for word in words])


def test_the_command_takes_models_as_they_are(home: Path, run: FamilyRun, tmp_path: Path) -> None:
    """Trained by hand, with paths of another machine in their records, and without the seeds."""
    for name in ("seed-xs", "trunk"):
        shutil.rmtree(run.out / name)
    given = (home / "in.fasta", "--out", run.out, "--device", "cpu", "--judged", "4", "--dms", home / "dms")
    result = _command(*given, "--figures-only", "--variants", "5", "--bundle", tmp_path / "bundled", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["perplexity"]["sequences"] == 4
    assert report["spearman"]["scans"]["short"]["variants"] == 5
    card = (tmp_path / "bundled" / "nano-m" / "README.md").read_text()
    assert "| begins as | trunk |" in card, "what its report says"
    assert Chain.load(tmp_path / "bundled" / "nano.chain").widths == (16, 24, 32)

    shown = _command(*given, "--figures-only", "--variants", "5")
    assert shown.exit_code == 0, shown.output
    for expected in ("unigram: perplexity per residue", "nano-gpt: perplexity", "long: Spearman nano-xs"):
        assert expected in shown.output


def test_figures_of_what_is_not_there(run: FamilyRun) -> None:
    (run.out / "nano-gpt" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="family: lacks nano-gpt: these are not trained yet"):
        run.figures(OPTIONS)
    (run.out / "nano-s" / "training.json").write_text("[]")
    with pytest.raises(InputError, match=r"training\.json: holds no JSON object"):
        run._lineage("nano-s")
    (run.out / "nano-s" / "training.json").write_text("{")
    with pytest.raises(InputError, match=r"training\.json: not readable as JSON"):
        run._lineage("nano-s")


def test_the_module_is_a_command(home: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    words = [sys.executable, "-m", "protnest.training.family", str(home / "in.fasta"), "--out", str(tmp_path)]
    done = subprocess.run([*words, "--figures-only", "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lacks nano-xs, nano-s, nano-m, nano-gpt: these are not trained yet" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
