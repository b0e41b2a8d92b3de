"""What an engine says of itself: engines carry no metadata, so a JSON file of the same name lies beside each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import InputError
from .export_facts import FACTS, check_facts
from .json_object import read_object
from .length_profiles import LengthProfile
from .schema_version import check_schema_version

SCHEMA_VERSION = 1
ENGINE_SUFFIX = ".engine"
_OF_ENGINES = {"target": str, "gpus": list, "profiles": list, "engine": dict}
_CHUNK_BYTES = 1 << 22


def is_engine(path: str | Path) -> bool:
    """Whether a file is an engine, by its name."""
    return Path(path).suffix == ENGINE_SUFFIX


def sidecar_path(path: str | Path) -> Path:
    """Where the sidecar of an engine file lies: `m.engine.json`."""
    return Path(f"{path}.json")


def seal_facts(facts: dict[str, Any], engine: Path) -> str:
    """The sidecar's text: the facts, and which engine file they are about, by its size and hash."""
    sealed = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "engine": {"bytes": engine.stat().st_size, "blake2b": _digest(engine)},
    }
    return json.dumps(sealed, indent=2) + "\n"


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """What is known of an engine: what an ONNX export says of itself, and target, GPUs, profiles, size and hash.

    Args:
        path: the engine file.

    Raises:
        InputError: the engine or its sidecar is missing, the sidecar is damaged, belongs to another engine file, or has
            a schema version that this release does not know.
    """
    engine, sidecar = Path(path), sidecar_path(path)
    if not engine.is_file():
        message = "no such file; `protnest export --target tensorrt-rtx` writes one"
        raise InputError(message, file=engine)
    if not sidecar.exists():
        message = f"its sidecar {sidecar.name} is missing: copy both files together, or export again"
        raise InputError(message, file=engine)
    facts = read_object(sidecar)
    check_schema_version(facts.get("schema_version"), SCHEMA_VERSION, file=sidecar)
    check_facts(facts, FACTS | _OF_ENGINES, file=sidecar)
    try:
        read_profiles(facts)
    except TypeError as error:
        message = f"has damaged metadata: `profiles` ({error})"
        raise InputError(message, file=sidecar) from error
    found = {"bytes": engine.stat().st_size, "blake2b": _digest(engine)}
    if found != facts["engine"]:
        message = (
            f"belongs to another engine file, of {facts['engine'].get('bytes')} bytes and hash "
            f"{facts['engine'].get('blake2b')}; {engine.name} has {found['bytes']} bytes and hash {found['blake2b']}: "
            "one of the two is damaged, or not of this export"
        )
        raise InputError(message, file=sidecar)
    return facts


def read_profiles(facts: dict[str, Any]) -> tuple[LengthProfile, ...]:
    """The profiles of an engine, shortest first, from the facts of its sidecar."""
    return tuple(LengthProfile(**each) for each in facts["profiles"])


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
