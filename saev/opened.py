"""Serves the pages below a root on 127.0.0.1, from wherever they are stored.

`saev open` does so for results without tables, which the live explorer (:mod:`saev.serve`) cannot
show, and `saevit-client show`, which has no packages for more.
"""

import functools
import http
import http.server
import logging
import sys
import typing as tp
import urllib.parse
import webbrowser

from saev import storage
from saev.config.pages import OpenConfig
from saev.errors import ConfigError, SaevError

logger = logging.getLogger(__name__)

INDEX = "index.html"
_HOST = "127.0.0.1"
_TYPES = {".html": "text/html; charset=utf-8", ".webp": "image/webp", ".json": "application/json"}
"""The kinds of files that pages use. Other files of the root are not served."""
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
"""Somebody else may have made a page, so its scripts can load nothing, not even files beside it."""


class Place(tp.NamedTuple):
    """A page, and the folder that is served for it."""

    base: str
    """URL of the folder below which files are served."""
    path: str
    """Path of the page, relative to that folder."""


class Part(tp.NamedTuple):
    """A file of a page."""

    data: bytes
    """Its bytes."""
    kind: str
    """Its media type."""


def run(cfg: OpenConfig) -> None:
    """Serve a page until Ctrl-C. Prints its address on standard output.

    Raises:
        ConfigError: there is no page, or the port is taken.
        StorageError: the storage cannot be read.
    """
    place = find(cfg.url)
    with serve(place, cfg.port) as server:
        address = f"http://{_HOST}:{server.server_port}/{urllib.parse.quote(place.path)}"
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        logger.info("Serving %s. Ctrl-C ends it.", place.base)
        if cfg.browser and not webbrowser.open(address):
            logger.info("No browser was found: open %s.", address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("Ended.")


def find(url: str) -> Place:
    """The page of a URL, which may be a page, a root, a run, results or a report.

    If the page is below a root, the whole root is served, because its pages link to each other.

    Raises:
        ConfigError: there is no page.
    """
    url = storage.normalize(url).rstrip("/")
    is_page = storage.name(url) == INDEX
    if not is_page and storage.exists(url) and not storage.is_dir(url):
        raise ConfigError(f"{url} is a file. Expected a page ({INDEX}), or the folder of one.")
    page = url if is_page else _page_of(url)
    if not page or not storage.exists(page):
        raise ConfigError(
            f"There is no page {page or storage.join(url, INDEX)}. Give the URL that "
            "`saev visuals` or `saev run` printed, or write the page of a root with `saev report`."
        )
    base = _root_of(storage.parent(page))
    return Place(base, page.removeprefix(base.rstrip("/") + "/"))


def _page_of(folder: str) -> str:
    """URL of the page of a folder; "" if it has none."""
    for name in (INDEX, f"report/{INDEX}"):
        if storage.exists(page := storage.join(folder, name)):
            return page
    results = storage.list_dir(storage.join(folder, "inference"), missing_ok=True)
    pages = (storage.join(entry.url, "report", INDEX) for entry in results if entry.is_dir)
    return next((page for page in pages if storage.exists(page)), "")


def _root_of(folder: str) -> str:
    """The root that a report's folder is below (ROOT/runs/ID/inference/HASH/report), or itself."""
    above = folder
    for _ in range(5):
        above = storage.parent(above)
    runs = storage.join(above, "runs")
    is_below = folder.startswith(runs + "/") and storage.exists(storage.join(above, INDEX))
    return above if is_below else folder


def part(base: str, path: str) -> Part | None:
    """A file of a page; None if there is none, or if files of its kind are not served.

    Args:
        base: URL of the folder below which files are served.
        path: of the file, from a request.
    """
    kind = _TYPES.get(path[path.rfind(".") :])
    if kind is None:
        return None
    try:
        return Part(storage.read_bytes(storage.inside(base, *path.split("/"))), kind)
    except SaevError as err:
        logger.debug("%s: %s", path, err)
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files below a folder."""

    def __init__(self, *args: tp.Any, base: str):
        self._base = base
        super().__init__(*args)

    def do_GET(self) -> None:
        """Send a file."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Send the headers of a file."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (_HOST, "localhost"):  # another site, whose name resolves to this address
            return self.send_error(http.HTTPStatus.FORBIDDEN)
        path = urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/") or INDEX
        found = part(self._base, path)
        if found is None:
            return self.send_error(http.HTTPStatus.NOT_FOUND)
        self.send_response(http.HTTPStatus.OK)
        headers = {
            "Content-Type": found.kind, "Content-Length": str(len(found.data)),
            "Cache-Control": "no-cache",
            "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(found.data)
        return None

    def log_message(self, form: str, *args: tp.Any) -> None:
        """Log requests as debug messages."""
        logger.debug(form, *args)


def serve(place: Place, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of the files of a page. It answers once its ``serve_forever`` is called.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        return http.server.ThreadingHTTPServer(
            (_HOST, port), functools.partial(_Handler, base=place.base)
        )
    except OSError as err:
        raise ConfigError(
            f"--port {port} on {_HOST} cannot be used ({err.strerror}). Choose another one, or "
            "leave the flag out."
        ) from err
