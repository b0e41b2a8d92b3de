"""What tests of kernels share: the extension without its attention, compiled once for all of its broken twins."""

from __future__ import annotations

from pathlib import Path

import pytest
from protnest.kernels.extension import load, missing_reason

from support.source_mutants import compile_rest


@pytest.fixture(scope="session")
def attention_rest(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Object files of everything but csrc/rotary_attention.cpp."""
    if load() is None:
        pytest.skip(f"cpu: {missing_reason()}")
    return compile_rest("rotary_attention", tmp_path_factory.mktemp("rest"))
