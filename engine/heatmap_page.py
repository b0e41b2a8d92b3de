"""A landscape as one self-contained interactive page: data, style and scripts in one file, nothing fetched.

The parts lie in `pages/`. Texts reach the page as JSON in a script element that no browser runs, and its scripts put
them there as text, never as HTML; a policy in the page refuses every script but its own, and all of the network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACIDS
from .landscape import Landscape
from .palette import CHEMISTRY, COLOURS

_SCRIPTS = ("model", "drawing", "controls")


def render_page(landscape: Landscape) -> str:
    """The page's HTML."""
    parts = {name: _read(f"{name}.js") for name in _SCRIPTS}
    allowed = " ".join(_digest(parts[name]) for name in _SCRIPTS)
    parts["style"] = _read("heatmap.css")
    parts["policy"] = (
        f"default-src 'none'; img-src data: blob:; script-src {allowed}; style-src {_digest(parts['style'])}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts["data"] = encode_data(landscape)
    # In one pass: what has been put in is not searched again, whatever it holds.
    return re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], _read("heatmap.html"))


def encode_data(landscape: Landscape) -> str:
    """JSON that can stand in a script element: every `<` in it is escaped, so that none can end or begin an element.

    Fields: target, wild_type, first, method, model; amino_acids, the order of the columns; scores, L lists of 20, null
    where not known; entropy, L numbers or null each, or null; given, L strings of the amino acids that the table named;
    limit, where the colours end; groups, pairs of name and amino acids; colours, evenly spaced from -limit to limit.
    """
    content: dict[str, Any] = {
        "target": landscape.target,
        "wild_type": landscape.wild_type,
        "first": landscape.first,
        "method": landscape.method,
        "model": landscape.model,
        "amino_acids": AMINO_ACIDS,
        "scores": [_numbers(scores_A) for scores_A in landscape.scores_LA],
        "entropy": None if landscape.entropy_L is None else _numbers(landscape.entropy_L),
        "given": [_letters(given_A) for given_A in landscape.given_LA],
        "limit": landscape.limit,
        "groups": CHEMISTRY,
        "colours": COLOURS,
    }
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _numbers(values: npt.NDArray[np.float32]) -> list[float | None]:
    """With the fewest digits that give the same float32 again; None for NaN."""
    return [float(str(value)) if np.isfinite(value) else None for value in values]


def _letters(given_A: npt.NDArray[np.bool_]) -> str:
    return "".join(acid for acid, named in zip(AMINO_ACIDS, given_A, strict=True) if named)


def _read(name: str) -> str:
    return (resources.files(__package__) / "pages" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The source expression of a Content Security Policy that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
