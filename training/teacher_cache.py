"""A teacher's answers on disk: it runs once over each sequence and mask that a training shows, and never again.

    cache.json                  schema version, what the cache is of (`key`), checksums of finished shards
    numbers-M-NNNNN.npy         int64, up to 2,048 sequences that the teacher answered for under mask M
    rows-M-NNNNN.npy            the answers for their rows, one record a row
    begins-M-NNNNN.npy          int64, where each sequence's rows begin

A record holds `logits` fp32: all of them where the vocabulary has up to 64 tokens, else the K largest with their
`tokens`; and `lse_1`, `lse_T` (log of the sum of exp(t), of exp(t / T)), `entropy` of softmax(t), and `max`, fp32.
Shards are memory-mapped. They are written under temporary names and renamed, cache.json last, so that a killed run goes
on with the shards that are finished. A shard's checksum is looked at when it is first read.

From all logits the student learns as from the teacher itself, up to rounding: shards are packed otherwise than
training's batches. From K of them, see `top_k_loss`.

Shapes: N rows, K logits kept of a row, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..engine.atomic import write_atomically
from ..engine.errors import InputError
from ..engine.run_folder import check_empty, differences, lock_folder
from ..engine.schema_version import check_schema_version
from ..kernels import plan_batches
from ..kernels.linear import linear
from ..kernels.linear_kd_loss import Head
from .order import Index
from .row_task import SMALL_VOCABULARY, RowBatch, RowTask
from .teacher import LiveTeacher
from .top_k_loss import TopKRows

SCHEMA_VERSION = 1
CACHE_FILE = "cache.json"
SHARD_SEQUENCES = 2048
_FILL_TOKENS = 8192
_CHUNK_NUMBERS = 1 << 23

Rows = npt.NDArray[Any]


class TeacherCache:
    """A cache of one teacher's answers to one task's rows (a `row_task.Teacher`).

    Args:
        folder: made if it is not there.
        teacher: whose answers; asked only for what is missing.
        task: whose rows; its own teacher and model do not matter.
        temperature: T, at which the log-sum-exp is kept.
        top_k: K, logits kept of a row where the vocabulary has more than 64 tokens.

    Attributes:
        fingerprint: of the teacher, and how it is cached: resumed runs learn from the same numbers.

    Raises:
        InputError: the task's masks never come again; the folder holds a cache of another teacher, other data, masks or
            temperature, or other files; it is unreadable.
    """

    def __init__(
        self, folder: Path, teacher: LiveTeacher, task: RowTask, *, temperature: float, top_k: int = 64
    ) -> None:
        if task.masks == 0:
            message = "a cache needs masks that come again: mask_epochs is 0, expected 1 or more"
            raise InputError(message)
        V = teacher.model.embed_tokens.weight.shape[0]
        if top_k < 1:
            message = f"top_k is {top_k}, expected 1 or more"
            raise InputError(message)
        self.folder = folder
        self._teacher, self._task, self._vocabulary, self._temperature = teacher, task, V, temperature
        self._kept = V if V <= SMALL_VOCABULARY else min(top_k, V)
        self._key = json.loads(
            json.dumps(
                {
                    "teacher": teacher.fingerprint,
                    "vocabulary": V,
                    "kept": self._kept,
                    "temperature": float(temperature),
                    **task.row_identity(),
                }
            )
        )
        self.fingerprint = f"{teacher.fingerprint}, {self._kept} logits a row cached"
        self._dtype = _record(V, self._kept)
        self._open_shards: dict[str, tuple[Rows, Index]] = {}
        self._checksums: dict[str, str] = {}
        # Of each mask: which shard holds a sequence, -1 for none, and at which place.
        self._places = {mask: np.full((2, len(task.corpus)), -1) for mask in range(task.masks)}
        self.look_again()

    def _read(self) -> dict[str, str]:
        path = self.folder / CACHE_FILE
        if not path.exists():
            if self.folder.is_dir():
                check_empty(self.folder, lacks="cache", option="--cache")
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, key, shards = content["schema_version"], content["key"], dict(content["shards"])
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            message = f"not a readable cache ({error})"
            raise InputError(message, file=path) from error
        check_schema_version(version, SCHEMA_VERSION, file=path)
        if changed := differences(key, self._key):
            message = f"is a cache of something else ({'; '.join(changed)}): choose another --cache"
            raise InputError(message, file=self.folder)
        return shards

    def look_again(self) -> None:
        """Learns of shards that another process has written.

        Raises:
            InputError: as at the beginning.
        """
        found = self._read()
        for name in found.keys() - self._checksums.keys():
            self._learn_places(name)
        self._checksums = found

    def _learn_places(self, name: str) -> None:
        try:
            mask, shard = map(int, name.split("-"))
            numbers = np.load(self.folder / f"numbers-{name}.npy")
            self._places[mask][0, numbers], self._places[mask][1, numbers] = shard, np.arange(len(numbers))
        except (OSError, ValueError, EOFError, LookupError) as error:
            message = f"shard {name} cannot be read ({error}); delete the folder to fill it anew"
            raise InputError(message, file=self.folder) from error

    def fill(self, epochs: Sequence[Index], *, after_shard: Callable[[int, int], None] = lambda done, of: None) -> int:
        """Lets the teacher answer for what a training shows, as far as the cache has it not.

        Args:
            epochs: by epoch, int64, the numbers of the sequences shown.
            after_shard: called with shards done, and shards to do in all.

        Returns:
            How many shards were written.

        Raises:
            InputError: the disk is full, or another run fills the cache.
        """
        if not self._missing(epochs):
            return 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock_folder(self.folder):
                # What another run filled meanwhile is not asked for again.
                self.look_again()
                missing = self._missing(epochs)
                self._write_list()
                for done, (mask, numbers) in enumerate(missing, start=1):
                    self._write(mask, numbers)
                    after_shard(done, len(missing))
        except OSError as error:
            message = (
                f"the cache cannot be written ({error.strerror}); what is there is kept. A row takes "
                f"{self._dtype.itemsize} bytes: fewer logits (--cache-top-k) or masks (--mask-epochs) need less"
            )
            raise InputError(message, file=self.folder) from error
        return len(missing)

    def _missing(self, epochs: Sequence[Index]) -> list[tuple[int, Index]]:
        """What is not there, cut into shards: a mask, and sequences in the order in which they are shown."""
        by_mask: dict[int, list[Index]] = {}
        for epoch, numbers in enumerate(epochs):
            by_mask.setdefault(epoch % self._task.masks, []).append(numbers)
        missing = []
        for mask, parts in by_mask.items():
            shown = np.array(list(dict.fromkeys(np.concatenate(parts).tolist())), dtype=np.int64)
            absent = shown[self._places[mask][0, shown] < 0]
            missing += [(mask, absent[at : at + SHARD_SEQUENCES]) for at in range(0, len(absent), SHARD_SEQUENCES)]
        return missing

    def _write(self, mask: int, numbers: Index) -> None:
        rows, begins = self._answers(numbers, mask)
        name = f"{mask}-{sum(int(name.split('-')[0]) == mask for name in self._checksums):05d}"
        for kind, array in (("numbers", numbers), ("rows", rows), ("begins", begins)):
            write_atomically(self.folder / f"{kind}-{name}.npy", functools.partial(_save, array))
        self._checksums[name] = _checksum(rows, begins, numbers)
        self._learn_places(name)
        self._write_list()

    def _write_list(self) -> None:
        content = {"schema_version": SCHEMA_VERSION, "key": self._key, "shards": self._checksums}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(self.folder / CACHE_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    def _answers(self, numbers: Index, mask: int) -> tuple[Rows, Index]:
        order, offsets = plan_batches(self._task.lengths_B[numbers], _FILL_TOKENS)
        found: dict[int, Rows] = {}
        for first, last in pairwise(offsets.tolist()):
            own = numbers[order[first:last]].tolist()
            batch = self._task.batch(own, mask)
            rows = self._records(self._teacher.rows(batch))
            parts = np.split(rows, np.cumsum(batch.chosen.counts_B)[:-1])
            found |= dict(zip(own, parts, strict=True))
        in_order = [found[number] for number in numbers.tolist()]
        return np.concatenate(in_order), np.cumsum([0, *map(len, in_order)], dtype=np.int64)

    @torch.no_grad()
    def _records(self, head: Head) -> Rows:
        records = np.empty(len(head.hidden_ND), dtype=self._dtype)
        rows = max(1, _CHUNK_NUMBERS // self._vocabulary)
        for begin in range(0, len(records), rows):
            own = slice(begin, begin + rows)
            logits_CV = linear(head.hidden_ND[own], head.weight_VD, head.bias_V).float()
            log_p_CV = logits_CV.log_softmax(dim=1)
            kept = {
                "lse_1": logits_CV.logsumexp(dim=1),
                "lse_T": (logits_CV / self._temperature).logsumexp(dim=1),
                "entropy": -(log_p_CV.exp() * log_p_CV).sum(dim=1),
                "max": logits_CV.amax(dim=1),
            }
            if self._kept == self._vocabulary <= SMALL_VOCABULARY:
                kept["logits"] = logits_CV
            else:
                kept["logits"], kept["tokens"] = logits_CV.topk(self._kept, dim=1)
            for name, tensor in kept.items():
                records[name][own] = tensor.cpu().numpy()
        return records

    def rows(self, batch: RowBatch) -> Head | TopKRows:
        """The answers for a batch: whole logits as a head whose weight is the identity, or the most likely tokens.

        Raises:
            InputError: they are not there, or damaged.
        """
        records = np.concatenate([self._of_sequence(*key) for key in batch.keys])
        if len(records) != len(batch.labels_N):
            message = f"holds {len(records)} rows for sequences that have {len(batch.labels_N)}"
            raise InputError(message, file=self.folder)
        device = self._teacher.model.device
        logits_NK = torch.from_numpy(np.ascontiguousarray(records["logits"])).to(device)
        if "tokens" not in (self._dtype.names or ()):
            return Head(hidden_ND=logits_NK, weight_VD=torch.eye(self._kept, device=device), bias_V=None)
        tokens = torch.from_numpy(records["tokens"].astype(np.int64))
        scalars = (torch.from_numpy(np.ascontiguousarray(records[name])) for name in ("lse_T", "entropy", "max"))
        return TopKRows(logits_NK, *(tensor.to(device) for tensor in (tokens, *scalars)))

    def _of_sequence(self, number: int, mask: int) -> Rows:
        shard, place = self._places[mask][:, number].tolist()
        if shard < 0:
            message = f"has no answers for {self._task.describe(number)} under mask {mask}: it was not filled"
            raise InputError(message, file=self.folder)
        rows, begins = self._shard(f"{mask}-{shard:05d}")
        return rows[begins[place] : begins[place + 1]]

    def _shard(self, name: str) -> tuple[Rows, Index]:
        if name not in self._open_shards:
            try:
                rows = np.load(self.folder / f"rows-{name}.npy", mmap_mode="r")
                begins, numbers = (np.load(self.folder / f"{kind}-{name}.npy") for kind in ("begins", "numbers"))
            except (OSError, ValueError, EOFError) as error:
                message = f"shard {name} cannot be read ({error}); delete the folder to fill it anew"
                raise InputError(message, file=self.folder) from error
            if _checksum(rows, begins, numbers) != self._checksums[name]:
                message = f"shard {name} is damaged: its checksum is another; delete the folder to fill it anew"
                raise InputError(message, file=self.folder)
            self._open_shards[name] = (rows, begins)
        return self._open_shards[name]


def _record(V: int, kept: int) -> np.dtype[Any]:
    tokens = [] if V <= SMALL_VOCABULARY else [("tokens", "<u2" if V <= 1 << 16 else "<u4", (kept,))]
    return np.dtype([("logits", "<f4", (kept,)), *tokens, *((name, "<f4") for name in _SCALARS)])


_SCALARS = ("lse_1", "lse_T", "entropy", "max")


def _save(array: npt.NDArray[Any], path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _checksum(rows: Rows, begins: Index, numbers: Index) -> str:
    digest = hashlib.blake2b(begins.tobytes() + numbers.tobytes(), digest_size=16)
    for first in range(0, len(rows), 1 << 16):
        digest.update(rows[first : first + (1 << 16)].tobytes())
    return digest.hexdigest()
