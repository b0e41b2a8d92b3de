"""Pictures of landscapes: everything in its place, and files that are whole or not there."""

from __future__ import annotations

import importlib.util
import itertools
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protnest.engine import InputError
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.engine.heatmap import check_heatmap, draw_heatmap
from protnest.engine.heatmap_layout import GAP, ROWS, Block, choose_width, find_stretches, lay_out
from protnest.engine.landscape import Landscape

from support.landscapes import long_wild_type, make_landscape


def _known_only(length: int, *stretches: tuple[int, int], **changes: Any) -> Landscape:
    """Scores from `start` to `stop` alone, from 0."""
    landscape = make_landscape(long_wild_type(length))
    scores_LA = np.full_like(landscape.scores_LA, np.nan)
    for start, stop in stretches:
        scores_LA[start:stop] = landscape.scores_LA[start:stop]
    return make_landscape(landscape.wild_type, scores_LA=scores_LA, entropy_L=None, **changes)


def _cells(blocks: tuple[Block, ...]) -> list[tuple[Block, int, int]]:
    """Every column that holds a residue: its block, place there and site."""
    return [(block, place, int(site)) for block in blocks for place, site in enumerate(block.sites_C) if site != GAP]


@pytest.mark.parametrize("length", [1, 56, 286, 1273])
def test_every_cell_is_where_its_row_and_letter_say(length: int) -> None:
    landscape = make_landscape(long_wild_type(length))
    blocks = lay_out(landscape)
    cells = _cells(blocks)
    assert [site for *_, site in cells] == list(range(length))
    for block, place, site in cells:
        assert (place, landscape.wild_type[site]) in block.letters
        (own_row,) = [row for row, column in block.dots if column == place]
        assert ROWS[own_row] == landscape.wild_type[site]
        for row, acid in enumerate(ROWS):
            assert block.scores_AC[row, place] == landscape.scores_LA[site, AMINO_ACIDS.index(acid)]
    assert sum(len(block.dots) for block in blocks) == length
    assert not any(block.boxes for block in blocks)


def test_own_residues_are_drawn_at_zero_and_the_unknown_stays_unknown() -> None:
    landscape = make_landscape("MXA")
    scores_LA = np.where(landscape.own_LA, np.float32(np.nan), landscape.scores_LA)
    scores_LA[2, AMINO_ACIDS.index("W")] = np.nan
    (block,) = lay_out(make_landscape("MXA", scores_LA=scores_LA))
    assert block.dots == ((ROWS.index("A"), 2), (ROWS.index("M"), 0))
    assert block.scores_AC[ROWS.index("M"), 0] == block.scores_AC[ROWS.index("A"), 2] == 0
    assert np.argwhere(np.isnan(block.scores_AC)).tolist() == [[ROWS.index("W"), 2]]


def test_long_proteins_wrap() -> None:
    assert [len(block.sites_C) for block in lay_out(make_landscape(long_wild_type(286)))] == [100, 100, 86]
    assert [len(block.sites_C) for block in lay_out(make_landscape(long_wild_type(1273)))] == [160] * 7 + [153]
    for columns in (1, 99, 100, 101, 149, 201, 999, 5000, 34350):
        width = choose_width(columns)
        last = columns % width or width
        assert width % 10 == 0
        assert columns <= width or last > width / 2, f"{columns} columns end in a block of {last}"


def test_unknown_stretches_are_left_out_and_numbers_stay_true() -> None:
    landscape = _known_only(1273, (330, 340), (345, 400), (410, 531), first=11)
    assert find_stretches(landscape) == [(330, 400), (410, 531)]
    blocks = lay_out(landscape)
    assert [site for *_, site in _cells(blocks)] == [*range(330, 400), *range(410, 531)]
    assert blocks[0].sites_C[68:75].tolist() == [398, 399, GAP, GAP, GAP, 410, 411]
    assert not blocks[0].shown_C[70:73].any()
    assert np.isnan(blocks[0].scores_AC[:, 70:73]).all()
    for block in blocks:
        for place, number in block.ticks:
            assert number == block.sites_C[place] + 11
    # The first tenth residue, then all others; the ends of stretches where nothing else is near.
    assert [number for _, number in blocks[0].ticks][:3] == [341, 350, 360]
    # Both sides of what is left out have their numbers: 410 is a tenth, 421 the first after it.
    assert {410, 421} <= {number for _, number in blocks[0].ticks}
    # Short holes are drawn as unknown.
    assert np.isnan(blocks[0].scores_AC[:, 10:15]).sum() == 5 * 19


def test_ticks_do_not_touch() -> None:
    for length in (3, 56, 103, 286, 1273):
        for block in lay_out(make_landscape(long_wild_type(length), first=8)):
            places = [place for place, _ in block.ticks]
            assert places == sorted(places)
            assert all(right - left >= 4 for left, right in itertools.pairwise(places))
            tenths = [place for place, site in enumerate(block.sites_C) if (site + 8) % 10 == 0]
            assert set(tenths) <= set(places)
            assert places


def test_nothing_known_at_all_is_drawn_as_such() -> None:
    (block,) = lay_out(_known_only(30))
    assert len(block.sites_C) == 30
    assert np.isnan(block.scores_AC).sum() == 30 * 19


def test_rows_neither_begin_nor_end_with_a_gap() -> None:
    for stop in range(104, 114):  # blocks of 110 columns
        blocks = lay_out(_known_only(400, (0, stop), (200, 305)))
        for block in blocks:
            assert block.shown_C[0]
            assert block.shown_C[-1]
        assert len(_cells(blocks)) == stop + 105


def test_boxes_mark_what_the_table_named() -> None:
    given_LA = np.zeros((8, 20), dtype=bool)
    given_LA[3, AMINO_ACIDS.index("G")] = given_LA[7, AMINO_ACIDS.index("R")] = True
    given_LA[0, AMINO_ACIDS.index("M")] = True  # the wild type itself
    (block,) = lay_out(make_landscape(given_LA=given_LA))
    assert set(block.boxes) == {(ROWS.index("G"), 3), (ROWS.index("R"), 7)}
    # Where most is named, boxes say nothing.
    assert lay_out(make_landscape(given_LA=np.ones((8, 20), dtype=bool)))[0].boxes == ()


@pytest.mark.parametrize("name", ["map.gif", "map", "map.png.txt", "map.htm"])
def test_endings_that_are_refused(tmp_path: Path, name: str) -> None:
    ending = Path(name).suffix
    with pytest.raises(InputError, match=re.escape(f"ends in {ending!r}; heatmaps end in .png, .svg, .pdf, .html")):
        check_heatmap(tmp_path / name)
    with pytest.raises(InputError, match="heatmaps end in"):
        draw_heatmap(tmp_path / name, make_landscape())
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("needs matplotlib: pip install 'protnest[plot]'")):
        check_heatmap(tmp_path / "map.PNG")
    # A page needs none.
    draw_heatmap(tmp_path / "map.HTML", make_landscape())
    assert (tmp_path / "map.HTML").read_text(encoding="utf-8").startswith("<!doctype html>")


def _texts(path: Path) -> list[str]:
    """Texts of an SVG: matplotlib draws outlines, and leaves the text beside them as comments."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_svg_says_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.svg"
    draw_heatmap(path, _known_only(400, (330, 360), target="$x_1^{$ & <b>", method="wt-marginal"))
    texts = _texts(path)
    for text in ("score (higher: better tolerated)", "mean score", "wild type", "residue", "aromatic", "331", "350"):
        assert text in texts, text
    assert "wt-marginal, tiny" in texts
    assert "residues 1 to 400; nothing known of 1\N{EN DASH}330, 361\N{EN DASH}400" in texts
    # An id is no formula.
    assert any("$x_1^{$" in text for text in texts)
    for absent in ("entropy (nats)", "named in the table", "not known"):
        assert absent not in texts, absent
    draw_heatmap(path, make_landscape(given_LA=np.arange(160).reshape(8, 20) < 20, first=5))
    assert {"entropy (nats)", "named in the table", "5", "10"} <= set(_texts(path))


def test_long_ids_are_cut(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.svg"
    draw_heatmap(path, make_landscape(target="abcdefghij" * 30))
    (title,) = [text for text in _texts(path) if text.startswith("abcdefghij")]
    assert title.endswith("\N{HORIZONTAL ELLIPSIS}")
    assert len(title) < 100


@pytest.mark.parametrize("length", [1, 56, 286])
def test_png_has_room_for_every_block(tmp_path: Path, length: int) -> None:
    pytest.importorskip("matplotlib")
    landscape = make_landscape(long_wild_type(length))
    path = tmp_path / "map.png"
    draw_heatmap(path, landscape)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:24])
    from protnest.engine.heatmap_figure import draw_figure, resolution

    figure = draw_figure(landscape)
    inches = figure.get_size_inches() * resolution(figure)
    assert (width, height) == tuple(int(side) for side in inches)
    # Nothing lies beyond the paper's edges.
    for axes in figure.axes:
        box = axes.get_position()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= 1
        assert box.y1 <= 1


def test_very_long_proteins_keep_to_what_a_picture_may_hold() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    from protnest.engine.heatmap_figure import resolution

    assert resolution(figure_module.Figure(figsize=(12, 20))) == 200
    assert resolution(figure_module.Figure(figsize=(12, 600))) == 50


def test_pdf(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_heatmap(tmp_path / "map.pdf", make_landscape())
    assert (tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_heatmap(tmp_path / "map.png", _known_only(30))
    assert (tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["map.png", "map.html"])
def test_a_failing_write_leaves_nothing_behind(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.endswith(".png"):
        pytest.importorskip("matplotlib")
    (tmp_path / name).write_bytes(b"older")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        draw_heatmap(tmp_path / name, make_landscape())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"older"
