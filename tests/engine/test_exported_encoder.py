"""Exported files in encoders' places: embedding and scoring as the checkpoints do, and what they refuse."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import Chain, Embedder, Encoder, InputError, load_model, read_embeddings, score_variants
from protnest.engine.alphabet import MASK_ID, PAD_ID
from protnest.engine.cli import app
from protnest.engine.denormals import has_denormals, no_denormals
from protnest.engine.exported_encoder import ExportedEncoder, runs_of
from protnest.engine.models import load_any_encoder, load_checkpoint, load_encoder
from protnest.engine.packing import ChosenRows, pack
from protnest.engine.scorers import language_head_hash
from protnest.engine.scoring import METHODS
from typer.testing import CliRunner, Result

from support.exported import exported_family, relative_error, tiny_export, with_outputs
from support.families import random_chain, tiny_family
from support.tiny import random_proteins, write_fasta

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

PROTEINS = ["A", "MKTAYIAKQRGSHMXWLV", *random_proteins(12, longest=20), "WW"]
LONG = "".join(random_proteins(9, seed=4, longest=20))
WIDTHS = (16, 24)
MOST = 1e-5


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def _load(path: Path) -> ExportedEncoder:
    loaded = load_model(path, device="cpu")
    assert isinstance(loaded, ExportedEncoder)
    return loaded


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_export()


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the larger model alone, with residues and logits."""
    return with_outputs(folder / "tiny.onnx", ["residue", "logits"], tmp_path_factory.mktemp("plain") / "plain.onnx")


@pytest.fixture(scope="module")
def large(folder: Path) -> Encoder:
    return exported_family(folder)[-1]


class _Recorder:
    """A runner that keeps what it was asked."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.runs: list[np.ndarray] = []

    def run_tokens(self, tokens_BL: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        assert tokens_BL.dtype == np.int64
        self.runs.append(tokens_BL)
        found: dict[str, np.ndarray] = self._runner.run_tokens(tokens_BL, outputs)
        return found


def _recorded(path: Path) -> tuple[ExportedEncoder, _Recorder]:
    loaded = _load(path)
    recorder = _Recorder(loaded._runner)
    made = ExportedEncoder(recorder, loaded.facts, path=path, device=torch.device("cpu"), runtime="onnxruntime")
    return made, recorder


def test_it_is_what_an_encoder_is(plain: Path, large: Encoder) -> None:
    loaded = _load(plain)
    for name in ("name", "fingerprint", "dim", "device", "dtype", "product_dtype", "precision", "family"):
        assert getattr(loaded, name) == getattr(large, name), name
    # The file is as long as the shorter of the two models with which it was exported.
    assert loaded.config.max_residues == 20
    assert loaded.config.layers == large.config.layers
    assert loaded.outputs == ("residue", "logits")


def test_packed_batches_in_their_order(plain: Path, large: Encoder) -> None:
    loaded, recorder = _recorded(plain)
    packed = pack(PROTEINS)
    packed.tokens_T[5:9] = MASK_ID
    expected_TD = large(packed).hidden_TD
    assert relative_error(loaded(packed).hidden_TD, expected_TD) <= MOST
    for tokens_BL in recorder.runs:
        longest = (tokens_BL != PAD_ID).sum(axis=1).max()
        assert longest == tokens_BL.shape[1]
    assert sum(map(len, recorder.runs)) == len(PROTEINS)
    assert 1 < len(recorder.runs) < len(PROTEINS)
    chosen = ChosenRows(torch.tensor([2, 5, 30]), (1, 1, 1, *[0] * (len(PROTEINS) - 3)))
    assert relative_error(loaded.row_logits(packed, chosen), large.row_logits(packed, chosen)) <= MOST
    assert relative_error(loaded.row_hidden(packed, chosen), expected_TD[chosen.index_R]) <= MOST
    for found, expected in zip(loaded.encode(PROTEINS), large.encode(PROTEINS), strict=True):
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= MOST


@pytest.mark.parametrize("most_tokens", [1, 60, 1024])
def test_runs_are_of_like_lengths(most_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 300, size=200).tolist()
    runs = runs_of(lengths, most_tokens)
    assert sorted(row for rows in runs for row in rows) == list(range(200))
    assert [lengths[row] for rows in runs for row in rows] == sorted(lengths, reverse=True)
    for rows in runs:
        longest, shortest = lengths[rows[0]], lengths[rows[-1]]
        assert longest - shortest <= max(longest / 8, 8)
        assert len(rows) == 1 or len(rows) * longest <= most_tokens
    assert (len(runs) == 200) == (most_tokens == 1)
    if most_tokens == 1024:
        assert len(runs) < 60
    assert runs_of([], most_tokens) == []


@pytest.mark.parametrize("pool", ["mean", "max", "bos", "residue"])
def test_embedder_equals_the_checkpoint(plain: Path, folder: Path, pool: str) -> None:
    # The file's length is 20, the model's own as well: longer proteins run in the same windows.
    (large,) = exported_family(folder)[1:]
    assert large.config.max_residues == 20
    proteins = [*PROTEINS, LONG, LONG[:21]]
    found = Embedder(_load(plain), pool=pool).embed(proteins)
    expected = Embedder(large, pool=pool).embed(proteins)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) <= MOST


def test_nested_rows_are_mean_embeddings(folder: Path) -> None:
    loaded, chain = _load(folder / "tiny.onnx"), Chain.load(folder / "tiny.chain")
    family = exported_family(folder)
    expected = np.asarray(Embedder(family, chain=chain).embed(PROTEINS))
    for embedder in (Embedder(loaded), Embedder(loaded, chain=chain), Embedder(loaded, max_tokens=7)):
        assert embedder.dims == WIDTHS
        assert relative_error(embedder.embed(PROTEINS), expected) <= MOST
    cut = Embedder(loaded, dims=20)
    assert cut.dims == (16, 20)
    assert relative_error(cut.embed(PROTEINS), expected[:, :20]) <= MOST
    assert np.shape(Embedder(loaded).embed([])) == (0, 24)


def test_means_of_the_file_and_cut_proteins(folder: Path, tmp_path: Path, large: Encoder) -> None:
    path = with_outputs(folder / "tiny.onnx", ["mean"], tmp_path / "mean.onnx")
    proteins = [*PROTEINS, LONG]
    found = Embedder(_load(path), long="truncate").embed(proteins)
    assert relative_error(found, Embedder(large, long="truncate").embed(proteins)) <= MOST
    assert Embedder(_load(path)).dims == (24,)


@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_the_checkpoints(plain: Path, large: Encoder, method: Any) -> None:
    wild_type, variants = LONG[:30], ["WT", f"{LONG[2]}3A:{LONG[27]}28W", f"{LONG[9]}10C"]
    found = score_variants(_load(plain), wild_type, variants, method=method)
    expected = score_variants(large, wild_type, variants, method=method)
    assert np.abs(found - expected).max() <= 1e-4
    assert np.abs(expected).max() > 0.1
    both = score_variants([_load(plain), large], wild_type, variants, method=method)
    assert np.abs(both - expected).max() <= 1e-4


def test_embed_to_a_store(folder: Path, plain: Path, tmp_path: Path, large: Encoder) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS)
    done = _invoke("embed", fasta, "--out", tmp_path / "out", "--model", plain, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["model"], report["precision"], report["width"]) == ("tiny24", "fp32", 24)
    assert relative_error(np.asarray(read_embeddings(tmp_path / "out").array), Embedder(large).embed(PROTEINS)) <= MOST
    # What torch makes has other bits: it is another run.
    again = _invoke("embed", fasta, "--out", tmp_path / "out", "--model", folder / "tiny24")
    assert again.exit_code == 1
    chain = ("--chain", folder / "tiny.chain")
    for out, options in (("nested", ()), ("checked", chain), ("cut", ("--dims", 16))):
        nested = _invoke("embed", fasta, "--out", tmp_path / out, "--model", folder / "tiny.onnx", *options)
        assert nested.exit_code == 0, nested.output
        expected = Embedder(exported_family(folder), chain=Chain.load(folder / "tiny.chain")).embed(PROTEINS)
        found = np.asarray(read_embeddings(tmp_path / out).array)
        assert relative_error(found, np.asarray(expected)[:, : found.shape[1]]) <= MOST
    settings = json.loads((tmp_path / "nested" / "run.json").read_text())["settings"]
    assert settings["runtime"] == "onnxruntime"
    assert settings["models"] == ["tiny16", "tiny24"]
    assert settings["chain_fingerprint"] == Chain.load(folder / "tiny.chain").fingerprint


def test_long_proteins_that_a_file_cannot_take(folder: Path, plain: Path, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", [*PROTEINS, LONG])
    done = _invoke("embed", fasta, "--out", tmp_path / "out", "--model", folder / "tiny.onnx")
    assert done.exit_code == 1
    for words in ("in.fasta, line", f"protein{len(PROTEINS)}", f"{len(LONG)} residues", "pools them itself", "--long"):
        assert words in done.stderr, words
    with pytest.raises(InputError, match=r"sequence 1: .*takes at most 20 residues .*--max-residues"):
        Embedder(_load(plain), long="full").embed(["A", LONG])
    with pytest.raises(InputError, match=rf"sequence 0: {len(LONG)} residues, but the model was trained on at most 20"):
        Embedder(_load(plain), long="error").embed([LONG])
    with pytest.raises(InputError, match=rf"a run of {len(LONG)} residues, but the file takes at most 20"):
        _load(plain).encode([LONG])
    assert Embedder(_load(plain), long="full").embed(["A" * 20]).shape == (1, 24)  # type: ignore[union-attr]


def test_score_command(folder: Path, plain: Path, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "wt.fasta", [LONG[:12]])
    for name, model in (("torch", folder / "tiny24"), ("exported", plain)):
        options = ("--all-singles", "--model", model, "--precision", "fp32" if name == "torch" else "auto")
        done = _invoke("score", "--wt", fasta, "--out", tmp_path / f"{name}.csv", *options)
        assert done.exit_code == 0, done.output
    rows = [
        [line.rsplit(",", 1) for line in (tmp_path / f"{name}.csv").read_text().splitlines()[1:]]
        for name in ("torch", "exported")
    ]
    assert [row[0] for row in rows[0]] == [row[0] for row in rows[1]]
    scores = np.array([[float(row[1]) for row in each] for each in rows])
    assert np.abs(scores[0] - scores[1]).max() <= 1e-4
    assert len(rows[0]) == 12 * 19


def test_outputs_that_are_not_there(folder: Path, plain: Path, tmp_path: Path) -> None:
    residue = with_outputs(folder / "tiny.onnx", ["residue"], tmp_path / "residue.onnx")
    logits = with_outputs(folder / "tiny.onnx", ["logits"], tmp_path / "logits.onnx")
    lacking = (
        r"residue\.onnx: the file gives residue alone, and logits is asked for; export with --outputs residue,logits"
    )
    with pytest.raises(InputError, match=lacking):
        score_variants(_load(residue), "MKT", ["M1A"])
    with pytest.raises(InputError, match=lacking):
        language_head_hash(_load(residue))
    done = _invoke("score", "--wt", write_fasta(tmp_path / "wt.fasta", ["MK"]), "--all-singles", "--model", residue,
                   "--out", tmp_path / "s.csv")  # fmt: skip
    assert done.exit_code == 1
    assert "--outputs residue,logits" in done.stderr
    with pytest.raises(InputError, match="gives logits alone, and residue is asked for"):
        Embedder(_load(logits))
    for pool in ("max", "bos", "residue"):
        with pytest.raises(InputError, match=f"nested row, which is a mean over residues: pool '{pool}'"):
            Embedder(_load(folder / "tiny.onnx"), pool=pool)
    with pytest.raises(InputError, match="gives no inner layers"):
        _load(plain)(pack(["MK"]), layers=[1])
    with pytest.raises(InputError, match="a chain takes checkpoints"):
        _load(plain).stream(pack(["MK"]))


def test_chains_that_do_not_belong(folder: Path, plain: Path, tmp_path: Path) -> None:
    family, chain = exported_family(folder), Chain.load(folder / "tiny.chain")
    other = random_chain(family, seed=1)
    with pytest.raises(InputError, match=rf"has changed since the export: its hash is {other.fingerprint}, the file"):
        Embedder(_load(folder / "tiny.onnx"), chain=other)
    with pytest.raises(InputError, match=r"plain\.onnx: holds no chain's row; --chain takes checkpoints"):
        Embedder(_load(plain), chain=chain)
    with pytest.raises(InputError, match="2 models, and an exported file is among them"):
        Embedder([family[0], _load(plain)], chain=chain)
    for dims, path in ((25, folder / "tiny.onnx"), (0, folder / "tiny.onnx"), (16, plain)):
        with pytest.raises(InputError, match=f"dims is {dims}, but the file gives 24"):
            Embedder(_load(path), dims=dims)
    naive = random_chain(tiny_family(WIDTHS), naive=True)
    naive.save(tmp_path / "naive.chain")
    options = ("--chain", tmp_path / "naive.chain", "--out", tmp_path / "out")
    done = _invoke("embed", write_fasta(tmp_path / "in.fasta", ["MK"]), "--model", folder / "tiny.onnx", *options)
    assert done.exit_code == 1
    assert "has changed since the export" in done.stderr


def test_loading(folder: Path, plain: Path, tmp_path: Path) -> None:
    assert isinstance(load_any_encoder(plain, device="cpu", precision="fp32"), ExportedEncoder)
    assert isinstance(load_any_encoder(folder / "tiny16", device="cpu", precision="fp32"), Encoder)
    with pytest.raises(InputError, match=r"plain\.onnx: is fp32, got precision 'bf16': that of a file is chosen"):
        load_model(plain, device="cpu", precision="bf16")
    for load in (load_checkpoint, load_encoder):
        with pytest.raises(InputError, match=r"plain\.onnx: is an exported file, which embeds and scores"):
            load(plain, device="cpu")
    with pytest.raises(InputError, match=r"none\.onnx: no such file; `protnest export` writes one"):
        load_model(tmp_path / "none.onnx", device="cpu")
    half = with_outputs(plain, ["residue"], tmp_path / "half.onnx", precision="fp16")
    assert (_load(half).precision, _load(half).dtype) == ("fp16", torch.float16)
    # A checkpoint's folder may be called as it likes.
    (tmp_path / "named.onnx").symlink_to(folder / "tiny16")
    assert isinstance(load_model(tmp_path / "named.onnx", device="cpu", precision="fp32"), Encoder)


def test_head_hashes_tell_runtimes_apart(plain: Path, large: Encoder) -> None:
    assert language_head_hash(_load(plain)) == f"{language_head_hash(large)} onnxruntime"


def test_cuda_where_the_runtime_has_it(
    plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from protnest.engine import onnx_runner

    monkeypatch.setattr(onnx_runner, "resolve_device", lambda device: torch.device("cuda", 1))
    monkeypatch.setattr(onnx_runner, "_explained", set())
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert onnx_runner.choose_device("auto").type == "cpu"
    assert onnx_runner.choose_device("auto").type == "cpu"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "exported files run on the CPU: this onnxruntime has no CUDA (it has CPUExecutionProvider)" in line
    with pytest.raises(InputError, match=r"device is 'cuda', but this onnxruntime has no CUDA .*onnxruntime-gpu"):
        load_model(plain, device="cuda")
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert onnx_runner.choose_device("auto") == torch.device("cuda", 1)
    asked: list[Any] = []

    class _Fallen:
        def __init__(self, path: str, options: Any, providers: Any) -> None:
            asked.append(providers)

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", _Fallen)
    with pytest.raises(InputError, match="could not start CUDAExecutionProvider on cuda:1"):
        onnx_runner.OnnxRunner(plain, device=torch.device("cuda", 1))
    assert asked == [[("CUDAExecutionProvider", {"device_id": 1})]]


def test_threads_are_torchs(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from protnest.engine.onnx_runner import OnnxRunner

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert OnnxRunner(plain)._session.get_session_options().intra_op_num_threads == 3
    assert OnnxRunner(plain, threads=2)._session.get_session_options().intra_op_num_threads == 2


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
def test_denormals_are_zeros_in_the_runtime_alone(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_denormals()
    runner: Any = _load(plain)._runner
    assert runner._session.get_session_options().get_session_config_entry("session.set_denormal_as_zero") == "1"
    assert has_denormals()
    inside: list[bool] = []

    class _Session:
        def run(self, *given: Any) -> list[np.ndarray]:
            inside.append(has_denormals())
            return [np.zeros(1)]

    monkeypatch.setattr(runner, "_session", _Session())
    runner.run_tokens(np.zeros((1, 3), dtype=np.int64), ["residue"])
    assert inside == [False]
    assert has_denormals()
    with no_denormals():
        runner.run_tokens(np.zeros((1, 3), dtype=np.int64), ["residue"])
        assert not has_denormals()


def test_batches_beyond_memory_are_cut(plain: Path, large: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _load(plain)
    runner: Any = loaded._runner
    run, said = runner._session.run, ["Failed to allocate memory for requested buffer of size 10"]

    class _Full:
        def run(self, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            if feeds["tokens"].size > 30:
                raise RuntimeError(said[0])
            found: list[np.ndarray] = run(outputs, feeds)
            return found

    monkeypatch.setattr(runner, "_session", _Full())
    assert relative_error(Embedder(loaded).embed(PROTEINS), Embedder(large).embed(PROTEINS)) <= MOST
    said[0] = "another ailment\nof many lines"
    with pytest.raises(InputError, match=r"plain\.onnx: ONNX Runtime failed on \d+ rows of \d+ tokens \(another ailm"):
        Embedder(loaded).embed(PROTEINS)
