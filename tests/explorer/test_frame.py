"""`saev.show`: what a notebook gets, shown by a real browser in its frame."""

import html
from collections.abc import Iterator
from pathlib import Path

import pytest
from visuals import chromium
from visuals.chain import D_SAE, Chain

import saev
from saev.errors import ConfigError, SaevError
from saev.explorer.frame import Frame

from .test_explorer_browser import Frame as Inside


@pytest.fixture(scope="module")
def frame(chain: Chain) -> Frame:
    return saev.show(chain.run, max_mb=2, height=480)


def test_it_is_the_file_of_the_command(frame: Frame, chain: Chain, tmp_path: Path) -> None:
    from saev import cli

    out = tmp_path / "a.html"
    cli.main(["report", "--run", chain.run, "--max-mb", "2", "--out", str(out)])
    assert frame.text == out.read_text()
    assert Path(frame.save(tmp_path / "b.html")).read_text() == frame.text
    assert repr(frame) == f"<{len(frame.text.encode()) / 1e6:.1f} MB of HTML; .save(URL) writes it>"


def test_what_is_wrong_is_one_sentence(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0\.02"):
        saev.show(chain.run, max_mb=0.02)
    with pytest.raises(SaevError, match="nowhere"):
        saev.show(str(tmp_path / "nowhere"))


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    with chromium.browser() as page:
        yield page


@pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)
def test_a_notebook_shows_it(frame: Frame, tab: chromium.Page, tmp_path: Path) -> None:
    """The file is its own world: nothing is asked for, and nothing is reached from inside."""
    notebook = tmp_path / "notebook.html"
    notebook.write_text(
        f"<!doctype html><meta charset=utf-8><title>x</title><div>{frame._repr_html_()}</div>"
    )
    tab.send("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
    tab.open(notebook.as_uri())
    assert tab.js("document.querySelector('iframe').clientHeight") == 480
    inside = Inside(tab)
    listed = "document.querySelector('.list')?.getAttribute('aria-rowcount')"
    inside.wait(f"{listed} === '{D_SAE + 1}'")
    assert inside.js("self.origin") == "null"
    assert tab.problems() == []
    assert {url.partition("#")[0] for url in tab.requested()} <= {
        notebook.as_uri(), "about:blank", "about:srcdoc",
    }  # fmt: skip


def test_marimo_takes_it(frame: Frame) -> None:
    """What it makes of the value of a cell."""
    formatting = pytest.importorskip("marimo._output.formatting")
    made = formatting.try_format(frame)
    assert made.mimetype == "text/html"
    assert html.unescape(made.data.partition('srcdoc="')[2].rpartition('"')[0]) == frame.text
