"""One-line mistakes in kernels/row_attention.py; each must fail the checks that the true file passes."""

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
