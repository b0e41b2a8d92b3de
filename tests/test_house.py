"""The house stays in order: who imports whom, what is packaged, what the README's map says, what an import does."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "engine", "training", "benchmarks")
"""From left to right: each may import those before it, never those after it."""


def _git_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: the list of files is git's")
    return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def _modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def _imported_folders(path: Path) -> set[str]:
    """The folders of this project that a module imports from, relatively or by full name."""
    package = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            if node.level > len(package):
                base = []
            full = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [full] if full else []
            names += [f"{full}.{alias.name}".strip(".") for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.removeprefix("protnest.").split(".")
            if name.startswith("protnest.") or (isinstance(node, ast.ImportFrom) and node.level):
                found.add(parts[0])
    return found & set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_leftward(folder: str) -> None:
    allowed = set(FOLDERS[: FOLDERS.index(folder) + 1])
    for path in _modules(folder):
        rightward = _imported_folders(path) - allowed
        assert not rightward, f"{path.relative_to(ROOT)} imports {sorted(rightward)}; {folder} may import {allowed}"


def test_direction_check_sees_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    spellings = (
        "from ..training.masking import mask_tokens",
        "from .. import training",
        "from protnest.training import masking",
        "import protnest.training.masking",
        "from protnest import training",
    )
    for spelling in spellings:
        module = tmp_path / "kernels" / "bad.py"
        module.write_text(f"def late():\n    {spelling}\n")
        assert _imported_folders(module) == {"training"}, spelling


def test_engine_never_imports_triton() -> None:
    for path in _modules("engine"):
        assert not re.search(r"^\s*(import|from) triton", path.read_text(), re.MULTILINE), path


def test_setup_lists_every_package() -> None:
    """Every folder with an `__init__.py` below the four is packaged, and nothing else is."""
    script = (
        "import setuptools, json, sys; keep = {}; setuptools.setup = lambda **given: keep.update(given); "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec')); print(json.dumps(keep['packages']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    import json

    packaged = set(json.loads(done.stdout))
    there = {
        "protnest." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert packaged == there


def test_setup_packages_everything_bundled() -> None:
    script = (
        "import setuptools, json; keep = {}; setuptools.setup = lambda **given: keep.update(given); "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec')); print(json.dumps(keep['package_data']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    import json

    patterns = json.loads(done.stdout)["protnest.engine"]
    shipped = {path for path in _git_files() if path.startswith("engine/bundled/")}
    shipped |= {"engine/bundled/nano.chain", "engine/bundled/nano-m/README.md"}
    for path in shipped:
        name = PurePath(path).relative_to("engine")
        is_packaged = any(len(PurePath(each).parts) == len(name.parts) and name.match(each) for each in patterns)
        assert is_packaged, f"{path} is in no wheel: package_data has {patterns}"


def test_readme_map_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = re.search(r"<!-- map -->\n```\n(.*?)```\n<!-- end of map -->", readme, re.DOTALL)
    assert mapped, "the README has no file map between its two marks"
    listed: set[str] = set()
    folder = ""
    for line in mapped[1].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            listed.add(folder + name)
        else:
            folder = name if name.endswith("/") else ""
            listed.add(name)
    wanted = {name for name in _git_files() if name.endswith((".py", ".cpp", ".hpp")) and not name.startswith("tests/")}
    wanted = {name for name in wanted if not name.endswith("__init__.py")}
    assert not wanted - listed, f"missing in the README's map: {sorted(wanted - listed)}"
    gone = {name for name in listed if not (ROOT / name).exists()}
    assert not gone, f"in the README's map, but not there: {sorted(gone)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_folder_names_are_refused(folder: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert f"import protnest.{folder}, not {folder}" in done.stderr


_WATCH = """
import socket, sys
def refuse(*args, **kwargs):
    raise SystemExit("an import opened a network connection")
socket.socket.connect = refuse
socket.create_connection = refuse
import importlib, logging, pkgutil
import protnest.{folder} as package
handlers = list(logging.getLogger().handlers)
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    # Whoever imports a Triton twin wants Triton.
    if not module.name.endswith("._C") and ".gpu." not in module.name:
        importlib.import_module(module.name)
torch = sys.modules.get("torch")
assert torch is None or not torch.cuda.is_initialized(), "CUDA was started"
assert "triton" not in sys.modules, "Triton was imported"
assert logging.getLogger().handlers == handlers, "logging was configured"
print("quiet")
"""


@pytest.mark.parametrize("folder", FOLDERS)
def test_importing_does_nothing(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WATCH.format(folder=folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "quiet", done.stderr


def test_importing_the_public_names_is_light() -> None:
    """`protnest --help` must not wait for torch."""
    commands = "protnest.engine.cli, protnest.training.cli, protnest.benchmarks.cli"
    script = f"import sys, protnest.engine, {commands}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_resolve() -> None:
    import protnest.engine

    for name in protnest.engine.__all__:
        assert getattr(protnest.engine, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = protnest.engine.nothing


@pytest.mark.skipif("PROTNEST_WHEEL" not in os.environ, reason="make wheel builds the wheel and sets PROTNEST_WHEEL")
def test_wheel_holds_the_packages_and_nothing_else() -> None:
    wheel = Path(os.environ["PROTNEST_WHEEL"])
    files = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name and not name.startswith(("bin/", "protnest-"))}
    assert {name.split("/")[0] for name in files} == {"protnest"}
    expected = {
        f"protnest/{name}"
        for name in _git_files()
        if name.split("/")[0] in FOLDERS
        and name.endswith((".py", ".typed", ".safetensors", "config.json", "vocab.txt"))
    }
    expected |= {f"protnest/{name}" for name in _git_files() if name.startswith(("engine/bundled/", "engine/pages/"))}
    extension = {name for name in files if re.fullmatch(r"protnest/kernels/_C\..*\.so", name)}
    assert len(extension) == 1
    assert files - extension == expected
