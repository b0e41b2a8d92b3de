"""From what a user calls a model to an encoder that is ready to run."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import torch

from .checkpoint import build_encoder, canonical_tensors, read_checkpoint
from .config import BUNDLED, PUBLISHED, config_from_huggingface
from .device import resolve_device, resolve_precision
from .encoder import Encoder
from .errors import InputError
from .fair_esm import read_fair_esm
from .quantise import quantised

_logger = logging.getLogger(__name__)

DEFAULT_MODEL = "nano-s"
_BUNDLED_FOLDER = Path(__file__).parent / "bundled"
_HUB_OWNER = "facebook"


def load_model(model: str | Path = DEFAULT_MODEL, *, device: str = "auto", precision: str = "auto") -> Encoder:
    """Loads an encoder.

    Args:
        model: a bundled name (`nano-xs`, `nano-s`), a folder in Hugging Face layout, a fair-esm `.pt` file, or a
            published name (`esm2_t33_650M_UR50D`), which is fetched once when online. A folder or file of that name
            comes before a published one.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto" (bf16 where the hardware has it, else fp32), "fp32", "bf16", "fp16" (GPUs only) or "int8"
            (CPUs only; integer products, see `protnest.engine.quantise`).

    Raises:
        InputError: there is no such model, device or precision, or the checkpoint is not a whole ESM-2 encoder.
    """
    # Both are settled first: a wrong word should not cost the reading of gigabytes.
    where = resolve_device(device)
    dtype = resolve_precision(precision, where)
    encoder, set_aside = _read(model)
    if set_aside:
        _logger.info("%s: set aside, no part of the encoder: %s", encoder.name, ", ".join(set_aside))
    if dtype == torch.int8:
        return quantised(encoder)
    return encoder.to(device=where, dtype=dtype).requires_grad_(False)


def _read(model: str | Path) -> tuple[Encoder, list[str]]:
    name = str(model)
    if name in BUNDLED:
        return read_checkpoint(_BUNDLED_FOLDER / name, name=name)
    path = Path(model).expanduser()
    if path.is_dir():
        return read_checkpoint(path)
    if path.is_file():
        if path.suffix != ".pt":
            message = "a model file ends in .pt (fair-esm); other checkpoints are folders"
            raise InputError(message, file=path)
        return read_fair_esm(path)
    published = name.removeprefix(f"{_HUB_OWNER}/")
    if published in PUBLISHED:
        return read_checkpoint(_fetch(published), name=published)
    known = [*BUNDLED, *PUBLISHED]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    message = (
        f"no model {name!r}: {hint}it is neither a bundled name ({', '.join(BUNDLED)}), nor a folder or .pt file here, "
        f"nor a published name ({', '.join(PUBLISHED)})"
    )
    raise InputError(message)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository = f"{_HUB_OWNER}/{name}"
    try:
        folder = snapshot_download(
            repository, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"]
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        message = (
            f"{name} is not in the local cache and could not be fetched ({type(error).__name__}). Where there is a "
            f"network, run `hf download {repository}`; then copy that folder here and pass its path to --model"
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
