"""Exported files: what ONNX Runtime makes of them, what they say of themselves, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import Chain, Embedder, Encoder, InputError, onnx_export
from protnest.engine.alphabet import MASK_ID, TOKENS
from protnest.engine.cli import app
from protnest.engine.models import load_encoder
from protnest.engine.onnx_attention import with_fused_attention
from protnest.engine.onnx_export import INPUT, check_outputs, export_onnx
from protnest.engine.onnx_model import OnnxModel, pad_tokens, read_facts
from protnest.engine.packing import pack
from typer.testing import CliRunner, Result

from support.exported import EXPORTED_WIDTHS as WIDTHS
from support.exported import exported_family, tiny_export
from support.families import random_chain, tiny_family
from support.shared_data import UNIPROT_500, shared_sequences
from support.tiny import random_proteins

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")

PROTEINS = ["A", "MKTAYIAKQRGSHMXWLV", *random_proteins(6, longest=20), "WW"]


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_export()


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _check_parity(model: OnnxModel, encoder: Encoder, proteins: list[str], most: float) -> None:
    """Residues, logits and means of a file against the packed pass, protein by protein."""
    found = model.run(proteins)
    packed = pack(proteins)
    with torch.inference_mode():
        logits_TV = encoder.logits(encoder(packed).hidden_TD).numpy()
    means_BD = Embedder(encoder).embed(proteins)
    begins = packed.cu_seqlens.tolist()
    for row, expected_LD in enumerate(encoder.encode(proteins)):
        assert found["residue"][row].shape == expected_LD.shape
        assert _relative(found["residue"][row], expected_LD) <= most
        assert _relative(found["logits"][row], logits_TV[begins[row] + 1 : begins[row + 1] - 1]) <= most
        assert _relative(found["mean"][row], means_BD[row]) <= most


def test_runtime_equals_packed_pass_and_embedder(folder: Path) -> None:
    model, family = OnnxModel(folder / "tiny.onnx", threads=1), exported_family(folder)
    _check_parity(model, family[-1], PROTEINS, 1e-5)
    _check_parity(model, family[-1], PROTEINS[1:2], 1e-5)
    chain = Chain.load(folder / "tiny.chain")
    nested_BW = model.run(PROTEINS, ["nested"])["nested"]
    assert _relative(np.asarray(nested_BW), np.asarray(Embedder(family, chain=chain).embed(PROTEINS))) <= 1e-5


def test_masks_and_padding_in_the_runtime(folder: Path) -> None:
    session = onnxruntime.InferenceSession(str(folder / "tiny.onnx"), providers=["CPUExecutionProvider"])
    tokens_BL, packed = pad_tokens(PROTEINS), pack(PROTEINS)
    tokens_BL[1, 3:9] = MASK_ID
    begin, end = packed.cu_seqlens.tolist()[1:3]
    packed.tokens_T[begin + 3 : begin + 9] = MASK_ID
    expected_LD = exported_family(folder)[-1](packed).hidden_TD[begin:end].numpy()
    (found_BLD,) = session.run(["residue"], {INPUT: tokens_BL})
    assert _relative(found_BLD[1, : end - begin], expected_LD) <= 1e-5


def test_the_file_says_what_it_is(folder: Path) -> None:
    facts, report = read_facts(folder / "tiny.onnx"), json.loads((folder / "report.json").read_text())
    family, chain = exported_family(folder), Chain.load(folder / "tiny.chain")
    assert {name: facts[name] for name in facts if name != "schema_version"}.items() <= report.items()
    assert facts["schema_version"] == 1
    assert [model["fingerprint"] for model in facts["models"]] == [encoder.fingerprint for encoder in family]
    assert facts["chain"] == chain.fingerprint
    assert facts["precision"] == "fp32"
    assert facts["limits"] == {"max_residues": chain.max_residues, "max_tokens": chain.max_residues + 2}
    assert facts["versions"].keys() >= {"protnest", "torch", "onnx"}
    session = onnxruntime.InferenceSession(str(folder / "tiny.onnx"), providers=["CPUExecutionProvider"])
    assert {each.name: each.shape for each in session.get_outputs()} == facts["outputs"]
    assert list(facts["outputs"]) == ["nested", "logits", "residue", "mean"]
    assert facts["outputs"]["logits"] == ["batch", "length", len(TOKENS)]
    (given,) = session.get_inputs()
    assert (given.name, given.shape, given.type) == ("tokens", ["batch", "length"], "tensor(int64)")
    model = onnx.load(str(folder / "tiny.onnx"))
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert sorted(each.name for each in folder.iterdir() if each.name.startswith((".", "tiny.onnx"))) == ["tiny.onnx"]


def test_info_prints_it(folder: Path) -> None:
    done = _invoke("info", folder / "tiny.onnx")
    assert done.exit_code == 0
    chain = Chain.load(folder / "tiny.chain")
    for shown in (chain.fingerprint, chain.models[0].fingerprint, "nested (batch, 24)", "fp32", "up to 20 residues"):
        assert str(shown) in done.stdout, shown
    assert json.loads(_invoke("info", folder / "tiny.onnx", "--json").stdout) == read_facts(folder / "tiny.onnx")


def test_weights_of_their_own_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_tracing(folder, monkeypatch)
    out, chain = tmp_path / "new" / "m.onnx", Chain.load(folder / "tiny.chain")
    for _ in range(2):  # The second one takes the first one's place.
        export_onnx(exported_family(folder), out, chain=chain, outputs=["nested"], most_inline_bytes=100)
    (data,) = (each.name for each in out.parent.iterdir() if each != out)
    assert data.startswith("m.onnx.")
    assert data.endswith(".data")
    assert out.stat().st_size < (folder / "tiny.onnx").stat().st_size
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (found,) = session.run(["nested"], {INPUT: pad_tokens(PROTEINS)})
    # The graph that runs there comes from memory, and finds its weights all the same.
    assert with_fused_attention(out) is not None
    (fused,) = OnnxModel(out).run(PROTEINS, ["nested"]).values()
    assert np.array_equal(fused, OnnxModel(folder / "tiny.onnx").run(PROTEINS)["nested"])
    assert _relative(found, np.asarray(fused)) <= 1e-5
    (out.parent / data).unlink()
    with pytest.raises(InputError, match=r"m\.onnx: ONNX Runtime does not take it"):
        OnnxModel(out)


@pytest.mark.parametrize("failing", ["weights", "graph"])
def test_a_full_disk_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    _without_tracing(folder, monkeypatch)
    out = tmp_path / "m.onnx"
    out.write_bytes(b"the old one")
    write = onnx_export.write_atomically

    def full(path: Path, writing: Any) -> None:
        if (path == out) == (failing == "graph"):
            raise OSError(28, "No space left on device")
        write(path, writing)

    monkeypatch.setattr(onnx_export, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(exported_family(folder)[:1], out, outputs=["mean"], most_inline_bytes=100)
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]
    assert out.read_bytes() == b"the old one"


def _without_tracing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the tiny graph, whatever was asked for: tracing takes seconds."""
    monkeypatch.setattr(onnx_export, "_trace", lambda *given: onnx_ir.load(str(folder / "tiny.onnx")))


def test_refused_by_export(folder: Path, tmp_path: Path) -> None:
    family, chain = exported_family(folder), Chain.load(folder / "tiny.chain")
    for encoders, options, said in (
        (family[:1], {"outputs": ["mean", "contacts"]}, "output 'contacts' is unknown; allowed: logits, residue, mean"),
        (family[:1], {"outputs": ["mean", "mean"]}, "output 'mean' is there twice"),
        (family[:1], {"outputs": []}, "nothing to export"),
        ([], {}, "nothing to export"),
        (family[:1], {"outputs": ["nested"]}, "output 'nested' needs a chain"),
        (family, {}, "2 models and no chain"),
        (family[::-1], {"chain": chain}, "the order must be"),
        (tiny_family(WIDTHS, seed=7), {"chain": chain}, "another checkpoint of that width"),
        (family[:1], {"precision": "bf16"}, "precision is 'bf16'; an export is fp32 or fp16"),
        (family[:1], {"max_residues": 1}, "max_residues must be 2 or more, got 1"),
        ([tiny_family(WIDTHS)[0].to(torch.bfloat16)], {}, r"tiny16 is torch.bfloat16 on cpu; exports start from fp32"),
        ([Encoder(family[0].config, head=False, name="bare")], {"outputs": ["logits"]}, "and bare's checkpoint has no"),
    ):
        with pytest.raises(InputError, match=said):
            export_onnx(encoders, tmp_path / "x.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_default_outputs(folder: Path) -> None:
    family, chain = exported_family(folder), Chain.load(folder / "tiny.chain")
    assert check_outputs(None, family[:1], None) == ("residue", "logits")
    assert check_outputs(None, family, chain) == ("nested",)
    assert check_outputs(None, [Encoder(family[0].config, head=False)], None) == ("residue",)


def test_refused_by_the_runtime(folder: Path) -> None:
    model = OnnxModel(folder / "tiny.onnx", threads=1)
    with pytest.raises(InputError, match=r"sequence 1: 21 residues, but tiny\.onnx takes at most 20"):
        model.run(["A", "A" * 21])
    with pytest.raises(InputError, match=r"output 'contacts' is not in the file; it gives nested, logits, residue"):
        model.run(["A"], ["contacts"])
    with pytest.raises(InputError, match="sequence 0: "):
        model.run(["M1K"])
    with pytest.raises(TypeError):
        model.run("MKT")
    nothing = model.run([])
    assert np.shape(nothing["nested"]) == (0, 24)
    assert nothing["residue"] == []
    assert np.array_equal(model.run(["mk t*"])["nested"], model.run(["MKT"])["nested"])


def test_files_that_are_no_exports(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.onnx: no such file"):
        read_facts(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(InputError, match=r"text\.onnx: not a readable ONNX file"):
        read_facts(tmp_path / "text.onnx")
    for changed, said in (
        ({}, "is no export of protnest"),
        ({"protnest": "{}", "schema_version": "9"}, "has schema version 9, this release reads 1"),
        ({"protnest": "{", "schema_version": "1"}, "has damaged metadata"),
    ):
        model = onnx.load(str(folder / "tiny.onnx"))
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, changed)
        onnx.save(model, str(tmp_path / "changed.onnx"))
        with pytest.raises(InputError, match=said):
            read_facts(tmp_path / "changed.onnx")
    assert _invoke("info", tmp_path / "changed.onnx").exit_code == 1


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_name_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name))
    encoders = exported_family(folder)[:1]
    asked: dict[str, Callable[[], object]] = {"onnxruntime": lambda: OnnxModel(folder / "tiny.onnx")}
    with pytest.raises(InputError, match=rf"needs {missing}: pip install 'protnest\[export\]'"):
        asked.get(missing, lambda: export_onnx(encoders, tmp_path / "x.onnx"))()


def test_importing_takes_none_of_the_packages() -> None:
    script = (
        "import sys, protnest.engine.onnx_model, protnest.engine.export_command; "
        "print({'onnx', 'onnxscript', 'onnx_ir', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _real_proteins() -> list[str]:
    """From one residue to 1,022, in one batch."""
    sequences = shared_sequences(UNIPROT_500)
    fitting = sorted((each for each in sequences if len(each) <= 1022), key=len)
    longest = next(each for each in sequences if len(each) >= 1022)
    return [fitting[0][:1], fitting[0][:2], fitting[50], longest[:1022], fitting[250]]


def test_nano_xs_on_real_proteins(tmp_path: Path) -> None:
    encoder = load_encoder("nano-xs", device="cpu", precision="fp32")
    export_onnx([encoder], tmp_path / "m.onnx", outputs=["residue", "logits", "mean"])
    _check_parity(OnnxModel(tmp_path / "m.onnx", threads=1), encoder, _real_proteins(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nano_family_on_real_proteins(tmp_path: Path, precision: str) -> None:
    family = [load_encoder(name, device="cpu", precision="fp32") for name in ("nano-xs", "nano-s")]
    chain, proteins = random_chain(family), _real_proteins()
    outputs = ["residue", "logits", "mean", "nested"]
    export_onnx(family, tmp_path / "m.onnx", chain=chain, outputs=outputs, precision=precision)
    model = OnnxModel(tmp_path / "m.onnx", threads=1)
    found, expected = (
        np.asarray(model.run(proteins)["nested"]),
        np.asarray(Embedder(family, chain=chain).embed(proteins)),
    )
    if precision == "fp32":
        _check_parity(model, family[-1], proteins, 1e-5)
        assert _relative(found, expected) <= 1e-5
        return
    found_LD, expected_LD = np.concatenate(model.run(proteins)["residue"]), np.concatenate(family[-1].encode(proteins))
    for one, other in ((found, expected), (found_LD, expected_LD)):
        assert torch.cosine_similarity(torch.from_numpy(one), torch.from_numpy(other), dim=-1).min() >= 0.9999
    weights_bytes = sum(tensor.numel() * 4 for encoder in family for tensor in encoder.parameters())
    assert (tmp_path / "m.onnx").stat().st_size < 0.75 * weights_bytes
