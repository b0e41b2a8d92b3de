"""Broken twins of whole files: the file with one line changed, loaded under a name of its own beside the true one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from protnest.kernels.extension import load

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


@functools.cache
def compile_rest(without: str, folder: Path) -> tuple[Path, ...]:
    """Compiles the extension's files but one, without optimising them; skips the test where there is no compiler.

    Args:
        without: such as "kd_loss".
        folder: where the objects go, in a folder of their own.
    """
    if shutil.which("g++") is None or load() is None:
        pytest.skip("no compiler here")
    pybind11 = pytest.importorskip("pybind11")
    headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    into = folder / f"without_{without}"
    into.mkdir()
    objects = []
    for source in sorted(CSRC.glob("*.cpp")):
        if source.stem != without:
            objects.append(into / f"{source.stem}.o")
            options = ["-std=c++17", "-O0", "-fPIC", "-Wno-psabi", *headers]
            subprocess.run(["g++", *options, "-c", source, "-o", objects[-1]], check=True)
    return tuple(objects)


def load_cpp_mutant(source: str, changed: str, changes: dict[str, str], rest: Path, folder: Path) -> ModuleType:
    """Loads the extension with lines changed.

    Args:
        source: the file that is compiled anew, such as "row_passes".
        changed: the file with the lines: the same or a header of it, such as "row_numbers.hpp".
        changes: text that occurs once or more -> what takes its place.
        rest: where the other files' objects are kept, once for a whole session.
        folder: of this mutant alone.
    """
    objects = compile_rest(source, rest)
    for file in (CSRC / f"{source}.cpp", *CSRC.glob("*.hpp")):
        shutil.copy(file, folder)
    text = (folder / changed).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"{changed} has no {old!r} any more: the mutant is out of date"
        text = text.replace(old, new)
    (folder / changed).write_text(text, encoding="utf-8")
    library = folder / "_C.so"
    # From -O2 on products are joined with sums.
    options = ["-Wno-unused", "-Wno-psabi", "-std=c++17", "-O2", "-fPIC", "-fopenmp", "-shared"]
    # The mutant first: where another object holds the same inline function, the linker takes the first.
    subprocess.run(["g++", *options, folder / f"{source}.cpp", *objects, "-o", library], check=True)
    # A name of its own: pybind11 gives the same module for the same name.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._C", library)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant
