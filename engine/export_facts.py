"""Whether what an exported file says of itself is whole: nothing that comes after looks twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from .config import EncoderConfig
from .errors import InputError

FACTS: dict[str, type | UnionType] = {
    "models": list,
    "language_head": str | NoneType,
    "chain": str | NoneType,
    "widths": list,
    "precision": str,
    "outputs": dict,
    "limits": dict,
    "opset": int,
    "versions": dict,
}
"""What each export says, and as what JSON gives it; see `onnx_export`."""
_LIMITS = ("max_residues", "max_tokens")
_MODEL = ("name", "width", "fingerprint", "config")


def check_facts(facts: Mapping[str, Any], kinds: Mapping[str, type | UnionType] = FACTS, *, file: str | Path) -> None:
    """Raises InputError where something is missing, or is not what it should be.

    Args:
        facts: as read.
        kinds: what must be there.
        file: which holds them.
    """
    for name, kind in kinds.items():
        if name not in facts:
            message = f"does not say all of an export: it lacks `{name}`"
            raise InputError(message, file=file)
        if not isinstance(facts[name], kind):
            _fail(name, facts[name], file)
    for name in _LIMITS:
        if not isinstance(facts["limits"].get(name), int):
            _fail("limits", facts["limits"], file)
    if not facts["models"]:
        _fail("models", "none", file)
    for model in facts["models"]:
        if not isinstance(model, dict) or any(name not in model for name in _MODEL):
            _fail("models", model, file)
        try:
            EncoderConfig(**model["config"])
        except (TypeError, ValueError) as error:  # An unknown size; a size that cannot be.
            message = f"has damaged metadata: `config` of {model['name']} ({error})"
            raise InputError(message, file=file) from error


def _fail(name: str, found: object, file: str | Path) -> None:
    message = f"has damaged metadata: `{name}` is {found!r}"
    raise InputError(message, file=file)
