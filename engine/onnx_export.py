"""Encoders, alone or with a chain's nested row, as one ONNX file.

The file takes `tokens`, int64 (batch, length): each row `<cls>`, residues, `<eos>`, then `<pad>`. What it gives, and
what it was made of, stands in its metadata under `protnest`, as JSON beside `schema_version`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .alphabet import BOS_ID, EOS_ID, PAD_ID, TOKENS
from .atomic import naming, write_atomically
from .chain import Chain
from .checkpoint import head_fingerprint
from .device import PRECISIONS
from .encoder import Encoder
from .errors import InputError
from .export_graph import OUTPUTS, ExportGraph
from .family import Family
from .info import versions

SCHEMA_VERSION = 1
OPSET = 20
"""Newer ones have an operator for attention that some runtimes take in fp16 alone."""
EXPORT_PRECISIONS = ("fp32", "fp16")
INPUT = "tokens"
ONNX_SUFFIX = ".onnx"
MOST_INLINE_BYTES = 2_000_000_000
"""Weights beyond this lie in a file of their own: a protobuf message ends at 2 GiB."""

_EDGES = 2  # <cls> and <eos>
_PACKAGES = ("onnx", "onnxscript")


def require(*packages: str) -> None:
    """Raises InputError, naming the extra to install, where one of these packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        message = f"needs {' and '.join(missing)}: pip install 'protnest[export]'"
        raise InputError(message)


def export_onnx(
    encoders: Sequence[Encoder],
    out: str | Path,
    *,
    chain: Chain | None = None,
    outputs: Sequence[str] | None = None,
    precision: str = "fp32",
    max_residues: int | None = None,
    most_inline_bytes: int = MOST_INLINE_BYTES,
) -> dict[str, Any]:
    """Writes one ONNX file, whole or not at all.

    Args:
        encoders: fp32, on the CPU; with a chain an initial run of its models, smallest first.
        out: the file; its name ends in `.onnx`. Weights of more than `most_inline_bytes` lie beside it in a `.data`
            file, whose name follows from what is exported: the two belong together.
        chain: for the output "nested".
        outputs: of `OUTPUTS`; by default residue and logits, with a chain nested. The first three are the largest
            model's.
        precision: of the matrix products, "fp32" or "fp16".
        max_residues: longest protein; by default the length that the models were trained on, the shortest of them.

    Returns:
        The facts that the metadata hold.

    Raises:
        InputError: see `check_out`; a package is missing, an output or precision is unknown, an output needs a head or
            a chain that is not there, the models are not the chain's, not fp32 on a CPU, or `max_residues` is below 2.
        OSError: the disk is full. What was there before is still there.
    """
    require(*_PACKAGES)
    path = check_out(out, ONNX_SUFFIX)
    chosen = check_outputs(outputs, encoders, chain)
    if precision not in EXPORT_PRECISIONS:
        message = f"precision is {precision!r}; an export is {' or '.join(EXPORT_PRECISIONS)}"
        raise InputError(message)
    trained_on = [encoder.config.max_residues for encoder in encoders] if chain is None else [chain.max_residues]
    limit = min(trained_on) if max_residues is None else max_residues
    if limit < 2:  # The exporter takes an axis of one possible length for a constant.
        message = f"max_residues must be 2 or more, got {limit}"
        raise InputError(message)
    graph = ExportGraph(encoders, chosen, chain=chain, most_tokens=limit + _EDGES, dtype=PRECISIONS[precision]).eval()
    facts = _facts(encoders, chain, chosen, precision, limit)
    model = _trace(graph, chosen, limit + _EDGES)
    model.metadata_props.update({"schema_version": str(SCHEMA_VERSION), "protnest": json.dumps(facts)})
    weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        _write(model, path, facts, external=weights_bytes > most_inline_bytes)
    return facts


def check_out(out: str | Path, suffix: str) -> Path:
    """Where an export goes; raises before minutes go by.

    Raises:
        InputError: the name ends otherwise, is a folder's, or lies where nothing can be written.
    """
    path = Path(out)
    if path.suffix != suffix:
        message = f"the file's name must end in {suffix}, by which it is known"
        raise InputError(message, file=path)
    if path.is_dir():
        message = "is a folder; an export is a file"
        raise InputError(message, file=path)
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir():
        message = f"cannot be written: {folder} is no folder"
        raise InputError(message, file=path)
    if not os.access(folder, os.W_OK | os.X_OK):
        message = f"cannot be written: {folder} takes no files of this user's"
        raise InputError(message, file=path)
    return path


def check_outputs(outputs: Sequence[str] | None, encoders: Sequence[Encoder], chain: Chain | None) -> tuple[str, ...]:
    """The outputs that an export of these encoders gives.

    Raises:
        InputError: see `export_onnx`.
    """
    if outputs is None:
        outputs = ("residue", "logits") if chain is None else ("nested",)
        if encoders and encoders[-1].head is None:
            outputs = tuple(name for name in outputs if name != "logits")
    for place, name in enumerate(outputs):
        if name not in OUTPUTS:
            message = f"output {name!r} is unknown; allowed: {', '.join(OUTPUTS)}"
            raise InputError(message)
        if name in outputs[:place]:
            message = f"output {name!r} is there twice"
            raise InputError(message)
    if not outputs or not encoders:
        message = "nothing to export: name at least one model and one output"
        raise InputError(message)
    if chain is None and len(encoders) > 1:
        message = f"{len(encoders)} models and no chain: `protnest fit-chain` makes one row of their embeddings"
        raise InputError(message)
    if chain is None and "nested" in outputs:
        message = "output 'nested' needs a chain"
        raise InputError(message)
    if chain is not None:
        chain.check_models(Family.of(encoders).members)
    if "logits" in outputs and encoders[-1].head is None:
        message = f"output 'logits' needs a language-model head, and {encoders[-1].name}'s checkpoint has none"
        raise InputError(message)
    for encoder in encoders:
        if (encoder.product_dtype, encoder.device.type) != (torch.float32, "cpu"):
            message = f"{encoder.name} is {encoder.product_dtype} on {encoder.device}; exports start from fp32 on a CPU"
            raise InputError(message)
    return tuple(outputs)


def _facts(
    encoders: Sequence[Encoder], chain: Chain | None, outputs: Sequence[str], precision: str, limit: int
) -> dict[str, Any]:
    width = encoders[-1].dim
    # A naive chain's row has no prefixes.
    nests = chain is not None and "nested" in outputs and not chain.is_naive
    axes = {
        "logits": ["batch", "length", len(TOKENS)],
        "residue": ["batch", "length", width],
        "mean": ["batch", width],
        "nested": ["batch", width],
    }
    return {
        "models": [
            {
                "name": encoder.name,
                "width": encoder.dim,
                "fingerprint": encoder.fingerprint,
                "config": asdict(encoder.config),
            }
            for encoder in encoders
        ],
        "language_head": head_fingerprint(encoders[-1]) if "logits" in outputs else None,
        "chain": None if chain is None else chain.fingerprint,
        "widths": [encoder.dim for encoder in encoders] if nests else [width],
        "precision": precision,
        "outputs": {name: axes[name] for name in outputs},
        "limits": {"max_residues": limit, "max_tokens": limit + _EDGES},
        "tokens": {"first": BOS_ID, "last": EOS_ID, "padding": PAD_ID, "alphabet": list(TOKENS)},
        "opset": OPSET,
        "versions": {**versions(), **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    }


def _trace(graph: ExportGraph, outputs: Sequence[str], most_tokens: int) -> Any:
    """The graph as an `onnx_ir.Model`, with batch and length left open."""
    # Two rows of which one is padded: a length or a batch of one would be taken for a constant.
    tokens_BL = torch.full((2, min(most_tokens, 6)), PAD_ID)
    tokens_BL[:, :3] = torch.tensor([BOS_ID, TOKENS.index("A"), EOS_ID])
    axes = {0: torch.export.Dim("batch", min=1, max=1 << 20), 1: torch.export.Dim("length", min=3, max=most_tokens)}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (tokens_BL,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_shapes={"tokens": axes},
            verbose=False,
        )
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings of packages and classes that have no part in this."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write(model: Any, path: Path, facts: dict[str, Any], *, external: bool) -> None:
    import onnx_ir

    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=4).hexdigest()
    data = path.with_name(f"{path.name}.{digest}.data")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder)
        onnx_ir.save(model, made / path.name, external_data=data.name if external else None)
        # The weights first: a file whose weights are not there yet must never be seen.
        new = external and not data.exists()
        if external:
            write_atomically(data, lambda temporary: (made / data.name).replace(temporary))
        try:
            write_atomically(path, lambda temporary: (made / path.name).replace(temporary))
        except BaseException:
            if new:
                data.unlink(missing_ok=True)
            raise
