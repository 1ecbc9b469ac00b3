"""The page's script, in a real browser."""

from collections.abc import Iterator

import pytest

from saev import visuals
from visuals import chromium
from visuals.chain import DEAD, Chain

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)


@pytest.fixture(scope="module")
def url(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("browser"))
    return "file://" + visuals.run(chain.config(latents=(DEAD, 1), out=out))


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    with chromium.browser() as page:
        yield page


@pytest.fixture
def page(tab: chromium.Page, url: str) -> Iterator[chromium.Page]:
    tab.events.clear()
    tab.open(url)
    yield tab
    assert tab.problems() == []
    assert all(u.startswith((url.rpartition("/")[0], "about:", "data:")) for u in tab.requested())


SHOWN = (
    "[...document.querySelectorAll('.latent')].filter(c => c.offsetParent).map(c => +c.dataset.id)"
)
OPEN = "[...document.querySelectorAll('.latent.open')].map(c => +c.dataset.id)"


def visible(page: chromium.Page, selector: str) -> list[str]:
    """Class of each picture that can be seen."""
    return page.js(
        f"[...document.querySelector({selector!r}).querySelectorAll('img')]"
        ".filter(i => getComputedStyle(i).display !== 'none').map(i => i.className)"
    )


def test_all_latents_are_there_by_frequency(page: chromium.Page) -> None:
    shown = page.js(SHOWN)
    frequencies = page.js(
        "[...document.querySelectorAll('.latent')].map(c => +c.dataset.frequency)"
    )
    assert len(shown) == 6
    assert frequencies == sorted(frequencies, reverse=True)
    assert shown[-1] == DEAD


def test_pictures_load(page: chromium.Page) -> None:
    page.js("document.querySelectorAll('img').forEach(i => { i.loading = 'eager'; })")
    page.wait(
        "[...document.querySelectorAll('.highlight')]"
        ".every(i => i.complete && i.naturalWidth === 96)"
    )


def test_sort(page: chromium.Page) -> None:
    for order, attribute in (("max", "max"), ("id", "id"), ("frequency", "frequency")):
        page.js(
            f"(() => {{ const s = document.getElementById('sort'); s.value = '{order}';"
            "s.dispatchEvent(new Event('change')); })()"
        )
        values = page.js(
            f"[...document.querySelectorAll('.latent')].map(c => +c.dataset.{attribute})"
        )
        assert values == sorted(values, reverse=order != "id")


def test_arrows_leaf_through_and_wrap_around(page: chromium.Page) -> None:
    order = page.js(SHOWN)
    for expected in [*order, order[0]]:
        page.key("ArrowRight")
        page.wait(f"JSON.stringify({OPEN}) === '[{expected}]'")
        assert page.js(SHOWN) == [expected]
    page.key("ArrowLeft")
    page.wait(f"JSON.stringify({OPEN}) === '[{order[-1]}]'")
    assert "6 of 6" in page.js("document.getElementById('count').textContent")
    page.key("Escape")
    page.wait(f"({SHOWN}).length === 6")


def test_address_opens_a_latent(page: chromium.Page, url: str) -> None:
    page.open(url + "#latent-1")
    page.wait(f"JSON.stringify({OPEN}) === '[1]'")
    assert page.js("document.activeElement.id") == "latent-1"


def test_click_opens_and_pictures_switch(page: chromium.Page) -> None:
    page.click("#latent-1 h2")
    page.wait(f"JSON.stringify({OPEN}) === '[1]'")
    first = "#latent-1 figure"
    assert visible(page, first) == ["highlight"]
    for key, kind in (("p", "plain"), ("c", "segmentation"), ("h", "highlight")):
        page.key(key)
        assert visible(page, first) == [kind]
        pressed = page.js("document.querySelector('[aria-pressed=true]').dataset.setShow")
        assert pressed == kind
    page.click("#latent-1 figure .pic")  # the pointer rests on it: plain lies on top
    assert "plain" in visible(page, first)
    on_top = page.js(
        "(() => { const r = document.querySelector('#latent-1 .pic').getBoundingClientRect();"
        "return document.elementFromPoint(r.x + 20, r.y + 20).className; })()"
    )
    assert on_top == "plain"


def test_filter_by_number_and_label(page: chromium.Page) -> None:
    def filtered(text: str) -> list[int]:
        page.js(
            f"(() => {{ const f = document.getElementById('filter'); f.value = {text!r};"
            "f.dispatchEvent(new Event('input')); })()"
        )
        return page.js(SHOWN)

    assert filtered(str(DEAD)) == [DEAD]
    assert filtered("NOISE") != []
    assert DEAD not in filtered("noise")
    assert filtered("no such label") == []
    assert page.js("document.getElementById('nothing').hidden") is False
    assert len(filtered("")) == 6


def test_typing_in_the_filter_is_not_a_command(page: chromium.Page) -> None:
    page.key("/")
    assert page.js("document.activeElement.id") == "filter"
    page.key("p")
    assert page.js("document.getElementById('filter').value") == "p"
    assert page.js("document.body.dataset.show") == "highlight"


def test_hostile_labels_do_not_run(page: chromium.Page) -> None:
    assert page.js("document.querySelectorAll('script').length") == 1
    assert page.js("document.querySelectorAll('img[src=x]').length") == 0
    # And if escaping ever failed, the policy would still refuse.
    page.js(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit = 1\">');"
    )
    page.wait("performance.now() > 300")
    assert page.js("window.hit === undefined")
    page.events.clear()  # the refusal is what was wanted


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (820, True), (360, False)])
def test_nothing_overflows(tab: chromium.Page, url: str, width: int, dark: bool) -> None:
    for address in (url, url + "#latent-1"):
        tab.open(address, width=width, height=800, dark=dark)
        assert tab.js("document.documentElement.scrollWidth <= innerWidth"), address
    background = tab.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 27)" if dark else "rgb(251, 251, 250)")


def test_without_scripts_everything_is_shown(tab: chromium.Page, url: str) -> None:
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(url)
        tab.wait(f"document.readyState === 'complete' && ({SHOWN}).length === 6")
        assert tab.js("document.documentElement.className") == "static"
        assert visible(tab, "#latent-1 figure") == ["highlight"]
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)
