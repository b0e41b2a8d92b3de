"""fits: parameters counted as they are, memory predicted as it is measured, sizes read or refused, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from protnest.engine import InputError
from protnest.engine.cli import app
from protnest.engine.config import BUNDLED, PUBLISHED, EncoderConfig
from protnest.engine.encoder import Encoder
from protnest.engine.fits import find_fits, known_config, parameters, parse_size, token_bytes, weights_bytes
from typer.testing import CliRunner

from support.tiny import save_tiny_model

TOLERATED_SHARE, TOLERATED_BYTES = 0.3, 100_000_000
MEASURED, TOKENS = {"layers": 2, "width": 320, "heads": 20, "feedforward": 1280}, 16_000


@pytest.mark.parametrize("name", ["nano-s", "esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D"])
def test_parameters_are_those_of_the_encoder(name: str) -> None:
    config = (BUNDLED | PUBLISHED)[name]
    with torch.device("meta"):
        encoder = Encoder(config)
    assert parameters(config) == sum(each.numel() for each in encoder.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_prediction_is_what_a_pass_takes() -> None:
    """In a process of its own: memory that other tests have let go of would be used again, and count for nothing."""
    script = (
        "import torch\n"
        "from protnest.benchmarks.memory import PeakMemory\n"
        "from protnest.engine import Embedder, Encoder\n"
        "from protnest.engine.config import EncoderConfig\n"
        "torch.set_num_threads(1)\n"
        f"encoder = Encoder(EncoderConfig(**{MEASURED!r})).eval().requires_grad_(False)\n"
        f"proteins = ['MKTAYIAKQR' * 20] * {TOKENS // 202}\n"
        f"embedder = Embedder(encoder, max_tokens={TOKENS})\n"
        "embedder.embed(proteins[:2])\n"
        "memory = PeakMemory(torch.device('cpu'))\n"
        "embedder.embed(proteins)\n"
        "print(memory.growth_bytes())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown = int(done.stdout)
    predicted = TOKENS * token_bytes(EncoderConfig(**MEASURED), "fp32", "cpu")
    assert predicted > 2 * TOLERATED_BYTES, "the tolerance would allow anything"
    assert abs(grown - predicted) <= max(TOLERATED_SHARE * predicted, TOLERATED_BYTES), (grown, predicted)


def test_what_is_left_of_the_memory_is_tokens() -> None:
    config = PUBLISHED["esm2_t33_650M_UR50D"]
    (found,) = find_fits(8 * 10**9, models=["esm2_t33_650M_UR50D"], precision="bf16", device="cuda")
    used = 700_000_000 + found.weights_bytes + found.most_tokens * found.token_bytes
    assert 8 * 10**9 - found.token_bytes < used <= 8 * 10**9
    assert found.fits
    assert found.longest_residues == found.most_tokens - 2
    assert found.weights_bytes == 2 * parameters(config) == pytest.approx(1.3e9, rel=0.02)
    # Matrices are nearly all of a large model.
    assert weights_bytes(config, "int8") == pytest.approx(0.5 * found.weights_bytes, rel=0.02)


def test_too_little_memory_holds_nothing() -> None:
    (found,) = find_fits(8 * 10**9, models=["esm2_t48_15B_UR50D"], precision="fp32", device="cuda")
    assert (found.most_tokens, found.longest_residues, found.fits) == (0, 0, False)


def test_length_decides() -> None:
    fits = [
        find_fits(800_000_000, models=["esm2_t6_8M_UR50D"], precision="fp32", residues=residues)[0].fits
        for residues in (1000, 1_000_000)
    ]
    assert fits == [True, False]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[("8GB", 8 * 10**9), ("8 gb", 8 * 10**9), ("24G", 24 * 10**9), ("512MB", 512 * 10**6)],
        *[("7.5GiB", int(7.5 * 2**30)), ("1TiB", 2**40), ("1000", 1000), ("64kB", 64_000)],
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "-8GB", "8GBs", "8iB", "0GB", "1e9", "8,5GB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size; expected|is no memory at all"):
        parse_size(text)


def test_folders_are_read_without_their_weights(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    assert known_config(str(folder)).width == 32
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        known_config(str(folder))
    with pytest.raises(InputError, match="no model 'esm3'"):
        known_config("esm3")
    with pytest.raises(InputError, match="nano-gpt is a decoder; what is counted here is an encoder's memory"):
        known_config("nano-gpt")


@pytest.mark.parametrize("wrong", [{"precision": "fp8"}, {"device": "tpu"}])
def test_unknown_words_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is '(fp8|tpu)', expected one of"):
        find_fits(10**9, **wrong)  # type: ignore[arg-type]


def test_the_command_prints_a_table_and_json() -> None:
    shown = CliRunner().invoke(app, ["info", "--fits", "8GB"])
    assert shown.exit_code == 0, shown.output
    for name in [*BUNDLED, *PUBLISHED]:
        assert name in shown.output
    given = ["info", "--fits", "8GB", "--model", "nano-s", "--precision", "bf16", "--length", "300", "--json"]
    report = json.loads(CliRunner().invoke(app, given).stdout)
    assert (report["memory_bytes"], report["residues"]) == (8 * 10**9, 300)
    (only,) = report["models"]
    assert (only["model"], only["precision"], only["fits"]) == ("nano-s", "bf16", True)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--fits", "lots"], 2, "is no size; expected a number and a unit"),
        (["--fits", "8GB", "--model", "esm3"], 1, "no model 'esm3'"),
        (["--fits", "8GB", "--length", "0"], 2, "--length"),
    ],
)
def test_the_command_names_errors(options: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(app, ["info", *options])
    assert result.exit_code == code
    assert message in " ".join(result.output.replace("│", " ").split())
