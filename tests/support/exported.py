"""Two tiny encoders, a chain of them, and what `protnest export` makes of them: traced once a process."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from protnest.engine import Encoder
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.engine.models import load_encoder
from protnest.engine.onnx_model import read_facts
from protnest.engine.tensorrt_sidecar import seal_facts, sidecar_path
from typer.testing import CliRunner

from support.families import random_chain, tiny_family

EXPORTED_WIDTHS = (16, 24)
EXPORTED_OUTPUTS = ("nested", "logits", "residue", "mean")


@functools.cache
def _holder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="protnest-exported-")


@functools.cache
def tiny_export() -> Path:
    """A folder with the models `tiny16` and `tiny24`, `tiny.chain`, `tiny.onnx` and `report.json`."""
    place = Path(_holder().name)
    for encoder in tiny_family(EXPORTED_WIDTHS):
        save_checkpoint(encoder, place / encoder.name)
    random_chain(exported_family(place)).save(place / "tiny.chain")
    models = ",".join(str(place / f"tiny{width}") for width in EXPORTED_WIDTHS)
    arguments = ["export", "--model", models, "--chain", str(place / "tiny.chain"), "--outputs"]
    out = ["--out", str(place / "tiny.onnx"), "--json"]
    done = CliRunner().invoke(app, [*arguments, "nested,logits, residue,mean", *out])
    assert done.exit_code == 0, done.output
    (place / "report.json").write_text(done.stdout)
    return place


def exported_family(place: Path) -> list[Encoder]:
    """The models of `tiny_export`, as checkpoints."""
    return [load_encoder(place / f"tiny{width}", device="cpu", precision="fp32") for width in EXPORTED_WIDTHS]


def with_outputs(path: Path, outputs: Sequence[str], out: Path, **changed: Any) -> Path:
    """The same file, saying that it gives these outputs alone, or whatever else is `changed` in its metadata."""
    import onnx

    model = onnx.load(str(path))
    props = {each.key: each.value for each in model.metadata_props}
    facts = json.loads(props["protnest"])
    facts["outputs"] = {name: facts["outputs"][name] for name in outputs}
    if "nested" not in outputs:
        facts["widths"], facts["chain"] = facts["widths"][-1:], None
    if "logits" not in outputs:
        facts["language_head"] = None
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, props | {"protnest": json.dumps(facts | changed)})
    onnx.save(model, str(out))
    return out


def made_up_engine(graph: Path, out: Path) -> Path:
    """A file of made-up bytes, whose sidecar tells of the graph, and of RTX 30 and 40."""
    facts = read_facts(graph)
    longest = facts["limits"]["max_tokens"]
    profile = {"fewest_tokens": 3, "best_tokens": 10, "most_tokens": longest, "best_rows": 4, "most_rows": 8}
    facts |= {"target": "tensorrt-rtx", "gpus": ["sm86", "sm89"], "profiles": [profile]}
    out.write_bytes(b"made up")
    sidecar_path(out).write_text(seal_facts(facts, out))
    return out


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference, of the largest magnitude."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).abs().max() / expected.abs().max())
