"""Who may ask: hosts, origins, the token; and what browsers may do with answers."""

import dataclasses
import hmac
import secrets
import typing as tp
import urllib.parse

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saev.serve import problems

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "saev_token"
HEALTH = "/healthz"
"""Answers everybody that the server lives, and nothing else."""
MAX_BODY = 64 << 20
"""Most bytes of a request."""
_SAFE = ("GET", "HEAD")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_LOCAL_FRAMES = " http://localhost:* http://127.0.0.1:*"
"""A notebook on this machine may show a page with ?embed=1."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Who may ask."""

    hosts: frozenset[str]
    """Names under which the server is asked, in lower case, without ports."""
    proxies: frozenset[str] = frozenset()
    """Those of them under which a proxy shows it."""
    token: str = ""
    """What each request must show; "" for none."""
    path: str = "/"
    """Of the cookie."""

    @classmethod
    def of(cls, host: str, behind_proxy: tp.Sequence[str], prefix: str, token: str = "") -> tp.Self:
        """The rules of a server.

        Args:
            host: address that it listens on.
            behind_proxy: names under which a proxy shows it, which knows who may look.
            prefix: path below which it is shown.
            token: given by the user; by default a new one, where one is needed.
        """
        proxies = frozenset(map(bare, behind_proxy))
        is_open = bare(host) not in LOOPBACK and not behind_proxy
        if is_open:
            token = token or secrets.token_urlsafe(32)
        path = f"{prefix.rstrip('/')}/"
        return cls(proxies | frozenset(LOOPBACK), proxies, token, path)


def bare(host: str) -> str:
    """A host's name without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]


class Access:
    """Refuses requests that break the rules, and adds headers to all answers.

    Without a token, a request must name a known host: a page of another site could let its own name
    lead to this address (DNS rebinding), and its browser would then let it read all answers.
    A request with an ``Origin``, which a browser adds for scripts, must come from this server's own
    pages.
    """

    def __init__(self, app: ASGIApp, rules: Rules):
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_headers(MutableHeaders(raw=message["headers"]), request)
            await send(message)

        answer = self._refusal(request)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> tp.Any:
        """Why a request gets no answer, as one; None if it gets one."""
        rules, headers = self._rules, request.headers
        if request.url.path.endswith(HEALTH):
            return None
        host = bare(headers.get("host", ""))
        if not rules.token and host not in rules.hosts:
            return problems.response(
                403, f"This server is not known as {host[:100]!r}.",
                "Use the address that `saev serve` printed, or name the proxy in front of it with "
                "--behind-proxy.",
            )  # fmt: skip
        if not _is_own(request, rules):
            return problems.response(
                403, "A page of another site asks.", "Open the explorer in a tab of its own."
            )
        too_large = _too_large(headers)
        return too_large or self._without_token(request)

    def _without_token(self, request: Request) -> tp.Any:
        """The answer to a request that shows no token; a redirection if its address has the right
        one, which then is kept as a cookie."""
        token = self._rules.token
        if not token:
            return None
        named = request.query_params.get("token", "")
        if named and request.method in _SAFE and _is_same(named, token):
            return self._with_cookie(request)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        shown = bearer if scheme.lower() == "bearer" else request.cookies.get(COOKIE, "")
        if _is_same(shown, token):
            return None
        answer = problems.response(
            401, "This server needs its token.",
            "Open the address with ?token=… that `saev serve` printed, or send the header "
            "Authorization: Bearer TOKEN.",
        )  # fmt: skip
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer

    def _with_cookie(self, request: Request) -> RedirectResponse:
        rest = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]
        query = urllib.parse.urlencode(rest)
        # Relative: a proxy may show this server below another path.
        last = request.url.path.rpartition("/")[2] or "./"
        answer = RedirectResponse(f"{last}?{query}" if query else last, 303)
        answer.set_cookie(
            COOKIE, self._rules.token, path=self._rules.path, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        answer.headers["Cache-Control"] = "no-store"
        return answer


def _is_same(shown: str, token: str) -> bool:
    return hmac.compare_digest(shown.encode(), token.encode())


def _is_own(request: Request, rules: Rules) -> bool:
    """Whether a request comes from a page of this server, or from no page."""
    origin = request.headers.get("origin")
    if origin is not None:
        # The scheme is not compared: behind a proxy, it is https outside and http here. The port
        # is: another server of the same machine is another site.
        named = urllib.parse.urlsplit(origin).netloc.lower()
        is_host = named == request.headers.get("host", "").lower()
        return is_host or bare(named) in rules.proxies
    site = request.headers.get("sec-fetch-site", "none")
    if site in ("none", "same-origin"):
        return True
    # Of what other sites may send, only opening a page is answered: in a tab, or in a frame, where
    # the policy says who may show it.
    is_page = request.headers.get("sec-fetch-mode") == "navigate"
    return is_page and request.method in _SAFE


def _too_large(headers: Headers) -> tp.Any:
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) <= MAX_BODY:
        return None
    return problems.response(
        413, f"A request of {length[:20]} bytes is too large.",
        f"Send at most {MAX_BODY >> 20} MiB.",
    )  # fmt: skip


def _add_headers(headers: MutableHeaders, request: Request) -> None:
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    is_embedded = request.query_params.get("embed") == "1"
    policy = _POLICY + (_LOCAL_FRAMES if is_embedded else "")
    headers.setdefault("Content-Security-Policy", policy)
    headers.setdefault("Cache-Control", "no-cache")


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request, at most so many bytes, also if its length is not said.

    Raises:
        Problem: it is longer.
    """
    parts, n = [], 0
    async for part in request.stream():
        n += len(part)
        if n > most:
            raise problems.Problem(
                413, f"More than {most:,} bytes were sent.", f"Send at most {most:,}."
            )
        parts.append(part)
    return b"".join(parts)
