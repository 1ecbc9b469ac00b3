"""Which lines of pods' logs are passed on. A server answers as the Kubernetes API does."""

import collections
import contextlib
import http.server
import threading
import typing as tp
import urllib.parse

import pytest
from kubernetes import client

from saev.launch.cluster import Cluster
from saev.launch.lines import LAST_LINES, Filter, Logs

STAMP = "2026-11-27 13:00:00,000"


def test_one_line_now_and_then() -> None:
    now = [0.0]
    some = Filter(lambda: now[0])
    passed = []
    for second in range(0, 600):
        now[0] = float(second)
        if some.passes(f"{STAMP} INFO step {second}"):
            passed.append(second)
    assert passed == list(range(0, 600, 25))


@pytest.mark.parametrize(
    "line",
    [
        f"{STAMP} WARNING 3 images were left out",
        f"{STAMP} ERROR part 1 of 2 failed, and others go on",
        "saev: permanent error: no such thing",
        "Traceback (most recent call last):",
    ],
)
def test_warnings_pass_but_not_without_end(line: str) -> None:
    some = Filter(lambda: 0.0)
    assert some.passes("the first line passes")
    assert not some.passes(f"{STAMP} INFO the second does not")
    assert sum(some.passes(line) for _ in range(1000)) == 100


def test_empty_lines_do_not_count() -> None:
    some = Filter(lambda: 0.0)
    assert not some.passes(" ")
    assert some.passes("the first line passes")


class Kubernetes(http.server.BaseHTTPRequestHandler):
    """Sends a log in chunks, as the API server does; the first connection breaks."""

    protocol_version = "HTTP/1.1"
    chunks: tp.ClassVar[list[list[bytes]]]
    """Of each connection; the last one ends in order."""
    asked: tp.ClassVar[list[dict[str, str]]]

    def do_GET(self) -> None:
        query = urllib.parse.urlsplit(self.path).query
        self.asked.append(dict(urllib.parse.parse_qsl(query)))
        chunks = self.chunks.pop(0)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        if not self.chunks:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def serving(*chunks: list[bytes]) -> tp.Iterator[tuple[Cluster, list[dict[str, str]]]]:
    asked: list[dict[str, str]] = []
    handler = type("Handler", (Kubernetes,), {"chunks": list(chunks), "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    configuration = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
    configuration.retries = 0
    try:
        yield Cluster(client.ApiClient(configuration), "team"), asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_log_that_breaks_off_is_followed_again() -> None:
    broken = [f"{STAMP} WARN".encode(), b"ING \xc3", b"\xbcber 1\n" + b"half a li"]
    whole = [f"{STAMP} WARNING two\n{STAMP} ERROR thr".encode(), b"ee"]
    with serving(broken, whole) as (cluster, asked):
        written: list[str] = []
        logs = Logs(cluster, "main", written.append)
        logs.attend({"saev-train-abc-0-xyz": "slot 0"})
        logs.finish(30.0)
        logs.attend({"saev-train-abc-0-xyz": "slot 0"})
        logs.finish(30.0)
    texts = ["WARNING über 1", "WARNING two", "ERROR three"]
    assert written == [f"slot 0 | {STAMP} {text}" for text in texts]
    assert [one.get("container") for one in asked] == ["main", "main"]
    assert "sinceSeconds" not in asked[0]  # the first time, from its beginning
    assert asked[1]["sinceSeconds"] == "1"


def test_a_pod_that_failed_shows_its_last_lines() -> None:
    lines = [f"{STAMP} INFO line {i}" for i in range(LAST_LINES)]
    with serving(["\n".join(lines).encode()]) as (cluster, asked):
        written: list[str] = []
        Logs(cluster, "main", written.append).last_lines("pod", "slot 7")
    assert written == [f"slot 7 | {line}" for line in lines]
    assert asked[0]["tailLines"] == str(LAST_LINES)


def test_a_log_that_cannot_be_read_is_no_failure() -> None:
    with serving() as (cluster, _):
        written: list[str] = []
        logs = Logs(cluster, "main", written.append)
        logs.last_lines("pod", "slot 7")
        logs.attend({"pod": "slot 7"})
        logs.finish(30.0)
    assert written == []


def test_pods_that_are_over_are_forgotten() -> None:
    with serving([b"saev: a\n"], [b"saev: b\n"]) as (cluster, _):
        written: list[str] = []
        logs = Logs(cluster, "main", written.append)
        logs.attend({"one": "slot 0"})
        logs.finish(30.0)
        logs.attend({"two": "slot 1"})
        logs.finish(30.0)
    assert collections.Counter(written) == {"slot 0 | saev: a": 1, "slot 1 | saev: b": 1}
