"""One streamed pass of a FASTA file through several models, into a `GramPair`; resumable to the same bits.

Rows are residues, `<cls>` and `<eos>` left out; proteins beyond the shortest of the models' lengths give their first
residues. Records are taken in windows of a fixed number, each planned into batches on its own, and the state is saved
between windows alone: so a pass that was killed repeats the sums of an uninterrupted one.

Shapes: R residues of a batch, Z all models' widths together.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..engine.chain import ChainModel, check_widths
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.fasta import read_fasta
from ..engine.packing import PackedBatch, pack
from ..kernels import plan_batches
from .corpus import is_held_out
from .gram import HELD_OUT_EVERY, GramPair

_WINDOW_RECORDS = 256


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """What decides the sums, beside models and file.

    Attributes:
        sequences: most proteins to take, from the file's beginning; None takes all.
        max_tokens: most tokens in a batch.
    """

    sequences: int | None = None
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("sequences", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                message = f"{name} must be positive, got {value}"
                raise InputError(message)


def chain_models(encoders: Sequence[Encoder]) -> tuple[ChainModel, ...]:
    """How a chain names these encoders.

    Raises:
        InputError: there are fewer than two, their widths do not grow, or one has no fingerprint.
    """
    check_widths([encoder.dim for encoder in encoders], [encoder.name for encoder in encoders])
    for encoder in encoders:
        if encoder.fingerprint is None:
            message = f"{encoder.name} has no hash: a chain is fitted on models that were read from checkpoints"
            raise InputError(message)
    return tuple(
        ChainModel(
            name=encoder.name,
            width=encoder.dim,
            max_residues=encoder.config.max_residues,
            fingerprint=encoder.fingerprint,
        )
        for encoder in encoders
    )


@torch.inference_mode()
def residue_rows(encoders: Sequence[Encoder], batch: PackedBatch) -> torch.Tensor:
    """The models' last hidden states side by side, residues only: fp32 (R, Z) on the CPU."""
    rows_TZ = torch.cat([encoder(batch).hidden_TD.float().cpu() for encoder in encoders], dim=-1)
    return rows_TZ[_residues(batch)]


def _residues(batch: PackedBatch) -> torch.Tensor:
    kept = torch.ones(batch.tokens_T.numel(), dtype=torch.bool)
    ends = np.cumsum(batch.lengths_B)
    kept[torch.from_numpy(ends - 1)] = False
    kept[torch.from_numpy(ends - np.array(batch.lengths_B))] = False
    return kept


def accumulate(
    encoders: Sequence[Encoder],
    sequences: Sequence[str],
    pair: GramPair,
    *,
    max_tokens: int,
    after_batch: Callable[[int], None] = lambda residues: None,
) -> None:
    """Adds proteins to a pair, each to the share that its hash says."""
    limit = min(encoder.config.max_residues for encoder in encoders)
    held_out = [is_held_out(sequence, every=HELD_OUT_EVERY) for sequence in sequences]
    cropped = [sequence[:limit] for sequence in sequences]
    order, offsets = plan_batches([len(sequence) + 2 for sequence in cropped], max_tokens)
    for begin, end in itertools.pairwise(offsets.tolist()):
        places = order[begin:end].tolist()
        batch = pack([cropped[place] for place in places])
        rows_RZ = residue_rows(encoders, batch)
        lengths = torch.tensor([len(cropped[place]) for place in places])
        out_R = torch.tensor([held_out[place] for place in places]).repeat_interleave(lengths)
        pair.train.add(rows_RZ[~out_R])
        pair.held_out.add(rows_RZ[out_R])
        after_batch(len(rows_RZ))
    out = sum(held_out)
    pair.sequences = (pair.sequences[0] + len(sequences) - out, pair.sequences[1] + out)


def run_pass(
    encoders: Sequence[Encoder],
    fasta: Path,
    state: Path,
    options: PassOptions | None = None,
    *,
    save_every_s: float = 60.0,
    start: Callable[[int, int, int], None] = lambda records, residues, done: None,
    after_batch: Callable[[int], None] = lambda residues: None,
) -> GramPair:
    """Makes a file's pair, or goes on with the one in `state`; a finished one is returned as it is.

    Args:
        encoders: of growing width, fp32.
        fasta: plain or .gz.
        state: where the pair is kept, while the pass runs and after.
        options: which sequences, and in which batches.
        save_every_s: how much a crash may cost, at least a window of records.
        start: called with the proteins, their residues to run, and those done before.
        after_batch: called with the residues that have just been run.

    Raises:
        InputError: the file is invalid, the models are no chain's, or `state` is of another pass.
    """
    options = options or PassOptions()
    models = chain_models(encoders)
    limit = min(model.max_residues for model in models)
    records, residues, digest = 0, 0, hashlib.blake2b(digest_size=16)
    for sequence in _sequences(fasta, options):
        records += 1
        residues += min(len(sequence), limit)
        digest.update(sequence.encode() + b"\n")
    pair = GramPair.empty(models)
    identity = {"input": digest.hexdigest(), "max_tokens": options.max_tokens}
    if state.exists():
        pair = GramPair.load(state)
        theirs = {"input": pair.data.get("fingerprint"), "max_tokens": pair.data.get("max_tokens")}
        if pair.models != models or theirs != identity:
            message = "is of another pass (other models, sequences or batches); move it away or name another file"
            raise InputError(message, file=state)
    pair.data = {"file": fasta.name, "fingerprint": identity["input"], "max_tokens": options.max_tokens}
    done = sum(pair.sequences)
    start(records, residues, pair.train.count + pair.held_out.count)
    saved = time.monotonic()
    remaining = itertools.islice(_sequences(fasta, options), done, None)
    while window := list(itertools.islice(remaining, _WINDOW_RECORDS)):
        accumulate(encoders, window, pair, max_tokens=options.max_tokens, after_batch=after_batch)
        if time.monotonic() - saved >= save_every_s:
            pair.save(state)
            saved = time.monotonic()
    pair.save(state)
    return pair


def _sequences(fasta: Path, options: PassOptions) -> Iterator[str]:
    records = itertools.islice(read_fasta(fasta, quiet=True), options.sequences)
    return (record.sequence for record in records)
