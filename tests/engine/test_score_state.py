"""What a scoring run keeps on disk: whole or not at all, one run's alone, never another's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.engine.score_state import SCHEMA_VERSION, ScoreState

SETTINGS = {"method": "pseudo-ll", "models": [["a", "x"]], "offset": 0}


def state(folder: Path, settings: dict[str, object] = SETTINGS, *, overwrite: bool = False) -> ScoreState:
    return ScoreState(folder, settings, overwrite=overwrite)


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "work"
    logits = np.linspace(-3, 5, 12, dtype=np.float32).reshape(4, 3)[::-1]
    numbers = np.array([1e-300, -0.0, np.pi])
    with state(folder) as held:
        held.save(0, 7, logits, complete=True)
        held.save(1, 7, numbers, complete=True)
        assert held.load(7, 0) is None
    with state(folder) as held:
        first, second = held.load(0, 7), held.load(1, 7)
        assert first is not None
        assert second is not None
        assert (first.dtype, first.tobytes()) == (np.float32, np.ascontiguousarray(logits).tobytes())
        assert (second.dtype, second.tobytes()) == (np.float64, numbers.tobytes())
    run = json.loads((folder / "run.json").read_text())
    assert run == {"schema_version": SCHEMA_VERSION, "settings": SETTINGS}


def test_unfinished_values_are_kept_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("protnest.engine.score_state.time.monotonic", lambda: now)
    with state(tmp_path) as held:
        now = 105.0
        held.save(0, 0, np.zeros(1), complete=False)
        assert held.load(0, 0) is None
        now = 110.5
        held.save(0, 0, np.zeros(2), complete=False)
        now = 115.0
        held.save(0, 0, np.zeros(3), complete=False)
        kept = held.load(0, 0)
        assert kept is not None
        assert len(kept) == 2
        held.save(0, 1, np.zeros(4), complete=True)
        now = 124.9
        held.save(0, 0, np.zeros(5), complete=False)
        kept = held.load(0, 0)
        assert kept is not None
        assert len(kept) == 2, "a finished protein counts as the last time"


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ScoreState(None, SETTINGS) as held:
        held.save(0, 0, np.zeros(1), complete=True)
        assert held.load(0, 0) is None
        held.clear()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_damaged_values_are_computed_anew(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    with state(tmp_path) as held:
        held.save(0, 0, np.arange(100.0), complete=True)
        path = tmp_path / "0-0.safetensors"
        path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
        assert held.load(0, 0) is None
    assert f"{path} is damaged" in caplog.text


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with state(tmp_path) as held:
        held.save(0, 0, np.zeros(1), complete=True)
    other = {**SETTINGS, "offset": 3}
    message = "holds an unfinished run with other settings (offset: 0 there, 3 now); --overwrite starts anew"
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: {message}")), state(tmp_path, other):
        pass
    with state(tmp_path) as held:
        assert held.load(0, 0) is not None, "a refusal touches nothing"
    with state(tmp_path, overwrite=True) as held:
        assert held.load(0, 0) is not None, "the same settings go on, --overwrite or not"
    with state(tmp_path, other, overwrite=True) as held:
        assert held.load(0, 0) is None
    with state(tmp_path, other) as held:
        assert held.load(0, 0) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"settings": {}}', '{"settings": [], "schema_version": 1}', "\udcff"]
)
def test_unreadable_runs_are_refused(tmp_path: Path, text: str) -> None:
    with state(tmp_path) as held:
        held.save(0, 0, np.zeros(1), complete=True)
    (tmp_path / "run.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=r"run\.json: not a readable run .*--overwrite starts anew"):
        state(tmp_path).__enter__()
    with state(tmp_path, overwrite=True) as held:
        assert held.load(0, 0) is None


def test_other_versions_are_refused(tmp_path: Path) -> None:
    run = {"schema_version": SCHEMA_VERSION + 1, "settings": SETTINGS}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match="schema version: 2 there, 1 now"):
        state(tmp_path).__enter__()


def test_values_without_a_run_are_not_trusted(tmp_path: Path) -> None:
    with state(tmp_path) as held:
        held.save(0, 0, np.zeros(1), complete=True)
    (tmp_path / "run.json").unlink()
    with state(tmp_path) as held:
        assert held.load(0, 0) is None


def test_a_folder_is_one_runs(tmp_path: Path) -> None:
    with state(tmp_path):
        with pytest.raises(InputError, match="another run is writing to this folder"):
            state(tmp_path).__enter__()
    with pytest.raises(InputError, match="other settings"):
        state(tmp_path, {}).__enter__()
    with state(tmp_path):
        pass  # A refused run lets go of the folder.


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        state(tmp_path / "file" / "work").__enter__()


def test_cleared_is_gone(tmp_path: Path) -> None:
    with state(tmp_path / "work") as held:
        held.save(0, 0, np.zeros(1), complete=True)
        (tmp_path / "work" / ".0-1.safetensors.tmp").write_text("left by a kill")
        held.clear()
        assert not [*tmp_path.iterdir()]
