"""The interactive page: its data whole and inert, and everything on it at work in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.engine.heatmap import draw_heatmap
from protnest.engine.heatmap_page import encode_data, render_page
from protnest.engine.landscape import Landscape
from protnest.engine.palette import CHEMISTRY

from support.landscapes import long_wild_type, make_landscape

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "{model}{data}{style}",
    "\\g<0>\\1",
    "\u2028\u0000'\"`${1}",
)


def _embedded(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    content: dict[str, Any] = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return content


def _with_holes() -> Landscape:
    landscape = make_landscape("MKTAYIAKX")
    scores_LA = landscape.scores_LA.copy()
    scores_LA[2:4] = np.nan
    scores_LA[0, 0] = np.float32(1) / 3
    given_LA = np.zeros(scores_LA.shape, dtype=bool)
    given_LA[0, [0, 4]] = given_LA[3, 19] = True
    entropy_L = landscape.entropy_L
    assert entropy_L is not None
    entropy_L = np.where(np.arange(9) == 4, np.float32(np.nan), entropy_L)
    return make_landscape("MKTAYIAKX", scores_LA=scores_LA, given_LA=given_LA, entropy_L=entropy_L, first=24)


def test_data_round_trip() -> None:
    landscape = _with_holes()
    content = _embedded(render_page(landscape))
    assert np.array_equal(np.array(content["scores"], dtype=np.float32), landscape.scores_LA, equal_nan=True)
    assert np.array_equal(np.array(content["entropy"], dtype=np.float32), landscape.entropy_L, equal_nan=True)
    assert content["scores"][2] == [None] * 20
    assert content["entropy"][4] is None
    assert content["given"] == ["AF", "", "", "Y", "", "", "", "", ""]
    for name in ("target", "wild_type", "first", "method", "model", "limit"):
        assert content[name] == getattr(landscape, name)
    assert content["amino_acids"] == AMINO_ACIDS
    assert _embedded(render_page(make_landscape(entropy_L=None)))["entropy"] is None


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_inert(text: str) -> None:
    harmless = render_page(make_landscape())
    page = render_page(make_landscape(target=text, method=text, model=text))
    assert [_embedded(page)[name] for name in ("target", "method", "model")] == [text] * 3
    assert "<" not in encode_data(make_landscape(target=text))
    # Beside its data, the page is the same.
    without_data = [re.sub(r'(id="data">).*?(</script>)', r"\1\2", each, flags=re.DOTALL) for each in (page, harmless)]
    assert without_data[0] == without_data[1]


def test_nothing_is_fetched() -> None:
    page = render_page(make_landscape())
    assert not re.search(r"https?:|//\w|@import|\burl\(|\bfetch\b|XMLHttpRequest|WebSocket", page)
    assert re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page) == ["data:,"]
    assert "default-src 'none'" in page
    assert "innerHTML" not in page


def test_placeholders_are_all_filled() -> None:
    page = render_page(make_landscape())
    for name in ("policy", "style", "data", "model", "drawing", "controls"):
        assert f"{{{name}}}" not in page


# From here on in a browser.

WILD_TYPE = long_wild_type(120)
LAST = f"{WILD_TYPE[-1]}143"


@pytest.fixture(scope="module")
def landscape() -> Landscape:
    """120 residues from number 24 on; residues 34 to 43 (sites 10 to 19) unknown, two substitutions named."""
    whole = make_landscape(WILD_TYPE)
    scores_LA = whole.scores_LA.copy()
    scores_LA[10:20] = np.nan
    given_LA = np.zeros(scores_LA.shape, dtype=bool)
    given_LA[2, AMINO_ACIDS.index("G")] = given_LA[12, AMINO_ACIDS.index("P")] = True
    return make_landscape(WILD_TYPE, scores_LA=scores_LA, given_LA=given_LA, first=24, target="sp|P1/x <b>id</b>")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp("browser")
    options = Options()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in (*flags.split(), "disable-component-update", "disable-sync", "window-size=1200,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    (folder / "downloads").mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(executable_path=driver)) as browser:
        browser.downloads = folder / "downloads"
        yield browser


@pytest.fixture
def page(browser: Any, landscape: Landscape, tmp_path: Path) -> Iterator[Any]:
    """A freshly opened page; whatever a test did on it, the console has stayed silent."""
    _open(browser, landscape, tmp_path)
    yield browser
    assert _complaints(browser) == []


def _open(browser: Any, landscape: Landscape, folder: Path) -> None:
    draw_heatmap(folder / "map.html", landscape)
    browser.get((folder / "map.html").as_uri())


def _complaints(browser: Any) -> list[dict[str, Any]]:
    """The console since it was last asked for, without advice on how tests should read pixels."""
    return [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"]


def _state(page: Any) -> dict[str, Any]:
    state: dict[str, Any] = page.execute_script("return protnest.state")
    return state


def _point(page: Any, name: str) -> tuple[int, int]:
    place = page.execute_script("return protnest.point(arguments[0])", name)
    assert place is not None, f"{name} is out of view"
    return round(place["x"]), round(place["y"])


def _pointer(page: Any) -> Any:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    return ActionBuilder(page, duration=20)


def _hover(page: Any, name: str) -> str:
    builder = _pointer(page)
    builder.pointer_action.move_to_location(*_point(page, name))
    builder.perform()
    return str(page.find_element("id", "tooltip").text)


def _press(page: Any, *keys: str) -> None:
    page.find_element("id", "map").send_keys(*keys)


def _text(page: Any, identity: str) -> str:
    return str(page.find_element("id", identity).text)


def _search(page: Any, query: str) -> None:
    box = page.find_element("id", "query")
    box.clear()
    box.send_keys(query + "\n")


def _choose(page: Any, identity: str, value: str) -> None:
    page.find_element("css selector", f"#{identity} option[value={value}]").click()


def _until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def test_titles_are_texts(page: Any, landscape: Landscape) -> None:
    assert _text(page, "target") == landscape.target
    assert page.title == f"{landscape.target}: variant scores"
    assert not page.find_elements("css selector", "#target b")
    assert _text(page, "about") == "masked-marginal, tiny; residues 24 to 143; 2,090 substitutions scored"


def test_hostile_texts_do_not_run(browser: Any, tmp_path: Path) -> None:
    for text in HOSTILE:
        _open(browser, make_landscape(target=text, method=text, model=text), tmp_path)
        assert browser.execute_script("return document.getElementById('target').textContent") == text
        assert browser.execute_script("return document.querySelectorAll('script, img').length") == 4
        assert _complaints(browser) == []


def test_foreign_scripts_are_refused(browser: Any, landscape: Landscape, tmp_path: Path) -> None:
    _open(browser, landscape, tmp_path)
    browser.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.foreign = 1';"
        "document.body.append(script)"
    )
    assert browser.execute_script("return window.foreign") is None
    assert "Content Security Policy" in str(browser.get_log("browser"))


def test_hover_tells_of_the_cell(page: Any, landscape: Landscape) -> None:
    text = _hover(page, "T26G")
    score = landscape.scores_LA[2, AMINO_ACIDS.index("G")]
    known = landscape.substitutions_LA[np.isfinite(landscape.substitutions_LA)]
    facts = dict(zip(text.splitlines()[1::2], text.splitlines()[2::2], strict=True))
    assert text.splitlines()[0] == "T26G"
    assert landscape.entropy_L is not None
    assert float(facts["score"].replace("\N{MINUS SIGN}", "-")) == pytest.approx(float(score), rel=0.006)
    assert facts["rank"] == f"{(known > score).sum() + 1:,} of 2,090"
    assert facts["higher than"] == f"{int(100 * (known < score).mean())} % of all"
    assert facts["wild type"] == "T26"
    assert float(facts["entropy"].removesuffix(" nats")) == pytest.approx(float(landscape.entropy_L[2]), rel=0.006)
    mean = float(facts["mean score here"].replace("\N{MINUS SIGN}", "-"))
    assert mean == pytest.approx(float(landscape.mean_L[2]), rel=0.006)
    assert facts["named in the table"] == "yes"
    assert _state(page)["hovered"] == "T26G"
    assert "named in the table\nno" in _hover(page, "T26H")
    assert _hover(page, "T26T").splitlines()[0] == "T26T (wild type)"
    assert "score\nnot known" in _hover(page, f"{WILD_TYPE[12]}36P")
    assert "rank" not in _text(page, "tooltip")


def test_every_cell_is_where_it_says(page: Any, landscape: Landscape) -> None:
    for name in ("M24H", f"{LAST}W", f"{WILD_TYPE[60]}84A"):
        assert _hover(page, name).splitlines()[0].split()[0] == name


def test_tooltips_stay_in_the_window(page: Any) -> None:
    for name in ("M24H", "M24W", f"{LAST}H", f"{LAST}W"):
        _hover(page, name)
        box = page.execute_script(
            "const b = document.getElementById('tooltip').getBoundingClientRect();"
            "return [b.left, b.top, innerWidth - b.right, innerHeight - b.bottom]"
        )
        assert min(box) >= 0, (name, box)


def _scroll(page: Any, name: str, right: int, down: int) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    ActionChains(page).scroll_from_origin(ScrollOrigin.from_viewport(*_point(page, name)), right, down).perform()


def test_zoom_and_pan(page: Any) -> None:
    assert (_state(page)["from"], _state(page)["span"]) == (0, 120)
    name = f"{WILD_TYPE[90]}114A"  # not in the middle
    before = _point(page, name)
    _scroll(page, name, 0, -400)
    near = _until(lambda: _state(page)["span"] < 100 and _state(page))
    # What was under the pointer stays there.
    assert _point(page, name)[0] == pytest.approx(before[0], abs=10)
    _scroll(page, name, 300, 0)
    moved = _until(lambda: _state(page)["from"] > near["from"] and _state(page))
    assert moved["span"] == pytest.approx(near["span"])
    x, y = _point(page, name)
    builder = _pointer(page)
    builder.pointer_action.move_to_location(x, y).pointer_down().move_to_location(x + 60, y).pointer_up()
    builder.perform()
    assert _state(page)["from"] < moved["from"]
    assert _point(page, name)[0] == pytest.approx(x + 60, abs=2)
    assert _state(page)["selected"] is None, "a drag is no click"
    page.find_element("id", "zoom-fit").click()
    assert _state(page)["span"] == 120
    page.find_element("id", "zoom-in").click()
    assert _state(page)["span"] == pytest.approx(75)
    page.find_element("id", "zoom-out").click()
    assert _state(page)["span"] == pytest.approx(120)
    for _ in range(20):
        page.find_element("id", "zoom-in").click()
    assert _state(page)["span"] == 8


def test_pinch(page: Any) -> None:
    # A finger that stays and one that goes from 100 to 200 pixels away.
    page.execute_script(
        "const map = document.getElementById('map'); map.setPointerCapture = () => {};"
        "const send = (type, pointerId, clientX) => map.dispatchEvent("
        "  new PointerEvent(type, { pointerId, clientX, clientY: 400, button: 0, bubbles: true }));"
        "send('pointerdown', 11, 500); send('pointerdown', 12, 600); send('pointermove', 12, 700);"
        "send('pointerup', 11, 500); send('pointerup', 12, 700);"
    )
    assert _state(page)["span"] == pytest.approx(60)
    assert _state(page)["selected"] is None


def test_overview_moves_the_view(page: Any) -> None:
    page.find_element("id", "zoom-in").click()
    page.find_element("id", "zoom-in").click()
    box = page.find_element("id", "overview").rect
    builder = _pointer(page)
    builder.pointer_action.move_to_location(int(box["x"] + box["width"] - 15), int(box["y"] + 20)).click()
    builder.perform()
    state = _state(page)
    assert state["from"] + state["span"] == pytest.approx(120)


def test_sorting(page: Any, landscape: Landscape) -> None:
    assert _state(page)["acids"] == "".join(acids for _, acids in CHEMISTRY)
    mean_L = np.where(np.isnan(landscape.mean_L), np.inf, landscape.mean_L.astype(np.float64))
    _choose(page, "sort-positions", "mean")
    assert _state(page)["positions"] == (np.argsort(mean_L, kind="stable") + 24).tolist()
    _choose(page, "sort-positions", "entropy")
    assert landscape.entropy_L is not None
    assert _state(page)["positions"] == (np.argsort(landscape.entropy_L, kind="stable") + 24).tolist()
    # Cells move with their columns and rows.
    assert _hover(page, "T26G").splitlines()[0] == "T26G"
    _choose(page, "sort-acids", "alphabet")
    assert _state(page)["acids"] == AMINO_ACIDS
    _choose(page, "sort-acids", "mean")
    means_A = np.nanmean(landscape.substitutions_LA, axis=0, dtype=np.float64)
    assert _state(page)["acids"] == "".join(AMINO_ACIDS[acid] for acid in np.argsort(-means_A))
    assert _hover(page, "T26G").splitlines()[0] == "T26G"
    _choose(page, "sort-positions", "position")
    assert _state(page)["positions"] == list(range(24, 144))


def test_search(page: Any) -> None:
    page.find_element("id", "zoom-fit").click()
    _search(page, f"{LAST}w".lower())
    state = _state(page)
    assert (state["selected"], state["pinned"], state["from"] + state["span"]) == (f"{LAST}W", True, 120)
    assert _text(page, "status").startswith(f"{LAST}W: score ")
    assert _text(page, "pin") == "pinned"
    _search(page, "26")
    assert _state(page)["selected"] == "T26T"
    assert _point(page, "T26T")
    for query, problem in [
        ("A26G", "residue 26 is T, not A"),
        ("23", "no residue 23: there are 24 to 143"),
        ("T144G", "no residue 144: there are 24 to 143"),
        ("T26X", "X is not one of the 20 amino acids"),
        ("<b>", "“<b>” is not spelt like A24G, A24 or 24"),
    ]:
        _search(page, query)
        assert _text(page, "status") == problem
        assert _state(page)["selected"] is None


def test_keyboard(page: Any) -> None:
    from selenium.webdriver import Keys

    _press(page, Keys.ARROW_RIGHT)
    assert _state(page)["selected"] == "M24H"
    assert _text(page, "status").startswith("M24H: score ")
    _press(page, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert _state(page)["selected"] == "T26K"
    _press(page, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP)
    assert _state(page)["selected"] == "K25H"
    _press(page, Keys.END)
    assert _state(page)["selected"] == f"{LAST}H"
    _press(page, "+", "+", Keys.HOME)
    state = _state(page)
    assert (state["selected"], state["from"]) == ("M24H", 0)
    assert state["span"] == pytest.approx(120 / 1.6**2)
    _press(page, Keys.PAGE_DOWN)
    assert _state(page)["selected"] == f"{WILD_TYPE[45]}{24 + 45}H"
    _press(page, Keys.ENTER)
    assert _state(page)["pinned"]
    _press(page, Keys.END)
    state = _state(page)
    assert (state["selected"], state["from"] + state["span"]) == (f"{LAST}H", pytest.approx(120))
    _press(page, "-", "0", Keys.ESCAPE)
    assert (_state(page)["selected"], _state(page)["pinned"], _state(page)["span"]) == (None, False, 120)
    live = page.find_element("id", "status")
    assert live.get_attribute("aria-live") == "polite"


def test_click_pins_and_lets_go(page: Any) -> None:
    for pinned in (True, False):
        builder = _pointer(page)
        builder.pointer_action.move_to_location(*_point(page, "T26G")).click()
        builder.perform()
        assert _state(page)["pinned"] == pinned
        assert _state(page)["selected"] == ("T26G" if pinned else None)


def _download(page: Any, button: str, ending: str) -> Path:
    page.find_element("id", button).click()
    (path,) = _until(lambda: list(page.downloads.glob(f"*.{ending}")))
    assert path.name == f"sp_P1_x_b_id_b_.{ending}"
    _until(lambda: path.stat().st_size)
    return Path(path)


def test_csv(page: Any, landscape: Landscape) -> None:
    with _download(page, "save-csv", "csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scores_LA = np.full_like(landscape.scores_LA, np.nan)
    named = []
    for row in rows:
        site, acid = int(row["position"]) - 24, AMINO_ACIDS.index(row["mutant"])
        assert row["variant"] == landscape.name(site, row["mutant"])
        assert row["wild_type"] == WILD_TYPE[site]
        scores_LA[site, acid] = np.float32(row["score"] or "nan")
        assert landscape.entropy_L is not None
        assert np.float32(row["entropy"]) == landscape.entropy_L[site]
        named += [row["variant"]] * int(row["given"])
    assert np.array_equal(scores_LA, landscape.substitutions_LA, equal_nan=True)
    assert named == ["T26G", f"{WILD_TYPE[12]}36P"]
    assert len(rows) == 2090 + 1  # one was asked for and is not known


def _variety(path: Path) -> tuple[int, int, int]:
    """Width and height of a PNG, and how many different bytes are in its pixels: few in a blank one."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    place, packed = 8, b""
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        if content[place + 4 : place + 8] == b"IDAT":
            packed += content[place + 8 : place + 8 + size]
        place += size + 12
    return width, height, len(set(zlib.decompress(packed)))


def test_png_of_the_view(page: Any) -> None:
    width, height, different = _variety(_download(page, "save-png", "png"))
    assert width == 2 * (page.find_element("id", "map").rect["width"] + 32)
    assert height > 1000
    assert different > 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page: Any, scheme: str, tmp_path: Path) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    corner = "return document.getElementById('map').getContext('2d').getImageData(2, 2, 1, 1).data[0]"
    expected = {"light": 255, "dark": 0x16}[scheme]
    _until(lambda: page.execute_script(corner) == expected)
    assert page.save_screenshot(str(tmp_path / f"{scheme}.png"))
    assert _variety(tmp_path / f"{scheme}.png")[2] > 50


def test_cells_have_the_colours_of_their_scores(page: Any, landscape: Landscape) -> None:
    """The pixel in a corner of a cell, away from its mark, is the colour that the picture has there."""
    colors = pytest.importorskip("matplotlib.colors")
    from protnest.engine.palette import COLOURS
    from selenium.webdriver import Keys

    blend = colors.LinearSegmentedColormap.from_list("scores", COLOURS, N=4096)
    pixel = (
        "const map = document.getElementById('map'), box = map.getBoundingClientRect(), ratio = devicePixelRatio;"
        "const [x, y] = [arguments[0] - box.left, arguments[1] - box.top].map((v) => Math.round(v * ratio));"
        "return [...map.getContext('2d', { willReadFrequently: true }).getImageData(x, y, 1, 1).data].slice(0, 3)"
    )
    for order, acids in (("position", "chemistry"), ("mean", "chemistry"), ("mean", "alphabet")):
        _choose(page, "sort-positions", order)
        _choose(page, "sort-acids", acids)
        for name in ("T26H", "T26D", "T26W", "T26T"):
            _search(page, name)
            _press(page, Keys.ESCAPE)  # no frame around the cell
            time.sleep(0.1)
            x, y = _point(page, name)
            score = landscape.scores_LA[2, AMINO_ACIDS.index(name[-1])]
            expected = 255 * np.array(blend(float(score) / landscape.limit / 2 + 0.5)[:3])
            assert page.execute_script(pixel, x - 5, y - 5) == pytest.approx(expected.tolist(), abs=2), (name, order)


def test_without_entropy_and_with_one_residue(browser: Any, tmp_path: Path) -> None:
    _open(browser, make_landscape("M", entropy_L=None), tmp_path)
    assert not browser.find_elements("css selector", "#sort-positions option[value=entropy]")
    assert "entropy" not in _hover(browser, "M1A")
    assert _state(browser)["span"] == 1
    assert _complaints(browser) == []


def test_opens_at_what_is_known(browser: Any, tmp_path: Path) -> None:
    whole = make_landscape(WILD_TYPE)
    scores_LA = np.full_like(whole.scores_LA, np.nan)
    scores_LA[30:70] = whole.scores_LA[30:70]
    _open(browser, make_landscape(WILD_TYPE, scores_LA=scores_LA), tmp_path)
    assert (_state(browser)["from"], _state(browser)["span"]) == (30, 40)
    scores_LA[:] = np.nan
    _open(browser, make_landscape(WILD_TYPE, scores_LA=scores_LA, entropy_L=None), tmp_path)
    assert (_state(browser)["from"], _state(browser)["span"]) == (0, 120)
    assert _complaints(browser) == []
