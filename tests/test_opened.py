"""`saev open`: pages of a root on 127.0.0.1, from a disk or from an object store."""

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from saev import opened, storage
from saev.errors import ConfigError
from saev.visuals import overview

REPORT = "runs/0123/inference/4567/report"


def make(root: str) -> str:
    """A root with a page and a report; returns its URL."""
    for path, text in {
        "index.html": f'<a href="{REPORT}/index.html">x</a>',
        f"{REPORT}/index.html": "<p>report</p>",
        f"{REPORT}/a b.webp": "picture",
        "runs/0123/checkpoint/sae.safetensors": "weights",
    }.items():
        storage.write_text(storage.join(root, path), text)
    return root


@contextlib.contextmanager
def serving(place: opened.Place) -> Iterator[http.client.HTTPConnection]:
    with opened.serve(place) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        server.shutdown()
        thread.join()


def get(connection: http.client.HTTPConnection, path: str, **headers: str) -> tuple[int, bytes]:
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_a_root_is_served_from_where_it_is(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = str(tmp_path) if kind == "disk" else request.getfixturevalue("s3")
    root = make(storage.join(base, "a root"))
    page = opened.find(storage.join(root, REPORT))
    assert page == (storage.normalize(root), f"{REPORT}/index.html")
    with serving(page) as connection:
        assert get(connection, "/")[1].startswith(b"<a href")
        assert get(connection, f"/{REPORT}/index.html") == (200, b"<p>report</p>")
        assert get(connection, f"/{REPORT}/a%20b.webp") == (200, b"picture")


def test_nothing_else_is_served(tmp_path: Path) -> None:
    root = make(str(tmp_path / "root"))
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "root" / "link.html").symlink_to(tmp_path / "secret.html")
    with serving(opened.find(root)) as connection:
        for path in (
            "/runs/0123/checkpoint/sae.safetensors", "/../secret.html", "/%2e%2e/secret.html",
            "/link.html", "/..%2fsecret.html", "/missing.html", "//etc/passwd", "/runs",
        ):  # fmt: skip
            assert get(connection, path)[0] == 404, path
        # A name of another site that leads to this address (DNS rebinding).
        assert get(connection, "/", Host="evil.example:80")[0] == 403


@pytest.mark.parametrize("named", ["", "index.html", "runs/0123", "runs/0123/inference/4567"])
def test_a_page_is_found_from_any_of_its_folders(named: str, tmp_path: Path) -> None:
    root = make(str(tmp_path))
    place = opened.find(storage.join(root, named) if named else root)
    expected = "index.html" if named in ("", "index.html") else f"{REPORT}/index.html"
    assert place == (storage.normalize(root), expected)


def test_a_report_that_is_below_no_root_is_served_alone(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("x")
    assert opened.find(str(tmp_path)) == (str(tmp_path), "index.html")


def test_where_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no page .*index.html\. Give the URL"):
        opened.find(str(tmp_path / "runs"))


def test_a_file_is_no_page(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"notes.txt is a file. Expected a page \(index.html\)"):
        opened.find(str(tmp_path / "notes.txt"))


def test_a_folder_that_is_no_root_gets_no_page(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="has neither a folder runs nor a folder shards"):
            overview.report(str(folder))
        assert not (folder / "index.html").exists()
    (tmp_path / "runs").mkdir()
    assert overview.report(str(tmp_path)) == str(tmp_path / "index.html")


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "saev", "open", make(str(tmp_path)), "--no-browser"]
    command = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout
    address = command.stdout.readline().strip()
    port = int(address.split(":")[2].split("/")[0])
    assert get(http.client.HTTPConnection("127.0.0.1", port, timeout=30), "/")[0] == 200
    os.kill(command.pid, signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 0
    assert "Traceback" not in err
