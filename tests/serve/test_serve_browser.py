"""The live explorer in a browser: it shows the numbers of the results, and asks nobody else."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from visuals import chromium
from visuals.chromium import Page

from saev import storage
from saev.inference.results import Results
from saev.serve import access, app
from saev.serve.catalogue import Catalogue
from saev.serve.explorer import Explorer
from saev.serve.measured import Measured
from saev.serve.notes import check

from .conftest import Client, serving

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium.browser() as tab:
        yield tab


@pytest.fixture
def tab(browser: Page, client: Client, measured: Measured) -> Iterator[Page]:
    """The list of an SAE's latents, with pictures. Nothing may go wrong in the test."""
    browser.events.clear()
    browser.open(f"http://127.0.0.1:{client.port}/#/{measured.key}")
    browser.wait("document.querySelectorAll('.rows canvas[data-drawn]').length > 3")
    yield browser
    assert browser.problems() == []
    own = f"http://127.0.0.1:{client.port}/"
    assert all(url.startswith((own, "data:", "blob:", "about:")) for url in browser.requested())


def text(tab: Page, selector: str) -> str:
    found: str = tab.js(f"document.querySelector({selector!r}).innerText")
    return found


def test_the_numbers_are_those_of_the_results(tab: Page, measured: Measured) -> None:
    results = Results.open(measured.results.url)
    latent = int(tab.js("document.querySelector('.rows .row').dataset.latent"))
    shown = tab.js(
        "Object.fromEntries([...document.querySelector('.rows .row').querySelectorAll("
        "'[data-column]')].map(e => [e.dataset.column, e.innerText.split('\\n')]))"
    )
    table = results.latents(["frequency", "frequency_held_out"]).to_pylist()[latent]
    numbers = [float(one.strip("%")) / 100 for one in shown["frequency"]]
    assert numbers == pytest.approx([table["frequency_held_out"], table["frequency"]], rel=0.01)


def test_from_the_list_to_a_latent_and_back(tab: Page, client: Client, measured: Measured) -> None:
    latent = int(tab.js("document.querySelector('.rows .row').dataset.latent"))
    tab.click(".rows .row .name a")
    tab.wait(f"location.hash.endsWith('/latent/{latent}')")
    tab.wait("document.querySelectorAll('main canvas[data-drawn]').length >= 4")
    assert f"Latent {latent}" in text(tab, "main")
    found = client.get(f"/api/runs/{measured.key}/latents/{latent}")
    drawn = tab.js("[...document.querySelectorAll('main canvas[data-drawn]')]"
                   ".map(e => Number(e.dataset.drawn))")  # fmt: skip
    top = [one["example"] for one in found["examples"] if one["kind"] == "top"]
    assert top[0] in drawn
    tab.js("history.back()")
    tab.wait("document.querySelectorAll('.rows .row').length > 3")
    assert "/latent/" not in tab.js("location.hash")


def test_an_address_opens_what_it_names(tab: Page, client: Client, measured: Measured) -> None:
    latent = int(np.argmax(measured.results.counts))
    tab.open(f"http://127.0.0.1:{client.port}/#/{measured.key}/latent/{latent}")
    tab.wait(f"document.querySelector('main')?.innerText.includes('Latent {latent}')")
    tab.wait("document.querySelectorAll('main canvas[data-drawn]').length >= 4")


def test_the_search_finds_what_the_server_finds(
    tab: Page, client: Client, measured: Measured
) -> None:
    expected = client.get(f"/api/runs/{measured.key}/search?q=pl%C3%A1in")["latents"]
    assert 0 < len(expected) < measured.d_sae
    tab.js(
        "(() => { const e = document.getElementById('search'); e.value = 'pláin';"
        "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    tab.wait(f"document.getElementById('count').textContent.startsWith('{len(expected)} of')")
    rows = "[...document.querySelectorAll('.rows .row')].map(e => Number(e.dataset.latent))"
    assert set(tab.js(rows)) <= set(expected)


def test_from_all_saes_to_one_and_back(tab: Page, client: Client, measured: Measured) -> None:
    saes = {sae["key"]: sae for sae in client.get("/api/root")["saes"]}
    tab.open(f"http://127.0.0.1:{client.port}/")
    tab.wait("document.querySelectorAll('table.saes tbody tr').length === 3")
    rows = tab.js("[...document.querySelectorAll('table.saes tbody tr')].map(e => e.innerText)")
    (mine,) = [row for row in rows if row.startswith(saes[measured.key]["name"])]
    nmse = saes[measured.key]["nmse"]
    assert any(float(w) == pytest.approx(nmse, rel=0.01) for w in mine.split() if is_number(w))
    tab.click(f"a[href='#/{measured.key}']")
    tab.wait("document.querySelectorAll('.rows canvas[data-drawn]').length > 3")
    tab.js("history.back()")
    tab.wait("document.querySelectorAll('table.saes tbody tr').length === 3")
    assert "images that training has not seen" in text(tab, "header")


def test_two_groups_are_compared_in_the_page(tab: Page, client: Client, measured: Measured) -> None:
    found = client.get(f"/api/runs/{measured.key}/compare?a=class:0&b=rest")["first"][0]
    tab.open(f"http://127.0.0.1:{client.port}/#/{measured.key}/compare?a=class:0&b=rest")
    tab.wait("document.querySelectorAll('main table tbody tr').length > 1")
    first = text(tab, "main table tbody tr")
    assert first.split()[0] == str(found["latent"])
    shares = [float(word.strip("%")) / 100 for word in first.split() if word.endswith("%")]
    assert shares == pytest.approx(found["rates"], rel=0.01, abs=0.005)


def is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()


def test_the_same_latent_in_another_sae(tab: Page, client: Client, measured: Measured) -> None:
    latent = int(np.argmax(measured.results.counts))
    (match,) = client.get(f"/api/runs/{measured.key}/latents/{latent}/matches")["matches"]
    tab.open(f"http://127.0.0.1:{client.port}/#/{measured.key}/latent/{latent}")
    link = f"#/{match['run']}/latent/{match['latent']}"
    tab.wait(f"[...document.querySelectorAll('a')].some(e => e.getAttribute('href') === '{link}')")


def test_a_frame_shows_only_what_is_looked_at(
    tab: Page, client: Client, measured: Measured
) -> None:
    tab.open(f"http://127.0.0.1:{client.port}/?embed=1#/{measured.key}/latent/1")
    tab.wait("document.querySelector('main')?.innerText.includes('Latent 1')")
    assert tab.js("getComputedStyle(document.querySelector('footer')).display") == "none"


def test_two_who_write_notes_lose_none(
    browser: Page, root: str, measured: Measured, tmp_path: Path
) -> None:
    """The page has read the notes; somebody else writes one; then the page writes one."""
    place = tmp_path / "notes.json"
    explorer = Explorer(Catalogue.of(root), 1024, check(str(place)))
    with serving(app.make(explorer, access.Rules.of("127.0.0.1", (), ""))) as client:
        browser.open(f"http://127.0.0.1:{client.port}/#/{measured.key}/latent/1")
        browser.wait("document.querySelector('.notes')?.innerText.includes('on the server')")
        theirs = {measured.results.url: {"7": {"text": "theirs", "tags": []}}}
        tag = client.ask("/api/notes")[1]["ETag"]
        body = json.dumps(theirs).encode()
        assert client.ask("/api/notes", "PUT", body, If_Match=tag)[0] == 204
        browser.js(
            "(() => { const e = document.getElementById('note'); e.value = 'mine';"
            "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        deadline = time.monotonic() + 60
        while "mine" not in place.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        notes = json.loads(place.read_text())[measured.results.url]
        assert {latent: note["text"] for latent, note in notes.items()} == {
            "1": "mine", "7": "theirs",
        }  # fmt: skip


def test_an_sae_that_is_not_there_is_told(browser: Page, client: Client) -> None:
    browser.open(f"http://127.0.0.1:{client.port}/#/nothing")
    browser.wait("document.querySelector('[role=alert]') !== null")
    assert "There is no SAE 'nothing' here." in text(browser, "[role=alert]")


def test_an_sae_measured_on_two_datasets(
    browser: Page, root: str, measured: Measured, tmp_path: Path
) -> None:
    """It is chosen by dataset, and has one curve of training."""
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    first = copy / Path(measured.results.url).relative_to(root)
    second = shutil.copytree(first, first.with_name("f" * 16))
    metrics = json.loads((second / "metrics.json").read_text())
    del metrics["checksum"]
    metrics["shards_hash"] = "0" * 16
    (second / "metrics.json").write_text(json.dumps(storage.seal(metrics)))
    explorer = Explorer(Catalogue.of(str(copy)), 1024)
    with serving(app.make(explorer, access.Rules.of("127.0.0.1", (), ""))) as client:
        keys = [sae["key"] for sae in client.get("/api/root")["saes"] if sae["top_k"] == 2]
        assert len(keys) == 2
        browser.open(f"http://127.0.0.1:{client.port}/")
        browser.wait("document.querySelectorAll('table.saes tbody tr').length === 4")
        lines = browser.js("[...document.querySelectorAll('.legend li')].map(e => e.innerText)")
        assert len(lines) == len(set(lines)) == 3
        own = next(key for key in keys if key.endswith(second.name))
        browser.open(f"http://127.0.0.1:{client.port}/#/{next(k for k in keys if k != own)}")
        browser.wait("document.querySelector('.runs optgroup') !== null")
        group = f".runs optgroup[label='{'0' * 16}'] option"
        assert browser.js(f"document.querySelector({group!r}).value") == own
