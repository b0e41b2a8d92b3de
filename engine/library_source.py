"""Which source a library's file is: FASTA, a table of proteins, or a table of variants."""

from __future__ import annotations

from pathlib import Path

from .fasta import InvalidPolicy
from .mutant_source import MutantSource
from .record_source import FastaSource, RecordSource
from .table import is_table
from .table_source import TableSource


def open_source(
    path: Path,
    *,
    invalid: InvalidPolicy = "error",
    id_column: str | None = None,
    sequence_column: str | None = None,
    wild_types: Path | None = None,
    target: str | None = None,
    offset: int = 0,
) -> RecordSource:
    """The source of a library's proteins.

    Args:
        path: a .csv or .tsv (each also .gz) or .parquet file is a table of proteins, any other file FASTA; with
            `wild_types` a table of variants, or a .txt of them.
        invalid: what becomes of letters outside the alphabet.
        id_column, sequence_column: of a table; by default those that `TableSource` tries. Of a table of variants these
            are the columns of A24G and of whole mutated sequences.
        wild_types: proteins whose variants are embedded: FASTA, or a table with ids and sequences.
        target, offset: with `wild_types`, see `MutantSource`.

    Raises:
        InputError: a file cannot be read, or lacks a column.
    """
    if wild_types is not None:
        return MutantSource(
            path,
            wild_types,
            mutant_column=id_column,
            sequence_column=sequence_column,
            target=target,
            offset=offset,
            invalid=invalid,
        )
    if is_table(path):
        return TableSource(path, id_column=id_column, sequence_column=sequence_column, invalid=invalid)
    return FastaSource(path, invalid)
