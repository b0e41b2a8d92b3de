"""`protnest score` with a decoder: what it writes, what it refuses, how it goes on after a stop."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from protnest.engine import InputError, load_model, score_variants
from protnest.engine.cli import app
from protnest.engine.decoder import Decoder
from protnest.engine.packing import PackedBatch
from protnest.engine.ridge_head import RidgeHead
from protnest.engine.score_job import ScoreJobResult, run_job
from protnest.engine.score_models import ScoreJob
from protnest.engine.variants import Variant, variant_of_sequence
from typer.testing import CliRunner

from support.assays import Followed, Stopped
from support.gpt2_models import byte_pairs, gentle_pair
from support.tiny import save_tiny_model

WILD_TYPE = "MKTAYIAKQRQISFVKSHFS"
OTHER = "GSHMWWACDE"
SUBSTITUTIONS = ["K2A", "A4G:K2R", "WT", "K2A", "Y5W", "S20C", "M1M"]
INDELS = [WILD_TYPE[3:], WILD_TYPE[:4] + "WW" + WILD_TYPE[4:]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Decoders over residues and over byte pairs, and an encoder."""
    folder = tmp_path_factory.mktemp("models")
    gentle_pair(folder / "letters", residues=True, places=64)
    gentle_pair(folder / "pairs", seed=1, places=64)
    save_tiny_model(folder / "encoder")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def wt(tmp_path: Path) -> Path:
    path = tmp_path / "wt.fasta"
    path.write_text(f">one\n{WILD_TYPE}\n>two\n{OTHER}\n")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "one.csv"
    rows = [f"one,{name},,{row}\n" for row, name in enumerate(SUBSTITUTIONS)]
    rows += [f"one,,{sequence},{row}\n" for row, sequence in enumerate(INDELS, start=7)]
    path.write_text("target,mutant,mutated_sequence,DMS_score\n" + "".join(rows) + "two,G1A,,9\n")
    return path


def score(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["score", *map(str, arguments), "--device", "cpu", "--precision", "fp32"])


def done(*arguments: object) -> dict[str, Any]:
    result = score(*arguments, "--json", "--method", "pseudo-ll")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def failed(*arguments: object) -> str:
    result = score(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def scores_in(path: Path, column: str = "score") -> list[float]:
    with path.open(newline="", encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def expected(model: Path) -> list[float]:
    decoder = load_model(model, device="cpu", precision="fp32")
    variants: list[str | Variant] = [*SUBSTITUTIONS, *(variant_of_sequence(each, WILD_TYPE) for each in INDELS)]
    found = score_variants(decoder, WILD_TYPE, variants, method="pseudo-ll")
    return [*found.tolist(), *score_variants(decoder, OTHER, ["G1A"], method="pseudo-ll").tolist()]


@pytest.mark.parametrize("name", ["letters", "pairs"])
def test_scores_are_those_of_python(tmp_path: Path, wt: Path, table: Path, models: dict[str, Path], name: str) -> None:
    """With everything that a scoring run can write beside."""
    out, page = tmp_path / "s.csv", tmp_path / "h.html"
    command = ["--wt", wt, "--mutants", table, "--model", models[name], "--out", out, "--report", "--heatmap", page]
    facts = done(*command)
    wanted = expected(models[name])
    np.testing.assert_allclose(scores_in(out), wanted, rtol=0, atol=1e-4)
    assert (scores_in(out)[2], scores_in(out)[6]) == (0, 0)
    assert np.ptp(wanted) > 1
    assert (facts["method"], facts["models"], facts["scored"]) == ("pseudo-ll", [name], 10)
    # Distinct mutants and wild types run once.
    residues = 5 * len(WILD_TYPE) + sum(map(len, INDELS)) + 2 * len(OTHER)
    assert facts["residues"] == residues
    assert {each["target"] for each in facts["report"]["judgements"]} == {"one", "two"}
    assert len(facts["heatmaps"]) == 2
    assert "pseudo-ll" in Path(facts["heatmaps"][0]).read_text()
    assert done(*command[:-3])["finished_before"]


def test_masked_letters_are_the_vocabularys_x(tmp_path: Path, wt: Path, models: dict[str, Path]) -> None:
    (tmp_path / "one.csv").write_text("target,mutant\none,K2J\none,K2X\n")
    for name in ("letters", "pairs"):
        out = tmp_path / f"{name}.csv"
        command = ["--wt", wt, "--mutants", tmp_path / "one.csv", "--model", models[name], "--out", out]
        assert "'J' is not a residue" in failed(*command, "--method", "pseudo-ll")
        facts = done(*command, "--invalid", "mask")
        masked, named = scores_in(out)
        assert masked == named
        assert abs(masked) > 0.01
        assert facts["flagged"] == 2


def test_all_singles(tmp_path: Path, wt: Path, models: dict[str, Path]) -> None:
    out = tmp_path / "all.csv"
    facts = done("--wt", wt, "--all-singles", "--target", "two", "--model", models["letters"], "--out", out)
    assert facts["scored"] == 19 * len(OTHER)
    assert np.isfinite(scores_in(out)).all()


def test_ensembles(tmp_path: Path, wt: Path, table: Path, models: dict[str, Path]) -> None:
    """Of a decoder, an encoder and another decoder, each loaded when its turn comes."""
    names, out = ["letters", "encoder", "pairs"], tmp_path / "s.csv"
    done("--wt", wt, "--mutants", table, "--out", out, "--model", ",".join(str(models[name]) for name in names))
    each = np.array([scores_in(out, f"score_{name}") for name in names])
    np.testing.assert_allclose(each[0], expected(models["letters"]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(each[2], expected(models["pairs"]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores_in(out), each.mean(axis=0), rtol=0, atol=1e-5)


# Stopped and resumed


class StopAfter(Followed):
    """Progress that stops the run when so many batches are done."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def advance(self, residues: int) -> None:
        if self.left == 0:
            raise Stopped
        self.left -= 1
        super().advance(residues)


def _job(wt: Path, table: Path, *models: Path, **changes: Any) -> ScoreJob:
    plain = ScoreJob(
        wild_types=wt,
        tables=(table,),
        out=table.with_name("s.csv"),
        models=tuple(map(str, models)),
        method="pseudo-ll",
        device="cpu",
        precision="fp32",
        max_tokens=40,
    )
    return dataclasses.replace(plain, **changes)


def _run(job: ScoreJob, progress: Followed | None = None) -> ScoreJobResult:
    return run_job(job, progress or Followed())


def test_stopped_anywhere_it_ends_the_same(
    wt: Path, table: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protnest.engine.score_run._CHUNK_RESIDUES", 30)
    monkeypatch.setattr("protnest.engine.score_run._CHUNK_BATCHES", 1)
    monkeypatch.setattr("protnest.engine.score_state._SECONDS_BETWEEN_SAVES", -1.0)
    job = _job(wt, table, models["letters"], models["pairs"])
    whole = _run(job)
    assert job.out is not None
    written, shorter, batches = job.out.read_bytes(), 0, 0
    while True:
        cut = dataclasses.replace(job, out=job.out.with_name(f"cut{batches}.csv"))
        assert cut.out is not None
        try:
            _run(cut, StopAfter(batches))
        except Stopped:
            assert not cut.out.exists()
            shorter += _run(cut).residues < whole.residues
            assert cut.out.read_bytes() == written
            batches += 1 + batches // 2
        else:
            break
    assert batches >= 4
    assert shorter >= 2


def test_progress_ends_where_it_said(wt: Path, table: Path, models: dict[str, Path]) -> None:
    for names in (["letters"], ["pairs"], ["letters", "pairs"]):
        followed, out = Followed(), table.with_name(f"{len(names)}{names[0]}.csv")
        _run(_job(wt, table, *(models[name] for name in names), out=out), followed)
        ((records, work, done_before),) = followed.started
        assert (records, done_before) == (10, 0)
        assert followed.advanced == work > 0


def test_another_vocabulary_is_another_model(wt: Path, table: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """The same weights and tokens that are spelt otherwise do not go on with a run."""
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for path in models["pairs"].iterdir():
        (pairs / path.name).write_bytes(path.read_bytes())
    job = _job(wt, table, pairs)
    _run(job)
    assert _run(job).finished_before
    byte_pairs(skip=24).save(str(pairs / "tokenizer.json"))
    with pytest.raises(InputError, match=r"was written with other settings .*language_heads: "):
        _run(job)


def test_batches_that_do_not_fit_are_cut(wt: Path, table: Path, models: dict[str, Path]) -> None:
    job = _job(wt, table, models["letters"], max_tokens=1000)
    _run(job)
    assert job.out is not None
    real, tried = Decoder.forward, list[int]()

    def forward(self: Decoder, batch: PackedBatch) -> torch.Tensor:
        tried.append(sum(batch.lengths_B))
        if tried[-1] > 30:
            raise torch.OutOfMemoryError
        return real(self, batch)

    again = dataclasses.replace(job, out=job.out.with_name("again.csv"))
    assert again.out is not None
    with mock.patch.object(Decoder, "forward", forward):
        _run(again)
    assert max(tried) > 30
    np.testing.assert_allclose(scores_in(again.out), scores_in(job.out), rtol=0, atol=1e-5)


# Refusals


def test_other_methods(tmp_path: Path, wt: Path, table: Path, models: dict[str, Path]) -> None:
    """Before anything is read or written."""
    command = ["--wt", wt, "--mutants", table, "--out", tmp_path / "s.csv", "--model", models["letters"]]
    for more, got in (
        ([], "masked-marginal, the default"),
        (["--method", "wt-marginal"], "wt-marginal"),
        (["--method", "mutant-marginal"], "mutant-marginal"),
    ):
        said = failed(*command, *more)
        assert "letters is a decoder, which predicts each token from those before it" in said
        assert f"it scores by pseudo-ll alone, got {got}" in said
    said = failed(*command, "--method", "pseudo-ll", "--compat", "fair-esm")
    assert "letters is a decoder: compat 'fair-esm' repeats scripts for masked language models" in said
    both = [*command[:-1], f"{models['encoder']},{models['letters']}"]
    assert "letters is a decoder" in failed(*both)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "wt.fasta"]


@pytest.mark.parametrize("name", ["letters", "pairs"])
def test_proteins_beyond_the_places(tmp_path: Path, models: dict[str, Path], name: str) -> None:
    """Rows like any others that cannot be scored: with file, line and row, or among the rejects."""
    wt, table = tmp_path / "wt.fasta", tmp_path / "one.csv"
    wt.write_text(f">one\n{WILD_TYPE}\n>long\n{'WMC' * 100}\n")
    table.write_text(f"target,mutant,mutated_sequence\none,K2A,\none,,{WILD_TYPE + 'WMC' * 90}\nlong,W1A,\nlong,,MKT\n")
    command = ["--wt", wt, "--mutants", table, "--out", tmp_path / "s.csv", "--model", models[name]]
    said = failed(*command, "--method", "pseudo-ll")
    assert f"{table}, line 3, record 2" in said
    assert f"and {name} has places for 64: a decoder reads a protein whole, windows are an encoder's" in said
    facts = done(*command, "--on-error", "skip")
    # The last is short enough itself, but its wild type is not.
    assert (facts["scored"], facts["rejected"]) == (1, 3)
    rejects = Path(facts["rejects"]).read_text()
    assert rejects.count("has places for 64") == 3
    assert (rejects.count("290 residues are "), rejects.count("300 residues are ")) == (1, 2)


def test_a_ridge_head_reads_no_decoder(wt: Path, table: Path, models: dict[str, Path]) -> None:
    head = mock.Mock(spec=RidgeHead)
    with mock.patch.object(RidgeHead, "load", return_value=head), pytest.raises(InputError) as caught:
        _run(_job(wt, table, models["letters"], head=Path("one.head")))
    assert (
        str(caught.value)
        == "letters is a decoder, which generates, scores variants and can be evaluated; this takes an encoder"
    )
