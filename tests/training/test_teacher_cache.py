"""A teacher's answers on disk: as if it were asked, kept over kills, refused where they are another's or damaged.

Shapes: N rows, K logits kept, V vocabulary.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError
from protnest.engine.vocabulary import BytePairVocabulary, ResidueVocabulary
from protnest.kernels.kd_options import KDOptions
from protnest.kernels.linear import linear
from protnest.kernels.linear_kd_loss import Head
from protnest.training import teacher_cache as module
from protnest.training.causal_task import CausalTask, causal_corpus
from protnest.training.corpus import Share
from protnest.training.masked_task import MaskedTask
from protnest.training.order import Index, Portion
from protnest.training.row_task import RowTask
from protnest.training.teacher import LiveTeacher
from protnest.training.teacher_cache import TeacherCache
from protnest.training.top_k_loss import TopKRows
from protnest.training.trainer import Trainer, TrainerConfig

from support.gpt2_models import byte_pairs
from support.learning import CPU, TOY_DECODER, corpus_of, proteins_to_train, toy_decoder, toy_encoder

SEQUENCES = proteins_to_train()


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_SEQUENCES", 5)


def _encoders(**more: Any) -> tuple[LiveTeacher, MaskedTask]:
    task = MaskedTask(toy_encoder(0), corpus_of(SEQUENCES), **({"seed": 3, "mask_epochs": 2} | more))
    return LiveTeacher(toy_encoder(1)), task


def _pairs() -> tuple[LiveTeacher, CausalTask]:
    vocabulary = BytePairVocabulary(byte_pairs()._tokenizer)
    config = replace(TOY_DECODER, vocabulary=vocabulary.size, places=32)
    share = Share(tuple(map(str, range(len(SEQUENCES)))), tuple(SEQUENCES))
    task = CausalTask(toy_decoder(0, config, vocabulary), causal_corpus(share, vocabulary, 32)[0])
    return LiveTeacher(toy_decoder(1, config, vocabulary)), task


def _cache(folder: Path, teacher: LiveTeacher, task: RowTask, **more: Any) -> TeacherCache:
    return TeacherCache(folder, teacher, task, **({"temperature": 2.0} | more))


def _whole(epochs: int) -> list[Index]:
    return [np.arange(len(SEQUENCES))] * epochs


def _portion(*numbers: int, epoch: int = 0) -> Portion:
    return Portion(np.array(numbers), epoch, 0, 0)


def _logits(taught: Head | TopKRows) -> torch.Tensor:
    assert isinstance(taught, Head)
    return linear(taught.hidden_ND, taught.weight_VD, taught.bias_V)


# As if it were asked


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_all_logits_are_the_teacher_s(tmp_path: Path, epoch: int) -> None:
    teacher, task = _encoders()
    cache = _cache(tmp_path / "cache", teacher, task)
    assert cache.fill(_whole(2)) == 8
    batch = task.batch([11, 0, 4], epoch)
    stored, live = _logits(cache.rows(batch)), _logits(teacher.rows(batch))
    assert stored.dtype == torch.float32
    torch.testing.assert_close(stored, live, rtol=1e-5, atol=1e-5)
    # What lies on disk comes back to the bit: the identity as a weight rounds nothing.
    name = f"{epoch % 2}-00000"
    rows, begins = np.load(tmp_path / "cache" / f"rows-{name}.npy"), np.load(tmp_path / "cache" / f"begins-{name}.npy")
    first = batch.chosen.counts_B[0]
    own = stored[first : first + batch.chosen.counts_B[1]]
    assert np.array_equal(own.numpy(), rows["logits"][begins[0] : begins[1]])


def test_what_is_kept_of_a_row_is_what_is_documented(tmp_path: Path) -> None:
    for (teacher, task), kept in ((_encoders(), 33), (_pairs(), 7)):
        folder = tmp_path / str(kept)
        _cache(folder, teacher, task, top_k=7, temperature=1.5).fill(_whole(1))
        rows = np.load(folder / "rows-0-00001.npy")
        batch = task.batch(range(5, 10), 0)
        logits = _logits(teacher.rows(batch)).double()
        p = logits.softmax(-1)
        torch.testing.assert_close(
            torch.from_numpy(rows["lse_1"].astype(float)), logits.logsumexp(-1), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            torch.from_numpy(rows["lse_T"].astype(float)), (logits / 1.5).logsumexp(-1), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            torch.from_numpy(rows["entropy"].astype(float)), -torch.xlogy(p, p).sum(-1), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(torch.from_numpy(rows["max"].astype(float)), logits.amax(-1), rtol=1e-5, atol=1e-5)
        assert rows["logits"].shape == (len(logits), kept)
        if kept == 7:
            assert rows["tokens"].dtype == np.uint16
            assert rows["tokens"].astype(int).tolist() == logits.topk(7).indices.tolist()


def test_learning_from_the_cache_is_learning_from_the_teacher(tmp_path: Path) -> None:
    def trained(cached: bool) -> torch.Tensor:
        teacher, task = _encoders()
        task.teacher = teacher
        if cached:
            cache = _cache(tmp_path / "cache", teacher, task)
            cache.fill(_whole(2))
            teacher.model.forward = None  # type: ignore[assignment]  # it is not asked any more
            teacher.model.row_hidden = None  # type: ignore[assignment,union-attr]
            task.teacher = cache
        # Four epochs: the masks come again.
        Trainer(task, TrainerConfig(steps=12, batch_tokens=100, learning_rate=0.01), device=CPU).run()
        return torch.cat([each.detach().flatten() for each in task.model.parameters()])

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", [KDOptions(), KDOptions(uncertainty=False, smooth=False, temperature=1.5)])
def test_with_all_tokens_kept_of_a_large_vocabulary_too(tmp_path: Path, options: KDOptions) -> None:
    teacher, task = _pairs()
    task.teacher, task.options = teacher, options
    live = task.loss(_portion(1, 7, 2)).value.item()
    values = []
    for top_k in (400, 30, 3):
        cache = _cache(tmp_path / str(top_k), teacher, task, temperature=options.temperature, top_k=top_k)
        cache.fill(_whole(1))
        task.teacher = cache
        assert isinstance(cache.rows(task.batch([1, 7, 2], 0)), TopKRows)
        values.append(task.loss(_portion(1, 7, 2)).value.item())
    assert values[0] == pytest.approx(live, rel=1e-5)
    errors = [abs(value - live) for value in values]
    assert errors[0] < errors[1] < errors[2]


def test_residue_decoders_keep_all_logits(tmp_path: Path) -> None:
    share = Share(tuple(map(str, range(len(SEQUENCES)))), tuple(SEQUENCES))
    task = CausalTask(toy_decoder(0), causal_corpus(share, ResidueVocabulary(), 24)[0])
    teacher = LiveTeacher(toy_decoder(1))
    cache = _cache(tmp_path / "cache", teacher, task)
    cache.fill(_whole(9))
    batch = task.batch([3, 12, 0], 7)
    torch.testing.assert_close(_logits(cache.rows(batch)), _logits(teacher.rows(batch)), rtol=1e-5, atol=1e-5)


# Filled once


def test_only_what_is_missing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, task = _encoders()
    shards: list[tuple[int, int]] = []
    assert _cache(tmp_path / "cache", teacher, task).fill(_whole(1), after_shard=lambda *args: shards.append(args)) == 4
    assert shards == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again = _cache(tmp_path / "cache", teacher, task)
    assert again.fill(_whole(1)) == 0
    assert again.fill(_whole(5)) == 4, "there are two masks and no more"
    asked: list[int] = []
    monkeypatch.setattr(LiveTeacher, "rows", lambda *args: asked.append(1))
    assert _cache(tmp_path / "cache", teacher, task).fill(_whole(2)) == 0
    assert not asked


def test_what_is_not_shown_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, task = _encoders()
    asked: list[tuple[int, int]] = []
    true_rows = LiveTeacher.rows

    def rows(live: LiveTeacher, batch: Any) -> Any:
        asked.extend(batch.keys)
        return true_rows(live, batch)

    monkeypatch.setattr(LiveTeacher, "rows", rows)
    cache = _cache(tmp_path / "cache", teacher, task)
    # Three epochs of two masks: the third shows the first mask again, and two sequences of it anew.
    shown = [np.array([7, 2, 11, 0, 5, 3, 9]), np.array([4]), np.array([2, 8, 1])]
    assert cache.fill(shown) == 3
    expected = [(number, 0) for number in (7, 2, 11, 0, 5, 3, 9, 8, 1)] + [(4, 1)]
    assert sorted(asked) == sorted(expected)
    assert np.load(tmp_path / "cache" / "numbers-0-00001.npy").tolist() == [3, 9, 8, 1]
    again = _cache(tmp_path / "cache", teacher, task)
    for numbers, epoch in (((8, 5, 7, 3), 0), ((4,), 1), ((1, 2), 2)):
        batch = task.batch(numbers, epoch)
        live = _logits(true_rows(teacher, batch))
        torch.testing.assert_close(_logits(again.rows(batch)), live, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"has no answers for .* under mask 1: it was not filled"):
        again.rows(task.batch([4, 7], 1))
    # More of it, later: only that.
    asked.clear()
    assert again.fill([np.array([7, 6])]) == 1
    assert asked == [(6, 0)]


def test_a_killed_fill_goes_on(tmp_path: Path) -> None:
    class _Killed(BaseException):
        pass

    def kill(done: int, of: int) -> None:
        if done == 2:
            raise _Killed

    teacher, task = _encoders()
    with pytest.raises(_Killed):
        _cache(tmp_path / "cache", teacher, task).fill(_whole(1), after_shard=kill)
    # Killed between a shard's files and the list.
    (tmp_path / "cache" / "rows-0-00002.npy").write_bytes(b"half")
    assert _cache(tmp_path / "cache", teacher, task).fill(_whole(1)) == 2
    _cache(tmp_path / "whole", teacher, task).fill(_whole(1))
    for name in (*(f"rows-0-0000{shard}.npy" for shard in range(4)), "cache.json"):
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_process_s_shards_are_found(tmp_path: Path) -> None:
    teacher, task = _encoders()
    waiting = _cache(tmp_path / "cache", teacher, task)
    _cache(tmp_path / "cache", teacher, task).fill(_whole(1))
    with pytest.raises(InputError, match=r"cache: has no answers for .* under mask 0: it was not filled"):
        waiting.rows(task.batch([0], 0))
    waiting.look_again()
    waiting.rows(task.batch([0], 0))


# Refused


def test_another_s_cache_is_refused_and_named(tmp_path: Path) -> None:
    teacher, task = _encoders()
    _cache(tmp_path / "cache", teacher, task).fill(_whole(1))
    other_teacher = LiveTeacher(toy_encoder(2))
    other_data = MaskedTask(toy_encoder(0), corpus_of(SEQUENCES[1:]), seed=3, mask_epochs=2)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (other_teacher, task, {}, "teacher: "),
        (teacher, other_data, {}, "data: "),
        (teacher, task, {"temperature": 3.0}, "temperature: 2.0 there, 3.0 now"),
        (teacher, _encoders(seed=4)[1], {}, "seed: 3 there, 4 now"),
        (teacher, _encoders(mask_epochs=3)[1], {}, "mask_epochs: 2 there, 3 now"),
        (teacher, _encoders(rows="all")[1], {}, "rows: masked there, all now"),
        (teacher, _encoders(max_residues=10)[1], {}, "max_residues: 20 there, 10 now"),
    ]
    for which, rows, more, named in cases:
        with pytest.raises(InputError, match=rf"cache: is a cache of something else \({re.escape(named)}"):
            _cache(tmp_path / "cache", which, rows, **more)


def test_another_number_of_kept_logits_is_refused(tmp_path: Path) -> None:
    teacher, task = _pairs()
    _cache(tmp_path / "cache", teacher, task, top_k=5).fill(_whole(1))
    with pytest.raises(InputError, match="kept: 5 there, 6 now"):
        _cache(tmp_path / "cache", teacher, task, top_k=6)


def test_masks_that_never_come_again_are_refused(tmp_path: Path) -> None:
    teacher, task = _encoders(mask_epochs=0)
    with pytest.raises(InputError, match="a cache needs masks that come again"):
        _cache(tmp_path / "cache", teacher, task)
    with pytest.raises(InputError, match="top_k is 0, expected 1 or more"):
        _cache(tmp_path / "cache", *_encoders(), top_k=0)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and holds no cache \(thesis.tex\): choose another --cache"):
        _cache(tmp_path, *_encoders())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cache.json: not a readable cache"),
        ("[]", "cache.json: not a readable cache"),
        ('{"schema_version": 1, "key": KEY, "shards": {"first": ""}}', "shard first cannot be read"),
        ('{"schema_version": 9, "key": {}, "shards": {}}', "has schema version 9, this release reads 1"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    teacher, task = _encoders()
    _cache(tmp_path / "cache", teacher, task).fill(_whole(1))
    path = tmp_path / "cache" / "cache.json"
    path.write_text(content.replace("KEY", json.dumps(json.loads(path.read_text())["key"])))
    with pytest.raises(InputError, match=problem):
        _cache(tmp_path / "cache", teacher, task)


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    teacher, task = _encoders()
    _cache(tmp_path / "cache", teacher, task).fill(_whole(1))
    shard = tmp_path / "cache" / "rows-0-00001.npy"
    whole = bytearray(shard.read_bytes())
    whole[-3] ^= 1
    shard.write_bytes(whole)
    cache = _cache(tmp_path / "cache", teacher, task)
    cache.rows(task.batch([0, 4], 0))
    with pytest.raises(InputError, match="shard 0-00001 is damaged: its checksum is another"):
        cache.rows(task.batch([5], 0))
    shard.write_bytes(whole[:40])
    with pytest.raises(InputError, match="shard 0-00001 cannot be read"):
        cache.rows(task.batch([5], 0))
    shard.unlink()
    with pytest.raises(InputError, match="shard 0-00001 cannot be read"):
        cache.rows(task.batch([5], 0))


def test_damaged_numbers_are_refused(tmp_path: Path) -> None:
    teacher, task = _encoders()
    _cache(tmp_path / "cache", teacher, task).fill(_whole(1))
    path = tmp_path / "cache" / "numbers-0-00001.npy"
    numbers = np.load(path)
    np.save(path, numbers[::-1])
    with pytest.raises(InputError, match="shard 0-00001 is damaged: its checksum is another"):
        _cache(tmp_path / "cache", teacher, task).rows(task.batch([5], 0))
    np.save(path, numbers + 1000)
    with pytest.raises(InputError, match="shard 0-00001 cannot be read"):
        _cache(tmp_path / "cache", teacher, task)
    path.unlink()
    with pytest.raises(InputError, match="shard 0-00001 cannot be read"):
        _cache(tmp_path / "cache", teacher, task)


def test_rows_of_another_task_are_noticed(tmp_path: Path) -> None:
    teacher, task = _encoders()
    cache = _cache(tmp_path / "cache", teacher, task)
    cache.fill(_whole(1))
    batch = task.batch([0, 4], 0)
    fewer = replace(batch, labels_N=batch.labels_N[:-1])
    with pytest.raises(InputError, match=r"cache: holds \d+ rows for sequences that have \d+"):
        cache.rows(fewer)


def test_a_full_disk_is_told_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, task = _encoders()
    true_save, calls = module._save, []

    def full(array: Any, path: Path) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        true_save(array, path)

    monkeypatch.setattr(module, "_save", full)
    cache = _cache(tmp_path / "cache", teacher, task)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\).* A row takes 148 bytes"):
        cache.fill(_whole(1))
    monkeypatch.setattr(module, "_save", true_save)
    assert len(json.loads((tmp_path / "cache" / "cache.json").read_text())["shards"]) == 1
    assert _cache(tmp_path / "cache", teacher, task).fill(_whole(1)) == 3


def test_two_runs_do_not_fill_one_cache(tmp_path: Path) -> None:
    teacher, task = _encoders()

    def second(done: int, of: int) -> None:
        with pytest.raises(InputError, match="another run is writing to this folder"):
            _cache(tmp_path / "cache", teacher, task).fill(_whole(1))

    _cache(tmp_path / "cache", teacher, task).fill(
        _whole(1), after_shard=lambda *args: second(*args) if args[0] < 4 else None
    )
