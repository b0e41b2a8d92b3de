"""`protnest score`: what it prints and writes, with which exit code, and what it says of all that can be wrong."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from protnest.engine import load_model, score_variants
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.engine.encoder import Encoder
from typer.testing import CliRunner

from support.families import random_chain, tiny_family
from support.tiny import TINY, save_tiny_model, write_fasta

runner = CliRunner()

WILD_TYPE = "MKTAYIAKQRQISFVKSHFS"
OTHER = "GSHMWWACDE"
MUTANTS = ["K2A", "A4G:K2R", "WT", "K2A", "Y5W", "S20C"]
METHODS = ["masked-marginal", "wt-marginal", "mutant-marginal", "pseudo-ll"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(save_tiny_model(folder / f"tiny{seed}", seed=seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "headless"
    save_checkpoint(Encoder(TINY, head=False), folder)
    return str(folder)


@pytest.fixture
def wt(tmp_path: Path) -> Path:
    path = tmp_path / "wt.fasta"
    path.write_text(f">one first\n{WILD_TYPE}\n>two\n{OTHER}\n")
    return path


@pytest.fixture
def one(tmp_path: Path) -> Path:
    path = tmp_path / "one.csv"
    path.write_text("n,mutant\n" + "".join(f"{row},{name}\n" for row, name in enumerate(MUTANTS)))
    return path


def score(*arguments: object) -> Any:
    return runner.invoke(app, ["score", *map(str, arguments)])


def done(*arguments: object) -> dict[str, Any]:
    result = score(*arguments, "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def failed(*arguments: object) -> str:
    result = score(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    said: str = result.stderr
    return said


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def scores_in(path: Path, column: str = "score") -> list[np.float32]:
    return [np.float32(row[column]) for row in read(path)]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_python(tmp_path: Path, wt: Path, one: Path, models: list[str], method: Any) -> None:
    out = tmp_path / "out" / "s.csv"
    facts = done("--wt", wt, "--mutants", one, "--out", out, "--model", models[0], "--method", method)
    encoder = load_model(models[0])
    expected = score_variants(encoder, WILD_TYPE, MUTANTS, method=method)
    # Batches differ where the wild type runs among others.
    np.testing.assert_allclose(scores_in(out), expected, rtol=0, atol=2e-4 if method == "pseudo-ll" else 0)
    assert np.abs(expected).max() > 0.1
    assert [(row["n"], row["mutant"]) for row in read(out)] == [(str(n), name) for n, name in enumerate(MUTANTS)]
    assert left(out.parent) == ["s.csv", "s.csv.run.json"]
    assert facts["residues"] > 0
    assert facts["residues_per_s"] > 0
    assert facts["peak_memory_bytes"] > 1 << 20
    known = {"models": ["tiny0"], "method": method, "rows": 6, "scored": 6, "rejected": 0, "rejects": None}
    known |= {"flagged": 0, "heatmaps": [], "finished_before": False, "device": encoder.device.type, "report": None}
    known["files"] = [{"table": str(one), "out": str(out), "rows": 6, "rejected": 0}]
    assert {key: facts[key] for key in known} == known
    record = json.loads((tmp_path / "out" / "s.csv.run.json").read_text())
    assert record["settings"]["method"] == method
    assert set(record["versions"]) > {"protnest", "torch"}
    assert record["files"] == facts["files"]


def test_for_people(tmp_path: Path, wt: Path, one: Path, models: list[str]) -> None:
    one.write_text(one.read_text() + "6,G3A\n7,K2J\n")
    command = ["--wt", wt, "--mutants", one, "--out", tmp_path / "s.csv", "--model", models[0], "--invalid", "mask"]
    result = score(*command, "--on-error", "skip")
    assert result.exit_code == 0, result.output
    words = ["s.csv", "tiny0", "masked-marginal", "residues/s", "peak memory", "1 rows, listed in", "1 rows, flagged"]
    for expected in words:
        assert expected in result.stdout
    again = score(*command, "--on-error", "skip")
    assert "nothing left to do" in again.stdout


def test_the_bundled_model_is_the_default(tmp_path: Path, wt: Path, one: Path) -> None:
    facts = done("--wt", wt, "--mutants", one, "--out", tmp_path / "s.csv")
    assert (facts["models"], facts["method"]) == (["nano-s"], "masked-marginal")


def test_options_reach_the_run(tmp_path: Path, wt: Path, models: list[str]) -> None:
    (tmp_path / "x.tsv").write_text("DMS_id\tchange\twhole\tscore\ntwo\tG11A\t\t1\none\t\tMKTAYIAKQRQISFVKSHFA\t2\n")
    options = ["--mutant-col", "change", "--sequence-col", "whole", "--target-col", "DMS_id", "--score-col", "ours"]
    options += ["--offset", "10", "--precision", "bf16", "--device", "cpu", "--max-tokens", "99", "--aggregate", "max"]
    options += ["--on-error", "skip", "--invalid", "mask", "--target", "one", "--method", "wt-marginal"]
    out = tmp_path / "s.tsv"
    facts = done("--wt", wt, "--mutants", tmp_path / "x.tsv", "--out", out, "--model", models[0], *options)
    settings = json.loads((tmp_path / "s.tsv.run.json").read_text())["settings"]
    expected = {"columns": ["change", "whole", "DMS_id", "ours"], "offset": 10, "precision": "bf16", "device": "cpu"}
    expected |= {"max_tokens": 99, "aggregate": "max", "on_error": "skip", "invalid": "mask", "target": "one"}
    expected |= {"method": "wt-marginal", "compat": None, "head": None, "chain": None}
    assert {key: settings[key] for key in expected} == expected
    assert facts["precision"] == "bf16"
    assert list(read(out)[0]) == ["DMS_id", "change", "whole", "score", "ours", "flags"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--wt", "x"],
        ["--wt", "x", "--mutants", "y"],
        ["--wt", "x", "--mutants", "y", "--all-singles", "--out", "o.csv"],
        ["--wt", "x", "--out", "o.csv"],
        ["--mutants", "y", "--out", "o.csv"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--method", "best"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--aggregate", "sum"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--compat", "fair-esm"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--method", "pseudo-ll", "--compat", "esm3"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--on-error", "ignore"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--invalid", "skip"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--max-tokens", "0"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--offset", "one"],
        ["--wt", "x", "--mutants", "y", "--out", "o.csv", "--precision", "int9"],
        ["--wt", "x", "--all-singles", "--out", "o.csv", "--report"],
        ["--wt", "x", "--all-singles", "--out", "o.csv", "--model", "nano-s,"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert score(*arguments).exit_code == 2


# A bad row, where it stands, and what is said of it.
BAD_ROWS = [
    ("G3A", "variant 'G3A': residue 3 of the wild type is T, not G"),
    ("K2A:Q8C", "variant 'K2A:Q8C': residue 8 of the wild type is K, not Q"),
    ("A21G", "variant 'A21G': residue 21 lies beyond the protein's 20"),
    ("M0G", "variant 'M0G': residue 0 lies before the protein's first, which is 1"),
    ("K2J", "variant 'K2J': 'J' is not a residue"),
    ("K2B", "variant 'K2B': 'B' stands for no one amino acid"),
    ("K2*", "variant 'K2*': '*' is a stop codon, of which a protein model knows nothing"),
    ("K2A:K2C", "variant 'K2A:K2C': residue 2 is there twice"),
    ("p.Lys2Ala", "variant 'p.Lys2Ala': 'p.Lys2Ala' is not spelt like A24G"),
    ("", "names no variant: the cell is empty; the wild type itself is written WT"),
    ("K2A,,x", "4 cells, expected 3 as in the header"),
    (f",{WILD_TYPE[:-1]}", "inserts or deletes residues, and masked-marginal is defined for substitutions alone"),
    (f",{WILD_TYPE[:-1]}*A", "residue 20 of 21 is '*': '*' is a stop codon"),
    (f",{WILD_TYPE[:-1]}1", "'1'"),
    (f"K2A,{WILD_TYPE}", "variant 'K2A': mutated_sequence holds another one, WT"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS, ids=[row[:12] for row, _ in BAD_ROWS])
def test_rows_that_cannot_be_scored(tmp_path: Path, wt: Path, models: list[str], bad: str, reason: str) -> None:
    cells = bad.split(",")
    cells += [""] * (2 - len(cells))
    table = tmp_path / "one.csv"
    lines = ["n,mutant,mutated_sequence", "0,K2A,", "", ",".join(["1", *cells]), "2,WT,", f"3,,{WILD_TYPE}", "4,A4G,"]
    table.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out" / "s.csv"
    command = ["--wt", wt, "--mutants", table, "--out", out, "--model", models[0]]
    said = failed(*command)
    mutant = next((cell for cell in cells[:2] if cell), "")
    where = f"{table}, line 4, record 2" + (f" ({mutant})" if mutant else "") + ": "
    assert where in said
    assert reason in said
    assert not out.parent.exists(), "nothing is written"

    facts = done(*command, "--on-error", "skip")
    assert (facts["rows"], facts["scored"], facts["rejected"]) == (5, 4, 1)
    assert [row["n"] for row in read(out)] == ["0", "2", "3", "4"]
    scores = scores_in(out)
    assert scores[0] != 0
    assert scores[1:3] == [0, 0]
    (reject,) = read(tmp_path / "out" / "s.rejects.csv")
    assert facts["rejects"] == str(tmp_path / "out" / "s.rejects.csv")
    expected = {"file": str(table), "row": "2", "line": "4", "target": "one", "mutant": mutant}
    assert {key: reject[key] for key in expected} == expected
    assert reason in reject["reason"]
    assert left(out.parent) == ["s.csv", "s.csv.run.json", "s.rejects.csv"]


def test_a_slip_of_the_count_is_told(tmp_path: Path, wt: Path, models: list[str]) -> None:
    table = tmp_path / "one.csv"
    table.write_text("mutant\nM0A\nK1A\nT2C:A3G\n")
    command = ["--wt", wt, "--mutants", table, "--out", tmp_path / "s.csv", "--model", models[0]]
    said = failed(*command)
    assert f"{table}, line 2, record 1 (M0A)" in said
    assert "with --offset -1 all of the first 3 variants fit" in said
    assert "with --offset -1 all" in failed(*command, "--on-error", "skip"), "none of the rows fits"
    assert done(*command, "--offset", "-1")["scored"] == 3
    expected = score_variants(load_model(models[0]), WILD_TYPE, ["M1A", "K2A", "T3C:A4G"])
    assert scores_in(tmp_path / "s.csv") == expected.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one.csv: is empty"),
        ("mutant\n", "one.csv: holds no rows"),
        ("mutation\nK2A\n", "one.csv: has neither a column 'mutant' nor 'mutated_sequence'; it has mutation"),
        ("mutant,x,mutant\nK2A,1,2\n", "one.csv, line 1: has columns of the same name: 'mutant'"),
        ("mutant,score\nK2A,1\n", "one.csv: has a column 'score' of its own; --score-col gives ours another name"),
        (
            "mutant,target\nK2A,six\n",
            "one.csv, line 2, record 1 (K2A): no wild type is called 'six'; there are one, two",
        ),
        ("mutant\nG3A\n", "residue 3 of the wild type is T, not G"),
        (None, "one.csv: cannot be opened"),
    ],
)
@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_tables_that_cannot_be_read(
    tmp_path: Path, wt: Path, models: list[str], text: str | None, message: str, on_error: str
) -> None:
    table = tmp_path / "one.csv"
    if text is not None:
        table.write_text(text)
    before = left(tmp_path)
    command = ["--wt", wt, "--mutants", table, "--out", tmp_path / "s.csv", "--model", models[0]]
    assert message in failed(*command, "--on-error", on_error)
    assert left(tmp_path) == before


def test_what_else_is_wrong_is_told(tmp_path: Path, wt: Path, one: Path, models: list[str], headless: str) -> None:
    cases: list[tuple[list[object], str]] = [
        (["--wt", tmp_path / "none.fasta", "--mutants", one], "none.fasta"),
        (["--wt", wt, "--mutants", tmp_path], "does not say whose variants it holds"),
        (["--wt", wt, "--mutants", one, "--target", "six"], "no wild type is called 'six'; there are one, two"),
        (["--wt", wt, "--all-singles", "--target", "six"], "wt.fasta: holds no wild type 'six'; it has one, two"),
        (["--wt", wt, "--mutants", one, "--model", "nano"], "did you mean 'nano-s'?"),
        (["--wt", wt, "--mutants", one, "--model", headless], "headless has no language-model head"),
        (["--wt", wt, "--mutants", one, "--model", f"{models[0]},{models[0]}"], "models of one name (tiny0, tiny0)"),
        (["--wt", wt, "--mutants", one, "--device", "tpu"], "device is 'tpu'"),
        (["--wt", wt, "--mutants", one, "--chain", "x.chain"], "x.chain"),
        (
            ["--wt", wt, "--mutants", one, "--head", "x.head"],
            "x.head: no such file; `protnest probe --save` writes one",
        ),
        (["--wt", wt, "--mutants", one, "--heatmap", tmp_path / "h.jpg"], "heatmaps end in .png, .svg, .pdf, .html"),
        (["--wt", wt, "--mutants", one, "--report"], "no table has a column 'DMS_score'; --truth-col names another"),
        (["--wt", wt, "--mutants", one, "--report", "--truth-col", "n", "--cutoff", "nan"], "the cutoff is nan"),
        (["--wt", wt, "--mutants", one, "--score-col", ""], "the column of scores needs a name"),
        (["--wt", wt, "--mutants", one, "--out", one], "one.csv: is read and would be written over"),
        (["--wt", wt, "--mutants", one, "--out", wt], "wt.fasta: is a file's name"),
    ]
    (tmp_path / "other.csv").write_text("mutant\nK2A\n")
    before = left(tmp_path)
    for arguments, message in cases:
        defaults = ["--out", tmp_path / "s.csv"] if "--out" not in arguments else []
        defaults += ["--model", models[0]] if "--model" not in arguments else []
        assert message in failed(*arguments, *defaults), arguments
        assert left(tmp_path) == before, arguments
    (tmp_path / "empty").mkdir()
    said = failed("--wt", wt, "--mutants", tmp_path / "empty", "--out", tmp_path / "s.csv")
    assert "empty: is a folder without .csv, .tsv or .parquet files" in said


def test_masked_letters_are_flagged(tmp_path: Path, models: list[str]) -> None:
    (tmp_path / "wt.fasta").write_text(">clean\nMKTAYIAK\n>odd\nMKTJYIAK\n")
    table = tmp_path / "x.csv"
    table.write_text(
        "target,mutant,mutated_sequence\nclean,K2A,\nclean,K2J,\nclean,K2X,\nclean,,MKTAJIAK\nodd,K2A,\nodd,X4J,\n"
    )
    command = ["--wt", tmp_path / "wt.fasta", "--mutants", table, "--out", tmp_path / "s.csv", "--model", models[0]]
    assert "wt.fasta" in failed(*command)
    facts = done(*command, "--invalid", "mask")
    rows = read(tmp_path / "s.csv")
    assert [row["flags"] for row in rows] == ["", "masked", "masked", "masked", "masked", "masked"]
    assert (facts["flagged"], facts["rejected"]) == (5, 0)
    assert rows[1]["score"] == rows[2]["score"], "J and X are X"
    assert float(rows[1]["score"]) != 0


def test_several_models_are_an_ensemble(tmp_path: Path, wt: Path, one: Path, models: list[str]) -> None:
    columns = [f"score_tiny{seed}" for seed in range(3)]
    for aggregate in ("mean", "median", "min", "max"):
        out = tmp_path / f"{aggregate}.csv"
        command = ["--wt", wt, "--mutants", one, "--out", out, "--model", ",".join(models), "--aggregate", aggregate]
        assert done(*command)["models"] == ["tiny0", "tiny1", "tiny2"]
        assert list(read(out)[0]) == ["n", "mutant", "score", *columns]
        each = np.array([scores_in(out, column) for column in columns])
        reduce = getattr(np, aggregate)
        np.testing.assert_allclose(scores_in(out), reduce(each, axis=0), rtol=2e-6, atol=1e-6)
        for row, model in enumerate(models):
            alone = score_variants(load_model(model), WILD_TYPE, MUTANTS)
            assert each[row].tolist() == alone.tolist()


MEASURED = ["K2A", "K2C", "T3G", "A4G", "A4C:Y5W", "Y5C:I6A", "K8A", "Q9A", "R10A", "WT"]


def measured(folder: Path, name: str = "one.csv", *, classes: bool = False, target: str | None = None) -> Path:
    truths = [0.5, -1, 2, 0.25, 3, "", 1.5, -2, 0, 0.75]
    lines = [["mutant", "DMS_score", *(["DMS_score_bin"] if classes else []), *(["target"] if target else [])]]
    for place, (mutant, truth) in enumerate(zip(MEASURED, truths, strict=True)):
        lines.append([mutant, str(truth), *([str(place % 2)] if classes else []), *([target] if target else [])])
    (folder / name).write_text("".join(",".join(line) + "\n" for line in lines))
    return folder / name


def positives(facts: dict[str, Any]) -> list[int]:
    return [judgement["positives"] for judgement in facts["report"]["judgements"]]


def test_reports(tmp_path: Path, wt: Path, models: list[str]) -> None:
    table = measured(tmp_path)
    command = ["--wt", wt, "--mutants", table, "--model", models[0], "--report"]
    facts = done(*command)
    judgements = facts["report"]["judgements"]
    assert [(each["target"], each["subset"], each["variants"], each["left_out"]) for each in judgements] == [
        ("one", "all", 9, 1),
        ("one", "singles", 7, 0),
        ("one", "multiples", 2, 1),
    ]
    assert facts["report"]["average"] is None
    # Above the median of 0.5: 2, 3, 1.5 and 0.75, the last the wild type, which is no single.
    assert positives(facts) == [4, 2, 2]
    assert positives(done(*command, "--cutoff", "1.9")) == [2, 1, 1]
    assert left(tmp_path) == ["one.csv", "wt.fasta"], "nothing is written without --out"

    known = [name for name in MEASURED if name != "Y5C:I6A"]
    scores = score_variants(load_model(models[0]), WILD_TYPE, known)
    truths = np.array([0.5, -1, 2, 0.25, 3, 1.5, -2, 0, 0.75])
    ranks = [np.argsort(np.argsort(values)) for values in (truths, scores)]
    assert judgements[0]["spearman"]["value"] == pytest.approx(float(np.corrcoef(*ranks)[0, 1]))

    out = tmp_path / "s.csv"
    facts = done(*command, "--out", out)
    report = json.loads((tmp_path / "s.report.json").read_text())
    assert report["judgements"] == facts["report"]["judgements"] == judgements
    assert report["models"] == ["tiny0"]
    again = done(*command, "--out", out)
    assert (again["finished_before"], again["report"]["judgements"]) == (True, judgements)
    result = score(*command, "--out", out)
    assert "Spearman" in result.stdout
    assert "9 all" in result.stdout


def test_reports_of_classes_and_other_columns(tmp_path: Path, wt: Path, models: list[str]) -> None:
    table = measured(tmp_path, classes=True)
    command = ["--wt", wt, "--mutants", table, "--model", models[0], "--report"]
    # Odd rows are positive; row 5 is not measured.
    assert positives(done(*command)) == [4, 3, 1]
    assert positives(done(*command, "--cutoff", "0")) == [6, 4, 2], "a cutoff that is named counts"
    text = table.read_text()
    table.write_text(text.replace("K2A,0.5,0", "K2A,0.5,"))
    assert positives(done(*command)) == [4, 2, 2], "not all classes are known: the median"
    table.write_text(text.replace("K2A,0.5,0", "K2A,0.5,2"))
    where = f"{table}, line 2, record 1 (K2A): DMS_score_bin is '2', expected 0 or 1"
    assert where in failed(*command)
    assert positives(done(*command, "--cutoff", "0")) == [6, 4, 2]
    table.write_text(text.replace("DMS_score,", "effect,"))
    assert positives(done(*command, "--truth-col", "effect")) == [4, 3, 1]


def test_what_is_measured_does_not_choose_rows(tmp_path: Path, wt: Path, models: list[str]) -> None:
    """A report may be asked for later, and of a run that was killed: the rows are the same."""
    table = measured(tmp_path)
    table.write_text(table.read_text().replace("K2A,0.5", "K2A,unknown"))
    command = ["--wt", wt, "--mutants", table, "--model", models[0], "--out", tmp_path / "s.csv"]
    assert "line 2, record 1 (K2A): DMS_score is 'unknown', expected a finite number" in failed(*command, "--report")
    assert done(*command, "--on-error", "skip")["scored"] == 10
    facts = done(*command, "--on-error", "skip", "--report")
    assert (facts["finished_before"], facts["scored"], facts["rejected"]) == (True, 10, 0)
    assert [each["left_out"] for each in facts["report"]["judgements"]] == [2, 1, 1]


def test_reports_of_several_assays_have_an_average(tmp_path: Path, wt: Path, models: list[str]) -> None:
    first = measured(tmp_path, "a.csv", target="one")
    (tmp_path / "b.csv").write_text("target,mutant,DMS_score\none,K2A,1\ntwo,G1A,2\ntwo,S2A,3\none,K2C,0\ntwo,H3A,0\n")
    (tmp_path / "c.csv").write_text("target,mutant\ntwo,G1A\n")
    tables = [argument for name in ("a.csv", "b.csv", "c.csv") for argument in ("--mutants", tmp_path / name)]
    out = tmp_path / "out"
    facts = done("--wt", wt, *tables, "--model", models[0], "--out", out, "--report")
    judged = [(each["target"], each["subset"], each["variants"]) for each in facts["report"]["judgements"]]
    assert judged == [
        *[("one", subset, n) for subset, n in (("all", 9), ("singles", 7), ("multiples", 2))],
        ("one", "all", 2),
        ("two", "all", 3),
    ]
    assert facts["report"]["average"]["target"] == "mean of 3"
    assert left(out) == ["a.csv", "b.csv", "c.csv", "report.json", "run.json"]
    assert first.exists()


def test_two_tables_of_several_targets_in_one_command(tmp_path: Path, wt: Path, models: list[str]) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "b.csv").write_text("mutant,target\nK2A,one\nG1A,two\nG3A,one\nWT,two\n")
    (folder / "a.tsv").write_text("target\tmutant\ntwo\tG1A\none\tK2A\n")
    (folder / "notes.md").write_text("none")
    (folder / ".hidden.csv").write_text("none")
    command = ["--wt", wt, "--model", models[0], "--on-error", "skip"]
    facts = done(*command, "--mutants", folder, "--out", tmp_path / "out")
    assert [Path(each["table"]).name for each in facts["files"]] == ["a.tsv", "b.csv"]
    assert [(each["rows"], each["rejected"]) for each in facts["files"]] == [(2, 0), (4, 1)]
    assert left(tmp_path / "out") == ["a.tsv", "b.csv", "rejects.csv", "run.json"]
    encoder = load_model(models[0])
    k2a, g1a = (score_variants(encoder, *each)[0] for each in ((WILD_TYPE, ["K2A"]), (OTHER, ["G1A"])))
    np.testing.assert_allclose(scores_in(tmp_path / "out" / "a.tsv"), [g1a, k2a], rtol=1e-5)
    np.testing.assert_allclose(scores_in(tmp_path / "out" / "b.csv"), [k2a, g1a, 0], rtol=1e-5)
    one_by_one = ["--mutants", folder / "b.csv", "--mutants", folder / "a.tsv"]
    result = score(*command, *one_by_one, "--out", tmp_path / "again")
    assert "2 tables in" in result.stdout


def test_tables_find_their_wild_types_by_name(tmp_path: Path, models: list[str]) -> None:
    wt = tmp_path / "list.csv"
    wt.write_text(f"DMS_id,target_seq\nA_HUMAN,{WILD_TYPE}\nB_YEAST,{OTHER}\n")
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "A_HUMAN.csv").write_text("mutant\nK2A\n")
    (folder / "B_YEAST.csv").write_text("mutant\nG1A\n")
    facts = done("--wt", wt, "--mutants", folder, "--out", tmp_path / "out", "--model", models[0])
    assert facts["scored"] == 2


@pytest.mark.parametrize("target", [None, "two"])
def test_all_singles(tmp_path: Path, wt: Path, models: list[str], target: str | None) -> None:
    options = [] if target is None else ["--target", target]
    command = ["--wt", wt, "--all-singles", "--out", tmp_path / "s.csv", "--model", models[0], "--offset", "5"]
    facts = done(*command, *options, "--target-col", "protein", "--mutant-col", "change")
    rows = read(tmp_path / "s.csv")
    wild_types = {"one": WILD_TYPE, "two": OTHER} if target is None else {"two": OTHER}
    assert facts["scored"] == len(rows) == 19 * sum(map(len, wild_types.values()))
    expected = [
        (name, f"{residue}{place}{letter}")
        for name, sequence in wild_types.items()
        for place, residue in enumerate(sequence, start=6)
        for letter in AMINO_ACIDS
        if letter != residue
    ]
    assert [(row["protein"], row["change"]) for row in rows] == expected
    names = [name for protein, name in expected if protein == "two"]
    scores = score_variants(load_model(models[0]), OTHER, names, offset=5)
    assert scores_in(tmp_path / "s.csv")[-len(names) :] == scores.tolist()


def test_all_singles_to_a_folder(tmp_path: Path, wt: Path, models: list[str]) -> None:
    done("--wt", wt, "--all-singles", "--out", tmp_path / "out", "--model", models[0])
    assert left(tmp_path / "out") == ["all-singles.csv", "run.json"]


def test_published_pseudo_ppl(tmp_path: Path, wt: Path, models: list[str]) -> None:
    table = tmp_path / "one.csv"
    table.write_text(f"mutant,mutated_sequence\nK2A,\nWT,\n,{WILD_TYPE[:-3]}\n")
    command = ["--wt", wt, "--mutants", table, "--model", models[0], "--method", "pseudo-ll"]
    done(*command, "--out", tmp_path / "compat.csv", "--compat", "fair-esm")
    done(*command, "--out", tmp_path / "plain.csv")
    encoder = load_model(models[0])
    compat = score_variants(encoder, WILD_TYPE, ["K2A", "WT"], method="pseudo-ll", compat="fair-esm")
    np.testing.assert_allclose(scores_in(tmp_path / "compat.csv")[:2], compat, rtol=1e-5)
    assert scores_in(tmp_path / "compat.csv")[1] < -1, "the wild type's own is not subtracted"
    assert scores_in(tmp_path / "plain.csv")[1] == 0


@pytest.mark.parametrize("ending", ["html", "svg", "png"])
def test_heatmaps(tmp_path: Path, wt: Path, one: Path, models: list[str], ending: str) -> None:
    if ending != "html":
        pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / f"h.{ending}"
    command = ["--wt", wt, "--mutants", one, "--model", models[0]]
    facts = done(*command, "--heatmap", picture, "--offset", "0")
    assert facts["heatmaps"] == [str(picture)]
    begins = {"html": b"<!", "svg": b"<?xml", "png": b"\x89PNG"}[ending]
    assert picture.read_bytes().lstrip().startswith(begins)
    assert left(picture.parent) == [picture.name]


def test_heatmaps_of_several_targets(tmp_path: Path, models: list[str]) -> None:
    wt = tmp_path / "wt.fasta"
    wt.write_text(f">sp|P1\n{WILD_TYPE}\n>sp/P1\n{OTHER}\n>only-wt\nMKT\n")
    table = tmp_path / "x.csv"
    table.write_text("target,mutant\nsp|P1,M0A\nsp/P1,G0A\nonly-wt,WT\n")
    command = ["--wt", wt, "--mutants", table, "--model", models[0], "--offset", "-1", "--out", tmp_path / "s.csv"]
    facts = done(*command, "--heatmap", tmp_path / "h.html")
    names = ["h-sp_P1.html", "h-sp_P1-2.html", "h-only-wt.html"]
    assert [Path(path).name for path in facts["heatmaps"]] == names
    texts = [(tmp_path / name).read_text() for name in names]
    assert WILD_TYPE in texts[0]
    assert OTHER in texts[1]
    before = (tmp_path / "s.csv").stat().st_mtime_ns
    again = done(*command)
    assert again["finished_before"]
    assert (tmp_path / "s.csv").stat().st_mtime_ns == before
    for name in names:
        (tmp_path / name).unlink()
    assert done(*command, "--heatmap", tmp_path / "h.html")["heatmaps"] == facts["heatmaps"], "drawn of a finished run"
    assert left(tmp_path) == sorted([*names, "s.csv", "s.csv.run.json", "wt.fasta", "x.csv"])


def test_heatmaps_of_mutants(tmp_path: Path, wt: Path, one: Path, models: list[str]) -> None:
    command = ["--wt", wt, "--mutants", one, "--model", models[0], "--method", "mutant-marginal"]
    done(*command, "--heatmap", tmp_path / "h.html")
    assert "mutant-marginal" in (tmp_path / "h.html").read_text()


def test_finished_runs_are_left_alone(tmp_path: Path, wt: Path, one: Path, models: list[str]) -> None:
    out = tmp_path / "s.csv"
    command = ["--wt", wt, "--mutants", one, "--out", out, "--model", models[0]]
    done(*command)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir() if path.is_file()}
    again = done(*command)
    assert (again["finished_before"], again["residues"], again["residues_per_s"]) == (True, 0, None)
    said = failed(*command, "--method", "wt-marginal")
    assert "s.csv: was written with other settings (method: masked-marginal there, wt-marginal now)" in said
    one.write_text(one.read_text() + "9,G3A\n")
    assert "tables: " in failed(*command)
    # A run that fails leaves what is there, whatever it was to write over.
    assert "residue 3 of the wild type is T" in failed(*command, "--overwrite")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before if path != one} == {
        path: value for path, value in before.items() if path != one
    }
    assert done(*command, "--overwrite", "--on-error", "skip")["rejected"] == 1
    assert (tmp_path / "s.rejects.csv").exists()
    one.write_bytes(before[one][1])
    assert done(*command, "--overwrite")["rejected"] == 0
    assert not (tmp_path / "s.rejects.csv").exists(), "rejects of an older run"
    assert out.read_bytes() == before[out][1]
    (tmp_path / "s.csv.run.json").unlink()
    assert "s.csv: is there already, and s.csv.run.json, which would say what it is, is not" in failed(*command)


def test_another_models_head_is_another_model(tmp_path: Path, wt: Path, one: Path, models: list[str]) -> None:
    """Models are known by their encoders; scores come from the language-model head, too."""
    encoder = load_model(models[0], device="cpu", precision="fp32")
    assert encoder.head is not None
    encoder.head.bias.data[5] += 1
    (tmp_path / "other").mkdir()
    save_checkpoint(encoder, tmp_path / "other" / "tiny0")
    command = ["--wt", wt, "--mutants", one, "--out", tmp_path / "s.csv"]
    done(*command, "--model", models[0])
    assert "language_heads: " in failed(*command, "--model", tmp_path / "other" / "tiny0")


def test_what_a_kill_left_of_a_finished_run_goes(tmp_path: Path, wt: Path, one: Path, models: list[str]) -> None:
    command = ["--wt", wt, "--mutants", one, "--out", tmp_path / "s.csv", "--model", models[0]]
    done(*command)
    work = tmp_path / ".s.csv.work"
    work.mkdir()
    (work / "0-0.safetensors").write_text("half removed")
    assert done(*command)["finished_before"]
    assert not work.exists()


def test_another_unfinished_run_is_left_alone(tmp_path: Path, wt: Path, one: Path, models: list[str]) -> None:
    work = tmp_path / ".s.csv.work"
    work.mkdir()
    run = json.dumps({"schema_version": 1, "settings": {"method": "other"}})
    (work / "run.json").write_text(run)
    (tmp_path / "s.rejects.csv").write_text("its own")
    one.write_text(one.read_text() + "9,G3A\n")
    command = ["--wt", wt, "--mutants", one, "--out", tmp_path / "s.csv", "--model", models[0], "--on-error", "skip"]
    said = failed(*command)
    assert "holds an unfinished run with other settings" in said
    assert (tmp_path / "s.rejects.csv").read_text() == "its own"
    assert (work / "run.json").read_text() == run
    assert done(*command, "--overwrite")["rejected"] == 1
    assert not work.exists()


def test_parquet_in_and_out(tmp_path: Path, wt: Path, one: Path, models: list[str]) -> None:
    done("--wt", wt, "--mutants", one, "--out", tmp_path / "one.parquet", "--model", models[0])
    table = pq.read_table(tmp_path / "one.parquet")
    assert [str(kind) for kind in table.schema.types] == ["int64", "string", "float"]
    command = ["--mutants", tmp_path / "one.parquet", "--model", models[0], "--score-col", "again"]
    done("--wt", wt, *command, "--out", tmp_path / "two.parquet", "--target", "one")
    again = pq.read_table(tmp_path / "two.parquet")
    assert again["score"].equals(again["again"])
    assert again.drop_columns(["again"]).equals(table)


def scan(folder: Path, *, first: int = 1, last: int = 20) -> tuple[Path, list[str], list[float]]:
    rng = np.random.default_rng(4)
    names, truths = [], []
    for _ in range(40):
        site = int(rng.integers(first - 1, last))
        letter = str(rng.choice([acid for acid in AMINO_ACIDS if acid != WILD_TYPE[site]]))
        names.append(f"{WILD_TYPE[site]}{site + 1}{letter}")
        truths.append(float(rng.normal()) + AMINO_ACIDS.index(letter) / 5)
    (folder / "scan.csv").write_text(
        "mutant,DMS_score\n" + "".join(f"{name},{truth}\n" for name, truth in zip(names, truths, strict=True))
    )
    return folder / "scan.csv", names, truths


def family(folder: Path) -> tuple[str, Path]:
    encoders = tiny_family()
    for encoder in encoders:
        save_checkpoint(encoder, folder / encoder.name)
    random_chain(encoders).save(folder / "tiny.chain")
    return ",".join(str(folder / encoder.name) for encoder in encoders), folder / "tiny.chain"


def probe(*arguments: object) -> None:
    result = runner.invoke(app, ["probe", *map(str, arguments)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("pooling", ["site", "mean"])
def test_heads(tmp_path: Path, models: list[str], pooling: str) -> None:
    wt = write_fasta(tmp_path / "wt.fasta", [WILD_TYPE])
    table, names, truths = scan(tmp_path)
    head = tmp_path / "one.head"
    probe("--wt", wt, "--mutants", table, "--models", models[0], "--save", head, "--save-pooling", pooling)
    command = ["--wt", wt, "--mutants", table, "--head", head, "--model", models[0]]
    facts = done(*command, "--out", tmp_path / "s.csv", "--report", "--heatmap", tmp_path / "h.html")
    assert (facts["method"], facts["models"], facts["scored"]) == ("ridge head", ["tiny0"], 40)
    scores = scores_in(tmp_path / "s.csv")
    assert np.corrcoef(scores, truths)[0, 1] > 0.3, "in the assay's units and direction, on what it was fitted on"
    assert len(set(scores)) == len(set(names))
    assert "ridge head" in (tmp_path / "h.html").read_text()
    wild = tmp_path / "wild.csv"
    wild.write_text(f"mutant,mutated_sequence\nWT,\n{names[0]},\n,{WILD_TYPE[:-2]}\n")
    command[3] = wild
    facts = done(*command, "--out", tmp_path / "w.csv", "--on-error", "skip")
    assert facts["rejected"] == (2 if pooling == "site" else 0)
    if pooling == "site":
        said = failed(*command, "--out", tmp_path / "x.csv")
        assert f"{wild}, line 2, record 1 (WT): variant 'WT' has no substituted site" in said


def test_heads_of_regions_and_chains(tmp_path: Path, models: list[str]) -> None:
    names, chain = family(tmp_path)
    wt = write_fasta(tmp_path / "wt.fasta", [WILD_TYPE])
    table, *_ = scan(tmp_path, first=3, last=18)
    head = tmp_path / "nested.head"
    command = ["--wt", wt, "--mutants", table, "--models", names, "--chain", chain, "--region", "3-18", "--save", head]
    probe(*command)
    command = ["--wt", wt, "--head", head, "--chain", chain, "--out", tmp_path / "s.csv", "--model", names]
    assert done(*command, "--mutants", table)["scored"] == 40
    outside = tmp_path / "outside.csv"
    outside.write_text("mutant\nT3A\nM1A\n")
    command[7] = tmp_path / "o.csv"
    said = failed(*command, "--mutants", outside)
    assert "line 3, record 2 (M1A): variant 'M1A': residue 1 lies outside of 3 to 18" in said
    without = [*command[:4], *command[6:]]
    assert "no chain is given" in failed(*without, "--mutants", table)
    wrong = [*command[:-1], models[0]]
    assert "the head reads tiny16 (16) -> tiny24 (24) -> tiny40 (40), got tiny0" in failed(*wrong, "--mutants", table)
    other = write_fasta(tmp_path / "other.fasta", [WILD_TYPE[::-1]])
    outside.write_text("mutant\nS1A\n")
    command[1] = other
    assert "the head was fitted on variants of another protein" in failed(*command, "--mutants", outside)


def test_a_chain_needs_a_head(tmp_path: Path, wt: Path, one: Path) -> None:
    _, chain = family(tmp_path)
    said = failed("--wt", wt, "--mutants", one, "--out", tmp_path / "s.csv", "--chain", chain)
    assert "a chain is read by a ridge head: --chain goes with --head" in said


def test_help_names_every_option() -> None:
    said = re.sub(r"\s+", " ", runner.invoke(app, ["score", "--help"], env={"COLUMNS": "200"}).stdout)
    for option in ("--wt", "--mutants", "--all-singles", "--head", "--chain", "--compat", "--invalid", "--cutoff"):
        assert option in said
