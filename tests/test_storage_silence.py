"""A store that takes connections and does not answer: each way to it ends, and is told once."""

import contextlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
import s3fs
from test_storage_answers import WAYS
from test_storage_s3 import endpoint, proxy  # noqa: F401 - fixtures

from saev import storage
from saev.errors import StorageError
from saev.storage import waiting

SILENT_S = 0.5
PATIENCE_S = 0.8
NO_PARTS = [way for way in WAYS if way != "write much"]
MORE: dict[str, Callable[[str], object]] = {
    "bucket": lambda url: storage.exists(storage.parent(storage.parent(url))),
    "glob": lambda url: storage.glob(f"{storage.parent(url)}/*"),
    "is_dir": storage.is_dir,
}


@contextlib.contextmanager
def silent_server(first: bytes = b"") -> Iterator[str]:
    """Takes connections, says at most ``first`` when a request comes, and reads nothing more."""
    taken: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                connection, _ = listener.accept()
                taken.append(connection)
                if first:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        request += connection.recv(1 << 16)
                    connection.sendall(first)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SAEV_PATIENCE_S", str(PATIENCE_S))
    monkeypatch.setattr(waiting, "_LEAST_S", 0.1)
    monkeypatch.setattr(waiting, "_warned", {})
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": SILENT_S}}
    )  # as FSSPEC_S3_CONFIG_KWARGS does
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def url() -> str:
    return f"s3://saev-tests/{uuid.uuid4().hex}/x.bin"


def gives_up(way: Callable[[str], object], url: str, endpoint: str) -> None:  # noqa: F811
    ended: list[BaseException] = []

    def call() -> None:
        try:
            way(url)
        except BaseException as err:
            ended.append(err)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)  # it never came back
    assert not thread.is_alive()
    (error,) = ended
    assert isinstance(error, StorageError), error
    assert storage.is_passing(error)
    assert f"there is no answer at {endpoint} (" in str(error)


@pytest.mark.parametrize("way", [*NO_PARTS, *MORE])
def test_every_request_ends(s3: str, url, small_limits, monkeypatch, way) -> None:
    with silent_server() as place:
        monkeypatch.setenv("AWS_ENDPOINT_URL", place)
        gives_up((WAYS | MORE)[way], url, place)


def test_a_store_that_stops_to_take_a_body(s3: str, url, small_limits, monkeypatch) -> None:
    """It says that the body may come, and does not read it; the body is larger than any buffer."""
    with silent_server(b"HTTP/1.1 100 Continue\r\n\r\n") as place:
        monkeypatch.setenv("AWS_ENDPOINT_URL", place)
        gives_up(lambda url: storage.write_bytes(url, bytes(31 << 20)), url, place)


@pytest.mark.parametrize("query", ["partNumber=", "uploadId="])
def test_an_upload_in_parts_ends(url, small_limits, proxy, query) -> None:  # noqa: F811
    """Parts are silent, or their completion is (and the upload's abort)."""
    proxy.fault = lambda request: "hang" if query in request.path else ""
    gives_up(WAYS["write much"], url, proxy.url)
    assert [r for r in proxy.requests if query in r.path]


@pytest.mark.parametrize("way", ["range", "read", "walk"])
def test_an_answer_that_stops(url, small_limits, proxy, way) -> None:  # noqa: F811
    """Half of it comes, and then nothing."""
    storage.write_bytes(url, bytes(10))
    proxy.fault = lambda request: "stall" if request.method == "GET" else ""
    gives_up((WAYS | MORE)[way], url, proxy.url)


def test_slow_is_not_silent(s3: str, url, small_limits, monkeypatch) -> None:
    """An upload that takes longer than a request may be silent is not cut."""
    silent_s, pause_s, size, received = 1.5, 0.05, 24 << 20, []
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": silent_s}})
    monkeypatch.setenv("SAEV_PATIENCE_S", "20")

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as file:
            while file.readline() != b"\r\n":
                pass
            file.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            file.flush()
            while sum(received) < size:
                received.append(len(file.read(size // 48)))
                time.sleep(pause_s)
            file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        storage.write_bytes(url, bytes(size))
        thread.join()
    assert len(received) * pause_s > 1.5 * silent_s
    assert sum(received) == size


def test_an_outage_is_told_once_while_requests_hang(
    s3: str,
    url: str,
    small_limits: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of 8 threads, with the first request of each still under way."""
    monkeypatch.setattr(waiting, "QUIET_S", 0.1)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 5}})
    monkeypatch.setenv("SAEV_PATIENCE_S", "2")
    with silent_server() as place:
        monkeypatch.setenv("AWS_ENDPOINT_URL", place)
        with ThreadPoolExecutor(9) as pool:
            ways = [WAYS["range"]] * 4 + [WAYS["write"]] * 4
            calls = [pool.submit(way, url) for way in ways]
            while not caplog.records and not all(call.done() for call in calls):
                time.sleep(0.01)
            assert not any(call.done() for call in calls)
            for call in calls:
                with pytest.raises(StorageError, match="there is no answer"):
                    call.result()
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(f"The store at {place} does not answer (nothing came for ")
    assert re.search(r" It is tried again for \d s\.$", line)


@pytest.mark.parametrize("way", [*WAYS, *MORE])
def test_an_endpoint_with_a_password_is_refused_at_once(s3: str, url, monkeypatch, way) -> None:
    place = "http://user:pa55word@127.0.0.1:9"
    monkeypatch.setenv("AWS_ENDPOINT_URL", place)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"endpoint http://.* has a user or a pass") as caught:
        (WAYS | MORE)[way](url)
    s3fs.S3FileSystem.clear_instance_cache()
    assert "pa55word" not in str(caught.value)
    assert not storage.is_passing(caught.value)
