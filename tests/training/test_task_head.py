"""A head on hidden states: what it says, its file, the labels that it learns, and how it is judged.

Shapes: B proteins, R rows, O outputs, D width.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError
from protnest.engine.checkpoint import encoder_fingerprint
from protnest.engine.decoder import pack_ids
from protnest.training.head_task import (
    HeadData,
    HeadTask,
    head_config,
    head_loss,
    join_labels,
    judge_head,
    read_labels,
    seen_targets,
)
from protnest.training.order import Portion
from protnest.training.task_head import (
    GAIN,
    HEAD_FILE,
    HeadConfig,
    HeadedModel,
    TaskHead,
    load_head,
    load_headed,
    outputs_of,
    predict,
    save_head,
)
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from support.gpt2_models import load_pair
from support.learning import save_toy, toy_decoder, toy_encoder

PROTEINS = ["MKTAYIAK", "GSHM", "W", "ACDEFGHIKLMNPQRSTVWYACDEFG"]
"""The last one is longer than the toys' 20 residues, or 24 tokens."""


def _headed(kind: str = "encoder", pooling: str = "mean", **settings: Any) -> HeadedModel:
    model = toy_encoder(3) if kind == "encoder" else toy_decoder(3)
    chosen: dict[str, Any] = {"task": "regression", "pooling": pooling, "width": 16, "mean": 2.0, "scale": 3.0}
    head = TaskHead(HeadConfig(**{**chosen, **settings}))
    torch.nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(head.bias, generator=torch.Generator().manual_seed(2))
    return HeadedModel(model, head).eval().requires_grad_(False)


def _data(targets: list[list[float]], sequences: list[str] = PROTEINS) -> HeadData:
    ids = tuple(f"p{number}" for number in range(len(sequences)))
    return HeadData(ids=ids, sequences=tuple(sequences), targets=tuple(np.array(each) for each in targets))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_what_a_head_says(kind: str) -> None:
    """Of each protein alone, without ends, in fp64 from the model's own hidden states; batches change nothing."""
    residue = _headed(kind, "residue")
    mean = HeadedModel(residue.backbone, TaskHead(replace(residue.head.config, pooling="mean")))
    mean.head.load_state_dict(residue.head.state_dict())
    for number, sequence in enumerate(PROTEINS):
        if kind == "encoder":
            hidden_LD = torch.from_numpy(toy_encoder(3).eval().encode([sequence[:20]])[0])
        else:
            ids = residue.backbone.vocabulary.encode(sequence, whole=False)[:24]  # type: ignore[union-attr]
            hidden_LD = residue.backbone(pack_ids([ids]))[1:]
        wanted_L = (GAIN * hidden_LD.double() @ residue.head.weight.double().T + residue.head.bias)[:, 0] * 3 + 2
        found = predict(residue, PROTEINS, batch_tokens=30)[number]
        np.testing.assert_allclose(found, wanted_L.numpy(), rtol=1e-4, atol=1e-4)
        pooled = predict(mean, PROTEINS, batch_tokens=30)[number]
        assert pooled.shape == (1,)
        np.testing.assert_allclose(pooled, wanted_L.mean(dim=0, keepdim=True).numpy(), rtol=1e-4, atol=1e-4)


def test_classes_are_probabilities() -> None:
    model = _headed(task="classification", classes=("a", "b", "c"))
    found = predict(model, PROTEINS)
    assert [each.shape for each in found] == [(1, 3)] * 4
    outputs = outputs_of(model, PROTEINS)
    np.testing.assert_allclose(found[1], outputs[1].exp().numpy() / outputs[1].exp().sum().item(), rtol=1e-5)


def test_heads_come_back(tmp_path: Path) -> None:
    model = _headed(task="classification", pooling="residue", classes=("H", "E"))
    save_toy(tmp_path, model.backbone)
    model.head.config = replace(model.head.config, model=encoder_fingerprint(model.backbone))  # type: ignore[arg-type]
    save_head(model.head, tmp_path)
    again = load_headed(tmp_path, precision="fp32")
    assert again.head.config == model.head.config
    for one, other in zip(predict(again, PROTEINS), predict(model, PROTEINS), strict=True):
        np.testing.assert_array_equal(one, other)
    save_toy(tmp_path, toy_encoder(4))
    with pytest.raises(InputError, match="the head belongs to a model of the hash"):
        load_headed(tmp_path)


def test_files_that_are_no_heads(tmp_path: Path) -> None:
    path = tmp_path / HEAD_FILE
    with pytest.raises(InputError, match="not a readable head"):
        load_head(tmp_path)
    head = TaskHead(HeadConfig(task="regression", width=4))
    save_head(head, tmp_path)
    tensors = load_file(path)

    def written(version: str = "1", weight: torch.Tensor = tensors["weight"], **settings: Any) -> None:
        known = {"task": "regression", "width": 4, "classes": [], **settings}
        metadata = {"schema_version": version, "head": json.dumps(known)}
        save_file({**tensors, "weight": weight}, path, metadata=metadata)

    for problem, changes in {
        "has schema version 2, this release reads 1": {"version": "2"},
        "does not hold a whole head (unknown settings ['colour'])": {"colour": "red"},
        "does not hold a whole head (task is 'guess'; allowed: regression, classification)": {"task": "guess"},
        "does not hold a whole head (Error(s) in loading": {"weight": torch.zeros(1, 5)},
    }.items():
        written(**changes)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=re.escape(problem)):
            load_head(tmp_path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"task": "mlm"}, "task is 'mlm'; allowed"),
        ({"pooling": "max"}, "pooling is 'max'; allowed: mean, residue"),
        ({"task": "classification", "classes": ("a",)}, "1 classes are too few: at least 2"),
        ({"scale": 0.0}, "mean 0.0 and scale 0.0 must be finite"),
        ({"mean": math.inf}, "mean inf and scale 1.0 must be finite"),
    ],
)
def test_heads_that_cannot_be(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        HeadConfig(**{"task": "regression", "width": 16, **settings})


def test_heads_that_do_not_fit_their_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the head reads a width of 8, toy0 has 16"):
        HeadedModel(toy_encoder(), TaskHead(HeadConfig(task="regression", width=8)))
    _, decoder = load_pair(tmp_path)
    head = TaskHead(HeadConfig(task="regression", width=48, pooling="residue"))
    with pytest.raises(InputError, match="has tokens of several residues"):
        HeadedModel(decoder, head)


# Labels


def _table(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["l.csv", "l.tsv.gz"])
def test_labels(tmp_path: Path, name: str) -> None:
    text = "id,y,other\np0, 1.5,x\np3,-2,x\np1,,x\nelse,7,x\n"
    path = _table(tmp_path / name, text.replace(",", "\t") if "tsv" in name else text)
    table = read_labels(path, id_column="id", label_column="y")
    assert table == {"p0": ("1.5", 2), "p3": ("-2", 3), "p1": ("", 4), "else": ("7", 5)}
    data, classes = join_labels(["p0", "p1", "p2", "p3"], PROTEINS, table, task="regression", pooling="mean", file=path)
    assert (data.ids, data.sequences, classes) == (("p0", "p3"), (PROTEINS[0], PROTEINS[3]), ())
    assert [each.tolist() for each in data.targets] == [[1.5], [-2.0]]
    words, classes = join_labels(["p0", "p3"], PROTEINS[:2], table, task="classification", pooling="mean", file=path)
    assert (classes, [each.tolist() for each in words.targets]) == (("-2", "1.5"), [[1.0], [0.0]])
    assert data.fingerprint != words.fingerprint != replace(words, sequences=("A", "B")).fingerprint


def test_labels_of_residues(tmp_path: Path) -> None:
    table = {"p0": ("H-EH", 2), "p1": ("----", 3)}
    data, classes = join_labels(
        ["p0", "p1"], ["ACDE", "GHIK"], table, task="classification", pooling="residue", file=tmp_path
    )
    assert (classes, data.ids) == (("E", "H"), ("p0",))
    np.testing.assert_array_equal(data.targets[0], [1.0, np.nan, 0.0, 1.0])
    numbers, _ = join_labels(
        ["p0"], ["ACD"], {"p0": ("0.5 nan -1e1", 2)}, task="regression", pooling="residue", file=tmp_path
    )
    np.testing.assert_array_equal(numbers.targets[0], [0.5, np.nan, -10.0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name,label\np0,1\n", "has no column 'id'; it has name, label"),
        ("", "has no column 'id'; it has none"),
        ("id,label\n", "holds no label"),
        ("id,label\np0,1\np0,2\n", "line 3: id 'p0' is there twice, in line 2 first"),
        ("id,label\np0,high\n", "line 2: p0: the label is 'high', expected a number"),
        ("id,label\np0,inf\n", "line 2: p0: the label is 'inf', expected a number"),
        ("id,label\nq0,1\n", "none of 1 proteins has a label here; its ids are q0, ..."),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, text: str, problem: str) -> None:
    path = _table(tmp_path / "l.csv", text)
    with pytest.raises(InputError, match=re.escape(problem)):
        join_labels(
            ["p0"],
            ["MK"],
            read_labels(path, id_column="id", label_column="label"),
            task="regression",
            pooling="mean",
            file=path,
        )


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2: p0: 3 labels for 2 residues"):
        join_labels(["p0"], ["MK"], {"p0": ("HHH", 2)}, task="classification", pooling="residue", file=tmp_path)
    with pytest.raises(InputError, match="not a readable table"):
        read_labels(tmp_path / "none.csv", id_column="id", label_column="label")


# Learning and judging


def test_heads_begin_with_the_training_share() -> None:
    config = head_config("regression", "mean", 16, _data([[1.0], [3.0], [np.nan], [8.0]]), ())
    assert (config.mean, config.scale) == (4.0, pytest.approx(np.std([1.0, 3.0, 8.0])))
    with pytest.raises(InputError, match="all labels of 4 proteins to train on are 1: nothing to learn"):
        head_config("regression", "mean", 16, _data([[1.0]] * 4), ())
    with pytest.raises(InputError, match="1 classes among 4 proteins to train on: at least 2"):
        head_config("classification", "mean", 16, _data([[1.0]] * 4), ("a", "b"))


def test_losses_count_what_is_known() -> None:
    config = HeadConfig(task="regression", width=16, mean=1.0, scale=2.0)
    loss = head_loss(torch.tensor([[0.5], [9.0], [1.0]]), torch.tensor([2.0, math.nan, 5.0]), config)
    assert (loss.value.item(), loss.rows) == (pytest.approx(((0.5 - 0.5) ** 2 + (1 - 2) ** 2) / 2), 2)
    nothing = head_loss(torch.zeros(1, 1, requires_grad=True), torch.tensor([math.nan]), config)
    assert (nothing.value.item(), nothing.rows) == (0.0, 0)
    words = HeadConfig(task="classification", width=16, classes=("a", "b"))
    loss = head_loss(torch.tensor([[0.0, 1.0], [5.0, 5.0]]), torch.tensor([0.0, math.nan]), words)
    assert (loss.value.item(), loss.rows) == (pytest.approx(math.log(1 + math.e)), 1)


def test_tasks_take_their_sequences() -> None:
    model = _headed(pooling="residue")
    data = _data([[1.0] * 8, [2.0] * 4, [3.0], [4.0] * 26])
    task = HeadTask(model, data)
    assert task.lengths_B.tolist() == [10, 6, 3, 22]
    assert (task.describe(1), task.identity()["pooling"]) == ("p1", "residue")
    # Of the longest one the model sees 20 residues.
    assert [len(each) for each in seen_targets(model, data)] == [8, 4, 1, 20]
    loss = task.loss(Portion(np.array([3, 1]), epoch=0, step=0, part=0))
    said = predict(model, PROTEINS)
    errors = np.concatenate([said[3] - 4.0, said[1] - 2.0]) / 3.0
    assert (loss.value.item(), loss.rows) == (pytest.approx(float((errors**2).mean()), rel=1e-4), 24)


def test_judgement_of_numbers() -> None:
    model = _headed(pooling="residue")
    truth = [np.arange(8.0), np.array([3.0, 1.0, np.nan, 2.0]), np.array([0.0]), np.arange(26.0) % 7]
    found = judge_head(model, _data([each.tolist() for each in truth]), samples=50)
    said = np.concatenate(predict(model, PROTEINS))
    known = np.concatenate([each[:20] for each in truth])
    wanted = spearmanr(said[np.isfinite(known)], known[np.isfinite(known)]).statistic
    assert found["rows"] == 32
    assert found["spearman"]["value"] == pytest.approx(wanted)
    assert found["spearman"]["n"] == 4
    assert found["spearman"]["low"] < wanted < found["spearman"]["high"]


def test_judgement_of_classes() -> None:
    model = _headed(task="classification", classes=("a", "b", "c"))
    said = [int(each.argmax()) for each in predict(model, PROTEINS)]
    right = [float(said[0]), float((said[1] + 1) % 3), float(said[2]), float(said[3])]
    found = judge_head(model, _data([[each] for each in right]))
    assert (found["accuracy"]["value"], found["rows"]) == (0.75, 4)
    assert found["majority"] == max(right.count(each) for each in right) / 4
