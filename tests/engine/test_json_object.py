"""JSON files that hold an object, and what is said of others."""

from __future__ import annotations

from pathlib import Path

import pytest
from protnest.engine import InputError
from protnest.engine.json_object import read_object
from protnest.engine.schema_version import check_schema_version


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "naïve"}', encoding="utf-8")
    assert read_object(tmp_path / "a.json") == {"name": "naïve"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", r"not readable as JSON \(Expecting"),
        (b"\xff", r"not readable as JSON \(.*codec"),
        (b"[1]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json: {problem}"):
        read_object(tmp_path / "a.json", missing="never mind")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json: no such file; a run writes it$"):
        read_object(tmp_path / "a.json", missing="a run writes it")
    with pytest.raises(InputError, match=r"not readable as JSON \(.*No such file"):
        read_object(tmp_path / "a.json")
    # A folder is there, and is no file.
    with pytest.raises(InputError, match="not readable as JSON"):
        read_object(tmp_path, missing="a run writes it")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    check_schema_version(2, 2, file=tmp_path)
    check_schema_version("2", "2", file=tmp_path)
    for found, known in ((1, 2), ("2", 2), (None, "2")):
        with pytest.raises(InputError, match=f"has schema version {found}, this release reads {known}$"):
            check_schema_version(found, known, file=tmp_path)
