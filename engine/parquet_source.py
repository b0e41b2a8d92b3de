"""Proteins of a Parquet file: one column of ids, one of sequences, read in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputError
from .fasta import InvalidPolicy, Record, Reject, clean_sequence

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ParquetSource:
    """A Parquet file.

    Attributes:
        path: the file.
        id_column: its column of ids, which are headers, too.
        sequence_column: its column of sequences.
        invalid: what becomes of letters outside the alphabet.
    """

    path: Path
    id_column: str = "id"
    sequence_column: str = "sequence"
    invalid: InvalidPolicy = "error"

    @property
    def settings(self) -> dict[str, Any]:
        return {"id_col": self.id_column, "seq_col": self.sequence_column}

    def read(self, *, on_reject: Callable[[Reject], None] | None = None, quiet: bool = False) -> Iterator[Record]:
        index = -1
        for index, (name, sequence) in enumerate(self._rows()):
            words = str(name).split(maxsplit=1) if name is not None else []
            try:
                yield self._record(index, name, words, sequence)
            except InputError as error:
                if self.invalid == "error":
                    raise InputError(
                        error.problem, file=self.path, record=index + 1, record_id=words[0] if words else None
                    ) from error
                if on_reject is not None:
                    on_reject(Reject(index=index, id=words[0] if words else "", reason=error.problem))
        if index < 0:
            message = "holds no records"
            raise InputError(message, file=self.path)

    def locate(self, index: int) -> int | None:
        return None

    def _record(self, index: int, name: object, words: list[str], sequence: object) -> Record:
        if not words:
            message = f"there is no id in the column {self.id_column!r}"
            raise InputError(message)
        if not isinstance(sequence, str):
            message = f"there is no sequence in the column {self.sequence_column!r}"
            raise InputError(message)
        masked = ""
        try:
            residues = clean_sequence(sequence)
        except InputError:
            if self.invalid != "mask":
                raise
            residues = masked = clean_sequence(sequence, "mask")
        flags = ("masked",) if masked else ()
        return Record(index=index, id=words[0], header=str(name), sequence=residues, flags=flags)

    def _rows(self) -> Iterator[tuple[object, object]]:
        columns = [self.id_column, self.sequence_column]
        try:
            with pq.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                if missing := [name for name in columns if name not in names]:
                    message = (
                        f"has no column {missing[0]!r}; it has {', '.join(names)}: name yours by --id-col, --seq-col"
                    )
                    raise InputError(message, file=self.path)
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                    yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
        except (OSError, pa.ArrowException) as error:
            message = f"not a readable Parquet file ({error})"
            raise InputError(message, file=self.path) from error
