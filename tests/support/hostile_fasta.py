"""Hostile FASTA files, and what becomes of each, told by an oracle that shares nothing with `engine/fasta.py`.

`hostile_file(seed)` mixes records, rubbish, line ends, marks, encodings and compression, then damages some.
`expect(data, name)` reads bytes as the contract says and no library does:

* LF, CRLF and CR end lines, in any mixture; blanks around a line do not count; a mark of UTF-8 at the start is dropped.
* Lines without anything, and those that start with `#`, are nothing. A line that starts with `>` begins a record; every
  other line belongs to the record before it, and a file with such a line before its first record is refused.
* So a file holds as many records as it has lines that start with `>`: each is kept, or rejected with a reason.
* A `>` inside a sequence most likely is a header whose line end was lost: its record may be rejected, never masked.
* A compressed file is read whole or refused.
"""

from __future__ import annotations

import gzip
import random
import zlib
from dataclasses import dataclass

_RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWYBZXUO.-")
_BLANKS = b" \t\v\f\x1c\x1d\x1e\x1f"
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One record as it must come out.

    Attributes:
        id: the header's first word; None where there is none.
        header: its text without the `>`; None where it is no text.
        clean: residues, if they need no mask.
        masked: residues with X for each character that is none; None where the record is rejected even so.
    """

    id: str | None
    header: str | None
    clean: str | None
    masked: str | None


def expect(data: bytes, name: str) -> list[Expected] | None:
    """The records of a file of this name and content, in order; None if it must be refused whole."""
    compressed = data.startswith(b"\x1f\x8b")
    if name.endswith(".gz") and data and not compressed:
        return None
    if compressed:
        unpacked = gunzip(data)
        if unpacked is None:
            return None
        data = unpacked
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return None
    records: list[tuple[bytes, list[bytes]]] = []
    for line in data.removeprefix(_MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        text = line.strip(_BLANKS)
        if text.startswith(b">"):
            records.append((text[1:], []))
        elif text and not text.startswith(b"#"):
            if not records:
                return None
            records[-1][1].append(text)
    return [_judge(header, b"".join(lines)) for header, lines in records] or None


def gunzip(data: bytes) -> bytes | None:
    """All members of a gzip file, zeros after the last one allowed; None if a bit of it is wrong."""
    parts = []
    while data.strip(b"\0"):
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(data))
        except zlib.error:
            return None
        if not member.eof:
            return None
        data = member.unused_data
    return b"".join(parts)


def _judge(header: bytes, sequence: bytes) -> Expected:
    try:
        name = header.decode("utf-8")
    except UnicodeDecodeError:
        return Expected(id=None, header=None, clean=None, masked=None)
    if "\0" in name or not name.split():
        return Expected(id=None, header=None, clean=None, masked=None)
    residues, masked = clean(sequence.decode("utf-8", "surrogateescape"))
    return Expected(id=name.split()[0], header=name, clean=residues, masked=None if b">" in sequence else masked)


def clean(sequence: str) -> tuple[str | None, str | None]:
    """Residues, and residues with X where something else stands; None for what there is not."""
    text = "".join(
        chr(ord(letter) - 32) if "a" <= letter <= "z" else letter for letter in sequence if letter not in " \t\r\n\v\f"
    )
    text = text.rstrip("*")
    masked = "".join(letter if letter in _RESIDUES else "X" for letter in text)
    return text if text and _RESIDUES.issuperset(text) else None, masked or None


_LETTERS = "ACDEFGHIKLMNPQRSTVWY"
_STRANGE = [
    *(
        b"*",
        b"**",
        b" *",
        b"-",
        b".",
        b"X",
        b"J",
        b"1",
        b"0 10 20",
        b"?",
        b"\\",
        b"\\x41",
        b"\\n",
        b"/",
        b",",
        b'"',
        b"'",
    ),
    *("\xe9".encode(), "\xdf".encode(), "\u017f".encode(), "\uff21".encode(), "\U0001f9ec".encode()),
    *("\xa0".encode(), "\u2028".encode(), "\u200b".encode(), "\ufeff".encode(), b"\xe9", b"\xff", b"\xc3", b"\x85"),
    *(b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\0", b"\x01", b"\x07", b"\x08", b"\x1a", b"\x1b[31m", b"\x7f"),
    *(b"\x1c", b"\x1f", b"\v", b"\f", b"\t", b" ", b"\r", b">", b">>", b">id", b"#", b"# no comment", b";", b"@", b"+"),
    *(b"=1+1", b"%s%d", b"{0}", b"<", b"NaN"),
]
_HEADERS = [
    *(
        b"",
        b" ",
        b"\t",
        b">",
        b">>",
        b" id",
        b"\tid x",
        b">id",
        b"#id",
        b";id",
        b"*",
        b"id\0",
        b"\0",
        b"\xe9",
        b"id \xff",
    ),
    *(b"sp|P1/2|A_B", b"../../etc/passwd", b"/", b".", b"..", b"a,b,c", b'"a"', b"'a'", b'a"b, "c', b"=1+1", b"-id"),
    *("\xa0".encode(), "\u2028x".encode(), "\x85".encode(), "\xe9 \u03b2".encode(), "\U0001f9ec".encode()),
    *("\ufeffid".encode(), b"\x1b[2J", b"\x1c", b"\x1did", b"a\x01b", b"nan", b"NULL", b"a\\b", b"\\x41", b"%s", b"{}"),
    *(b"\xed\xa0\x80", b"CON", b"a" * 300, b"id\vx"),
]
_LINES = [
    *(b"", b" ", b"\t\v", b"\x1c", b"#", b"# comment", b" #x", b"#>c", b"##", b";", b"; comment", b";>x", b">", b">>"),
    *(b"> x", b" >blank first", b"\t>tab", b"\x1d>odd", b"\xef\xbb\xbf>mark", b"\xef\xbb\xbf", b"\xff\xfe", b"//"),
    *(
        b"*",
        b"* *",
        b"+",
        b"@fastq",
        b"\0",
        b"\0>x",
        b"\x85>x",
        "\xa0>x".encode(),
        b"<html>",
        b"LOCUS  x",
        b"id,sequence",
    ),
    *(b"MKV>b x", b"--", b"\x1a"),
]
_BEFORE = [
    b"\n",
    b"\n\n \n",
    b"# top",
    b"#\n#>x\n",
    b"; top",
    b"text",
    b"MKV",
    b"\0",
    b"\t",
    b"@q",
    b"\x1c",
    b"\xef\xbb\xbf",
]
_ENDS = [b"\n", b"\n", b"\n", b"\r\n", b"\r\n", b"\r", b"\n\n", b"\r\r\n", b"\n\r"]


def hostile_file(seed: int) -> tuple[str, bytes]:
    """The name and the bytes of a file: 0 to 8 records, most of them usable, and what is wrong with it."""
    rng = random.Random(seed)
    data = _text(rng)
    if rng.random() < 0.25:
        data = damage(rng, data)
    if rng.random() < 0.08:
        data = _MARK * rng.choice([1, 1, 1, 2]) + data
    if rng.random() < 0.03:
        data = data.decode("latin-1").encode(rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7"]))
    name = "x.fasta"
    if rng.random() < 0.25:
        name, data = _compress(rng, data)
    if rng.random() < 0.03:
        data = damage(rng, data)
    if rng.random() < 0.01:
        data = rng.choice([b"", b"\n", b" \r\n\t", b">", b"\x1f", b"\x1f\x8b", rng.randbytes(200)])
    return name, data


def _text(rng: random.Random) -> bytes:
    evil = rng.choice([0.0, 0.0, 0.05, 0.1, 0.3, 0.7])
    end = rng.choice(_ENDS[:6])
    mixed = rng.random() < 0.2
    lines = [rng.choice(_BEFORE)] if rng.random() < 0.4 * evil else []
    for number in range(rng.choice([0, 1, 1, 2, 3, 4, 5, 8])):
        lines.append(b">" + _header(rng, number, evil))
        lines += _sequence(rng, evil)
        if rng.random() < evil / 2:
            lines.append(rng.choice(_LINES))
    data = b"".join(line + (rng.choice(_ENDS) if mixed else end) for line in lines)
    return data.rstrip(b"\r\n") if rng.random() < 0.3 else data


def _header(rng: random.Random, number: int, evil: float) -> bytes:
    name = b"id%d" % (number if rng.random() < 0.8 else 0)
    if rng.random() < evil:
        name = rng.choice(_HEADERS)
    elif rng.random() < evil:
        name += rng.choice(_STRANGE)
    if rng.random() < 0.5:
        name += b" protein %d" % number
    return b"h" * 70_000 + name if rng.random() < 0.002 else name


def _sequence(rng: random.Random, evil: float) -> list[bytes]:
    residues = rng.choice([1, 5, 20, 40, 70]) if rng.random() > 0.01 else rng.choice([500, 3_000])
    text = "".join(rng.choices(_LETTERS, k=residues)).encode()
    if rng.random() < evil / 3:
        return []
    if rng.random() < evil / 2:
        text = text.lower() if rng.random() < 0.5 else text.title()
    while rng.random() < evil:
        place = rng.choice([0, rng.randint(0, len(text)), len(text), len(text)])
        text = text[:place] + rng.choice(_STRANGE) + text[place:]
    if rng.random() < 0.2:
        text += b"*"
    width = rng.choice([60, 60, 10, 1]) if residues < 100 and rng.random() < 0.5 else len(text) or 1
    lines = [text[begin : begin + width] for begin in range(0, len(text), width)]
    while rng.random() < evil / 2:
        lines.insert(rng.randint(0, len(lines)), rng.choice(_LINES))
    return lines


def _compress(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    cut = rng.randint(0, len(data))
    whole = gzip.compress(data, 1, mtime=0)
    kinds = {
        "whole": whole,
        "members": gzip.compress(data[:cut], 1, mtime=0) + gzip.compress(data[cut:], 9, mtime=0),
        "padded": whole + bytes(rng.choice([1, 7, 64, 600])),
        "cut": whole[: rng.randint(1, len(whole) - 1)],
        "stray": whole + rng.choice([b"\n", b"stray", data, b"\x1f", b"\x1f\x8b", b"\0\0x", rng.randbytes(30)]),
        "half a member": whole + whole[: rng.randint(1, len(whole) - 1)],
        "twice": gzip.compress(whole, 1, mtime=0),
        "plain": data,
    }
    kind = rng.choice(["whole"] * 5 + ["members", "members", "padded", *kinds])
    return rng.choice(["x.fasta.gz", "x.fasta.gz", "x.fasta.gz", "x.fasta", "x.fa"]), kinds[kind]


def damage(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, splices and repeats, one to four of them."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        begin, end = sorted(rng.randint(0, len(data)) for _ in range(2))
        place = rng.randint(0, len(data))
        what = rng.randrange(7)
        if what == 0 and data:
            flipped = bytearray(data)
            flipped[place % len(data)] ^= 1 << rng.randrange(8)
            data = bytes(flipped)
        elif what == 1:
            data = data[:place]
        elif what == 2:
            data = data[:begin] + data[end:]
        elif what == 3:
            data = data[:place] + data[begin : begin + 200] + data[place:]
        elif what == 4:
            data = data[:place] + rng.choice(_STRANGE + _LINES + _ENDS + [b"\n>spliced\n"]) + data[place:]
        elif what == 5:
            data = data + data[begin : begin + 300]
        else:
            data = data[:place] + rng.randbytes(rng.choice([1, 3])) + data[place:]
    return data
