"""Proteins in; embeddings, scores and sequences out.

The public names below are imported on first use, so that importing this package loads neither torch nor anything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if not __name__.startswith("protnest."):
    _message = f"import protnest.engine, not {__name__}: the bare folder name belongs to other projects"
    raise ImportError(_message)

if TYPE_CHECKING:
    from .chain import Chain
    from .embedder import Embedder
    from .embeddings import read_embeddings
    from .encoder import Encoder
    from .errors import InputError
    from .fair_esm import from_fair_esm
    from .fasta import read_fasta
    from .library import embed_library
    from .models import from_transformers, load_model
    from .scoring import score_variants

_HOMES = {
    "Chain": "chain",
    "Embedder": "embedder",
    "Encoder": "encoder",
    "InputError": "errors",
    "embed_library": "library",
    "from_fair_esm": "fair_esm",
    "from_transformers": "models",
    "load_model": "models",
    "read_embeddings": "embeddings",
    "read_fasta": "fasta",
    "score_variants": "scoring",
}

__all__ = [
    "Chain",
    "Embedder",
    "Encoder",
    "InputError",
    "embed_library",
    "from_fair_esm",
    "from_transformers",
    "load_model",
    "read_embeddings",
    "read_fasta",
    "score_variants",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
