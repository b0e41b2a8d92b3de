"""Broken twins of whole files: the file with one line changed, loaded under a name of its own beside the true one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_mutant(name: str, changes: dict[str, str], folder: Path) -> ModuleType:
    """Loads `protnest.NAME` with lines changed.

    Args:
        name: such as "kernels.kd_chunked".
        changes: text that occurs once or more -> what takes its place.
        folder: where the changed file is written; Triton reads kernels' source from their file.
    """
    original = importlib.util.find_spec(f"protnest.{name}")
    assert original is not None
    assert original.origin is not None
    source = Path(original.origin).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in source, f"protnest.{name} has no {old!r} any more: the mutant is out of date"
        source = source.replace(old, new)
    path = folder / f"{name.rpartition('.')[2]}_mutant.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"protnest.{name}_mutant", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module
