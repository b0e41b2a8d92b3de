"""Chain files: what goes in comes out, and whatever is damaged or does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from protnest.engine import Chain, InputError
from protnest.engine.chain import ChainModel, Stage
from safetensors import safe_open
from safetensors.torch import save_file

from support.families import WIDTHS, models_of, random_chain, tiny_family

FAMILY = tiny_family()
CHAIN = random_chain(FAMILY)


@pytest.mark.parametrize("naive", [False, True], ids=["nested", "naive"])
def test_round_trip(tmp_path: Path, naive: bool) -> None:
    chain = dataclasses.replace(
        random_chain(FAMILY, naive=naive), report=({"held_out_r2": 0.5}, {"held_out_r2": 0.25}), fitted_on="unknown"
    )
    chain.save(tmp_path / "chain.safetensors")
    again = Chain.load(tmp_path / "chain.safetensors")
    for name in ("models", "regressor", "fitted_on", "data", "report", "widths", "max_residues", "fingerprint"):
        assert getattr(again, name) == getattr(chain, name), name
    for one, other in zip(again.stages, chain.stages, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        for name, tensor in one.tensors().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, other.tensors()[name])


def test_file_is_one_safetensors_file_that_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "chain.safetensors"
    CHAIN.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert metadata["schema_version"] == "1"
    facts = json.loads(metadata["chain"])
    assert facts["widths"] == list(WIDTHS)
    assert [model["fingerprint"] for model in facts["models"]] == [encoder.fingerprint for encoder in FAMILY]
    assert names == {f"stages.{n}.{t}" for n in (1, 2) for t in ("weight", "bias", "mean", "components")}
    assert [each.name for each in tmp_path.iterdir()] == ["chain.safetensors"]


def test_fingerprint_covers_every_tensor_and_model() -> None:
    seen = {CHAIN.fingerprint}
    for name in ("weight_XD", "bias_D", "mean", "components"):
        stage = dataclasses.replace(CHAIN.stages[1], **{name: getattr(CHAIN.stages[1], name) * 1.0001})
        seen.add(dataclasses.replace(CHAIN, stages=(CHAIN.stages[0], stage)).fingerprint)
    other = dataclasses.replace(CHAIN.models[0], fingerprint="0" * 32)
    seen.add(dataclasses.replace(CHAIN, models=(other, *CHAIN.models[1:])).fingerprint)
    assert len(seen) == 6


# Damaged files


def _saved(path: Path, **changes: Any) -> Path:
    """A chain file whose facts are changed, with its tensors as they are."""
    CHAIN.save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    facts = {**json.loads(metadata["chain"]), **changes}
    save_file(tensors, path, metadata={"schema_version": "1", "chain": json.dumps(facts)})
    return path


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "chain.safetensors"
    CHAIN.save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: is damaged: its tensors have the hash"):
        Chain.load(path)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_file_cut_short(tmp_path: Path, size: int) -> None:
    path = tmp_path / "chain.safetensors"
    CHAIN.save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="not a readable chain"):
        Chain.load(path)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "chain.safetensors"
    with pytest.raises(InputError, match="no such file; `protnest fit-chain` writes one"):
        Chain.load(path)
    with pytest.raises(InputError, match="not a readable chain"):
        Chain.load(tmp_path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="is a safetensors file, but no chain"):
        Chain.load(path)
    save_file({"x": torch.zeros(2)}, path, metadata={"schema_version": "7", "chain": "{}"})
    with pytest.raises(InputError, match="has schema version 7, this release reads 1"):
        Chain.load(path)
    save_file({"x": torch.zeros(2)}, path, metadata={"schema_version": "1", "chain": "{"})
    with pytest.raises(InputError, match="not a readable chain: JSONDecodeError"):
        Chain.load(path)
    save_file({"x": torch.zeros(2)}, path, metadata={"schema_version": "1", "chain": "{}"})
    with pytest.raises(InputError, match="not a readable chain: KeyError 'models'"):
        Chain.load(path)


def test_facts_that_do_not_fit_the_tensors(tmp_path: Path) -> None:
    models = [dataclasses.asdict(model) for model in CHAIN.models]
    with pytest.raises(InputError, match=r"stage 1: weight has shape \(16, 24\), expected None"):
        Chain.load(_saved(tmp_path / "a", regressor="naive"))
    with pytest.raises(InputError, match=r"KeyError 'stages\.3\.mean'"):
        Chain.load(_saved(tmp_path / "b", models=[*models, {**models[2], "width": 50}]))
    with pytest.raises(InputError, match=r"stage 2: weight has shape \(24, 40\), expected \(24, 41\)"):
        Chain.load(_saved(tmp_path / "c", models=[*models[:2], {**models[2], "width": 41}]))
    with pytest.raises(InputError, match="TypeError"):
        Chain.load(_saved(tmp_path / "d", models=[{"name": "x"}, *models[1:]]))


# Chains that cannot be


def _chain(widths: list[int]) -> Chain:
    models = tuple(ChainModel(name=f"m{width}", width=width, max_residues=10) for width in widths)
    return dataclasses.replace(CHAIN, models=models)


@pytest.mark.parametrize(
    ("widths", "problem"),
    [
        ([16, 24, 24], "widths must grow along a chain: m24 has 24, m24 after it 24"),
        ([24, 16, 40], "widths must grow along a chain: m24 has 24, m16 after it 16"),
        ([16], "a chain takes at least two models, got 1"),
        ([16, 24], "a chain of 2 models with 2 stages: expected one fewer"),
    ],
)
def test_widths_that_do_not_grow(widths: list[int], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        _chain(widths)


def test_stages_that_do_not_fit() -> None:
    stage = CHAIN.stages[1]
    broken = torch.full_like(stage.mean, torch.nan)
    for changed, problem in (
        ({"mean": broken}, "stage 2: mean is not finite"),
        ({"components": stage.components[:-1]}, r"stage 2: components has shape \(15, 40\), expected \(16, 40\)"),
        ({"weight_XD": None}, r"stage 2: weight has shape None, expected \(24, 40\)"),
    ):
        stages = (CHAIN.stages[0], dataclasses.replace(stage, **changed))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=problem):
            Chain(models=models_of(FAMILY), stages=stages, regressor="linear")


def test_fold_is_in_the_stages_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        stage: Stage = random_chain(FAMILY, dtype=dtype).stages[0]
        fold = stage.fold(FAMILY[1].final_norm.weight, FAMILY[1].final_norm.bias)
        assert {fold.projection_DN.dtype, fold.base_XN.dtype, fold.offset_N.dtype} == {dtype}
        assert (tuple(fold.projection_DN.shape), tuple(fold.base_XN.shape)) == ((24, 8), (16, 8))
