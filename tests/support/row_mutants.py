"""Broken twins of the passes between matrix products: which file, and what is changed in it."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

from support.source_mutants import compile_rest, load_cpp_mutant

CppMutants = dict[str, tuple[str, dict[str, str]]]

LEVELS_MUTANTS: CppMutants = {
    "levels without the -128": ("row_numbers.hpp", {"(12582912.0f - 128.0f)": "12582912.0f"}),
    "shift without the 128 steps": (
        "row_numbers.hpp",
        {"low + target.scale_N[n] * 128.0f;": "low;"},
    ),
    "halves upwards": (
        "row_numbers.hpp",
        {"+ (12582912.0f - 128.0f);": "+ 0.0001f + (12582912.0f - 128.0f);"},
    ),
    "product and sum rounded as one": (
        "row_numbers.hpp",
        {"rounded((L::load(row + c) - low) * inverse)": ("((L::load(row + c) - low) * inverse)")},
    ),
    "inverse rounded twice": ("row_numbers.hpp", {"255.0f / range;": "255.0f * rounded(1.0f / range + Float{})[0];"}),
    "scale for 256 steps": ("row_numbers.hpp", {"range / 255.0f": "range / 256.0f"}),
    "smallest number of the last columns missed": ("row_numbers.hpp", {"low = std::min(low, row[c]), high": "high"}),
    "largest number of the last columns missed": (
        "row_numbers.hpp",
        {"high = std::max(high, row[c]), finite": "finite"},
    ),
    "NaN not looked for in vectors": ("row_numbers.hpp", {"probe += value * 0.0f;": ""}),
    "NaN not looked for in the last columns": ("row_numbers.hpp", {", finite += row[c] * 0.0f;": ";"}),
    "overflow of the range not looked for": (
        "row_numbers.hpp",
        {"finite == 0.0f && range <= std::numeric_limits<float>::max()": "finite == 0.0f"},
    ),
    "constants from a larger range on": ("row_numbers.hpp", {"range < 7.8886091e-31f": "range <= 7.8886091e-31f"}),
    "constants from a smaller range on": ("row_numbers.hpp", {"range < 7.8886091e-31f": "range < 7.88e-31f"}),
    "shift of a constant is 0": ("row_numbers.hpp", {"is_finite ? low :": "is_finite ? 0.0f :"}),
    "constants keep what was there": ("row_numbers.hpp", {"std::fill_n(to, C, std::uint8_t{0});": ""}),
    "last levels stored as whole vectors": (
        "row_numbers.hpp",
        {"reinterpret_cast<Unsigned>(levels)), C - c);": "reinterpret_cast<Unsigned>(levels)), W);"},
    ),
}
"""Seen by test_quantise_rows."""

ADD_NORM_MUTANTS: CppMutants = {
    "lanes beyond the row in the variance": (
        "row_passes.cpp",
        {"for (std::int64_t c = C; c < padded_C; ++c) row[c] = mean;": ""},
    ),
    "their squares taken off the sum": (
        "row_passes.cpp",
        {
            "for (std::int64_t c = C; c < padded_C; ++c) row[c] = mean;": "",
            "IO::sum(squares) / count": "(IO::sum(squares) - (padded_C - C) * mean * mean) / count",
        },
    ),
    "mean over the padded width": ("row_passes.cpp", {"IO::sum(total) / count": "IO::sum(total) / padded_C"}),
    "variance over the padded width": ("row_passes.cpp", {"IO::sum(squares) / count": "IO::sum(squares) / padded_C"}),
    "variance over C - 1": ("row_passes.cpp", {"IO::sum(squares) / count": "IO::sum(squares) / (count - 1)"}),
    "eps left out": ("row_passes.cpp", {"std::sqrt(variance + eps)": "std::sqrt(variance)"}),
    "eps outside the root": ("row_passes.cpp", {"std::sqrt(variance + eps)": "(std::sqrt(variance) + eps)"}),
    "not centred": ("row_passes.cpp", {"(L::load(row + c) - mean) * scale": "L::load(row + c) * scale"}),
    "weight left out": ("row_passes.cpp", {"off * L::load(weight.data() + c)": "off"}),
    "norm's bias left out": ("row_passes.cpp", {" + L::load(bias.data() + c));": ");"}),
    "sum not stored": ("row_passes.cpp", {"IO::store(x_C + c, value, C - c);": ""}),
    "last numbers of the stream stored as whole vectors": (
        "row_passes.cpp",
        {"IO::store(x_C + c, value, C - c);": "IO::store(x_C + c, value, W);"},
    ),
    "one lane left out of sums": ("row_numbers.hpp", {"lane < W; ++lane) result": "lane < W - 1; ++lane) result"}),
    "last numbers read as whole vectors": (
        "row_numbers.hpp",
        {"Vector value{};\n        if (count >= W)": "Vector value{};\n        if (true)"},
    ),
    "product's bias left out": (
        "row_numbers.hpp",
        {"product.bias_C == nullptr ? value : value + L::load(columns.bias.data() + c)": "value"},
    ),
    "bias of integers left out": (
        "row_numbers.hpp",
        {"* product.shift_N[n] + L::load(columns.bias.data() + c);": "* product.shift_N[n];"},
    ),
    "sums left out": ("row_numbers.hpp", {"L::load(columns.sums.data() + c) * product": "product"}),
    "steps left out": ("row_numbers.hpp", {"L::load(columns.steps.data() + c) * Types": "Types"}),
    "scale and shift exchanged": (
        "row_numbers.hpp",
        {"value * product.scale_N[n] + shift": "value * product.shift_N[n] + shift"},
    ),
    "scale of the first row": ("row_numbers.hpp", {"value * product.scale_N[n]": "value * product.scale_N[0]"}),
    "bf16 cut off": ("row_numbers.hpp", {"bits + 0x7fffu + ((bits >> 16) & 1u)": "bits"}),
    "bf16's halves upwards": ("row_numbers.hpp", {"bits + 0x7fffu + ((bits >> 16) & 1u)": "bits + 0x8000u"}),
    "bf16 read in the lower half": (
        "row_numbers.hpp",
        {"load<Halves>(from, C - c)) << 16": "load<Halves>(from, C - c))"},
    ),
}
"""Seen by test_add_norm."""

BIAS_GELU_MUTANTS: CppMutants = {
    "a coefficient's last digits": ("row_passes.cpp", {"1.421413741f": "1.421415f"}),
    "first coefficient's last digits": ("row_passes.cpp", {"0.254829592f": "0.2548305f"}),
    "argument's last digits": ("row_passes.cpp", {"0.3275911f": "0.327592f"}),
    "a root of two too short": ("row_passes.cpp", {"0.70710678f": "0.70710f"}),
    "exponential of degree 3": ("row_passes.cpp", {"exp2<5>": "exp2<3>"}),
    "exponential's last digits": ("row_passes.cpp", {"-1.44269504f": "-1.44270f"}),
    "tail on the other side": ("row_passes.cpp", {"x < 0.0f ? tail : 1.0f - tail": "x > 0.0f ? tail : 1.0f - tail"}),
    "tail subtracted on both sides": ("row_passes.cpp", {"(x < 0.0f ? tail : 1.0f - tail)": "(1.0f - tail)"}),
    "tail by symmetry alone": (
        "row_passes.cpp",
        {"(x < 0.0f ? tail : 1.0f - tail)": "(x < 0.0f ? 1.0f - (1.0f - tail) : 1.0f - tail)"},
    ),
    "gelu by a logistic of x": (
        "row_passes.cpp",
        {
            "return x * (x < 0.0f ? tail : 1.0f - tail);": (
                "const Float e = L::template exp2<5>((x < 0.0f ? x : -x) * 2.4554669f);\n"
                "        return x * (x < 0.0f ? e / (e + 1.0f) : 1.0f / (e + 1.0f)) + tail * 0.0f;"
            )
        },
    ),
    "gelu by tanh": (
        "row_passes.cpp",
        {
            "return x * (x < 0.0f ? tail : 1.0f - tail);": (
                "const Float u = (x < 0.0f ? x : -x) * (x * x * 0.044715f + 1.0f) * 2.3022082f;\n"
                "        const Float e = L::template exp2<5>(u);\n"
                "        return x * (x < 0.0f ? e / (e + 1.0f) : 1.0f / (e + 1.0f)) + tail * 0.0f;"
            )
        },
    ),
    "bf16's NaN rounded": ("row_numbers.hpp", {"value == value ? bits + 0x7fffu": "true ? bits + 0x7fffu"}),
    "not moved": ("row_passes.cpp", {"if (!times.empty()) value": "if (false) value"}),
    "minus added": ("row_passes.cpp", {"c) - L::load(minus.data() + c);": "c) + L::load(minus.data() + c);"}),
    "last results stored as whole vectors": (
        "row_numbers.hpp",
        {
            "store(static_cast<float*>(target.values) + n * C + c, L::load(row + c), C - c)": (
                "store(static_cast<float*>(target.values) + n * C + c, L::load(row + c), W)"
            )
        },
    ),
    "rows of a thread begin with the first": (
        "row_numbers.hpp",
        {"rows(N * part / threads, N * (part + 1) / threads)": "rows(0, N * (part + 1) / threads)"},
    ),
    "last row of a thread left out": (
        "row_numbers.hpp",
        {"N * (part + 1) / threads);": "N * (part + 1) / threads - 1);"},
    ),
    "bias of the first columns": (
        "row_numbers.hpp",
        {"value : value + L::load(columns.bias.data() + c)": "value : value + L::load(columns.bias.data())"},
    ),
}
"""Seen by test_bias_gelu."""


@functools.cache
def _rest(base: Path) -> list[Path]:
    folder = base / "without_row_passes"
    folder.mkdir()
    return compile_rest("row_passes", folder)


def load_row_mutant(changed: str, changes: dict[str, str], base: Path, folder: Path) -> ModuleType:
    """Loads the extension with lines of `changed` replaced.

    Args:
        changed: "row_passes.cpp" or "row_numbers.hpp".
        changes: text that occurs in it -> what takes its place.
        base: where the other files' objects are kept, once for a whole session.
        folder: of this mutant alone.
    """
    assert changed in ("row_passes.cpp", "row_numbers.hpp")
    return load_cpp_mutant(("row_passes.cpp", "row_numbers.hpp"), changes, _rest(base), folder)
