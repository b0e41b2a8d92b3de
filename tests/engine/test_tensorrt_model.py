"""Engines at work: which profile runs a batch, how it is cut, what is refused; and on a GPU what comes out."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError, load_model, tensorrt_execution, tensorrt_sidecar
from protnest.engine.exported_encoder import ExportedEncoder
from protnest.engine.length_profiles import choose_profiles
from protnest.engine.models import load_encoder
from protnest.engine.onnx_model import pad_tokens, read_facts
from protnest.engine.onnx_runner import OnnxRunner
from protnest.engine.packing import pack
from protnest.engine.tensorrt_execution import EngineExecution, check_gpu
from protnest.engine.tensorrt_export import export_tensorrt
from protnest.engine.tensorrt_model import TensorRTModel
from protnest.engine.tensorrt_sidecar import seal_facts, sidecar_path

from support.exported import exported_family, tiny_export, with_outputs
from support.learning import TOY

pytestmark = pytest.mark.export

FACTS: dict[str, Any] = {
    "target": "tensorrt-rtx",
    "models": [{"name": "toy", "width": 16, "fingerprint": "ab", "config": dataclasses.asdict(TOY)}],
    "language_head": None,
    "chain": None,
    "widths": [16],
    "precision": "fp32",
    "opset": 20,
    "outputs": {"residue": ["batch", "length", 4], "mean": ["batch", 4]},
    "limits": {"max_residues": 20, "max_tokens": 22},
    "gpus": ["sm86", "sm89"],
    # Ranges 3 to 7, 8 to 12 and 13 to 22; 5, 3 and 1 rows.
    "profiles": [
        dataclasses.asdict(each) for each in choose_profiles([5, 10, 20], count=3, max_residues=20, max_tokens=37)
    ],
    "versions": {"tensorrt-rtx": "1.7.1.116"},
}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A file of made-up bytes with a sidecar."""
    path = tmp_path / "m.engine"
    path.write_bytes(b"made up")
    sidecar_path(path).write_text(seal_facts(FACTS, path))
    return path


class StandIn:
    """In place of a GPU: gives what depends on each row alone, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[int, ...], tuple[str, ...]]] = []

    def run(self, profile: int, tokens_RL: np.ndarray, outputs: Sequence[str], /) -> dict[str, np.ndarray]:
        self.asked.append((profile, tokens_RL.shape, tuple(outputs)))
        residue_RLD = tokens_RL[..., None].astype(np.float32) * np.arange(1, 5, dtype=np.float32)
        found = {"residue": residue_RLD, "mean": residue_RLD.sum(axis=1)}
        return {name: found[name] for name in outputs}


@pytest.mark.parametrize(
    ("rows", "length", "profile", "parts"),
    [(5, 7, 0, [5]), (11, 3, 0, [5, 5, 1]), (4, 8, 1, [3, 1]), (3, 12, 1, [3]), (2, 13, 2, [1, 1]), (1, 22, 2, [1])],
)
def test_profile_and_parts(engine: Path, rows: int, length: int, profile: int, parts: list[int]) -> None:
    execution = StandIn()
    model = TensorRTModel(engine, execution=execution)
    tokens_BL = np.random.default_rng(0).integers(4, 24, size=(rows, length))
    found = model.run_tokens(tokens_BL, ["mean", "residue"])
    assert execution.asked == [(profile, (part, length), ("mean", "residue")) for part in parts]
    expected = StandIn().run(0, tokens_BL, ["residue", "mean"])
    assert list(found) == ["mean", "residue"]
    for name, value in found.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, expected[name])


def test_all_outputs_by_default_and_an_empty_batch(engine: Path) -> None:
    model = TensorRTModel(engine, execution=StandIn())
    assert list(model.run_tokens(np.full((2, 5), 7))) == ["residue", "mean"]
    found = model.run_tokens(np.zeros((0, 9), dtype=np.int64))
    assert {name: value.shape for name, value in found.items()} == {"residue": (0, 9, 4), "mean": (0, 4)}
    assert (model.outputs, model.max_residues, len(model.profiles)) == (("residue", "mean"), 20, 3)


def test_refused_by_the_model(engine: Path) -> None:
    execution = StandIn()
    model = TensorRTModel(engine, execution=execution)
    for length in (2, 23):
        with pytest.raises(InputError, match=rf"m\.engine: rows of {length} tokens, and its profiles take 3 to 22"):
            model.run_tokens(np.full((1, length), 5))
    with pytest.raises(InputError, match=r"output 'logits' is not in the file; it gives residue, mean"):
        model.run_tokens(np.full((1, 5), 5), ["mean", "logits"])
    for tokens in (np.full((1, 5), 5, dtype=np.int32), np.full(5, 5)):
        with pytest.raises(TypeError, match=r"tokens must be int64 \(B, L\), got int"):
            model.run_tokens(tokens)
    assert not execution.asked


def test_another_generation_of_gpus() -> None:
    check_gpu(FACTS, (8, 9), "RTX 4090", file=Path("m.engine"))
    said = r"m\.engine: is built for sm86, sm89, and this GPU \(RTX 5090\) is sm120: .* --gpu sm120"
    with pytest.raises(InputError, match=said):
        check_gpu(FACTS, (12, 0), "RTX 5090", file=Path("m.engine"))
    with pytest.raises(InputError, match=r"is sm90: TensorRT-RTX builds for sm75, .* alone"):
        check_gpu(FACTS, (9, 0), "H100", file=Path("m.engine"))
    with pytest.raises(InputError, match="is sm90: `protnest export --target tensorrt` on this machine builds"):
        check_gpu(FACTS | {"target": "tensorrt"}, (9, 0), "H100", file=Path("m.engine"))


class FakePackage(SimpleNamespace):
    """As much of TensorRT as running an engine calls, on the CPU: doubles what it is given."""

    def __init__(self, *, profiles: int = 3, loads: bool = True, runs: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        context = SimpleNamespace(
            set_optimization_profile_async=lambda number, stream: self.calls.append(("profile", number)) or True,
            set_input_shape=lambda name, shape: self.calls.append(("shape", name, shape)) or True,
            set_tensor_address=lambda name, place: self.calls.append(("address", name)) or place > 0,
            execute_async_v3=lambda stream: self.calls.append(("run",)) or runs,
        )
        loaded = SimpleNamespace(create_execution_context=lambda: context, num_optimization_profiles=profiles)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: loaded if loads else None)

        class ILogger:
            Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

            def __init__(self) -> None: ...

        super().__init__(
            __name__="tensorrt_rtx",
            __version__="0.0",
            ILogger=ILogger,
            Runtime=lambda logger: self._log(logger, runtime),
        )

    def _log(self, logger: Any, runtime: Any) -> Any:
        logger.log(2, "not a word")
        logger.log(1, "the reason")
        return runtime


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch.cuda as if there were an RTX 4090, with its memory on the host."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "tensorrt_rtx" else found(name, *rest)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 4090")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))

    class Here:
        def __init__(self, device: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *given: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Here)
    return monkeypatch


def test_execution_calls_in_order(engine: Path, on_a_cpu: pytest.MonkeyPatch) -> None:
    package = FakePackage()
    on_a_cpu.setitem(sys.modules, "tensorrt_rtx", package)
    execution = EngineExecution(engine, FACTS, device="cpu")
    found = execution.run(1, np.full((2, 9), 5), ["mean"])
    assert {name: (value.shape, value.dtype.name) for name, value in found.items()} == {"mean": ((2, 4), "float32")}
    addresses = [("address", "tokens"), ("address", "residue"), ("address", "mean")]
    assert package.calls == [("profile", 1), ("shape", "tokens", (2, 9)), *addresses, ("run",)]
    package.calls.clear()
    execution.run(1, np.full((1, 8), 5), ["mean"])
    assert package.calls == [("shape", "tokens", (1, 8)), *addresses, ("run",)]  # The profile stays.
    execution.run(0, np.full((1, 4), 5), ["residue"])
    assert ("profile", 0) in package.calls


def test_what_the_runtime_keeps_silent_about(engine: Path, on_a_cpu: pytest.MonkeyPatch) -> None:
    for package, said in (
        (FakePackage(loads=False), r"tensorrt-rtx 0\.0 does not load it, which 1\.7\.1\.116 built: the reason"),
        (FakePackage(profiles=2), "has 2 profiles, its sidecar tells of 3"),
    ):
        on_a_cpu.setitem(sys.modules, "tensorrt_rtx", package)
        with pytest.raises(InputError, match=said):
            EngineExecution(engine, FACTS, device="cpu")
    on_a_cpu.setitem(sys.modules, "tensorrt_rtx", FakePackage(runs=False))
    execution: Any = EngineExecution(engine, FACTS, device="cpu")
    for reason, kind in (("the reason", InputError), ("CUDA: Out of memory", torch.OutOfMemoryError)):
        # What was said before is not this batch's.
        execution._logger.errors[:] = ["out of memory"]
        on_a_cpu.setattr(
            execution._context,
            "execute_async_v3",
            lambda stream, reason=reason: execution._logger.log(1, reason),
        )
        with pytest.raises(kind, match=f"TensorRT does not take the batch: {reason}$"):
            execution.run(1, np.full((2, 9), 5), ["mean"])


def test_missing_package_and_missing_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakePackage())
    found = importlib.util.find_spec
    there: dict[str, object] = {"tensorrt_rtx": object()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: there.get(name) or found(name, *rest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"m\.engine: runs on a GPU alone, and torch sees none"):
        TensorRTModel(engine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(InputError, match=r"needs tensorrt_rtx: pip install 'protnest\[export\]'"):
        TensorRTModel(engine)


def test_an_engine_is_loaded_as_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime stands in for the GPU."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = exported_family(tiny_export())[-1]
    graph = with_outputs(tiny_export() / "tiny.onnx", ["residue", "logits"], tmp_path / "m.onnx")
    facts = read_facts(graph)
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"made up")
    sidecar_path(engine).write_text(seal_facts(FACTS | facts, engine))
    runner = OnnxRunner(graph)
    asked: list[str] = []

    class OnCpu:
        def __init__(self, path: Path, facts: object, *, device: str) -> None:
            asked.append(device)

        def run(self, profile: int, tokens_RL: np.ndarray, outputs: Sequence[str], /) -> dict[str, np.ndarray]:
            return runner.run_tokens(tokens_RL, outputs)

    monkeypatch.setattr(tensorrt_execution, "EngineExecution", OnCpu)
    with pytest.raises(InputError, match=r"m\.engine: an engine runs on a GPU alone, and device is 'cpu'"):
        load_model(engine, device="cpu")
    with pytest.raises(InputError, match=r"m\.engine: is fp32, got precision 'fp16'"):
        load_model(engine, precision="fp16")
    assert asked == []
    digests, digest = [], tensorrt_sidecar._digest
    monkeypatch.setattr(tensorrt_sidecar, "_digest", lambda path: digests.append(path) or digest(path))
    found = load_model(engine)
    assert digests == [engine]  # Gigabytes are read once.
    assert isinstance(found, ExportedEncoder)
    assert (asked, found.runtime, found.device.type, found.config.max_residues) == (
        ["cuda"],
        "tensorrt-rtx",
        "cuda",
        20,
    )
    batch = pack(["MKTAYIAKQR", "GS", "MKTAYIAKQRQISFVKSHFS"])
    torch.testing.assert_close(found(batch).hidden_TD, encoder(batch).hidden_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="running an engine needs a GPU and NVIDIA's driver")
def test_engine_on_a_gpu_equals_the_packed_pass(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'protnest[export]'")
    here = "sm{}{}".format(*torch.cuda.get_device_capability())
    encoder = load_encoder("nano-xs", device="cpu", precision="fp32")
    try:
        export_tensorrt(
            [encoder], tmp_path / "m.engine", gpus=[here], profiles=2, outputs=["residue"], precision="fp16"
        )
    except InputError as error:
        pytest.skip(f"no engines for this GPU: {error}")
    model = TensorRTModel(tmp_path / "m.engine")
    for proteins in (["MKTAYIAKQR", "GSHM"], ["MKTAYIAKQRGSHMWLVP" * 40] * 40):
        found_BLD = model.run_tokens(pad_tokens(proteins), ["residue"])["residue"]
        for row, expected_LD in enumerate(encoder.encode(proteins)):
            found_LD = torch.from_numpy(found_BLD[row, 1 : len(expected_LD) + 1])
            assert torch.cosine_similarity(found_LD, torch.from_numpy(expected_LD), dim=-1).min() >= 0.9999
