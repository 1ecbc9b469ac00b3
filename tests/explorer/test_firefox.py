"""The file in Firefox, once: it draws, filters and opens a latent."""

import json
import shutil
import socket
import subprocess
import time
import typing as tp
from collections.abc import Iterator
from pathlib import Path

import pytest

BINARY = shutil.which("firefox-esr") or shutil.which("firefox")
websocket = pytest.importorskip("websocket", reason="needs the package websocket-client")
pytestmark = pytest.mark.skipif(BINARY is None, reason="no Firefox: apt-get install firefox-esr")

SECONDS = 90.0


class Firefox:
    """One tab, through WebDriver BiDi."""

    def __init__(self, port: int):
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                url = f"ws://127.0.0.1:{port}/session"
                self._socket = websocket.create_connection(
                    url, timeout=SECONDS, suppress_origin=True
                )
                break
            except OSError:
                assert time.monotonic() < deadline, "Firefox does not answer"
                time.sleep(0.2)
        self._id = 0
        self.send("session.new", capabilities={})
        self._tab = self.send("browsingContext.getTree")["contexts"][0]["context"]

    def send(self, method: str, **params: tp.Any) -> tp.Any:
        self._id += 1
        self._socket.send(json.dumps({"id": self._id, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._id:
            pass
        assert answer["type"] == "success", answer
        return answer["result"]

    def open(self, url: str) -> None:
        self.send("browsingContext.navigate", context=self._tab, url=url, wait="complete")

    def js(self, expression: str) -> tp.Any:
        found = self.send(
            "script.evaluate", expression=f"JSON.stringify({expression})",
            target={"context": self._tab}, awaitPromise=True,
        )  # fmt: skip
        assert found["type"] == "success", found
        return json.loads(found["result"]["value"])

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.05)


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BINARY, "--headless", "--no-remote", "--profile", str(tmp_path),
               f"--remote-debugging-port={port}", "about:blank"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Firefox(port)
    finally:
        process.terminate()
        process.wait(30)


def test_the_file_works(firefox: Firefox, file: Path) -> None:
    firefox.open(file.as_uri())
    rows = "document.querySelectorAll('.rows .row')"
    firefox.wait(f"{rows}.length > 3 && document.querySelector('.thumbs canvas[data-drawn]')")
    latent = firefox.js(f"{rows}[0].dataset.latent")
    firefox.js(
        "(() => { const e = document.getElementById('search'); e.value = 'pláin';"
        "e.dispatchEvent(new Event('input', {bubbles: true})); })() ?? null"
    )
    firefox.wait("document.getElementById('count').textContent.includes(' of ')")
    firefox.js(f"(location.hash = '#/0/latent/{latent}')")
    firefox.wait("document.querySelectorAll('.pictures canvas[data-drawn]').length > 3")
    firefox.js("document.getElementById('figure').click() ?? null")
    firefox.wait("document.querySelector('dialog[open] #png:enabled')")
