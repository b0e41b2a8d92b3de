"""Engines of TensorRT-RTX, built without a GPU: what they take and give, what is said of them, what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from protnest.engine import Chain, InputError, onnx_export, tensorrt_export, tensorrt_sidecar
from protnest.engine.cli import app
from protnest.engine.length_profiles import LengthProfile, choose_profiles
from protnest.engine.onnx_export import export_onnx
from protnest.engine.tensorrt_execution import NEEDED
from protnest.engine.tensorrt_export import GPUS, EngineNetwork, check_target, export_tensorrt
from protnest.engine.tensorrt_sidecar import read_profiles, read_sidecar, sidecar_path
from typer.testing import CliRunner, Result

from support.exported import EXPORTED_WIDTHS, exported_family, tiny_export
from support.tiny import write_fasta

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'protnest[export]'")
onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")

RTX = ("sm86", "sm89", "sm120")
PROFILE = LengthProfile(fewest_tokens=3, best_tokens=10, most_tokens=22, best_rows=4, most_rows=8)


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tiny_export` holds, and the first model's graph in fp16 beside it: `fp16.onnx`."""
    place = tmp_path_factory.mktemp("tensorrt")
    shutil.copytree(tiny_export(), place, dirs_exist_ok=True)
    export_onnx(exported_family(place)[:1], place / "fp16.onnx", outputs=["mean"], precision="fp16")
    return place


def _without_tracing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is the tiny one, whatever was asked for: tracing takes seconds."""
    monkeypatch.setattr(onnx_export, "_trace", lambda *given: onnx_ir.load(str(folder / "tiny.onnx")))


def _without_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineNetwork, "build", lambda *given: b"an engine")


def test_engine_by_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_tracing(folder, monkeypatch)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tensorrt_export.tempfile, "tempdir", str(scratch))
    at_build: list[list[str]] = []
    build = EngineNetwork.build

    def watched(network: EngineNetwork, gpus: Any, profiles: Any) -> Any:
        at_build.append([each.name for each in scratch.iterdir()])
        assert network.inputs == {"tokens": ("INT64", (-1, -1))}
        assert network.outputs == {
            "nested": ("FLOAT", (-1, 24)),
            "logits": ("FLOAT", (-1, -1, 33)),
            "residue": ("FLOAT", (-1, -1, 24)),
            "mean": ("FLOAT", (-1, 24)),
        }
        return build(network, gpus, profiles)

    monkeypatch.setattr(EngineNetwork, "build", watched)
    library = write_fasta(tmp_path / "library.fasta", ["A" * 4, "M1K", "A" * 18, "A" * 40])
    out = tmp_path / "out" / "m.engine"
    models = ",".join(str(folder / f"tiny{width}") for width in EXPORTED_WIDTHS)
    done = _invoke(
        *("export", "--model", models, "--chain", folder / "tiny.chain", "--outputs", "nested,logits,residue,mean"),
        *("--target", "tensorrt-rtx", "--gpu", "sm86, sm89,sm120", "--lengths", library, "--profiles", 2),
        *("--max-tokens", 100, "--out", out, "--json"),
    )
    assert done.exit_code == 0, done.output
    assert at_build == [[]]  # The graph's file is gone before the long part begins.
    assert not list(scratch.iterdir())
    assert sorted(each.name for each in out.parent.iterdir()) == ["m.engine", "m.engine.json"]
    engine = out.read_bytes()
    weights_bytes = sum(each.numel() * 4 for encoder in exported_family(folder) for each in encoder.parameters())
    assert len(engine) > weights_bytes
    for name in ("tokens", "nested", "logits", "residue", "mean"):
        assert name.encode() in engine, name
    facts, report = read_sidecar(out), json.loads(done.stdout)
    assert {name: facts[name] for name in facts if name not in ("schema_version", "engine")}.items() <= report.items()
    chain = Chain.load(folder / "tiny.chain")
    assert [each["fingerprint"] for each in facts["models"]] == [each.fingerprint for each in exported_family(folder)]
    assert (facts["chain"], facts["target"], facts["gpus"]) == (chain.fingerprint, "tensorrt-rtx", list(RTX))
    assert facts["versions"]["tensorrt-rtx"] == trt.__version__
    assert facts["engine"]["bytes"] == len(engine)
    assert list(facts["outputs"]) == ["nested", "logits", "residue", "mean"]
    assert read_profiles(facts) == choose_profiles([4, 3, 18, 40], count=2, max_residues=20, max_tokens=100)
    assert len(facts["profiles"]) == 2
    assert facts["limits"]["max_residues"] == 20


@pytest.mark.parametrize(("precision", "gpus"), [("fp32", RTX), ("fp16", RTX), ("fp16", ("sm75",))])
def test_builds_of_a_tiny_encoder(folder: Path, precision: str, gpus: tuple[str, ...]) -> None:
    network = EngineNetwork(trt, folder / ("tiny.onnx" if precision == "fp32" else "fp16.onnx"))
    engine = bytes(network.build(gpus, [PROFILE]))
    assert network.outputs["mean"] == ("FLOAT", (-1, 24 if precision == "fp32" else 16))
    assert b"mean" in engine
    assert not network.logger.errors


def test_info_prints_the_sidecar(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _export_made_up(folder, tmp_path, monkeypatch)
    done = _invoke("info", out)
    assert done.exit_code == 0
    for shown in ("sm86, sm89, sm120", "tensorrt-rtx", "3 to 22 tokens, up to 372 rows", "9 bytes, hash", "nested"):
        assert shown in done.stdout, shown
    assert json.loads(_invoke("info", out, "--json").stdout) == read_sidecar(out)
    out.write_bytes(b"another!!")
    done = _invoke("info", out)
    assert done.exit_code == 1
    assert "belongs to another engine file" in " ".join(done.output.split())


def _export_made_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """`m.engine`, whose bytes are made up and whose sidecar is not."""
    _without_tracing(folder, monkeypatch)
    _without_building(monkeypatch)
    chain = Chain.load(folder / "tiny.chain")
    options = {"chain": chain, "profiles": 1, **options}
    export_tensorrt(exported_family(folder), tmp_path / "m.engine", **options)
    return tmp_path / "m.engine"


def test_sidecars_that_do_not_belong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _export_made_up(folder, tmp_path, monkeypatch)
    good = json.loads(sidecar_path(out).read_text())
    assert read_sidecar(out) == good
    for changed, said in (
        ("{", r"m\.engine\.json: not readable as JSON \("),
        ("[]", "holds no JSON object"),
        (json.dumps({**good, "schema_version": 9}), "has schema version 9, this release reads 1"),
        (json.dumps({name: good[name] for name in good if name != "gpus"}), "it lacks `gpus`"),
        (json.dumps({**good, "engine": {**good["engine"], "bytes": 8}}), "belongs to another engine file, of 8 bytes"),
        (json.dumps({**good, "engine": {"bytes": 9, "blake2b": "ab"}}), "another engine file, of 9 bytes and hash ab"),
    ):
        sidecar_path(out).write_text(changed)
        with pytest.raises(InputError, match=said):
            read_sidecar(out)
    sidecar_path(out).unlink()
    with pytest.raises(InputError, match=r"m\.engine: its sidecar m\.engine\.json is missing"):
        read_sidecar(out)
    with pytest.raises(InputError, match=r"none\.engine: no such file"):
        read_sidecar(tmp_path / "none.engine")


@pytest.mark.parametrize("failing", ["m.engine", "m.engine.json"])
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, old: bool
) -> None:
    before = {"m.engine": "the old one", "m.engine.json": "of the old one"} if old else {}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == failing and failing == "m.engine.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    if failing == "m.engine":
        monkeypatch.setattr(tensorrt_export, "seal_facts", _no_space)
    with pytest.raises(OSError, match="No space left"):
        _export_made_up(folder, tmp_path, monkeypatch)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == before


def _no_space(*given: object) -> str:
    raise OSError(28, "No space left on device")


def test_a_late_failure_leaves_no_sidecar_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: _no_space() if to.suffix == ".engine" else replace(self, to))
    with pytest.raises(OSError, match="No space left"):
        _export_made_up(folder, tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())


def test_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.engine"
    for target, path, gpus, precision, said in (
        ("openvino", out, None, "fp32", "target 'openvino' is unknown; engines are tensorrt-rtx or tensorrt"),
        ("tensorrt-rtx", tmp_path / "m.onnx", None, "fp32", r"m\.onnx: the file's name must end in \.engine"),
        ("tensorrt-rtx", out, ["sm86", "sm90"], "fp32", f"GPU 'sm90' is unknown; allowed: {', '.join(GPUS)}"),
        ("tensorrt-rtx", out, ["sm86", "sm86"], "fp32", "GPU 'sm86' is there twice"),
        ("tensorrt-rtx", out, [], "fp32", "no GPU is named; allowed: sm75"),
        ("tensorrt-rtx", out, ["sm75"], "fp32", "sm75 multiplies matrices in fp16 alone, and precision is 'fp32'"),
        ("tensorrt-rtx", out, ["sm75", "sm86"], "fp16", "sm75 needs an engine of its own"),
        ("tensorrt", out, ["sm86"], "fp16", "tensorrt builds for the GPU of this machine and takes no list"),
    ):
        with pytest.raises(InputError, match=said):
            check_target(path, target, gpus, precision)
    assert check_target(out, "tensorrt-rtx", None, "fp32") == RTX
    assert check_target(out, "tensorrt-rtx", ["sm75"], "fp16") == ("sm75",)
    out.mkdir()
    with pytest.raises(InputError, match=r"m\.engine: is a folder"):
        check_target(out, "tensorrt-rtx", None, "fp32")
    done = _invoke("export", "--target", "tensorrt-rtx", "--gpu", "sm90", "--out", tmp_path / "x.engine")
    assert done.exit_code == 1
    assert "GPU 'sm90' is unknown" in " ".join(done.output.split())
    assert _invoke("export", "--gpu", "sm86", "--out", tmp_path / "x.onnx").exit_code == 2


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "tensorrt_rtx"])
def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name))
    with pytest.raises(InputError, match=rf"needs {missing}: pip install 'protnest\[export\]'"):
        check_target(tmp_path / "m.engine", "tensorrt-rtx", None, "fp32")


def test_plain_tensorrt_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    there: list[object] = [None, object()]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: there[0] if name == "tensorrt" else found(name)
    )
    with pytest.raises(InputError, match=r"needs tensorrt, which is in none of the extras: `pip install tensorrt`"):
        check_target(tmp_path / "m.engine", "tensorrt", None, "fp32")
    there.pop(0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees none; tensorrt-rtx needs none"):
        check_target(tmp_path / "m.engine", "tensorrt", None, "fp32")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (12, 0))
    assert check_target(tmp_path / "m.engine", "tensorrt", None, "fp32") == ("sm120",)


def test_a_package_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_export, "TARGETS", {"tensorrt-rtx": "no_such_package"})
    with pytest.raises(InputError, match="no_such_package cannot be loaded"):
        tensorrt_export.load_target("tensorrt-rtx")


def test_the_parser_says_why(tmp_path: Path) -> None:
    helper = onnx.helper
    value = helper.make_tensor_value_info("tokens", onnx.TensorProto.FLOAT, ["batch"])
    given = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch"])
    node = helper.make_node("NoSuchThing", ["tokens"], ["y"], name="the_node")
    graph = helper.make_graph([node], "g", [value], [given])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "odd.onnx"))
    with pytest.raises(InputError, match=r"odd\.onnx: tensorrt_rtx does not take .* 'the_node' \(NoSuch"):
        EngineNetwork(trt, tmp_path / "odd.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(InputError, match=r"text\.onnx: tensorrt_rtx does not take the graph: \S+"):
        EngineNetwork(trt, tmp_path / "text.onnx")


def test_the_builder_says_why(folder: Path) -> None:
    network = EngineNetwork(trt, folder / "tiny.onnx")
    backwards = LengthProfile(fewest_tokens=9, best_tokens=5, most_tokens=22, best_rows=1, most_rows=1)
    with pytest.raises(InputError, match=r"does not take the profile \(\(1, 9\), \(1, 5\), \(1, 22\)\): \S+"):
        network.build(RTX, [backwards])
    with pytest.raises(InputError, match="does not build for sm99"):
        network.build(["sm99"], [PROFILE])
    with pytest.raises(InputError, match=r"tensorrt_rtx [\d.]+ builds no engine for sm75: .*[Tt]uring|FP32"):
        network.build(["sm75"], [PROFILE])


def test_what_the_package_keeps_silent_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None and False without a word in the log."""
    builder = SimpleNamespace(create_network=lambda flags: None)
    silent = SimpleNamespace(**{name: getattr(trt, name) for name in ("__version__", "ILogger", "__name__")})
    silent.NetworkDefinitionCreationFlag = trt.NetworkDefinitionCreationFlag
    silent.Builder = lambda logger: builder
    with pytest.raises(InputError, match="makes no network: it gave no reason"):
        EngineNetwork(silent, folder / "tiny.onnx")
    network = EngineNetwork(trt, folder / "tiny.onnx")
    made = network._builder
    config = SimpleNamespace(set_compute_capability=lambda *given: False)
    network._builder = SimpleNamespace(create_builder_config=lambda: None)
    with pytest.raises(InputError, match="makes no configuration: it gave no reason"):
        network.build((), [PROFILE])
    network._builder = SimpleNamespace(create_builder_config=lambda: config)
    with pytest.raises(InputError, match="does not build for sm86: it gave no reason"):
        network.build(["sm86"], [PROFILE])
    network._builder = SimpleNamespace(
        create_builder_config=made.create_builder_config,
        create_optimization_profile=made.create_optimization_profile,
        build_serialized_network=lambda *given: None,
    )
    with pytest.raises(InputError, match="builds no engine for this GPU: it gave no reason"):
        network.build((), [PROFILE])


def test_the_package_has_what_running_calls() -> None:
    for owner, names in NEEDED.items():
        for name in names:
            assert hasattr(getattr(trt, owner), name), f"{owner}.{name}"


def test_wrong_numbers_are_told_before_the_graph(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_export, "export_onnx", lambda *given, **options: pytest.fail("too late"))
    for options, said in (({"profiles": 0}, "profiles must be"), ({"lengths": []}, "lengths must be 1 or more, got n")):
        with pytest.raises(InputError, match=said):
            export_tensorrt(exported_family(folder)[:1], tmp_path / "m.engine", **options)


def test_sidecar_names() -> None:
    assert sidecar_path("out/m.engine") == Path("out/m.engine.json")
    assert tensorrt_sidecar.is_engine("a/b.engine")
    assert not tensorrt_sidecar.is_engine("a/b.engine.json")
