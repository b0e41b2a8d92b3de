"""What `verify` finds on a damaged disk, and that the same run mends it bit for bit."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protnest.engine import Embedder, InputError, embed_library, load_model, read_embeddings
from protnest.engine.cli import app
from protnest.engine.library import LibraryOptions
from protnest.engine.merge import merge_stores
from protnest.engine.run_folder import lock_folder
from protnest.engine.store import StoreWriter, checksum, discard
from protnest.engine.verify import Verdict, verify_store
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from support.tiny import random_proteins, save_tiny_model

KINDS = {
    "mean": ("mean", LibraryOptions(invalid="skip", shard_records=4)),
    "residue": ("residue", LibraryOptions(invalid="skip", shard_records=4, storage_dtype="fp16")),
    "dedup": ("residue", LibraryOptions(invalid="skip", shard_records=4, dedup=True)),
}


class _Stores:
    """Stores of one small library, one of each kind, and runs that mend copies of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        proteins = random_proteins(16, seed=5)
        # Equal ones, a rejected record, and one beyond the model's 60 residues.
        letters = [*proteins[:9], "MJT", proteins[2], "M" * 70, *proteins[9:], proteins[15], proteins[2]]
        self.fasta = root / "in.fasta"
        self.fasta.write_text("".join(f">p{place} about\n{text}\n" for place, text in enumerate(letters)))
        self._model = load_model(save_tiny_model(root / "tiny"), device="cpu", precision="fp32")
        for kind in KINDS:
            self.embed(root / kind, kind)

    def embed(self, out: Path, kind: str) -> int:
        """How many proteins were embedded."""
        pool, options = KINDS[kind]
        return embed_library(self.fasta, out, Embedder(self._model, pool=pool), options).embedded

    def copy(self, kind: str, to: Path) -> Path:
        shutil.copytree(self.root / kind, to)
        return to


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> _Stores:
    return _Stores(tmp_path_factory.mktemp("stores"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def _change_run(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    run = json.loads((folder / "run.json").read_text())
    change(run)
    (folder / "run.json").write_text(json.dumps(run))


def _sign(folder: Path) -> None:
    """Writes sizes and checksums anew, so that only what is in the files can give a damage away."""

    def change(run: dict[str, Any]) -> None:
        for shard in run["shards"]:
            path = folder / f"part-{shard['number']:05d}.safetensors"
            shard["size_bytes"], shard["sha256"] = path.stat().st_size, checksum(path)
        run["index_sha256"] = checksum(folder / "index.parquet")

    _change_run(folder, change)


def _problems(verdict: Verdict) -> list[str]:
    return [f"{damage.file}: {damage.problem}" for damage in verdict.damages]


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_store_is_whole_and_left_alone(stores: _Stores, kind: str) -> None:
    before = _contents(stores.root / kind)
    followed: list[tuple[int, int]] = []
    verdict = verify_store(stores.root / kind, remove=True, follow=lambda done, total: followed.append((done, total)))
    assert verdict.is_whole
    assert (verdict.damages, verdict.notes, verdict.discarded) == ([], [], [])
    assert (verdict.records, verdict.rejected) == (20, 1)
    assert verdict.rows == (17 if kind == "dedup" else 20)
    assert followed[-1][0] == followed[-1][1] == sum(path.stat().st_size for path in stores.root.glob(f"{kind}/part-*"))
    assert _contents(stores.root / kind) == before


def _flip(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, list[int]]] = {
    "a bit": (lambda folder: _flip(folder / "part-00002.safetensors"), "part-00002.*SHA-256", [2]),
    "truncated": (
        lambda folder: (folder / "part-00001.safetensors").write_bytes(
            (folder / "part-00001.safetensors").read_bytes()[:-7]
        ),
        r"part-00001\.safetensors: has [\d,]+ bytes, [\d,]+ were written",
        [1],
    ),
    "gone": (lambda folder: (folder / "part-00000.safetensors").unlink(), "part-00000.*is missing", [0]),
    "index": (lambda folder: _flip(folder / "index.parquet", 40), "index.parquet: its SHA-256", []),
    "index gone": (lambda folder: (folder / "index.parquet").unlink(), "index.parquet: is missing", []),
    "rejects": (lambda folder: (folder / "rejects.csv").unlink(), "rejects.csv: is missing", []),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [*DAMAGES, "two"])
def test_what_is_discarded_is_made_again_bit_for_bit(tmp_path: Path, stores: _Stores, kind: str, damage: str) -> None:
    """Of a damaged index nothing is computed: the library says what it held."""
    folder = stores.copy(kind, tmp_path / "store")
    whole = _contents(folder)
    chosen = [DAMAGES[each] for each in (("index gone", "a bit") if damage == "two" else (damage,))]
    for harm, _, _ in chosen:
        harm(folder)
    expected = sorted(number for _, _, numbers in chosen for number in numbers)
    told = _problems(verify_store(folder))
    assert len(told) == len(chosen)
    assert _contents(folder).keys() <= whole.keys()

    verdict = verify_store(folder, remove=True)
    assert (verdict.discarded, verdict.is_whole) == (expected, False)
    after = json.loads((folder / "run.json").read_text())
    assert after["complete"] is False
    assert after["rows"] == sum(shard["rows"] for shard in after["shards"])
    again = verify_store(folder)
    assert not again.complete
    assert again.shards == verdict.shards - len(expected)

    records = {shard["number"]: shard["records"] for shard in json.loads(whole["run.json"])["shards"]}
    embedded = stores.embed(folder, kind)
    assert embedded == sum(records[number] for number in expected)
    assert _contents(folder) == whole
    assert verify_store(folder).is_whole


def test_a_run_mends_what_it_sees_by_itself(tmp_path: Path, stores: _Stores) -> None:
    """A shard of the wrong size, and then an index that it would have to trust."""
    folder = stores.copy("mean", tmp_path / "store")
    whole = _contents(folder)
    DAMAGES["truncated"][0](folder)
    DAMAGES["index"][0](folder)
    assert stores.embed(folder, "mean") == 4
    assert _contents(folder) == whole
    (folder / "index.parquet").unlink()
    assert stores.embed(folder, "mean") == 0
    assert _contents(folder) == whole


@pytest.mark.parametrize("unfinished", [False, True])
def test_discarding_that_is_killed_keeps_no_damage(tmp_path: Path, stores: _Stores, unfinished: bool) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    whole = _contents(folder)
    DAMAGES["a bit"][0](folder)

    if unfinished:
        _unfinish(folder, 5)
    real = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        real(path, missing_ok=missing_ok)

    with mock.patch.object(Path, "unlink", fail), pytest.raises(KeyboardInterrupt):
        verify_store(folder, remove=True)
    assert (folder / "part-00002.safetensors").exists()
    verdict = verify_store(folder)
    assert (verdict.complete, verdict.shards, verdict.damages) == (False, 4, [])
    assert stores.embed(folder, "mean") == 4
    assert _contents(folder) == whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_told_by_file(tmp_path: Path, stores: _Stores, damage: str) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    harm, message, numbers = DAMAGES[damage]
    harm(folder)
    verdict = verify_store(folder)
    (told,) = _problems(verdict)
    assert re.match(message, told)
    assert [each.shard for each in verdict.damages if each.shard is not None] == numbers


def _tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "part-00001.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return harm


def _set(name: str, place: Any, value: object) -> Callable[[dict[str, Any]], object]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name][place] = value

    return change


def _replace(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = np.ascontiguousarray(make(tensors[name]))

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mean", _set("embeddings", (2, 5), np.nan), "row 2 is not finite"),
        ("mean", _set("embeddings", (3, 0), -np.inf), "row 3 is not finite"),
        ("mean", _replace("embeddings", lambda rows: rows[:3]), r"float32 \(3, 32\); expected float32 \(4, 32\)"),
        ("mean", _replace("embeddings", lambda rows: rows[:, :8]), r"float32 \(4, 8\); expected float32 \(4, 32\)"),
        ("mean", _replace("embeddings", lambda rows: rows.astype(np.float16)), "float16"),
        ("mean", _replace("embeddings", lambda rows: rows.astype(np.float64)), "embeddings is F64"),
        (
            "mean",
            lambda tensors: tensors.update(more=np.zeros(1, np.float32)),
            "holds embeddings, more; exp",
        ),
        ("residue", lambda tensors: tensors.pop("offsets"), "holds embeddings; expected embeddings, offsets"),
        ("residue", _set("offsets", 0, 1), "offsets do not rise from 0"),
        ("residue", _set("offsets", 2, 10**6), "offsets do not rise from 0"),
        ("residue", _replace("offsets", lambda offsets: offsets[:-1]), r"expected int64 \(5,\)"),
        ("residue", _set("offsets", -1, 10**6), r"expected float16 \(1000000, 32\)"),
    ],
)
def test_contents_are_checked_where_checksums_agree(
    tmp_path: Path, stores: _Stores, kind: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = stores.copy(kind, tmp_path / "store")
    _tensors(change)(folder)
    _sign(folder)
    (told,) = _problems(verify_store(folder))
    assert re.search(message, told)


def test_offsets_and_lengths_are_held_together(tmp_path: Path, stores: _Stores) -> None:
    folder = stores.copy("residue", tmp_path / "store")

    def change(tensors: dict[str, Any]) -> None:
        tensors["offsets"][1] += 1 if tensors["offsets"][2] - tensors["offsets"][1] > 1 else -1

    _tensors(change)(folder)
    _sign(folder)
    (told,) = _problems(verify_store(folder))
    assert re.match(r"index\.parquet: line 5: \d+ residues, but its embedding has \d+ rows", told)


def _index(change: Callable[[dict[str, list[Any]]], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        table = pq.read_table(folder / "index.parquet")
        columns = table.to_pydict()
        change(columns)
        pq.write_table(pa.table(columns, schema=table.schema), folder / "index.parquet")

    return harm


def _drop_line(columns: dict[str, list[Any]]) -> None:
    for values in columns.values():
        values.pop()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mean", lambda columns: columns["position"].__setitem__(3, 2), "line 4: position 2 does not rise"),
        ("mean", lambda columns: columns["position"].__setitem__(19, 40), "20 records of the library are neither"),
        (
            "mean",
            lambda columns: columns["position"].__setitem__(9, 9),
            "records that both the index and rejects.csv list",
        ),
        ("mean", lambda columns: columns["row"].__setitem__(3, 2), "line 4: row 2 is not the one that follows"),
        ("mean", _drop_line, "19 lines; the shards have 20 records"),
        ("dedup", lambda columns: columns["row"].__setitem__(3, 9), "line 4: row 9 is not the one that follows"),
        ("dedup", lambda columns: columns["row"].__setitem__(3, -1), "line 4: row -1 is not"),
        ("dedup", lambda columns: columns["row"].__setitem__(-1, 3), "line 20: .* residues, but its embedding has"),
        (
            "dedup",
            lambda columns: columns["row"].__setitem__(slice(-3, -1), [columns["row"][-4]] * 2),
            "embeddings by the end of part-0",
        ),
    ],
)
def test_the_index_is_checked_where_its_checksum_agrees(
    tmp_path: Path, stores: _Stores, kind: str, change: Callable[[dict[str, list[Any]]], object], message: str
) -> None:
    folder = stores.copy(kind, tmp_path / "store")
    _index(change)(folder)
    _sign(folder)
    (told,) = _problems(verify_store(folder))
    assert re.search(message, told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["shards"].pop(1), "lists no shard 1"),
        (lambda run: run["shards"].reverse(), "not in order"),
        (lambda run: run.update(rows=3), "says 3 rows"),
        (lambda run: run["settings"].update(shard=[2, 3]), "not those of --shard 2/3"),
    ],
)
def test_run_json_is_checked(
    tmp_path: Path, stores: _Stores, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    _change_run(folder, change)
    told = "\n".join(_problems(verify_store(folder)))
    assert re.search(f"run.json: .*{message}", told)


def test_unreadable_run_json_is_an_error(tmp_path: Path, stores: _Stores) -> None:
    with pytest.raises(InputError, match=r"run\.json: no such file: this folder holds no embeddings"):
        verify_store(tmp_path)
    folder = stores.copy("mean", tmp_path / "store")
    _change_run(folder, lambda run: run["shards"][0].pop("rows"))
    with pytest.raises(InputError, match=r"run\.json: not a readable run .*rows"):
        verify_store(folder)
    _change_run(folder, lambda run: run.pop("settings"))
    with pytest.raises(InputError, match=r"run\.json: not a readable run \('settings'\)"):
        verify_store(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrong,id,reason\n", r"begins with \['wrong', 'id', 'reason'\]"),
        ("record,id,reason\nten,p9,J\n", "cannot be read"),
        ("record,id,reason\n1,p0\n", "cannot be read"),
        ("", "begins with None"),
    ],
)
def test_rejects_are_read(tmp_path: Path, stores: _Stores, text: str, message: str) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    _forget_rejects(folder)
    (folder / "rejects.csv").write_text(text)
    (told,) = _problems(verify_store(folder))
    assert re.search(rf"rejects\.csv: {message}", told)


def _forget_rejects(folder: Path) -> None:
    """As the first stores of version 2 were: their rejects have no checksum."""
    _change_run(folder, lambda run: run.pop("rejects_sha256"))


def test_a_lost_reject_is_missed(tmp_path: Path, stores: _Stores) -> None:
    """Every record of the library is in the index or among the rejects."""
    folder = stores.copy("mean", tmp_path / "store")
    with (folder / "rejects.csv").open() as file:
        header, _ = csv.reader(file)
    _forget_rejects(folder)
    (folder / "rejects.csv").write_text(",".join(header) + "\n")
    (told,) = _problems(verify_store(folder))
    assert told == "rejects.csv: 1 records of the library are neither in the index nor in rejects.csv"


@pytest.mark.parametrize("harm", ["lost", "invented", "changed", "of a record that is there"])
def test_rejects_that_are_not_those_of_the_run(tmp_path: Path, stores: _Stores, harm: str) -> None:
    """They are told, not the index beside them, and the same run writes them again."""
    folder = stores.copy("mean", tmp_path / "store")
    whole = _contents(folder)
    path = folder / "rejects.csv"
    header, reject = path.read_text().splitlines()
    lines = {
        "lost": [header],
        "invented": [header, reject, "99,q,nonsense"],
        "changed": [header, reject.replace(",p", ",q")],
        "of a record that is there": [header, reject, "1,p0,nonsense"],
    }
    path.write_text("\n".join(lines[harm]) + "\n")
    assert _problems(verify_store(folder)) == ["rejects.csv: its SHA-256 is not that of what was written"]
    verdict = verify_store(folder, remove=True)
    assert (verdict.discarded, verdict.reopened) == ([], True)
    assert (folder / "index.parquet").read_bytes() == whole["index.parquet"]
    assert stores.embed(folder, "mean") == 0
    assert _contents(folder) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["settings"].pop("width"), "KeyError.'width'."),
        (lambda run: run["settings"].update(width="32"), "width is '32'"),
        (lambda run: run["settings"].update(width=0), "width is 0"),
        (lambda run: run["settings"].update(pool=None), "pool is None"),
        (lambda run: run["settings"].update(storage_dtype="fp9"), "storage_dtype is 'fp9'"),
        (lambda run: run["settings"].update(storage_dtype=[]), "TypeError"),
        (lambda run: run["settings"].update(shard=[0, 0]), r"shard is \[0, 0\]"),
        (lambda run: run["settings"].update(shard=[2, 1]), r"shard is \[2, 1\]"),
        (lambda run: run["settings"].update(shard=[1]), "ValueError"),
        (lambda run: run["settings"].update(long=3), "long is 3"),
        (lambda run: run["settings"].update(max_residues=1.5), "max_residues is 1.5"),
        (lambda run: run.update(settings={}), "KeyError.'shard'."),
        (lambda run: run.update(settings=[]), "TypeError"),
        (lambda run: run["shards"][0].update(rows="7"), "of shard 0 the list has no whole numbers"),
        (lambda run: run["shards"][1].update(number=None), "of shard None the list"),
        (lambda run: run["shards"][1].update(size_bytes=None), "of shard 1 the list"),
        (lambda run: run["shards"][1].update(records=-1), "of shard 1 the list"),
        (lambda run: run["shards"][1].update(colour="red"), "colour"),
        (lambda run: run["shards"].append(3), "not int"),
    ],
)
def test_a_damaged_list_is_told_by_all_who_read_it(
    tmp_path: Path, stores: _Stores, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    _change_run(folder, change)
    readers: list[Callable[[], object]] = [
        lambda: verify_store(folder),
        lambda: read_embeddings(folder),
        lambda: merge_stores([folder], tmp_path / "merged"),
    ]
    for read in readers:
        with pytest.raises(InputError, match=rf"run\.json: not a readable run .*{message}"):
            read()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["index.parquet", "part-00001.safetensors"])
def test_checksums_that_are_gone_from_the_list(tmp_path: Path, stores: _Stores, name: str) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    if name == "index.parquet":
        _change_run(folder, lambda run: run.update(index_sha256=None))
    else:
        _change_run(folder, lambda run: run["shards"][1].update(sha256=None))
    assert _problems(verify_store(folder)) == [f"{name}: run.json lists no SHA-256 of it"]


def _unfinish(folder: Path, shards: int) -> None:
    """As a kill leaves a run: parts of the index, some shards listed, one written and not listed."""
    run = json.loads((folder / "run.json").read_text())
    lines = pq.read_table(folder / "index.parquet")
    begin = 0
    for shard in run["shards"]:
        part = folder / f"part-{shard['number']:05d}.parquet"
        pq.write_table(lines.slice(begin, shard["records"]).combine_chunks(), part)
        assert checksum(part) == shard["index_sha256"]
        begin += shard["records"]
    run["shards"] = run["shards"][:shards]
    run.update(complete=False, index_sha256=None, rows=sum(shard["rows"] for shard in run["shards"]))
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    (folder / "index.parquet").unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path, stores: _Stores, kind: str) -> None:
    folder = stores.copy(kind, tmp_path / "store")
    whole = _contents(folder)
    _unfinish(folder, 2)
    (folder / ".part-00003.safetensors.tmp").write_bytes(b"half")
    verdict = verify_store(folder)
    assert verdict.damages == []
    assert (verdict.complete, verdict.is_whole, verdict.shards, verdict.rows) == (False, False, 2, 8)
    assert any("part-00002.safetensors: not listed yet" in note for note in verdict.notes)
    assert any("left by a killed run" in note for note in verdict.notes)

    (folder / "part-00001.parquet").write_bytes(b"PAR1")
    _flip(folder / "part-00000.safetensors")
    assert [damage.file for damage in verify_store(folder, remove=True).damages] == [
        "part-00000.safetensors",
        "part-00001.parquet",
    ]
    stores.embed(folder, kind)
    assert _contents(folder) == whole


def test_leftovers_copies_and_foreign_files_are_told(tmp_path: Path, stores: _Stores) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    for name in ("notes.txt", "embeddings.npy", "part-00009.safetensors", ".index.parquet.tmp"):
        (folder / name).write_text("x")
    (folder / ".pt.tmp").mkdir()
    verdict = verify_store(folder)
    assert verdict.is_whole
    assert verdict.notes == [
        ".index.parquet.tmp: left by a killed run; the next one removes it",
        ".pt.tmp: left by a killed run; the next one removes it",
        "embeddings.npy: a copy in another format, not checked",
        "notes.txt: not of this store",
        "part-00009.safetensors: left by a killed run",
    ]
    stores.embed(folder, "mean")
    assert len(verify_store(folder).notes) == 3


def test_a_folder_that_is_written_to_is_refused(tmp_path: Path, stores: _Stores) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    with lock_folder(folder), pytest.raises(InputError, match="another run is writing"):
        verify_store(folder)


def test_stores_of_version_1_are_checked_without_checksums(tmp_path: Path) -> None:
    archive = Path(__file__).resolve().parent.parent / "archives" / "store-v1-residue"
    folder = tmp_path / "store"
    shutil.copytree(archive, folder)
    settings = json.loads((folder / "run.json").read_text())["settings"]
    with StoreWriter(folder, settings, details={}) as store:
        assert store.complete
    (folder / "part-00001.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="schema version: 1 there, 2 now"), StoreWriter(folder, settings, details={}):
        pass
    with pytest.raises(InputError, match="schema version 1, with which no run goes on"):
        discard(folder, {1}, index=False)
    before = _contents(folder)
    verdict = verify_store(folder, remove=True)
    assert _problems(verdict) == ["part-00001.safetensors: has 5 bytes, 4,064 were written"]
    assert verdict.discarded == []
    assert any("nothing was removed" in note for note in verdict.notes)
    assert _contents(folder) == before


def test_command(tmp_path: Path, stores: _Stores) -> None:
    folder = stores.copy("mean", tmp_path / "store")
    run = CliRunner()
    done = run.invoke(app, ["verify", str(folder)])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "whole: 5 shards, 20 embeddings, 20 proteins, 1 records left out" in done.stderr
    _flip(folder / "part-00003.safetensors")
    done = run.invoke(app, ["verify", str(folder), "--json"])
    report = json.loads(done.stdout)
    assert (done.exit_code, report["whole"], report["complete"]) == (1, False, True)
    assert [damage["shard"] for damage in report["damages"]] == [3]
    done = run.invoke(app, ["verify", str(folder), "--discard"])
    assert done.exit_code == 1
    assert "removed 1 shards" in done.stderr
    done = run.invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1
    assert "not finished: 4 shards, 16 embeddings" in done.stderr
