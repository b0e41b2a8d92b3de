"""pLDDT through a stub of ESMFold, and folders that hold none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine import InputError
from protnest.training.folding import folding, load_esmfold

from support.predictors import Followed


class Stub:
    """Says of each residue's alpha carbon that it is as sure as the letter tells; of all other atoms, nothing."""

    def __init__(self) -> None:
        self.sure = {"A": 0.9, "C": 0.5, "D": 0.1}
        self.seen: list[str] = []

    def infer(self, sequences: list[str]) -> dict[str, torch.Tensor]:
        (sequence,) = sequences
        self.seen.append(sequence)
        plddt = torch.zeros(1, len(sequence), 37)
        plddt[0, :, 1] = torch.tensor([self.sure[letter] for letter in sequence])
        return {"plddt": plddt}

    def eval(self) -> Stub:
        return self

    def float(self) -> Stub:
        return self

    def to(self, device: str) -> Stub:
        return self


def test_plddt_is_the_mean_of_designs() -> None:
    seen = Followed()
    found = folding(Stub(), ["AAAA", "CC", "AD"], samples=50, follower=seen)
    assert found.plddt.value == pytest.approx((90 + 50 + 50) / 3, rel=1e-6)
    assert found.plddt.n == 3
    assert found.confident.value == pytest.approx(1 / 3)
    assert (seen.stages, seen.told) == ([("folding 3 designs", 8)], [[4, 2, 2]])


def test_at_most_so_many_are_folded() -> None:
    designs = ["A" * length for length in range(1, 31)]
    first, again, other = Stub(), Stub(), Stub()
    assert folding(first, designs, most=5, samples=5).plddt.n == 5
    folding(again, designs, most=5, samples=5)
    folding(other, designs, most=5, samples=5, seed=1)
    assert first.seen == again.seen != other.seen
    assert len(set(first.seen)) == 5


def test_folders_that_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"there is no config\.json"):
        load_esmfold(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "esm", "is_folding_model": True}))
    with pytest.raises(InputError, match="holds no weights"):
        load_esmfold(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match="is no ESMFold: "):
        load_esmfold(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs transformers: pip install transformers"):
        load_esmfold(tmp_path)


def test_weights_are_read_from_the_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked: list[tuple[Path, dict[str, Any]]] = []

    missing = ["esm.contact_head.regression.weight"]

    def from_pretrained(folder: Path, **options: Any) -> tuple[Stub, dict[str, list[str]]]:
        asked.append((folder, options))
        return Stub(), {"missing_keys": missing}

    monkeypatch.setattr(transformers.EsmForProteinFolding, "from_pretrained", from_pretrained)
    assert isinstance(load_esmfold(tmp_path), Stub)
    assert asked == [(tmp_path, {"local_files_only": True, "output_loading_info": True})]
    # A plain encoder would be given a trunk of random numbers.
    missing += ["trunk.structure_module.bb_update.linear.bias", "trunk.structure_module.bb_update.linear.weight"]
    with pytest.raises(InputError, match=r"is no ESMFold: 2 of its tensors are missing, trunk\.structure_module"):
        load_esmfold(tmp_path)
