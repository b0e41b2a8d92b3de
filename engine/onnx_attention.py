"""Attention of exported graphs by ONNX Runtime's own operator, on a CPU.

The file holds plain operations, which every runtime takes, and which here go over all scores of all heads one after
another: half of a small model's time. MultiHeadAttention (domain com.microsoft) goes over them in tiles that stay in
the caches, but only where it is given no mask. So the mask becomes part of the product,

    softmax(q k^T + m) v = softmax([q | 1] [k | m]^T) v

whose new terms are q k^T + m to the last bit where m is 0. It is done to the graph in memory; the file stays as it is.

Shapes: B rows, L tokens, H heads, K head width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .onnx_export import INPUT

DOMAIN = "com.microsoft"
_HEADS_FIRST, _ACROSS = [0, 2, 1, 3], [0, 2, 3, 1]


@dataclass(frozen=True, eq=False)
class _Attention:
    """Names of q, k, v (B, L, H, K), mask (B, 1, 1, L) and result (B, L, H K), and the nodes between them."""

    q: str
    k: str
    v: str
    mask: str
    out: str
    nodes: list[Any]


def with_fused_attention(path: Path) -> bytes | None:
    """The file's graph with fused attention, its weights still where they lie; None where there is none to fuse.

    In fp16 there is none: the operator multiplies fp32 alone on a CPU.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    props = {each.key: each.value for each in model.metadata_props}
    facts = json.loads(props.get("protnest", "{}"))
    members = facts.get("models", [])
    if "nested" not in facts.get("outputs", ()):
        members = members[-1:]
    heads = [member["config"]["heads"] for member in members for _ in range(member["config"]["layers"])]
    return model.SerializeToString() if fuse_attention(model, heads) else None


def fuse_attention(model: Any, heads: Sequence[int]) -> bool:
    """Fuses every attention of an `onnx.ModelProto`, in place; False, with nothing changed, where one looks otherwise.

    Args:
        model: as `onnx_export` makes it.
        heads: of each attention, in the graph's order.
    """
    from onnx import helper

    graph = model.graph
    nodes = list(graph.node)
    maker = {name: node for node in nodes for name in node.output}
    takers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    found = [_find(node, maker, takers) for node in nodes if node.op_type == "Softmax"]
    whole = [each for each in found if each is not None]
    if not whole or len(whole) != len(found) or len(found) != len(heads):
        return False
    gone = {id(node) for each in whole for node in each.nodes}
    ends = {id(each.nodes[-1]): (each, count) for each, count in zip(whole, heads, strict=True)}
    columns: dict[tuple[str, int], tuple[str, str]] = {}
    made: list[Any] = []
    for node in nodes:
        if id(node) in ends:
            each, count = ends[id(node)]
            if (each.mask, count) not in columns:
                columns[each.mask, count] = _columns(graph, made, each.mask, count, f"fused_{len(columns)}")
            made += _fused(each, count, *columns[each.mask, count])
        elif id(node) not in gone:
            made.append(node)
    _constant(graph, "fused_flat", np.array([0, 0, -1], dtype=np.int64))
    del graph.node[:]
    graph.node.extend(made)
    del graph.value_info[:]
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return True


def _find(softmax: Any, maker: dict[str, Any], takers: dict[str, list[Any]]) -> _Attention | None:
    """The attention around a softmax; None where something else is there, or takes part in what is between."""
    between: list[Any] = []

    def made(name: str, operation: str) -> Any:
        node = maker.get(name)
        if node is None or node.op_type != operation or len(takers[name]) != 1:
            raise LookupError
        between.append(node)
        return node

    def taken(name: str, operation: str) -> Any:
        if len(takers.get(name, ())) != 1 or takers[name][0].op_type != operation:
            raise LookupError
        between.append(takers[name][0])
        return takers[name][0]

    def turned(node: Any, order: list[int]) -> Any:
        if list(node.attribute[0].ints) != order:
            raise LookupError
        return node

    try:
        masked = made(softmax.input[0], "Add")
        scores = made(masked.input[0], "MatMul")
        q = turned(made(scores.input[0], "Transpose"), _HEADS_FIRST)
        k = turned(made(scores.input[1], "Transpose"), _ACROSS)
        between.append(softmax)
        attended = taken(softmax.output[0], "MatMul")
        v = turned(made(attended.input[1], "Transpose"), _HEADS_FIRST)
        end = taken(turned(taken(attended.output[0], "Transpose"), _HEADS_FIRST).output[0], "Reshape")
    except LookupError:
        return None
    return _Attention(q.input[0], k.input[0], v.input[0], masked.input[1], end.output[0], between)


def _columns(graph: Any, made: list[Any], mask: str, heads: int, prefix: str) -> tuple[str, str]:
    """Makes the columns that are set beside q and k, (B, L, H, 1), and gives their names: ones, and the mask."""
    from onnx import helper

    names = {name: f"{prefix}_{name}" for name in ("rows", "shape", "ones", "tokens", "mask", "heads", "one", "order")}
    _constant(graph, names["heads"], np.array([heads, 1], dtype=np.int64))
    _constant(graph, names["one"], np.array(1.0, dtype=np.float32))
    _constant(graph, names["order"], np.array([0, -1, 1, 1], dtype=np.int64))
    made += [
        helper.make_node("Shape", [INPUT], [names["rows"]]),
        helper.make_node("Concat", [names["rows"], names["heads"]], [names["shape"]], axis=0),
        helper.make_node("Expand", [names["one"], names["shape"]], [names["ones"]]),
        helper.make_node("Reshape", [mask, names["order"]], [names["tokens"]]),
        helper.make_node("Expand", [names["tokens"], names["shape"]], [names["mask"]]),
    ]
    return names["ones"], names["mask"]


def _fused(each: _Attention, heads: int, ones: str, mask: str) -> list[Any]:
    from onnx import helper

    wide, flat = [f"{each.out}_fused_{part}" for part in "qk"], [f"{each.out}_fused_flat_{part}" for part in "qkv"]
    return [
        helper.make_node("Concat", [each.q, ones], [wide[0]], axis=-1),
        helper.make_node("Concat", [each.k, mask], [wide[1]], axis=-1),
        *(
            helper.make_node("Reshape", [name, "fused_flat"], [made])
            for name, made in zip([*wide, each.v], flat, strict=True)
        ),
        helper.make_node("MultiHeadAttention", flat, [each.out], domain=DOMAIN, num_heads=heads, scale=1.0),
    ]


def _constant(graph: Any, name: str, value: np.ndarray[Any, Any]) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(value, name))
