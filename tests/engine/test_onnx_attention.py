"""ONNX Runtime's own attention in exported graphs: that it is there, for which heads, and what is left alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from protnest.engine.alphabet import MASK_ID
from protnest.engine.onnx_attention import DOMAIN, fuse_attention, with_fused_attention
from protnest.engine.onnx_export import INPUT
from protnest.engine.onnx_model import pad_tokens, read_facts
from protnest.engine.onnx_runner import OnnxRunner

from support.exported import EXPORTED_OUTPUTS, relative_error, tiny_export, with_outputs
from support.tiny import random_proteins

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.export

PROTEINS = ["A", *random_proteins(7, longest=20), "A" * 20]
HEADS = [2, 2, 2]
"""One layer of the smaller model, two of the larger one."""


@pytest.fixture(scope="module")
def path() -> Path:
    return tiny_export() / "tiny.onnx"


def _fused(path: Path) -> onnx.ModelProto:
    fused = with_fused_attention(path)
    assert fused is not None
    return onnx.load_from_string(fused)


def test_answers_are_those_of_the_plain_graph(path: Path) -> None:
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokens_BL = pad_tokens(PROTEINS)
    tokens_BL[3, 2:4] = MASK_ID
    found = OnnxRunner(path).run_tokens(tokens_BL, EXPORTED_OUTPUTS)
    lengths_B = [len(protein) + 2 for protein in PROTEINS]
    for name, expected in zip(EXPORTED_OUTPUTS, plain.run(list(EXPORTED_OUTPUTS), {INPUT: tokens_BL}), strict=True):
        # What stands at padded places has no meaning.
        for row, length in enumerate(lengths_B):
            one, other = found[name][row], expected[row]
            assert relative_error(*((each[:length] if each.ndim == 2 else each) for each in (one, other))) <= 2e-6


def test_every_attention_is_fused(path: Path) -> None:
    model = _fused(path)
    operations = [node.op_type for node in model.graph.node]
    assert operations.count("MultiHeadAttention") == len(HEADS)
    assert "Softmax" not in operations
    assert (DOMAIN, 1) in [(each.domain, each.version) for each in model.opset_import]
    # The file itself stays plain.
    assert {node.domain for node in onnx.load(str(path)).graph.node} == {""}


def test_heads_are_each_models_own(path: Path, tmp_path: Path) -> None:
    models = read_facts(path)["models"]
    models[0]["config"]["heads"] = 4
    changed = with_outputs(path, EXPORTED_OUTPUTS, tmp_path / "m.onnx", models=models)

    def heads(model: onnx.ModelProto) -> list[int]:
        nodes = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
        return [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "num_heads"]

    assert heads(_fused(changed)) == [4, 2, 2]
    # Without the nested row the facts promise the largest model alone: this graph is another.
    assert with_fused_attention(with_outputs(path, ["mean"], tmp_path / "m.onnx")) is None


def test_graphs_that_look_otherwise_are_left_alone(path: Path) -> None:
    made = onnx.load(str(path))
    assert not fuse_attention(copy.deepcopy(made), HEADS[1:])
    assert not fuse_attention(onnx.ModelProto(), [])
    for operation in ("Softmax", "MatMul", "Transpose", "Add"):
        model = copy.deepcopy(made)
        nodes = list(model.graph.node)
        softmax = next(node for node in nodes if node.op_type == "Softmax")
        maker = {name: node for node in nodes for name in node.output}
        masked = maker[softmax.input[0]]
        scores = maker[masked.input[0]]
        keys = maker[scores.input[1]]
        inner = {"Softmax": softmax, "Add": masked, "MatMul": scores, "Transpose": keys}[operation]
        # Someone else reads what would be gone.
        model.graph.node.append(onnx.helper.make_node("Identity", [inner.output[0]], ["seen"]))
        before = model.SerializeToString()
        assert not fuse_attention(model, HEADS), operation
        assert model.SerializeToString() == before
    model = copy.deepcopy(made)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "LogSoftmax"
    assert not fuse_attention(model, HEADS)
    keys = copy.deepcopy(made)
    for node in keys.graph.node:
        if node.op_type == "Transpose" and list(node.attribute[0].ints) == [0, 2, 3, 1]:
            node.attribute[0].ints[:] = [0, 2, 1, 3]
    assert not fuse_attention(keys, HEADS)
