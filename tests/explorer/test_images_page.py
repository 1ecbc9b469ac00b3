"""The page of images in the file, which has no model to run."""

from pathlib import Path

import pytest
from visuals import chromium

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)


def test_the_file_says_that_it_needs_a_server(file: Path) -> None:
    with chromium.browser() as page:
        page.open(file.as_uri())
        page.wait("document.querySelector('nav.pages') !== null")
        page.js("[...document.querySelectorAll('nav a')].find(a => a.text === 'Images').click()")
        page.wait("document.querySelector('main.images') !== null")
        assert "saev serve --root" in page.js("document.querySelector('main').textContent")
        assert page.js("document.querySelectorAll('main input').length") == 0
        assert page.problems() == []
