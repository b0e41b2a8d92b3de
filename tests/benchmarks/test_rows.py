"""rows and proteins: what files hold, what is recorded about the machine, which proteins are embedded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from protnest.benchmarks.proteins import MAX_RESIDUES, first_tokens, make_up, sample_fasta
from protnest.benchmarks.rows import append_rows, machine_facts, write_document
from protnest.engine import InputError
from protnest.engine.alphabet import AMINO_ACIDS

from support.tiny import write_fasta


def test_rows_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    append_rows(file, [{"a": 1}, {"a": None}])
    append_rows(file, [{"a": "ü"}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"a": None}, {"a": "ü"}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_rows(file, [{"a": float("nan")}])
    assert len(file.read_text().splitlines()) == 3


def test_a_document_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "gpu.json"
    write_document(file, {"rows": [1]})
    write_document(file, {"rows": [1, 2]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_document(file, {"rows": [float("inf")]})
    assert json.loads(file.read_text()) == {"rows": [1, 2]}
    assert [path.name for path in file.parent.iterdir()] == ["gpu.json"]


def test_facts_name_machine_versions_and_commit() -> None:
    facts = machine_facts(torch.device("cpu"), commit="abc1234")
    assert facts["commit"] == "abc1234"
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"] == "cpu"
    assert facts["cpu"]
    assert {"transformers", "fair_esm", "protnest", "date", "schema_version", "bf16_in_hardware"} <= facts.keys()
    json.dumps(facts, allow_nan=False)


def test_sample_is_seeded_cut_and_cleaned(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", ["M" * 30, "K" * (MAX_RESIDUES + 5), "MJM", "G" * 8])
    proteins = sample_fasta(fasta, count=4, seed=0)
    assert sorted(map(len, proteins.sequences)) == [3, 8, 30, MAX_RESIDUES]
    assert "MXM" in proteins.sequences
    assert (proteins.source, proteins.truncated, proteins.residues) == ("a.fasta", 1, 41 + MAX_RESIDUES)
    assert sample_fasta(fasta, count=2, seed=1) == sample_fasta(fasta, count=2, seed=1)
    assert len(set(sample_fasta(fasta, count=4, seed=0).sequences)) == 4
    with pytest.raises(ValueError, match="holds 4 proteins, 5 were asked for"):
        sample_fasta(fasta, count=5, seed=0)
    with pytest.raises(InputError):
        sample_fasta(tmp_path / "missing.fasta", count=1, seed=0)


def test_made_up_proteins_are_like_uniprot() -> None:
    proteins = make_up(count=4000, seed=0)
    assert proteins == make_up(count=4000, seed=0)
    lengths = [len(sequence) for sequence in proteins.sequences]
    assert min(lengths) >= 30
    assert max(lengths) == MAX_RESIDUES
    quartiles = np.percentile(lengths, [25, 50, 75])
    np.testing.assert_allclose(quartiles, [189, 345, 583], rtol=0.08)
    text = "".join(proteins.sequences)
    assert set(text) == set(AMINO_ACIDS)
    assert text.count("L") / len(text) == pytest.approx(0.0957, abs=0.003)
    assert max(map(len, make_up(count=50, seed=0, longest=20).sequences)) == 20


def test_first_tokens_counts_special_tokens() -> None:
    sequences = ["M" * 10, "M" * 20, "M" * 30]
    assert first_tokens(sequences, 0) == []
    assert first_tokens(sequences, 12) == sequences[:1]
    assert first_tokens(sequences, 13) == sequences[:2]
    assert first_tokens(sequences, 10_000) == sequences
