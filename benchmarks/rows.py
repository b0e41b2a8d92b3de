"""What a result holds: which machine, which versions, which commit; and how rows reach a file.

`benchmarks/README.md` explains every key.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from protnest.kernels.hardware import multiplies_bf16

Row = dict[str, Any]

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parents[1]
"""The checkout, where the benchmarks run from one."""

_PACKAGES = ("protnest", "torch", "triton", "numpy", "transformers", "fair-esm", "liger-kernel")


def _answer(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    # One line for each GPU; all share one driver.
    lines = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines and lines.splitlines()[0]


def find_commit() -> str | None:
    """The checkout's short commit, with `+` where files differ from it; None without git."""
    commit = _answer("git", "rev-parse", "--short", "HEAD")
    # With --porcelain, no output means no difference; `_answer` gives None for it.
    changed = _answer("git", "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def machine_facts(device: torch.device, *, commit: str | None = None) -> Row:
    """What every row says about where and when it was measured.

    Args:
        device: where the engines run.
        commit: what to write instead of what git says.
    """
    facts: Row = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or find_commit(),
        "device": "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_in_hardware": multiplies_bf16(device),
        "python": platform.python_version(),
        **{package.replace("-", "_"): _version(package) for package in _PACKAGES},
    }
    facts["torch"] = torch.__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "device_memory_bytes": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return facts


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to a file of JSON lines, which is made with its folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(lines)


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Writes one JSON document, whole or not at all, so that a run which is killed leaves its last state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as stream:
        stream.write(text)
    Path(stream.name).replace(path)
