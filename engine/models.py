"""From what a user calls a model to an encoder or a decoder that is ready to run."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import torch

from .checkpoint import build_encoder, canonical_tensors, read_checkpoint, read_settings
from .config import BUNDLED, BUNDLED_FOLDER, PUBLISHED, config_from_huggingface
from .decoder import Decoder
from .decoder_checkpoint import read_decoder
from .decoder_config import BUNDLED_DECODERS
from .device import resolve_device, resolve_precision
from .encoder import Encoder
from .errors import InputError
from .exported_encoder import AnyEncoder, ExportedEncoder
from .fair_esm import read_fair_esm
from .quantise import quantised
from .quantise_decoder import quantised_decoder
from .tensorrt_sidecar import ENGINE_SUFFIX, is_engine, read_sidecar

_logger = logging.getLogger(__name__)

DEFAULT_MODEL = "nano-s"
DEFAULT_DECODER = "nano-gpt"
_HUB_OWNER = "facebook"
PUBLISHED_DECODER = "nferruz/ProtGPT2"
EXPORTED_SUFFIXES = (".onnx", ENGINE_SUFFIX)
_ENCODER_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
_DECODER_FILES = (*_ENCODER_FILES, "tokenizer.json", "vocab.json", "merges.txt")


def load_model(
    model: str | Path = DEFAULT_MODEL, *, device: str = "auto", precision: str = "auto"
) -> Encoder | Decoder | ExportedEncoder:
    """Loads an encoder or a decoder, whichever the checkpoint holds, or an exported file.

    Args:
        model: as `load_checkpoint` takes it, or a file of `protnest export` (.onnx, .engine).
        device: "auto", "cpu", "cuda" or "cuda:N"; an ONNX file runs on a GPU where the installed onnxruntime has CUDA,
            an engine on a GPU alone.
        precision: as `load_checkpoint` takes it; an exported file has its own, which is "auto".

    Raises:
        InputError: as `load_checkpoint`; the file is no export, its runtime is missing or does not take it, or has
            another precision.
    """
    if _is_exported(model):
        return load_exported(model, device=device, precision=precision)
    return load_checkpoint(model, device=device, precision=precision)


def load_checkpoint(
    model: str | Path = DEFAULT_MODEL, *, device: str = "auto", precision: str = "auto"
) -> Encoder | Decoder:
    """Loads an encoder or a decoder, whichever the checkpoint holds.

    Args:
        model: a bundled name (encoders `nano-xs`, `nano-s`, `nano-m`; decoder `nano-gpt`), a folder in Hugging Face
            layout, a fair-esm `.pt` file, or a published name (`esm2_t33_650M_UR50D`, `nferruz/ProtGPT2`), which is
            fetched once when online. A folder or file of that name comes before a published one, and after a bundled
            one.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto" (bf16 where the hardware has it, else fp32), "fp32", "bf16", "fp16" (GPUs only) or "int8"
            (CPUs only; integer products, see `protnest.engine.quantise`).

    Raises:
        InputError: there is no such model, device or precision, the checkpoint is not a whole ESM-2 encoder or GPT-2
            decoder, or it is an exported file.
    """
    if _is_exported(model):
        message = "is an exported file, which embeds and scores; this takes the checkpoint that it was made of"
        raise InputError(message, file=model)
    # Both are settled first: a wrong word should not cost the reading of gigabytes.
    where = resolve_device(device)
    dtype = resolve_precision(precision, where)
    found, set_aside = _read(model)
    if set_aside:
        _logger.info("%s: set aside, no part of the model: %s", found.name, ", ".join(set_aside))
    if dtype == torch.int8:
        return quantised(found) if isinstance(found, Encoder) else quantised_decoder(found)
    return found.to(device=where, dtype=dtype).requires_grad_(False)


def load_encoder(model: str | Path = DEFAULT_MODEL, *, device: str = "auto", precision: str = "auto") -> Encoder:
    """`load_checkpoint` for whoever needs an encoder.

    Raises:
        InputError: as `load_checkpoint`, or the checkpoint holds a decoder.
    """
    found = load_checkpoint(model, device=device, precision=precision)
    if not isinstance(found, Encoder):
        message = (
            f"{found.name} is a decoder, which generates, scores variants and can be evaluated; this takes an encoder"
        )
        raise InputError(message)
    return found


def load_decoder(model: str | Path = DEFAULT_DECODER, *, device: str = "auto", precision: str = "auto") -> Decoder:
    """`load_checkpoint` for whoever needs a decoder.

    Raises:
        InputError: as `load_checkpoint`, or the checkpoint holds an encoder.
    """
    found = load_checkpoint(model, device=device, precision=precision)
    if not isinstance(found, Decoder):
        message = f"{found.name} is an encoder, which cannot generate; this takes a decoder, such as {DEFAULT_DECODER}"
        raise InputError(message)
    return found


def load_any_encoder(model: str | Path = DEFAULT_MODEL, *, device: str = "auto", precision: str = "auto") -> AnyEncoder:
    """`load_model` for whoever embeds.

    Raises:
        InputError: as `load_model`, or the checkpoint holds a decoder.
    """
    load = load_exported if _is_exported(model) else load_encoder
    return load(model, device=device, precision=precision)


def load_exported(path: str | Path, *, device: str = "auto", precision: str = "auto") -> ExportedEncoder:
    """Loads a file of `protnest export`; see `load_model`."""
    from .onnx_model import read_facts

    path = Path(path).expanduser()
    facts = read_sidecar(path) if is_engine(path) else read_facts(path)
    if precision not in ("auto", facts["precision"]):
        message = f"is {facts['precision']}, got precision {precision!r}: that of a file is chosen when it is exported"
        raise InputError(message, file=path)
    if is_engine(path):
        return _load_engine(path, facts, device)
    from .onnx_runner import OnnxRunner, choose_device

    runner = OnnxRunner(path, device=choose_device(device))
    return ExportedEncoder(runner, facts, path=path, device=runner.device, runtime=runner.name)


def _load_engine(path: Path, facts: dict[str, Any], device: str) -> ExportedEncoder:
    from .tensorrt_model import TensorRTModel

    if device == "cpu":
        message = "an engine runs on a GPU alone, and device is 'cpu'; `protnest export --target onnx` runs on both"
        raise InputError(message, file=path)
    chosen = "cuda" if device == "auto" else device
    model = TensorRTModel(path, device=chosen, facts=facts)
    return ExportedEncoder(model, facts, path=path, device=torch.device(chosen), runtime=facts["target"])


def _is_exported(model: str | Path) -> bool:
    path = Path(model).expanduser()
    return path.suffix in EXPORTED_SUFFIXES and not path.is_dir()


def _read(model: str | Path) -> tuple[Encoder | Decoder, list[str]]:
    name = str(model)
    if name in BUNDLED or name in BUNDLED_DECODERS:
        return _read_folder(BUNDLED_FOLDER / name, name)
    path = Path(model).expanduser()
    if path.is_dir():
        return _read_folder(path, path.name)
    if path.is_file():
        if path.suffix != ".pt":
            message = (
                f"a model file ends in .pt (fair-esm) or {', '.join(EXPORTED_SUFFIXES)}; other checkpoints are folders"
            )
            raise InputError(message, file=path)
        return read_fair_esm(path)
    published = name.removeprefix(f"{_HUB_OWNER}/")
    if published in PUBLISHED:
        return read_checkpoint(_fetch(f"{_HUB_OWNER}/{published}", _ENCODER_FILES), name=published)
    if name == PUBLISHED_DECODER:
        return _read_folder(_fetch(name, _DECODER_FILES), name)
    bundled = [*BUNDLED, *BUNDLED_DECODERS]
    known = [*bundled, *PUBLISHED, PUBLISHED_DECODER]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    message = (
        f"no model {name!r}: {hint}it is neither a bundled name ({', '.join(bundled)}), nor a folder or .pt file here, "
        f"nor a published name ({', '.join([*PUBLISHED, PUBLISHED_DECODER])})"
    )
    raise InputError(message)


def _read_folder(folder: Path, name: str) -> tuple[Encoder | Decoder, list[str]]:
    if read_settings(folder).get("model_type") == "gpt2":
        return read_decoder(folder, name=name)
    return read_checkpoint(folder, name=name)


def _fetch(repository: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, allow_patterns=list(files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        message = (
            f"{repository} is not in the local cache and could not be fetched ({type(error).__name__}). Where there is "
            f"a network, run `hf download {repository}`; then copy that folder here and pass its path to --model"
        )
        raise InputError(message) from error
    return Path(folder)


def from_transformers(model: torch.nn.Module, *, name: str = "transformers model") -> Encoder:
    """Adopts a transformers ESM-2 that is already in memory; its weights are copied to an fp32 encoder on the CPU.

    Args:
        model: an `EsmModel`, `EsmForMaskedLM` or another ESM-2 of transformers; heads other than the language model's
            are set aside.
        name: how messages call the encoder.

    Raises:
        InputError: the model is no ESM-2.
    """
    settings: Any = getattr(model, "config", None)
    if not hasattr(settings, "to_dict"):
        message = f"{name} is no transformers model: it has no config"
        raise InputError(message)
    tensors, _ = canonical_tensors(model.state_dict(), source=name)
    return build_encoder(config_from_huggingface(settings.to_dict(), file=name), tensors, name=name, source=name)
