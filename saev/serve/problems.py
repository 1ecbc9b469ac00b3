"""What goes wrong, as JSON for programs and people (RFC 9457): what it is, and what to do."""

import json
import logging
import re
import traceback

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from saev.errors import ConfigError, ImageError, IncompleteError, SaevError, StorageError
from saev.secrets import redact

logger = logging.getLogger(__name__)

_REMEDY = "Change what it names, and ask again."
_SENTENCES = re.compile(r"(?<=[.!?]) (?=[A-Z`])")
MEDIA_TYPE = "application/problem+json"


class Problem(SaevError):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        detail: what is wrong, what was found and what was expected.
        remedy: what to do.
        wait: seconds after which to ask again; 0 if that does not help.
    """

    def __init__(self, status: int, detail: str, remedy: str, *, wait: int = 0):
        super().__init__(detail)
        self.status, self.remedy, self.wait = status, remedy, wait


_TITLES = {
    400: "Wrong request", 401: "Token needed", 403: "Not allowed", 404: "Not found",
    405: "Not allowed here", 409: "Not complete", 412: "Changed meanwhile", 413: "Too large",
    415: "Wrong kind of data", 422: "Not usable", 428: "Condition needed",
    429: "Too many requests", 500: "Error in the server", 503: "Storage cannot be reached",
}  # fmt: skip
_REMEDIES = {
    404: "Start from the list of SAEs, at api/root.",
    405: "docs/explorer.md lists what may be asked.",
}


def response(status: int, detail: str, remedy: str = "", *, wait: int = 0) -> Response:
    """A problem as an answer."""
    body = {
        "type": "about:blank",
        "title": _TITLES.get(status, "Problem"),
        "status": status,
        "detail": redact(detail),
        "remedy": redact(remedy),
    }
    headers = {"Cache-Control": "no-store"}
    if wait:
        headers["Retry-After"] = str(wait)
    return Response(json.dumps(body), status, headers, media_type=MEDIA_TYPE)


def of_error(request: Request, error: Exception) -> Response:
    """The answer to a request that raised an error of saev, whose message ends with its remedy."""
    if isinstance(error, Problem):
        return response(error.status, str(error), error.remedy, wait=error.wait)
    passing = getattr(error, "passing", False)
    status = (
        503 if passing
        else 409 if isinstance(error, IncompleteError)
        else 422 if isinstance(error, ImageError)
        else 404 if isinstance(error, ConfigError)
        else 500
    )  # fmt: skip
    if isinstance(error, StorageError):
        logger.warning("%s: %s", request.url.path, error)
    *first, last = _SENTENCES.split(str(error))
    detail, remedy = (" ".join(first), last) if first else (last, _REMEDY)
    return response(status, detail, remedy, wait=2 if passing else 0)


def of_http(request: Request, error: Exception) -> Response:
    """The answer to a request for nothing that there is."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = f"{request.method} {request.url.path[:200]} is nothing that this server answers."
    return response(status, detail, _REMEDIES.get(status, ""))


def of_bug(request: Request, error: Exception) -> Response:
    """The answer to a request that met an error of the server's own, which is logged."""
    trace = redact("".join(traceback.format_exception(error)))
    logger.error("%s: an error of saev itself.\n%s", request.url.path, trace)
    return response(
        500,
        "The server met an error of its own.",
        "Its log has the details: please report them.",
    )
