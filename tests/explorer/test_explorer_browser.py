"""The file in a real browser: its numbers, filters, keys, pictures, and a frame without rights."""

import base64
import html
import io
import itertools
import json
import typing as tp
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from visuals import chromium
from visuals.chain import DEAD, Chain

from saev import visuals
from saev.config import VisualsConfig
from saev.explorer import columns
from saev.explorer.data import Measured
from saev.inference.results import Results
from saev.shards import Shards
from saev.visuals.source import Source

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)

ROWS = "[...document.querySelectorAll('.rows .row')]"
LISTED = f"{ROWS}.map(r => +r.dataset.latent)"
AXE = Path(__file__).parents[2] / "web/node_modules/axe-core/axe.min.js"
CELLS = f"[...{ROWS}[0].querySelectorAll('.n')].map(c => c.dataset.column)"
OPEN = "(document.querySelector('main.one')?.dataset.latent ?? null)"
MARKS = "document.querySelector('.pictures canvas').dataset.marks"
DRAWN = "[...document.querySelectorAll('canvas[data-drawn]')]"


@pytest.fixture(scope="module")
def results(chain: Chain) -> Results:
    return Results.open(chain.inference)


@pytest.fixture(scope="module")
def table(results: Results) -> dict[str, np.ndarray]:
    """Columns of numbers, NaN where there is none."""
    found = results.latents()
    names = [f.name for f in found.schema if not pa.types.is_nested(f.type)]
    return {
        name: found[name].to_numpy().astype(float)
        for name in names
        if not pa.types.is_string(found[name].type)
    }


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    with chromium.browser() as page:
        yield page


@pytest.fixture
def page(tab: chromium.Page, file: Path) -> Iterator[chromium.Page]:
    tab.events.clear()
    tab.open(file.as_uri())
    tab.wait(f"{ROWS}.length > 0")
    yield tab
    assert tab.problems() == []
    pages = {url.partition("#")[0] for url in tab.requested()}
    assert all(
        url.startswith(("file:", "about:")) and url.endswith((".html", "blank")) for url in pages
    )


def type_into(page: tp.Any, selector: str, text: str, kind: str = "input") -> None:
    page.js(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
        f"e.value = {json.dumps(text)}; e.dispatchEvent(new Event('{kind}', {{bubbles: true}}));"
        "})()"
    )


def says(text: str, value: float) -> bool:
    """Whether a text is a number, rounded to its last digit."""
    digits = text.replace(",", "").rstrip("%").lower()
    mantissa, _, power = digits.partition("e")
    unit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    return abs(float(digits) - value) <= 0.5001 * unit


def all_rows(page: chromium.Page) -> dict[int, dict[str, list[str]]]:
    """Texts of all rows in turn: of each column, the held-out figure and that of all images."""
    found: dict[int, dict[str, list[str]]] = {}
    n = page.js("+document.querySelector('.list').getAttribute('aria-rowcount') - 1")
    while len(found) < n:
        for latent, cells in page.js(
            f"{ROWS}.map(r => [r.dataset.latent, [...r.querySelectorAll('.n')].map(c => "
            "[c.dataset.column, ...[...c.childNodes].map(t => t.textContent)])])"
        ):
            found[int(latent)] = {key: texts for key, *texts in cells}
        page.js("scrollBy(0, 400)")
        page.js("new Promise(requestAnimationFrame)")
    return found


def test_numbers_are_those_of_inference(
    page: chromium.Page, table: dict[str, np.ndarray], file: Path
) -> None:
    checked = 0
    for some in (columns.COLUMNS[:6], columns.COLUMNS[6:]):
        page.open(f"{file.as_uri()}#/0?cols={','.join(c.key for c in some)}", width=1600)
        page.wait(f"{ROWS}.length > 0")
        shown = [c for c in some if c.key in page.js(f"Object.values({CELLS})")]
        for latent, cells in all_rows(page).items():
            for column in shown:
                if column.source not in table:
                    continue
                names = [f"{column.source}_held_out", column.source]
                for name, text in zip(
                    names[not column.has_sides :], cells[column.key], strict=True
                ):
                    value = table[name][latent]
                    factor = 100 if text.endswith("%") else 1
                    assert says(text, value * factor) if text != "–" else np.isnan(value), name
                    checked += text != "–"
    assert checked > 200


def test_sort_and_filter_by_columns(page: chromium.Page, table: dict[str, np.ndarray]) -> None:
    frequency = table["frequency_held_out"]
    type_into(page, ".sort select", "-frequency", "change")
    page.wait(f"{LISTED}[0] === {int(frequency.argmax())}")
    page.js("document.querySelector('[data-menu=Filter]').open = true")
    low = float(np.median(frequency[frequency > 0])) * 1.001
    type_into(page, '[aria-label="Frequency from"]', str(low), "change")
    n = int((frequency >= low).sum())
    page.wait(f"document.getElementById('count').textContent === '{n} of 24 latents'")
    assert "frequency=" in page.js("location.hash"), "the address keeps the filter"
    page.reload()
    page.wait("document.getElementById('count') !== null")
    assert page.js("document.getElementById('count').textContent") == f"{n} of 24 latents"
    page.click("#reset")
    page.wait("document.getElementById('count').textContent === '24 latents'")


def test_search_finds_classes_files_and_numbers(
    page: chromium.Page, results: Results, chain: Chain
) -> None:
    measured = Measured(results, Shards.open(chain.shards), {})

    images = {i: [e.example for e in measured.examples(i)] for i in range(results.d_sae)}
    plain = {i for i, mine in images.items() if "plain" in map(measured.label, mine)}
    number = [one.name for one in measured.classes].index("plain")
    plain |= set(np.flatnonzero(measured.best("class") == number).tolist())
    by_file = {i for i, mine in images.items() if 3 in mine}
    assert 0 < len(by_file) < len(plain) < results.d_sae
    for text, found in (
        ("no such thing", set()), ("PLAÍN", plain), ("pla", plain), ("lain", set()),
        (measured.file(3), by_file), (str(DEAD), {DEAD}),
    ):  # fmt: skip
        type_into(page, "#search", text)
        page.wait(f"document.getElementById('count').textContent.startsWith('{len(found)} of')")
        assert set(page.js(LISTED)) <= found, "the rows near the window"


def test_brush_filters_by_both_axes(page: chromium.Page, table: dict[str, np.ndarray]) -> None:
    box = page.js(
        "(() => { const r = document.querySelector('.plot canvas').getBoundingClientRect();"
        "return [r.x, r.y, r.width, r.height]; })()"
    )
    places = [(box[0] + box[2] / 2, box[1] + 1), (box[0] + box[2] + 50, box[1] + box[3])]
    button = {"button": "left", "buttons": 1}
    for kind, (x, y) in zip(("mousePressed", "mouseMoved"), places, strict=True):
        page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=1, **button)
    page.send(
        "Input.dispatchMouseEvent", type="mouseReleased", x=places[1][0], y=places[1][1],
        button="left", clickCount=1,
    )  # fmt: skip
    page.wait("document.getElementById('count').textContent.includes(' of ')")
    low = float(page.js("location.hash").partition("frequency=")[2].partition("..")[0])
    frequency = table["frequency_held_out"]
    expected = {int(i) for i in np.flatnonzero((frequency >= low) & (frequency > 0))}
    assert 0 < len(expected) < int((frequency > 0).sum())
    assert set(page.js(LISTED)) == expected


def test_keys_open_leaf_through_and_go_back(page: chromium.Page) -> None:
    order = page.js(LISTED)[:3]
    page.js(f"{ROWS}[0].querySelector('a').focus()")
    page.key("ArrowDown")
    page.wait("document.activeElement.textContent === " + json.dumps(str(order[1])))
    page.js("document.activeElement.click()")
    page.wait(f"{OPEN} === '{order[1]}'")
    page.wait("document.activeElement.tagName === 'H2'")
    page.key("ArrowRight")
    page.wait(f"{OPEN} === '{order[2]}'")
    page.key("ArrowLeft")
    page.key("ArrowLeft")
    page.wait(f"{OPEN} === '{order[0]}'")
    page.js("history.back()")
    page.wait(f"{OPEN} === null")
    page.js("history.forward()")
    page.wait(f"{OPEN} !== null")
    page.key("Escape")
    page.wait(f"{OPEN} === null")
    page.key("/")
    assert page.js("document.activeElement.id") == "search"


def pixels(page: chromium.Page) -> np.ndarray:
    """The first picture of a latent's page, [height, width, 3]."""
    data = page.js("document.querySelector('.pictures canvas').toDataURL()").partition(",")[2]
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return np.array(image, dtype=float)


def of_patches(picture: np.ndarray) -> np.ndarray:
    """Mean lightness of the middle of each of 4 × 4 patches, [16]."""
    edges = np.linspace(0, len(picture), 5).astype(int)
    pad = (edges[1] - edges[0]) // 4
    spans = [slice(a + pad, b - pad) for a, b in itertools.pairwise(edges)]
    return np.array([picture[rows, columns].mean() for rows in spans for columns in spans])


def test_pictures_and_marks(
    page: chromium.Page, results: Results, chain: Chain, file: Path
) -> None:
    latent = 1
    top = results.top(latent)
    fires = top.token_acts[0] > 0
    assert 0 < fires.sum() < 16, "some patches fire, some do not"
    page.open(f"{file.as_uri()}#/0/latent/{latent}")
    page.wait(f"{DRAWN}.length > 4")
    marked = of_patches(pixels(page))
    page.key("h")
    page.wait(f"{MARKS} === 'off'")
    plain = pixels(page)
    crop = Source(Shards.open(chain.shards)).view(int(top.example_idx[0])).image
    assert of_patches(plain) == pytest.approx(of_patches(np.array(crop, dtype=float)), abs=12)
    dimmed = marked < 0.6 * of_patches(plain)
    assert dimmed.tolist() == (~fires).tolist()
    page.key("h")
    # Only the strongest patch is left if the threshold is at the maximum.
    page.wait(f"{MARKS} === '0'")
    type_into(page, "#threshold", "100")
    page.wait(f"{MARKS} === '1'")
    dimmed = of_patches(pixels(page)) < 0.6 * of_patches(plain)
    assert np.flatnonzero(~dimmed).tolist() == [int(top.token_acts[0].argmax())]
    values = page.js("[...document.querySelectorAll('.range .value')].map(v => v.textContent)")
    assert all(says(*pair) for pair in zip(values, top.value[:8], strict=False))
    assert len(values) >= min(8, len(top.value))


@pytest.mark.parametrize(("width", "dark"), [(1400, True), (390, False)])
def test_nothing_overflows(page: chromium.Page, file: Path, width: int, dark: bool) -> None:
    for address in ("", "#/0/latent/1"):
        page.open(file.as_uri() + address, width=width, height=800, dark=dark)
        page.wait(f"{DRAWN}.length > 0")
        assert page.js("document.documentElement.scrollWidth <= innerWidth"), address
    background = page.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 27)" if dark else "rgb(251, 251, 250)")


def test_map_of_directions_filters_by_place(
    page: chromium.Page, table: dict[str, np.ndarray], file: Path
) -> None:
    page.open(f"{file.as_uri()}#/0?map=directions&by=mean")
    page.wait(f"{ROWS}.length > 0 && document.querySelector('.map .scale') !== null")
    box = page.js(
        "(() => { const r = document.querySelector('.plot .over').getBoundingClientRect();"
        "return [r.x, r.y, r.width, r.height]; })()"
    )
    page.drag((box[0] + box[2] / 2, box[1] + 2), (box[0] + box[2] - 1, box[1] + box[3] - 2))
    page.wait("document.getElementById('count').textContent.includes(' of ')")
    low = float(page.js("location.hash").partition("x=")[2].partition("..")[0])
    right = {int(i) for i in np.flatnonzero(table["x"] >= low)}
    listed = page.js("+document.querySelector('.list').getAttribute('aria-rowcount') - 1")
    assert 0 < listed <= len(right) < len(table["x"])
    assert set(page.js(LISTED)) <= right


def test_map_by_keyboard(page: chromium.Page) -> None:
    first, second = page.js(LISTED)[:2]
    page.js("document.querySelector('.plot .over').focus()")
    page.key("ArrowRight")
    page.wait(f"document.querySelector('.tip b')?.textContent === '{first}'")
    page.key("ArrowRight")
    page.wait(f"document.querySelector('.tip b')?.textContent === '{second}'")
    page.key("Enter")
    page.wait(f"{OPEN} === '{second}'")


def test_notes_are_kept_found_and_imported(page: chromium.Page, file: Path) -> None:
    address = f"{file.as_uri()}#/0/latent/3"
    page.open(address)
    page.wait("document.getElementById('note') !== null")
    type_into(page, "#note", "straight edges")
    type_into(page, "#tags", "Línes, edges")
    page.wait("(localStorage.getItem('saev-notes') ?? '').includes('Línes')")
    page.reload()
    page.wait("document.getElementById('note')?.value === 'straight edges'")
    assert page.js("[...document.querySelectorAll('.chip.tag')].map(t => t.textContent)") == [
        "Línes", "edges",
    ]  # fmt: skip
    page.key("Escape")
    page.wait("document.getElementById('search') !== null")
    type_into(page, "#search", "lines")
    page.wait(f"{LISTED}.join() === '3'")
    notes = json.loads(page.js("localStorage.getItem('saev-notes')"))
    (results,) = notes
    notes = {results: {"4": {"text": "imported", "tags": ["new", 7]}, "x": 1}, "other": 5}
    page.js(
        f"location.hash = '#/0/latent/4'; (async () => {{ const t = new DataTransfer();"
        f"t.items.add(new File([{json.dumps(json.dumps(notes))}], 'n.json'));"
        "while (!document.getElementById('import')) await new Promise(requestAnimationFrame);"
        "const e = document.getElementById('import'); e.files = t.files;"
        "e.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    page.wait("document.getElementById('note')?.value === 'imported'")
    stored = json.loads(page.js("localStorage.getItem('saev-notes')"))[results]
    assert stored["4"] == {"text": "imported", "tags": ["new"]}
    assert stored["3"]["text"] == "straight edges"
    page.js("localStorage.clear()")


def test_images_are_ranked(page: chromium.Page, results: Results, file: Path) -> None:
    latent = 1
    top = results.top(latent)
    acts, names = top.token_acts[:8], top.example_idx[:8]
    page.open(f"{file.as_uri()}#/0/latent/{latent}")
    page.wait(f"{DRAWN}.length > 4")
    canvases = "[...document.querySelector('.pictures').querySelectorAll('canvas')]"
    shown = f"{canvases}.map(c => +c.dataset.drawn)"
    for how, key in (("mean", acts.mean(axis=1)), ("area", (acts > 0).sum(axis=1))):
        type_into(page, "#ranking", how, "change")
        right = [int(i) for i in names[np.lexsort((np.arange(len(key)), -key))]]
        page.wait(f"{shown}.join() === '{','.join(map(str, right))}'")


def test_figure_has_title_scale_and_caption(page: chromium.Page, file: Path) -> None:
    page.open(f"{file.as_uri()}#/0/latent/1")
    page.wait(f"{DRAWN}.length > 4")
    page.js(
        "window.made = []; URL.createObjectURL = b => (window.made.push(b), 'blob:none');"
        "HTMLAnchorElement.prototype.click = function () { window.made.push(this.download); }"
    )
    page.js("document.getElementById('figure').click()")
    page.wait("document.querySelector('dialog[open] #png:enabled') !== null")
    type_into(page, "dialog textarea", "A caption of <b>mine</b> & yours")
    page.wait("document.querySelector('dialog canvas').height > 500")
    page.js("document.getElementById('png').click()")
    page.wait("window.made.length === 2")
    kind, name = page.js("[window.made[0].type, window.made[1]]")
    assert (kind, name) == ("image/png", "latent-1.png")
    page.js("document.getElementById('svg').click()")
    page.wait("window.made.length === 4")
    root = ElementTree.fromstring(page.js("window.made[2].text()"))
    texts = " ".join(e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "A caption of <b>mine</b> & yours" in texts
    assert texts.startswith("Latent 1")
    assert "value of the latent" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}image"))) == 8
    page.key("Escape")
    page.wait("document.querySelector('dialog') === null")
    assert page.js(OPEN) == "1", "Esc closes the dialog only"


def test_compare_two_classes(
    page: chromium.Page, results: Results, chain: Chain, file: Path
) -> None:
    measured = Measured(results, Shards.open(chain.shards), {})
    rates = measured.rates()
    assert rates is not None
    page.open(f"{file.as_uri()}#/0/compare?a=class:1&b=class:0")
    page.wait("document.querySelectorAll('.sides tbody tr').length > 1")
    rows = page.js(
        "[...document.querySelectorAll('.sides section:first-child tbody tr')].map(r => "
        "[+r.querySelector('a').textContent, "
        "...[...r.querySelectorAll('.n')].map(c => c.textContent)])"
    )
    gains = rates[1] - rates[0]
    shown = [gains[latent] for latent, *_ in rows]
    assert shown == pytest.approx(sorted(gains[gains > 0], reverse=True)[:12])
    for latent, first, second in rows:
        for text, rate in ((first, rates[1][latent]), (second, rates[0][latent])):
            assert float(text.rstrip("%")) == pytest.approx(100 * rate, abs=0.06)
    page.click("#swap")
    page.wait("location.hash.includes('a=class%3A0&b=class%3A1')")


def test_all_saes_of_a_file(page: chromium.Page, file_of_two: Path) -> None:
    page.open(file_of_two.as_uri())
    page.wait("document.querySelectorAll('.saes tbody tr').length === 2")
    heads = page.js("[...document.querySelectorAll('.saes th button')].map(h => h.textContent)")
    assert {"NMSE", "L0", "sae.d_sae"} <= set(heads), "what differs in the configs"
    type_into(page, "#axis-x", "n_dead", "change")
    page.wait("location.hash.includes('x=n_dead')")
    page.js("document.querySelectorAll('.saes tbody a')[1].click()")
    page.wait(f"{ROWS}.length > 0")
    page.js("location.hash += '/latent/2'")
    page.wait("document.querySelector('.near .of') !== null")
    page.js("document.querySelector('.near .of').closest('a').click()")
    page.wait("!location.hash.startsWith('#/1/') && document.querySelector('main.one') !== null")
    page.js("history.back()")
    page.wait(f"{OPEN} === '2'")


@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: make web")
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_serious_for_axe(
    tab: chromium.Page, file: Path, file_of_two: Path, *, dark: bool
) -> None:
    """Each page by the rules of axe-core, a dialog and menus open."""
    found = []
    for what, address, ready in (
        (file, "#/0?map=directions&by=mean&q=a", f"{ROWS}.length > 0"),
        (file, "#/0/latent/1", f"{DRAWN}.length > 4"),
        (file, "#/0/compare", "document.querySelector('.sides tbody tr') !== null"),
        (file_of_two, "", "document.querySelector('.saes tbody tr') !== null"),
    ):
        tab.open(f"{what.as_uri()}{address}", dark=dark)
        tab.wait(ready)
        tab.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        tab.js(AXE.read_text() + "; 1")
        for dialog in (False, "latent/1" in address):
            if dialog:
                tab.click("#figure")
                tab.wait("document.querySelector('dialog[open] #png:enabled') !== null")
            problems = tab.js(
                "axe.run({resultTypes: ['violations']}).then(r => r.violations.filter(v => "
                "['serious', 'critical'].includes(v.impact)).map(v => [v.id, v.help, "
                "v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))]))"
            )
            found += [(address, *problem) for problem in problems]
    assert not found


def test_in_a_frame_without_rights(tab: chromium.Page, file: Path, tmp_path: Path) -> None:
    """As Kubeflow's UI shows a page."""
    outer = tmp_path / "outer.html"
    outer.write_text(
        '<iframe sandbox="allow-scripts" width="900" height="600" '
        f'srcdoc="{html.escape(file.read_text())}"></iframe>'
    )
    tab.events.clear()
    tab.send("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
    tab.open(outer.as_uri())
    frame = Frame(tab)
    frame.wait(f"{ROWS}.length > 0 && {DRAWN}.length > 0")
    assert frame.js("self.origin") == "null"
    first, second = frame.js(LISTED)[:2]
    frame.js(f"{ROWS}[0].querySelector('a').click()")
    frame.wait(f"{OPEN} === '{first}'")
    frame.js("document.getElementById('next').click()")
    frame.wait(f"{OPEN} === '{second}'")
    frame.js("document.querySelector('.copy button').click()")
    frame.wait("document.querySelector('.copy textarea') !== null")
    frame.wait(
        "(() => { const t = document.querySelector('.copy textarea');"
        "return t.value.slice(t.selectionStart, t.selectionEnd)"
        f".includes('latent_examples({second})'); }})()"
    )
    assert "not kept here" in frame.js("document.querySelector('.notes h3').textContent")
    frame.js("document.getElementById('figure').click()")
    frame.wait("document.querySelector('dialog[open] #svg:enabled') !== null")
    frame.js("document.getElementById('svg').click()")
    frame.wait("document.querySelector('dialog .fallback')?.value.startsWith('<svg ')")
    frame.js("document.getElementById('close').click()")
    frame.wait("document.querySelector('dialog') === null")
    frame.js("document.getElementById('back').click()")
    frame.wait(f"{OPEN} === null")
    type_into(frame, "#search", "plain")
    frame.wait("document.getElementById('count').textContent.includes(' of ')")
    assert tab.js("location.href") == outer.as_uri()
    problems = [p for p in tab.problems() if "clipboard" not in p.lower()]
    assert problems == []
    assert set(tab.requested()) <= {outer.as_uri(), "about:blank", "about:srcdoc"}


class Frame:
    """The frame in a page. It has a process of its own, so the browser takes it for a page."""

    def __init__(self, tab: chromium.Page):
        self._tab = tab
        tab.js("1")
        sessions = [
            event["params"]["sessionId"]
            for event in tab.events
            if event.get("method") == "Target.attachedToTarget"
            and event["params"]["targetInfo"]["type"] == "iframe"
        ]
        self._session = sessions[-1]
        for domain in ("Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")

    def _send(self, method: str, **params: tp.Any) -> tp.Any:
        outer, self._tab._session = self._tab._session, self._session
        try:
            return self._tab.send(method, **params)
        finally:
            self._tab._session = outer

    def js(self, expression: str) -> tp.Any:
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        chromium.Page.wait(tp.cast(chromium.Page, self), condition)


def test_chosen_latents_alone(tab: chromium.Page, chain: Chain, tmp_path: Path) -> None:
    """The page of `saev visuals`."""
    cfg = VisualsConfig(
        run=chain.run, shards=chain.shards, latents=(DEAD, 1), n_latents=0, out=str(tmp_path)
    )
    tab.open(f"file://{visuals.run(cfg)}")
    tab.wait(f"{ROWS}.length > 2")
    tab.click("#chosen")
    tab.wait(f"{ROWS}.length === 2")
    assert tab.js(f"{ROWS}.every(r => r.textContent.includes('★'))")
    assert sorted(tab.js(LISTED)) == [1, DEAD]
    assert "chosen=1..1" in tab.js("location.href")
    tab.click("#chosen")
    tab.wait(f"{ROWS}.length > 2")
