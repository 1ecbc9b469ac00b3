"""Stands between a client and an S3 server: records requests, and fails as it is told."""

import contextlib
import http.client
import http.server
import ssl
import threading
import typing as tp
import urllib.parse
from collections.abc import Callable, Iterator


class Request(tp.NamedTuple):
    """A request that was made."""

    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    port: int
    """Of the client: of one connection."""

    @property
    def access_key(self) -> str:
        """Of the signature; empty if it was not signed."""
        return self.headers.get("authorization", "").partition("Credential=")[2].partition("/")[0]


Fault = tp.Literal["", "reset", "cut", "503", "403", "flip"]


class Proxy:
    """What it saw, and what it is to do."""

    def __init__(self, url: str):
        self.url = url
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault] = lambda request: ""
        """Says what becomes of a request: a broken connection, half an answer, an error, or an
        answer in whose body one bit is flipped."""
        self.flipped_bit: Callable[[int], int] = lambda n_bits: n_bits // 2
        """Which one, of so many."""
        self.lock = threading.Lock()

    def gets(self, name: str = "") -> list[Request]:
        """GETs of an object whose key ends so."""
        with self.lock:
            return [
                r
                for r in self.requests
                if r.method == "GET" and urllib.parse.urlsplit(r.path).path.endswith(name)
            ]


def flip(data: bytes, bit: int) -> bytes:
    """``data`` with one bit the other way."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@contextlib.contextmanager
def before(endpoint: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """A proxy before a server, on a port of its own; it speaks TLS if it is given a context."""
    target = urllib.parse.urlsplit(endpoint).netloc

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                super().handle_one_request()
                return
            self.close_connection = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(
                self.command,
                self.path,
                {k.lower(): v for k, v in self.headers.items()},
                self.client_address[1],
            )
            with proxy.lock:
                proxy.requests.append(request)
                fault = proxy.fault(request)
            if fault == "reset":
                self.close_connection = True
                return
            if fault.isdigit():
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(target, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            self.send_response(answer.status)
            length = answer.headers.get("Content-Length", "0")
            for key, value in answer.headers.items():
                if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(key, value)
            # HEAD has no body, and says how long it would be.
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
            self.end_headers()
            if fault == "flip" and data:
                data = flip(data, proxy.flipped_bit(8 * len(data)))
            if fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            else:
                self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    proxy = Proxy(f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
