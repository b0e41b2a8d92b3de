"""Encoders, alone or with a chain's nested row, as one engine of TensorRT-RTX, built on the CPU alone, or of TensorRT.

An engine is built from the ONNX file that `onnx_export` writes. TensorRT-RTX builds for the GPUs that are named, and
needs none; TensorRT builds for the GPU of this machine. Both tell of failures by None, False, -1 and a logger: here
these become errors with what the parser or the logger said. Networks are strongly typed: the graph says what is fp16.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from .atomic import replacing, write_atomically
from .chain import Chain
from .encoder import Encoder
from .errors import InputError
from .length_profiles import (
    DEFAULT_COUNT,
    DEFAULT_MOST_TOKENS,
    SWISS_PROT_RESIDUES,
    LengthProfile,
    choose_profiles,
)
from .onnx_export import INPUT, ONNX_SUFFIX, check_out, export_onnx, require
from .tensorrt_sidecar import ENGINE_SUFFIX, seal_facts, sidecar_path

TARGETS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""What is built, and the package that builds and runs it."""
GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""Compute capabilities that TensorRT-RTX builds for: Turing; Ampere, of data centres and RTX 30; RTX 40; RTX 50."""
DEFAULT_GPUS = ("sm86", "sm89", "sm120")
_TURING = "sm75"
_MOST_REASONS = 5


def export_tensorrt(
    encoders: Sequence[Encoder],
    out: str | Path,
    *,
    target: str = "tensorrt-rtx",
    gpus: Sequence[str] | None = None,
    chain: Chain | None = None,
    outputs: Sequence[str] | None = None,
    precision: str = "fp32",
    max_residues: int | None = None,
    lengths: Sequence[int] = SWISS_PROT_RESIDUES,
    profiles: int = DEFAULT_COUNT,
    max_tokens: int = DEFAULT_MOST_TOKENS,
) -> dict[str, Any]:
    """Writes one engine and its sidecar `OUT.json`, both or neither.

    Args:
        encoders, chain, outputs, precision, max_residues: as `export_onnx` takes them.
        out: the file; its name ends in `.engine`.
        target: "tensorrt-rtx" or "tensorrt".
        gpus: of `GPUS`, for TensorRT-RTX; by default RTX 30, 40 and 50. sm75 multiplies fp16 alone and has an engine of
            its own. TensorRT builds for the GPU that is here.
        lengths, profiles, max_tokens: see `choose_profiles`; by default for lengths as in Swiss-Prot.

    Returns:
        The facts that the sidecar holds, but for size and hash of the engine.

    Raises:
        InputError: see `check_target` and `export_onnx`; or the engine cannot be built.
        OSError: the disk is full. What was there before is still there.
    """
    path = Path(out)
    chosen = check_target(path, target, gpus, precision)
    # Wrong numbers are told before minutes go by; which profiles there are is settled with the models' own limit.
    choose_profiles(lengths, count=profiles, max_residues=max_residues or 1, max_tokens=max_tokens)
    trt = load_target(target)
    with tempfile.TemporaryDirectory(prefix="protnest-") as folder:
        graph = Path(folder) / path.with_suffix(ONNX_SUFFIX).name
        facts = export_onnx(
            encoders, graph, chain=chain, outputs=outputs, precision=precision, max_residues=max_residues
        )
        limit = facts["limits"]["max_residues"]
        ranges = choose_profiles(lengths, count=profiles, max_residues=limit, max_tokens=max_tokens)
        network = EngineNetwork(trt, graph)
    # The graph's file is gone here: it was read whole, and building takes long enough to be killed.
    facts = {
        "target": target,
        **facts,
        "gpus": list(chosen),
        "profiles": [dataclasses.asdict(each) for each in ranges],
        "versions": {**facts["versions"], target: trt.__version__},
    }
    engine = network.build(chosen if target == "tensorrt-rtx" else (), ranges)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, engine, facts)
    return facts


def check_target(out: str | Path, target: str, gpus: Sequence[str] | None, precision: str) -> tuple[str, ...]:
    """The GPUs that an engine is for; raises before anything is read.

    Raises:
        InputError: target, a GPU or its precision cannot be; see `check_out`; or a package is missing.
    """
    _check_known(target)
    check_out(out, ENGINE_SUFFIX)
    if target == "tensorrt":
        return _check_tensorrt(gpus)
    chosen = DEFAULT_GPUS if gpus is None else tuple(gpus)
    for place, name in enumerate(chosen):
        if name not in GPUS:
            message = f"GPU {name!r} is unknown; allowed: {', '.join(GPUS)}"
            raise InputError(message)
        if name in chosen[:place]:
            message = f"GPU {name!r} is there twice"
            raise InputError(message)
    if not chosen:
        message = f"no GPU is named; allowed: {', '.join(GPUS)}"
        raise InputError(message)
    if _TURING in chosen and len(chosen) > 1:
        message = f"{_TURING} needs an engine of its own: export once for it and once for the others"
        raise InputError(message)
    if _TURING in chosen and precision != "fp16":
        message = f"{_TURING} multiplies matrices in fp16 alone, and precision is {precision!r}: export with fp16"
        raise InputError(message)
    require("onnx", "onnxscript", TARGETS[target])
    return chosen


def _check_known(target: str) -> None:
    if target not in TARGETS:
        message = f"target {target!r} is unknown; engines are {' or '.join(TARGETS)}"
        raise InputError(message)


def _check_tensorrt(gpus: Sequence[str] | None) -> tuple[str, ...]:
    if gpus is not None:
        message = "tensorrt builds for the GPU of this machine and takes no list; tensorrt-rtx builds for others"
        raise InputError(message)
    require("onnx", "onnxscript")
    if importlib.util.find_spec("tensorrt") is None:
        message = (
            "needs tensorrt, which is in none of the extras: `pip install tensorrt` on a machine with a GPU. "
            "tensorrt-rtx builds without one: pip install 'protnest[export]'"
        )
        raise InputError(message)
    if not torch.cuda.is_available():
        message = "tensorrt builds on the GPU that will run the engine, and torch sees none; tensorrt-rtx needs none"
        raise InputError(message)
    return (capability_name(torch.cuda.get_device_capability()),)


def capability_name(capability: tuple[int, int]) -> str:
    """How `--gpu` calls a compute capability: (8, 6) is sm86."""
    return f"sm{capability[0]}{capability[1]}"


class EngineNetwork:
    """A parsed ONNX file that engines are built from.

    Args:
        trt: the package, `tensorrt_rtx` or `tensorrt`.
        graph: the ONNX file; it is read here and not needed later.

    Attributes:
        inputs: by name, the element type in TensorRT's words and the shape, -1 for what is left open.
        outputs: the same of what it gives.

    Raises:
        InputError: the parser does not take the file; the message has its reasons.
    """

    def __init__(self, trt: Any, graph: Path) -> None:
        self._trt = trt
        self.logger = make_logger(trt)
        self._builder = trt.Builder(self.logger)
        # TensorRT-RTX has no others, TensorRT before 11 has them by default.
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._network = self._builder.create_network(typed)
        if self._network is None:
            self._fail("makes no network")
        self._parser = trt.OnnxParser(self._network, self.logger)
        if not self._parser.parse_from_file(str(graph)):
            errors = [self._parser.get_error(place) for place in range(self._parser.num_errors)]
            reasons = "; ".join(_reason(error) for error in errors[:_MOST_REASONS]) or self._said()
            message = f"{trt.__name__} does not take the graph: {reasons}"
            raise InputError(message, file=graph)
        network = self._network
        self.inputs = _describe(network.get_input(place) for place in range(network.num_inputs))
        self.outputs = _describe(network.get_output(place) for place in range(network.num_outputs))

    def build(self, gpus: Sequence[str], profiles: Sequence[LengthProfile]) -> Any:
        """The engine, as a buffer of bytes.

        Args:
            gpus: of `GPUS`; none of them for the GPU that is here.
            profiles: at least one.

        Raises:
            InputError: a GPU or a profile is not taken, or no engine comes of it; the message has what was logged.
        """
        config = self._builder.create_builder_config()
        if config is None:
            self._fail("makes no configuration")
        if gpus:
            config.num_compute_capabilities = len(gpus)
            for place, name in enumerate(gpus):
                capability = getattr(self._trt.ComputeCapability, name.upper(), None)
                if capability is None or not config.set_compute_capability(capability, place):
                    self._fail(f"does not build for {name}")
        for profile in profiles:
            shapes = self._builder.create_optimization_profile()
            shapes.set_shape(INPUT, *profile.shapes)
            if config.add_optimization_profile(shapes) < 0:
                self._fail(f"does not take the profile {profile.shapes}")
        engine = self._builder.build_serialized_network(self._network, config)
        if engine is None:
            self._fail(f"builds no engine for {', '.join(gpus) or 'this GPU'}")
        return engine

    def _said(self) -> str:
        return "; ".join(self.logger.errors[-_MOST_REASONS:]) or "it gave no reason"

    def _fail(self, problem: str) -> NoReturn:
        message = f"{self._trt.__name__} {self._trt.__version__} {problem}: {self._said()}"
        raise InputError(message)


def make_logger(trt: Any) -> Any:
    """A logger of TensorRT's that prints nothing and keeps what goes wrong in `errors`."""

    class KeptErrors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text.strip())

    return KeptErrors()


def load_target(target: str) -> Any:
    """The package of a target.

    Raises:
        InputError: it is unknown, or its package cannot be loaded.
    """
    _check_known(target)
    try:
        return importlib.import_module(TARGETS[target])
    except (ImportError, OSError) as error:  # Its libraries are loaded here, and may not fit this system.
        message = f"{TARGETS[target]} cannot be loaded ({error})"
        raise InputError(message) from error


def _describe(tensors: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {each.name: (each.dtype.name, tuple(each.shape)) for each in tensors}


def _reason(error: Any) -> str:
    return f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {error.desc()}"


def _write(path: Path, engine: Any, facts: dict[str, Any]) -> None:
    sidecar = sidecar_path(path)
    old = sidecar.read_bytes() if sidecar.exists() else None
    try:
        with replacing(path) as made:
            with made.open("wb") as file:
                file.write(engine)
                file.flush()
                os.fsync(file.fileno())
            # The disk has the engine: of the two only renames are left once the sidecar is in its place.
            text = seal_facts(facts, made)
            write_atomically(sidecar, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except BaseException:
        with suppress(OSError):  # What went wrong first is what has to be told.
            if old is None:
                sidecar.unlink(missing_ok=True)
            elif sidecar.read_bytes() != old:
                write_atomically(sidecar, lambda temporary: temporary.write_bytes(old))
        raise
