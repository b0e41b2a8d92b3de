"""What is looked for in a store: proteins of a file, embedded as the store's were, or another store's rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .chain import Chain
from .config import BUNDLED, BUNDLED_CHAINS
from .embedder import Embedder
from .embeddings import Embeddings
from .errors import InputError
from .exported_encoder import ExportedEncoder
from .family import Family
from .library import Progress, Silent
from .library_survey import survey_library
from .models import load_any_encoder
from .record_source import RecordSource, check_rereadable, locate_error
from .run_folder import differences
from .shard_job import RecordFault, cut_jobs, embed_job

_RECORDS_AT_ONCE = 2048
_RESIDUES_AT_ONCE = 1 << 20

Batch = tuple[list[str], npt.NDArray[Any]]
"""Ids of queries, and their rows (Q, D)."""


def open_embedder(
    settings: dict[str, Any],
    folder: Path,
    *,
    model: str | None = None,
    chain: Path | None = None,
    device: str = "auto",
    precision: str | None = None,
) -> Embedder:
    """The embedder that a store was written with.

    Args:
        settings: of the store's run.json.
        folder: where it lies.
        model: where its models are, smallest first, joined by commas; by default looked for by the names in `settings`.
        chain: its chain file; by default the bundled one that has its hash.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: by default the store's.

    Raises:
        InputError: a model or chain is not found, or has another hash than the store's.
    """
    exported = "runtime" in settings
    if exported and model is None:
        message = f"was written with the exported file {settings['model']!r}: --model says where that is"
        raise InputError(message, file=folder)
    fitted = None if exported else _open_chain(settings, folder, chain)
    names: list[str] = settings.get("models", [settings["model"]]) if model is None else model.split(",")
    # An exported file has a precision of its own.
    wanted = "auto" if exported else settings["precision"] if precision is None else precision
    try:
        encoders = [load_any_encoder(name, device=device, precision=wanted) for name in names]
    except InputError as error:
        if model is not None or any(name in BUNDLED for name in names):
            raise
        message = f"was written with {','.join(names)}, and --model says where that is ({error.problem})"
        raise InputError(message, file=folder) from error
    known: dict[str, Any] = {"model_fingerprint": encoders[-1].fingerprint}
    if fitted is not None:
        known["model_fingerprints"] = [encoder.fingerprint for encoder in encoders]
    if isinstance(encoders[-1], ExportedEncoder):
        known["chain_fingerprint"] = encoders[-1].facts["chain"]
    if other := differences({key: settings.get(key) for key in known}, known):
        message = f"was written with other models ({'; '.join(other)}): --model says where they are"
        raise InputError(message, file=folder)
    return Embedder(
        Family.of(encoders),
        chain=fitted,
        dims=settings["width"],
        pool=settings["pool"],
        long=settings["long"],
        layer=settings.get("layer"),
        max_tokens=settings["max_tokens"],
    )


def _open_chain(settings: dict[str, Any], folder: Path, chain: Path | None) -> Chain | None:
    wanted = settings.get("chain_fingerprint")
    if wanted is None:
        if chain is not None:
            message = f"was written without a chain, but --chain is {chain}"
            raise InputError(message, file=folder)
        return None
    if chain is not None:
        given = Chain.load(chain)
        if given.fingerprint != wanted:
            message = f"was written with a chain of hash {wanted}; that of --chain {chain} is {given.fingerprint}"
            raise InputError(message, file=folder)
        return given
    for name in BUNDLED_CHAINS:
        if (bundled := Chain.load(name)).fingerprint == wanted:
            return bundled
    message = f"was written with a chain that is not bundled (hash {wanted}): --chain says where it is"
    raise InputError(message, file=folder)


def check_alike(theirs: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    """Raises InputError unless the rows of the store in `folder`, of settings `ours`, compare with rows of `theirs`."""
    keys = ("model_fingerprint", "chain_fingerprint", "layer", "pool", "width")
    if other := differences({key: theirs.get(key) for key in keys}, {key: ours.get(key) for key in keys}):
        message = f"holds other embeddings than the store that is searched ({'; '.join(other)})"
        raise InputError(message, file=folder)


class LibraryQueries:
    """Proteins of a file.

    Args:
        source: read twice: every record is checked before anything runs.
        embedder: of `open_embedder`.
        progress: follows the embedding.

    Attributes:
        count: proteins.
        rejected: records left out.

    Raises:
        InputError: the file cannot be read, holds no protein, or one that cannot be embedded.
    """

    def __init__(self, source: RecordSource, embedder: Embedder, *, progress: Progress | None = None) -> None:
        check_rereadable(source.path)
        self._survey = survey_library(source, embedder)
        if not self._survey.records:
            message = f"no sequence to look for: all {self._survey.rejected} records were left out"
            raise InputError(message, file=source.path)
        self.count, self.rejected = self._survey.records, self._survey.rejected
        self._source, self._embedder = source, embedder
        self._progress = progress or Silent()

    def batches(self) -> Iterator[Batch]:
        """In the file's order, embedded as they are asked for."""
        self._progress.start(self.count, self._survey.work, 0)
        for job in cut_jobs(
            self._source,
            self._survey,
            flags=lambda record: record.flags,
            max_records=_RECORDS_AT_ONCE,
            max_residues=_RESIDUES_AT_ONCE,
        ):
            try:
                arrays = embed_job(job, self._embedder, storage_dtype="fp32", after_batch=self._progress.advance)
            except RecordFault as error:
                raise locate_error(self._source, error.record, error.problem) from error
            yield [record.id for record in job.fresh], arrays["embeddings"]


class StoreQueries:
    """Rows of another store, or of the same one.

    Args:
        embeddings: finished.
        folder: where it lies.
        settings: of the store that is searched.

    Attributes:
        count, rejected: as of `LibraryQueries`.

    Raises:
        InputError: its rows do not compare with those of the store that is searched.
    """

    def __init__(self, embeddings: Embeddings, folder: Path, settings: dict[str, Any]) -> None:
        check_alike(settings, embeddings.run["settings"], folder)
        if not len(embeddings):
            message = "holds no proteins"
            raise InputError(message, file=folder)
        self.count, self.rejected = len(embeddings), 0
        self._embeddings = embeddings

    def batches(self) -> Iterator[Batch]:
        """In the store's order."""
        for begin in range(0, self.count, _RECORDS_AT_ONCE):
            end = begin + _RECORDS_AT_ONCE
            yield self._embeddings.ids[begin:end], self._embeddings.array[begin:end]
