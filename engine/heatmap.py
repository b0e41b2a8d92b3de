"""Heatmaps of a landscape: a picture for a paper, or a page to explore."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .atomic import write_atomically
from .errors import InputError
from .landscape import Landscape

_PICTURES = (".png", ".svg", ".pdf")
_PAGE = ".html"


def check_heatmap(path: Path) -> None:
    """What can be known before anything is computed.

    Raises:
        InputError: the file's ending is that of neither a picture nor a page, or it is that of a picture and matplotlib
            is not installed.
    """
    ending = path.suffix.lower()
    if ending not in (*_PICTURES, _PAGE):
        message = f"ends in {path.suffix!r}; heatmaps end in {', '.join((*_PICTURES, _PAGE))}"
        raise InputError(message, file=path)
    if ending in _PICTURES and importlib.util.find_spec("matplotlib") is None:
        message = "a heatmap as a picture needs matplotlib: pip install 'protnest[plot]'; .html needs nothing"
        raise InputError(message)


def draw_heatmap(path: Path, landscape: Landscape) -> None:
    """Writes one file: a picture (.png, .svg, .pdf), or one self-contained interactive page (.html).

    Raises:
        InputError: as `check_heatmap`.
        OSError: the file cannot be written; an older one of that name is left as it was.
    """
    check_heatmap(path)
    ending = path.suffix.lower()
    if ending == _PAGE:
        from .heatmap_page import render_page

        text = render_page(landscape)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return
    from .heatmap_figure import draw_figure, resolution

    figure = draw_figure(landscape)
    kind = ending.removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=resolution(figure)))
