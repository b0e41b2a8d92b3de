"""`protnest evaluate`: the whole judgement, its report, its page, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine import Encoder, InputError
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.engine.config import EncoderConfig
from protnest.training import folding as folding_module
from protnest.training.evaluation import DesignQuestions, as_report, figures, judge_designs, judge_predictions
from protnest.training.evaluation_plot import Page, evaluation_figure
from protnest.training.held_out import HeldOut, Read
from typer.testing import CliRunner

from support.predictors import LETTERS, Followed, NextLetter, uniform
from support.shared_data import REAL_8M_MLM, shared_path, shared_sequences
from support.tiny import TINY, random_proteins, save_tiny_model, write_fasta

pytest.importorskip("parasail")
pytest.importorskip("pyhmmer")

PROTEINS = list(dict.fromkeys(random_proteins(60, seed=3)))


def _run(*words: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words), "--device", "cpu", "--precision", "fp32"])


def _message(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


def _read(sequences: list[str]) -> Read:
    return Read(sequences=tuple(sequences), found=len(sequences), rejected=0, masked=0)


def _uniform_model(folder: Path) -> Path:
    """Whose head gives every token the same logit."""
    encoder = Encoder(TINY)
    for parameter in encoder.parameters():
        torch.nn.init.zeros_(parameter)
    save_checkpoint(encoder, folder)
    return folder


def test_a_decoder_is_judged_like_an_encoder() -> None:
    """All that a predictor is known by is the protocol."""
    held_out = HeldOut(sequences=tuple(PROTEINS[:20]), facts={}, train_letters_A=None)
    skewed = NextLetter([0.3, *[0.7 / 20] * 20], name="teacher")
    found, scored = judge_predictions(uniform(), held_out, teacher=skewed, samples=50)
    residues = sum(map(len, PROTEINS[:20]))
    assert (found.model.task, found.model.vocabulary) == ("next tokens", len(LETTERS))
    assert (found.model.sequences, found.model.tokens, found.model.residues) == (20, residues + 20, residues)
    assert found.model.token_perplexity.value == pytest.approx(21)
    assert found.model.residue_perplexity.value == pytest.approx(21 ** ((residues + 20) / residues))
    assert found.teacher is not None
    assert found.divergence is not None
    wanted = 0.3 * math.log(0.3 * 21) + 0.7 * math.log(0.7 / 20 * 21)
    assert found.divergence.value == pytest.approx(wanted, rel=1e-5)
    assert found.divergence.low == pytest.approx(wanted, rel=1e-5)
    assert found.letters_from == "held-out"
    assert 18 < found.letter_perplexity.value < 20.5  # type: ignore[operator]
    page = evaluation_figure(Page(title="toy", prediction=found, scored=scored)) if _has_matplotlib() else None
    assert page is None or len(page.axes) == 3


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def test_copies_of_a_reference() -> None:
    """Designs that are the reference and the training set: no distance, no novelty, and no diversity of one copy."""
    found = judge_designs(_read(PROTEINS[:15]), DesignQuestions(reference=tuple(PROTEINS[:15]), train=tuple(PROTEINS)))
    assert found.composition.kl.value == 0.0
    assert found.lengths.wasserstein.value == 0.0
    assert found.novelty is not None
    assert (found.novelty.identity.value, found.novelty.copies) == (1.0, 15)
    assert (found.hmm, found.folding) == (None, None)
    copies = judge_designs(_read(PROTEINS[:1] * 6), DesignQuestions(reference=tuple(PROTEINS[:15])))
    assert (copies.diversity.distance.value, copies.diversity.duplicates) == (0.0, 5)
    assert copies.novelty is None


def test_every_part_is_followed_to_its_end() -> None:
    class Stub:
        def infer(self, sequences: list[str]) -> dict[str, torch.Tensor]:
            return {"plddt": torch.full((1, len(sequences[0]), 37), 0.8)}

    seen, ours = Followed(), PROTEINS[:6]
    questions = DesignQuestions(reference=tuple(PROTEINS[6:9]), train=tuple(PROTEINS), esmfold=Stub(), folded=4)
    judge_designs(_read(ours), questions, samples=20, follower=seen)
    assert [words for words, _ in seen.stages] == [
        "neighbours of 6 designs",
        "folding 4 designs",
        "15 pairs of designs",
    ]
    for (_, residues), told in zip(seen.stages, seen.told, strict=True):
        assert sum(told) == residues > 0


def test_no_reference() -> None:
    for questions in (DesignQuestions(reference=()), DesignQuestions(reference=("A",), train=())):
        with pytest.raises(InputError, match="held against at least one reference sequence"):
            judge_designs(_read(PROTEINS[:2]), questions)


def test_every_figure_has_its_count(tmp_path: Path) -> None:
    held_out = HeldOut(sequences=tuple(PROTEINS[:20]), facts={"judged": 20}, train_letters_A=None)
    prediction, _ = judge_predictions(uniform(), held_out, teacher=uniform(name="same"), samples=20)
    designs = judge_designs(_read(PROTEINS[:9]), DesignQuestions(reference=tuple(PROTEINS), train=tuple(PROTEINS)))
    report = as_report(held_out=held_out, prediction=prediction, designs=designs, seed=0)
    assert json.loads(json.dumps(report, allow_nan=False))["held_out"] == {"judged": 20}
    rows = figures(prediction, designs)
    assert len({row[:2] for row in rows}) == len(rows) == 2 * 7 + 2 + 3 + 2
    assert {found.n for _, _, found, _ in rows} == {20, 9}
    errors = [note for _, name, _, note in rows if "ECE" in name or "MCE" in name]
    assert len(errors) == 8
    assert all("accuracy" in note for note in errors)


def test_command(tmp_path: Path) -> None:
    model, teacher = _uniform_model(tmp_path / "model"), save_tiny_model(tmp_path / "teacher")
    ours = write_fasta(tmp_path / "ours.fasta", [*PROTEINS[:30], PROTEINS[3]])
    train = write_fasta(tmp_path / "train.fasta", PROTEINS[25:])
    designs = write_fasta(tmp_path / "designs.fasta", [*PROTEINS[40:44], "MKXTAY"])
    alignment = write_fasta(tmp_path / "family.afa", [PROTEINS[40], PROTEINS[40]])
    words: list[object] = [ours, "--model", model, "--teacher", teacher, "--train", train, "--generated", designs]
    words += ["--reference", ours, "--alignment", alignment, "--sequences", 20, "--out", tmp_path / "out.json"]
    result = _run(*words, "--json", "--seed", 5)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == report
    facts, judged = report["held_out"], report["prediction"]
    assert (facts["found"], facts["repeated"], facts["in_training"], facts["judged"]) == (31, 1, 5, 20)
    assert (report["schema_version"], report["seed"]) == (1, 5)
    assert judged["model"]["token_perplexity"]["value"] == pytest.approx(33, rel=1e-5)
    assert judged["model"]["residue_perplexity"]["value"] == pytest.approx(33, rel=1e-5)
    assert judged["model"]["calibration"]["confidence"]["value"] == pytest.approx(1 / 33, rel=1e-5)
    assert judged["model"]["task"] == "masked residues"
    assert judged["teacher"]["name"] == "teacher"
    assert judged["divergence"]["value"] > 0
    assert judged["letters_from"] == "training"
    found = report["designs"]
    assert (found["designs"], found["reference"]) == (5, 31)
    assert found["composition"]["other_residues"] == 1
    assert (found["novelty"]["copies"], found["novelty"]["train_sequences"]) == (4, len(PROTEINS) - 25)
    assert found["hmm"]["profile"] == "family"
    again = json.loads(_run(*words, "--json", "--seed", 5).stdout)
    assert {**again, "seconds": 0} == {**report, "seconds": 0}


def test_page_and_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = save_tiny_model(tmp_path / "model")
    ours = write_fasta(tmp_path / "ours.fasta", PROTEINS[:20])
    words: list[object] = [ours, "--model", model, "--generated", ours, "--reference", ours]
    for ending, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        more = ["--train", write_fasta(tmp_path / "train.fasta", PROTEINS[30:])] if ending == ".svg" else []
        result = _run(*words, *more, "--plot", tmp_path / f"page{ending}")
        assert result.exit_code == 0, result.output
        assert (tmp_path / f"page{ending}").read_bytes().startswith(magic)
    for word in ("perplexity per residue", "accuracy", "composition KL", "diversity", "20 of 20 sequences judged"):
        assert word in _message(result), word
    text = (tmp_path / "page.svg").read_text()
    for word in ("Reliability", "How sure it is", "Perplexity", "Novelty", "ours.fasta, ours.fasta"):
        assert f"<!-- {word} -->" in text, word


def test_designs_alone_need_no_model(tmp_path: Path) -> None:
    ours = write_fasta(tmp_path / "ours.fasta", PROTEINS[:10])
    result = _run("--generated", ours, "--reference", ours, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["held_out"], report["prediction"]) == (None, None)
    assert report["designs"]["composition"]["kl"]["value"] == 0.0


def test_by_hash_splits_training_too(tmp_path: Path) -> None:
    many = list(dict.fromkeys(random_proteins(150, seed=8)))
    fasta = write_fasta(tmp_path / "all.fasta", many)
    designs = write_fasta(tmp_path / "designs.fasta", PROTEINS[:3])
    words: list[object] = [fasta, "--by-hash", "--train", fasta, "--model", save_tiny_model(tmp_path / "model")]
    result = _run(*words, "--generated", designs, "--reference", designs, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    trained = report["held_out"]["train_sequences"]
    assert trained + report["held_out"]["judged"] == len(many)
    assert report["designs"]["novelty"]["train_sequences"] == trained < len(many)


def test_structures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def infer(self, sequences: list[str]) -> dict[str, torch.Tensor]:
            return {"plddt": torch.full((1, len(sequences[0]), 37), 0.8)}

    monkeypatch.setattr(folding_module, "load_esmfold", lambda folder, device: Stub())
    ours = write_fasta(tmp_path / "ours.fasta", PROTEINS[:10])
    result = _run("--generated", ours, "--reference", ours, "--esmfold", tmp_path, "--fold", 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["designs"]["folding"]
    assert found["plddt"]["value"] == pytest.approx(80, rel=1e-6)
    assert (found["plddt"]["n"], found["confident"]["value"]) == (4, 1.0)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "nothing to judge"),
        (["--generated", "a"], "--generated and --reference go together"),
        (["a", "--reference", "a"], "--generated and --reference go together"),
        (["--generated", "a", "--reference", "a", "--model", "nano-s"], "go with a FASTA file of held-out proteins"),
        (["a", "--hmm", "a"], "--hmm, --alignment and --esmfold go with --generated"),
        (["--generated", "a", "--reference", "a", "--hmm", "a", "--alignment", "b"], "either --hmm or --alignment"),
    ],
)
def test_wrong_usage(words: list[str], problem: str) -> None:
    result = _run(*words)
    assert result.exit_code == 2
    assert problem in _message(result)


def test_bad_input_is_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    ours = write_fasta(tmp_path / "ours.fasta", PROTEINS[:10])
    (tmp_path / "empty.fasta").write_text("")
    (tmp_path / "none.hmm").write_text("hello")
    one = write_fasta(tmp_path / "one.afa", PROTEINS[:1])
    judged: list[object] = [ours, "--model", "nowhere"]
    designs: list[object] = [*judged, "--generated", ours, "--reference", ours]
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "empty.fasta", "--model", "nowhere"], "empty.fasta"),
        ([*judged, "--train", ours], "all 10 sequences are among those for training"),
        ([*judged, "--plot", tmp_path / "a.gif"], "pictures end in"),
        ([*judged, "--generated", tmp_path / "empty.fasta", "--reference", ours], "empty.fasta"),
        ([*designs, "--hmm", tmp_path / "missing.hmm"], "there is no profile file"),
        ([*designs, "--hmm", tmp_path / "none.hmm"], "is no HMMER profile"),
        ([*designs, "--alignment", one], "holds 1 sequences"),
        (designs, "no model 'nowhere'"),
    ]
    for words, problem in cases:
        result = _run(*words)
        assert result.exit_code == 1, words
        assert problem in _message(result), words


def test_models_that_cannot_be_judged(tmp_path: Path) -> None:
    save_checkpoint(Encoder(EncoderConfig(layers=1, width=16, heads=2, feedforward=32), head=False), tmp_path / "bare")
    ours = write_fasta(tmp_path / "ours.fasta", PROTEINS[:10])
    result = _run(ours, "--model", tmp_path / "bare")
    assert result.exit_code == 1
    assert "no language-model head" in _message(result)
    result = _run("--generated", ours, "--reference", ours, "--esmfold", tmp_path / "bare" / "none")
    assert result.exit_code == 1
    assert "there is no config.json" in _message(result)


@pytest.mark.slow
def test_real_models(tmp_path: Path) -> None:
    """The 8M checkpoint knows more than nano-s, and nano-s more than frequencies do."""
    swissprot = shared_path("sequences/swissprot201401_nr60k_le1022.fasta.gz")
    assert len(shared_sequences("sequences/swissprot201401_nr60k_le1022.fasta.gz")) == 60_000
    words: list[object] = [swissprot, "--by-hash", "--train", swissprot, "--sequences", 300]
    result = _run(*words, "--model", "nano-s", "--teacher", shared_path(REAL_8M_MLM), "--json")
    assert result.exit_code == 0, result.output
    judged = json.loads(result.stdout)["prediction"]
    nano, large = judged["model"], judged["teacher"]
    assert nano["tokens"] == large["tokens"] > 10_000
    assert 16 < nano["residue_perplexity"]["value"] < judged["letter_perplexity"]["value"] < 18.5
    assert large["residue_perplexity"]["high"] < nano["residue_perplexity"]["low"]
    assert large["calibration"]["accuracy"]["value"] > nano["calibration"]["accuracy"]["value"]
    assert 0.05 < judged["divergence"]["value"] < 1
