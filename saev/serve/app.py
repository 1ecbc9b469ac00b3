"""The addresses of the live explorer. docs/explorer.md lists them."""

import contextlib
import functools
import importlib.resources
import math
import typing as tp

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from saev import opened, storage
from saev.errors import SaevError
from saev.serve import (
    access,
    columns,
    comparing,
    curves,
    facts,
    images,
    latents,
    matching,
    own,
    pictures,
    problems,
)
from saev.serve import notes as notes_
from saev.serve.encoding import encoded
from saev.serve.explorer import Explorer
from saev.serve.measured import Measured
from saev.serve.problems import Problem
from saev.version import __version__

_DAY = "private, max-age=86400"
_STATIC = {
    "explorer.js": "text/javascript; charset=utf-8",
    "explorer.css": "text/css; charset=utf-8",
}
_SHELL = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>saev</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="static/explorer.css">
</head>
<body><div id="app"><p class="loading">Reading the latents …</p></div>
<noscript><p class="loading">This page needs its script.</p></noscript>
<script src="static/explorer.js"></script>
</body>
</html>
"""
_MAX_NUMBER = 1 << 48


def make(explorer: Explorer, rules: access.Rules, prefix: str = "") -> ASGIApp:
    """The application.

    Args:
        explorer: what it shows.
        rules: who may ask.
        prefix: path below which it is shown, if a proxy does not take it away.
    """
    handlers: dict[tp.Any, tp.Any] = {
        SaevError: problems.of_error, HTTPException: problems.of_http,
        Exception: problems.of_bug,
    }  # fmt: skip

    app = Starlette(routes=routes(explorer), exception_handlers=handlers)
    return _Prefixed(access.Access(_Guarded(app), rules), prefix.rstrip("/"))


class _Guarded:
    """Ends errors of saev itself. They are answered and logged before, and Starlette raises them
    again for the log of its server."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(Exception):
            await self._app(scope, receive, send)


class _Prefixed:
    """Takes the prefix off the path of a request, if a proxy has not done so."""

    def __init__(self, app: ASGIApp, prefix: str):
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if self._prefix and path == self._prefix:
            await RedirectResponse(f"{self._prefix}/")(scope, receive, send)
            return
        if self._prefix and path.startswith(f"{self._prefix}/"):
            scope = {**scope, "path": path.removeprefix(self._prefix)}
            scope.pop("raw_path", None)
        await self._app(scope, receive, send)


def routes(explorer: Explorer) -> list[Route]:
    """All addresses, relative to the prefix."""
    of_run = functools.partial(_of_run, explorer)
    run = "/api/runs/{key}"
    return [
        Route("/", _shell),
        Route(access.HEALTH, _health),
        Route("/static/{name}", _static),
        Route("/pages/{path:path}", functools.partial(_page, explorer)),
        Route("/api/root", functools.partial(_root, explorer)),
        Route("/api/curves", functools.partial(_all_curves, explorer)),
        Route("/api/notes", functools.partial(_notes, explorer), methods=["GET", "PUT"]),
        Route(run, functools.partial(_run, explorer)),
        Route(f"{run}/columns", functools.partial(_columns, explorer)),
        Route(f"{run}/figures", functools.partial(_figures, explorer)),
        Route(f"{run}/examples", of_run(
            lambda m, r: latents.examples(m, _numbers(r, "latents"), _query(r, "n", 4)))),
        Route(f"{run}/curves", functools.partial(_curves, explorer)),
        Route(f"{run}/latents/{{latent}}", of_run(
            lambda m, r: latents.one(m, _path(r, "latent")))),
        Route(f"{run}/latents/{{latent}}/images", of_run(
            lambda m, r: latents.images(
                m, _path(r, "latent"), order=r.query_params.get("order", "max"),
                low=_float(r, "low", -math.inf), high=_float(r, "high", math.inf),
                class_idx=_query(r, "class"), **_slice(r)))),
        Route(f"{run}/latents/{{latent}}/matches", functools.partial(_matches, explorer)),
        Route(f"{run}/classes", of_run(lambda m, r: latents.all_classes(m))),
        Route(f"{run}/classes/{{class}}", of_run(
            lambda m, r: latents.of_class(m, _path(r, "class")))),
        Route(f"{run}/images", of_run(
            lambda m, r: images.some(m, class_idx=_query(r, "class"), **_slice(r)))),
        Route(f"{run}/images/{{example}}", of_run(
            lambda m, r: images.one(m, _path(r, "example")))),
        Route(f"{run}/images/{{example}}/tokens", of_run(
            lambda m, r: images.tokens(m, _path(r, "example"), _numbers(r, "latents")))),
        Route(f"{run}/pictures/{{example}}/{{size}}", functools.partial(_picture, explorer)),
        Route(f"{run}/nearest", of_run(
            lambda m, r: own.nearest(m, _numbers(r, "latents"), _query(r, "n", 24)))),
        *own.routes(explorer, run),
        Route(f"{run}/search", functools.partial(_search, explorer)),
        Route(f"{run}/compare", functools.partial(_compare, explorer)),
    ]  # fmt: skip


# --- Pages and files -----------------------------------------------------------------------------


async def _shell(request: Request) -> Response:
    return Response(_SHELL, media_type="text/html; charset=utf-8")


async def _health(request: Request) -> Response:
    return Response("ok\n", media_type="text/plain")


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        raise HTTPException(404)
    data = _file(name)
    return _tagged(request, data, _STATIC[name], f'"{storage.crc32c(data):08x}"', "no-cache")


@functools.cache
def _file(name: str) -> bytes:
    folder = importlib.resources.files("saev.explorer").joinpath("static")
    return folder.joinpath(name).read_bytes()


async def _page(explorer: Explorer, request: Request) -> Response:
    """A page that `saev visuals` or `saev report` wrote below the root."""
    path = request.path_params["path"] or opened.INDEX
    root = explorer.catalogue.root
    found = await explorer.pool.read(lambda: opened.part(root, path)) if root else None
    if found is None:
        raise HTTPException(404)
    return Response(
        found.data, headers={"Content-Security-Policy": opened.POLICY}, media_type=found.kind
    )


# --- Answers -------------------------------------------------------------------------------------


async def _root(explorer: Explorer, request: Request) -> Response:
    found = await explorer.pool.read(explorer.catalogue.to_dict)
    return _json({"version": __version__, "notes": explorer.notes is not None, **found})


async def _run(explorer: Explorer, request: Request) -> Response:
    """What is known of an SAE as a whole."""
    key = request.path_params["key"]
    measured = await explorer.measured(key)

    data = await _cached(explorer, request, measured, lambda: encoded(facts.facts(measured)))
    explorer.soon(key)
    return Response(data, media_type="application/json")


async def _columns(explorer: Explorer, request: Request) -> Response:
    measured = await explorer.measured(request.path_params["key"])
    wanted = [name for name in request.query_params.get("names", "").split(",") if name]
    data = await _cached(explorer, request, measured, lambda: columns.of_table(measured, wanted))
    return _tagged(request, data, "application/octet-stream", _tag(measured), "private, no-cache")


async def _figures(explorer: Explorer, request: Request) -> Response:
    measured = await explorer.with_names(request.path_params["key"])
    found = await explorer.pool.once((measured.key, "figures"), lambda: columns.figures(measured))
    kind = "application/octet-stream"
    return _tagged(request, found.data, kind, _tag(measured), "private, no-cache")


async def _curves(explorer: Explorer, request: Request) -> Response:
    """All rows of the curves of one training."""
    entry = await explorer.pool.read(lambda: explorer.catalogue.find(request.path_params["key"]))
    return _json(await explorer.pool.read(lambda: curves.whole(entry.figures["run"])))


async def _all_curves(explorer: Explorer, request: Request) -> Response:
    """The main curves of all trainings, in few points each."""

    def found() -> dict[str, tp.Any]:
        return curves.of_all(explorer.catalogue.entries(), explorer.cache)

    return _json(await explorer.pool.once("curves", found))


def _of_run(
    explorer: Explorer, make: tp.Callable[[Measured, Request], dict[str, tp.Any]]
) -> tp.Callable[[Request], tp.Awaitable[Response]]:
    """An address of an SAE whose answer is JSON, the same as long as its tables are."""

    async def answer(request: Request) -> Response:
        measured = await explorer.with_names(request.path_params["key"])
        data = await _cached(explorer, request, measured, lambda: encoded(make(measured, request)))
        return _tagged(request, data, "application/json", _tag(measured), "private, no-cache")

    return answer


async def _picture(explorer: Explorer, request: Request) -> Response:
    measured = await explorer.with_names(request.path_params["key"])
    example, size = _path(request, "example"), _path(request, "size")
    data = await explorer.pool.read(
        lambda: pictures.picture(measured, example, size, explorer.cache, explorer.originals)
    )
    return _tagged(request, data, pictures.MEDIA_TYPE, f'"{storage.crc32c(data):08x}"', _DAY)


async def _search(explorer: Explorer, request: Request) -> Response:
    searcher = await explorer.searcher(request.path_params["key"])
    query = request.query_params.get("q", "")
    return _json(await explorer.pool.read(lambda: searcher.find(query)))


async def _matches(explorer: Explorer, request: Request) -> Response:
    measured = await explorer.measured(request.path_params["key"])
    latent = _path(request, "latent")

    def found() -> dict[str, tp.Any]:
        entries = matching.others(measured, explorer.catalogue.entries())
        return matching.of_latent(measured, latent, entries, explorer.cache)

    return _json(await explorer.pool.compute(found))


async def _compare(explorer: Explorer, request: Request) -> Response:
    measured = await explorer.with_names(request.path_params["key"])
    first, second = (request.query_params.get(name, "rest") for name in ("a", "b"))
    return _json(await explorer.pool.compute(lambda: comparing.compare(measured, first, second)))


async def _notes(explorer: Explorer, request: Request) -> Response:
    notes = explorer.notes
    if notes is None:
        raise Problem(
            404, "This server keeps no notes.", "Start it with --notes URL, a file beside the runs."
        )
    if request.method == "PUT":
        body = await access.body_of(request, notes_.MAX_BYTES)
        expected = request.headers.get("if-match", "")
        tag = await explorer.pool.read(lambda: notes.write(body, expected))
        return Response(status_code=204, headers={"ETag": tag})
    data, tag = await explorer.pool.read(notes.read)
    return Response(data, headers={"ETag": tag}, media_type="application/json")


# --- Details -------------------------------------------------------------------------------------


def _json(value: tp.Any) -> Response:
    return Response(encoded(value), media_type="application/json")


async def _cached(
    explorer: Explorer, request: Request, measured: Measured, make: tp.Callable[[], bytes]
) -> bytes:
    """An answer that stays the same, which is kept."""
    key = (measured.key, request.url.path, request.url.query)
    found = explorer.cache.peek(key)
    if found is not None:
        return tp.cast(bytes, found)
    return await explorer.pool.read(lambda: explorer.cache.get(key, make))


def _tag(measured: Measured) -> str:
    return f'"{measured.version}-{__version__}"'


def _tagged(request: Request, data: bytes, kind: str, tag: str, keep: str) -> Response:
    """An answer, or none if the browser has it already."""
    headers = {"ETag": tag, "Cache-Control": keep}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=kind)


def _whole(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) < _MAX_NUMBER):
        raise Problem(400, f"{what} is {text[:40]!r}, no number.", "Give a whole number from 0.")
    return int(text)


def _path(request: Request, name: str) -> int:
    """A number in the path."""
    return _whole(request.path_params[name], name)


def _query(request: Request, name: str, default: int | None = None) -> tp.Any:
    """A number in the query."""
    text = request.query_params.get(name)
    return default if text is None else _whole(text, name)


def _slice(request: Request) -> dict[str, int]:
    return {"first": _query(request, "from", 0), "n": _query(request, "n", 50)}


def _numbers(request: Request, name: str) -> list[int]:
    return [_whole(text, name) for text in request.query_params.get(name, "").split(",") if text]


def _float(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise Problem(400, f"{name} is {text[:40]!r}, no number.", "Give a number.")
    return value
