"""Stands between a client and an S3 server: records requests, and fails as it is told."""

import contextlib
import functools
import http.client
import http.server
import ssl
import threading
import types
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


class Reply(tp.NamedTuple):
    """An answer of the proxy itself. HEAD gets it without the body, as from a store."""

    status: int
    body: bytes = b""
    headers: tp.Mapping[str, str] = types.MappingProxyType({})


def error(status: int, code: str, message: str = "", **fields: str) -> Reply:
    """What S3 answers: the XML of
    https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html."""
    more = "".join(f"<{key}>{value}</{key}>" for key, value in fields.items())
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
        f"<Message>{message}</Message>{more}<RequestId>4442587FB7D0A2F9</RequestId></Error>"
    )
    return Reply(status, text.encode(), {"Content-Type": "application/xml"})


Fault = str | Reply
"""What becomes of a request:

- "": it is passed on.
- "reset": the connection breaks before it is passed on.
- "lost": it is passed on, and the connection breaks instead of an answer.
- "cut": half of the answer comes.
- "stall": half of the answer comes, and nothing more until the client gives up.
- "twice": it is passed on twice; the second answer comes.
- "late": the connection breaks, and it is passed on at Proxy.release().
- "flip": one bit of the answer's body is another.
- "hang": nothing comes, until the client gives up.
- a number like "503": that status, without a body.
- a Reply: that.
"""


class Sent(tp.NamedTuple):
    """What the server answered."""

    status: int
    headers: dict[str, str]
    body: bytes


class Proxy:
    """What it saw, and what it is to do."""

    def __init__(self, url: str):
        self.url = url
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault] = lambda request: ""
        """Says what becomes of a request."""
        self.flipped_bit: Callable[[int], int] = lambda n_bits: n_bits // 2
        """Which bit "flip" changes, of so many."""
        self.lock = threading.Lock()
        self.held: list[tuple[Request, Callable[[], int]]] = []
        """Requests that came to "late"; each call passes one on and returns the status."""

    def release(self, which: Callable[[Request], bool] = lambda request: True) -> list[int]:
        """Pass on what is held, in the order in which it came."""
        with self.lock:
            held, self.held = self.held, []
        return [send() for request, send in held if which(request)]

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


def status_of(send: Callable[[], Sent]) -> int:
    """The status of an answer; 599 if the server breaks the connection instead."""
    try:
        return send().status
    except (OSError, http.client.HTTPException):
        return 599


@contextlib.contextmanager
def before(endpoint: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """A proxy before a server, on a port of its own; it speaks TLS if it is given a context."""
    target = urllib.parse.urlsplit(endpoint).netloc

    def send(method: str, path: str, body: bytes, headers: dict[str, str]) -> Sent:
        connection = http.client.HTTPConnection(target, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return Sent(answer.status, dict(answer.headers.items()), data)

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
            if isinstance(fault, str) and fault.isdigit():
                fault = Reply(int(fault))
            if isinstance(fault, Reply):
                self.reply(fault.status, fault.headers, fault.body, len(fault.body))
                return
            if fault == "hang":
                self.wait_for_the_end()
            if fault in ("reset", "hang"):
                self.close_connection = True
                return
            headers = dict(self.headers.items())
            if fault == "late":
                with proxy.lock:
                    later = functools.partial(send, self.command, self.path, body, headers)
                    proxy.held.append((request, functools.partial(status_of, later)))
                self.close_connection = True
                return
            for _ in range(2 if fault == "twice" else 1):
                status, found, data = send(self.command, self.path, body, headers)
            if fault == "lost":
                self.close_connection = True
                return
            if fault == "flip" and data:
                data = flip(data, proxy.flipped_bit(8 * len(data)))
            length = int(found.get("Content-Length") or 0)
            cut = len(data) // 2 if fault in ("cut", "stall") else len(data)
            # HEAD has no body, and says how long it would be.
            n_bytes = length if self.command == "HEAD" else len(data)
            self.reply(status, found, data[:cut], n_bytes)
            if fault == "stall":
                self.wfile.flush()
                self.wait_for_the_end()
            if fault in ("cut", "stall"):
                self.close_connection = True

        def wait_for_the_end(self) -> None:
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # nothing comes before it, as the request was read

        def reply(
            self, status: int, headers: tp.Mapping[str, str], body: bytes, n_bytes: int
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(n_bytes))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

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
