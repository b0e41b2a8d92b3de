"""load_model: from what a user calls a model to an encoder; published names without a network."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from protnest.engine import Encoder, InputError, load_model
from protnest.engine import models as models_file
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.config import BUNDLED, PUBLISHED
from protnest.engine.encoder import LanguageModelHead

from support.esm2_models import assert_same_encoder, hostile_encoder

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


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not (models_file._BUNDLED_FOLDER / name).is_dir():
        pytest.skip(f"{name} is not in the package yet")
    # A folder of that name in the working directory does not come between.
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    encoder = load_model(name, device="cpu", precision="fp32")
    assert encoder.config == BUNDLED[name]
    assert encoder.name == name
    assert isinstance(encoder.head, LanguageModelHead)


def test_default_is_bundled() -> None:
    assert models_file.DEFAULT_MODEL in BUNDLED


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("esm2_t6_8M", "did you mean 'esm2_t6_8M_UR50D'? "),
        ("esm2_t33_650M_UR50S", "did you mean 'esm2_t33_650M_UR50D'? "),
        ("nano_s", "did you mean 'nano-s'? "),
        ("/no/such/folder/at/all", ""),
        ("qqqq", ""),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(name, device="cpu")
    assert caught.value.problem.startswith(f"no model {name!r}: {hint}it is neither a bundled name (nano-xs, nano-s)")
    for known in (*BUNDLED, *PUBLISHED):
        assert known in caught.value.problem


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model", "model.PT.zip"])
def test_file_that_does_not_end_in_pt(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_model(path, device="cpu")
    assert caught.value.file == str(path)
    assert caught.value.problem == "a model file ends in .pt (fair-esm); other checkpoints are folders"


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
