"""FASTA reading: what is accepted, cleaned, masked or rejected, and that every error names file, line and record."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dnaio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from protnest.engine import fasta
from protnest.engine.alphabet import RESIDUES
from protnest.engine.errors import InputError
from protnest.engine.fasta import Record, Reject, clean_sequence, locate_records, read_fasta

POLICIES = ("error", "skip", "mask")
TWO = b">a first one\nMKV\n>b second\nLLA\n"
BLANKS = " \t\v\f\x1c\x1d\x1e\x1f"
BINARIES = {
    "elf": b"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03\x00>\x00\x01\n>\x00\n",
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "random": random.Random(0).randbytes(5000),
    "twice compressed": gzip.compress(gzip.compress(TWO)),
}


def write(folder: Path, data: bytes | str, name: str = "x.fasta") -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def read(path: Path, **options: Any) -> list[Record]:
    return list(read_fasta(path, **options))


def read_pairs(path: Path, **options: Any) -> list[tuple[str, str]]:
    return [(record.header, record.sequence) for record in read_fasta(path, **options)]


def read_all(path: Path, **options: Any) -> tuple[list[Record], list[Reject]]:
    rejects: list[Reject] = []
    return read(path, on_reject=rejects.append, **options), rejects


def failure(path: Path, **options: Any) -> InputError:
    """Return the error of reading this file, having checked that its message holds its parts."""
    with pytest.raises(InputError) as caught:
        read(path, **options)
    error = caught.value
    assert str(error).startswith(str(path))
    if error.line is not None:
        assert f", line {error.line}" in str(error)
    if error.record is not None:
        assert f", record {error.record}" in str(error)
    if error.record_id:
        assert f" ({error.record_id}): " in str(error)
    assert str(error).isprintable()
    return error


def place(error: InputError) -> tuple[int | None, int | None, str | None]:
    return error.line, error.record, error.record_id


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "CHUNK_BYTES", size)
        yield


# What is accepted


def test_reads_records_in_order(tmp_path: Path) -> None:
    assert read(write(tmp_path, TWO)) == [
        Record(index=0, id="a", header="a first one", sequence="MKV", flags=()),
        Record(index=1, id="b", header="b second", sequence="LLA", flags=()),
    ]


def test_records_and_rejects_are_frozen(tmp_path: Path) -> None:
    record: Any = read(write(tmp_path, TWO))[0]
    with pytest.raises(AttributeError):
        record.sequence = "M"
    assert not hasattr(record, "__dict__")


def test_path_may_be_a_string(tmp_path: Path) -> None:
    assert len(list(read_fasta(str(write(tmp_path, TWO))))) == 2


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(TWO[:-1], id="no newline at the end"),
        pytest.param(TWO.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(TWO.replace(b"\n", b"\r"), id="CR"),
        pytest.param(b"\xef\xbb\xbf" + TWO, id="byte-order mark"),
        pytest.param(b"\n \n\t\r\n" + TWO.replace(b"\n", b"\n\n"), id="blank lines"),
        pytest.param(b">a first one\nM\nK\nV\n>b second\nL\nLA\n", id="many lines"),
        pytest.param(b">a first one\n m k\tv \n>b second\n\tLLA\x0c\n", id="lower case and blanks"),
        pytest.param(b">a first one\nMKV*\n>b second\nLL\nA *\n*\n", id="trailing stops"),
        pytest.param(b"  >a first one\t\nMKV\n\t>b second\nLLA\n", id="indented headers"),
        pytest.param(b"#c\n>a first one\n#>c\nMKV\n #c\n>b second\nLLA\n#c", id="comments"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 5, 1 << 16])
@pytest.mark.parametrize("invalid", POLICIES)
def test_layouts_read_the_same(tmp_path: Path, data: bytes, chunk_bytes: int, invalid: str) -> None:
    with chunks_of(chunk_bytes):
        records = read(write(tmp_path, data), invalid=invalid)
    assert [(record.header, record.sequence, record.flags) for record in records] == [
        ("a first one", "MKV", ()),
        ("b second", "LLA", ()),
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.fasta.gz", gzip.compress(TWO)),
        ("x.fasta", gzip.compress(TWO)),
        ("x.fasta.gz", gzip.compress(TWO[:20]) + gzip.compress(b"") + gzip.compress(TWO[20:])),
        ("x.fasta.gz", gzip.compress(TWO) + bytes(64)),
        ("x.fasta.bz2", bz2.compress(TWO)),
        ("x.fasta.xz", lzma.compress(TWO)),
    ],
    ids=["gz", "gz by content", "gz members", "gz padded", "bz2", "xz"],
)
def test_compressed_files(tmp_path: Path, name: str, data: bytes) -> None:
    assert read_pairs(write(tmp_path, data, name)) == [("a first one", "MKV"), ("b second", "LLA")]


def test_every_letter_of_the_alphabet_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, f">upper\n{RESIDUES}\n>lower\n{RESIDUES.lower()}\n")
    assert [record.sequence for record in read(path)] == [RESIDUES, RESIDUES]


def test_duplicate_ids_are_kept(tmp_path: Path) -> None:
    records = read(write(tmp_path, ">a\nMK\n>a\nMK\n>a x\nLL\n"))
    assert [(record.index, record.id) for record in records] == [(0, "a"), (1, "a"), (2, "a")]


def test_headers_are_kept_whole(tmp_path: Path) -> None:
    headers = [
        "sp|P1|X\tOS=a\tb  c",
        "id\\with\\x41 backslash\\",
        "protéine β 🧬",
        " spaced",
        "nr one\x01nr two",
        ">twice",
    ]
    path = write(tmp_path, "".join(f">{header}\nMK\n" for header in headers))
    records = read(path)
    assert [record.header for record in records] == headers
    assert [record.id for record in records] == [header.split()[0] for header in headers]


def test_long_header_and_long_sequence(tmp_path: Path) -> None:
    header, sequence = "h" * 1_000_000, "MKVLA" * 20_000
    lines = "\n".join(sequence[start : start + 60] for start in range(0, len(sequence), 60))
    path = write(tmp_path, f">{header} x\n{sequence}\n>b\n{lines}\n>c J\nMJ\n")
    records, rejects = read_all(path, invalid="skip")
    assert [(record.id, record.sequence) for record in records] == [(header, sequence), ("b", sequence)]
    assert [reject.index for reject in rejects] == [2]


def test_long_id_is_shortened_in_messages_only(tmp_path: Path) -> None:
    path = write(tmp_path, f">{'h' * 100_000}\nMJ\n")
    assert len(str(failure(path)).removeprefix(str(path))) < 400
    assert read_all(path, invalid="skip")[1][0].id == "h" * 100_000


def test_results_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    path = write(tmp_path, "#\n>prot\u00e9ine \u03b2\nMK\n>b\nM\u00e9K\n")
    script = (
        "import locale, sys\n"
        "from protnest.engine.fasta import read_fasta\n"
        "print(locale.getpreferredencoding(False))\n"
        "print(ascii([(r.id, r.header, r.sequence) for r in read_fasta(sys.argv[1], invalid='mask')]))\n"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    encoding, result = done.stdout.splitlines()
    if sys.platform == "linux":
        assert encoding.upper() not in {"UTF-8", "UTF8"}
    assert result == ascii([("prot\u00e9ine", "prot\u00e9ine \u03b2", "MK"), ("b", "b", "MXK")])


def test_reading_is_lazy_and_closes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, TWO + b">c\nMJ\n")
    opened: list[Any] = []
    open_path = Path.open

    def spy(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(open_path(self, *args, **options))
        return opened[-1]

    monkeypatch.setattr(Path, "open", spy)
    records: Any = read_fasta(path)
    assert opened == []
    assert next(records).id == "a"
    assert not opened[0].closed
    records.close()
    assert opened[0].closed
    assert failure(path).line == 5
    assert len(opened) == 3
    assert all(file.closed for file in opened)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    randomness = random.Random(1)
    peaks_bytes = []
    for count in (4_000, 12_000):
        lines = (
            f">r{index}\n{''.join(randomness.choices('ACDEFGHIKLMNPQRSTVWYJ', k=150))}\n" for index in range(count)
        )
        path = write(tmp_path, gzip.compress("".join(lines).encode(), 1), f"{count}.fasta.gz")
        tracemalloc.start()
        kept = sum(1 for _ in read_fasta(path, invalid="skip", on_reject=lambda _: None))
        locate_records(path, [count - 1])
        peaks_bytes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert 0 < kept < count
    assert peaks_bytes[1] < peaks_bytes[0] + 200_000
    assert peaks_bytes[1] < 4_000_000


# Comments


COMMENTED = (
    b"#first\r\n>a # in a header\r\n#\r\n \t# indented\r\nMKV\r\n\n##x#y\n"
    b">b#\nMK\r#after CR\rLL\n\x1c#odd blank\n>#c\nM\n#last"
)


@pytest.mark.parametrize("chunk_bytes", [*range(1, 24), 1 << 16])
def test_comment_lines_are_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, chunk_bytes: int
) -> None:
    path = write(tmp_path, COMMENTED)
    with chunks_of(chunk_bytes), caplog.at_level(logging.WARNING):
        assert read_pairs(path) == [("a # in a header", "MKV"), ("b#", "MKLL"), ("#c", "M")]
    assert caplog.record_tuples == [
        ("protnest.engine.fasta", logging.WARNING, f"{path}: lines that start with '#', skipped as comments: 7")
    ]


def test_nothing_is_logged_without_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(write(tmp_path, ">a#b # c\nMK\n"))
    read_all(write(tmp_path, ">a\nMK\n>b\nMJ\n"), invalid="skip")
    records: Any = read_fasta(write(tmp_path, "#\n>a\nMK\n>b\nMK\n"))
    next(records)
    records.close()
    assert caplog.record_tuples == []


def test_rejects_that_nobody_takes_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, ">a\nMK\n>b\nMJ\n>c\n")
    assert len(read(path, invalid="skip")) == 1
    assert caplog.messages == [f"{path}: records left out as invalid: 2 of 3"]


# Sequences and headers at fault


BAD_LETTERS = [
    ("J", "'J'"),
    ("1", "'1'"),
    ("#", "'#'"),
    ("*", "'*'"),
    ("\0", "'\\x00'"),
    ("\x1b", "'\\x1b'"),
    ("\\", "'\\\\'"),
    ("\u00e9", "'\u00e9'"),
    ("\u00df", "'\u00df'"),
    ("\u017f", "'\u017f'"),
    ("\u00a0", "'\\xa0'"),
    ("\ufeff", "'\\ufeff'"),
    ("\U0001f9ec", "'\U0001f9ec'"),
]


@pytest.mark.parametrize(("letter", "shown"), BAD_LETTERS, ids=[ascii(letter) for letter, _ in BAD_LETTERS])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 16])
def test_bad_letter(tmp_path: Path, letter: str, shown: str, chunk_bytes: int) -> None:
    path = write(tmp_path, f">a\nMKV\n\n>b second\n# c\n m k\t  v\nLL{letter}{letter}M9*\n>c\nMK\n")
    with chunks_of(chunk_bytes):
        error = failure(path)
        records, rejects = read_all(path, invalid="skip")
        masked, masked_rejects = read_all(path, invalid="mask")
    assert place(error) == (4, 2, "b")
    assert error.file == str(path)
    assert error.problem == (
        f"on line 7, {shown} at residue 6 is not a residue; allowed are ACDEFGHIKLMNPQRSTVWY and -.BOUXZ; "
        'invalid="skip" leaves the record out, "mask" puts X instead'
    )
    assert [(record.index, record.id) for record in records] == [(0, "a"), (2, "c")]
    reason = f"{shown} at residue 6 is not a residue; allowed are ACDEFGHIKLMNPQRSTVWY and -.BOUXZ"
    assert rejects == [Reject(index=1, id="b", reason=reason)]
    assert [(record.sequence, record.flags) for record in masked] == [
        ("MKV", ()),
        ("MKVLLXXMX", ("masked",)),
        ("MK", ()),
    ]
    assert masked_rejects == []


@pytest.mark.parametrize("mark", ["", "\ufeff", "*", "\0"], ids=["bare", "byte-order mark", "stop", "NUL"])
def test_header_whose_line_end_was_lost_is_never_masked_away(tmp_path: Path, mark: str) -> None:
    path = write(tmp_path, f">a\nMKV\nLL{mark}>b second\nLLA\n>c\nMK\n")
    shown = mark or ">"
    reason = (
        f"{shown!r} at residue 6 is not a residue; allowed are ACDEFGHIKLMNPQRSTVWY and -.BOUXZ; "
        "a '>' inside a line: is a line end missing before it?"
    )
    for invalid in ("skip", "mask"):
        records, rejects = read_all(path, invalid=invalid)
        assert [(record.index, record.id) for record in records] == [(1, "c")]
        assert rejects == [Reject(index=0, id="a", reason=reason)]
    error = failure(path)
    assert place(error) == (1, 1, "a")
    assert error.problem == f'on line 3, {reason}; invalid="skip" leaves the record out'


@pytest.mark.parametrize(("lines", "line", "residue"), [("J\nMK", 2, 1), ("MJ\nMK", 2, 2), ("MK\nJM", 3, 3)])
def test_bad_letter_at_the_edges_of_a_line(tmp_path: Path, lines: str, line: int, residue: int) -> None:
    error = failure(write(tmp_path, f">a\n{lines}\n"))
    assert error.problem.startswith(f"on line {line}, 'J' at residue {residue} ")


def test_bytes_that_are_not_utf8_in_a_sequence(tmp_path: Path) -> None:
    path = write(tmp_path, b">a\nMK\xe9V\xffL\n")
    assert place(failure(path)) == (1, 1, "a")
    assert "on line 2, byte 0xE9 at residue 3 " in str(failure(path))
    assert [record.sequence for record in read(path, invalid="mask")] == ["MKXVXL"]


def test_bad_letter_in_the_last_record_of_a_compressed_file(tmp_path: Path) -> None:
    lines = [line for index in range(30_000) for line in (f">r{index} x", "MKVLLA")]
    lines[-1] = "MKVLJA"
    path = write(tmp_path, gzip.compress("\r\n".join(lines).encode()), "x.fasta.gz")
    error = failure(path)
    assert place(error) == (59_999, 30_000, "r29999")
    assert error.problem.startswith("on line 60000, 'J' at residue 5 ")


@pytest.mark.parametrize("sequence", ["", "\n", " \n\t\n", "*\n", "* *\n*\n", "#MK\n"])
@pytest.mark.parametrize("at_end", [False, True])
def test_empty_sequence(tmp_path: Path, sequence: str, at_end: bool) -> None:
    path = write(tmp_path, f">a\nMK\n>b x\n{sequence}" + ("" if at_end else ">c\nMK\n"))
    error = failure(path)
    assert place(error) == (3, 2, "b")
    assert error.problem == 'the sequence is empty; invalid="skip" leaves the record out'
    for invalid in ("skip", "mask"):
        records, rejects = read_all(path, invalid=invalid)
        assert [record.index for record in records] == ([0] if at_end else [0, 2])
        assert rejects == [Reject(index=1, id="b", reason="the sequence is empty")]


@pytest.mark.parametrize(
    ("header", "record_id", "reason"),
    [
        (b"", "", "the header has no id after its '>'"),
        (b" \t ", "", "the header has no id after its '>'"),
        (b"a\0b c", "a\\x00b", "the header holds a NUL byte: this is no plain text"),
        (b"prot\xe9ine c", "prot\\xe9ine", "the header is not UTF-8 text"),
        ("protéine ".encode() + b"\xe9", "prot\\xc3\\xa9ine", "the header is not UTF-8 text"),
    ],
    ids=["none", "blanks", "NUL", "latin-1 id", "latin-1 word"],
)
def test_header_at_fault(tmp_path: Path, header: bytes, record_id: str, reason: str) -> None:
    path = write(tmp_path, b">a\nMK\n\n>" + header + b"\nMKV\n>c\nMK\n")
    error = failure(path)
    assert place(error) == (4, 2, record_id)
    assert error.problem == f'{reason}; invalid="skip" leaves the record out'
    for invalid in ("skip", "mask"):
        records, rejects = read_all(path, invalid=invalid)
        assert [record.index for record in records] == [0, 2]
        assert rejects == [Reject(index=1, id=record_id, reason=reason)]


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    error = failure(write(tmp_path, ">a\x1b[2Jb\nMJ\n"))
    assert error.record_id == "a\\x1b[2Jb"


@pytest.mark.parametrize("call", [read_fasta, clean_sequence])
def test_unknown_policy_raises_at_the_call(call: Any) -> None:
    with pytest.raises(ValueError, match=r"^invalid is 'drop'; allowed are 'error', 'skip', 'mask'$"):
        call("missing", invalid="drop")


def test_errors_of_the_callback_pass_through(tmp_path: Path) -> None:
    def refuse(reject: Reject) -> None:
        message = f"disk full at {reject.index}"
        raise OSError(message)

    with pytest.raises(OSError, match=r"^disk full at 0$"):
        read(write(tmp_path, ">a\nMJ\n"), invalid="skip", on_reject=refuse)


# Files at fault


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n\n", b"\xef\xbb\xbf", b"\n" * 200_000])
@pytest.mark.parametrize("name", ["x.fasta", "x.fasta.gz"])
@pytest.mark.parametrize("invalid", POLICIES)
def test_no_records(tmp_path: Path, data: bytes, name: str, invalid: str) -> None:
    path = write(tmp_path, gzip.compress(data) if name.endswith(".gz") and data else data, name)
    assert str(failure(path, invalid=invalid)) == f"{path}: holds no records"


def test_only_comments(tmp_path: Path) -> None:
    path = write(tmp_path, "# a\n #b\n")
    assert str(failure(path)) == f"{path}: holds no records, only lines that start with '#'"


@pytest.mark.parametrize(
    ("data", "line", "problem"),
    [
        (b"\n# c\nMKV\n>a\nMK\n", 3, "expected '>', got 'MKV': there is text before the first header"),
        (b"MKV", 1, "expected '>', got 'MKV': there is text before the first header"),
        ("\r\né\tβ>\r\n".encode(), 2, "expected '>', got '\\xe9\\t\\u03b2>': there is text before the first header"),
        (b"id,sequence\ra,MK\r", 1, "expected '>', got 'id,sequence': there is text before the first header"),
        (b"M" * 100, 1, f"expected '>', got '{'M' * 40}...': there is text before the first header"),
        (b"\n\n@r1 x\nACGT\n+\nIIII\n", 3, "expected '>', got '@r1 x': this looks like FASTQ"),
        (TWO.decode().encode("utf-16"), 1, "is UTF-16 text: save it as UTF-8"),
        (b"\xfe\xff" + TWO.decode().encode("utf-16-be"), 1, "is UTF-16 text: save it as UTF-8"),
        (BINARIES["png"], 1, "expected '>', got b'\\x89PNG': this looks like binary data"),
    ],
)
@pytest.mark.parametrize("invalid", POLICIES)
def test_text_before_the_first_header(tmp_path: Path, data: bytes, line: int, problem: str, invalid: str) -> None:
    for path in (write(tmp_path, data), write(tmp_path, gzip.compress(data), "x.fasta.gz")):
        error = failure(path, invalid=invalid)
        assert place(error) == (line, None, None)
        assert error.problem == problem
        with pytest.raises(InputError, match=re.escape(str(error))):
            locate_records(path, [0])


@pytest.mark.parametrize("kind", BINARIES)
@pytest.mark.parametrize("invalid", POLICIES)
def test_binary_files(tmp_path: Path, kind: str, invalid: str) -> None:
    data = BINARIES[kind]
    for path in (write(tmp_path, data), write(tmp_path, gzip.compress(data), "y.fasta.gz")):
        error = failure(path, invalid=invalid)
        assert error.line == 1
        assert "expected '>', got b'" in str(error)
        assert str(error).endswith("this looks like binary data")
    if not kind.startswith("twice"):
        path = write(tmp_path, data, "x.fasta.gz")
        assert str(failure(path, invalid=invalid)) == f"{path}: is named .gz but holds no gzip data"


def test_binary_after_a_first_header(tmp_path: Path) -> None:
    path = write(tmp_path, b">a\nMK\n>b\n" + random.Random(2).randbytes(200_000))
    assert failure(path).record == 2


def test_utf16_without_a_mark(tmp_path: Path) -> None:
    error = failure(write(tmp_path, TWO.decode().encode("utf-16-le")))
    assert (error.line, error.record) == (1, 1)
    assert "NUL byte" in str(error)


def test_plain_text_named_gz(tmp_path: Path) -> None:
    path = write(tmp_path, TWO, "x.fasta.gz")
    assert str(failure(path)) == f"{path}: is named .gz but holds no gzip data"
    with pytest.raises(InputError, match=r"is named .gz but holds no gzip data"):
        locate_records(path, [0])


def library(count: int) -> bytes:
    randomness = random.Random(3)
    return "".join(f">r{n}\n{''.join(randomness.choices('ACDEFGHIKL', k=100))}\n" for n in range(count)).encode()


@pytest.mark.parametrize("keep", [3, 12, 500, -9, -1])
def test_truncated_gz(tmp_path: Path, keep: int) -> None:
    error = failure(write(tmp_path, gzip.compress(library(50))[:keep], "x.fasta.gz"))
    assert error.line is not None
    assert "the compressed data end too early" in str(error)


def test_truncated_gz_names_where_reading_stopped(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(library(20_000))[:-1000], "x.fasta.gz")
    seen = 0
    with pytest.raises(InputError, match="the compressed data end too early, here or after") as caught:
        for seen, _ in enumerate(read_fasta(path), 1):  # noqa: B007
            pass
    error = caught.value
    # The record that was being read is named, and it is the one after the last that came out.
    assert (error.record, error.record_id) == (seen + 1, f"r{seen}")
    assert error.line in {2 * seen + 1, 2 * seen + 2, 2 * seen + 3}
    assert seen > 10_000


def test_damaged_gz(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(library(50)))
    data[-6] ^= 0xFF
    assert "cannot be read on: CRC check failed" in str(failure(write(tmp_path, bytes(data), "crc.gz")))
    data = bytearray(gzip.compress(library(50)))
    data[200:260] = bytes(60)
    assert failure(write(tmp_path, bytes(data), "hole.gz")).line is not None
    error = failure(write(tmp_path, gzip.compress(TWO) + b"stray bytes, more than a header's worth", "stray.gz"))
    assert "cannot be read on: Not a gzipped file" in str(error)


def test_damaged_bz2_and_xz(tmp_path: Path) -> None:
    assert "cannot be read on" in str(failure(write(tmp_path, b"BZh9" + bytes(100), "x.bz2")))
    assert "cannot be read on" in str(failure(write(tmp_path, b"\xfd7zXZ\x00" + bytes(100), "x.xz")))
    assert "cut short" in str(failure(write(tmp_path, bz2.compress(TWO)[:-4], "y.bz2")))


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.fasta"
    assert str(failure(missing)) == f"{missing}: cannot be opened: No such file or directory"
    assert str(failure(tmp_path)) == f"{tmp_path}: cannot be opened: Is a directory"
    under_a_file = write(tmp_path, TWO) / "y.fasta"
    assert str(failure(under_a_file)) == f"{under_a_file}: cannot be opened: Not a directory"
    with pytest.raises(InputError, match="cannot be opened: No such file"):
        locate_records(missing, [0])

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    path = tmp_path / "x.fasta"
    assert str(failure(path)) == f"{path}: cannot be opened: Permission denied"


def test_format_whose_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        message = "zstd module not available"
        raise ImportError(message)

    monkeypatch.setattr(fasta, "xopen", refuse)
    path = write(tmp_path, TWO, "x.zst")
    assert str(failure(path)) == f"{path}: cannot be opened: zstd module not available"


def test_disk_that_fails_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 30:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(fasta, "xopen", lambda *args, **options: Failing(TWO * 10))
    with chunks_of(10):
        error = failure(write(tmp_path, TWO))
    assert "cannot be read on: [Errno 5] Input/output error" in str(error)
    assert place(error) == (5, 2, "b")


@pytest.mark.parametrize(
    "data",
    [b">a\n" + b"M" * 9_000, b">a\n" + b"MK\n" * 3_000, b">" + b"a" * 9_000, bytes(9_000), b"M>" * 4_500],
    ids=["one line", "short lines", "header", "zeros", "no header"],
)
@pytest.mark.parametrize("chunk_bytes", [7, 1000])
def test_endless_record_or_line_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, chunk_bytes: int
) -> None:
    monkeypatch.setattr(fasta, "MAX_RECORD_BYTES", 8_000)
    path = write(tmp_path, data)
    with chunks_of(chunk_bytes):
        error = failure(path, invalid="skip")
    assert "more than 8,000 bytes without a new record" in str(error)
    assert error.line is not None


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("chunk_bytes", [*range(1, 20), 100])
def test_many_records_are_not_taken_for_an_endless_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_end: bytes, chunk_bytes: int
) -> None:
    monkeypatch.setattr(fasta, "MAX_RECORD_BYTES", 120)
    path = write(tmp_path, line_end.join([b">a > b", b"MKV", b"", b" \t>c", b"MK"] * 40))
    with chunks_of(chunk_bytes):
        assert len(read(path)) == 80


# Pipes


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int]]:
    """Yield a pipe's reading end, which may be opened once only, as a second time could wait for ever."""
    if not Path("/dev/fd").exists():
        pytest.skip("no /dev/fd here")
    reading, writing = os.pipe()
    opened: list[Path] = []
    open_path = Path.open

    def open_once(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(self)
        return open_path(self, *args, **options)

    monkeypatch.setattr(Path, "open", open_once)
    yield Path(f"/dev/fd/{reading}"), writing
    os.close(reading)
    assert len(opened) == 1


def fill(writing: int, data: bytes) -> None:
    os.write(writing, data)
    os.close(writing)


@pytest.mark.parametrize("data", [TWO, gzip.compress(TWO)], ids=["plain", "gz"])
def test_pipe(pipe: tuple[Path, int], data: bytes) -> None:
    fill(pipe[1], data)
    assert read_pairs(pipe[0]) == [("a first one", "MKV"), ("b second", "LLA")]
    assert locate_records(pipe[0], [0, 1]) == {}


def test_pipe_with_a_bad_letter_has_no_line(pipe: tuple[Path, int]) -> None:
    fill(pipe[1], b">a\nMK\n>b\nMJ\n")
    error = failure(pipe[0])
    assert place(error) == (None, 2, "b")
    assert error.problem.startswith("'J' at residue 2 ")


def test_pipe_that_is_not_fasta(pipe: tuple[Path, int]) -> None:
    fill(pipe[1], b"\nhello\n")
    assert "line 2: Expected '>' at beginning of record, but got 'hello'" in str(failure(pipe[0]))


def test_pipe_that_breaks(pipe: tuple[Path, int]) -> None:
    fill(pipe[1], gzip.compress(TWO)[:-3])
    assert "the compressed data end too early" in str(failure(pipe[0]))


# Plain strings


@pytest.mark.parametrize(
    ("sequence", "cleaned"),
    [
        ("MKV", "MKV"),
        ("mkv", "MKV"),
        (" M\tk\r\nV \n", "MKV"),
        ("MKV**", "MKV"),
        ("MKV* \n*", "MKV"),
        ("-.bzxuo", "-.BZXUO"),
    ],
)
@pytest.mark.parametrize("invalid", POLICIES)
def test_clean_sequence(sequence: str, cleaned: str, invalid: Any) -> None:
    assert clean_sequence(sequence, invalid) == cleaned


@pytest.mark.parametrize(("letter", "shown"), BAD_LETTERS, ids=[ascii(letter) for letter, _ in BAD_LETTERS])
@pytest.mark.parametrize("invalid", ["error", "skip"])
def test_clean_sequence_with_a_bad_letter(letter: str, shown: str, invalid: Any) -> None:
    with pytest.raises(InputError) as caught:
        clean_sequence(f"m k{letter}V", invalid)
    assert str(caught.value).startswith(f"{shown} at residue 3 is not a residue; allowed are ")
    assert caught.value.file is None
    assert clean_sequence(f"m k{letter}V", "mask") == "MKXV"


@pytest.mark.parametrize("sequence", ["", " ", "*", " *\n"])
@pytest.mark.parametrize("invalid", POLICIES)
def test_clean_sequence_when_empty(sequence: str, invalid: Any) -> None:
    with pytest.raises(InputError, match=r"^the sequence is empty$"):
        clean_sequence(sequence, invalid)


@given(st.text())
def test_clean_sequence_gives_residues_or_an_input_error(sequence: str) -> None:
    try:
        masked = clean_sequence(sequence, "mask")
    except InputError:
        assert not sequence.strip(" \t\n\r\v\f*")
        return
    assert masked
    assert not set(masked) - set(RESIDUES)
    assert clean_sequence(masked) == masked
    try:
        assert clean_sequence(sequence) == masked
    except InputError as error:
        found = re.search(r" at residue (\d+) ", str(error))
        assert found is not None
        assert masked[int(found[1]) - 1] == "X"


# Lines


def test_locate_records(tmp_path: Path) -> None:
    path = write(tmp_path, b"\n#c\n>a\nMK\nMK\n\n  >b\n#>c\n>\n>d\r>e\r\n>f")
    assert locate_records(path, range(10)) == {0: 3, 1: 7, 2: 9, 3: 10, 4: 11, 5: 12}
    assert locate_records(path, [4, 1, 1]) == {1: 7, 4: 11}
    assert locate_records(path, iter([99, -1])) == {}
    assert locate_records(tmp_path / "missing", []) == {}


def test_locate_records_stops_at_the_last_one(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(library(20_000))[:-1000], "x.fasta.gz")
    assert locate_records(path, [0, 5000]) == {0: 1, 5000: 10_001}
    with pytest.raises(InputError, match="the compressed data end too early"):
        locate_records(path, [19_999])


# Hostile texts


PIECES = [
    *(b">", b">id", b"> x", b" >b c", b">b>", b">\xc3\xa9 \xce\xb2", b">\xe9", b">a\0", b">\\x41\\", b">a#b", b">\x1c"),
    *(b"MKV", b"mk v", b"LL*", b"M*K", b"*", b"MJ", b"12", b"M>K", b"\xc3\xa9", b"M\xe9", b"M\\K", b"\0", b"\xc2\xa0"),
    *(
        b"#",
        b"#c",
        b" # c",
        b"\t#",
        b"##>",
        b"M#",
        b"",
        b" ",
        b"\t",
        b"\x0b\x0c",
        b"\x1c",
        b"\x1d>id",
        b"\x1f#",
        b"\x85>id",
    ),
    *(b"\xef\xbb\xbf", b"\xef\xbb\xbf>bom", b"\xff\xfe", b"@r", b"+", b"X-.BZUO"),
]
ENDS = [b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"\r\r\n", b""]
LINES = st.tuples(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)), st.sampled_from(ENDS))


@st.composite
def hostile_texts(draw: st.DrawFn) -> bytes:
    """Lines of headers, residues, comments, blanks and rubbish, most often with a header first."""
    start = draw(st.sampled_from([b">first\n", b"\xef\xbb\xbf>first\r\n", b"#\n\n>first\r", b""]))
    return start + b"".join(piece + end for piece, end in draw(st.lists(LINES, max_size=25)))


def split_lines(data: bytes) -> list[str]:
    """The oracle's lines, trimmed: every byte a character."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    return [line.strip(BLANKS) for line in re.split("\r\n|\r|\n", text)]


def is_fasta(data: bytes, lines: list[str]) -> bool:
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return first.startswith(">") and not data.startswith((b"\xff\xfe", b"\xfe\xff"))


@settings(max_examples=400, deadline=None)
@given(data=hostile_texts(), chunk_bytes=st.sampled_from([1, 2, 3, 7, 1 << 16]), compress=st.booleans())
@example(data=b">a\nMK\n\x1c>b\nMK", chunk_bytes=1, compress=False)
def test_hostile_texts(tmp_path_factory: pytest.TempPathFactory, data: bytes, chunk_bytes: int, compress: bool) -> None:
    path = write(tmp_path_factory.getbasetemp(), gzip.compress(data, 1) if compress else data, "hostile.fasta")
    lines = split_lines(data)
    headers = [number for number, line in enumerate(lines, 1) if line.startswith(">")]
    with chunks_of(chunk_bytes):
        if not is_fasta(data, lines):
            for invalid in POLICIES:
                failure(path, invalid=invalid)
            return
        kept, rejects = read_all(path, invalid="skip")
        masked, mask_rejects = read_all(path, invalid="mask")
        assert locate_records(path, range(len(headers) + 2)) == dict(enumerate(headers))
        if rejects:
            error = failure(path)
            assert (error.line, error.record) == (headers[rejects[0].index], rejects[0].index + 1)
        else:
            assert read(path) == kept
    assert len(kept) + len(rejects) == len(headers)
    assert sorted([item.index for item in kept] + [item.index for item in rejects]) == list(range(len(headers)))
    assert [record for record in masked if not record.flags] == kept
    assert sorted([item.index for item in masked] + [item.index for item in mask_rejects]) == list(range(len(headers)))
    for record in masked:
        assert record.sequence
        assert not set(record.sequence) - set(RESIDUES)
        assert record.id == record.header.split()[0]
        assert record.header.encode().decode("latin-1").strip(BLANKS) == lines[headers[record.index] - 1][1:].strip(
            BLANKS
        )


@settings(max_examples=200, deadline=None)
@given(data=hostile_texts())
def test_ascii_texts_read_as_bare_dnaio_reads_them(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    data = bytes(byte for byte in data if byte < 0x80)
    path = write(tmp_path_factory.getbasetemp(), data, "ascii.fasta")
    try:
        expected = [(entry.name, entry.sequence) for entry in dnaio.FastaReader(io.BytesIO(data))]
    except dnaio.FastaFormatError:
        failure(path, invalid="skip")
        return
    if not expected:
        failure(path, invalid="skip")
        return
    kept, rejects = read_all(path, invalid="skip")
    assert len(kept) + len(rejects) == len(expected)
    for record in kept:
        name, sequence = expected[record.index]
        assert (record.header, record.sequence) == (name, clean_sequence(sequence))
