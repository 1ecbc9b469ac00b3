"""The documentation as a site: built strictly, whole, and searched in a real browser."""

import contextlib
import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from visuals import chromium

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: a broken link or an unlisted page is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "mkdocs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_public_name_is_documented(site: Path, hooks: ModuleType) -> None:
    """mkdocstrings leaves out what has no docstring. A name counts where Python finds it."""
    for package in hooks.PACKAGES:
        module = importlib.import_module(package)
        html = (site / "api" / f"{package}.html").read_text()
        for name in hooks.public_names(package):
            assert hasattr(module, name), f"{package} has no {name}"
            assert f'id="{package}.{name}"' in html, f"{package}.{name} is not documented"


@pytest.mark.slow
def test_every_page_of_docs_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists(), page.name
    home = (site / "index.html").read_text()
    assert 'href="guide.html"' in home
    assert 'href="changelog.html"' in home


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?([^\s\">]+)", page.read_text()
        )
        outside = [url for url in loaded if re.match(r"(https?:)?//", url)]
        assert not outside, f"{page.name}: {outside}"


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server for a folder; the search does not work in files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_the_last_lines_say_what_was_skipped_and_how_to_have_it() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "function"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": ""}
    )
    assert done.returncode == 0, done.stdout
    reason, total = done.stdout.splitlines()[-2:]
    assert reason.startswith("SKIPPED [1] tests/test_site.py")
    assert reason.endswith(chromium.MISSING)
    assert "1 skipped" in total


@pytest.mark.slow
def test_the_last_lines_say_how_many_slow_tests_were_left_out() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-n", "2"]
    done = subprocess.run(
        [*command, "-m", "not slow", "-k", "finds_a_function"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 5, done.stdout  # nothing ran
    assert (
        "1 slow tests were left out: `make test-slow` runs them, `make test-all` runs all."
        in done.stdout.splitlines()[-3:]
    )


@pytest.mark.slow
@pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)
def test_the_search_finds_a_function(site: Path) -> None:
    with served(site) as url, chromium.browser() as page:
        page.open(f"{url}/index.html?q=load_sae")
        page.wait("document.querySelectorAll('.md-search-result__item a').length > 0")
        found = page.js(
            "[...document.querySelectorAll('.md-search-result__item a')].map(a => a.href)"
        )
        assert any("python-api.html" in url for url in found), found
        assert any(
            re.search(r"api/saev(\.nn)?\.html#saev(\.nn)?\.load_sae", url) for url in found
        ), found
        assert page.problems() == []
