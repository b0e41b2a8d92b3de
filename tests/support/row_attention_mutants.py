"""Mistakes of a line in kernels/row_attention.py, and in csrc/rotary_attention.cpp where it takes a list of queries.

Each must fail the checks that the true file passes.
"""

from __future__ import annotations

_QUERIES = "apply_rotary(qkv_TC[index_R, :D].view(-1, heads, K), cos_P1J[places_R], sin_P1J[places_R])"
_KEYS = "apply_rotary(qkv_TC[:, D : 2 * D].view(T, heads, K), cos_P1J[places_T], sin_P1J[places_T])"
_PLACES = "torch.arange(T, device=qkv_TC.device) - begins_T"
_UNIFORM = "len(set(lengths_B)) == 1 and len(set(counts_B)) == 1"
_UNIFORM_OUT = "F.scaled_dot_product_attention(q, k, v).transpose(1, 2)"
_RAGGED_OUT = "F.scaled_dot_product_attention(q, k, v)[0]"

MUTANTS = {
    "queries not turned": (_QUERIES, "qkv_TC[index_R, :D].view(-1, heads, K)"),
    "keys not turned": (_KEYS, "qkv_TC[:, D : 2 * D].view(T, heads, K)"),
    "queries turned the other way": ("sin_P1J[places_R]", "-sin_P1J[places_R]"),
    "keys turned the other way": ("sin_P1J[places_T]", "-sin_P1J[places_T]"),
    "queries turned by their number": ("places_R = places_T[index_R]", "places_R = places_T[: len(index_R)]"),
    "queries at the first place": ("places_R = places_T[index_R]", "places_R = 0 * places_T[index_R]"),
    "queries a place late": ("places_R = places_T[index_R]", "places_R = (places_T[index_R] - 1).clamp(min=0)"),
    "places counted over the batch": (_PLACES, "torch.arange(T).clamp(max=len(table.cos_PJ) - 8)"),
    "places within the first length": (_PLACES, "torch.arange(T) % max(1, lengths_B[0])"),
    "first rows for the chosen ones": ("qkv_TC[index_R, :D]", "qkv_TC[: len(index_R), :D]"),
    "rows sorted": ("    places_R =", "    index_R = index_R.sort().values\n    places_R ="),
    "keys for queries": ("qkv_TC[index_R, :D]", "qkv_TC[index_R, D : 2 * D]"),
    "values for keys": ("qkv_TC[:, D : 2 * D]", "qkv_TC[:, 2 * D :]"),
    "keys for values": ("qkv_TC[:, 2 * D :]", "qkv_TC[:, D : 2 * D]"),
    "channels before heads": (
        "qkv_TC[:, 2 * D :].view(T, heads, K)",
        "qkv_TC[:, 2 * D :].view(T, K, heads).transpose(1, 2)",
    ),
    "uniform where lengths agree": (_UNIFORM, "len(set(lengths_B)) == 1"),
    "uniform where counts agree": (_UNIFORM, "len(set(counts_B)) == 1"),
    "uniform where either agrees": (_UNIFORM, _UNIFORM.replace("and", "or")),
    "uniform without scale": (_UNIFORM_OUT, _UNIFORM_OUT.replace("v)", "v, scale=1.0)")),
    "uniform without what comes later": (_UNIFORM_OUT, _UNIFORM_OUT.replace("v)", "v, is_causal=True)")),
    "uniform with keys of other sequences": (_UNIFORM_OUT, _UNIFORM_OUT.replace(" k,", " k.flip(0),")),
    "uniform with values of other sequences": (_UNIFORM_OUT, _UNIFORM_OUT.replace(" v)", " v.flip(0))")),
    "uniform with queries of other sequences": (_UNIFORM_OUT, _UNIFORM_OUT.replace("(q,", "(q.flip(0),")),
    "uniform with values of other heads": (_UNIFORM_OUT, _UNIFORM_OUT.replace(" v)", " v.flip(1))")),
    "uniform by heads": (_UNIFORM_OUT, "F.scaled_dot_product_attention(q, k, v).reshape(B, -1, heads, K)"),
    "ragged without scale": (_RAGGED_OUT, _RAGGED_OUT.replace("v)", "v, scale=1.0)")),
    "ragged without what comes later": (_RAGGED_OUT, _RAGGED_OUT.replace("v)", "v, is_causal=True)")),
    "ragged by heads": (
        _RAGGED_OUT + ".transpose(0, 1)",
        _RAGGED_OUT + ".reshape(-1, heads, K)",
    ),
    "keys from the first sequence on": (
        "k_THK[t:t_end], v_THK[t:t_end]",
        "k_THK[:t_end], v_THK[:t_end]",
    ),
    "last key left out": (
        "k_THK[t:t_end], v_THK[t:t_end]",
        "k_THK[t : max(t + 1, t_end - 1)], v_THK[t : max(t + 1, t_end - 1)]",
    ),
    "values of the sequence at the other end": ("v_THK[t:t_end]", "v_THK[T - t_end : T - t]"),
    "values a row late": ("v_THK[t:t_end]", "v_THK.roll(1, 0)[t:t_end]"),
    "queries of the other end": ("q_RHK[r:r_end]", "q_RHK.flip(0)[r:r_end]"),
    "single rows left out": ("if r_end > r:", "if r_end > r + 1:"),
    "what the product left to be done": ("_attend(qkv.numbers(), table", "_attend(qkv.values_NO.float(), table"),
}
"""Name -> (the line's text, what takes its place)."""

REFERENCE_MUTANTS = {
    "reference gives the first rows": ("cu_seqlens, heads)[index_R]", "cu_seqlens, heads)[: len(index_R)]"),
    "reference sorts the rows": ("cu_seqlens, heads)[index_R]", "cu_seqlens, heads)[index_R.sort().values]"),
    "reference without what is to be done": (
        "row_attention_reference(qkv.numbers()",
        "row_attention_reference(qkv.values_NO.float()",
    ),
}
"""The same, of what `impl="reference"` runs."""

CPU_MUTANTS = {
    "counts not added up": ("np.cumsum([0, *counts_B], dtype=np.int64)", "np.array([0, *counts_B])"),
    "counts from the last sequence on": ("np.cumsum([0, *counts_B]", "np.cumsum([0, *counts_B[::-1]]"),
    "C++ gets the rows sorted": ("array(index_R)", "array(index_R.sort().values)"),
    "C++ gets what is to be done left out": (
        "product_arrays(product)",
        "product_arrays(product._replace(bias_O=None))",
    ),
    "C++ has half of the heads": ("        heads,\n        level", "        max(1, heads // 2),\n        level"),
    "sines for cosines": ("array(cos_PJ)", "array(sin_PJ)"),
}
"""The same, of what runs C++."""

_QUERY = "turn_factors(row, (part.head + h) * K, input, place, factor"
_FIRST = "input.rows + to"
_COUNT = "input.cu_rows[b + 1] - to"
_ALL = "input.cu_rows[input.sequences]"
# Of rows that lie elsewhere; what is broken still reads its own sequence.
_INSIDE = {
    "part.rows[query] - part.begin": "std::clamp<std::int64_t>(part.rows[query] - part.begin, 0, part.length - 1)"
}

CPP_MUTANTS: dict[str, dict[str, str]] = {
    "places from the batch's begin": {_QUERY: _QUERY.replace("place", "part.rows[query] % part.length")},
    "places by the query's number": {_QUERY: _QUERY.replace("place", "query")},
    "listed queries not scaled": {_QUERY: _QUERY.replace(", factor", ", 1.0f")},
    "listed queries of the first part's heads": {_QUERY: _QUERY.replace("part.head + h", "h")},
    "keys for listed queries": {_QUERY: _QUERY.replace("(part.head", "(input.heads + part.head")},
    "first tokens for the listed ones": {
        "const Row row(input, part.begin + place)": "const Row row(input, part.begin + query)"
    },
    "listed queries backwards": {"+ query * steps": "+ (part.count - 1 - query) * steps"},
    "rows of the next sequence": {_FIRST: f"input.rows + std::min(input.cu_rows[b + 1], {_ALL} - ({_COUNT}))"}
    | _INSIDE,
    "as many rows as the sequence before": {
        _COUNT: f"std::min(b > 0 ? input.cu_rows[b] - input.cu_rows[b - 1] : 0, {_ALL} - to)"
    }
    | _INSIDE,
    "written at the token": {"part.to + p": f"std::min(part.begin, {_ALL} - part.count) + p"},
    "blocks after the first left out": {"p < part.count; p += 2 * W": "p < std::min(part.count, 2 * W); p += 2 * W"},
    "one row of a sequence left out": {"part.count > 0": "part.count > 1"},
}
"""Name -> text of csrc/rotary_attention.cpp -> what takes its place. All write and read within their buffers."""
