"""The page of images in a real browser: what it shows of an image is what ImageReader says."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from own_images import encoded, noise
from visuals import chromium

from saev.inference.image import ImageCodes, ImageReader
from saev.inference.results import Results
from saev.serve.measured import Measured

from .conftest import Client

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)

JPEG = encoded(noise(320, 240, seed=5))
ROWS = "[...document.querySelectorAll('.fires tbody tr')]"
LISTED = f"{ROWS}.map(r => [+r.dataset.latent, +r.querySelector('td.n').dataset.value])"
HASH = "decodeURIComponent(location.hash)"


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    with chromium.browser() as page:
        yield page


@pytest.fixture
def page(tab: chromium.Page, client: Client) -> Iterator[chromium.Page]:
    tab.events.clear()
    yield tab
    assert tab.problems() == []
    ours = f"http://127.0.0.1:{client.port}/"
    assert all(url.startswith((ours, "about:", "blob:")) for url in tab.requested())


@pytest.fixture(scope="module")
def codes(measured: Measured) -> ImageCodes:
    return ImageReader.open(measured.entry.figures["run"]).read(JPEG)


def address(client: Client, measured: Measured, rest: str = "") -> str:
    return f"http://127.0.0.1:{client.port}/#/{measured.key}/image{rest}"


def choose(page: chromium.Page, *paths: Path) -> None:
    """Choose files in the page's file input, as a person does in the dialog."""
    node = page.send("Runtime.evaluate", expression="document.getElementById('own')")["result"]
    files = [str(path) for path in paths]
    page.send("DOM.setFileInputFiles", files=files, objectId=node["objectId"])


def assert_lists(page: chromium.Page, expected: dict[int, float]) -> None:
    page.wait(f"{ROWS}.length === {len(expected)}")
    found = dict(page.js(LISTED))
    assert found.keys() == expected.keys()
    for latent, value in expected.items():
        assert found[latent] == pytest.approx(value, rel=1e-4)


def peaks(codes: ImageCodes, patches: list[int] | None = None) -> dict[int, float]:
    found = codes.peaks(patches)
    return dict(zip(found.latents.tolist(), found.values.tolist(), strict=True))


def place(page: chromium.Page, patch: int) -> tuple[float, float]:
    """The middle of a patch of the 4 × 4, in the window."""
    x, y, width, height = page.js(
        "(() => { const r = document.querySelector('canvas.patches').getBoundingClientRect();"
        "return [r.x, r.y, r.width, r.height]; })()"
    )
    return x + width * (patch % 4 + 0.5) / 4, y + height * (patch // 4 + 0.5) / 4


def test_a_dropped_image_and_its_patches(
    page: chromium.Page, client: Client, measured: Measured, codes: ImageCodes
) -> None:
    page.open(address(client, measured))
    page.wait("document.querySelector('.drop [role=status]')?.textContent.includes('is ready')")
    page.js(
        f"""(() => {{
          const bytes = new Uint8Array({list(JPEG)});
          const files = new DataTransfer();
          files.items.add(new File([bytes], "mine.jpg", {{type: "image/jpeg"}}));
          const drop = kind => document.querySelector(".drop").dispatchEvent(new DragEvent(kind,
            {{dataTransfer: files, bubbles: true, cancelable: true}}));
          drop("dragover");
          drop("drop");
        }})()"""
    )
    page.wait("document.querySelector('canvas.patches') !== null")
    assert_lists(page, peaks(codes))
    assert page.js("document.querySelector('figcaption b').textContent") == "mine.jpg"

    for kind in ("mousePressed", "mouseReleased"):  # one patch
        x, y = place(page, 5)
        page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert_lists(page, peaks(codes, [5]))
    assert page.js(HASH).endswith("?p0=5")
    page.drag(place(page, 10), place(page, 15))  # and a rectangle
    assert_lists(page, peaks(codes, [5, 10, 11, 14, 15]))

    latent = int(codes.peaks([5]).latents[0])
    row = f".fires tr[data-latent='{latent}']"
    x, y = page.js(
        f"(() => {{ const r = document.querySelector({json.dumps(row)}).getBoundingClientRect();"
        "return [r.x + 20, r.y + r.height / 2]; })()"
    )
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait(f"document.querySelector('canvas.patches').dataset.drawn === '{latent}'")
    page.js("document.querySelector('canvas.patches').focus()")
    page.key("Escape")
    assert_lists(page, peaks(codes))
    values = f"{LISTED}.map(([_, value]) => value)"
    page.js(
        "[...document.querySelectorAll('.fires thead button')]"
        ".find(b => b.textContent === 'Value').click()"
    )
    page.wait(f"({values}).every((value, i, all) => !i || all[i - 1] >= value)")
    assert page.js("document.querySelector('[aria-sort]').textContent") == "Value"


def test_two_images_share_some_latents(
    page: chromium.Page, client: Client, measured: Measured, codes: ImageCodes, tmp_path: Path
) -> None:
    (tmp_path / "mine.jpg").write_bytes(JPEG)
    page.open(address(client, measured, "/3"))
    page.wait("document.querySelector('canvas.patches') !== null")
    choose(page, tmp_path / "mine.jpg")
    page.wait("document.querySelectorAll('.fires').length > 1")
    table = Results.open(measured.results.url).image_tokens(3)
    of_dataset = set(table["latent"].to_pylist())
    mine = set(codes.latents.tolist())
    lists = page.js(
        "Object.fromEntries([...document.querySelectorAll('section.card:has(.fires)')].map(s => "
        "[s.ariaLabel, [...s.querySelectorAll('tbody tr')].map(r => +r.dataset.latent)]))"
    )
    name = page.js("document.querySelector('figcaption b').textContent")
    expected = {
        "On all 2 images": of_dataset & mine,
        f"Only on {name}": of_dataset - mine,
        "Only on mine.jpg": mine - of_dataset,
    }
    assert {title: set(rows) for title, rows in lists.items()} == {
        title: rows for title, rows in expected.items() if rows
    }


def test_nearest_images_and_a_link_to_them(
    page: chromium.Page, client: Client, measured: Measured
) -> None:
    counts = Results.open(measured.results.url).counts
    table = measured.rows("token_acts_by_image", 3)
    here = np.unique(table["latent"].to_numpy())
    latent = int(here[np.argmax(counts[here])])
    page.open(address(client, measured, f"/3?l={latent}"))
    page.wait("document.querySelector('.nearest a') !== null")
    found = client.get(f"/api/runs/{measured.key}/nearest?latents={latent}")["images"]
    expected = [row["example"] for row in found if row["example"] != 3][:12]
    listed = page.js("[...document.querySelectorAll('.nearest a')].map(a => +a.dataset.example)")
    assert listed == expected
    page.click(".nearest a")
    page.wait("document.querySelectorAll('canvas.patches').length === 2")
    assert page.js(HASH).endswith(f"/image/3,{expected[0]}")
    page.reload()
    page.wait("document.querySelectorAll('canvas.patches').length === 2")


def test_a_latent_s_images_lead_to_their_page(
    page: chromium.Page, client: Client, measured: Measured
) -> None:
    latent = int(np.argmax(Results.open(measured.results.url).counts))
    page.open(f"http://127.0.0.1:{client.port}/#/{measured.key}/latent/{latent}")
    page.wait("document.querySelector('.pictures figcaption a') !== null")
    example = measured.rows("examples", latent)["example"][0].as_py()
    page.click(".pictures figcaption a")
    page.wait("document.querySelector('canvas.patches') !== null")
    assert page.js(HASH).endswith(f"/image/{example}?l={latent}")
    page.wait(f"document.querySelector(\"tr[data-latent='{latent}'] input\")?.checked === true")


def test_what_is_no_image_is_said(
    tab: chromium.Page, client: Client, measured: Measured, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    tab.open(address(client, measured))
    tab.wait("document.querySelector('.drop') !== null")
    choose(tab, tmp_path / "notes.txt")
    tab.wait("document.querySelector('[role=alert]') !== null")
    said = tab.js("document.querySelector('[role=alert]').textContent")
    assert "Cannot decode notes.txt" in said
    assert "Take another file" in said
    assert "--" not in said  # a flag of a command would not help here
