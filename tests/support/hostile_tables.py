"""Hostile tables of proteins, .csv and .tsv, and what becomes of each, told by an oracle of its own.

The oracle splits cells letter by letter. Every row that is not blank is kept, or rejected with a reason; a file whose
text or quotes are broken anywhere is refused whole.
"""

from __future__ import annotations

import gzip
import random
import re

from support.hostile_fasta import Expected, clean, damage, gunzip

_NOTHING = ("nan", "NaN", "None", "null", "<NA>", "N/A")
_IDS = ["id", "name", "accession", "entry"]
_SEQUENCES = ["sequence", "seq", "protein_sequence"]


def expect_rows(data: bytes, name: str) -> list[Expected] | None:
    """The rows of a table of this name and content, in order; None if it must be refused whole."""
    if name.endswith(".gz"):
        unpacked = gunzip(data) if data.startswith(b"\x1f\x8b") or not data else None
        if unpacked is None:
            return None
        data = unpacked
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    attempts = [_split(text, delimiter) for delimiter in ("\t" if ".tsv" in name else ",;\t")]
    table = next((rows for rows in attempts if len(rows) and len(rows[0] or "") > 1), attempts[0])
    if not table or None in table:
        return None
    header, *rows = (row or [] for row in table)
    if not rows or not all(cell.strip() for cell in header) or len(set(header)) < len(header):
        return None
    id_place, sequence_place = _find(header, _IDS), _find(header, _SEQUENCES)
    if sequence_place is None:
        return None
    return [_judge(number, row, len(header), id_place, sequence_place) for number, row in enumerate(rows, 1)]


def _split(text: str, delimiter: str) -> list[list[str] | None]:
    """The rows that are not blank; the last is None where a quote is astray or open."""
    rows: list[list[str] | None] = []
    cells: list[str] = []
    cell, state = "", "start"
    for letter in [*re.findall("\r\n|.", text, re.DOTALL), ""]:
        is_end = letter in ("\n", "\r", "\r\n", "")
        if state == "quoted":
            if letter == "":
                return [*rows, None]
            if letter == '"':
                state = "closed"
            else:
                cell += letter
        elif state == "start" and letter == '"':
            state = "quoted"
        elif state == "closed" and letter == '"':
            cell, state = cell + '"', "quoted"
        elif is_end or letter == delimiter:
            if not is_end or cells or cell or state != "start":
                cells, cell = [*cells, cell], ""
            state = "start"
            if is_end and cells:
                rows, cells = [*rows, cells], []
        elif state == "closed":
            return [*rows, None]
        else:
            cell, state = cell + letter, "plain"
    return rows


def _find(header: list[str], names: list[str]) -> int | None:
    for name in names:
        alike = [place for place, cell in enumerate(header) if cell.strip().casefold() == name]
        if alike:
            return header.index(name) if name in header else alike[0]
    return None


def _judge(number: int, row: list[str], width: int, id_place: int | None, sequence_place: int) -> Expected:
    nothing = Expected(id=None, header=None, clean=None, masked=None)
    if len(row) != width:
        return nothing
    name = str(number) if id_place is None else row[id_place].strip()
    if not name or any(letter < " " or letter == "\x7f" for letter in name):
        return nothing
    if row[sequence_place].strip() in _NOTHING:
        return nothing
    residues, masked = clean(row[sequence_place])
    # As in FASTA: a record that begins inside another one is not hidden behind an X.
    return Expected(id=name, header=name, clean=residues, masked=None if ">" in row[sequence_place] else masked)


_COLUMNS = [
    "id",
    "sequence",
    "note",
    "Entry",
    "SEQ",
    " Sequence ",
    "name",
    "Id",
    "protein_sequence",
    "x,y",
    "",
    "id;sequence",
]
_CELLS = [
    *(
        "",
        " ",
        '"',
        '""',
        "'",
        "a,b",
        "a;b",
        "a\tb",
        "line\nend",
        "line\r\nend",
        "cr\rcr",
        'say "x"',
        "nan",
        "NaN",
        "None",
    ),
    *(
        "null",
        "<NA>",
        "N/A",
        "NA",
        "=1+1",
        "\ufeff",
        "\xa0",
        "\xe9",
        "\U0001f9ec",
        "\u2028",
        "\x85",
        "\x1b[2J",
        "\x01",
        "\x7f",
    ),
    *(
        "\0",
        "#",
        "#c",
        "M1K",
        "*",
        "MK*",
        "M*K",
        "mk v",
        "MJ",
        "M>K",
        ">a",
        "MK\nV",
        "1",
        "1.5",
        "-",
        "true",
        "X" * 300,
        "\\n",
    ),
]


def hostile_table(seed: int) -> tuple[str, bytes]:
    """The name and the bytes of a table of 0 to 8 rows."""
    rng = random.Random(f"table {seed}")
    evil = rng.choice([0.0, 0.05, 0.1, 0.3])
    columns = rng.choice([["id", "sequence"], ["sequence"], ["Entry", "note", "Sequence"], ["name", "id", "seq"]])
    if rng.random() < evil / 2:
        columns = rng.choices(_COLUMNS, k=rng.randint(1, 4))
    delimiter = rng.choice([",", ",", ",", ";", "\t"])
    end = rng.choice(["\n", "\n", "\r\n", "\r"])
    quoting = rng.choice([*["needed"] * 4, "always", "always", "never", "wrong"])
    rows = [columns]
    for number in range(rng.choice([0, 1, 2, 3, 4, 5, 8, 8])):
        cells = []
        for column in columns:
            good = (
                "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.choice([1, 20, 70])))
                if "eq" in column.lower()
                else ""
            )
            cells.append(rng.choice(_CELLS) if rng.random() < evil else good or f"p{number % 5}")
        if rng.random() < evil / 2:
            cells = [*cells, "more"] if rng.random() < 0.5 else cells[:-1]
        rows.append(cells)
        if rng.random() < evil:
            rows.append(rng.choice([[], [" "], ["", ""], ["# comment"]]))
    lines = [delimiter.join(_quote(rng, cell, delimiter, quoting) for cell in cells) for cells in rows]
    data = end.join(lines).encode() + (end.encode() if rng.random() < 0.7 else b"")
    if rng.random() < 0.15:
        data = damage(rng, data)
    if rng.random() < 0.08:
        data = b"\xef\xbb\xbf" + data
    if rng.random() < 0.03:
        data = data.decode("latin-1").encode(rng.choice(["utf-16", "utf-16-le", "latin-1"]))
    name = rng.choice([*["x.csv"] * 19, "x.tsv"]) if delimiter != "\t" else rng.choice(["x.csv", "x.tsv"])
    if rng.random() < 0.15:
        name += ".gz"
        data = gzip.compress(data, 1, mtime=0)
        if rng.random() < 0.3:
            data = damage(rng, data)
    return name, data


def _quote(rng: random.Random, cell: str, delimiter: str, quoting: str) -> str:
    if quoting == "wrong" and rng.random() < 0.1:
        return rng.choice([f'"{cell}', f'{cell}"', f'"{cell}"x', f' "{cell}"'])
    if quoting == "always" or (quoting in ("needed", "wrong") and any(each in cell for each in f'{delimiter}"\n\r')):
        return '"' + cell.replace('"', '""') + '"'
    return cell
