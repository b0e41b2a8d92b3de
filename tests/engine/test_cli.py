"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import read_embeddings
from protnest.engine.cli import app
from typer.testing import CliRunner

from support.tiny import random_proteins, save_tiny_model, write_fasta

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return write_fasta(tmp_path / "in.fasta", random_proteins(12))


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"protnest {importlib.metadata.version('protnest')}\n")


def test_help_lists_commands_of_other_packages() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("embed", "fit-chain", "import-chain", "info", "pretrain"):
        assert command in result.stdout
    assert "--batch-tokens" in runner.invoke(app, ["pretrain", "--help"]).stdout


def test_embed_as_json(tmp_path: Path, fasta: Path, model: str) -> None:
    out = tmp_path / "out"
    result = runner.invoke(app, ["embed", str(fasta), "--out", str(out), "--model", model, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["sequences"] == report["embedded_now"] == 12
    assert report["residues"] == sum(len(sequence) for sequence in random_proteins(12))
    assert report["residues_per_s"] > 0
    assert report["peak_memory_bytes"] > 1 << 20
    assert report["model"] == "tiny"
    assert len(read_embeddings(out)) == 12
    again = json.loads(runner.invoke(app, ["embed", str(fasta), "--out", str(out), "--model", model, "--json"]).stdout)
    assert (again["embedded_now"], again["resumed"], again["residues_per_s"]) == (0, 12, None)


def test_embed_for_people(tmp_path: Path, fasta: Path, model: str) -> None:
    fasta.write_text(fasta.read_text() + ">long\n" + "M" * 61 + "\n>long\nMKT\n>bad\nM1\n")
    command = ["embed", str(fasta), "--out", str(tmp_path / "out"), "--model", model, "--invalid", "skip"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    for expected in ("sequences", "14", "residues/s", "peak memory", "windowed", "1 records, listed in rejects.csv"):
        assert expected in result.stdout
    assert "duplicate ids" in result.stdout


def test_embed_with_the_bundled_models(tmp_path: Path, fasta: Path) -> None:
    widths = {}
    for options in ([], ["--model", "nano-xs"]):
        out = tmp_path / f"out{len(options)}"
        result = runner.invoke(app, ["embed", str(fasta), "--out", str(out), *options, "--json"])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        widths[report["model"]] = read_embeddings(out).array.shape[1]
    assert widths == {"nano-s": 192, "nano-xs": 128}


@pytest.mark.parametrize("name", ["parquet", "h5", "npy", "pt"])
def test_embed_in_other_formats(tmp_path: Path, fasta: Path, model: str, name: str) -> None:
    out = tmp_path / "out"
    result = runner.invoke(app, ["embed", str(fasta), "--out", str(out), "--model", model, "--format", name, "--json"])
    assert result.exit_code == 0, result.output
    written = Path(json.loads(result.stdout)["out"])
    assert written == out / ("pt" if name == "pt" else f"embeddings.{name}")
    assert written.exists()


def test_options_reach_the_run(tmp_path: Path, fasta: Path, model: str) -> None:
    out = tmp_path / "out"
    options = ["--pool", "residue", "--precision", "bf16", "--max-tokens", "99", "--storage-dtype", "fp16"]
    options += ["--shard", "2/3", "--shard-records", "3", "--long", "full", "--invalid", "mask", "--device", "cpu"]
    result = runner.invoke(app, ["embed", str(fasta), "--out", str(out), "--model", model, *options, "--json"])
    assert result.exit_code == 0, result.output
    settings = read_embeddings(out).run["settings"]
    expected = {"pool": "residue", "precision": "bf16", "max_tokens": 99, "storage_dtype": "fp16", "shard": [2, 3]}
    expected |= {"shard_records": 3, "long": "full", "invalid": "mask", "device": "cpu"}
    assert {key: settings[key] for key in expected} == expected
    assert read_embeddings(out).array.dtype == np.float16


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed"],
        ["embed", "x.fasta"],
        ["embed", "x.fasta", "--out", "o", "--pool", "median"],
        ["embed", "x.fasta", "--out", "o", "--precision", "int9"],
        ["embed", "x.fasta", "--out", "o", "--max-tokens", "0"],
        ["embed", "x.fasta", "--out", "o", "--shard", "3/2"],
        ["embed", "x.fasta", "--out", "o", "--shard", "one"],
        ["embed", "x.fasta", "--out", "o", "--nonsense"],
        ["embed", "x.fasta", "--out", "o", "--id-col", "id"],
        ["embed", "x.fa.gz", "--out", "o", "--seq-col", "sequence"],
        ["embed", "x.txt", "--out", "o", "--seq-col", "sequence"],
        ["embed", "x.fasta", "--out", "o", "--wt", "wt.fasta"],
        ["embed", "x.csv", "--out", "o", "--target", "blat"],
        ["embed", "x.csv", "--out", "o", "--offset", "23"],
        ["embed", "x.fasta", "--out", "o", "--chain", "nano", "--layer", "2"],
        ["embed", "x.fasta", "--out", "o", "--layer", "last"],
        ["embed", "x.fasta", "--out", "o", "--format", "lance"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "in.fasta"),
        ("", [], "holds no records"),
        (">a\nMKT\n>b\nMK1\n", [], "line 3, record 2 (b)"),
        (">a\nMKT\n", ["--model", "nano"], "did you mean 'nano-s'?"),
        (">a\nMKT\n", ["--device", "tpu"], "device is 'tpu'"),
        (">a\nMKT\n", ["--precision", "fp16", "--device", "cpu"], "precision is 'fp16' on a CPU"),
        (">a\n" + "M" * 1023 + "\n", ["--long", "error"], "line 1, record 1 (a): 1023 residues"),
    ],
)
def test_failures_name_the_place_and_exit_with_1(
    tmp_path: Path, content: str | None, options: list[str], message: str
) -> None:
    path = tmp_path / "in.fasta"
    if content is not None:
        path.write_text(content)
    result = runner.invoke(app, ["embed", str(path), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("kind", "options"), [("csv", []), ("parquet", []), ("mutants", ["--workers", "2"])])
def test_embed_from_tables(tmp_path: Path, model: str, kind: str, options: list[str]) -> None:
    """With workers, rejects, and a second call that finds nothing to do."""
    sequences = ["MKTAYIAKQR", "MATAYIAKQR", "MKTAYIAKQW"]
    names = ["WT", "K25A", "R33W"]
    path = tmp_path / "in.csv"
    if kind == "csv":
        path.write_text("key,aa\n" + "".join(f"{n},{s}\n" for n, s in zip(names, sequences, strict=True)) + "bad,1\n")
        options = [*options, "--id-col", "key", "--seq-col", "aa"]
    elif kind == "parquet":
        path = tmp_path / "in.parquet"
        pq.write_table(pa.table({"id": [*names, None], "sequence": [*sequences, "MKT"]}), path)
    else:
        path = tmp_path / "in.txt"
        path.write_text("WT\nK25A\nR33W\nA25K\n")
        wild_type = write_fasta(tmp_path / "wt.fasta", ["MK", sequences[0]])
        options = [*options, "--wt", str(wild_type), "--target", "protein1", "--offset", "23"]
    out = tmp_path / "out"
    command = ["embed", str(path), "--out", str(out), "--model", model, "--shard-records", "2", "--json", *options]
    failed = runner.invoke(app, command)
    assert (failed.exit_code, "record 4" in failed.stderr) == (1, True), failed.output
    result = runner.invoke(app, [*command, "--invalid", "skip"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["embedded_now"], report["rejected"]) == (3, 1)
    stored = read_embeddings(out)
    assert stored.ids == names
    assert (out / "rejects.csv").read_text().splitlines()[1].startswith("4,")
    again = json.loads(runner.invoke(app, [*command, "--invalid", "skip"]).stdout)
    assert (again["embedded_now"], again["resumed"]) == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-col", "protien"], "in.csv: has no column 'protien'; it has 'id', 'protein'; did you mean 'protein'?"),
        ([], "in.csv: has no column of sequences"),
        (["--wt", "gone.fasta"], "gone.fasta: cannot be opened"),
    ],
)
def test_tables_that_cannot_be_embedded(tmp_path: Path, options: list[str], message: str) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id,protein\na,MKT\n")
    result = runner.invoke(app, ["embed", str(path), "--out", str(tmp_path / "out"), *options])
    assert (result.exit_code, message in result.stderr) == (1, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_embed_a_layer(tmp_path: Path, fasta: Path, model: str) -> None:
    command = ["embed", str(fasta), "--model", model, "--layer"]
    for layer, out in (("-2", "inner"), ("1", "same"), ("-1", "last")):
        assert runner.invoke(app, [*command, layer, "--out", str(tmp_path / out)]).exit_code == 0
    inner, same, last = (read_embeddings(tmp_path / out) for out in ("inner", "same", "last"))
    assert inner.run["settings"]["layer"] == 1
    assert np.array_equal(inner.array[:], same.array[:])
    assert not np.allclose(inner.array[:], last.array[:])
    failed = runner.invoke(app, [*command, "3", "--out", str(tmp_path / "none")])
    assert (failed.exit_code, "tiny has layers 0 (the token embedding) to 2" in failed.stderr) == (1, True)


def test_other_run_in_the_folder_exits_with_1(tmp_path: Path, fasta: Path, model: str) -> None:
    command = ["embed", str(fasta), "--out", str(tmp_path / "out"), "--model", model]
    assert runner.invoke(app, command).exit_code == 0
    refused = runner.invoke(app, [*command, "--pool", "max"])
    assert refused.exit_code == 1
    assert "pool: mean there, max now" in refused.stderr
    assert runner.invoke(app, [*command, "--pool", "max", "--overwrite"]).exit_code == 0


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(28, "No space left on device", "out/part"), 1, "out/part: No space left on device"),
        (MemoryError(), 1, "smaller --max-tokens"),
        (KeyboardInterrupt(), 130, "goes on from what is finished"),
    ],
)
def test_failures_of_the_machine(
    tmp_path: Path,
    fasta: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("protnest.engine.library.embed_library", fail)
    result = runner.invoke(app, ["embed", str(fasta), "--out", str(tmp_path / "out"), "--model", model])
    assert result.exit_code == code
    assert message in result.stderr


def test_gpu_out_of_memory_is_told_and_defects_are_not_hidden(
    tmp_path: Path, fasta: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    command = ["embed", str(fasta), "--out", str(tmp_path / "out"), "--model", model]

    def run_out(*args: object, **kwargs: object) -> None:
        message = "CUDA out of memory"
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr("protnest.engine.library.embed_library", run_out)
    result = runner.invoke(app, command)
    assert (result.exit_code, "out of GPU memory" in result.stderr) == (1, True)

    def break_down(*args: object, **kwargs: object) -> None:
        message = "a defect"
        raise RuntimeError(message)

    monkeypatch.setattr("protnest.engine.library.embed_library", break_down)
    assert isinstance(runner.invoke(app, command).exception, RuntimeError)


def test_interrupt_keeps_what_is_done(tmp_path: Path, model: str) -> None:
    """Ctrl-C in a real process: exit code 130, no traceback, and the next call goes on."""
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins(6000, longest=200))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "protnest.engine.cli", "embed", str(fasta), "--out", str(out), "--model", model]
    command += ["--shard-records", "50", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # A suite that runs in the background has SIGINT ignored, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and len(list(out.glob("part-*.safetensors"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "goes on from what is finished" in said
    assert "Traceback" not in said
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["resumed"] >= 100


def test_info() -> None:
    result = runner.invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["versions"]["protnest"] == importlib.metadata.version("protnest")
    assert set(facts) == {"versions", "machine", "runs on", "kernels", "models"}
    assert "nano-s (192)" in facts["models"]["bundled"]
    table = runner.invoke(app, ["info"]).stdout
    assert "C++ extension" in table


def test_info_tells_of_a_missing_extension() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "protnest.engine.cli", "info", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PROTNEST_NO_EXTENSION": "1"},
    )
    assert "absent, Python twins run instead" in json.loads(done.stdout)["kernels"]["C++ extension"]
