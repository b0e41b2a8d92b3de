"""Broken twins of whole files: the file with one line changed, loaded under a name of its own beside the true one.

Those of C++ are compiled with the rest of the extension, which `compile_rest` leaves as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


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


def compile_rest(name: str, folder: Path) -> list[Path]:
    """The extension's object files without that of csrc/NAME.cpp, not optimised. Skips where there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler here")
    pybind11 = pytest.importorskip("pybind11")
    headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"), CSRC)]
    made = []
    for source in sorted(CSRC.glob("*.cpp")):
        if source.stem == name:
            continue
        made.append(folder / f"{source.stem}.o")
        options = ["-std=c++17", "-O0", "-fPIC", "-Wno-psabi", "-c", *headers]
        subprocess.run(["g++", *options, source, "-o", made[-1]], check=True)
    return made


def load_cpp_mutant(
    names: Sequence[str], changes: dict[str, str], rest: Sequence[Path], folder: Path, level: str = "-O2"
) -> ModuleType:
    """Loads the extension with lines changed.

    Args:
        names: the source file, and headers of it, such as ("rotary_attention.cpp", "lanes.hpp").
        changes: text that occurs once or more in one of them -> what takes its place.
        rest: of `compile_rest`.
        folder: where the changed files and the extension are written.
        level: of optimisation.
    """
    sources = {name: (CSRC / name).read_text(encoding="utf-8") for name in names}
    for old, new in changes.items():
        holders = [name for name in names if old in sources[name]]
        assert len(holders) == 1, f"{old!r} is in {holders}, expected one of {names}: the mutant is out of date"
        sources[holders[0]] = sources[holders[0]].replace(old, new)
    # All headers, since one finds another beside itself first.
    sources = {path.name: path.read_text(encoding="utf-8") for path in CSRC.glob("*.hpp")} | sources
    for name, source in sources.items():
        (folder / name).write_text(source, encoding="utf-8")
    library = folder / "_C.so"
    options = ["-w", "-std=c++17", level, "-fPIC", "-fopenmp", "-shared"]
    # The mutant first: where another object holds the same inline function, the linker takes the first.
    subprocess.run(["g++", *options, folder / names[0], *rest, "-o", library], check=True)
    # A name of its own: pybind11 gives the same module for the same name.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._C", library)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant
