"""What cannot be exported or run, in Python and by the command line: exit code 1, what to do, and nothing left behind.

A command that ends by an exception has exit code 1 as well, so that each is asked for `SystemExit`.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import Chain, InputError, load_model, onnx_export, tensorrt_execution, tensorrt_export
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.engine.export_facts import FACTS
from protnest.engine.onnx_export import check_out, export_onnx
from protnest.engine.onnx_model import read_facts
from protnest.engine.onnx_runner import OnnxRunner
from protnest.engine.tensorrt_export import EngineNetwork, export_tensorrt
from protnest.engine.tensorrt_sidecar import read_sidecar, sidecar_path
from typer.testing import CliRunner

from support.exported import exported_family, made_up_engine, tiny_export, with_outputs
from support.families import random_chain, tiny_family
from support.tiny import write_fasta

onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

LONG = "A" * 21
"""One residue more than the tiny family takes."""
ENGINE_OPTIONS = ("--target", "tensorrt-rtx")


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_export()


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Path:
    return made_up_engine(folder / "tiny.onnx", tmp_path / "m.engine")


def _refused(*arguments: object) -> str:
    """What a command says that ends with exit code 1, by its own will."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert not done.stdout
    return " ".join(done.stderr.split())


def _embed_refused(tmp_path: Path, model: Path, *options: object, protein: str = "MKT") -> str:
    fasta = write_fasta(tmp_path / "in.fasta", [protein])
    return _refused("embed", fasta, "--out", tmp_path / "out", "--model", model, *options)


def _held(folder: Path) -> dict[str, str]:
    """Names and contents of the files in a folder."""
    return {each.name: each.read_text() for each in folder.iterdir()}


class _StandIn:
    """In place of a GPU: ONNX Runtime with the graph that the engine would have been built from."""

    def __init__(self, path: Path, facts: object, *, device: str) -> None:
        self._runner = OnnxRunner(tiny_export() / "tiny.onnx")

    def run(self, profile: int, tokens_RL: np.ndarray, outputs: Sequence[str], /) -> dict[str, np.ndarray]:
        return self._runner.run_tokens(tokens_RL, outputs)


# ---- lengths, GPUs, chains


def test_a_length_beyond_the_profile(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_execution, "EngineExecution", _StandIn)
    said = _embed_refused(tmp_path, engine, protein=LONG)
    for words in ("in.fasta, line", "protein0", "21 residues", "m.engine takes at most 20 residues", "--long truncate"):
        assert words in said, words
    loaded: Any = load_model(engine)
    with pytest.raises(InputError, match=r"m\.engine: a run of 21 residues, but the file takes at most 20"):
        loaded.encode([LONG])
    assert loaded.encode([LONG[1:]])[0].shape == (20, 24)


def test_a_gpu_of_another_generation(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_execution, "require", lambda *names: None)
    monkeypatch.setattr(tensorrt_execution, "load_target", lambda target: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 5090")
    words = "is built for sm86, sm89, and this GPU (RTX 5090) is sm120: `protnest export --target tensorrt-rtx --gpu sm"
    assert f"m.engine: {words}120`" in _embed_refused(tmp_path, engine)
    with pytest.raises(InputError, match=r"this GPU \(RTX 5090\) is sm120"):
        load_model(engine)


def test_no_gpu(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_execution, "require", lambda *names: None)
    monkeypatch.setattr(tensorrt_execution, "load_target", lambda target: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "m.engine: runs on a GPU alone, and torch sees none" in _embed_refused(tmp_path, engine)


def test_a_changed_chain(folder: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_execution, "EngineExecution", _StandIn)
    random_chain(exported_family(folder), seed=1).save(tmp_path / "other.chain")
    for model in (engine, folder / "tiny.onnx"):
        said = _embed_refused(tmp_path, model, "--chain", tmp_path / "other.chain")
        assert f"{model.name}: the chain has changed since the export: its hash is" in said
        assert Chain.load(tmp_path / "other.chain").fingerprint in said


@pytest.mark.parametrize("options", [(), ENGINE_OPTIONS], ids=["onnx", "tensorrt-rtx"])
def test_models_that_are_not_the_chains(folder: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    if options:
        pytest.importorskip("tensorrt_rtx")
    changed = tmp_path / "changed"
    save_checkpoint(tiny_family((16, 24), seed=7)[1], changed / "tiny24")
    out = tmp_path / "out" / f"m.{'engine' if options else 'onnx'}"
    models = f"{folder / 'tiny16'},{changed / 'tiny24'}"
    said = _refused("export", "--model", models, "--chain", folder / "tiny.chain", "--out", out, *options)
    assert "another checkpoint of that width" in said
    assert not out.parent.exists()


# ---- packages


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("onnx", "export onnx"),
        ("onnxscript", "export onnx"),
        ("onnx", "export tensorrt-rtx"),
        ("onnxscript", "export tensorrt-rtx"),
        ("tensorrt_rtx", "export tensorrt-rtx"),
        ("onnx", "info"),
        ("onnx", "embed onnx"),
        ("onnxruntime", "embed onnx"),
        ("onnxruntime", "score onnx"),
        ("tensorrt_rtx", "embed engine"),
    ],
)
def test_missing_packages_name_the_extra(
    folder: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, command: str
) -> None:
    found = importlib.util.find_spec
    there = {"tensorrt_rtx": object()}  # What is not missing is there, whatever this machine has.
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else there.get(name) or found(name)
    )
    verb, _, kind = command.partition(" ")
    fasta, out = write_fasta(tmp_path / "in.fasta", ["MKT"]), tmp_path / "out"
    model = engine if kind == "engine" else folder / "tiny.onnx"
    suffix = "onnx" if kind == "onnx" else "engine"
    words: dict[str, tuple[object, ...]] = {
        # A model that is not there: what is missing is told first.
        "export": ("--target", kind, "--model", "no-such-model", "--out", out / f"x.{suffix}"),
        "info": (folder / "tiny.onnx",),
        "embed": (fasta, "--model", model, "--out", out),
        "score": ("--wt", fasta, "--all-singles", "--model", model, "--out", out / "s.csv"),
    }
    assert f"needs {missing}: pip install 'protnest[export]'" in _refused(verb, *words[verb])
    assert not out.exists()


# ---- full disks


@contextmanager
def _disk_for(most_bytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes: writing fails where it would on a full disk, if by another number."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the tiny graph, and an engine of 600 kB: tracing and building take seconds."""
    monkeypatch.setattr(onnx_export, "_trace", lambda *given: onnx_ir.load(str(folder / "tiny.onnx")))
    monkeypatch.setattr(tensorrt_export, "load_target", lambda target: SimpleNamespace(__version__="0"))
    monkeypatch.setattr(EngineNetwork, "__init__", lambda *given: None)
    monkeypatch.setattr(EngineNetwork, "build", lambda *given: b"engine" * 100_000)


FULL = os.strerror(errno.EFBIG)


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("before", [{}, {"m.onnx": "the old one"}], ids=["new", "old"])
@pytest.mark.parametrize("most_bytes", [0, 512, 100_000])
def test_a_full_disk_under_a_graph(folder: Path, tmp_path: Path, before: dict[str, str], most_bytes: int) -> None:
    out = tmp_path / "new" / "m.onnx"
    out.parent.mkdir()
    for name, text in before.items():
        (out.parent / name).write_text(text)
    family = exported_family(folder)[:1]
    with _disk_for(most_bytes):
        said = _refused("export", "--model", folder / "tiny16", "--outputs", "mean", "--out", out)
        with pytest.raises(OSError, match=FULL):
            export_onnx(family, out, outputs=["mean"])
        # Weights in a file of their own, where the graph or they fail.
        with pytest.raises(OSError, match=FULL):
            export_onnx(family, out, outputs=["mean"], most_inline_bytes=100)
    assert f"{out}: {FULL}" in said
    assert _held(out.parent) == before


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    "before", [{}, {"m.engine": "the old one", "m.engine.json": "the old one's"}], ids=["new", "old"]
)
@pytest.mark.parametrize("most_bytes", [512, 500_000])
def test_a_full_disk_under_an_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str], most_bytes: int
) -> None:
    pytest.importorskip("tensorrt_rtx")
    scratch, out = tmp_path / "scratch", tmp_path / "new" / "m.engine"
    for place in (scratch, out.parent):
        place.mkdir()
    monkeypatch.setattr(tensorrt_export.tempfile, "tempdir", str(scratch))
    for name, text in before.items():
        (out.parent / name).write_text(text)
    assert 512 < (folder / "tiny.onnx").stat().st_size < 500_000
    with _disk_for(most_bytes):
        options = (*ENGINE_OPTIONS, "--model", folder / "tiny16", "--outputs", "mean")
        said = _refused("export", *options, "--out", out)
        with pytest.raises(OSError, match=FULL):
            export_tensorrt(exported_family(folder)[:1], out, outputs=["mean"])
    # Which disk it is: that of temporary files, or the engine's.
    assert f"{scratch if most_bytes == 512 else out.parent}{os.sep}" in said
    assert FULL in said
    assert not list(scratch.iterdir())
    assert _held(out.parent) == before


@pytest.mark.usefixtures("ready")
def test_a_sidecar_comes_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    before = {"m.engine": "the old one", "m.engine.json": "the old one's"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    replace = Path.replace

    def failing(self: Path, to: Path) -> Path:
        if to.name == "m.engine":
            raise OSError(errno.EIO, "a disk that breaks")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="a disk that breaks"):
        export_tensorrt(exported_family(folder)[:1], tmp_path / "m.engine", outputs=["mean"])
    assert _held(tmp_path) == before


# ---- where it goes


@pytest.mark.parametrize("target", ["onnx", "tensorrt-rtx"])
def test_places_that_take_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Told before a model is read: there is none of that name."""
    if target != "onnx":
        pytest.importorskip("tensorrt_rtx")
    suffix = ".onnx" if target == "onnx" else ".engine"
    (tmp_path / f"taken{suffix}").mkdir()
    (tmp_path / "file").write_text("")
    for name, said in (
        (f"taken{suffix}", "is a folder; an export is a file"),
        ("m.bin", f"the file's name must end in {suffix}, by which it is known"),
        (f"file/m{suffix}", f"cannot be written: {tmp_path / 'file'} is no folder"),
    ):
        found = _refused("export", "--target", target, "--model", "no-such-model", "--out", tmp_path / name)
        assert f"{tmp_path / name}: {said}" in found
        with pytest.raises(InputError, match=said.split(":")[0]):
            check_out(tmp_path / name, suffix)
    before = sorted(tmp_path.rglob("*"))
    asked: list[object] = []
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    out = tmp_path / "new" / "deep" / f"m{suffix}"
    found = _refused("export", "--target", target, "--model", "no-such-model", "--out", out)
    assert f"{out}: cannot be written: {tmp_path} takes no files of this user's" in found
    assert (tmp_path, os.W_OK | os.X_OK) in asked
    assert sorted(tmp_path.rglob("*")) == before


def test_both_exports_look_at_the_place_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_trace", lambda *given: pytest.fail("too late"))
    export: Callable[..., object]
    for export, name in ((export_onnx, "m.onnx"), (export_tensorrt, "m.engine")):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="is a folder"):
            export(exported_family(folder)[:1], tmp_path / name)


# ---- damaged files


def _damaged_graphs(folder: Path, place: Path) -> dict[Path, str]:
    """Files, and what is said of each."""
    whole, path = (folder / "tiny.onnx").read_bytes(), folder / "tiny.onnx"
    (place / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (place / "empty.onnx").write_bytes(b"")
    model = read_facts(path)["models"][0]
    changed: dict[str, tuple[dict[str, Any], str]] = {
        "text": ({"widths": "24"}, "has damaged metadata: `widths` is '24'"),
        "limits": ({"limits": {"max_tokens": 22}}, "has damaged metadata: `limits` is {'max_tokens': 22}"),
        "none": ({"models": []}, "has damaged metadata: `models` is 'none'"),
        "bare": ({"models": [{"name": "m"}]}, "has damaged metadata: `models` is {'name': 'm'}"),
        "size": ({"models": [model | {"config": {"depth": 3}}]}, "has damaged metadata: `config` of tiny16 ("),
        "heads": ({"models": [model | {"config": model["config"] | {"heads": 0}}]}, "heads must be a positive whole"),
    }
    for name, (facts, _) in changed.items():
        with_outputs(path, ["mean"], place / f"{name}.onnx", **facts)
    return {
        place / "half.onnx": "not a readable ONNX file",
        place / "empty.onnx": "is no export of protnest",
        **{place / f"{name}.onnx": said for name, (_, said) in changed.items()},
    }


def test_damaged_graphs(folder: Path, tmp_path: Path) -> None:
    for path, said in _damaged_graphs(folder, tmp_path).items():
        with pytest.raises(InputError) as raised:
            load_model(path, device="cpu")
        assert f"{path}: " in str(raised.value)
        assert said in str(raised.value)
        assert said in _refused("info", path)
        assert said in _embed_refused(tmp_path, path)


@pytest.mark.parametrize("kept", [0, 1000, None])
def test_weights_that_are_not_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Any) -> None:
    monkeypatch.setattr(onnx_export, "_trace", lambda *given: onnx_ir.load(str(folder / "tiny.onnx")))
    chain = Chain.load(folder / "tiny.chain")
    export_onnx(exported_family(folder), tmp_path / "m.onnx", chain=chain, outputs=["nested"], most_inline_bytes=100)
    (data,) = tmp_path.glob("*.data")
    if kept is None:
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:kept])
    assert "m.onnx: ONNX Runtime does not take it (" in _embed_refused(tmp_path, tmp_path / "m.onnx")


def test_every_fact_is_asked_for(folder: Path, engine: Path, tmp_path: Path) -> None:
    """A sidecar and the metadata of a graph, each without one of their facts."""
    held = json.loads(sidecar_path(engine).read_text())
    for name in (*FACTS, "target", "gpus", "profiles", "engine"):
        sidecar_path(engine).write_text(json.dumps({key: held[key] for key in held if key != name}))
        with pytest.raises(InputError, match=rf"m\.engine\.json: .* it lacks `{name}`"):
            read_sidecar(engine)
    graph = onnx.load(str(folder / "tiny.onnx"))
    for name in FACTS:
        facts = {key: held[key] for key in held if key != name}
        del graph.metadata_props[:]
        onnx.helper.set_model_props(graph, {"schema_version": "1", "protnest": json.dumps(facts)})
        onnx.save(graph, str(tmp_path / "m.onnx"))
        with pytest.raises(InputError, match=rf"m\.onnx: .* it lacks `{name}`"):
            read_facts(tmp_path / "m.onnx")
    onnx.helper.set_model_props(graph, {"schema_version": "1", "protnest": "[1]"})
    onnx.save(graph, str(tmp_path / "m.onnx"))
    with pytest.raises(InputError, match=r"m\.onnx: has damaged metadata"):
        read_facts(tmp_path / "m.onnx")


def test_engines_and_sidecars_that_do_not_belong(folder: Path, engine: Path, tmp_path: Path) -> None:
    good, sidecar = sidecar_path(engine).read_text(), sidecar_path(engine)
    facts = json.loads(good)
    other = made_up_engine(folder / "tiny.onnx", tmp_path / "other.engine")
    other.write_bytes(b"of more bytes")
    shutil.copy(sidecar, sidecar_path(other))
    cases: list[tuple[Path, str | None, str]] = [
        (engine, "{", "m.engine.json: not readable as JSON"),
        (engine, json.dumps(facts | {"profiles": [{"rows": 3}]}), "m.engine.json: has damaged metadata: `profiles` ("),
        (engine, json.dumps(facts | {"target": "openvino"}), "target 'openvino' is unknown"),
        (engine, None, "m.engine: its sidecar m.engine.json is missing"),
        (other, good, "other.engine.json: belongs to another engine file, of 7 bytes"),
        (tmp_path / "none.engine", good, "none.engine: no such file"),
    ]
    for path, text, said in cases:
        sidecar.unlink(missing_ok=True)
        if text is not None:
            sidecar.write_text(text)
        assert said in _embed_refused(tmp_path, path)
        if "openvino" not in said:  # What it is stands there all the same.
            assert said in _refused("info", path)
        with pytest.raises(InputError):
            load_model(path)
    sidecar.write_text(good)
    engine.write_bytes(engine.read_bytes()[:3])
    assert "belongs to another engine file" in _refused("info", engine)
    assert "m.engine has 3 bytes" in _refused("info", engine)


def test_the_executable_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a graph")
    words = [sys.executable, "-m", "protnest.engine.cli", "info", str(tmp_path / "text.onnx")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "text.onnx: not a readable ONNX file" in done.stderr
    assert "Traceback" not in done.stderr
