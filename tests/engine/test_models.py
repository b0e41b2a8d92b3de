"""load_model: from what a user calls a model to an encoder; published names without a network."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from protnest.engine import Chain, Embedder, Encoder, InputError, load_model, read_embeddings
from protnest.engine import models as models_file
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.engine.config import BUNDLED, BUNDLED_CHAINS, BUNDLED_FOLDER, PUBLISHED
from protnest.engine.decoder import Decoder
from protnest.engine.decoder_checkpoint import save_decoder
from protnest.engine.decoder_config import BUNDLED_DECODERS
from protnest.engine.encoder import LanguageModelHead
from protnest.engine.info import describe
from protnest.engine.models import load_decoder, load_encoder
from typer.testing import CliRunner

from support.esm2_models import assert_same_encoder, hostile_encoder
from support.families import random_chain, tiny_family
from support.learning import toy_decoder

PUBLISHED_NAME = "esm2_t6_8M_UR50D"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(hostile_encoder(2, 32, 2), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a network, and an empty cache; huggingface_hub read both settings when it was imported."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def _cached(cache: Path, owner_and_name: str) -> Path:
    """An empty snapshot in the layout of huggingface_hub's cache, as after a download."""
    repository = cache / f"models--{owner_and_name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


# Names


def test_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_model(folder, device="cpu", precision="fp32")
    assert_same_encoder(encoder, hostile_encoder(2, 32, 2))
    assert encoder.name == "tiny"
    assert_same_encoder(load_model(str(folder), device="cpu", precision="fp32"), encoder)
    monkeypatch.chdir(folder.parent)
    assert_same_encoder(load_model("tiny", device="cpu", precision="fp32"), encoder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert_same_encoder(load_model("~/tiny", device="cpu", precision="fp32"), encoder)


def _skip_without(name: str) -> None:
    if not (BUNDLED_FOLDER / name).exists():
        pytest.skip(f"{name}: not bundled here yet")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _skip_without(name)
    # A folder of that name in the working directory does not come between.
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    encoder = load_model(name, device="cpu", precision="fp32")
    assert encoder.config == BUNDLED[name]
    assert encoder.name == name
    assert isinstance(encoder.head, LanguageModelHead)


@pytest.mark.parametrize("name", BUNDLED_DECODERS)
def test_bundled_decoder(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _skip_without(name)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    decoder = load_decoder(name, device="cpu", precision="fp32")
    assert decoder.config == BUNDLED_DECODERS[name]
    assert decoder.name == name
    assert decoder.vocabulary.tokens[4:7] == ("L", "A", "G")


@pytest.mark.parametrize("name", BUNDLED_CHAINS)
def test_bundled_chain(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _skip_without(f"{name}.chain")
    (tmp_path / name).write_text("no chain")
    monkeypatch.chdir(tmp_path)
    chain = Chain.load(name)
    assert tuple(model.name for model in chain.models) == BUNDLED_CHAINS[name]
    # The very weights that lie beside it: another hash would be refused here.
    emb = Embedder([load_encoder(each, device="cpu", precision="fp32") for each in BUNDLED_CHAINS[name]], chain=chain)
    assert emb.dims == tuple(BUNDLED[each].width for each in BUNDLED_CHAINS[name])
    assert emb.embed(["MKTAYIAKQR"]).shape == (1, emb.dims[-1])
    assert not any("/" in str(value) for value in chain.data.values()), "a path of the machine that it was made on"


@pytest.mark.parametrize("name", [*BUNDLED, *BUNDLED_DECODERS])
def test_bundled_card(name: str) -> None:
    _skip_without(f"{name}/README.md")
    card = (BUNDLED_FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n")
    assert f"\n# {name}\n" in card
    assert f"**{name}** | " in card, "its own perplexity"
    assert "-dirty" not in card, "figures of code that nobody else has"
    report = json.loads((BUNDLED_FOLDER / name / "training.json").read_text(encoding="utf-8"))
    named = [report.get("student"), report.get("teacher"), report.get("recipe", {}).get("init")]
    assert not any("/" in each for each in named if each), "a path of the machine that it was trained on"


def test_defaults_are_bundled() -> None:
    assert models_file.DEFAULT_MODEL in BUNDLED
    assert models_file.DEFAULT_DECODER in BUNDLED_DECODERS
    for models in BUNDLED_CHAINS.values():
        assert set(models) <= set(BUNDLED)
    assert not {*BUNDLED} & {*BUNDLED_DECODERS}


# Bundled names, with others' weights in the package's place


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose models are tiny ones, and a working directory whose files have the same names."""
    from protnest.engine import chain as chain_file

    bundled = tmp_path / "bundled"
    family = tiny_family()
    for name, encoder in zip(BUNDLED_CHAINS["nano"], family, strict=True):
        encoder.name = name
        save_checkpoint(encoder, bundled / name)
    save_decoder(toy_decoder(), bundled / "nano-gpt")
    random_chain(family).save(bundled / "nano.chain")
    for file in (models_file, chain_file):
        monkeypatch.setattr(file, "BUNDLED_FOLDER", bundled)
    (tmp_path / "here").mkdir()
    save_decoder(toy_decoder(1), tmp_path / "here" / "nano-gpt")
    (tmp_path / "here" / "nano").write_text("no chain")
    monkeypatch.chdir(tmp_path / "here")
    return bundled


def test_a_bundled_decoder_comes_before_a_folder(package: Path) -> None:
    found = load_model("nano-gpt", device="cpu", precision="fp32")
    assert isinstance(found, Decoder)
    assert found.name == "nano-gpt"
    expected, other = (
        load_model(each, device="cpu", precision="fp32") for each in (package / "nano-gpt", "./nano-gpt")
    )
    assert found.fingerprint == expected.fingerprint != other.fingerprint
    assert load_decoder(device="cpu").fingerprint == expected.fingerprint


def test_a_bundled_chain_comes_before_a_file(package: Path) -> None:
    expected = Chain.load(package / "nano.chain").fingerprint
    assert Chain.load("nano").fingerprint == Chain.load(Path("nano")).fingerprint == expected
    with pytest.raises(InputError, match="not a readable chain"):
        Chain.load(Path("nano").absolute())


def test_unknown_chain_names_are_told_the_bundled_ones(package: Path) -> None:
    with pytest.raises(InputError, match=r"^nanu: no such file; .* writes one; bundled chains: nano$"):
        Chain.load("nanu")
    (package / "nano.chain").unlink()
    with pytest.raises(InputError, match=r"bundled/nano\.chain: no such file, though it belongs to this package$"):
        Chain.load("nano")


@pytest.mark.parametrize("words", [[], ["--dims", "16"]], ids=["whole", "cut"])
def test_a_bundled_chain_finds_its_models(package: Path, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n>b\nGSHM\n")
    given = ["embed", str(tmp_path / "in.fasta"), "--out", str(tmp_path / "out"), "--chain", "nano", *words]
    done = CliRunner().invoke(app, [*given, "--precision", "fp32", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    names = BUNDLED_CHAINS["nano"][:1] if words else BUNDLED_CHAINS["nano"]
    family = [load_encoder(name, device="cpu", precision="fp32") for name in names]
    expected = Embedder(family, chain=Chain.load(package / "nano.chain"), pool="mean").embed(["MKTAYIAKQR", "GSHM"])
    assert np.array_equal(np.asarray(read_embeddings(tmp_path / "out").array), expected)


def test_generate_takes_the_bundled_decoder(package: Path, tmp_path: Path) -> None:
    given = ["generate", "--out", str(tmp_path / "a.fasta"), "-n", "3", "--max-residues", "9", "--json"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["model"], report["sequences"]) == ("nano-gpt", 3)


def test_score_takes_the_bundled_decoder(package: Path, tmp_path: Path) -> None:
    (tmp_path / "wt.fasta").write_text(">a\nMKTAY\n")
    given = ["score", "--wt", str(tmp_path / "wt.fasta"), "--all-singles", "--out", str(tmp_path / "a.csv"), "--json"]
    done = CliRunner().invoke(app, [*given, "--model", "nano-gpt", "--method", "pseudo-ll"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["models"], report["scored"]) == (["nano-gpt"], 95)


def test_info_names_everything_bundled() -> None:
    models = describe()["models"]
    assert "nano-m (256)" in models["bundled"]
    assert models["bundled decoders"] == "nano-gpt (192)"
    assert models["bundled chains"] == "nano (nano-xs -> nano-s -> nano-m)"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("esm2_t6_8M", "did you mean 'esm2_t6_8M_UR50D'? "),
        ("esm2_t33_650M_UR50S", "did you mean 'esm2_t33_650M_UR50D'? "),
        ("nano_s", "did you mean 'nano-s'? "),
        ("nano-gp", "did you mean 'nano-gpt'? "),
        ("/no/such/folder/at/all", ""),
        ("qqqq", ""),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(name, device="cpu")
    bundled = "a bundled name (nano-xs, nano-s, nano-m, nano-gpt)"
    assert caught.value.problem.startswith(f"no model {name!r}: {hint}it is neither {bundled}")
    for known in (*BUNDLED, *BUNDLED_DECODERS, *PUBLISHED):
        assert known in caught.value.problem


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model", "model.PT.zip"])
def test_file_that_does_not_end_in_pt(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_model(path, device="cpu")
    assert caught.value.file == str(path)
    assert (
        caught.value.problem == "a model file ends in .pt (fair-esm) or .onnx, .engine; other checkpoints are folders"
    )


# Device and precision


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(folder: Path, precision: str, dtype: torch.dtype) -> None:
    encoder = load_model(folder, device="cpu", precision=precision)
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
    assert encoder.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"device": "cpu", "precision": "fp64"}, "precision is 'fp64'"),
        ({"device": "cpu", "precision": "fp16"}, "precision is 'fp16' on a CPU"),
    ],
)
def test_wrong_words_are_seen_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], problem: str
) -> None:
    def read(model: object) -> tuple[Encoder, list[str]]:
        pytest.fail("the checkpoint was read first")

    monkeypatch.setattr(models_file, "_read", read)
    with pytest.raises(InputError, match=problem):
        load_model("nano-s", **options)


def test_loading_leaves_torchs_compiler_asleep(folder: Path) -> None:
    """Importing it takes 2.3 s of processor time, and a weight drawn on the meta device is enough to do so."""
    script = (
        "import sys; from protnest.engine import load_model; load_model(sys.argv[1], device='cpu'); "
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# Published names


@pytest.mark.parametrize("name", [PUBLISHED_NAME, f"facebook/{PUBLISHED_NAME}"])
def test_published_name_offline_says_what_to_do(offline: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(name, device="cpu")
    problem = caught.value.problem
    assert problem.startswith(f"facebook/{PUBLISHED_NAME} is not in the local cache and could not be fetched (")
    assert f"`hf download facebook/{PUBLISHED_NAME}`" in problem
    assert "--model" in problem


@pytest.mark.parametrize("name", [PUBLISHED_NAME, f"facebook/{PUBLISHED_NAME}"])
def test_published_name_from_the_cache(offline: Path, folder: Path, name: str) -> None:
    snapshot = _cached(offline, f"facebook/{PUBLISHED_NAME}")
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    encoder = load_model(name, device="cpu", precision="fp32")
    assert_same_encoder(encoder, hostile_encoder(2, 32, 2))
    assert encoder.name == PUBLISHED_NAME


def test_published_name_asks_for_what_is_needed_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[tuple[str, Any]] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_model(PUBLISHED_NAME, device="cpu").name == PUBLISHED_NAME
    # Not pytorch_model.bin, tf_model.h5: the same weights again.
    assert asked == [
        (f"facebook/{PUBLISHED_NAME}", ["config.json", "*.safetensors", "*.safetensors.index.json"]),
    ]


def test_published_name_in_a_cache_that_lacks_the_weights(offline: Path) -> None:
    snapshot = _cached(offline, f"facebook/{PUBLISHED_NAME}")
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        load_model(PUBLISHED_NAME, device="cpu")
    assert caught.value.file is not None
    assert Path(caught.value.file).is_relative_to(os.path.realpath(offline))


@pytest.mark.parametrize(
    "failure",
    [ConnectionError("no route"), OSError("disk full"), TimeoutError()],
    ids=lambda failure: type(failure).__name__,
)
def test_published_name_when_fetching_fails(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=rf"could not be fetched \({type(failure).__name__}\)") as caught:
        load_model(PUBLISHED_NAME, device="cpu")
    assert caught.value.__cause__ is failure


def test_folder_comes_before_a_published_name(
    folder: Path, offline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.rename(folder.parent / PUBLISHED_NAME)
    monkeypatch.chdir(folder.parent)
    caplog.set_level(logging.INFO)
    assert_same_encoder(load_model(PUBLISHED_NAME, device="cpu", precision="fp32"), hostile_encoder(2, 32, 2))
