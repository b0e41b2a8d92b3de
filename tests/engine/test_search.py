"""Searching a store: against brute force in fp64, kept indexes, what is refused, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from protnest.engine import Embedder, InputError, embed_library, load_model, read_embeddings
from protnest.engine.chain import Chain
from protnest.engine.checkpoint import save_checkpoint
from protnest.engine.cli import app
from protnest.engine.library import LibraryOptions
from protnest.engine.search import Hits, Searcher, recall
from protnest.engine.verify import verify_store
from typer.testing import CliRunner

from support.families import random_chain, tiny_family
from support.tiny import random_proteins, save_tiny_model, write_fasta

ROWS = 300
MODELS = ("tiny16", "tiny24", "tiny40")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested store of 300 proteins in 8 shards, its models and chain, and a store of one model's residues."""
    home = tmp_path_factory.mktemp("search")
    family = tiny_family()
    for encoder in family:
        save_checkpoint(encoder, home / encoder.name)
    random_chain(family).save(home / "own.chain")
    fasta = write_fasta(home / "library.fasta", random_proteins(ROWS, longest=20))
    write_fasta(home / "queries.fasta", random_proteins(7, seed=1, longest=20), prefix="query")
    models = [load_model(home / name, device="cpu", precision="fp32") for name in MODELS]
    chain = Chain.load(home / "own.chain")
    options = LibraryOptions(shard_records=40)
    embed_library(fasta, home / "store", Embedder(models, chain=chain), options)
    embed_library(fasta, home / "residues", Embedder(models[0], pool="residue"), options)
    embed_library(home / "queries.fasta", home / "queries", Embedder(models, chain=chain), options)
    embed_library(fasta, home / "alone", Embedder(models[0]), options)
    return home


def _searcher(home: Path, **options: object) -> Searcher:
    return Searcher(read_embeddings(home / "store"), home / "store", **options)  # type: ignore[arg-type]


def _brute_force(home: Path, width: int, metric: str) -> np.ndarray:
    rows, queries = (
        np.asarray(read_embeddings(home / name).array, np.float64)[:, :width] for name in ("store", "queries")
    )
    if metric == "cosine":
        rows, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, queries))
    return queries @ rows.T


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dims", [None, 16, 24])
@pytest.mark.parametrize("exactly", [True, False])
def test_hits_are_those_of_brute_force(home: Path, metric: str, dims: int | None, exactly: bool) -> None:
    searcher = _searcher(home, dims=dims, metric=metric)
    queries = np.asarray(read_embeddings(home / "queries").array)
    hits = searcher.search_exactly(queries, 5) if exactly else searcher.search(queries, 5, candidates=60)
    expected = _brute_force(home, dims or 40, metric)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    assert np.array_equal(hits.rows_Qk, order)
    best = np.take_along_axis(expected, order, axis=1)
    np.testing.assert_allclose(hits.similarities_Qk, best, rtol=1e-5, atol=1e-6)


def test_keys_are_of_the_prefix_that_holds_enough(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random models the larger add most of the variance: the whole row is taken; asked for little, the prefix is."""
    prefixes = []
    for held in (0.95, 0.01):
        monkeypatch.setattr("protnest.engine.search.HELD", held)
        searcher = _searcher(home)
        searcher.build()
        assert searcher.keys is not None
        assert searcher.keys.rows_NK.shape == (ROWS, searcher.keys.axes_PA.shape[1] + 1)
        axes = searcher.keys.axes_PA.astype(np.float64)
        np.testing.assert_allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=1e-5)
        prefixes.append(searcher.keys.prefix)
    assert prefixes == [40, 16]


def test_keys_with_all_axes_rank_as_whole_rows(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protnest.engine.search.EXPLAINED", 1.0)
    searcher = _searcher(home)
    searcher.build()
    assert searcher.keys is not None
    queries = searcher._unit(np.asarray(read_embeddings(home / "queries").array))
    difference = searcher.keys.of_queries(queries) @ searcher.keys.rows_NK.T - _brute_force(home, 40, "cosine")
    # They differ by what is the query's alone.
    np.testing.assert_allclose(difference - difference[:, :1], 0, atol=1e-5)


def test_kept_index_is_used_until_the_store_changes(home: Path) -> None:
    first = _searcher(home)
    assert first.load() is False
    first.build()
    path = first.save()
    again = _searcher(home)
    assert again.load() is True
    assert again.keys is not None
    assert first.keys is not None
    assert np.array_equal(again.keys.rows_NK, first.keys.rows_NK)
    assert _searcher(home, dims=24).load() is False
    changed = read_embeddings(home / "store")
    changed.run["settings"]["input_fingerprint"] = "another"
    assert Searcher(changed, home / "store").load() is False
    whole = path.read_bytes()
    changed_byte = bytes([whole[-9] ^ 1])
    for damaged in (whole[:-9], whole[:-9] + changed_byte + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"search-cosine-40\.safetensors: .*not a readable"):
            _searcher(home).load()
    (note,) = verify_store(home / "store").notes
    assert note == f"{path.name}: of `protnest search --keep-index`, which checks it as it reads it"
    path.unlink()


def test_what_a_search_refuses(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dims is 20, but rows are nested at 16, 24, 40"):
        _searcher(home, dims=20)
    with pytest.raises(InputError, match="metric is 'angle'; allowed: cosine, dot"):
        _searcher(home, metric="angle")
    with pytest.raises(InputError, match="holds a row for each residue"):
        Searcher(read_embeddings(home / "residues"), home / "residues")
    with pytest.raises(InputError, match="k is 301, but the store holds 300 proteins"):
        _searcher(home).search(np.ones((1, 40), np.float32), 301)


@pytest.mark.parametrize("exactly", [True, False])
def test_equal_sequences_that_share_a_row_are_all_found(home: Path, tmp_path: Path, exactly: bool) -> None:
    proteins = random_proteins(30, longest=20)
    proteins[20] = proteins[4]
    fasta = write_fasta(tmp_path / "in.fasta", proteins)
    models = [load_model(home / name, device="cpu", precision="fp32") for name in MODELS]
    embedder = Embedder(models, chain=Chain.load(home / "own.chain"))
    embed_library(fasta, tmp_path / "out", embedder, LibraryOptions(shard_records=8, dedup=True))
    stored = read_embeddings(tmp_path / "out")
    searcher = Searcher(stored, tmp_path / "out")
    query = stored.array[[4, 25]]
    hits = searcher.search_exactly(query, 2) if exactly else searcher.search(query, 2, candidates=30)
    assert hits.rows_Qk[0].tolist() == [4, 20]
    assert hits.rows_Qk[1, 0] == 25


def test_rows_of_zeros_have_no_direction(home: Path) -> None:
    hits = _searcher(home).search(np.zeros((1, 40), np.float32), 3)
    assert np.array_equal(hits.similarities_Qk, [[0, 0, 0]])


def test_recall_lets_ties_count() -> None:
    exact = Hits(np.array([[1, 2], [3, 4]]), np.array([[0.9, 0.8], [0.7, 0.6]], np.float32))
    assert recall(Hits(np.array([[1, 9], [3, 4]]), np.array([[0.9, 0.8], [0.7, 0.6]], np.float32)), exact) == 1
    assert recall(Hits(np.array([[1, 9], [3, 4]]), np.array([[0.9, 0.7], [0.7, 0.6]], np.float32)), exact) == 0.75


def _run(home: Path, *words: str, store: str = "store", query: str = "queries.fasta") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["search", str(home / store), str(home / query), *words])
    return result.exit_code, result.stdout, " ".join(result.output.split())


def _given(home: Path) -> list[str]:
    return ["--model", ",".join(str(home / name) for name in MODELS), "--chain", str(home / "own.chain")]


@pytest.mark.parametrize("mode", ["nested", "exact"])
def test_the_command_finds_by_sequence_as_by_row(home: Path, tmp_path: Path, mode: str) -> None:
    words = ["-k", "3", "--mode", mode, "--candidates", "60", "--check", "5", "--json"]
    code, stdout, output = _run(home, *_given(home), *words, "--out", str(tmp_path / "a.tsv"))
    assert code == 0, output
    report = json.loads(stdout)
    assert (report["queries"], report["checked"], report["recall"], report["mode"]) == (7, 5, 1.0, mode)
    table = list(csv.DictReader((tmp_path / "a.tsv").open(), delimiter="\t"))
    assert [(row["query"], row["rank"]) for row in table[:4]] == [
        *(("query0", str(rank)) for rank in (1, 2, 3)),
        ("query1", "1"),
    ]
    expected = _brute_force(home, 40, "cosine")
    assert [int(row["row"]) for row in table] == np.argsort(-expected, axis=1)[:, :3].ravel().tolist()
    assert all(row["hit"] == f"protein{row['row']}" for row in table)
    code, stdout, output = _run(home, *words, query="queries")
    assert code == 0, output
    assert [hit["row"] for hit in json.loads(stdout)["hits"]] == [int(row["row"]) for row in table]


def test_hits_on_standard_output(home: Path) -> None:
    code, stdout, output = _run(home, "-k", "2", query="queries")
    assert code == 0, output
    lines = stdout.splitlines()
    assert lines[0] == "query,rank,hit,similarity,row"
    assert lines[1].startswith("query0,1,protein")


def test_queries_of_a_table(home: Path, tmp_path: Path) -> None:
    table = tmp_path / "queries.csv"
    table.write_text("who,letters\nme,MKTAYIAKQR\n")
    code, _, output = _run(home, *_given(home), query=str(table))
    assert (code, "--seq-col names another" in output) == (1, True)
    words = ["--seq-col", "letters", "--id-col", "who", "-k", "1"]
    code, stdout, output = _run(home, *_given(home), *words, query=str(table))
    assert code == 0, output
    assert stdout.splitlines()[1].startswith("me,1,protein")


def test_the_command_keeps_its_index(home: Path) -> None:
    code, stdout, output = _run(home, "-k", "2", "--keep-index", "--json", query="queries")
    assert code == 0, output
    assert json.loads(stdout)["index"] == "built"
    code, stdout, _ = _run(home, "-k", "2", "--json", query="queries")
    assert (code, json.loads(stdout)["index"]) == (0, "loaded")
    (home / "store" / "search-cosine-40.safetensors").unlink()


def test_what_the_command_refuses(home: Path, tmp_path: Path) -> None:
    def refused(message: str, *words: str, store: str = "store", query: str = "queries.fasta") -> None:
        code, _, output = _run(home, *words, store=store, query=query)
        assert code == 1, output
        assert message in output, output

    given = _given(home)
    refused("this folder holds no embeddings", store="tiny16")
    run = json.loads((home / "alone" / "run.json").read_text())
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "run.json").write_text(json.dumps(run | {"complete": False}))
    refused("is not finished", store=str(tmp_path / "cut"))
    refused("holds a row for each residue", store="residues")
    refused("dims is 20, but rows are nested at 16, 24, 40", "--dims", "20")
    refused("k is 301", "-k", "301")
    refused("no such file: queries are a file of proteins", query="none.fasta")
    refused("with a chain that is not bundled")
    refused("was written with a chain of hash", "--chain", "nano")
    refused("and --model says where that is (no model 'tiny16'", "--chain", str(home / "own.chain"))
    refused("was written without a chain", *given, store="alone")
    other = save_tiny_model(tmp_path / "other")
    refused("was written with other models (model_fingerprint", "--model", str(other), store="alone")
    refused("holds other embeddings than the store that is searched", query="alone")
    empty = tmp_path / "empty.fasta"
    empty.write_text("")
    refused("holds no records", *given, query=str(empty))
    empty.write_text(">a\nMJT\n")
    refused("all 1 records were left out", *given, "--invalid", "skip", query=str(empty))
    code, _, output = _run(home, "--out", str(tmp_path / "a.txt"), query="queries")
    assert code == 2, output
